// SPDX-License-Identifier: GPL-2.0

//! The firmware's description of a device: where the generation ID and the counter are.

pub(crate) mod acpi;
pub(crate) mod vmclock;

use super::{
    id,
    kernel::acpi::Device as AcpiDevice,
    prelude::*, //
};
use kernel::platform;

/// The IDs of the device in ACPI, as `_HID` or `_CID`.
pub(crate) const ACPI_IDS: [&CStr; 2] = [c"VMGENCTR", c"VM_GEN_COUNTER"];

/// What the device's node in a device tree is compatible with.
pub(crate) const COMPATIBLE: &CStr = c"microsoft,vmgenid";

/// Returns the end of a line of the log about an address: the words for an error of [`Range`] or
/// [`ReservedPage`].
pub(crate) fn wrong(err: Error) -> &'static str {
    match err {
        ERANGE => "is beyond the physical address width",
        EBUSY => "is in System RAM",
        ENOSPC => "is shorter than a page",
        ENXIO => "is not in memory that the firmware reserved",
        _ => "is not page aligned",
    }
}

/// The firmware's description of a device.
pub(crate) enum Firmware<'a> {
    /// ACPI: objects of the device. Notifications come from ACPI.
    Acpi(&'a AcpiDevice),

    /// A node of the device tree: `reg` and `interrupts`, which the platform device has. Source:
    /// `Documentation/devicetree/bindings/rng/microsoft,vmgenid.yaml`; `reg[1]` is an extension.
    DeviceTree(&'a platform::Device<Bound>),
}

impl<'a> Firmware<'a> {
    /// Returns the description of `dev`, if it has one.
    pub(crate) fn of(dev: &'a platform::Device<Bound>) -> Option<Self> {
        let generic: &'a Device<Bound> = dev.as_ref();
        match AcpiDevice::companion(generic) {
            Some(acpi) => Some(Self::Acpi(acpi)),
            None if cfg!(CONFIG_OF) && generic.fwnode()?.is_of_node() => {
                Some(Self::DeviceTree(dev))
            }
            None => None,
        }
    }

    /// Returns the names of the ID and of the counter, for the log.
    pub(crate) fn names(&self) -> [&'static str; 2] {
        match self {
            Self::Acpi(_) => ["ADDR", "CTRA"],
            Self::DeviceTree(_) => ["reg[0]", "reg[1]"],
        }
    }

    /// Returns the physical address of the ID. `None`: there is none. An error completes
    /// "ADDR ...".
    pub(crate) fn id(&self) -> Result<Option<u64>, &'static str> {
        match self {
            Self::Acpi(device) => acpi::address(device, c"ADDR"),
            Self::DeviceTree(device) => match device.resource_by_index(0) {
                Some(reg) if reg.size() < id::SIZE as u64 => Err("is shorter than 16 bytes"),
                reg => Ok(reg.map(|reg| reg.start())),
            },
        }
    }

    /// Returns the counter's page. `None`: there is none. An error completes "CTRA ...".
    pub(crate) fn counter(&self) -> Result<Option<ReservedPage>, &'static str> {
        match self {
            // Where the device has memory of its own (`_CRS`), the firmware's map need not list it.
            Self::Acpi(device) => acpi::address(device, c"CTRA")?
                .map(|address| match device.memory() {
                    Some((start, len)) if address.wrapping_sub(start) < len => {
                        ReservedPage::of_device(address, len - (address - start))
                    }
                    _ => ReservedPage::new(address),
                })
                .transpose()
                .map_err(wrong),
            Self::DeviceTree(device) => device
                .resource_by_index(1)
                .map(|reg| ReservedPage::of_device(reg.start(), reg.size()))
                .transpose()
                .map_err(wrong),
        }
    }
}
