// SPDX-License-Identifier: MIT OR Apache-2.0

//! The device comes and goes, and the module with it, while the counter changes.

use crate::{
    NODE,
    machine::{self, Device, Log, Masked, a_while, change, reseeded_by, storm},
    promises::{counter, fails, open, same},
    sys::{self, Map},
    wait::{Said, expect, woken},
};
use anyhow::{Context, ensure};
use rustix::io::Errno;
use std::{fs, thread};

/// Expect that a mapping follows the counter after the unbind, after a rebind and without its file,
/// while the old file stays unusable.
pub fn a_mapping_follows_the_counter_after_the_unbind() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let file = open()?;
    let map = Map::readonly(&file)?;
    device.unbind()?;
    for _ in 0..3 {
        let value = change()?;
        same("the mapped counter, unbound", map.load(0), value)?;
        fails("read", sys::read(&file), Errno::NODEV)?;
        expect(&file, Said::Gone)?;
    }
    device.bind()?;
    let value = change()?;
    same("the mapped counter, bound again", map.load(0), value)?;
    same("the new node", counter(&open()?)?, value)?;
    fails("read of the old file", sys::read(&file), Errno::NODEV)?;
    drop(file);
    same("the mapped counter, without its file", map.load(0), value)
}

/// Expect that changes while the device is unbound reseed once, at the bind, and that a later
/// change is readable. (The kernel's own driver also reseeds while the device is unbound.)
pub fn changes_while_unbound_reseed_once_at_bind() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let mut log = Log::from_now_on()?;
    device.unbind()?;
    for _ in 0..5 {
        change()?;
        a_while();
    }
    let ours = machine::name() == "vmgenid";
    if ours {
        same("reseeds while unbound", log.reseeds()?, 0)?;
    }
    reseeded_by("bind", || device.bind())?;
    // The bind reseeds once for all of them. What the kernel's own driver logs meanwhile does not
    // count.
    if ours {
        log.expect_reseeds(1)?;
    }
    let file = open()?;
    log.skip()?;
    change()?;
    log.await_reseed()?;
    expect(&file, Said::Readable)
}

/// Expect that no reseed is logged after the unbind, in a storm of changes.
pub fn no_reseed_after_the_unbind() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let mut log = Log::from_now_on()?;
    let storm = storm()?;
    for round in 0..10 {
        // Two reseeds show that the storm is under way when the device is unbound.
        log.await_reseed()?;
        log.await_reseed()?;
        device.unbind()?;
        // The notifiers may still be called for an ID that was published before.
        a_while();
        log.reseeds()?;
        a_while();
        let late = log.reseeds()?;
        ensure!(late == 0, "round {round}: {late} reseeds after the unbind");
        device.bind()?;
    }
    drop(storm);
    counter(&open()?).map(drop)
}

/// Expect that a driver override leaves a bound device bound, that the driver does not bind the
/// device while it names another driver, and that it does where it names this driver or none.
pub fn the_driver_override_decides() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let file = open()?;
    // The override is for the next bind. The device stays bound.
    device.set_override("another")?;
    expect(&file, Said::Nothing)?;
    let value = change()?;
    same("read", sys::read(&file)?, value)?;

    device.unbind()?;
    let refused = device.try_bind();
    let errno = refused.map_err(|err| Errno::from_io_error(&err).unwrap_or(Errno::IO));
    fails("bind, another driver's", errno, Errno::NODEV)?;
    ensure!(!device.is_bound(), "it is bound");
    fails("open", sys::open(NODE), Errno::NOENT)?;
    change()?;

    device.set_override(machine::name())?;
    device.bind()?;
    counter(&open()?)?;
    device.unbind()?;

    device.set_override("")?;
    device.bind()?;
    let value = change()?;
    same("read", counter(&open()?)?, value)?;
    fails("read of the old file", sys::read(&file), Errno::NODEV)
}

/// Expect that the unload of the module is EAGAIN while processes wait, or a file or a mapping is
/// open, also of a device that was unbound, and that it works otherwise.
pub fn the_module_stays_while_it_is_in_use() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let refused = |what: &str| fails(what, machine::unload(), Errno::AGAIN);

    let file = open()?;
    woken(
        &file,
        Said::Readable,
        || Ok(()),
        || {
            refused("rmmod while others wait")?;
            change().map(drop)
        },
    )?;
    let map = Map::readonly(&file)?;
    change()?;
    refused("rmmod with a file and a mapping")?;
    device.unbind()?;
    refused("rmmod with a file and a mapping of what is gone")?;
    drop(map);
    refused("rmmod with a file of what is gone")?;
    device.bind()?;
    refused("rmmod with a file of what is gone and came back")?;
    let map = Map::readonly(&open()?)?;
    drop(file);
    refused("rmmod with a mapping")?;
    drop(map);
    machine::unload().context("rmmod of an unused module")?;
    machine::load()?;

    // Unbound, it has nothing to undo.
    let file = open()?;
    device.unbind()?;
    drop(file);
    machine::unload().context("rmmod when unbound")?;
    machine::load()?;
    counter(&open()?).map(drop)
}

