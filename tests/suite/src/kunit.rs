// SPDX-License-Identifier: MIT OR Apache-2.0

//! The KUnit tests of the driver, and of the kernel series, in a guest.

use crate::{
    context::{Context, firmware, genctr},
    tests,
};
use anyhow::{Context as _, Result, ensure};
use harness::{Add, Firmware, Options};
use std::{fs, path::Path};

tests! {
    every_unit_of_the_driver_passes_its_tests [Mainline, AlsoArm64]
    the_kernel_series_passes_its_tests_and_examples [Series, AlsoArm64]
}

/// How many tests the driver's sources have.
fn written(folder: &Path) -> Result<usize> {
    let mut tests = 0;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            tests += written(&path)?;
        } else {
            let text = fs::read_to_string(&path)?;
            tests += text.lines().filter(|line| line.trim() == "#[test]").count();
        }
    }
    Ok(tests)
}

/// The names of the tests that passed, if all did and none was skipped.
fn passed(log: &str) -> Result<Vec<&str>> {
    let mut passed = Vec::new();
    for line in log.lines() {
        // "[    1.0]     ok 3 name" is a test, "[    1.0] ok 1 name" a suite of tests.
        let Some((_, said)) = line.split_once("] ") else {
            continue;
        };
        ensure!(
            !said.contains("not ok ") && !said.contains("# SKIP"),
            "{said:?} in:\n{log}"
        );
        let test = said.strip_prefix("    ok ");
        passed.extend(test.and_then(|test| test.split(' ').nth(1)));
    }
    Ok(passed)
}

/// Expect that each KUnit test in the driver's sources passes and none is skipped, and that the
/// module with the tests works as the driver.
fn every_unit_of_the_driver_passes_its_tests(context: &Context) -> Result<()> {
    let module = Add {
        host: context.module("kunit.ko"),
        guest: "/kunit.ko".into(),
    };
    // There the firmware reserves memory for this.
    let ras = firmware() == Firmware::Ovmf;
    let vm = context.boot(Options {
        qemu_arg: if ras {
            vec!["-machine".into(), "ras=on".into()]
        } else {
            vec![]
        },
        no_module: true,
        add: vec![module],
        append: vec!["kunit.enable=1".into(), "kunit.autorun=1".into()],
        ..genctr(42)
    })?;
    // The kernel's own KUnit tests have ended by now.
    let log = vm.shell("dmesg -c >/dev/null; insmod /kunit.ko && dmesg")?;
    let passed = passed(&log)?.len();
    let expected = written(&context.top.join("driver")).context("the driver's sources")?;
    ensure!(
        passed == expected,
        "{passed} passed; {expected} are written:\n{log}"
    );
    // The module with the tests is also the driver.
    let said = vm.shell("contract counter")?;
    ensure!(said.trim() == "read 42, mapped 42", "{said}");
    Ok(())
}

/// Expect that each KUnit test that patches/linux adds, and each example that it adds to the kernel
/// crate's documentation, passes, and that no other test of the kernel crate fails.
fn the_kernel_series_passes_its_tests_and_examples(context: &Context) -> Result<()> {
    let vm = context.boot(Options {
        append: ["kunit.enable=1", "kunit.autorun=1", "log_buf_len=8M"]
            .map(String::from)
            .to_vec(),
        ..genctr(42)
    })?;
    let log = vm.shell("dmesg")?;
    let passed = passed(&log)?;
    let mut expected = 0;
    for patch in fs::read_dir(context.top.join("patches/linux"))? {
        let patch = patch?.path();
        if patch.is_dir() {
            continue;
        }
        for file in fs::read_to_string(&patch)?.split("\ndiff --git a/").skip(1) {
            let (name, _) = file.split_once(' ').context("no name")?;
            let added: Vec<_> = file
                .lines()
                .filter_map(|line| line.strip_prefix('+'))
                .collect();
            for (n, _) in added
                .iter()
                .enumerate()
                .filter(|(_, line)| line.trim() == "#[test]")
            {
                let after = added[n..]
                    .iter()
                    .find_map(|line| line.trim().strip_prefix("fn "));
                let test = after
                    .and_then(|test| test.split('(').next())
                    .context("no function")?;
                ensure!(
                    passed.contains(&test),
                    "{name}: {test} did not run in:\n{log}"
                );
                expected += 1;
            }
            // Each example has a line at its begin and at its end.
            let written = added.iter().filter(|line| line.trim() == "/// ```").count() / 2;
            let examples = name
                .strip_prefix("rust/")
                .unwrap_or(name)
                .replace(['/', '.'], "_");
            let examples = format!("rust_doctest_{examples}_");
            let ran = passed
                .iter()
                .filter(|name| name.starts_with(&examples))
                .count();
            ensure!(
                ran >= written,
                "{ran} of {written} examples of {name} ran in:\n{log}"
            );
            expected += written;
        }
    }
    ensure!(expected > 0, "the patches have no tests");
    Ok(())
}
