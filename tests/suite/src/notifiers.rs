// SPDX-License-Identifier: MIT OR Apache-2.0

//! The vmfork notifiers: called once for each published ID, after the publication. No call waits
//! for them. The notifier of the test module takes `rtnl_lock`, as WireGuard's does.

use crate::{
    age::grow_old,
    clones::two_cpus,
    context::{Context, Reply, genctr, is_builtin, no_splat, scaled_time, wait},
    notifications, tests,
    vmforks::{self, Background, count, expect_count, expect_published, notify, published},
};
use anyhow::{Context as _, Result, ensure};
use harness::{Name, Options, Vm};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

tests! {
    rtnl_in_other_hands_holds_up_nobody (20 min)
    a_notifier_that_sleeps_holds_up_nobody
    they_are_called_once_per_published_id
}

/// The counter that the guests begin with.
const FIRST: u32 = 42;

/// The bound for a call that returns "at once". A guest that shares its host's CPUs with others is
/// slow at times. A call that waits for a notifier takes ten seconds or more in these tests.
const AT_ONCE: Duration = Duration::from_secs(2);

/// A task in uninterruptible sleep.
#[derive(Debug)]
struct Blocked {
    name: String,
    stack: String,
}

impl Blocked {
    fn all(vm: &Vm) -> Result<Vec<Self>> {
        let stats = vm.shell("cat /proc/[0-9]*/task/*/stat 2>/dev/null || true")?;
        let mut all = Vec::new();
        for stat in stats.lines() {
            let (pid, rest) = stat.split_once(" (").context("a stat")?;
            let (name, state) = rest.rsplit_once(") ").context("a stat")?;
            if state.starts_with('D') {
                all.push(Self {
                    name: name.into(),
                    stack: vm.shell(&format!("cat /proc/{pid}/stack 2>/dev/null || true"))?,
                });
            }
        }
        Ok(all)
    }

    /// Whether the task is a kworker that calls the notifiers. It executes the driver's work item
    /// or, where the kernel's own driver calls the notifiers, ACPI's.
    fn calls_the_notifiers(&self) -> bool {
        self.name.starts_with("kworker/") && self.stack.contains("blocking_notifier_call_chain")
    }
}

/// Waits for the report of `contract at-once` about the change to this counter, and checks that no
/// call in it waited for a notifier.
fn reply(vm: &Vm, process: &Background, value: u32) -> Result<Reply> {
    let reply = wait("a reply to the change", || {
        let says = process.says(vm)?;
        ensure!(says.starts_with("waiting at "), "it says: {says}");
        Reply::of(&says, value)
    })?;
    for (what, took) in [("the first call", reply.first), ("the read", reply.then)] {
        ensure!(
            took < scaled_time(AT_ONCE),
            "{what} took {took:?}, after the change to {value}: {reply:?}"
        );
    }
    Ok(reply)
}

/// Expect that while a process holds `rtnl_lock` in a clone, a read, a read with O_NONBLOCK and
/// poll(0) return at once, that no two clones draw the same after that, that only the work item
/// waits for the lock, and that the notifiers are called once when the lock is released. (They are
/// not called where the kernel's own driver calls them and is not notified.)
fn rtnl_in_other_hands_holds_up_nobody(context: &Context) -> Result<()> {
    let mut vm = vmforks::boot(context, two_cpus())?;
    grow_old(&mut vm)?;
    let holder = Background::rtnl_holder(&vm)?;
    let process = Background::start(&vm, "exec contract at-once")?;
    process.await_line(&vm, &format!("waiting at {FIRST}"))?;
    let mut draws = BTreeSet::new();
    for masked in [false, true] {
        let name: Name = if masked { "masked" } else { "notified" }.parse()?;
        if masked {
            notifications::hold(&vm)?;
        }
        vm.snapshot(&name)?;
        // The value of the counter selects the call that each clone makes.
        for value in FIRST + 1..=FIRST + 3 {
            let clone = vm.clone_from(&name, Some(value), None)?;
            let reply = reply(&clone, &process, value)?;
            eprintln!("{name}, {value}: {reply:?}");
            ensure!(draws.insert(reply.drawn), "two clones drew the same");

            let told = !(masked && is_builtin());
            if told {
                wait("the work item waits", || {
                    Ok((!Blocked::all(&clone)?.is_empty()).then_some(()))
                })?;
            }
            let blocked = Blocked::all(&clone)?;
            let only = blocked.iter().all(Blocked::calls_the_notifiers);
            ensure!(only && blocked.len() <= 1, "in D state: {blocked:?}");
            // `settle` would wait for that lock, so the count is checked directly.
            ensure!(count(&clone)? == 0, "the notifiers were called");
            holder.clone().kill(&clone)?;
            expect_count(&clone, told.into())?;
            no_splat(&clone)?;
        }
    }
    Ok(())
}

