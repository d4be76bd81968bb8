// SPDX-License-Identifier: GPL-2.0

//! Virtual Machine Generation ID driver.
//!
//! Hypervisors change the generation ID when they restore a virtual machine from a snapshot or
//! clone it. Then this driver reseeds the kernel's random number generator. Some hypervisors change
//! a generation counter along with the ID, in a page of the same device (`CTRA`, `reg[1]`) or in
//! VMClock's: userspace reads or maps it through `/dev/vmgenid`.
//!
//! `vmgenctr` is the module for kernels whose own driver is built in.
//!
//! Limitations:
//! - Only one device gets the node. The driver only reseeds for a second one.
//! - Confidential guests: the kernel and processes map the counter's page as shared with the
//!   hypervisor. This was not tried.
//! - The barrier does not cover a root process that is in the ioctl `RNDRESEEDCRNG` of
//!   `/dev/random`, or in a power transition, when the snapshot is taken: see `driver/rule.rs`.
//!
//! Specification: "Virtual Machine Generation ID", Microsoft, 2012, for the ID; QEMU's
//! `docs/specs/vmgenid.rst`, with this project's series applied, for the counter.

use kernel::{
    acpi::DeviceId,
    device::Core,
    of,
    platform,
    prelude::*, //
};

mod driver;

use driver::{
    firmware::{
        ACPI_IDS,
        COMPATIBLE, //
    },
    probe::{
        self,
        Nodes, //
    },
    registry::Registry, //
};

kernel::acpi_device_table!(
    ACPI_TABLE,
    <VmGenId as platform::Driver>::IdInfo,
    [
        (DeviceId::new(ACPI_IDS[0]), ()),
        (DeviceId::new(ACPI_IDS[1]), ()),
    ]
);

kernel::of_device_table!(
    OF_TABLE,
    <VmGenId as platform::Driver>::IdInfo,
    [(of::DeviceId::new(COMPATIBLE), ())]
);

struct VmGenId;

impl platform::Driver for VmGenId {
    type IdInfo = ();
    type Data<'bound> = Nodes;
    const ACPI_ID_TABLE: Option<kernel::acpi::IdTable<Self::IdInfo>> = Some(&ACPI_TABLE);
    const OF_ID_TABLE: Option<of::IdTable<Self::IdInfo>> = Some(&OF_TABLE);

    fn probe<'bound>(
        pdev: &'bound platform::Device<Core<'_>>,
        _info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Nodes, Error> + 'bound {
        Nodes::new(pdev)
    }
}

#[pin_data]
struct VmGenIdModule {
    // Dropped first: this unbinds the devices, which use the registry.
    #[pin]
    _driver: kernel::driver::Registration<platform::Adapter<VmGenId>>,
    _registry: Registry,
}

impl kernel::InPlaceModule for VmGenIdModule {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _registry: Registry::new()?,
            _driver <- kernel::driver::Registration::new(NAME, module),
            _: { probe::tell_unused_vmclock() },
        })
    }
}

/// The name of the driver and of the interrupt's handler.
const NAME: &CStr = <VmGenIdModule as kernel::ModuleMetadata>::NAME;

module! {
    type: VmGenIdModule,
    name: "vmgenid",
    authors: ["The vmgenid authors"],
    description: "Virtual Machine Generation ID and generation counter",
    license: "GPL v2",
    params: {
        sysgenid: bool {
            default: false,
            description: "Make /dev/sysgenid, which counts reseeds (default: no)",
        },
        vmclock: bool {
            default: false,
            description: "Take the counter of VMClock even if there is CTRA (default: no)",
        },
        early_look: bool {
            default: true,
            description: "Look for a new generation ID in ACPI's interrupt already (default: yes)",
        },
    },
}
