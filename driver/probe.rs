// SPDX-License-Identifier: GPL-2.0

//! The steps of probe, in the order in which `vmgenid.rs` and `vmgenctr.rs` call them.

use super::{
    counter::Counter,
    firmware,
    generation::Watched,
    id,
    kernel::{
        acpi,
        memremap::{
            Range,
            ReservedPage, //
        }, //
    },
    node::{
        self,
        Name,
        Node,
        Source, //
    },
    registry, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    prelude::*,
    sync::Arc, //
};

/// Logs a problem and its result: "`what` `wrong`: `result`".
#[cold]
#[inline(never)]
fn complain(dev: &Device<Bound>, what: &str, wrong: &str, result: &str) {
    dev_warn!(dev, "{} {}: {}\n", what, wrong, result);
}

/// Asks the firmware for the generation ID (`ADDR`). Its reseeds are counted if `counted`.
///
/// # Errors
///
/// - `ENODEV`: The firmware has no `ADDR`.
/// - `EINVAL`: The value of `ADDR` is refused.
/// - `ENOMEM`: There is no memory.
pub(crate) fn generation(
    dev: &Device<Bound>,
    firmware: &acpi::Device,
    counted: bool,
) -> Result<Arc<Watched>> {
    let range = match firmware::acpi::address(firmware, c"ADDR") {
        Ok(None) => {
            complain(dev, "ADDR", "is missing", "no generation ID");
            return Err(ENODEV);
        }
        Ok(Some(address)) if address % 8 != 0 => Err("is not 8-byte aligned"),
        Ok(Some(address)) => Range::new(address, id::SIZE),
        Err(wrong) => Err(wrong),
    };

    let wrong = match range {
        Ok(range) => match registry::generation(&range, counted)? {
            Some(generation) => return Ok(generation),
            None => "is in the page of a generation counter",
        },
        Err(wrong) => wrong,
    };
    complain(dev, "ADDR", wrong, "no generation ID");
    Err(EINVAL)
}

/// Asks the firmware for the generation counter (`CTRA`). It may be absent.
pub(crate) fn counter_page(dev: &Device<Bound>, firmware: &acpi::Device) -> Option<ReservedPage> {
    let page = match firmware::acpi::address(firmware, c"CTRA") {
        Ok(None) => return None,
        Ok(Some(address)) => ReservedPage::new(address),
        Err(wrong) => Err(wrong),
    };

    page.and_then(|page| match registry::publish(&page) {
        Ok(true) => Ok(page),
        Ok(false) => Err("holds a generation ID"),
        Err(_) => Err("cannot be noted: out of memory"),
    })
    .inspect_err(|wrong| complain(dev, "CTRA", wrong, "no generation counter, reseeding only"))
    .ok()
}

/// Makes `/dev/vmgenid`, if no other device has it.
pub(crate) fn counter_node(
    dev: &Device<Bound>,
    generation: &Arc<Watched>,
    page: ReservedPage,
) -> Option<Pin<KBox<Node>>> {
    let source = Counter::new(page).map(Source::Counter);
    node(dev, &node::VMGENID, generation, source)
}

/// Makes `/dev/sysgenid`, if reseeds are counted and no other device has it.
pub(crate) fn sysgenid_node(
    dev: &Device<Bound>,
    generation: &Arc<Watched>,
) -> Option<Pin<KBox<Node>>> {
    let source = Source::Reseeds(generation.reseeds()?.clone());
    let node = node(dev, &node::SYSGENID, generation, Ok(source))?;
    dev_info!(
        dev,
        "/dev/sysgenid changes after the kernel's reseed; until then clones repeat\n"
    );
    Some(node)
}

fn node(
    dev: &Device<Bound>,
    name: &'static Name,
    generation: &Arc<Watched>,
    source: Result<Source>,
) -> Option<Pin<KBox<Node>>> {
    let Some(claim) = name.claim() else {
        complain(dev, "another device has", name.path(), "reseeding only");
        return None;
    };
    source
        .and_then(|source| Node::new(claim, generation.clone(), source))
        .inspect_err(|&err| {
            let wrong = if err == ENOMEM {
                "cannot be made, out of memory"
            } else {
                "cannot be made"
            };
            complain(dev, name.path(), wrong, "reseeding only");
        })
        .ok()
}
