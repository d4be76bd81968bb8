// SPDX-License-Identifier: GPL-2.0

//! The generation counter, beside the kernel's own Virtual Machine Generation ID driver.
//!
//! Where that driver (`drivers/virt/vmgenid.c`) is built in, it has the device, and reseeds the
//! kernel's random number generator when the generation ID changes. This module leaves that to it,
//! and adds what it lacks: the generation counter, through `/dev/vmgenid`, with the contract that
//! `vmgenid` has. A read that has to wait for the kernel's reseed waits for it here.
//!
//! Limitations:
//! - What is restored while this module is being loaded, or is not bound, is left to the built-in
//!   driver: the first counter that is read can be ahead of the reseed.
//! - Those of `vmgenid`.

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
    kernel::{
        acpi,
        platform::OwnedDevice, //
    },
    known::Known, //
};

// For the module's aliases only: with that it is loaded where there is such a device. It is not
// matched by these IDs, or it would get the built-in driver's device where that lets go of it.
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

impl platform::Driver for VmGenId {
    type IdInfo = ();
    type Data<'bound> = Self;

    fn probe<'bound>(
        pdev: &'bound platform::Device<Core<'_>>,
        _info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Self, Error> + 'bound {
        let dev = pdev.as_ref();
        let wishes = Wishes {
            count_reseeds: module_parameters::sysgenid.value(),
        };
        Self::new(dev, wishes).inspect(|device| {
            if !device.has_nodes() {
                dev_info!(
                    dev,
                    "no generation counter here: nothing to do (sysgenid=1 makes /dev/sysgenid)\n"
                );
            }
        })
    }
}

/// Makes a device for each that the built-in driver has.
fn devices() -> Result<KVec<OwnedDevice>> {
    let mut devices = KVec::new();
    acpi::Device::each_with_id(&IDS, |device| {
        let device = OwnedDevice::new(<VmGenCtrModule as kernel::ModuleMetadata>::NAME, device)?;
        devices.push(device, GFP_KERNEL)?;
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
    _devices: KVec<OwnedDevice>,
    #[pin]
    _driver: kernel::driver::Registration<platform::Adapter<VmGenId>>,
    _known: Known,
}

impl kernel::InPlaceModule for VmGenCtrModule {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        // What is made last goes first.
        try_pin_init!(Self {
            _known: Known::new(),
            _driver <- kernel::driver::Registration::new(
                <Self as kernel::ModuleMetadata>::NAME,
                module,
            ),
            _devices: devices()?,
        })
    }
}

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
    },
}
