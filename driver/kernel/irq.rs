// SPDX-License-Identifier: GPL-2.0

//! What [`kernel::irq`] lacks: interrupts that belong to no device of ours, and are shared with those
//! they belong to.
//!
//! C header: [`include/linux/interrupt.h`](srctree/include/linux/interrupt.h)

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
    irq::IrqReturn,
    prelude::*,
    sync::Arc, //
};

/// An interrupt line that is there as long as the machine, whose handlers share it.
///
/// # Invariants
///
/// The number is that of an interrupt that is never freed.
#[derive(Clone, Copy)]
pub(crate) struct SharedLine(u32);

impl SharedLine {
    /// # Safety
    ///
    /// `irq` has to be the number of an interrupt that is never freed.
    pub(super) unsafe fn new(irq: u32) -> Self {
        // INVARIANT: By the safety requirements.
        Self(irq)
    }
}

/// Callbacks for a shared interrupt.
pub(crate) trait SharedHandler: Send + Sync + 'static {
    /// Called whenever the interrupt comes, whoever it is for: in interrupt context (so that it must
    /// not sleep), on one CPU at a time.
    ///
    /// [`IrqReturn::None`]: it was for somebody else.
    fn handle(&self) -> IrqReturn;
}

/// A registered handler.
///
/// # Invariants
///
/// `callback::<T>` is registered for `line`, with a pointer to `handler`'s data.
struct Registration<T: SharedHandler> {
    line: SharedLine,
    handler: Arc<T>,
}

fn cookie<T>(handler: &Arc<T>) -> *mut c_void {
    Arc::as_ptr(handler).cast_mut().cast()
}

impl<T: SharedHandler> Drop for Registration<T> {
    fn drop(&mut self) {
        // This waits for a running callback, so that `handler` is dropped after the last use.
        //
        // SAFETY: By the type invariants it is registered, with this cookie.
        unsafe { bindings::free_irq(self.line.0, cookie(&self.handler)) };
    }
}

/// Calls `handler` whenever the interrupt comes, until `dev` is unbound. It is removed by devres.
///
/// If the others on this line keep it masked until their threads are done (`IRQF_ONESHOT`), that
/// is so for this handler, too. It has no thread itself, and so nobody waits for it.
///
/// # Errors
///
/// - `EBUSY`: it is not shared, or there are too many on this line.
/// - `EINVAL`: nobody can request it.
/// - `ENOMEM`: there is no memory for the registration.
///
/// And those of `request_irq()`.
pub(crate) fn register_shared<T: SharedHandler>(
    dev: &Device<Bound>,
    line: SharedLine,
    handler: Arc<T>,
) -> Result {
    let flags = bindings::IRQF_SHARED | bindings::IRQF_COND_ONESHOT;

    // SAFETY: The name is static. The cookie is valid until the handler is removed, since the
    // registration below owns a reference to it, and identifies it.
    to_result(unsafe {
        bindings::request_threaded_irq(
            line.0,
            Some(callback::<T>),
            None,
            flags as c_ulong,
            crate::NAME.as_char_ptr(),
            cookie(&handler),
        )
    })?;

    // INVARIANT: It was registered just above.
    devres::register(dev, Registration { line, handler }, GFP_KERNEL)
}

/// # Safety
///
/// To be used only as the handler that [`register_shared`] requests.
unsafe extern "C" fn callback<T: SharedHandler>(
    _irq: c_int,
    cookie: *mut c_void,
) -> bindings::irqreturn_t {
    // SAFETY: `cookie` was made from an `Arc<T>` that is not dropped before the handler has been
    // removed, which waits for this call.
    let handler = unsafe { &*cookie.cast_const().cast::<T>() };

    bindings::irqreturn_t(handler.handle() as u32)
}