/// Expect that a notifier which sleeps for ten seconds holds up neither a read, nor a read with
/// O_NONBLOCK, nor poll, nor the next change, and that it is called for each of the three IDs.
fn a_notifier_that_sleeps_holds_up_nobody(context: &Context) -> Result<()> {
    let options = Options {
        smp: Some(2),
        parameter: vec!["sysgenid=1".into()],
        ..genctr(FIRST)
    };
    let mut vm = vmforks::boot(context, options)?;
    let before = published(&vm)?;
    vmforks::sleep(&vm, 10_000)?;
    let process = Background::start(&vm, "exec contract at-once")?;
    process.await_line(&vm, &format!("waiting at {FIRST}"))?;
    // A step of 1 selects a read, a step of 2 a read with O_NONBLOCK, a step of 3 poll.
    let (start, mut value) = (Instant::now(), FIRST);
    for n in 1..=3 {
        value += n;
        vm.set_genctr(value)?;
        let reply = reply(&vm, &process, value)?;
        eprintln!("{value}: {reply:?}");
    }
    // `settle` would wait for the notifiers, so the count is checked before that.
    let (count, took) = (count(&vm)?, start.elapsed());
    ensure!(
        count == 0 || took > Duration::from_secs(10),
        "{count} notifiers have returned after {took:?}"
    );
    expect_published(&vm, before + 3)?;
    vmforks::sleep(&vm, 0)?;
    expect_count(&vm, 3)?;
    no_splat(&vm)
}

/// Expect that the notifiers are called once for each published ID, also in a storm of changes.
/// Where the kernel's own driver calls them, expect that they are called, and at most once for each
/// change.
fn they_are_called_once_per_published_id(context: &Context) -> Result<()> {
    let options = Options {
        smp: Some(2),
        parameter: vec!["sysgenid=1".into()],
        ..genctr(1000)
    };
    let mut vm = vmforks::boot(context, options)?;
    let before = published(&vm)?;
    let changes = 300;
    if !is_builtin() {
        // With a slow notifier, several calls are due at a time.
        vm.shell("echo 20 >/sys/kernel/debug/vmforks/sleep")?;
    }
    let all = Background::start(&vm, "exec contract contend --readers 8 --pollers 4")?;
    all.await_line(&vm, "all at 1000")?;
    vm.set_genctr_each(&(1001..=1000 + changes).collect::<Vec<_>>())?;
    all.await_line(&vm, &format!("all at {}", 1000 + changes))?;
    all.kill(&vm)?;
    // When this notification has been handled, so have all earlier ones.
    notify(&vm, 1)?;
    let published = published(&vm)? - before;
    eprintln!("{published} IDs published of {changes}");
    ensure!(
        (1..=changes + changes / 20).contains(&published),
        "{published} IDs published of {changes}"
    );
    if is_builtin() {
        // The kernel's own driver calls them, for the IDs that it sees.
        vm.shell("sleep 1")?;
        let count = count(&vm)?;
        ensure!((1..=changes).contains(&count), "{count} calls");
    } else {
        expect_count(&vm, published).context("the calls")?;
    }
    no_splat(&vm)
}
