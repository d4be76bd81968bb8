// SPDX-License-Identifier: MIT OR Apache-2.0

//! The reseed rule: when the kernel reseeds, and how often.

use crate::{
    context::{
        self, Context, await_random, driver, expect_counter, expect_reseeds, genctr, generation,
        is_builtin, no_splat, reseeds, settle, settled_reseeds, wait,
    },
    notifications, tests,
    vmforks::{self, expect_published, published},
};
use anyhow::{Result, ensure};
use harness::{Options, Vm};

tests! {
    [AnySetup];
    a_notification_reseeds_once
    read_reseeds_before_the_notification
    read_reseeds_for_an_id_that_comes_without_a_new_counter
    open_and_mmap_do_not_reseed
    readers_and_notifications_reseed_once_per_id
    a_restore_between_unbind_and_bind_is_caught
}

/// Boots a guest in which `/dev/sysgenid` counts the IDs that the driver publishes: `vmgenctr`
/// reseeds without a line in the log.
fn counting(context: &Context) -> Result<Vm> {
    let more = context::parameters();
    let options = Options {
        parameter: more.into_iter().chain(["sysgenid=1".into()]).collect(),
        ..genctr(42)
    };
    vmforks::boot(context, options)
}

/// A guest in which notifications are held back.
fn without_notifications(context: &Context) -> Result<Vm> {
    let vm = counting(context)?;
    notifications::hold(&vm)?;
    Ok(vm)
}

/// Expect that a read reseeds for a new ID also where the counter has its old value again.
fn read_reseeds_for_an_id_that_comes_without_a_new_counter(context: &Context) -> Result<()> {
    let vm = without_notifications(context)?;
    for _ in 0..3 {
        // QEMU changes the ID at each change of the counter, and refuses the value that the counter
        // has. Vm::set_genctr() refuses a value that the guest had before.
        for value in [43, 42] {
            vm.qom_set_counter(value)?;
        }
        reseeded_by(&vm, || expect_counter(&vm, 42))?;
    }
    no_splat(&vm)
}

/// Checks that the kernel has been reseeded when `call` returns. A periodic reseed of the kernel at
/// that moment would hide a missing one.
fn reseeded_by(vm: &Vm, call: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = generation(vm)?;
    call()?;
    ensure!(generation(vm)? > before, "no reseed by then");
    Ok(())
}

/// How many lines the kernel logs for a new ID while notifications are held back: none with
/// `vmgenctr`, which forces a reseed that the kernel does not log.
fn told() -> usize {
    usize::from(!is_builtin())
}

/// Expect that the notification of each of five new IDs reseeds the kernel once, before any read,
/// and that a read after it does not reseed again.
fn a_notification_reseeds_once(context: &Context) -> Result<()> {
    let mut vm = vmforks::boot(context, genctr(42))?;
    let before = settled_reseeds(&vm)?;
    for (n, value) in (43..48).enumerate() {
        vm.set_genctr(value)?;
        // No process reads the device: the notification alone reseeds the kernel.
        expect_reseeds(&vm, before + n + 1)?;
        expect_counter(&vm, value)?;
    }
    expect_reseeds(&vm, before + 5)?;
    no_splat(&vm)
}

/// Expect that a read of a new counter reseeds the kernel while the notification is held back, and
/// that neither a second read nor the late notification reseeds once more. (The kernel's own driver
/// does when it is notified.)
fn read_reseeds_before_the_notification(context: &Context) -> Result<()> {
    let mut vm = without_notifications(context)?;
    let (before, first) = (settled_reseeds(&vm)?, published(&vm)?);
    for (n, value) in (43..46).enumerate() {
        let last = first + n as u32;
        vm.set_genctr(value)?;
        expect_published(&vm, last)?;
        reseeded_by(&vm, || expect_counter(&vm, value))?;
        expect_published(&vm, last + 1)?;
        // A second read has nothing left to do.
        expect_counter(&vm, value)?;
        expect_published(&vm, last + 1)?;
        expect_reseeds(&vm, before + (n + 1) * told())?;
    }
    // Nor has the notification that comes late.
    let count = notifications::count(&vm)?;
    notifications::release(&vm)?;
    wait("the notification", || {
        Ok((notifications::count(&vm)? > count).then_some(()))
    })?;
    expect_published(&vm, first + 3)?;
    // The kernel's own driver is notified only now, and sees only the last ID.
    expect_reseeds(&vm, before + if is_builtin() { 1 } else { 3 })?;
    no_splat(&vm)
}

