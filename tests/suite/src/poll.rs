// SPDX-License-Identifier: MIT OR Apache-2.0

//! Processes that wait for the counter to change, when the machine is restored.

use crate::{
    context::{Context, await_random, expect_reseeds, genctr, settled_reseeds, wait},
    tests,
};
use anyhow::{Result, ensure};
use harness::Vm;

tests! {
    a_restore_wakes_who_waits
}

/// Waits until the waiter has written a line that starts with this.
fn line(vm: &Vm, start: &str) -> Result<String> {
    wait("the waiter says something", || {
        let log = vm.shell("cat /tmp/waiter 2>/dev/null || true")?;
        Ok(log
            .lines()
            .find(|line| line.starts_with(start))
            .map(String::from))
    })
}

/// Expect that a restore wakes a process that sleeps in poll, that the process then reads the new
/// counter, and that the kernel is reseeded once, in each of two clones.
fn a_restore_wakes_who_waits(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    await_random(&vm)?;
    let argv = ["contract", "wait", "--out", "/tmp/waiter"];
    vm.spawn(argv, "/tmp/waiter.err")?;
    line(&vm, "waiting, at 42")?;
    let before = settled_reseeds(&vm)?;
    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;
    for value in [43, 44] {
        let clone = vm.clone_from(&snapshot, Some(value), None)?;
        let said = line(&clone, "from 42: ")?;
        let expected = format!("from 42: PollFlags(IN), read {value}");
        ensure!(said == expected, "expected {expected}: {said}");
        expect_reseeds(&clone, before + 1)?;
    }
    Ok(())
}
