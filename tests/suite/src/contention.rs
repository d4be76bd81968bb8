// SPDX-License-Identifier: MIT OR Apache-2.0

//! The reseed rule under contention: many readers, storms of changes and of notifications, and
//! reads into buffers whose page faults do not end.

use crate::{
    context::{Context, genctr, generation, is_builtin, no_splat, scaled, settle, wait},
    notifications, tests,
    vmforks::{self, Background, count, expect_count, notify},
};
use anyhow::{Result, ensure};
use harness::{
    Options, Vm,
    qapi::qmp::{cont, qom_set, stop},
};

tests! {
    [AnySetup];
    readers_alone_reseed_once_per_id [NotArm64Acpi]
    readers_and_notifications_take_turns
    nobody_learns_of_a_running_change_before_the_reseed
    a_storm_is_seen_as_fewer_changes [NotArm64Acpi]
    notifications_without_a_change_do_nothing [NotArm64Acpi]
    no_lock_is_held_while_a_buffer_faults
}

/// The counter that the guests begin with.
const FIRST: u32 = 1000;

/// How many changes a test makes, one by one.
fn steps() -> u32 {
    scaled(100)
}

fn boot(context: &Context) -> Result<Vm> {
    vmforks::boot(
        context,
        Options {
            smp: Some(2),
            ..genctr(FIRST)
        },
    )
}

/// Starts the observers, and waits until all of them observe.
fn contend(vm: &Vm, counter: u32, arguments: &str) -> Result<Background> {
    let all = Background::start(vm, &format!("exec contract contend {arguments}"))?;
    all.await_line(vm, &format!("all at {counter}"))?;
    Ok(all)
}

/// A change while no vCPU runs, as at a restore.
fn set_paused(vm: &mut Vm, counter: u32) -> Result<()> {
    vm.qmp(&stop {})?;
    vm.set_genctr(counter)?;
    vm.qmp(&cont {}).map(drop)
}

/// Changes the counter step by step. Each thread that learns of a change checks that the reseed
/// came first. Checks that the notifiers are called `notified` times for each step.
fn step_by_step(vm: &mut Vm, arguments: &str, notified: u32) -> Result<()> {
    let steps = steps();
    let all = contend(vm, FIRST, &format!("--steps {arguments}"))?;
    for step in 1..=steps {
        let counter = FIRST + step;
        set_paused(vm, counter)?;
        all.await_line(vm, &format!("all at {counter}"))?;
        if step % 10 == 0 {
            expect_count(vm, step * notified)?;
        }
    }
    all.kill(vm)?;
    expect_count(vm, steps * notified)?;
    no_splat(vm)
}

/// Expect that while notifications are held back, no reader and no poller learns of a change before
/// the reseed, that the notifiers are called once for each ID, and that the late notification does
/// not call them again. (The kernel's own driver calls them once, when it is notified.)
fn readers_alone_reseed_once_per_id(context: &Context) -> Result<()> {
    let mut vm = boot(context)?;
    notifications::hold(&vm)?;
    // With `vmgenctr`, the kernel's own driver calls the notifiers, and it is not notified yet.
    let ours = u32::from(!is_builtin());
    step_by_step(&mut vm, "--readers 64 --pollers 8 --poll-again 20", ours)?;
    // The late notification finds nothing to do. The kernel's own driver finds the last ID.
    notifications::release(&vm)?;
    notify(&vm, 1)?;
    expect_count(&vm, if is_builtin() { 1 } else { steps() })
}

/// Expect that no reader and no poller learns of a change before the reseed where notifications
/// come, and that the notifiers are called once for each change.
fn readers_and_notifications_take_turns(context: &Context) -> Result<()> {
    // Only the notification wakes these pollers.
    step_by_step(&mut boot(context)?, "--readers 64 --pollers 8", 1)
}

/// Waits until all have seen this counter.
fn await_all(vm: &Vm, all: &Background, counter: u32) -> Result<()> {
    wait("all readers", || {
        let says = all.says(vm)?;
        let last = says.lines().last().unwrap_or_default();
        ensure!(last.starts_with("all at "), "a process reports: {last}");
        Ok((last == format!("all at {counter}")).then_some(()))
    })
}

/// Expect that no reader and no poller learns of a change before the reseed where the counter
/// changes while the guest runs, and that the notifiers are called once for each change (5 % more
/// often at most).
fn nobody_learns_of_a_running_change_before_the_reseed(context: &Context) -> Result<()> {
    let mut vm = boot(context)?;
    let steps = steps();
    let all = contend(&vm, FIRST, "--steps --readers 64 --pollers 8")?;
    for counter in FIRST + 1..=FIRST + steps {
        vm.set_genctr(counter)?;
        await_all(&vm, &all, counter)?;
    }
    all.kill(&vm)?;
    // One call for each ID. QEMU writes the ID while the guest runs: an ID that is seen half
    // written causes one more call, rarely.
    let count = settled(&vm)?;
    ensure!(
        (steps..=steps + steps / 20).contains(&count),
        "{count} calls of the notifiers for {steps} new IDs"
    );
    no_splat(&vm)
}

