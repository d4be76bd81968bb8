// SPDX-License-Identifier: MIT OR Apache-2.0

//! Fault injection, in the guest kernel that has it: each allocation and each registration of
//! probe, of open and of the calls on an open file fails once.

use crate::{
    context::{Context, driver, genctr, no_node, no_splat},
    firmware, tests,
    vmforks::{self, Background},
};
use anyhow::{Context as _, Result, ensure};
use harness::{Options, Vm, kernel};

tests! {
    [Debug];
    each_fault_of_a_first_probe_is_unwound (20 min)
    each_fault_of_a_probe_is_unwound (20 min)
    each_fault_of_a_call_is_unwound (20 min)
    a_readv_that_faults_leaves_poll_as_it_was (20 min)
    each_registration_that_fails_has_its_outcome (20 min)
}

/// Boots a guest in which faults are injected only on request, and the kernel does not log them.
fn boot(context: &Context, options: Options) -> Result<Vm> {
    let vm = vmforks::boot(
        context,
        Options {
            smp: Some(2),
            ..options
        },
    )?;
    vm.shell(
        "set -e
        cd /sys/kernel/debug
        for kind in failslab fail_page_alloc fail_usercopy fail_function; do
            echo 0 >$kind/verbose
            echo 0 >$kind/probability
        done
        echo N >failslab/ignore-gfp-wait
        echo N >fail_page_alloc/ignore-gfp-wait
        echo N >fail_page_alloc/ignore-gfp-highmem
        echo 0 >fail_page_alloc/min-order
        echo clear >kmemleak",
    )?;
    Ok(vm)
}

/// Checks that no memory has leaked, that kmemleak still runs, and that the kernel has reported
/// nothing.
fn clean(vm: &Vm) -> Result<()> {
    // kmemleak takes an object for one in use if it is younger than five seconds, or if it has
    // changed between two scans.
    let leaks =
        "cd /sys/kernel/debug; for _ in 1 2; do sleep 6; echo scan >kmemleak; done; cat kmemleak";
    let leaks = Background::start(vm, leaks)?.end(vm)?;
    ensure!(leaks.is_empty(), "kmemleak has found: {leaks}");
    let gave_up = "dmesg | grep -E 'kmemleak: .*disabled|ODEBUG: Out of memory' || true";
    let gave_up = vm.shell(gave_up)?;
    ensure!(gave_up.is_empty(), "a checker has given up: {gave_up}");
    no_splat(vm)
}

/// Returns how many faults a walk has injected, from its report, and checks that the report has
/// each of `outcomes`.
fn faults(said: &str, outcomes: &[&str]) -> Result<u32> {
    let count = said
        .lines()
        .find_map(|line| line.strip_suffix(" faults")?.parse().ok());
    for outcome in outcomes {
        ensure!(said.contains(outcome), "no {outcome:?}: {said}");
    }
    eprintln!("{said}");
    count.with_context(|| said.to_string())
}

/// Expect that the faults of a probe lead to each of the allowed outcomes and to no other, that the
/// next bind works, and that nothing leaks.
///
/// The ACPI objects of the device are plain names. Where an allocation fails while a method stores
/// a package into a local, as QEMU's does, ACPICA itself follows a null pointer
/// (acpi_ut_update_object_reference(), 7.3.4).
fn probes(context: &Context, walk: &str, floor: u32) -> Result<()> {
    let (_tables, options) = firmware::plain(context)?;
    let vm = boot(context, options)?;
    let said = Background::start(&vm, &format!("contract faults {walk}"))?.end(&vm)?;
    let outcomes = [
        "not bound",
        "bound without a node, one line",
        "bound without the early look, one line",
        "bound, all there",
    ];
    let count = faults(&said, &outcomes)?;
    ensure!(count >= floor, "{count} faults only: {said}");
    clean(&vm)
}

/// Expect that each fault of the first probe after a load of the module is unwound, as in
/// [`probes`].
fn each_fault_of_a_first_probe_is_unwound(context: &Context) -> Result<()> {
    probes(context, "first-bind", 40)
}

/// Expect the same of each fault of a later probe.
fn each_fault_of_a_probe_is_unwound(context: &Context) -> Result<()> {
    probes(context, "bind", 30)
}

/// Expect that open, mmap, poll and epoll succeed, or fail with ENOMEM, EFAULT or EINVAL, at each
/// fault, that the next call works, and that nothing leaks.
fn each_fault_of_a_call_is_unwound(context: &Context) -> Result<()> {
    let vm = boot(context, genctr(42))?;
    for (call, floor, errno) in [
        ("open", 2, "NOMEM"),
        ("mmap", 3, "NOMEM"),
        ("poll", 1, "FAULT"),
        ("epoll", 3, "NOMEM"),
    ] {
        let said = Background::start(&vm, &format!("contract faults {call}"))?.end(&vm)?;
        let count = faults(&said, &[errno]).context(call)?;
        ensure!(count >= floor, "{call}: {count} faults only: {said}");
    }
    clean(&vm)
}

