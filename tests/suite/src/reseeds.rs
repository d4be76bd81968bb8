// SPDX-License-Identifier: MIT OR Apache-2.0

//! The reseed rule: when the kernel reseeds, and how often.

use crate::{
    context::{Context, await_random, counter, genctr, no_splat, reseeds, wait},
    tests,
};
use anyhow::{Result, ensure};
use vm::{Options, Vm};

tests! {
    a_notification_reseeds_once
    read_reseeds_before_the_notification
    open_and_mmap_do_not_reseed
    readers_and_notifications_reseed_once_per_id
    a_restore_between_unbind_and_bind_is_caught
}

/// The GPE that tells QEMU's guests of a new ID.
const GPE: &str = "/sys/firmware/acpi/interrupts/gpe05";

fn expect_reseeds(vm: &Vm, expected: usize) -> Result<()> {
    let count = reseeds(vm)?;
    ensure!(
        count == expected,
        "expected {expected} reseeds, the kernel's log has {count}"
    );
    Ok(())
}

fn expect_counter(vm: &Vm, expected: u32) -> Result<()> {
    let said = counter(vm)?;
    ensure!(
        said == format!("read {expected}, mapped {expected}"),
        "expected {expected}: {said}"
    );
    Ok(())
}

/// A guest in which notifications are held back.
fn without_notifications(context: &Context) -> Result<Vm> {
    let vm = context.boot(genctr(42))?;
    await_random(&vm)?;
    vm.shell(&format!("echo mask >{GPE}"))?;
    expect_reseeds(&vm, 0)?;
    Ok(vm)
}

fn a_notification_reseeds_once(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    await_random(&vm)?;
    for (n, value) in (43..48).enumerate() {
        expect_reseeds(&vm, n)?;
        vm.set_genctr(value)?;
        // Nobody reads: it is the notification that does it.
        wait("a reseed", || Ok((reseeds(&vm)? > n).then_some(())))?;
        expect_counter(&vm, value)?;
    }
    expect_reseeds(&vm, 5)?;
    no_splat(&vm)
}

fn read_reseeds_before_the_notification(context: &Context) -> Result<()> {
    let mut vm = without_notifications(context)?;
    for (n, value) in (43..46).enumerate() {
        vm.set_genctr(value)?;
        expect_reseeds(&vm, n)?;
        expect_counter(&vm, value)?;
        expect_reseeds(&vm, n + 1)?;
        // Nothing is left to do for the next one.
        expect_counter(&vm, value)?;
        expect_reseeds(&vm, n + 1)?;
    }
    // Nor for the notification that comes late.
    vm.shell(&format!("echo unmask >{GPE}"))?;
    let handled = format!("awk '{{ exit !($1 > 0) }}' {GPE}");
    wait("the notification", || {
        Ok(vm
            .exec(["sh", "-c", &handled])?
            .status
            .success()
            .then_some(()))
    })?;
    vm.shell("sleep 1")?;
    expect_reseeds(&vm, 3)?;
    no_splat(&vm)
}

fn open_and_mmap_do_not_reseed(context: &Context) -> Result<()> {
    let mut vm = without_notifications(context)?;
    vm.set_genctr(43)?;
    let said = vm.shell("contract peek")?;
    ensure!(said.trim() == "mapped 43", "the mapping shows: {said}");
    expect_reseeds(&vm, 0)?;
    expect_counter(&vm, 43)?;
    expect_reseeds(&vm, 1)
}

fn readers_and_notifications_reseed_once_per_id(context: &Context) -> Result<()> {
    let options = Options {
        smp: Some(2),
        ..genctr(1)
    };
    let mut vm = context.boot(options)?;
    await_random(&vm)?;
    let pid = vm.spawn(["contract", "readers", "--threads", "8"], "/tmp/readers")?;
    for (n, value) in (2..22).enumerate() {
        vm.set_genctr(value)?;
        wait("a reseed", || Ok((reseeds(&vm)? > n).then_some(())))?;
    }
    let said = vm.shell(&format!(
        "kill -9 {pid} || echo 'no longer there'; cat /tmp/readers"
    ))?;
    ensure!(said.is_empty(), "the readers say: {said}");
    expect_counter(&vm, 21)?;
    // One each. QEMU writes while the guest runs: an ID that a reader sees half
    // written costs one more, rarely. Who takes no turns has many more.
    let count = reseeds(&vm)?;
    ensure!((20..=22).contains(&count), "{count} reseeds for 20 new IDs");
    no_splat(&vm)
}

fn a_restore_between_unbind_and_bind_is_caught(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    await_random(&vm)?;
    let driver = "/sys/bus/platform/drivers/vmgenid";
    let device = vm.shell(&format!("basename {driver}/*:*"))?;
    let device = device.trim();

    // Nothing new: nothing to do.
    vm.shell(&format!(
        "echo {device} >{driver}/unbind; echo {device} >{driver}/bind"
    ))?;
    expect_reseeds(&vm, 0)?;

    vm.shell(&format!("echo {device} >{driver}/unbind"))?;
    vm.set_genctr(43)?;
    vm.shell("sleep 1")?;
    expect_reseeds(&vm, 0)?;
    vm.shell(&format!("echo {device} >{driver}/bind"))?;
    expect_reseeds(&vm, 1)?;
    expect_counter(&vm, 43)?;
    expect_reseeds(&vm, 1)?;
    no_splat(&vm)
}
