// SPDX-License-Identifier: MIT OR Apache-2.0

//! Hostile firmware: tables with every malformation that we can think of, a
//! device in each, and what the driver makes of it: what the contract says, in
//! one line of the kernel's log, and nothing that spoils another device.
//!
//! All tables for a kind of machine are in one guest, in which the system binds nothing: each test
//! loads the module, binds its device, looks, and takes it all back. In one more guest the system
//! binds them all at boot.

mod guest;
mod rows;
mod table;

use crate::{
    On, Trial,
    context::{Context, counter, expect_reseeds, lines, no_node, reseeds, settled_reseeds, wait},
    shared::Shared,
    tests,
};
use anyhow::{Context as _, Result, ensure};
use guest::{Guest, Machine};
use harness::Options;
use rows::{Outcome, SECOND};
use table::Tables;

tests! {
    all_of_addr_at_boot [NotBuiltin]
    all_others_at_boot [NotBuiltin]
    all_of_a_q35_at_boot [NotBuiltin]
}

/// A test that takes more than binding one device.
type Scenario = (&'static str, fn(&Guest) -> Result<()>);

type Test = Box<dyn Fn(&Guest) -> Result<()> + Send>;

const SCENARIOS: &[Scenario] = &[
    ("a_notification_from_the_table_reseeds", notification),
    ("a_storm_of_10000_notifications_reseeds_once_per_id", storm),
    ("objects_that_change_are_looked_at_anew", moving),
];

/// The message where the driver cannot share ACPI's interrupt.
const NOT_SHARED: &str = "no early look at the generation ID, the notification has to do: \
    the SCI cannot be shared";

/// A guest's options with a sound device, whose objects are no methods. The
/// tables are needed until it is booted.
pub fn plain(context: &Context) -> Result<(Tables, Options)> {
    let mut rows = Machine::Pc.rows();
    rows.retain(|row| row.name == "sound_names");
    let tables = Tables::compile(context, &rows)?;
    let mut options = Machine::Pc.options();
    options.qemu_arg.extend(tables.arguments());
    options.no_module = false;
    Ok((tables, options))
}

pub fn trials() -> Result<Vec<Trial>> {
    let mut trials = Vec::new();
    for machine in [Machine::PcAddr, Machine::Pc, Machine::Q35] {
        let rows = machine.rows();
        let shared = Shared::new();
        let mut trial = |name: &str, on: &[On], test: Test| {
            let boot = move |context: &Context| Guest::boot(context, machine);
            trials.push(shared.trial(format!("firmware::{name}"), on.to_vec(), boot, test));
        };
        // The kernel's own driver evaluates ADDR first, when the machine boots. It warns, and one
        // row stops the machine.
        let on: &[On] = match machine {
            Machine::PcAddr => &[On::NotBuiltin],
            _ => &[],
        };
        for (n, row) in rows.iter().enumerate() {
            let again = machine == Machine::PcAddr && n == 0;
            if row.outcome != Outcome::Various && !again {
                trial(&row.name, on, Box::new(move |guest| guest.check(n)));
            }
        }
        if machine == Machine::Pc {
            // They count reseeds, and the kernel's own driver also reseeds; or change ADDR.
            for &(name, scenario) in SCENARIOS {
                trial(
                    name,
                    &[On::NotBuiltin],
                    Box::new(move |guest| loaded(guest, scenario)),
                );
            }
        }
    }
    Ok(trials)
}

/// A test with the module loaded anew: it knows no device yet.
fn loaded(guest: &Guest, test: impl FnOnce(&Guest) -> Result<()>) -> Result<()> {
    guest.load()?;
    test(guest)?;
    guest.unload()
}

fn all_of_addr_at_boot(context: &Context) -> Result<()> {
    all_at_boot(context, Machine::PcAddr)
}

fn all_others_at_boot(context: &Context) -> Result<()> {
    all_at_boot(context, Machine::Pc)
}

fn all_of_a_q35_at_boot(context: &Context) -> Result<()> {
    all_at_boot(context, Machine::Q35)
}

/// The firmware changes the ID and the counter, and notifies.
fn notification(guest: &Guest) -> Result<()> {
    let device = guest.find("notifying")?;
    guest.expect(device, &Outcome::Node)?;
    let before = settled_reseeds(&guest.vm)?;
    for n in 1..=3 {
        // Reading the attribute runs the method.
        let attribute = format!("/sys/bus/acpi/devices/{}/sun", guest.device(device));
        // Not into a pipe: `cat` would hold its lock all the time, for minutes where the kernel is
        // slow, and the reader would be reported as hung.
        guest.vm.shell(&format!("cat {attribute} >/tmp/sun"))?;
        wait("a reseed", || {
            Ok((reseeds(&guest.vm)? >= before + n).then_some(()))
        })?;
        let value = guest.counter(device) + n as u32;
        let said = counter(&guest.vm)?;
        ensure!(said == format!("read {value}, mapped {value}"), "{said}");
    }
    expect_reseeds(&guest.vm, before + 3)?;
    guest.unbind(device)
}

/// The firmware notifies 10,000 times, and changes the ID 20 times meanwhile.
fn storm(guest: &Guest) -> Result<()> {
    let device = guest.find("storming")?;
    guest.expect(device, &Outcome::Node)?;
    let before = settled_reseeds(&guest.vm)?;
    let attribute = format!("/sys/bus/acpi/devices/{}/sun", guest.device(device));
    // Not into a pipe: `cat` would hold its lock all the time, for minutes where the kernel is
    // slow, and the reader would be reported as hung.
    guest.vm.shell(&format!("cat {attribute} >/tmp/sun"))?;
    // This waits for the handlers that are under way.
    guest.unbind(device)?;
    let count = settled_reseeds(&guest.vm)? - before;
    ensure!((1..=20).contains(&count), "{count} reseeds for 20 new IDs");

    // The last one was seen: nothing is left to do.
    guest.expect(device, &Outcome::Node)?;
    counter(&guest.vm)?;
    expect_reseeds(&guest.vm, before + count)?;
    guest.unbind(device)
}

/// `ADDR` says something else each time.
fn moving(guest: &Guest) -> Result<()> {
    let device = guest.find("moving")?;
    guest.expect(device, &Outcome::Node)?;
    guest.unbind(device)?;
    guest.expect(device, &rows::refused(rows::RAM))?;
    no_node(&guest.vm)?;
    // The ID is now in the counter's page, which processes could map.
    guest.expect(device, &rows::refused(rows::PUBLIC))?;
    no_node(&guest.vm)?;
    guest.expect(device, &Outcome::Node)?;
    guest.unbind(device)
}

/// The same tables, and QEMU's own device, without a guest program that looks after them: the
/// module is loaded when the machine boots.
fn all_at_boot(context: &Context, machine: Machine) -> Result<()> {
    let guest = Guest::boot_all(context, machine)?;
    // Without the time.
    let mut log = lines(&guest.vm, "dmesg | sed 's/^[^]]*] //'")?;
    let bound = lines(&guest.vm, "ls /sys/bus/platform/drivers/vmgenid")?;

    // ACPI's interrupt has room for 64, of which ACPI is one. The others have to do without.
    let all = log.len();
    log.retain(|line| !line.ends_with(NOT_SHARED));
    let devices = bound.iter().filter(|name| name.contains(':')).count();
    let early = guest
        .vm
        .shell("grep -o vmgenid /proc/interrupts | grep -c . || true")?;
    let early: usize = early.trim().parse()?;
    ensure!(
        early == devices.min(63) && all - log.len() == devices - early,
        "of {devices} devices {early} look early, and {} say that they do not",
        all - log.len()
    );
    for (n, row) in guest.rows.iter().enumerate() {
        // QEMU's own device is looked at first, and has the node.
        let second = Outcome::Reseeds(Some(SECOND.into()));
        let outcome = match row.beside.as_ref().unwrap_or(&row.outcome) {
            Outcome::Various => continue,
            Outcome::Node => &second,
            outcome => outcome,
        };
        guest
            .expect_lines(n, outcome, &log)
            .and_then(|()| guest.expect_driver(n, outcome, &bound))
            .with_context(|| row.name.clone())?;
    }
    let said = counter(&guest.vm)?;
    ensure!(said == "read 42, mapped 42", "the sound device: {said}");
    Ok(())
}
