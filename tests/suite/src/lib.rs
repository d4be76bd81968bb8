// SPDX-License-Identifier: MIT OR Apache-2.0

//! The test suite. Each test boots the machines that it needs, or shares one with other tests, and
//! checks what the guest reports. The benchmark (tests/bench) uses the public items.

pub mod age;
mod awslc;
pub mod changes;
mod checkers;
pub mod clones;
mod command;
mod contention;
pub mod context;
mod deadline;
mod debian;
mod device_tree;
pub mod draws;
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
mod notifications;
mod notifiers;
mod on;
pub mod pairs;
mod poll;
mod promises;
mod python;
mod qemu;
mod renewal;
mod reports;
mod reseeds;
mod results;
mod samples;
mod series;
mod shared;
mod sleep;
mod starved;
mod stepper;
mod stress;
mod tool;
mod vmclock;
pub mod vmforks;
mod warm;

use anyhow::{Context as _, Result, ensure};
use context::{Context, scaled_time};
use deadline::Guests;
use libtest_mimic::Arguments;
use on::On;
use std::{
    fs,
    io::ErrorKind,
    process::ExitCode,
    time::{Duration, Instant},
};

/// How many minutes a test may take with the tiny kernel, unless its table says another number. A
/// test that takes longer has failed.
const MINUTES: u32 = 10;

/// Runs the tests that the command line selects.
pub fn main() -> ExitCode {
    suite(Arguments::from_args()).unwrap_or_else(|err| {
        eprintln!("suite: {err:#}");
        ExitCode::FAILURE
    })
}

fn suite(mut args: Arguments) -> Result<ExitCode> {
    // Ctrl-C ends each test with an error, and ends its guests.
    harness::interrupt::catch()?;
    if !args.list {
        match harness::Vm::delete_abandoned(&harness::Host::from_env()?) {
            Ok(0) => {}
            Ok(left) => eprintln!("suite: ended {left} machines of a run that was killed"),
            // Another run may be deleting the same machines.
            Err(err) => eprintln!("suite: cannot end the machines of a killed run: {err:#}"),
        }
    }
    // Some tests spend most of their time waiting, so three run at a time.
    args.test_threads = args.test_threads.or(Some(3));
    let tables: [&[Test]; 33] = [
        age::TESTS,
        awslc::TESTS,
        checkers::TESTS,
        clones::TESTS,
        command::TESTS,
        debian::TESTS,
        device_tree::TESTS,
        early::TESTS,
        firmware::TESTS,
        reseeds::TESTS,
        contention::TESTS,
        faults::TESTS,
        guests::TESTS,
        input::TESTS,
        kunit::TESTS,
        library::TESTS,
        samples::TESTS,
        series::TESTS,
        lifecycle::TESTS,
        matrix::TESTS,
        microvm::TESTS,
        notifiers::TESTS,
        pairs::TESTS,
        poll::TESTS,
        python::TESTS,
        qemu::TESTS,
        renewal::TESTS,
        sleep::TESTS,
        starved::TESTS,
        stepper::TESTS,
        stress::TESTS,
        tool::TESTS,
        vmclock::TESTS,
    ];
    let mut tests = Vec::new();
    for test in tables.into_iter().flatten() {
        let name = test.name.trim_start_matches("suite::");
        tests.push(trial(name, test.minutes, test.on.concat(), test.run));
    }
    tests.extend(promises::trials()?);
    tests.extend(changes::trials()?);
    tests.extend(firmware::trials()?);
    tests.extend(library::trials()?);
    tests.extend(matrix::trials());

    let (mut trials, mut ignored, mut found) = (Vec::new(), Vec::new(), false);
    for Trial { name, on, run } in tests {
        let ignored_here = on::is_ignored(&on);
        // Shown beside the name of an ignored test: the command that runs it.
        let elsewhere = on.contains(&On::Debian) && ignored_here;
        let kind = if elsewhere { "make test-debian" } else { "" };
        let show = |test: Body| {
            // The message has the whole chain of causes.
            let test = move || test().map_err(|err| format!("{err:#}").into());
            let trial = libtest_mimic::Trial::test(name.clone(), test);
            trial.with_kind(kind).with_ignored_flag(ignored_here)
        };
        // A test that does not run is replaced by one that does nothing. Otherwise its closure
        // would keep a reference to a shared guest, and no test would be the last one to use that
        // guest.
        let trial = show(Box::new(|| Ok(())));
        let (filtered, off) = (args.is_filtered_out(&trial), args.is_ignored(&trial));
        trials.push(if filtered || off { trial } else { show(run) });
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

/// Empties out/failed, so that it has only the logs of this run.
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

/// A test with guests of its own. A report of their kernels fails the test.
fn trial(
    name: &str,
    minutes: u32,
    on: Vec<On>,
    test: impl FnOnce(&Context) -> Result<()> + Send + 'static,
) -> Trial {
    let name = name.to_owned();
    let (named, soaks) = (name.clone(), on.contains(&On::Soak));
    let run = Box::new(move || {
        let context = Context::new()?;
        let minutes = (!soaks).then_some(minutes);
        run(&named, minutes, &context.guests, || {
            context.reports.judge(test(&context))
        })
    });
    Trial { name, on, run }
}

/// Runs a test that may take so many minutes with the tiny kernel.
fn run(
    name: &str,
    minutes: Option<u32>,
    guests: &Guests,
    test: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let start = Instant::now();
    let deadline = minutes.map(|minutes| scaled_time(Duration::from_secs(60) * minutes));
    let result = guests.watch(name, deadline, test);
    results::add(name, start.elapsed(), &result);
    result
}

/// A test that can run.
struct Trial {
    name: String,
    on: Vec<On>,
    run: Body,
}

type Body = Box<dyn FnOnce() -> Result<()> + Send>;

/// A line of a table.
struct Test {
    name: &'static str,
    /// How long it may take with the tiny kernel.
    minutes: u32,
    /// Where it runs: the words for the whole table, and those for this test.
    on: [&'static [On]; 2],
    run: fn(&Context) -> Result<()>,
}

/// A table of tests: the names of the functions. `name (20 min)` may take 20 minutes with the tiny
/// kernel, instead of [`MINUTES`]. `name [Tiny]` runs only where [`On::Tiny`] says. A `[Tiny];` at
/// the start applies to all tests of the table.
macro_rules! tests {
    ($([$($all:ident),*];)? $($name:ident $(($minutes:literal min))? $([$($on:ident),*])?)*) => {
        const ALL_ON: &[crate::On] = &[$($(crate::On::$all),*)?];

        pub(crate) const TESTS: &[crate::Test] = &[$(crate::Test {
            name: concat!(module_path!(), "::", stringify!($name)),
            minutes: [$($minutes,)? crate::MINUTES][0],
            on: [ALL_ON, &[$($(crate::On::$on),*)?]],
            run: $name,
        }),*];
    };
}
use tests;