/// Expect that open and mmap do not reseed the kernel for a new ID, that the mapping shows the new
/// counter, and that a read then reseeds.
fn open_and_mmap_do_not_reseed(context: &Context) -> Result<()> {
    let mut vm = without_notifications(context)?;
    let (before, first) = (settled_reseeds(&vm)?, published(&vm)?);
    vm.set_genctr(43)?;
    let said = vm.shell("contract peek")?;
    ensure!(said.trim() == "mapped 43", "the mapping shows: {said}");
    expect_published(&vm, first)?;
    reseeded_by(&vm, || expect_counter(&vm, 43))?;
    expect_published(&vm, first + 1)?;
    expect_reseeds(&vm, before + told())
}

/// Expect that 8 readers and the notifications together reseed once for each of 20 new IDs (twice
/// more at most), and that each read returns a value between those that the mapping shows before
/// and after it.
fn readers_and_notifications_reseed_once_per_id(context: &Context) -> Result<()> {
    let options = Options {
        smp: Some(2),
        ..genctr(1)
    };
    let mut vm = context.boot(options)?;
    await_random(&vm)?;
    let before = settled_reseeds(&vm)?;
    let pid = vm.spawn(["contract", "readers", "--threads", "8"], "/tmp/readers")?;
    for (n, value) in (2..22).enumerate() {
        vm.set_genctr(value)?;
        wait(
            "a reseed",
            || Ok((reseeds(&vm)? > before + n).then_some(())),
        )?;
    }
    let said = vm.shell(&format!(
        "kill -9 {pid} || echo 'no longer there'; cat /tmp/readers"
    ))?;
    ensure!(said.is_empty(), "the readers say: {said}");
    expect_counter(&vm, 21)?;
    // One reseed for each ID. QEMU writes the ID while the guest runs: a reader that sees it half
    // written causes one more reseed, rarely. A driver without mutual exclusion would reseed far
    // more often.
    let count = settled_reseeds(&vm)? - before;
    ensure!((20..=22).contains(&count), "{count} reseeds for 20 new IDs");
    no_splat(&vm)
}

/// Expect that a rebind without a new ID does not reseed, and that a bind reseeds once for an ID
/// that came while the device was unbound.
fn a_restore_between_unbind_and_bind_is_caught(context: &Context) -> Result<()> {
    let mut vm = counting(context)?;
    let driver = driver();
    let device = vm.shell(&format!("basename {driver}/*[:.]*"))?;
    let device = device.trim();
    let (before, first) = (settled_reseeds(&vm)?, published(&vm)?);

    // Without a new ID, a rebind has nothing to do. The count also counts the unbind.
    vm.shell(&format!(
        "echo {device} >{driver}/unbind; echo {device} >{driver}/bind"
    ))?;
    expect_published(&vm, first + 1)?;
    expect_reseeds(&vm, before)?;

    vm.shell(&format!("echo {device} >{driver}/unbind"))?;
    vm.set_genctr(43)?;
    settle(&vm)?;
    // The kernel's own driver stays bound, and reseeds for the notification.
    expect_reseeds(&vm, before + 1 - told())?;
    reseeded_by(&vm, || {
        vm.shell(&format!("echo {device} >{driver}/bind")).map(drop)
    })?;
    expect_counter(&vm, 43)?;
    expect_published(&vm, first + 3)?;
    expect_reseeds(&vm, before + 1)?;
    no_splat(&vm)
}
