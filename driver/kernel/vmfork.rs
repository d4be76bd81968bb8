// SPDX-License-Identifier: GPL-2.0

//! Being told that the kernel was reseeded because its virtual machine was forked.
//!
//! C header: [`include/linux/random.h`](srctree/include/linux/random.h)

use kernel::{
    bindings,
    device::{
        Bound,
        Device, //
    },
    devres,
    error::to_result,
    ffi::{
        c_int,
        c_ulong,
        c_void, //
    },
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// Callbacks for the reseeds.
///
/// They are called in process context, under a lock of the notifier chain's; several may run at the
/// same time.
pub(crate) trait Notifier: Send + Sync + 'static {
    /// Called after `add_vmfork_randomness()` has reseeded the kernel's random number generator.
    fn reseeded(&self);
}

/// A registered notifier.
///
/// # Invariants
///
/// `block` is registered, and its callback is `reseeded::<T>`.
#[repr(C)]
#[pin_data(PinnedDrop)]
struct Registration<T: Notifier> {
    // It comes first: its address is that of the whole.
    #[pin]
    block: Opaque<bindings::notifier_block>,
    notifier: Arc<T>,
}

// SAFETY: A notifier can be unregistered from any thread; the `Arc` can be sent.
unsafe impl<T: Notifier> Send for Registration<T> {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl<T: Notifier> Sync for Registration<T> {}

impl<T: Notifier> Registration<T> {
    fn new(notifier: Arc<T>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // What the callback uses is there before it can be called.
            notifier,
            block <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                let block = bindings::notifier_block {
                    notifier_call: Some(reseeded::<T>),
                    ..pin_init::zeroed()
                };
                // SAFETY: The initializer can write to the provided `slot`.
                unsafe { slot.write(block) };
                // INVARIANT: If this succeeds it is registered.
                // SAFETY: The block is valid and pinned, and the destructor unregisters it.
                to_result(unsafe { bindings::register_random_vmfork_notifier(slot) })
            }),
        })
    }
}

#[pinned_drop]
impl<T: Notifier> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // This waits for running callbacks, so that `notifier` is dropped after the last use.
        //
        // SAFETY: By the type invariants it is registered.
        unsafe { bindings::unregister_random_vmfork_notifier(self.block.get()) };
    }
}

/// # Safety
///
/// To be used only as the callback of a [`Registration`]'s block.
unsafe extern "C" fn reseeded<T: Notifier>(
    block: *mut bindings::notifier_block,
    _action: c_ulong,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: `Opaque` is transparent, so this is the first field of a `Registration<T>`, which is
    // valid while it is registered. Only its other field is accessed.
    let notifier = unsafe { &(*block.cast::<Registration<T>>()).notifier };

    notifier.reseeded();
    bindings::NOTIFY_DONE as c_int
}

/// Calls `notifier` after each such reseed, until `dev` is unbound. It is unregistered by devres.
///
/// # Errors
///
/// `ENOMEM`: there is no memory for the registration. And those of
/// `register_random_vmfork_notifier()`.
pub(crate) fn register_notifier<T: Notifier>(dev: &Device<Bound>, notifier: Arc<T>) -> Result {
    devres::register(dev, Registration::new(notifier), GFP_KERNEL)
}
