// SPDX-License-Identifier: GPL-2.0

//! The events at which C code calls the driver: notifications of its ACPI device, its own interrupt
//! or ACPI's (the SCI), and the end of a suspend.
//!
//! Each registration has a reference to the handler, and ends when the device is unbound. Devres
//! releases in reverse order: it removes the callback, which blocks until all calls complete, and
//! then drops the reference.
//!
//! [`kernel::irq`] registers interrupts of a bus device, by an `unsafe` function. The SCI belongs to
//! no device, and `devm_request_irq()` logs a line of its own where it fails.
//!
//! C headers: [`include/acpi/acpi_bus.h`](srctree/include/acpi/acpi_bus.h),
//! [`include/linux/interrupt.h`](srctree/include/linux/interrupt.h),
//! [`include/linux/suspend.h`](srctree/include/linux/suspend.h)

use super::{
    acpi,
    prelude::*, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    devres,
    irq::IrqRequest, //
};

/// Callbacks for the events.
pub(crate) trait Events: Send + Sync + 'static {
    /// Called in process context, in a work queue, for each notification of the ACPI device. Several
    /// calls may run at the same time.
    fn notified(&self);

    /// Called in hard interrupt context for each SCI, whichever device has raised it.
    fn interrupted(&self);

    /// Called in hard interrupt context for each interrupt of the device's own.
    fn signalled(&self);

    /// Called in process context after a suspend or a hibernation, also one that failed. User space
    /// runs already.
    fn resumed(&self);
}

/// A registered notifier of power transitions.
///
/// # Invariants
///
/// With `CONFIG_PM_SLEEP`, `block` is registered, and its callback is `power::<T>`.
#[repr(C)]
#[pin_data(PinnedDrop)]
struct PowerNotifier<T: Events> {
    // The first field: the callback casts its address to that of the struct.
    #[pin]
    block: Opaque<bindings::notifier_block>,
    handler: Arc<T>,
}

// SAFETY: A notifier can be unregistered from any thread; the `Arc` can be sent.
unsafe impl<T: Events> Send for PowerNotifier<T> {}

#[pinned_drop]
impl<T: Events> PinnedDrop for PowerNotifier<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants the block is registered.
        #[cfg(CONFIG_PM_SLEEP)]
        unsafe {
            bindings::unregister_pm_notifier(self.block.get())
        };
    }
}

/// Returns the pointer from which [`notify`], [`interrupt`] and [`signal`] get the handler.
fn context<T>(handler: &Arc<T>) -> *mut c_void {
    Arc::as_ptr(handler).cast_mut().cast()
}

/// Calls `handler` after each suspend and hibernation. If `dev` has an ACPI companion, also for each
/// device notification (values from 0x80 on).
///
/// # Errors
///
/// - `ENODEV`: The callback for notifications could not be installed.
/// - `ENOMEM`: There is no memory for the registrations.
pub(crate) fn register<T: Events>(dev: &Device<Bound>, handler: Arc<T>) -> Result {
    let context = context(&handler);
    let notifier = try_pin_init!(PowerNotifier {
        // The callback can be called as soon as the block is registered.
        handler,
        block <- Opaque::try_ffi_init(|slot: *mut bindings::notifier_block| {
            let block = bindings::notifier_block {
                notifier_call: Some(power::<T>),
                // After the random number generator's own.
                priority: -1,
                ..pin_init::zeroed()
            };
            // SAFETY: The initializer can write to the provided `slot`.
            unsafe { slot.write(block) };
            // INVARIANT: With `CONFIG_PM_SLEEP`, if this succeeds the block is registered.
            #[cfg(CONFIG_PM_SLEEP)]
            // SAFETY: The block is valid and pinned, and the destructor unregisters it.
            to_result(unsafe { bindings::register_pm_notifier(slot) })?;
            Ok::<(), Error>(())
        }),
    }? Error);
    devres::register(dev, notifier, GFP_KERNEL)?;
    if acpi::Device::companion(dev).is_none() {
        return Ok(());
    }

    // SAFETY: The device is bound; `Device` is a transparent wrapper. The context is valid until
    // the callback is removed, by the reference of the notifier. (ACPICA does not wait for a call
    // that is about to be queued, and frees its own object.)
    to_result(unsafe {
        bindings::devm_acpi_install_notify_handler(
            core::ptr::from_ref(dev).cast_mut().cast(),
            bindings::ACPI_DEVICE_NOTIFY,
            Some(notify::<T>),
            context,
        )
    })
}

