// SPDX-License-Identifier: MIT OR Apache-2.0

//! The kernel's checkers: they are enabled, and their reports fail a test.

use crate::{
    context::{Context, freeze, genctr},
    deadline, tests, vmforks,
};
use anyhow::{Context as _, Result, ensure};
use harness::Options;
use std::{fs, time::Duration};

tests! {
    the_kernel_has_its_checkers
    each_checker_is_heard [Checkers]
    a_report_fails_the_test_that_ends_the_guest
    a_test_that_hangs_ends_at_its_deadline
}

/// Expect that the guest kernel has exactly the checkers that belong to its configuration.
fn the_kernel_has_its_checkers(context: &Context) -> Result<()> {
    let vm = context.boot(Options::default())?;
    let there = vm.shell(
        "mount -t debugfs debugfs /sys/kernel/debug
        cd /sys/kernel/debug; ls -d kmemleak kcsan failslab fail_function /proc/lockdep_stats 2>/dev/null
        dmesg | grep -o 'KernelAddressSanitizer initialized' || true",
    )?;
    let kernel = harness::kernel::default();
    let expected: &[&str] = match kernel.trim_end_matches("-builtin") {
        "debug" => &[
            "/proc/lockdep_stats",
            "fail_function",
            "failslab",
            "kmemleak",
            "KernelAddressSanitizer initialized",
        ],
        "kcsan" => &["kcsan"],
        _ => &[],
    };
    ensure!(
        there.lines().eq(expected.iter().copied()),
        "expected {expected:?}, there is: {there}"
    );
    Ok(())
}

/// Expect that a mistake on purpose fails the test that makes it, with the report of the checker
/// that must find it.
fn each_checker_is_heard(_: &Context) -> Result<()> {
    let canaries: &[(&str, &str)] = match harness::kernel::default().as_str() {
        "kcsan" => &[("echo 5 >canary & echo 4 >canary; wait", "KCSAN: data-race")],
        _ => &[
            ("echo 1 >canary", "unreferenced object"),
            ("echo 2 >canary", "KASAN: slab-use-after-free"),
            ("echo 3 >canary", "possible circular locking"),
        ],
    };
    for (mistake, report) in canaries {
        let observed = Context::new()?;
        let vm = vmforks::boot(&observed, genctr(42))?;
        vm.shell(&format!("cd /sys/kernel/debug/vmforks || exit; {mistake}"))?;
        drop(vm);
        let judged = observed.reports.judge(Ok(())).err();
        let said = judged.context("no report")?.to_string();
        ensure!(said.contains(report), "{mistake}: no {report:?}: {said}");
    }
    Ok(())
}

/// Expect that a report of a guest's kernel fails the test when the guest ends: a clone, a guest
/// that is restored, a guest that is down, a guest that is stopped. This tests the suite, so it
/// makes a context as a test has it.
fn a_report_fails_the_test_that_ends_the_guest(_: &Context) -> Result<()> {
    let observed = Context::new()?;
    let report = "WARNING: from the test, on purpose";
    let reported = |when: &str, expected: bool| {
        let judged = observed.reports.judge(Ok(()));
        let found = judged.is_err_and(|err| err.to_string().contains(report));
        ensure!(found == expected, "{when}: reported {found}");
        Ok(())
    };
    let say = format!("echo '<4>{report}' >/dev/kmsg");

    let mut vm = observed.boot(genctr(42))?;
    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;
    vm.restore(&snapshot, Some(43))?;
    reported("a guest without a report", false)?;

    let clone = vm.clone_from(&snapshot, Some(44), None)?;
    clone.shell(&say)?;
    drop(clone);
    reported("a clone", true)?;

    vm.shell(&say)?;
    reported("a guest that continues", false)?;
    vm.restore(&snapshot, Some(45))?;
    drop(vm);
    reported("before a restore", true)?;

    // A guest that ended in the middle of a command.
    let vm = observed.boot(genctr(42))?;
    let _ = vm.shell(&format!("{say}; poweroff -f"));
    drop(vm);
    reported("a guest that is down", true)?;

    // A stopped guest with a state that only the suite's questions find.
    let mut vm = observed.boot(genctr(42))?;
    vm.shell("echo 512 >/proc/sys/kernel/tainted")?;
    freeze(&mut vm, &snapshot)?;
    drop(vm);
    let judged = observed.reports.judge(Ok(()));
    let said = judged
        .err()
        .context("a guest that stands still: no report")?;
    ensure!(said.to_string().contains("tainted"), "{said}");
    Ok(())
}

/// Expect that a test that hangs ends at its deadline with an error that says where it was, and
/// that the console, with the tasks, and the registers of its guest are kept.
fn a_test_that_hangs_ends_at_its_deadline(_: &Context) -> Result<()> {
    let observed = Context::new()?;
    let vm = observed.boot(genctr(42))?;
    let name = "checkers::a_test_that_hangs";
    let folder = deadline::folder(name).context("no checkout")?;
    let deadline = Some(Duration::from_secs(1));
    let result = observed.guests.watch(name, deadline, move || {
        vm.shell("sleep 100000")?;
        drop(vm);
        Ok(())
    });
    let said = result.err().context("no error")?.to_string();
    let expected = format!(
        "not done by its deadline, after 1 s; ended at: running \"sh -c sleep 100000\": \
        the guest went down (a panic, a reboot, a power-off or vm stop)\nthe guests' logs are in {}",
        folder.display()
    );
    ensure!(said == expected, "{said}");
    let console = fs::read_to_string(folder.join("1.console.log"))?;
    for words in ["Show Blocked State", "Show backtrace of all active CPUs"] {
        ensure!(console.contains(words), "no {words:?} in {console}");
    }
    let registers = fs::read_to_string(folder.join("1.registers"))?;
    ensure!(registers.contains("RIP="), "{registers}");
    Ok(fs::remove_dir_all(folder)?)
}
