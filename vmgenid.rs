// SPDX-License-Identifier: GPL-2.0

//! Virtual Machine Generation ID driver.
//!
//! Hypervisors change the generation ID when a virtual machine is restored from a snapshot or
//! cloned. This driver reseeds the kernel's random number generator when that happens.
//!
//! Limitations:
//! - ACPI only: device tree nodes (`microsoft,vmgenid`) are not bound.
//!
//! Specification: "Virtual Machine Generation ID", Microsoft, 2012.

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

mod driver {
    pub(crate) mod firmware;
    pub(crate) mod generation_id;
    pub(crate) mod kernel {
        pub(crate) mod acpi;
        pub(crate) mod memremap;
        pub(crate) mod random;
        pub(crate) mod static_mutex;
    }
}

use driver::{
    firmware,
    generation_id::{
        self,
        GenerationId,
        Known, //
    },
    kernel::{
        acpi,
        memremap::Range, //
    }, //
};

/// A bound device.
struct VmGenId;

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
        let dev: &Device<Bound> = pdev.as_ref();
        let firmware = acpi::Device::companion(dev).ok_or(ENODEV)?;

        let range = Self::id_range(dev, firmware)?;
        let id = GenerationId::get(&range)?;

        acpi::register_notify_handler(dev, id.clone())?;
        // No change after this is missed; one that came before is caught here.
        id.apply_reseed_rule();

        Ok(Self)
    }
}

impl VmGenId {
    /// Asks the firmware for the generation ID.
    fn id_range(dev: &Device<Bound>, firmware: &acpi::Device) -> Result<Range> {
        let range = match firmware::address(firmware, c"ADDR") {
            Ok(None) => {
                dev_err!(dev, "ADDR is missing: no generation ID\n");
                return Err(ENODEV);
            }
            Ok(Some(address)) if address % 8 != 0 => Err("is not 8-byte aligned"),
            Ok(Some(address)) => Range::new(address, generation_id::SIZE),
            Err(wrong) => Err(wrong),
        };

        range.map_err(|wrong| {
            dev_err!(dev, "ADDR {}: no generation ID\n", wrong);
            EINVAL
        })
    }
}

#[pin_data]
struct VmGenIdModule {
    // The driver goes first: what it binds uses what follows.
    #[pin]
    _driver: kernel::driver::Registration<platform::Adapter<VmGenId>>,
    _known: Known,
}

impl kernel::InPlaceModule for VmGenIdModule {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _driver <- kernel::driver::Registration::new(
                <Self as kernel::ModuleMetadata>::NAME,
                module,
            ),
            _known: Known,
        })
    }
}

module! {
    type: VmGenIdModule,
    name: "vmgenid",
    authors: ["The vmgenid authors"],
    description: "Virtual Machine Generation ID",
    license: "GPL v2",
}
