// SPDX-License-Identifier: GPL-2.0

//! ACPI's interrupt (the SCI), shared with ACPI's own handler.
//!
//! [`kernel::irq`] registers interrupts that belong to a device; this one belongs to none.
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
    /// Called in hard interrupt context, for each SCI, whatever has raised it.
    fn interrupted(&self);
}

/// The SCI's mapping to an interrupt number.
///
/// # Invariants
///
/// `irq` is mapped to the SCI. Where the mapping is counted (by x86's I/O APIC), one reference to it
/// is this value's.
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
    /// What is missing, in words that end a sentence.
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
        // SAFETY: The number can be written to.
        to_result(unsafe { bindings::acpi_gsi_to_irq(gsi, &mut irq) })
            .map_err(|_| "the SCI has no interrupt number")?;
        // INVARIANT: The function returned the number, and has counted the reference if it counts.
        Ok(Self { gsi, irq })
    }
}

impl Drop for Sci {
    fn drop(&mut self) {
        // Other architectures with an SCI do not count, but dispose of the mapping.
        //
        // SAFETY: By the type invariants the reference is this value's to give back. ACPI has
        // another one for its own handler, so the mapping stays.
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
/// What is missing, in words that end a sentence.
pub(crate) fn register_sci_handler<T: SciHandler>(
    dev: &Device<Bound>,
    name: &'static CStr,
    handler: Arc<T>,
) -> Result<(), &'static str> {
    let sci = Sci::new()?;
    // `IRQF_COND_ONESHOT`: ACPI's own handler has a thread, until which the line stays masked.
    // `IRQF_NO_THREAD`: This one has none, even if the kernel was booted with `threadirqs`.
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
    // SAFETY: `cookie` points at the data of an `Arc<T>` that is dropped after the handler was freed.
    let handler = unsafe { &*cookie.cast_const().cast::<T>() };

    handler.interrupted();
    // The interrupt is for another handler, which says whether it was handled.
    bindings::irqreturn::IRQ_NONE
}
