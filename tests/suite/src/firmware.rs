// SPDX-License-Identifier: MIT OR Apache-2.0

//! Malformed firmware. Each table has one device with one malformation. The driver has to do what
//! the contract says, in one line of the kernel's log, and another device must not be affected.
//!
//! All tables for a kind of machine are in one guest, in which the system binds no device. Each
//! test loads the module, binds its device, checks the outcome, and undoes all of this. In one more
//! guest, the system binds all devices at boot.

mod guest;
mod rows;
mod table;

use crate::{
    On, Trial,
    context::{
        Context, counter, expect_reseeds, genctr, lines, no_node, reseeds, settled_reseeds, wait,
    },
    notifications::expect_notified,
    shared::Shared,
    tests,
};
use anyhow::{Context as _, Result, ensure};
use guest::{Guest, Machine};
use harness::Options;
use rows::{Outcome, SECOND};
use table::Tables;

pub use table::id;

tests! {
    all_of_addr_at_boot [NotBuiltin]
    all_others_at_boot [NotBuiltin]
    all_of_a_q35_at_boot [NotBuiltin]
    the_tables_of_virt_have_the_device [Arm64Acpi]
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

/// The options of a guest with a valid device, whose ACPI objects are plain names and not methods.
/// The caller keeps the tables until the guest has booted.
pub fn plain(context: &Context) -> Result<(Tables, Options)> {
    let mut rows = Machine::Pc.rows();
    rows.retain(|row| row.name == "sound_names");
    let tables = Tables::compile(context, &rows)?;
    let mut options = Machine::Pc.options();
    tables.give_to(&mut options);
    options.no_module = false;
    Ok((tables, options))
}

/// The options of a guest that has devices with these objects, in which the names of addresses are those
/// of tests/suite/src/firmware/table.rs. The caller keeps the tables until the guest has booted.
pub fn with(context: &Context, asl: &[&str]) -> Result<(Tables, Options)> {
    let rows = asl.iter().map(|&asl| rows::row(asl, asl, Outcome::Various));
    let tables = Tables::compile(context, &rows.collect::<Vec<_>>())?;
    let mut options = Machine::Pc.options();
    tables.give_to(&mut options);
    Ok((tables, options))
}

pub fn trials() -> Result<Vec<Trial>> {
    let mut trials = Vec::new();
    for machine in [Machine::PcAddr, Machine::Pc, Machine::Q35, Machine::Virt] {
        let rows = machine.rows();
        let shared = Shared::new();
        let mut trial = |name: &str, on: &[On], test: Test| {
            let boot = move |context: &Context| Guest::boot(context, machine);
            trials.push(shared.trial(format!("firmware::{name}"), on.to_vec(), boot, test));
        };
        // The kernel's own driver evaluates ADDR first, when the machine boots. It logs warnings,
        // and one of the rows stops the machine.
        let on: &[On] = match machine {
            Machine::PcAddr => &[On::NotBuiltin],
            Machine::Virt => &[On::NotBuiltin, On::Arm64Acpi],
            _ => &[],
        };
        for (n, row) in rows.iter().enumerate() {
            let again = machine == Machine::PcAddr && n == 0;
            if row.outcome != Outcome::Various && !again {
                trial(&row.name, on, Box::new(move |guest| guest.check(n)));
            }
        }
        if machine == Machine::Pc {
            // These tests count reseeds, while the kernel's own driver also reseeds, or they change
            // ADDR.
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

/// Runs a test between a load and an unload of the module, which then knows no device yet.
fn loaded(guest: &Guest, test: impl FnOnce(&Guest) -> Result<()>) -> Result<()> {
    guest.load()?;
    test(guest)?;
    guest.unload()
}

/// Expect that the rows about `ADDR` have their outcomes where the system binds all devices at
/// boot.
fn all_of_addr_at_boot(context: &Context) -> Result<()> {
    all_at_boot(context, Machine::PcAddr)
}

/// Expect the same of the other rows of a PC.
fn all_others_at_boot(context: &Context) -> Result<()> {
    all_at_boot(context, Machine::Pc)
}

/// Expect the same of the rows of a Q35.
fn all_of_a_q35_at_boot(context: &Context) -> Result<()> {
    all_at_boot(context, Machine::Q35)
}

/// Expect that a guest of virt with UEFI has the device from ACPI alone, with an event device of its
/// own, and that this notifies it.
fn the_tables_of_virt_have_the_device(context: &Context) -> Result<()> {
    let vm = context.boot(genctr(42))?;
    // The machine also has an event device.
    let found = lines(
        &vm,
        "cd /sys/bus/acpi/devices; ls -d ACPI0013:* QEMUVGID:*; ls -d /proc/device-tree 2>/dev/null || true",
    )?;
    ensure!(
        found == ["ACPI0013:00", "ACPI0013:01", "QEMUVGID:00"],
        "{found:?}"
    );
    expect_notified(vm)
}

/// Expect that a notification which the firmware's method sends, after it has changed the ID and
/// the counter, reseeds the kernel once, and that the new counter is read, three times.
fn notification(guest: &Guest) -> Result<()> {
    let device = guest.find("notifying")?;
    guest.expect(device, &Outcome::Node)?;
    let before = settled_reseeds(&guest.vm)?;
    for n in 1..=3 {
        // Reading the attribute runs the method.
        let attribute = format!("/sys/bus/acpi/devices/{}/sun", guest.device(device));
        // The output goes to a file: while the method runs, `cat` would hold the lock of a pipe,
        // for minutes where the kernel is slow, and the kernel would report the pipe's reader as
        // hung.
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

/// Expect that 10,000 notifications from the firmware, with 20 changes of the ID among them, reseed
/// at most once for each ID, and that the driver has seen the last ID.
fn storm(guest: &Guest) -> Result<()> {
    let device = guest.find("storming")?;
    guest.expect(device, &Outcome::Node)?;
    let before = settled_reseeds(&guest.vm)?;
    let attribute = format!("/sys/bus/acpi/devices/{}/sun", guest.device(device));
    // The output goes to a file: while the method runs, `cat` would hold the lock of a pipe, for
    // minutes where the kernel is slow, and the kernel would report the pipe's reader as hung.
    guest.vm.shell(&format!("cat {attribute} >/tmp/sun"))?;
    // This waits for the handlers that are under way.
    guest.unbind(device)?;
    let count = settled_reseeds(&guest.vm)? - before;
    ensure!((1..=20).contains(&count), "{count} reseeds for 20 new IDs");

    // The driver has seen the last ID, so a new bind does not reseed.
    guest.expect(device, &Outcome::Node)?;
    counter(&guest.vm)?;
    expect_reseeds(&guest.vm, before + count)?;
    guest.unbind(device)
}

/// Expect that each bind evaluates the objects anew: they give valid addresses, then RAM, then an
/// ID in the counter's page, then valid addresses again.
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

/// Expect that each row has its outcome where the module is loaded at boot and the system binds all
/// devices, and that QEMU's own device has the node and works.
fn all_at_boot(context: &Context, machine: Machine) -> Result<()> {
    let guest = Guest::boot_all(context, machine)?;
    // The lines without their time stamps.
    let mut log = lines(&guest.vm, "dmesg | sed 's/^[^]]*] //'")?;
    let bound = lines(&guest.vm, "ls /sys/bus/platform/drivers/vmgenid")?;

    // At most 64 handlers can share ACPI's interrupt, and ACPI has one of them. Devices beyond that
    // have no early look.
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
        // The system binds QEMU's own device first, so that device has the node.
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