/// Calls `handler` for each SCI, whose handlers then include `name`.
/// An error is the end of a log line, and says what is missing.
pub(crate) fn on_sci<T: Events>(
    dev: &Device<Bound>,
    name: &'static CStr,
    handler: Arc<T>,
) -> Result<(), &'static str> {
    // SAFETY: This copy of the FADT was made while the machine booted, and does not change.
    let (fadt_flags, gsi) = unsafe {
        (
            bindings::acpi_gbl_FADT.flags,
            u32::from(bindings::acpi_gbl_FADT.sci_interrupt),
        )
    };
    if fadt_flags & bindings::ACPI_FADT_HW_REDUCED != 0 {
        return Err("hardware-reduced ACPI has no SCI");
    }

    let mut irq = 0;
    // SAFETY: `irq` can be written to.
    to_result(unsafe { bindings::acpi_gsi_to_irq(gsi, &mut irq) })
        .map_err(|_| "the SCI has no interrupt number")?;

    let mapping = ScopeGuard::new(move || {
        // On other architectures this would dispose of the mapping, which has no reference count.
        //
        // SAFETY: With x86's I/O APIC this puts the reference that the call above took; else it does
        // nothing. ACPI keeps a reference for its own handler, so the mapping stays.
        #[cfg(CONFIG_X86)]
        unsafe {
            bindings::acpi_unregister_gsi(gsi)
        };
    });
    devres::register(dev, mapping, GFP_KERNEL).map_err(|_| "out of memory")?;
    request(dev, irq, name, interrupt::<T>, handler).map_err(|_| "the SCI cannot be shared")
}

/// Calls `handler` for each interrupt of the device's own, whose handlers then include `name`.
///
/// # Errors
///
/// - `EBUSY`: Another driver has the interrupt, and does not share it.
/// - `ENOMEM`: There is no memory.
pub(crate) fn on_interrupt<T: Events>(
    dev: &Device<Bound>,
    irq: IrqRequest<'_>,
    name: &'static CStr,
    handler: Arc<T>,
) -> Result {
    request(dev, irq.irq(), name, signal::<T>, handler)
}

/// Waits until the handlers of the interrupt, if it is being handled, have returned. Sleeps. Not to
/// be called by such a handler.
pub(crate) fn synchronize(irq: u32) {
    // SAFETY: The function takes any number.
    unsafe { bindings::synchronize_irq(irq) };
}

/// Registers `callback`, which is [`interrupt`] or [`signal`], until `dev` is unbound.
fn request<T: Events>(
    dev: &Device<Bound>,
    irq: u32,
    name: &'static CStr,
    callback: unsafe extern "C" fn(c_int, *mut c_void) -> bindings::irqreturn_t,
    handler: Arc<T>,
) -> Result {
    // `IRQF_COND_ONESHOT`: This agrees with the `IRQF_ONESHOT` of ACPI's own handler, which has a
    // thread. `IRQF_NO_THREAD`: `threadirqs` does not move this handler into a thread.
    let flags = bindings::IRQF_SHARED | bindings::IRQF_COND_ONESHOT | bindings::IRQF_NO_THREAD;
    // SAFETY: The name is static. The context identifies the callback, and is valid until the
    // callback is freed, since the guard below has a reference.
    to_result(unsafe {
        bindings::request_threaded_irq(
            irq,
            Some(callback),
            None,
            flags as c_ulong,
            name.as_char_ptr(),
            context(&handler),
        )
    })?;

    let registration = ScopeGuard::new(move || {
        // SAFETY: The callback is registered, with this context.
        unsafe { bindings::free_irq(irq, context(&handler)) };
    });
    devres::register(dev, registration, GFP_KERNEL)
}

/// # Safety
///
/// `context` must come from [`context`], and the reference must outlive this call.
unsafe extern "C" fn notify<T: Events>(
    _: bindings::acpi_handle,
    _event: u32,
    context: *mut c_void,
) {
    // SAFETY: By the safety requirements.
    unsafe { &*context.cast_const().cast::<T>() }.notified();
}

/// # Safety
///
/// `context` must come from [`context`], and the reference must outlive this call.
unsafe extern "C" fn interrupt<T: Events>(_: c_int, context: *mut c_void) -> bindings::irqreturn_t {
    // SAFETY: By the safety requirements.
    unsafe { &*context.cast_const().cast::<T>() }.interrupted();
    // Another handler returns whether the interrupt was handled.
    bindings::irqreturn::IRQ_NONE
}

/// # Safety
///
/// `context` must come from [`context`], and the reference must outlive this call.
unsafe extern "C" fn signal<T: Events>(_: c_int, context: *mut c_void) -> bindings::irqreturn_t {
    // SAFETY: By the safety requirements.
    unsafe { &*context.cast_const().cast::<T>() }.signalled();
    bindings::irqreturn::IRQ_HANDLED
}

/// # Safety
///
/// This function should be only used as the callback of a [`PowerNotifier`]'s block.
unsafe extern "C" fn power<T: Events>(
    block: *mut bindings::notifier_block,
    event: c_ulong,
    _data: *mut c_void,
) -> c_int {
    // SAFETY: `Opaque` is transparent, so this is the first field of a `PowerNotifier<T>`, which is
    // valid while it is registered. Only its other field is accessed.
    let handler = unsafe { &(*block.cast::<PowerNotifier<T>>()).handler };

    if let bindings::PM_POST_HIBERNATION | bindings::PM_POST_SUSPEND = event as u32 {
        handler.resumed();
    }
    bindings::NOTIFY_DONE as c_int
}
