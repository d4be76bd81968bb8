// SPDX-License-Identifier: GPL-2.0

//! ACPI companions, and evaluation of their objects.
//!
//! C headers: [`include/acpi/acpi_bus.h`](srctree/include/acpi/acpi_bus.h),
//! [`include/acpi/acpixf.h`](srctree/include/acpi/acpixf.h)

use super::prelude::*;
use kernel::device::{
    self,
    Bound, //
};

/// `ACPI_ALLOCATE_BUFFER` of `include/acpi/actypes.h`, which bindgen cannot evaluate.
const ACPI_ALLOCATE_BUFFER: bindings::acpi_size = bindings::acpi_size::MAX;

/// `AE_OK` and `AE_NOT_FOUND` of `include/acpi/acexcep.h`; likewise.
const AE_OK: bindings::acpi_status = 0;
const AE_NOT_FOUND: bindings::acpi_status = 5;

/// An ACPI device object (`struct acpi_device`), companion of a device on another bus.
///
/// # Invariants
///
/// Wraps a valid `struct acpi_device`.
#[repr(transparent)]
pub(crate) struct Device(Opaque<bindings::acpi_device>);

impl Device {
    /// Returns the ACPI companion of `dev`, if it has one: `ACPI_COMPANION()`.
    pub(crate) fn companion(dev: &device::Device<Bound>) -> Option<&Self> {
        let raw: *const bindings::device = core::ptr::from_ref(dev).cast();
        // SAFETY: The device is valid, and `fwnode` does not change while it is bound. Its type is a
        // transparent wrapper.
        let fwnode = unsafe { (*raw).fwnode };

        // SAFETY: `fwnode` is null or valid; the function takes either.
        if !unsafe { bindings::is_acpi_device_node(fwnode) } {
            return None;
        }

        // SAFETY: An ACPI device node is the field `fwnode` of a `struct acpi_device`.
        let adev = unsafe { kernel::container_of!(fwnode, bindings::acpi_device, fwnode) };

        // SAFETY: The companion outlives the borrow of `dev`: ACPI removes the devices of a
        // companion before the companion, and `OwnedDevice` has a reference. `Device` is a
        // transparent wrapper.
        Some(unsafe { &*adev.cast::<Self>() })
    }

    fn as_raw(&self) -> *mut bindings::acpi_device {
        self.0.get()
    }

    /// Returns the device's firmware node.
    #[cfg(CONFIG_VMGENID = "y")]
    pub(super) fn fwnode(&self) -> *mut bindings::fwnode_handle {
        // SAFETY: By the type invariants the device is valid.
        unsafe { &raw mut (*self.as_raw()).fwnode }
    }

    /// Returns the devices that have this ID, as `_HID` or `_CID`.
    pub(crate) fn with_id(id: &'static CStr) -> impl Iterator<Item = ARef<Self>> {
        let mut last = None::<ARef<Self>>;
        core::iter::from_fn(move || {
            let previous = last.take().map_or(core::ptr::null_mut(), |device| {
                ARef::into_raw(device).as_ptr()
            });
            // SAFETY: `previous` is null, or a device with a reference that the function takes over.
            // `id` is a C string; a null pointer and -1 mean "any".
            let next = unsafe {
                bindings::acpi_dev_get_next_match_dev(
                    previous.cast(),
                    id.as_char_ptr(),
                    core::ptr::null(),
                    -1,
                )
            };
            // SAFETY: The device is valid, and comes with a reference.
            last = NonNull::new(next.cast()).map(|device| unsafe { ARef::from_raw(device) });
            last.clone()
        })
    }

    /// Returns the device's memory (`_CRS`): the address and the length in bytes. Returns `None` if
    /// it does not have exactly one range of memory.
    pub(crate) fn memory(&self) -> Option<(u64, u64)> {
        let mut list = bindings::list_head::default();
        // SAFETY: The list is initialized, then filled with entries that are ours to free. By the
        // type invariants the device is valid.
        let count = unsafe {
            bindings::INIT_LIST_HEAD(&mut list);
            bindings::acpi_dev_get_memory_resources(self.as_raw(), &mut list)
        };
        let memory = (count == 1).then(|| {
            // SAFETY: There is one entry in the list, and its resource is valid.
            let res =
                unsafe { *(*kernel::container_of!(list.next, bindings::resource_entry, node)).res };
            (res.start, res.end - res.start + 1)
        });
        // SAFETY: The list is valid, also if the call has failed.
        unsafe { bindings::acpi_dev_free_resource_list(&mut list) };
        memory
    }

