// SPDX-License-Identifier: MIT OR Apache-2.0

//! The reports of the guests' kernels. The suite checks each guest when it ends. A test fails if
//! the kernel of one of its guests has reported anything, whatever else the test found.

use anyhow::{Context as _, Result, anyhow};
use harness::{Vm, qapi::qmp};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Words that only a report has.
const WORDS: [&str; 4] = ["BUG", "WARNING", "Oops", "panicked"];

/// Phrases that only a report has.
const PHRASES: [&str; 26] = [
    "Call Trace:",
    "Kernel panic",
    "KASAN:",
    "KCSAN:",
    "UBSAN:",
    "ODEBUG:",
    "refcount_t:",
    "list_add corruption",
    "list_del corruption",
    "possible circular locking",
    "possible recursive locking",
    "possible irq lock inversion",
    "inconsistent lock state",
    "bad unlock balance",
    "held lock freed",
    "suspicious RCU usage",
    "trying to register non-static key",
    "DEBUG_LOCKS_WARN_ON",
    "turning off the locking correctness validator",
    "sleeping function called from invalid context",
    "scheduling while atomic",
    "INFO: task ",
    "detected stalls",
    "self-detected stall",
    "soft lockup",
    "memory leak detector disabled",
];

/// The words with which kmemleak's list begins each leak.
const LEAK: &str = "unreferenced object";

/// A function whose allocations only ACPICA can free: its parser's objects. ACPICA loses them where
/// a method calls itself too deeply (7.3.4).
const ACPICAS_OWN: &str = "acpi_ps_alloc_op+";

/// How many lines a report has, at most.
const LINES: usize = 80;

/// Questions about states that the kernel does not report on the console. The guest prints nothing
/// if all is well. The bits are those of a machine check, a bad page, an oops, a warning and a soft
/// lockup. kmemleak reports a leak in the second scan that sees it, and not in its first 5 seconds
/// (mm/kmemleak.c). Its list comes last.
const QUESTIONS: &str = "
    tainted=$(cat /proc/sys/kernel/tainted)
    [ $((tainted & 17072)) -eq 0 ] || echo \"the kernel is tainted: $tainted\"
    [ ! -e /proc/lockdep_stats ] || grep -q 'debug_locks: *1$' /proc/lockdep_stats ||
        echo 'lockdep has been switched off'
    leaks=/sys/kernel/debug/kmemleak
    grep -q ' /sys/kernel/debug ' /proc/mounts || mount -t debugfs debugfs /sys/kernel/debug || exit
    [ -e $leaks ] || exit 0
    echo scan >$leaks && sleep 5 && echo scan >$leaks || exit
    cat $leaks
";

/// The first report in a kernel's log, with what follows it.
pub fn first(log: &str) -> Option<String> {
    let lines: Vec<_> = log.lines().collect();
    let start = lines.iter().position(|line| is_report(line))?;
    let end = lines.len().min(start + LINES);
    Some(lines[start..end].join("\n"))
}

/// What a guest has answered, without the leaks that are ACPICA's own.
fn without_acpicas_own(said: &str) -> String {
    let (mut kept, mut leak) = (String::new(), String::new());
    let keep = |leak: &mut String| {
        let leak = std::mem::take(leak);
        if leak.contains(ACPICAS_OWN) {
            String::new()
        } else {
            leak
        }
    };
    for line in said.lines() {
        if line.starts_with(LEAK) {
            kept += &keep(&mut leak);
        }
        leak += &format!("{line}\n");
    }
    kept + &keep(&mut leak)
}

fn is_report(line: &str) -> bool {
    let mut words = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.any(|word| WORDS.contains(&word)) || PHRASES.iter().any(|phrase| line.contains(phrase))
}

/// The reports of a test's guests, so far.
#[derive(Clone, Default)]
pub struct Reports(Arc<Mutex<Vec<String>>>);

impl Reports {
    /// Looks at a guest that is about to end.
    pub fn look_at_end(&self, vm: &Vm) {
        // First the questions: they may lead to a report on the console.
        match answers(vm) {
            Ok(said) if said.is_empty() => {}
            Ok(said) => self.add(said),
            Err(err) => self.add(format!("{err:#}")),
        }
        self.look_at_console(vm);
    }

    /// Adds the console of a guest that continues.
    pub fn look_at_console(&self, vm: &Vm) {
        // There is none where QEMU did not start.
        let console = vm.console().unwrap_or_default();
        if let Some(report) = first(&String::from_utf8_lossy(&console)) {
            self.add(report);
        }
    }

