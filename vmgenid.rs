// SPDX-License-Identifier: GPL-2.0

//! Virtual Machine Generation ID driver.
//!
//! Hypervisors change the generation ID when a virtual machine is restored from a snapshot or
//! cloned. This driver reseeds the kernel's random number generator when that happens, and gives
//! userspace the generation counter, which some hypervisors change along with the ID, through
//! `/dev/vmgenid`.
//!
//! Where the kernel's own driver is built in, this one cannot be had; `vmgenctr` can.
//!
//! Limitations:
//! - ACPI only: device tree nodes (`microsoft,vmgenid`) are not bound.
//! - One device has the node; a second one only reseeds.
//! - Confidential guests: the counter's page is mapped to userspace as private memory, so it has
//!   to be shared with the hypervisor by other means.
//!
//! Specification: "Virtual Machine Generation ID", Microsoft, 2012, for the ID; QEMU's
//! `docs/specs/vmgenid.rst`, with this project's series applied, for the counter.

use kernel::{
    acpi::DeviceId,
    device::Core,
    platform,
    prelude::*, //
};

mod driver;

use driver::{
    device::{
        VmGenId,
        Wishes, //
    },
    known::Known, //
};

kernel::acpi_device_table!(
    ACPI_TABLE,
    <VmGenId as platform::Driver>::IdInfo,
    [
        (DeviceId::new(c"VMGENCTR"), ()),
        (DeviceId::new(c"VM_GEN_COUNTER"), ()),
    ]
);

impl platform::Driver for VmGenId {
    type IdInfo = ();
    type Data<'bound> = Self;
    const ACPI_ID_TABLE: Option<kernel::acpi::IdTable<Self::IdInfo>> = Some(&ACPI_TABLE);

    fn probe<'bound>(
        pdev: &'bound platform::Device<Core<'_>>,
        _info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Self, Error> + 'bound {
        let wishes = Wishes {
            count_reseeds: module_parameters::sysgenid.value(),
            look_early: module_parameters::early_look.value(),
        };
        Self::new(pdev.as_ref(), wishes)
    }
}

#[pin_data]
struct VmGenIdModule {
    // It is made last and goes first: what it binds uses what follows.
    #[pin]
    _driver: kernel::driver::Registration<platform::Adapter<VmGenId>>,
    _known: Known,
}

impl kernel::InPlaceModule for VmGenIdModule {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _known: Known::new(),
            _driver <- kernel::driver::Registration::new(
                <Self as kernel::ModuleMetadata>::NAME,
                module,
            ),
        })
    }
}

/// What threads and interrupt handlers are called.
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
        early_look: bool {
            default: true,
            description: "Look for a new generation ID in ACPI's interrupt already (default: yes)",
        },
    },
}
