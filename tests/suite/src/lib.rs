// SPDX-License-Identifier: MIT OR Apache-2.0

//! The tests: each boots the machines it needs, or shares one, and looks at
//! what the guest says.

mod age;
mod awslc;
pub mod bench;
mod changes;
mod checkers;
mod clones;
mod command;
mod contention;
mod context;
mod deadline;
mod debian;
mod draws;
mod early;
mod faults;
mod firmware;
mod guests;
mod input;
mod kunit;
mod library;
mod lifecycle;
mod matrix;
mod microvm;
mod notifiers;
mod poll;
mod promises;
mod qemu;
mod reports;
mod reseeds;
mod results;
mod shared;
mod sleep;
mod starved;
mod stepper;
mod stress;
mod tool;
mod vmclock;
mod vmforks;
mod warm;

use anyhow::{Context as _, Result, ensure};
use context::{Context, patience};
use deadline::Guests;
use libtest_mimic::Arguments;
use std::{
    fs,
    io::ErrorKind,
    process::ExitCode,
    time::{Duration, Instant},
};
use vm::{Machine, Source};

/// Tests of what is the same with every guest kernel, by the beginning of their
/// names: QEMU and the tool. With other kernels than the tiny one they are shown
/// as ignored. Here belongs, too, what counts a guest's instructions.
const TINY_ONLY: [&str; 6] = [
    "early::an_interrupt_for_others_costs_little",
    "matrix::",
    "qemu::its_own_tests_pass",
    "qemu::without_genctr_the_firmware_tables_",
    "qemu::without_genctr_the_migration_stream_",
    "tool::",
];

/// What the driver promises whatever it is loaded with, and wherever the counter is: with
/// VMGENID_PARAMETERS, VMGENID_SOURCE or VMGENID_MACHINE in the environment, the rest is shown as
/// ignored.
const PARAMETERS: [&str; 8] = [
    "changes::",
    "clones::",
    "contention::",
    "library::header::",
    "lifecycle::",
    "promises::",
    "reseeds::",
    "stepper::",
];

/// What needs a kernel in which things can be made to fail.
const DEBUG_ONLY: &str = "faults::";

/// What needs a whole Debian guest, with its kernel.
const DEBIAN_ONLY: &str = "debian::";

/// What is not for a kernel that has its own driver built in. `vmgenctr` keeps the promises of
/// `vmgenid`; each of these has a reason of its own.
const NOT_BUILTIN: [&str; 9] = [
    // The kernel's own driver reseeds whether ours is bound or not.
    "changes::lifecycle::no_reseed_after_the_unbind",
    // The kernel's own driver evaluates ADDR first, when the machine boots. It warns, and one row of
    // the table stops the machine.
    "firmware::addr_",
    "firmware::all_",
    "firmware::objects_that_change_",
    // They count reseeds, and the kernel's own driver also reseeds.
    "firmware::a_notification_from_the_table_reseeds",
    "firmware::a_storm_of_10000_notifications_",
    // `vmgenctr` does not load where there is no device.
    "guests::without_the_device_",
    // Mainline's driver is no module there.
    "lifecycle::the_kernels_own_driver_",
    // `vmgenid` falls back to the function that the kernel's own driver calls; `vmgenctr` refuses.
    "input::vmgenid_falls_back_",
];

/// What is for such a kernel only.
const BUILTIN_ONLY: [&str; 3] = [
    "guests::beside_vmgenctr_",
    "input::vmgenctr_refuses_",
    // It steps through the kernel's own driver.
    "stepper::a_snapshot_in_the_builtin_drivers_",
];