    /// Adds a report, unless it is there already: a console may be checked twice.
    pub fn add(&self, report: String) {
        let mut reports = self.lock();
        let known = |known: &String| known.lines().next() == report.lines().next();
        if !reports.iter().any(known) {
            reports.push(report);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the result of a test whose guests have ended, with their reports. Removes the
    /// reports.
    pub fn judge(&self, result: Result<()>) -> Result<()> {
        let reports = std::mem::take(&mut *self.lock());
        if reports.is_empty() {
            return result;
        }
        let reports = format!("a guest's kernel reports:\n{}", reports.join("\n\n"));
        Err(match result {
            Ok(()) => anyhow!("{reports}"),
            Err(err) => anyhow!("{err:#}\n\n{reports}"),
        })
    }
}

/// The guest's answers to the questions, if it runs.
fn answers(vm: &Vm) -> Result<String> {
    if vm.pid()?.is_none() {
        return Ok(String::new());
    }
    match vm.qmp(&qmp::query_status {})?.status {
        qmp::RunState::running => {}
        // A test has stopped it; see `freeze`.
        qmp::RunState::paused => drop(vm.qmp(&qmp::cont {})?),
        _ => return Ok(String::new()),
    }
    let said = vm.shell(QUESTIONS).context("a guest at its end")?;
    Ok(without_acpicas_own(&said))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expect that each kind of report is found, with the lines that follow it.
    #[test]
    fn a_report_is_found_with_what_follows() {
        let log = "[ 1.0] quiet\n[ 2.0] BUG: sleeping function\n[ 2.1] in_atomic(): 1\n";
        let report = "[ 2.0] BUG: sleeping function\n[ 2.1] in_atomic(): 1";
        assert_eq!(first(log).as_deref(), Some(report));
        for line in [
            "WARNING: possible circular locking dependency detected",
            "WARNING: drivers/acpi/bus.c:12 at acpi_notify+0x1/0x2, CPU#0: sh/1",
            "BUG kmalloc-64 (Tainted: G           O     ): Poison overwritten",
            "kernel BUG at rust/helpers/bug.c:7!",
            "Oops: Oops: 0000 [#1] SMP",
            "rust_kernel: panicked at driver/counter.rs:1:1:",
            "INFO: task sh:1 blocked for more than 120 seconds.",
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        ] {
            assert_eq!(first(line).as_deref(), Some(line));
        }
    }

    /// Expect that all leaks are kept but those of ACPICA's parser.
    #[test]
    fn leaks_are_ours_unless_acpicas_parser_lost_them() {
        let leak = |by: &str| {
            format!(
                "unreferenced object 0xffff88810086a0b0 (size 56):\n  comm \"guest\", pid 36\n  \
                backtrace (crc 55d32cd6):\n    kmemleak_alloc+0x23/0x30\n    {by}+0x6d/0xf0\n    \
                acpi_evaluate_object+0x244/0x420\n"
            )
        };
        let (theirs, ours) = (leak("acpi_ps_alloc_op"), leak("acpi_ut_initialize_buffer"));
        let tainted = "the kernel is tainted: 512\n";
        for (said, kept) in [
            (String::new(), String::new()),
            (tainted.into(), tainted.into()),
            (theirs.clone(), String::new()),
            (format!("{tainted}{theirs}{theirs}"), tainted.into()),
            (format!("{ours}{theirs}"), ours.clone()),
            (
                format!("{theirs}{ours}{theirs}{ours}"),
                format!("{ours}{ours}"),
            ),
        ] {
            assert_eq!(without_acpicas_own(&said), kept);
        }
    }

    /// Expect that lines of a healthy kernel are no report.
    #[test]
    fn what_a_healthy_kernel_says_is_no_report() {
        for line in [
            "",
            "vmgenid: loading out-of-tree module taints kernel.",
            "kasan: KernelAddressSanitizer initialized (generic)",
            "kmemleak: Kernel memory leak detector initialized (mem pool available: 15673)",
            "kcsan: enabled early",
            "Lock dependency validator: Copyright (c) 2006 Red Hat, Inc., Ingo Molnar",
            "rcu: \tRCU lockdep checking is enabled.",
            "random: crng reseeded due to virtual machine fork",
            "ACPI: DEBUGGING is off",
        ] {
            assert_eq!(first(line), None, "{line}");
        }
    }
}
