// SPDX-License-Identifier: GPL-2.0

//! The probe of both modules, step by step.

use super::{
    counter::{
        Counter,
        Layout, //
    },
    firmware::{
        self,
        Firmware, //
    },
    generation::Watched,
    id,
    node::{
        Node,
        Source, //
    },
    prelude::*,
    registry, //
};
use crate::module_parameters as parameters;
use kernel::platform;

/// The nodes of a bound device. An unbind removes them first. Then devres removes the handlers of
/// the interrupt, of power transitions and of the notification.
///
/// The registry keeps the data that open files and mappings use.
pub(crate) struct Nodes {
    _counter: Option<Pin<KBox<Node>>>,
    _sysgenid: Option<Pin<KBox<Node>>>,
}

impl Nodes {
    /// Probes a device.
    pub(crate) fn new(pdev: &platform::Device<Bound>) -> Result<Self> {
        let dev = pdev.as_ref();
        let firmware = Firmware::of(pdev).ok_or(ENODEV)?;
        let generation = generation(dev, &firmware, parameters::sysgenid.value())?;

        // When this returns, the ID that was in memory at the call is published.
        generation.watch(dev, &firmware, parameters::early_look.value())?;

        // A missing or malformed counter does not fail the probe: the driver still reseeds.
        Ok(Self {
            _counter: counter(dev, &firmware, parameters::vmclock.value())
                .and_then(|counter| node(dev, &generation, Source::Counter(counter))),
            _sysgenid: sysgenid_node(dev, &generation),
        })
    }
}

/// Logs a problem and its result: "`what` `wrong`: `result`".
#[cold]
#[inline(never)]
fn complain(dev: &Device<Bound>, what: &str, wrong: &str, result: &str) {
    dev_warn!(dev, "{} {}: {}\n", what, wrong, result);
}

/// Asks the firmware for the generation ID. Its reseeds are counted if `counted`.
///
/// # Errors
///
/// - `ENODEV`: The firmware has no address for it.
/// - `EINVAL`: The address is refused.
/// - `ENOMEM`: There is no memory.
fn generation(dev: &Device<Bound>, firmware: &Firmware<'_>, counted: bool) -> Result<Arc<Watched>> {
    let [name, _] = firmware.names();
    let range = match firmware.id() {
        Ok(None) => {
            complain(dev, name, "is missing", "no generation ID");
            return Err(ENODEV);
        }
        Ok(Some(address)) if address % 8 != 0 => Err("is not 8-byte aligned"),
        Ok(Some(address)) => Range::new(address, id::SIZE).map_err(firmware::wrong),
        Err(wrong) => Err(wrong),
    };

    let wrong = match range {
        Ok(range) => match registry::generation(&range, counted)? {
            Some(generation) => return Ok(generation),
            None => "is in the page of a generation counter",
        },
        Err(wrong) => wrong,
    };
    complain(dev, name, wrong, "no generation ID");
    Err(EINVAL)
}

/// Asks the firmware for the generation counter: the device's, or else VMClock's. Where both exist,
/// `vmclock` chooses the latter. Both may be absent.
fn counter(dev: &Device<Bound>, firmware: &Firmware<'_>, vmclock: bool) -> Option<Counter> {
    let [_, name] = firmware.names();
    let mut sources = [(name, Layout::Word), ("VMClock", Layout::VmClock)];
    if vmclock {
        sources.reverse();
    }
    for (n, (name, layout)) in sources.into_iter().enumerate() {
        let page = match layout {
            Layout::Word => firmware.counter(),
            Layout::VmClock => firmware::vmclock::page(),
        };
        let counter = match page {
            Ok(None) => continue,
            Ok(Some(page)) => match registry::publish(&page) {
                Ok(true) => Counter::new(page, layout),
                Ok(false) => Err("holds a generation ID"),
                Err(_) => Err("cannot be noted: out of memory"),
            },
            Err(wrong) => Err(wrong),
        };
        match counter {
            Ok(counter) => return Some(counter),
            // The device itself may have one.
            Err(wrong) if vmclock && n == 0 => complain(dev, name, wrong, "not used"),
            Err(wrong) => {
                complain(dev, name, wrong, "no generation counter, reseeding only");
                return None;
            }
        }
    }
    None
}

/// Logs a line if the machine has a VMClock, but no generation ID device.
#[cfg(CONFIG_VMGENID = "m")]
pub(crate) fn tell_unused_vmclock() {
    use super::kernel::{
        acpi,
        platform::with_compatible, //
    };

    let mut ids = firmware::ACPI_IDS
        .into_iter()
        .flat_map(acpi::Device::with_id);
    let none = ids.next().is_none() && with_compatible(firmware::COMPATIBLE).next().is_none();
    if none && !matches!(firmware::vmclock::page(), Ok(None)) {
        pr_info!("VMClock is not used: this machine has no generation ID device\n");
    }
}

/// Makes `/dev/sysgenid`, if reseeds are counted and no other device has it.
fn sysgenid_node(dev: &Device<Bound>, generation: &Arc<Watched>) -> Option<Pin<KBox<Node>>> {
    let source = Source::Reseeds(generation.reseeds.as_ref()?.clone());
    let node = node(dev, generation, source)?;
    dev_info!(
        dev,
        "/dev/sysgenid changes after the kernel's reseed; until then clones repeat\n"
    );
    Some(node)
}

/// Makes the node of `source`, if no other device has it.
fn node(dev: &Device<Bound>, generation: &Arc<Watched>, source: Source) -> Option<Pin<KBox<Node>>> {
    let path = source.path();
    Node::new(generation.clone(), source)
        .inspect_err(|&err| {
            let (what, wrong) = match err {
                EEXIST => ("another device has", path),
                ENOMEM => (path, "cannot be made, out of memory"),
                _ => (path, "cannot be made"),
            };
            complain(dev, what, wrong, "reseeding only");
        })
        .ok()
}
