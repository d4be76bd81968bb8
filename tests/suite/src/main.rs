// SPDX-License-Identifier: MIT OR Apache-2.0

//! The tests: each boots the machines it needs, or shares one, and looks at
//! what the guest says.

mod checkers;
mod clones;
mod context;
mod guests;
mod promises;
mod qemu;
mod reports;
mod reseeds;
mod tool;

use anyhow::Result;
use context::Context;
use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;

/// Tests of what is the same with every guest kernel, by the beginning of their
/// names: QEMU and the tool. With other kernels than the tiny one they are shown
/// as ignored. Here belongs, too, what counts a guest's instructions.
const TINY_ONLY: [&str; 4] = [
    "qemu::its_own_tests_pass",
    "qemu::without_genctr_the_firmware_tables_",
    "qemu::without_genctr_the_migration_stream_",
    "tool::",
];

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    // Ctrl-C ends each test with an error, and its guests with it.
    if let Err(err) = vm::interrupt::catch() {
        eprintln!("suite: {err}");
        return ExitCode::FAILURE;
    }
    // One test spends its time waiting for a guest to grow old.
    args.test_threads = args.test_threads.or(Some(3));
    let tests: [&[Test]; 6] = [
        checkers::TESTS,
        clones::TESTS,
        reseeds::TESTS,
        guests::TESTS,
        qemu::TESTS,
        tool::TESTS,
    ];
    let mut trials = Vec::new();
    for (name, test) in tests.into_iter().flatten() {
        let name = name.trim_start_matches("suite::");
        let trial = Trial::test(name, move || run(*test).map_err(failed));
        let elsewhere = TINY_ONLY.iter().any(|start| name.starts_with(start));
        trials.push(trial.with_ignored_flag(elsewhere && vm::kernel::default() != "tiny"));
    }
    match promises::trials() {
        Ok(promises) => trials.extend(promises),
        Err(err) => {
            eprintln!("suite: {err:#}");
            return ExitCode::FAILURE;
        }
    }

    let conclusion = libtest_mimic::run(&args, trials);
    conclusion.exit_code()
}

/// Runs a test. What its guests' kernels reported counts, too.
fn run(test: fn(&Context) -> Result<()>) -> Result<()> {
    let context = Context::new()?;
    context.reports.judge(test(&context))
}

/// A failure tells the whole chain of what led to it.
fn failed(err: anyhow::Error) -> Failed {
    format!("{err:#}").into()
}

type Test = (&'static str, fn(&Context) -> Result<()>);

/// A table of tests: the functions, by name.
macro_rules! tests {
    ($($name:ident)*) => {
        pub const TESTS: &[crate::Test] =
            &[$((concat!(module_path!(), "::", stringify!($name)), $name)),*];
    };
}
use tests;