/// Expect that all readers and pollers see the last of 500 rapid changes, that the notifiers are
/// called at most once for each change (and 5 %), and that notifications without a change then do
/// nothing.
fn a_storm_is_seen_as_fewer_changes(context: &Context) -> Result<()> {
    let mut vm = boot(context)?;
    let changes = 500;
    let last = FIRST + changes;
    let all = contend(&vm, FIRST, "--readers 64 --pollers 8")?;
    let more = Background::start(&vm, "echo 1000 >/sys/kernel/debug/vmforks/notify")?;
    vm.set_genctr_each(&(FIRST + 1..=last).collect::<Vec<_>>())?;
    await_all(&vm, &all, last)?;
    let said = more.end(&vm)?;
    ensure!(said.is_empty(), "the notifications: {said}");

    // All of them have seen the last change, so nothing is left to do.
    let before = settled(&vm)?;
    notify(&vm, 1000)?;
    expect_count(&vm, before)?;
    ensure!(
        (1..=changes + changes / 20).contains(&before),
        "{before} calls of the notifiers for {changes} new IDs"
    );
    let says = all.kill(&vm)?;
    ensure!(
        says.lines().last() == Some(&*format!("all at {last}")),
        "after the last change: {says}"
    );
    no_splat(&vm)
}

/// How often the notifiers were called, once no more calls come.
fn settled(vm: &Vm) -> Result<u32> {
    let mut last = None;
    wait("the notifiers come to an end", || {
        let before = last.replace(count(vm)?);
        settle(vm)?;
        Ok(last.filter(|_| before == last))
    })
}

/// Expect that 10,000 notifications without a change lead to no call of the notifiers, before a
/// change and after it, and that readers and pollers see that change.
fn notifications_without_a_change_do_nothing(context: &Context) -> Result<()> {
    let mut vm = boot(context)?;
    let all = contend(&vm, FIRST, "--steps --readers 64 --pollers 8")?;
    notify(&vm, scaled(10_000))?;
    expect_count(&vm, 0)?;
    // Pollers that the notifications woke sleep again, and wake at the next change.
    set_paused(&mut vm, FIRST + 1)?;
    all.await_line(&vm, &format!("all at {}", FIRST + 1))?;
    expect_count(&vm, 1)?;
    notify(&vm, scaled(10_000))?;
    expect_count(&vm, 1)?;
    all.kill(&vm)?;
    no_splat(&vm)
}

/// Expect that a read whose buffer is faulted in from a disk that does not answer has already
/// reseeded the kernel, and that such reads block neither changes, nor other readers and pollers,
/// nor an unbind.
fn no_lock_is_held_while_a_buffer_faults(context: &Context) -> Result<()> {
    // A disk whose reads can be made to take for ever.
    let options = Options {
        smp: Some(2),
        qemu_arg: [
            "-object",
            "throttle-group,id=slow",
            "-blockdev",
            "driver=throttle,node-name=slow,throttle-group=slow,\
             file.driver=null-co,file.size=1048576,file.read-zeroes=on",
            "-device",
            "virtio-blk-pci,drive=slow",
        ]
        .map(String::from)
        .into(),
        ..genctr(FIRST)
    };
    let mut vm = vmforks::boot(context, options)?;
    notifications::hold(&vm)?;
    let disk = vm.shell("cd /sys/block; grep -lx 2048 */size")?;
    let disk = format!("/dev/{}", disk.trim().trim_end_matches("/size"));
    vm.qmp(&qom_set {
        path: "/objects/slow".into(),
        property: "limits".into(),
        value: r#"{"bps-read": 1}"#.parse()?,
    })?;
    // The first read is not throttled. The next one takes an hour or more.
    vm.shell(&format!("head -c 1 {disk} >/dev/null"))?;
    let stuck_reader = |vm: &Vm| -> Result<Background> {
        let reader = Background::start(vm, &format!("exec contract read-into {disk}"))?;
        reader.await_line(vm, "reading")?;
        reader.await_blocked(vm)?;
        Ok(reader)
    };

    // This reader is the first one to see a change, so its read has reseeded the kernel. (The
    // machine keeps running: QEMU completes all disk reads before it stops a machine. The kernel
    // `series` reseeds for the program that asks.)
    let before = generation(&vm)?;
    vm.set_genctr(FIRST + 1)?;
    let mut stuck = vec![stuck_reader(&vm)?];
    ensure!(generation(&vm)? > before, "it has not reseeded");

    let all = contend(
        &vm,
        FIRST + 1,
        "--steps --readers 64 --pollers 8 --poll-again 20",
    )?;
    for step in 1..=4 {
        let counter = FIRST + 1 + step;
        vm.set_genctr(counter)?;
        stuck.push(stuck_reader(&vm)?);
        await_all(&vm, &all, counter)?;
    }
    all.kill(&vm)?;

    // They do not block an unbind of the device either.
    for promise in [
        "readv_returns_the_counter_in_any_split",
        "an_unbound_device_answers_enodev",
        "mmap_shows_the_counter_and_zeros",
    ] {
        let said = Background::start(&vm, &format!("contract promise {promise}"))?.end(&vm)?;
        ensure!(said.is_empty(), "{promise}: {said}");
    }
    for reader in &stuck {
        ensure!(reader.is_blocked(&vm)?, "the disk was not slow enough");
    }
    if !is_builtin() {
        let count = settled(&vm)?;
        ensure!(
            (5..=6).contains(&count),
            "{count} calls of the notifiers for 5 new IDs"
        );
    }
    no_splat(&vm)
}