    /// Evaluates the object or method `name`, without arguments, below this device.
    ///
    /// # Errors
    ///
    /// - `ENOENT`: There is no such object.
    /// - `ENODATA`: The object is a method that returned nothing.
    /// - `EIO`: The evaluation failed, or could not be begun.
    pub(crate) fn evaluate(&self, name: &CStr) -> Result<Pin<KBox<Object>>> {
        let mut object = core::ptr::null_mut();

        // An evaluation returns the same status if the object is absent and if its code refers to
        // an absent object. So this looks the object up first.
        //
        // SAFETY: By the type invariants the handle is valid. `name` is a C string that the
        // function does not write to; `object` can be written to.
        match unsafe {
            bindings::acpi_get_handle(
                (*self.as_raw()).handle,
                name.as_char_ptr().cast_mut(),
                &mut object,
            )
        } {
            AE_OK => (),
            AE_NOT_FOUND => return Err(ENOENT),
            _ => return Err(EIO),
        }

        let mut buffer = bindings::acpi_buffer {
            length: ACPI_ALLOCATE_BUFFER,
            pointer: core::ptr::null_mut(),
        };

        // SAFETY: The handle was found just now. The two null pointers mean "the object itself" and
        // "no arguments", and `buffer` asks for an allocated result.
        let status = unsafe {
            bindings::acpi_evaluate_object(
                object,
                core::ptr::null_mut(),
                core::ptr::null_mut(),
                &mut buffer,
            )
        };

        if status != AE_OK {
            // SAFETY: The buffer is null or an allocation that is ours to free.
            unsafe { bindings::kfree(buffer.pointer) };
            return Err(EIO);
        }
        if buffer.pointer.is_null() {
            return Err(ENODATA);
        }
        // SAFETY: After a success the buffer is an object that is ours to free. ACPICA has allocated
        // it with `kmalloc()`. `Object` is a transparent wrapper.
        let object: KBox<Object> = unsafe { KBox::from_raw(buffer.pointer.cast()) };
        // INVARIANT: The elements of a package are in the same allocation, out of which the object
        // is not moved.
        Ok(KBox::into_pin(object))
    }
}

// SAFETY: A `struct acpi_device` is counted by the `struct device` in it.
unsafe impl kernel::sync::aref::AlwaysRefCounted for Device {
    fn inc_ref(&self) {
        // SAFETY: By the type invariants the device is valid.
        unsafe { bindings::get_device(&raw mut (*self.as_raw()).dev) };
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller gives up a reference, so the device is valid.
        unsafe { bindings::put_device(&raw mut (*obj.as_ref().as_raw()).dev) };
    }
}

/// An ACPI object (`union acpi_object`).
///
/// # Invariants
///
/// Wraps a valid object that does not change. The elements of a package are such objects, and live
/// as long as the package.
#[repr(transparent)]
pub(crate) struct Object(Opaque<bindings::acpi_object>);

impl Object {
    fn kind(&self) -> u32 {
        // SAFETY: By the type invariants the object is valid; all its variants begin with the type.
        unsafe { (*self.0.get()).type_ }
    }

    /// Returns the value of an Integer.
    pub(crate) fn integer(&self) -> Option<u64> {
        if self.kind() != bindings::ACPI_TYPE_INTEGER {
            return None;
        }
        // SAFETY: The object is an Integer.
        Some(unsafe { (*self.0.get()).integer.value })
    }

    /// Returns the elements of a Package.
    pub(crate) fn package(&self) -> Option<&[Object]> {
        if self.kind() != bindings::ACPI_TYPE_PACKAGE {
            return None;
        }
        // SAFETY: The object is a Package.
        let package = unsafe { (*self.0.get()).package };
        if package.count == 0 {
            return Some(&[]);
        }
        // SAFETY: By the type invariants `elements` points at `count` valid objects, which live as
        // long as `self`, and `Object` is a transparent wrapper.
        Some(unsafe {
            core::slice::from_raw_parts(package.elements.cast(), package.count as usize)
        })
    }
}

/// Objects for tests.
#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
pub(crate) mod testing {
    use super::*;

    // INVARIANT, for all of these: Each pointer is null with a length of 0, or valid.

    pub(crate) fn integer(value: u64) -> Object {
        let mut object = bindings::acpi_object::default();
        object.integer.type_ = bindings::ACPI_TYPE_INTEGER;
        object.integer.value = value;
        Object(Opaque::new(object))
    }

    fn empty(kind: u32) -> Object {
        let mut object = bindings::acpi_object::default();
        object.type_ = kind;
        Object(Opaque::new(object))
    }

    pub(crate) fn string() -> Object {
        empty(bindings::ACPI_TYPE_STRING)
    }

    pub(crate) fn buffer() -> Object {
        empty(bindings::ACPI_TYPE_BUFFER)
    }

    pub(crate) fn reference() -> Object {
        empty(bindings::ACPI_TYPE_LOCAL_REFERENCE)
    }

    /// Calls `f` with a package of these elements.
    pub(crate) fn package<R>(elements: &mut [Object], f: impl FnOnce(&Object) -> R) -> R {
        let mut object = bindings::acpi_object::default();
        object.package.type_ = bindings::ACPI_TYPE_PACKAGE;
        object.package.count = elements.len() as u32;
        object.package.elements = elements.as_mut_ptr().cast();
        f(&Object(Opaque::new(object)))
    }
}
