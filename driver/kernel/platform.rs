// SPDX-License-Identifier: GPL-2.0

//! What [`kernel::platform`] lacks: devices of one's own.
//!
//! C header: [`include/linux/platform_device.h`](srctree/include/linux/platform_device.h)

use super::acpi;
use core::ptr::NonNull;
use kernel::{
    bindings,
    error::from_err_ptr,
    ffi::c_int,
    prelude::*, //
};

/// `PLATFORM_DEVID_AUTO`, which bindgen cannot evaluate.
const PLATFORM_DEVID_AUTO: c_int = -2;

/// A platform device that this module has registered. It is unregistered when this is dropped.
///
/// # Invariants
///
/// Points at a platform device that is registered, by this value.
pub(crate) struct OwnedDevice(NonNull<bindings::platform_device>);

// SAFETY: A platform device can be unregistered from any thread.
unsafe impl Send for OwnedDevice {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl Sync for OwnedDevice {}

impl OwnedDevice {
    /// Registers one more device for an ACPI device that has one already. The platform driver
    /// `name` is for it; the companion's IDs are for its first device only.
    ///
    /// # Errors
    ///
    /// Those of `platform_device_register_full()`.
    pub(crate) fn new(name: &'static CStr, companion: &acpi::Device) -> Result<Self> {
        let info = bindings::platform_device_info {
            name: name.as_char_ptr(),
            id: PLATFORM_DEVID_AUTO,
            fwnode: companion.fwnode(),
            ..pin_init::zeroed()
        };
        // SAFETY: `info` is valid, and is not used after the call. The device takes a reference to
        // the companion's node.
        let device = from_err_ptr(unsafe { bindings::platform_device_register_full(&info) })?;
        // INVARIANT: It was just registered.
        NonNull::new(device).map(Self).ok_or(ENOMEM)
    }
}

impl Drop for OwnedDevice {
    fn drop(&mut self) {
        // SAFETY: By the type invariants it is registered.
        unsafe { bindings::platform_device_unregister(self.0.as_ptr()) };
    }
}
