// SPDX-License-Identifier: GPL-2.0

//! A bound device: what the firmware says about it, and what comes of that.

#[cfg(CONFIG_VMGENID = "m")]
use super::early;
use super::{
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
    known,
    node::{
        self,
        Node, //
    },
    reseed::{
        self,
        WITHOUT_COUNTER, //
    },
    sysgenid::{
        self,
        Sysgenid, //
    }, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    prelude::*,
    sync::Arc, //
};

/// `/dev/vmgenid`.
type CounterNode = Node<node::Operations, Counter>;

/// `/dev/sysgenid`.
type SysgenidNode = Node<sysgenid::Operations, Sysgenid>;

/// What the module's parameters ask for.
pub(crate) struct Wishes {
    /// Make the node that counts reseeds.
    pub(crate) count_reseeds: bool,
    /// Look at the ID in ACPI's interrupt.
    #[cfg(CONFIG_VMGENID = "m")]
    pub(crate) look_early: bool,
}

/// A bound device. It has a node if it has a counter, and another one if that was asked for.
///
/// At unbind, the driver core drops this first, and with it the nodes. Then devres removes the
/// handler of the interrupt and its threads, and the notify handler, and waits for running ones:
/// nothing is called after that. The generation ID stays in [`known::Known`] until the module is
/// unloaded, which open files and mappings prevent.
pub(crate) struct VmGenId {
    _node: Option<Pin<KBox<CounterNode>>>,
    _sysgenid: Option<Pin<KBox<SysgenidNode>>>,
}

impl VmGenId {
    /// Binds `dev`.
    ///
    /// # Errors
    ///
    /// - `ENODEV`: the firmware tells of no generation ID.
    /// - `EINVAL`: it does, but there can be none.
    /// - `ENOMEM`: there is no memory.
    ///
    /// And those of [`reseed::watch`].
    pub(crate) fn new(dev: &Device<Bound>, wishes: Wishes) -> Result<Self> {
        let firmware = acpi::Device::companion(dev).ok_or(ENODEV)?;

        let id = Self::id(dev, firmware, wishes.count_reseeds)?;
        reseed::watch(dev, &id)?;
        #[cfg(CONFIG_VMGENID = "m")]
        if wishes.look_early {
            early::look(dev, &id);
        }

        // Whatever is wrong with the counter: the kernel is reseeded all the same.
        let sysgenid = Self::sysgenid(dev, &id);
        let node = Self::counter_page(dev, firmware).and_then(|page| Self::node(dev, id, page));

        Ok(Self {
            _node: node,
            _sysgenid: sysgenid,
        })
    }

    /// Returns whether there is something for userspace.
    #[cfg(CONFIG_VMGENID = "y")]
    pub(crate) fn has_nodes(&self) -> bool {
        self._node.is_some() || self._sysgenid.is_some()
    }

    /// Asks the firmware for the generation ID.
    fn id(
        dev: &Device<Bound>,
        firmware: &acpi::Device,
        count_reseeds: bool,
    ) -> Result<Arc<GenerationId>> {
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
            Ok(range) => match known::id(&range, count_reseeds)? {
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
                "CTRA {}: no generation counter, {}\n",
                wrong,
                WITHOUT_COUNTER
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
            dev_warn!(
                dev,
                "another device has /dev/vmgenid: {}\n",
                WITHOUT_COUNTER
            );
            return None;
        };

        Counter::new(id, page)
            .and_then(|counter| KBox::pin_init(Node::new(claim, counter), GFP_KERNEL))
            .inspect_err(|err| {
                dev_warn!(dev, "no /dev/vmgenid ({:?}): {}\n", err, WITHOUT_COUNTER);
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
