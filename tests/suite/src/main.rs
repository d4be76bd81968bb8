// SPDX-License-Identifier: MIT OR Apache-2.0

//! The tests: each boots the machines it needs, or shares one, and looks at
//! what the guest says.

mod clones;
mod context;
mod guests;
mod promises;
mod qemu;
mod reseeds;
mod tool;

use context::Context;
use libtest_mimic::{Arguments, Trial};
use std::{process::ExitCode, sync::Arc};

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    // Ctrl-C ends each test with an error, and its guests with it.
    if let Err(err) = vm::interrupt::catch() {
        eprintln!("suite: {err}");
        return ExitCode::FAILURE;
    }
    // One test spends its time waiting for a guest to grow old.
    args.test_threads = args.test_threads.or(Some(3));
    let context = match Context::new() {
        Ok(context) => Arc::new(context),
        Err(err) => {
            eprintln!("suite: {err:#}");
            return ExitCode::FAILURE;
        }
    };

    let tests: [&[Test]; 5] = [
        clones::TESTS,
        reseeds::TESTS,
        guests::TESTS,
        qemu::TESTS,
        tool::TESTS,
    ];
    let mut trials = Vec::new();
    for (name, test) in tests.into_iter().flatten() {
        let context = context.clone();
        let name = name.trim_start_matches("suite::");
        trials.push(Trial::test(name, move || Ok(test(&context)?)));
    }
    match promises::trials(&context) {
        Ok(promises) => trials.extend(promises),
        Err(err) => {
            eprintln!("suite: {err:#}");
            return ExitCode::FAILURE;
        }
    }

    let conclusion = libtest_mimic::run(&args, trials);
    conclusion.exit_code()
}

type Test = (&'static str, fn(&Context) -> anyhow::Result<()>);

/// A table of tests: the functions, by name.
macro_rules! tests {
    ($($name:ident)*) => {
        pub const TESTS: &[crate::Test] =
            &[$((concat!(module_path!(), "::", stringify!($name)), $name)),*];
    };
}
use tests;
