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
    prelude::*,
    sync::aref::ARef, //
};

/// `PLATFORM_DEVID_AUTO`, which bindgen cannot evaluate.
const PLATFORM_DEVID_AUTO: c_int = -2;

/// A platform device that this module has registered. Dropping it unregisters the device.
///
/// # Invariants
///
/// Points at a platform device that is registered, by this value. Its firmware node is that of
/// `companion`.
pub(crate) struct OwnedDevice {
    device: NonNull<bindings::platform_device>,
    // The platform device has no reference of its own to it. Dropped after the device was
    // unregistered.
    _companion: ARef<acpi::Device>,
}

// SAFETY: A platform device can be unregistered from any thread.
unsafe impl Send for OwnedDevice {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl Sync for OwnedDevice {}

impl OwnedDevice {
    /// Registers another device for an ACPI device that has one already. The platform driver `name`
    /// binds it: the companion's IDs are for its first device only.
    ///
    /// # Errors
    ///
    /// Those of `platform_device_register_full()`.
    pub(crate) fn new(name: &'static CStr, companion: ARef<acpi::Device>) -> Result<Self> {
        let info = bindings::platform_device_info {
            name: name.as_char_ptr(),
            id: PLATFORM_DEVID_AUTO,
            fwnode: companion.fwnode(),
            ..pin_init::zeroed()
        };
        // SAFETY: `info` is valid, and is not used after the call. The firmware node is valid until
        // the device is unregistered, by the reference that is kept beside it.
        let device = from_err_ptr(unsafe { bindings::platform_device_register_full(&info) })?;
        // INVARIANT: The device was just registered, with that node.
        Ok(Self {
            device: NonNull::new(device).ok_or(ENOMEM)?,
            _companion: companion,
        })
    }
}

impl Drop for OwnedDevice {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the device is registered.
        unsafe { bindings::platform_device_unregister(self.device.as_ptr()) };
    }
}