/// Expect that changes while the module is unloaded do not reseed, that the next load does, and
/// that a change right before or after an unload does no harm. (The kernel's own driver reseeds.)
pub fn changes_while_unloaded_do_nothing() -> anyhow::Result<()> {
    let mut log = Log::from_now_on()?;
    machine::unload().context("rmmod")?;
    a_while();
    log.skip()?;
    for _ in 0..3 {
        change()?;
        a_while();
    }
    if machine::name() == "vmgenid" {
        same("reseeds while unloaded", log.reseeds()?, 0)?;
    }
    // A module that is loaded after a restore is as good as one that was loaded before it.
    reseeded_by("insmod", machine::load)?;
    let file = open()?;
    // The ID at load time may be that of a restore, so it counts as a change.
    counter(&file)?;
    a_while();
    log.skip()?;
    let value = change()?;
    log.await_reseed()?;
    expect(&file, Said::Readable)?;
    same("read", sys::read(&file)?, value)?;
    drop(file);

    // A notification that is under way when the module is unloaded.
    for _ in 0..10 {
        change()?;
        drop(file_of(NODE)?);
        machine::unload().context("rmmod, notified just now")?;
        change()?;
        machine::load()?;
        counter(&open()?)?;
    }
    Ok(())
}

fn file_of(path: &str) -> anyhow::Result<std::os::fd::OwnedFd> {
    sys::open(path).with_context(|| format!("open {path}"))
}

/// Expect that the open of a node that outlived its device is ENODEV, and that the new node works.
pub fn a_stale_node_is_refused() -> anyhow::Result<()> {
    const STALE: &str = "/tmp/stale";
    let device = Device::bound()?;
    machine::private_node(STALE, rustix::fs::stat(NODE)?.st_rdev)?;
    counter(&file_of(STALE)?)?;
    device.unbind()?;
    let open_stale = sys::open(STALE).map(drop);
    fails("open of a node that stayed", open_stale, Errno::NODEV)?;
    device.bind()?;
    fs::remove_file(STALE)?;
    counter(&open()?).map(drop)
}

/// Expect that in a storm of changes a reader never sees the counter go back, that it gets ENODEV
/// after the unbind, and that the device can be bound again, 20 times, and also after a
/// notification that came while it was unbound.
pub fn many_rebinds_under_a_storm() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let storm = storm()?;
    for _ in 0..20 {
        let file = open()?;
        let map = Map::readonly(&file)?;
        let before = map.load(0);
        thread::scope(|scope| -> anyhow::Result<()> {
            // The reader reads until the device is unbound.
            let reader = scope.spawn(|| -> anyhow::Result<()> {
                let mut last = before;
                loop {
                    match sys::read(&file) {
                        Ok(value) if last <= value => last = value,
                        Ok(value) => anyhow::bail!("read {value} after {last}"),
                        Err(Errno::NODEV) => return Ok(()),
                        Err(errno) => return Err(errno).context("read"),
                    }
                }
            });
            machine::within_a_minute("a change", || Ok(map.load(0) != before))?;
            device.unbind()?;
            reader.join().expect("the reader panicked")
        })?;
        expect(&file, Said::Gone)?;
        device.bind()?;
        look()?;
    }
    drop(storm);
    // A notification that is held back until the device is unbound.
    let masked = Masked::new()?;
    change()?;
    device.unbind()?;
    drop(masked);
    device.bind()?;
    counter(&open()?).map(drop)
}

/// Opens the node and reads it, while the counter grows. The value of the read lies between two
/// loads from a mapping.
pub fn look() -> anyhow::Result<u32> {
    let file = open()?;
    let map = Map::readonly(&file)?;
    let before = map.load(0);
    let (read, after) = (sys::read(&file)?, map.load(0));
    ensure!(
        (before..=after).contains(&read),
        "read {read} between {before} and {after}"
    );
    Ok(read)
}
