// SPDX-License-Identifier: GPL-2.0

//! What [`kernel::platform`] lacks: finding devices, and registering them.
//!
//! C header: [`include/linux/platform_device.h`](srctree/include/linux/platform_device.h)

use super::prelude::*;
use kernel::platform::Device;

/// Returns the platform devices whose node in the device tree is compatible with this.
#[cfg(CONFIG_OF)]
pub(crate) fn with_compatible(compatible: &'static CStr) -> impl Iterator<Item = ARef<Device>> {
    /// # Safety
    ///
    /// `dev` must be valid, and `compatible` a C string.
    unsafe extern "C" fn matches(dev: *mut bindings::device, compatible: *const c_void) -> c_int {
        // SAFETY: By the safety requirements. The function takes a null node.
        unsafe { bindings::of_device_is_compatible((*dev).of_node, compatible.cast()) }
    }

    let mut last = None::<ARef<Device>>;
    core::iter::from_fn(move || {
        let start = last.as_deref().map_or(core::ptr::null_mut(), |last| {
            let last: *const bindings::platform_device = core::ptr::from_ref(last).cast();
            // SAFETY: `Device` is a transparent wrapper, and the device is valid.
            unsafe { &raw const (*last).dev }.cast_mut()
        });
        // SAFETY: The bus is registered. `start` is null or a device on it, with a reference.
        let next = unsafe {
            bindings::bus_find_device(
                &raw const bindings::platform_bus_type,
                start,
                compatible.as_char_ptr().cast(),
                Some(matches),
            )
        };
        last = NonNull::new(next).map(|next| {
            // SAFETY: The device is valid, and comes with a reference. Each device on this bus is in a
            // `struct platform_device`, of which `Device` is a transparent wrapper.
            unsafe {
                let next = kernel::container_of!(next.as_ptr(), bindings::platform_device, dev);
                ARef::from_raw(NonNull::new_unchecked(next.cast()))
            }
        });
        last.clone()
    })
}

/// Without `CONFIG_OF` there is none.
#[cfg(not(CONFIG_OF))]
pub(crate) fn with_compatible(_: &'static CStr) -> impl Iterator<Item = ARef<Device>> {
    core::iter::empty()
}

#[cfg(CONFIG_VMGENID = "y")]
pub(crate) use owned::OwnedDevice;

#[cfg(CONFIG_VMGENID = "y")]
mod owned {
    use super::*;
    use crate::driver::kernel::acpi;

    /// `PLATFORM_DEVID_AUTO`, which bindgen cannot evaluate.
    const PLATFORM_DEVID_AUTO: c_int = -2;

    /// A platform device that this module has registered. Dropping it unregisters the device.
    ///
    /// # Invariants
    ///
    /// Points at a platform device that this value has registered, with `companion`'s firmware node
    /// if there is a companion.
    pub(crate) struct OwnedDevice {
        device: NonNull<bindings::platform_device>,
        // `fwnode_handle_get()` takes no reference to an ACPI node. This one is put after the device
        // was unregistered.
        companion: Option<ARef<acpi::Device>>,
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
                fwnode: companion.fwnode(),
                ..pin_init::zeroed()
            };
            // SAFETY: By the reference that is kept, the node is valid until the device is unregistered.
            unsafe { Self::register(name, info, Some(companion)) }
        }

        /// Registers a second platform device for the same node of the device tree as `first`, with
        /// the same resources. The platform driver `name` binds it by name.
        pub(crate) fn beside(name: &'static CStr, first: &Device) -> Result<Self> {
            // SAFETY: `Device` is a transparent wrapper, and the device is valid. Its node and its
            // resources do not change after its registration.
            let info = unsafe {
                let first: *const bindings::platform_device = core::ptr::from_ref(first).cast();
                bindings::platform_device_info {
                    fwnode: (*first).dev.fwnode,
                    of_node_reused: true,
                    res: (*first).resource,
                    num_res: (*first).num_resources,
                    ..pin_init::zeroed()
                }
            };
            // SAFETY: The device has a reference of its own to a node of the device tree.
            unsafe { Self::register(name, info, None) }
        }

        /// # Safety
        ///
        /// The pointers in `info` must be valid during the call, and the firmware node until the device
        /// is unregistered.
        unsafe fn register(
            name: &'static CStr,
            info: bindings::platform_device_info,
            companion: Option<ARef<acpi::Device>>,
        ) -> Result<Self> {
            let info = bindings::platform_device_info {
                name: name.as_char_ptr(),
                id: PLATFORM_DEVID_AUTO,
                ..info
            };
            // SAFETY: By the safety requirements `info` is valid. It is not used after the call.
            let device = from_err_ptr(unsafe { bindings::platform_device_register_full(&info) })?;
            // INVARIANT: The device was just registered, with that node.
            Ok(Self {
                device: NonNull::new(device).ok_or(ENOMEM)?,
                companion,
            })
        }

        /// Returns whether the device was registered for this ACPI device.
        pub(crate) fn is_of(&self, companion: &acpi::Device) -> bool {
            let own = self.companion.as_deref();
            own.is_some_and(|own| core::ptr::eq(own, companion))
        }
    }

    impl Drop for OwnedDevice {
        fn drop(&mut self) {
            // SAFETY: By the type invariants the device is registered.
            unsafe { bindings::platform_device_unregister(self.device.as_ptr()) };
        }
    }
}
