// SPDX-License-Identifier: GPL-2.0

//! What [`kernel::platform`] lacks: registering devices.
//!
//! C header: [`include/linux/platform_device.h`](srctree/include/linux/platform_device.h)

use super::{
    acpi,
    prelude::*, //
};

/// `PLATFORM_DEVID_AUTO`, which bindgen cannot evaluate.
const PLATFORM_DEVID_AUTO: c_int = -2;

/// A platform device that this module has registered. Dropping it unregisters the device.
///
/// # Invariants
///
/// Points at a platform device that this value has registered, with `companion`'s firmware node.
pub(crate) struct OwnedDevice {
    device: NonNull<bindings::platform_device>,
    // `fwnode_handle_get()` takes no reference to an ACPI node. This one is put after the device
    // was unregistered.
    companion: ARef<acpi::Device>,
}

// SAFETY: Any thread can unregister a platform device.
unsafe impl Send for OwnedDevice {}
// SAFETY: A shared reference gives access to nothing.
unsafe impl Sync for OwnedDevice {}

impl OwnedDevice {
    /// Registers a second platform device for an ACPI device. The platform driver `name` binds it
    /// by name: ACPI IDs match only the first one.
    pub(crate) fn new(name: &'static CStr, companion: ARef<acpi::Device>) -> Result<Self> {
        let info = bindings::platform_device_info {
            name: name.as_char_ptr(),
            id: PLATFORM_DEVID_AUTO,
            fwnode: companion.fwnode(),
            ..pin_init::zeroed()
        };
        // SAFETY: `info` is valid, and is not used after the call. By the reference that is kept,
        // the firmware node is valid until the device is unregistered.
        let device = from_err_ptr(unsafe { bindings::platform_device_register_full(&info) })?;
        // INVARIANT: The device was just registered, with that node.
        Ok(Self {
            device: NonNull::new(device).ok_or(ENOMEM)?,
            companion,
        })
    }

    /// Returns whether the device was registered for this ACPI device.
    pub(crate) fn is_of(&self, companion: &acpi::Device) -> bool {
        core::ptr::eq(&*self.companion, companion)
    }
}

impl Drop for OwnedDevice {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the device is registered.
        unsafe { bindings::platform_device_unregister(self.device.as_ptr()) };
    }
}