/// Expect that a readv of a new counter is EFAULT at each fault, and that poll reports the file as
/// readable until a readv succeeds.
fn a_readv_that_faults_leaves_poll_as_it_was(context: &Context) -> Result<()> {
    let mut vm = boot(context, genctr(42))?;
    let reader = Background::start(&vm, "contract faults readv")?;
    reader.await_line(&vm, "reading 42")?;
    vm.set_genctr(43)?;
    faults(&reader.end(&vm)?, &["FAULT"])?;
    clean(&vm)
}

/// A function that fails at its `nth` call in an insmod or a bind, and the outcome. `error` is the
/// errno that it returns; with `None` it fails in its own manner, by a null pointer or a status.
struct Failing {
    function: &'static str,
    error: Option<i32>,
    nth: u32,
    bind: bool,
    outcome: &'static str,
}

const ENOMEM: i32 = 12;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;

/// Expect that each registration that fails leads to the outcome in its row, that the next load or
/// bind works, and that mmap is ENOMEM where the kernel's function fails.
fn each_registration_that_fails_has_its_outcome(context: &Context) -> Result<()> {
    let vm = boot(context, genctr(42))?;
    let failing = |function, error, nth, bind, outcome| Failing {
        function,
        error,
        nth,
        bind,
        outcome,
    };
    let (enomem, insmod, bind) = (Some(ENOMEM), false, true);
    let without = "bound without a node, one line";
    let late = "bound without the early look, one line";
    let all = [
        failing(
            "__platform_driver_register",
            enomem,
            1,
            insmod,
            "not bound, 12",
        ),
        // The first call maps the ID, the second one the counter.
        failing("memremap", None, 1, insmod, "not bound"),
        failing("memremap", None, 2, insmod, without),
        failing("memremap", None, 1, bind, without),
        failing("acpi_get_handle", None, 1, bind, "not bound, one line, 22"),
        failing("acpi_get_handle", None, 2, bind, without),
        failing(
            "acpi_evaluate_object",
            None,
            1,
            bind,
            "not bound, one line, 22",
        ),
        failing("acpi_evaluate_object", None, 2, bind, without),
        failing(
            "devm_acpi_install_notify_handler",
            enomem,
            1,
            bind,
            "not bound, 12",
        ),
        failing("__devm_add_action", enomem, 1, bind, "not bound, 12"),
        failing("misc_register", enomem, 1, bind, without),
        failing("acpi_gsi_to_irq", Some(EINVAL), 1, bind, late),
        failing("register_pm_notifier", enomem, 1, bind, "not bound, 12"),
        failing(
            "kthread_create_worker_on_node",
            enomem,
            1,
            insmod,
            "not bound, 12",
        ),
        failing("request_threaded_irq", Some(EBUSY), 1, bind, late),
    ];
    for failing in &all {
        let function = failing.function;
        fail(&vm, failing).with_context(|| format!("{function}, call {}", failing.nth))?;
    }

    // The function that mmap calls.
    inject(&vm, "vm_iomap_memory", Some(ENOMEM), 1)?;
    let output = vm.exec(["contract", "counter"])?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(said.contains("os error 12"), "mmap: {said}");
    injected(&vm, "vm_iomap_memory")?;
    expect_works(&vm)?;
    clean(&vm)
}

fn fail(vm: &Vm, failing: &Failing) -> Result<()> {
    let module = kernel::driver(&kernel::default());
    let unbind = format!(
        "cd {}; for device in *[:.]*; do echo $device >unbind; done",
        driver()
    );
    let unload = format!("rmmod {module}");
    let (before, program) = if failing.bind {
        (&unbind, "contract probe --bind")
    } else {
        (&unload, "contract probe")
    };
    vm.shell(before)?;
    no_node(vm)?;
    inject(vm, failing.function, failing.error, failing.nth)?;
    let said = vm.shell(program)?;
    injected(vm, failing.function)?;
    ensure!(said.trim() == failing.outcome, "{said}");
    if !failing.outcome.ends_with("one line") {
        no_node(vm)?;
    }
    // The next probe works.
    if failing.bind {
        vm.shell(&format!("{unbind} 2>/dev/null; contract probe --bind"))?;
    } else {
        vm.shell(&format!("{unload} 2>/dev/null; insmod /vmgenid.ko"))?;
    }
    expect_works(vm)
}

fn expect_works(vm: &Vm) -> Result<()> {
    let said = vm.shell("contract counter")?;
    ensure!(said.trim() == "read 42, mapped 42", "afterwards: {said}");
    Ok(())
}

/// Makes a function fail once, whichever the caller.
fn inject(vm: &Vm, function: &str, error: Option<i32>, nth: u32) -> Result<()> {
    let retval = error.map_or(String::new(), |errno| {
        format!("printf %#x -{errno} >{function}/retval;")
    });
    vm.shell(&format!(
        "set -e; cd /sys/kernel/debug/fail_function
        echo {function} >inject; {retval}
        echo {} >space; echo 1 >times; echo 100 >probability",
        nth
    ))
    .map(drop)
}

/// Checks that the function has failed, and ends the injection.
fn injected(vm: &Vm, function: &str) -> Result<()> {
    let left = vm.shell(&format!(
        "cd /sys/kernel/debug/fail_function; echo 0 >probability; echo '!{function}' >inject; cat times"
    ))?;
    ensure!(left.trim() == "0", "{function} was not called");
    Ok(())
}
