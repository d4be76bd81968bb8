// SPDX-License-Identifier: GPL-2.0

//! VMClock's page, from ACPI or the device tree.
//!
//! The kernel's own driver for VMClock, `drivers/ptp/ptp_vmclock.c`, keeps the device. This only
//! asks where the page is.

use crate::driver::kernel::{
    acpi,
    memremap::ReservedPage,
    platform::with_compatible, //
};
use core::ptr;
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    sync::aref::ARef, //
};

/// Returns the page. Returns `None` if the machine has no VMClock. An error completes "VMClock ..."
/// in the log.
pub(crate) fn page() -> Result<Option<ReservedPage>, &'static str> {
    let mut found = None::<ARef<acpi::Device>>;
    for id in [c"AMZNC10C", c"VMCLOCK"] {
        for device in acpi::Device::with_id(id) {
            // A device can have both IDs.
            match &found {
                Some(known) if !ptr::eq(&**known, &*device) => {
                    return Err("is there more than once");
                }
                _ => found = Some(device),
            }
        }
    }
    match found.map(|device| device.memory()) {
        None => {
            let mut devices = with_compatible(c"amazon,vmclock");
            match (devices.next(), devices.next()) {
                (_, Some(_)) => Err("is there more than once"),
                (device, None) => device
                    .as_ref()
                    .and_then(|device| device.resource_by_index(0))
                    .map(|reg| ReservedPage::of_device(reg.start(), reg.size()))
                    .transpose()
                    .map_err(super::wrong),
            }
        }
        Some(Some((address, len))) if len >= PAGE_SIZE as u64 => {
            ReservedPage::new(address).map_err(super::wrong).map(Some)
        }
        Some(_) => Err("does not have exactly one page of memory"),
    }
}
