// SPDX-License-Identifier: MIT OR Apache-2.0

//! A kernel thread that is runnable but never runs, since a real-time process occupies its CPU. The
//! thread could be in the middle of a reseed that began before the restore, so the driver has to
//! wait for it. Only callers that may sleep wait with the driver.

use crate::{
    context::{Context, Reply, genctr, lines, no_splat, scaled_time, wait},
    notifications, tests,
    vmforks::{self, Background, expect_published, published},
};
use anyhow::{Context as _, Result, ensure};
use harness::{Options, Vm, qapi::qmp::system_powerdown};
use std::time::Duration;

tests! {
    calls_that_must_not_sleep_return_at_once
    poll_owes_nothing_after_the_complement_was_read
    interrupts_for_others_are_not_claimed_meanwhile
}

const FIRST: u32 = 42;
const AT_ONCE: Duration = Duration::from_secs(2);

/// A guest whose second CPU a real-time process occupies.
struct Starved {
    vm: Vm,
    process: Background,
}

impl Starved {
    /// Boots the guest, calls `before`, which starts other programs, and then starves a worker.
    fn boot<T>(context: &Context, before: impl FnOnce(&Vm) -> Result<T>) -> Result<(Self, T)> {
        let options = Options {
            smp: Some(2),
            parameter: vec!["sysgenid=1".into()],
            ..genctr(FIRST)
        };
        let vm = vmforks::boot(context, options)?;
        // Interrupts come to the first CPU, and ordinary threads get no time on the second.
        vm.shell(
            "set -e
            for irq in /proc/irq/[0-9]*; do echo 1 >$irq/smp_affinity 2>/dev/null || true; done
            echo -1 >/proc/sys/kernel/sched_rt_runtime_us
            for server in /sys/kernel/debug/sched/*_server/cpu1; do echo 0 >$server/runtime; done",
        )?;
        // The SCI and the threads of its handlers move to that CPU at the next interrupt.
        vm.qmp(&system_powerdown {})?;
        vm.shell("sleep 1")?;
        let result = before(&vm)?;
        let process =
            Background::start(&vm, "exec taskset 2 contract held --ms 3600000 --fifo 99")?;
        process.await_line(&vm, "computing")?;
        let worked = worked(&vm)?;
        vm.shell("echo 1 >/sys/kernel/debug/vmforks/work_on; sleep 1")?;
        ensure!(self::worked(&vm)? == worked, "the worker is not starved");
        Ok((Self { vm, process }, result))
    }

    /// Ends the real-time process, and waits until the worker has run.
    fn end(self) -> Result<Vm> {
        let worked = worked(&self.vm)?;
        self.process.kill(&self.vm)?;
        wait("the worker runs", || {
            Ok((self::worked(&self.vm)? > worked).then_some(()))
        })?;
        Ok(self.vm)
    }
}

/// How often the work has been done.
fn worked(vm: &Vm) -> Result<u32> {
    let worked = vm.shell("cat /sys/kernel/debug/vmforks/work_on")?;
    Ok(worked.trim().parse()?)
}

/// Expect that while a runnable kernel thread does not run, a read and the header's barrier wait, a
/// read with O_NONBLOCK returns EAGAIN at once, poll(0) reports nothing at once, and no ID is
/// published. Expect that when the thread has run, one ID is published, and all of them and a
/// process that sleeps in poll learn of the new counter.
fn calls_that_must_not_sleep_return_at_once(context: &Context) -> Result<()> {
    let start = |vm: &Vm, way: &str| -> Result<Background> {
        let process = Background::start(vm, &format!("exec contract at-once --way {way}"))?;
        process.await_line(vm, &format!("waiting at {FIRST}"))?;
        Ok(process)
    };
    let (mut starved, (read, [nonblock, poll], header, waiter)) = Starved::boot(context, |vm| {
        let waiter = Background::start(vm, "exec contract wait --out /tmp/waiter")?;
        let processes = [start(vm, "nonblock")?, start(vm, "poll")?];
        let header = Background::start(vm, "exec header --barrier")?;
        header.await_line(vm, &format!("waiting at {FIRST}"))?;
        Ok((start(vm, "read")?, processes, header, waiter))
    })?;
    let before = published(&starved.vm)?;
    starved.vm.set_genctr(FIRST + 1)?;

    let vm = &starved.vm;
    read.await_blocked(vm)?;
    header.await_blocked(vm)?;
    for (process, expected) in [(&nonblock, "EAGAIN"), (&poll, "not-ready")] {
        let (answer, took) = wait("an answer", || Reply::first(&process.says(vm)?, FIRST + 1))?;
        ensure!(
            answer == expected && took < scaled_time(AT_ONCE),
            "{answer} after {took:?}, expected {expected}"
        );
    }
    vm.shell("sleep 2")?;
    ensure!(read.is_blocked(vm)?, "the read did not wait");
    ensure!(header.is_blocked(vm)?, "the header's barrier did not wait");
    ensure!(published(vm)? == before, "an ID was published meanwhile");
    let said = lines(vm, "cat /tmp/waiter")?;
    ensure!(said.len() == 1, "the waiter says: {said:?}");

    let vm = &starved.end()?;
    for (expected, process) in [("read", &read), ("EAGAIN", &nonblock), ("not-ready", &poll)] {
        let reply = wait(expected, || Reply::of(&process.says(vm)?, FIRST + 1))?;
        ensure!(reply.answer == expected, "not {expected}: {reply:?}");
        eprintln!("{reply:?}");
    }
    header.await_line(vm, &format!("barrier: 0, {}", FIRST + 1))?;
    wait("the waiter is woken", || {
        let said = lines(vm, "cat /tmp/waiter")?;
        Ok((said.len() == 2).then_some(()))
    })?;
    expect_published(vm, before + 1)?;
    waiter.kill(vm).context("the waiter")?;
    no_splat(vm)
}

/// Expect that poll reports nothing once the counter has been read, where an earlier read returned
/// EAGAIN and the counter has become its own complement since then.
fn poll_owes_nothing_after_the_complement_was_read(context: &Context) -> Result<()> {
    let (mut starved, process) = Starved::boot(context, |vm| {
        notifications::hold(vm)?;
        let process = Background::start(vm, "exec contract owed")?;
        process.await_line(vm, &format!("waiting at {FIRST}"))?;
        Ok(process)
    })?;
    starved.vm.set_genctr(FIRST + 1)?;
    process.await_line(&starved.vm, &format!("put off at {}", FIRST + 1))?;
    starved.vm.set_genctr(!(FIRST + 1))?;
    let vm = starved.end()?;
    process.await_line(&vm, "nothing is owed")?;
    no_splat(&vm)
}

/// Expect that the driver does not claim all of ACPI's interrupts that are for other devices while
/// a reseed is pending. The kernel disables a line whose interrupts no handler claims, and has to
/// be able to count them.
fn interrupts_for_others_are_not_claimed_meanwhile(context: &Context) -> Result<()> {
    let (mut starved, ()) = Starved::boot(context, notifications::hold)?;
    let vm = &starved.vm;
    let irq = vm.shell("awk -F: '/ acpi/ { print $1 }' /proc/interrupts")?;
    let unclaimed = format!("grep last /proc/irq/{}/spurious", irq.trim());
    let before = published(vm)?;
    starved.vm.set_genctr(FIRST + 1)?;
    let vm = &starved.vm;
    // The first interrupt wakes the driver's thread.
    vmforks::interrupt(vm, 1)?;
    let first = vm.shell(&format!("sleep 1; {unclaimed}"))?;
    vmforks::interrupt(vm, 10)?;
    let then = vm.shell(&unclaimed)?;
    ensure!(
        then != first,
        "the driver claims the interrupts of other devices: {then}"
    );
    ensure!(published(vm)? == before, "an ID was published meanwhile");
    let vm = starved.end()?;
    expect_published(&vm, before + 1)?;
    no_splat(&vm)
}
