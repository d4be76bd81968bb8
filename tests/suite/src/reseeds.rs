// SPDX-License-Identifier: MIT OR Apache-2.0

//! The reseed rule: when the kernel reseeds, and how often.

use crate::{
    context::{
        Context, await_random, driver, expect_counter, expect_reseeds, genctr, generation,
        is_builtin, no_splat, reseeds, settle, settled_reseeds, wait,
    },
    notifications, tests, vmforks,
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

/// A guest in which notifications are held back.
fn without_notifications(context: &Context) -> Result<Vm> {
    let vm = vmforks::boot(context, genctr(42))?;
    notifications::hold(&vm)?;
    Ok(vm)
}

/// Expect that a read applies the rule also where the counter is what the file returned last.
fn read_reseeds_for_an_id_that_comes_without_a_new_counter(context: &Context) -> Result<()> {
    let vm = without_notifications(context)?;
    for _ in 0..3 {
        // QEMU changes the ID each time, and refuses a counter that it has. Vm::set_genctr() refuses
        // one that the guest had before.
        for value in [43, 42] {
            vm.qom_set_counter(value)?;
        }
        reseeded_by(&vm, || expect_counter(&vm, 42))?;
    }
    no_splat(&vm)
}

/// A call that returns after a reseed. A periodic reseed of the kernel at that moment hides one
/// that is missing.
fn reseeded_by(vm: &Vm, call: impl FnOnce() -> Result<()>) -> Result<()> {
    let before = generation(vm)?;
    call()?;
    ensure!(generation(vm)? > before, "no reseed by then");
    Ok(())
}

/// How many lines a change makes without a call, where notifications are held back: none beside
/// `vmgenctr`, which forces a reseed without a word.
fn told() -> usize {
    usize::from(!is_builtin())
}

fn a_notification_reseeds_once(context: &Context) -> Result<()> {
    let mut vm = vmforks::boot(context, genctr(42))?;
    let before = settled_reseeds(&vm)?;
    for (n, value) in (43..48).enumerate() {
        vm.set_genctr(value)?;
        // No process reads: the notification has the kernel reseeded.
        expect_reseeds(&vm, before + n + 1)?;
        expect_counter(&vm, value)?;
    }
    expect_reseeds(&vm, before + 5)?;
    no_splat(&vm)
}

fn read_reseeds_before_the_notification(context: &Context) -> Result<()> {
    let mut vm = without_notifications(context)?;
    let before = settled_reseeds(&vm)?;
    for (n, value) in (43..46).enumerate() {
        vm.set_genctr(value)?;
        expect_reseeds(&vm, before + n * told())?;
        reseeded_by(&vm, || expect_counter(&vm, value))?;
        expect_reseeds(&vm, before + (n + 1) * told())?;
        // Nothing is left to do for the next one.
        expect_counter(&vm, value)?;
        expect_reseeds(&vm, before + (n + 1) * told())?;
    }
    // Nor for the notification that comes late.
    let count = notifications::count(&vm)?;
    notifications::release(&vm)?;
    wait("the notification", || {
        Ok((notifications::count(&vm)? > count).then_some(()))
    })?;
    settle(&vm)?;
    // The kernel's own driver learns of the last ID only, now.
    expect_reseeds(&vm, before + if is_builtin() { 1 } else { 3 })?;
    no_splat(&vm)
}

fn open_and_mmap_do_not_reseed(context: &Context) -> Result<()> {
    let mut vm = without_notifications(context)?;
    let before = settled_reseeds(&vm)?;
    vm.set_genctr(43)?;
    let said = vm.shell("contract peek")?;
    ensure!(said.trim() == "mapped 43", "the mapping shows: {said}");
    expect_reseeds(&vm, before)?;
    reseeded_by(&vm, || expect_counter(&vm, 43))?;
    expect_reseeds(&vm, before + told())
}

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
    // One each. QEMU writes while the guest runs: an ID that a reader sees half written costs one
    // more, rarely. A driver without turns has many more.
    let count = settled_reseeds(&vm)? - before;
    ensure!((20..=22).contains(&count), "{count} reseeds for 20 new IDs");
    no_splat(&vm)
}

fn a_restore_between_unbind_and_bind_is_caught(context: &Context) -> Result<()> {
    let mut vm = vmforks::boot(context, genctr(42))?;
    let driver = driver();
    let device = vm.shell(&format!("basename {driver}/*[:.]*"))?;
    let device = device.trim();
    let before = settled_reseeds(&vm)?;

    // Nothing new: nothing to do.
    vm.shell(&format!(
        "echo {device} >{driver}/unbind; echo {device} >{driver}/bind"
    ))?;
    expect_reseeds(&vm, before)?;

    vm.shell(&format!("echo {device} >{driver}/unbind"))?;
    vm.set_genctr(43)?;
    settle(&vm)?;
    // The kernel's own driver is bound all the time.
    expect_reseeds(&vm, before + 1 - told())?;
    reseeded_by(&vm, || {
        vm.shell(&format!("echo {device} >{driver}/bind")).map(drop)
    })?;
    expect_counter(&vm, 43)?;
    expect_reseeds(&vm, before + 1)?;
    no_splat(&vm)
}
