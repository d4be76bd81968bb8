// SPDX-License-Identifier: GPL-2.0

//! The Virtual Machine Generation ID driver, for kernels whose own driver is built in.
//!
//! The kernel's driver (`drivers/virt/vmgenid.c`) keeps the device. This module binds a platform
//! device of its own, and does the same as `vmgenid`, except that the kernel's driver calls the
//! vmfork notifiers.
//!
//! Limitations: those of `vmgenid`. And the module does not load without `/dev/random`.

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
    kernel::{
        acpi,
        platform::{
            with_compatible,
            OwnedDevice, //
        }, //
    },
    probe::Nodes,
    registry::Registry, //
};

// For the module's aliases only, by which udev loads it. The driver does not match these tables: it
// would bind the kernel's own platform device after the kernel's driver was unbound.
kernel::acpi_device_table!(
    _ACPI_TABLE,
    (),
    [
        (DeviceId::new(ACPI_IDS[0]), ()),
        (DeviceId::new(ACPI_IDS[1]), ()),
    ]
);
kernel::of_device_table!(_OF_TABLE, (), [(of::DeviceId::new(COMPATIBLE), ())]);

struct VmGenCtr;

impl platform::Driver for VmGenCtr {
    type IdInfo = ();
    type Data<'bound> = Nodes;

    fn probe<'bound>(
        pdev: &'bound platform::Device<Core<'_>>,
        _info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Nodes, Error> + 'bound {
        Nodes::new(pdev)
    }
}

/// Registers a platform device for each generation ID device.
fn devices() -> Result<KVec<OwnedDevice>> {
    let mut devices = KVec::<OwnedDevice>::new();
    for device in ACPI_IDS.into_iter().flat_map(acpi::Device::with_id) {
        // A device can have both IDs.
        if !devices.iter().any(|known| known.is_of(&device)) {
            devices.push(OwnedDevice::new(NAME, device)?, GFP_KERNEL)?;
        }
    }
    // Only nodes of the kernel's own platform devices: those of this module come after that.
    let nodes = with_compatible(COMPATIBLE).try_fold(KVec::new(), |mut nodes, device| {
        nodes.push(device, GFP_KERNEL).map(|()| nodes)
    })?;
    for device in &nodes {
        devices.push(OwnedDevice::beside(NAME, device)?, GFP_KERNEL)?;
    }

    if devices.is_empty() {
        pr_info!("this machine has no generation ID device (ACPI VMGENCTR or VM_GEN_COUNTER, device tree microsoft,vmgenid)\n");
        return Err(ENODEV);
    }
    Ok(devices)
}

#[pin_data]
struct VmGenCtrModule {
    // Dropped in this order: the driver unbinds its devices before the registry goes.
    _devices: KVec<OwnedDevice>,
    #[pin]
    _driver: kernel::driver::Registration<platform::Adapter<VmGenCtr>>,
    _registry: Registry,
}

impl kernel::InPlaceModule for VmGenCtrModule {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _registry: Registry::new()?,
            _driver <- kernel::driver::Registration::new(NAME, module),
            _devices: devices()?,
        })
    }
}

/// The name of the driver, of its platform devices, and of the interrupt's handler.
const NAME: &CStr = <VmGenCtrModule as kernel::ModuleMetadata>::NAME;

module! {
    type: VmGenCtrModule,
    name: "vmgenctr",
    authors: ["The vmgenid authors"],
    description: "Virtual Machine generation counter, beside the built-in vmgenid driver",
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
