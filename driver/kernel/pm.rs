// SPDX-License-Identifier: GPL-2.0

//! Notifiers for the end of a suspend or a hibernation.
//!
//! C header: [`include/linux/suspend.h`](srctree/include/linux/suspend.h)

use kernel::{
    bindings,
    device::{
        Bound,
        Device, //
    },
    devres,
    ffi::{
        c_int,
        c_ulong,
        c_void, //
    },
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// Callbacks for the end of a suspend or a hibernation.
pub(crate) trait Resume: Send + Sync + 'static {
    /// Called in process context after a suspend or a hibernation, also one that failed. User space
    /// runs already.
    fn resumed(&self);
}

/// A registered notifier.
///
/// # Invariants
///
/// With `CONFIG_PM_SLEEP`, `block` is registered, and its callback is `notify::<T>`.
#[repr(C)]
#[pin_data(PinnedDrop)]
struct Registration<T: Resume> {
    // The first field: the callback casts its address to that of the struct.
    #[pin]
    block: Opaque<bindings::notifier_block>,
    handler: Arc<T>,
}

// SAFETY: A notifier can be unregistered from any thread; the `Arc` can be sent.
unsafe impl<T: Resume> Send for Registration<T> {}

#[pinned_drop]
impl<T: Resume> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants the block is registered. This blocks until all in-flight
        // calls complete.
        #[cfg(CONFIG_PM_SLEEP)]
        unsafe {
            bindings::unregister_pm_notifier(self.block.get())
        };
    }
}

/// Calls `handler` after each suspend and hibernation, until `dev` is unbound.
///
/// # Errors
///
/// `ENOMEM`: There is no memory for the registration.
pub(crate) fn register<T: Resume>(dev: &Device<Bound>, handler: Arc<T>) -> Result {
    devres::register(
        dev,
        try_pin_init!(Registration {
            // The callback can be called as soon as the block is registered.
            handler,
            block <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
                let block = bindings::notifier_block {
                    notifier_call: Some(notify::<T>),
                    // After the random number generator's own.
                    priority: -1,
                    ..pin_init::zeroed()
                };
                // SAFETY: The initializer can write to the provided `slot`.
                unsafe { slot.write(block) };
                // INVARIANT: With `CONFIG_PM_SLEEP`, if this succeeds the block is registered.
                #[cfg(CONFIG_PM_SLEEP)]
                // SAFETY: The block is valid and pinned, and the destructor unregisters it.
                kernel::error::to_result(unsafe { bindings::register_pm_notifier(slot) })?;
                Ok::<(), Error>(())
            }),
        }? Error),
        GFP_KERNEL,
    )
}

/// # Safety
///
/// This function should be only used as the callback of a [`Registration`]'s block.
unsafe extern "C" fn notify<T: Resume>(
    block: *mut bindings::notifier_block,
    event: c_ulong,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: `Opaque` is transparent, so this is the first field of a `Registration<T>`, which is
    // valid while it is registered. Only its other field is accessed.
    let handler = unsafe { &(*block.cast::<Registration<T>>()).handler };

    if let bindings::PM_POST_HIBERNATION | bindings::PM_POST_SUSPEND = event as u32 {
        handler.resumed();
    }
    bindings::NOTIFY_DONE as c_int
}