/// What holds notifications back, by masking the GPE that a PC has for them. microvm has none.
const MASKING: [&str; 17] = [
    "changes::library::a_change_is_seen_and_the_barrier_reseeds",
    "changes::lifecycle::many_rebinds_under_a_storm",
    "changes::poll::a_look_is_enough_to_reseed",
    "changes::poll::a_read_that_may_not_wait_says_so",
    "changes::poll::an_interrupt_for_others_wakes_nobody_too_early",
    "changes::poll::io_uring_reads_a_changed_counter",
    "changes::poll::io_uring_reads_what_changed_before_the_open",
    "changes::poll::without_a_notification_nobody_is_woken",
    "changes::sysgenid::an_unbind_reseeds_what_is_due",
    "changes::sysgenid::the_library_uses_it",
    "changes::sysgenid::the_page_changes_after_the_reseed",
    "contention::no_lock_is_held_while_a_buffer_faults",
    "contention::readers_alone_reseed_once_per_id",
    "lifecycle::a_notification_after_the_unbind_does_nothing",
    "reseeds::open_and_mmap_do_not_reseed",
    "reseeds::read_reseeds_before_the_notification",
    "reseeds::read_reseeds_for_an_id_that_comes_without_a_new_counter",
];

/// What steps through machine code. The checkers of the debug kernels add calls to it.
const STEPPER: &str = "stepper::";

/// What takes an hour, or as long as the environment says. These have no deadline.
const SOAKS: [&str; 5] = [
    "age::a_guest_whose_clock_was_moved_",
    "clones::a_thousand_restores",
    "stepper::every_instruction_",
    "stress::a_thousand_rebinds",
    "stress::soak",
];

/// How many minutes a test may take with the tiny kernel, unless its table says another number.
/// What takes longer has gone wrong.
const MINUTES: u32 = 10;

/// Runs the tests that the command line says.
pub fn main() -> ExitCode {
    suite(Arguments::from_args()).unwrap_or_else(|err| {
        eprintln!("suite: {err:#}");
        ExitCode::FAILURE
    })
}

fn suite(mut args: Arguments) -> Result<ExitCode> {
    // Ctrl-C ends each test with an error, and its guests with it.
    vm::interrupt::catch()?;
    if !args.list {
        match vm::Vm::delete_abandoned(&vm::Host::from_env()?) {
            Ok(0) => {}
            Ok(left) => eprintln!("suite: ended {left} machines of a run that was killed"),
            // Another run may be deleting the same machines.
            Err(err) => eprintln!("suite: cannot end the machines of a killed run: {err:#}"),
        }
    }
    // Some tests spend their time waiting.
    args.test_threads = args.test_threads.or(Some(3));
    let tables: [&[Test]; 27] = [
        age::TESTS,
        awslc::TESTS,
        checkers::TESTS,
        clones::TESTS,
        command::TESTS,
        debian::TESTS,
        early::TESTS,
        firmware::TESTS,
        reseeds::TESTS,
        contention::TESTS,
        faults::TESTS,
        guests::TESTS,
        input::TESTS,
        kunit::TESTS,
        library::TESTS,
        lifecycle::TESTS,
        matrix::TESTS,
        microvm::TESTS,
        notifiers::TESTS,
        poll::TESTS,
        qemu::TESTS,
        sleep::TESTS,
        starved::TESTS,
        stepper::TESTS,
        stress::TESTS,
        tool::TESTS,
        vmclock::TESTS,
    ];
    let mut tests = Vec::new();
    for &(name, minutes, test) in tables.into_iter().flatten() {
        tests.push(trial(name.trim_start_matches("suite::"), minutes, test));
    }
    tests.extend(promises::trials()?);
    tests.extend(changes::trials()?);
    tests.extend(firmware::trials()?);
    tests.extend(library::trials()?);
    tests.extend(matrix::trials());

    let (mut trials, mut ignored, mut found) = (Vec::new(), Vec::new(), false);
    for (name, test) in tests {
        // The reason, where the test is shown as ignored.
        let elsewhere = name.starts_with(DEBIAN_ONLY) && !is_debian();
        let kind = if elsewhere { "make test-debian" } else { "" };
        let show = |test: Body| {
            // A failure tells the whole chain of what led to it.
            let test = move || test().map_err(|err| format!("{err:#}").into());
            let trial = libtest_mimic::Trial::test(name.clone(), test);
            trial.with_kind(kind).with_ignored_flag(is_ignored(&name))
        };
        // In place of what does not run, so that nothing of that holds a shared guest.
        let trial = show(Box::new(|| Ok(())));
        let (filtered, off) = (args.is_filtered_out(&trial), args.is_ignored(&trial));
        trials.push(if filtered || off { trial } else { show(test) });
        found |= !filtered;
        if off && !filtered {
            ignored.push(name);
        }
    }
    if !args.list {
        let arguments = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        ensure!(
            found,
            "no test matches: {arguments}; --list shows all tests"
        );
        empty_failed()?;
    }
    let conclusion = libtest_mimic::run(&args, trials);
    results::report(&ignored);
    Ok(conclusion.exit_code())
}

