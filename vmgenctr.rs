// SPDX-License-Identifier: GPL-2.0

//! The Virtual Machine Generation ID driver, for kernels whose own driver is built in.
//!
//! The kernel's driver (`drivers/virt/vmgenid.c`) has the device, and is to keep it. This module
//! does all that `vmgenid` does, through a platform device of its own, except that the kernel's
//! driver calls the vmfork notifiers.
//!
//! Limitations: those of `vmgenid`. This module does not work where it cannot open `/dev/random`
//! when it is loaded.

use kernel::{
    acpi::DeviceId,
    device::{
        Bound,
        Core,
        Device, //
    },
    platform,
    prelude::*, //
};

mod driver;

use driver::{
    early,
    kernel::{
        acpi,
        platform::OwnedDevice, //
    },
    node::Node,
    probe,
    registry::Registry, //
};

// For the module's aliases only: udev loads it where there is such a device. The driver is not
// matched by these IDs, or it would get the kernel's device where the kernel's driver lets go of it.
kernel::acpi_device_table!(
    _ACPI_TABLE,
    (),
    [
        (DeviceId::new(c"VMGENCTR"), ()),
        (DeviceId::new(c"VM_GEN_COUNTER"), ()),
    ]
);

/// The same IDs.
const IDS: [&CStr; 2] = [c"VMGENCTR", c"VM_GEN_COUNTER"];

/// A bound device. When it is unbound, the nodes go first. Then devres removes the interrupt's and
/// the notification's handlers. What open files and mappings use stays in the [`Registry`].
struct VmGenCtr {
    _node: Option<Pin<KBox<Node>>>,
    _sysgenid: Option<Pin<KBox<Node>>>,
}

impl platform::Driver for VmGenCtr {
    type IdInfo = ();
    type Data<'bound> = Self;

    fn probe<'bound>(
        pdev: &'bound platform::Device<Core<'_>>,
        _info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Self, Error> + 'bound {
        Self::new(pdev.as_ref())
    }
}

impl VmGenCtr {
    fn new(dev: &Device<Bound>) -> Result<Self> {
        let firmware = acpi::Device::companion(dev).ok_or(ENODEV)?;
        let generation = probe::generation(dev, firmware, module_parameters::sysgenid.value())?;

        // When this returns, the kernel was reseeded with the ID that is there now.
        generation.watch(dev)?;
        if module_parameters::early_look.value() {
            early::look(dev, &generation);
        }

        // If something is wrong with the counter, the kernel is reseeded all the same.
        Ok(Self {
            _node: probe::counter_page(dev, firmware)
                .and_then(|page| probe::counter_node(dev, &generation, page)),
            _sysgenid: probe::sysgenid_node(dev, &generation),
        })
    }
}

/// Makes a platform device for each that the kernel's driver has.
fn devices() -> Result<KVec<OwnedDevice>> {
    let mut devices = KVec::new();
    acpi::Device::each_with_id(&IDS, |device| {
        devices.push(OwnedDevice::new(NAME, device)?, GFP_KERNEL)?;
        Ok(())
    })?;

    if devices.is_empty() {
        pr_info!("this machine has no generation ID device (ACPI VMGENCTR or VM_GEN_COUNTER)\n");
        return Err(ENODEV);
    }
    Ok(devices)
}

#[pin_data]
struct VmGenCtrModule {
    // Dropped in this order: bound devices use the registry.
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
        early_look: bool {
            default: true,
            description: "Look for a new generation ID in ACPI's interrupt already (default: yes)",
        },
    },
}
