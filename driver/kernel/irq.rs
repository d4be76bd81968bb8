// SPDX-License-Identifier: GPL-2.0

//! ACPI's interrupt (the SCI), shared with ACPI's own handler.
//!
//! [`kernel::irq`] registers interrupts of a bus device. The SCI belongs to no device.
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
    prelude::*,
    sync::Arc, //
};

/// Callbacks for the SCI.
pub(crate) trait SciHandler: Send + Sync + 'static {
    /// Called in hard interrupt context for each SCI, whichever device has raised it.
    fn interrupted(&self);
}

/// The SCI's mapping to an interrupt number.
///
/// # Invariants
///
/// `irq` is mapped to the SCI. With x86's I/O APIC, this value owns one reference to the mapping.
struct Sci {
    #[cfg_attr(not(CONFIG_X86), expect(dead_code))]
    gsi: u32,
    irq: u32,
}

impl Sci {
    /// Takes a reference to the mapping.
    ///
    /// # Errors
    ///
    /// A phrase that says what is missing, for the end of a log line.
    fn new() -> Result<Self, &'static str> {
        // SAFETY: This copy of the FADT was made while the machine booted, and does not change.
        let (flags, gsi) = unsafe {
            (
                bindings::acpi_gbl_FADT.flags,
                bindings::acpi_gbl_FADT.sci_interrupt,
            )
        };
        if flags & bindings::ACPI_FADT_HW_REDUCED != 0 {
            return Err("hardware-reduced ACPI has no SCI");
        }

        let gsi = u32::from(gsi);
        let mut irq = 0;
        // SAFETY: `irq` can be written to.
        to_result(unsafe { bindings::acpi_gsi_to_irq(gsi, &mut irq) })
            .map_err(|_| "the SCI has no interrupt number")?;
        // INVARIANT: The function returned the number and, with an I/O APIC, took a reference.
        Ok(Self { gsi, irq })
    }
}

impl Drop for Sci {
    fn drop(&mut self) {
        // On other architectures this would dispose of the mapping, which has no reference count.
        //
        // SAFETY: By the type invariants this puts this value's reference, or does nothing if there
        // is none. ACPI keeps one for its own handler, so the mapping stays.
        #[cfg(CONFIG_X86)]
        unsafe {
            bindings::acpi_unregister_gsi(self.gsi)
        };
    }
}

/// A registered handler of the SCI.
///
/// # Invariants
///
/// `callback::<T>` is registered for `sci.irq`, with a pointer to `handler`'s data.
struct Registration<T: SciHandler> {
    sci: Sci,
    handler: Arc<T>,
}

fn cookie<T>(handler: &Arc<T>) -> *mut c_void {
    Arc::as_ptr(handler).cast_mut().cast()
}

impl<T: SciHandler> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the handler is registered, with this cookie. This blocks
        // until all in-flight calls complete.
        unsafe { bindings::free_irq(self.sci.irq, cookie(&self.handler)) };
    }
}

/// Registers `handler` for the SCI until `dev` is unbound.
///
/// # Errors
///
/// A phrase that says what is missing, for the end of a log line.
pub(crate) fn register_sci_handler<T: SciHandler>(
    dev: &Device<Bound>,
    name: &'static CStr,
    handler: Arc<T>,
) -> Result<(), &'static str> {
    let sci = Sci::new()?;
    // `IRQF_COND_ONESHOT`: This agrees with the `IRQF_ONESHOT` of ACPI's own handler, which has a
    // thread. `IRQF_NO_THREAD`: `threadirqs` does not move this handler into a thread.
    let flags = bindings::IRQF_SHARED | bindings::IRQF_COND_ONESHOT | bindings::IRQF_NO_THREAD;

    // SAFETY: The name is static. The cookie identifies the handler, and is valid until the handler
    // is freed, since the registration below owns a reference to it.
    to_result(unsafe {
        bindings::request_threaded_irq(
            sci.irq,
            Some(callback::<T>),
            None,
            flags as c_ulong,
            name.as_char_ptr(),
            cookie(&handler),
        )
    })
    .map_err(|_| "the SCI cannot be shared")?;

    // INVARIANT: The handler was registered just above.
    devres::register(dev, Registration { sci, handler }, GFP_KERNEL).map_err(|_| "out of memory")
}

/// # Safety
///
/// This function should be only used as the handler in [`register_sci_handler`].
unsafe extern "C" fn callback<T: SciHandler>(
    _irq: c_int,
    cookie: *mut c_void,
) -> bindings::irqreturn_t {
    // SAFETY: `cookie` points at the data of an `Arc<T>` that outlives the handler.
    let handler = unsafe { &*cookie.cast_const().cast::<T>() };

    handler.interrupted();
    // Another handler returns whether the interrupt was handled.
    bindings::irqreturn::IRQ_NONE
}