/// What is in out/failed is of this run.
fn empty_failed() -> Result<()> {
    let Some(failed) = results::out().map(|out| out.join("failed")) else {
        return Ok(());
    };
    match fs::remove_dir_all(&failed) {
        Err(err) if err.kind() != ErrorKind::NotFound => {
            Err(err).with_context(|| format!("cannot empty {}", failed.display()))
        }
        _ => Ok(()),
    }
}

/// Whether the guests are whole Debian ones.
fn is_debian() -> bool {
    vm::kernel::default() == vm::kernel::DEBIAN
}

/// Whether a test is not for the kernel at hand.
fn is_ignored(name: &str) -> bool {
    if is_debian() || name.starts_with(DEBIAN_ONLY) {
        return is_debian() != name.starts_with(DEBIAN_ONLY);
    }
    let any = |names: &[&str]| names.iter().any(|start| name.starts_with(start));
    any(&SOAKS)
        || (context::parameters().is_some()
            || context::source() == Source::Vmclock
            || context::machine() == Machine::Microvm)
            && !any(&PARAMETERS)
        || context::machine() == Machine::Microvm && any(&MASKING)
        || match vm::kernel::default().as_str() {
            "tiny" => any(&BUILTIN_ONLY) || any(&[DEBUG_ONLY]),
            "builtin" => any(&TINY_ONLY) || any(&NOT_BUILTIN) || any(&[DEBUG_ONLY]),
            "debug" => any(&TINY_ONLY) || any(&BUILTIN_ONLY) || any(&[STEPPER]),
            name if vm::kernel::is_builtin(name) => {
                any(&TINY_ONLY) || any(&NOT_BUILTIN) || any(&[STEPPER])
            }
            _ => any(&TINY_ONLY) || any(&BUILTIN_ONLY) || any(&[DEBUG_ONLY, STEPPER]),
        }
}

/// A test with guests of its own. A report of their kernels fails the test.
fn trial(
    name: &str,
    minutes: u32,
    test: impl FnOnce(&Context) -> Result<()> + Send + 'static,
) -> Trial {
    let named = name.to_owned();
    let run = move || {
        let context = Context::new()?;
        run(&named, minutes, &context.guests, || {
            context.reports.judge(test(&context))
        })
    };
    (name.into(), Box::new(run))
}

/// Runs a test that may take so many minutes with the tiny kernel.
fn run(name: &str, minutes: u32, guests: &Guests, test: impl FnOnce() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    let soaks = SOAKS.iter().any(|start| name.starts_with(start));
    let deadline = patience(Duration::from_secs(60) * minutes);
    let result = guests.watch(name, (!soaks).then_some(deadline), test);
    results::add(name, start.elapsed(), &result);
    result
}

/// A test, by its name.
type Trial = (String, Body);

type Body = Box<dyn FnOnce() -> Result<()> + Send>;

/// A line of a table: its name, how many minutes it may take with the tiny kernel, and the function.
type Test = (&'static str, u32, fn(&Context) -> Result<()>);

/// A table of tests: the functions, by name, and how many minutes each may take with the tiny
/// kernel if that is not [`MINUTES`]: `name (20 min)`.
macro_rules! tests {
    ($($name:ident $(($minutes:literal min))?)*) => {
        pub const TESTS: &[crate::Test] = &[$((
            concat!(module_path!(), "::", stringify!($name)),
            [$($minutes,)? crate::MINUTES][0],
            $name,
        )),*];
    };
}
use tests;
