// SPDX-License-Identifier: GPL-2.0

//! Virtual Machine Generation ID driver.
//!
//! Hypervisors change the generation ID when a virtual machine is restored from a snapshot or
//! cloned. This driver reseeds the kernel's random number generator when that happens, and gives
//! userspace the generation counter, which some hypervisors change along with the ID, through
//! `/dev/vmgenid`.
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
    device::{
        Bound,
        Core,
        Device, //
    },
    platform,
    prelude::*,
    sync::Arc, //
};

mod driver {
    pub(crate) mod binding;
    pub(crate) mod counter;
    pub(crate) mod firmware;
    pub(crate) mod generation_id;
    pub(crate) mod kernel {
        pub(crate) mod acpi;
        pub(crate) mod memremap;
        pub(crate) mod miscdevice;
        pub(crate) mod mm;
        pub(crate) mod page;
        pub(crate) mod random;
        pub(crate) mod rwonce;
        pub(crate) mod static_mutex;
    }
    pub(crate) mod known;
    pub(crate) mod node;
    pub(crate) mod sysgenid;
}

use driver::{
    counter::Counter,
    firmware,
    generation_id::{
        self,
        GenerationId, //
    },
    kernel::{
        acpi,
        memremap::{
            Range,
            ReservedPage, //
        }, //
    },
    known::{
        self,
        Known, //
    },
    node::{
        self,
        Node, //
    },
    sysgenid::{
        self,
        Sysgenid, //
    }, //
};

/// `/dev/vmgenid`.
type CounterNode = Node<node::Operations, Counter>;

/// `/dev/sysgenid`.
type SysgenidNode = Node<sysgenid::Operations, Sysgenid>;

/// A bound device. It has a node if it has a counter, and another one if that was asked for.
///
/// At unbind, the driver core drops this first, and with it the nodes. Then devres removes the
/// notify handler, and waits for running ones: no notification comes after that. The generation ID
/// stays in [`Known`] until the module is unloaded, which open files and mappings prevent.
struct VmGenId {
    _node: Option<Pin<KBox<CounterNode>>>,
    _sysgenid: Option<Pin<KBox<SysgenidNode>>>,
}

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

        let id = Self::id(dev, firmware)?;

        acpi::register_notify_handler(dev, id.clone())?;
        // No change after this is missed; one that came before is caught here.
        id.apply_reseed_rule();

        // Whatever is wrong with the counter: the kernel is reseeded all the same.
        let sysgenid = Self::sysgenid(dev, &id);
        let node = Self::counter_page(dev, firmware).and_then(|page| Self::node(dev, id, page));

        Ok(Self {
            _node: node,
            _sysgenid: sysgenid,
        })
    }
}

impl VmGenId {
    /// Asks the firmware for the generation ID.
    fn id(dev: &Device<Bound>, firmware: &acpi::Device) -> Result<Arc<GenerationId>> {
        let range = match firmware::address(firmware, c"ADDR") {
            Ok(None) => {
                dev_err!(dev, "ADDR is missing: no generation ID\n");
                return Err(ENODEV);
            }
            Ok(Some(address)) if address % 8 != 0 => Err("is not 8-byte aligned"),
            Ok(Some(address)) => Range::new(address, generation_id::SIZE),
            Err(wrong) => Err(wrong),
        };

        let wrong = match range {
            Ok(range) => match known::id(&range, module_parameters::sysgenid.value())? {
                Some(id) => return Ok(id),
                // An ID is for the kernel alone.
                None => "is in the page of a generation counter",
            },
            Err(wrong) => wrong,
        };
        dev_err!(dev, "ADDR {}: no generation ID\n", wrong);
        Err(EINVAL)
    }

    /// Asks the firmware for the generation counter; not all have one.
    fn counter_page(dev: &Device<Bound>, firmware: &acpi::Device) -> Option<ReservedPage> {
        let page = match firmware::address(firmware, c"CTRA") {
            Ok(None) => return None,
            Ok(Some(address)) => ReservedPage::new(address),
            Err(wrong) => Err(wrong),
        };

        page.and_then(|page| match known::publish(&page) {
            Ok(true) => Ok(page),
            // The page is for every process to see, an ID for none.
            Ok(false) => Err("holds a generation ID"),
            Err(_) => Err("cannot be noted: out of memory"),
        })
        .inspect_err(|wrong| {
            dev_warn!(
                dev,
                "CTRA {}: no generation counter, reseeding only\n",
                wrong
            );
        })
        .ok()
    }

    /// Makes the device node, if it is to be had.
    fn node(
        dev: &Device<Bound>,
        id: Arc<GenerationId>,
        page: ReservedPage,
    ) -> Option<Pin<KBox<CounterNode>>> {
        let Some(claim) = node::VMGENID.claim() else {
            dev_warn!(dev, "another device has /dev/vmgenid: reseeding only\n");
            return None;
        };

        Counter::new(id, page)
            .and_then(|counter| KBox::pin_init(Node::new(claim, counter), GFP_KERNEL))
            .inspect_err(|err| {
                dev_warn!(dev, "no /dev/vmgenid ({:?}): reseeding only\n", err);
            })
            .ok()
    }

    /// Makes the node that counts reseeds, if they are counted.
    fn sysgenid(dev: &Device<Bound>, id: &Arc<GenerationId>) -> Option<Pin<KBox<SysgenidNode>>> {
        let reseeds = id.reseeds()?;
        let Some(claim) = node::SYSGENID.claim() else {
            dev_warn!(dev, "another device has /dev/sysgenid\n");
            return None;
        };

        Sysgenid::new(id.clone(), reseeds.clone())
            .and_then(|sysgenid| KBox::pin_init(Node::new(claim, sysgenid), GFP_KERNEL))
            .inspect(|_| {
                dev_info!(
                    dev,
                    "/dev/sysgenid changes after the kernel's reseed; until then clones repeat\n"
                );
            })
            .inspect_err(|err| dev_warn!(dev, "no /dev/sysgenid ({:?})\n", err))
            .ok()
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
    },
}
