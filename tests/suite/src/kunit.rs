// SPDX-License-Identifier: MIT OR Apache-2.0

//! The driver's own KUnit tests, in a guest.

use crate::{
    context::{Context, firmware, genctr},
    tests,
};
use anyhow::{Context as _, Result, ensure};
use harness::{Add, Firmware, Options};
use std::{fs, path::Path};

tests! {
    every_unit_of_the_driver_passes_its_tests [AlsoArm64]
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
    let tap = vm.shell("dmesg -c >/dev/null; insmod /kunit.ko && dmesg")?;
    // "[    1.0]     ok 3 name" is a test, "[    1.0] ok 1 name" a suite of tests.
    let lines: Vec<_> = tap
        .lines()
        .filter_map(|line| line.split_once("] "))
        .map(|(_, said)| said)
        .collect();
    let failed: Vec<_> = lines
        .iter()
        .filter(|said| said.contains("not ok"))
        .collect();
    ensure!(failed.is_empty(), "{failed:?} in:\n{tap}");
    let passed = lines
        .iter()
        .filter(|said| said.starts_with("    ok "))
        .count();
    let skipped = lines.iter().filter(|said| said.contains("# SKIP")).count();
    let expected = written(&context.top.join("driver")).context("the driver's sources")?;
    ensure!(
        passed == expected && skipped == 0,
        "{passed} passed, {skipped} of them skipped; {expected} are written:\n{tap}"
    );
    // The module with the tests is also the driver.
    let said = vm.shell("contract counter")?;
    ensure!(said.trim() == "read 42, mapped 42", "{said}");
    Ok(())
}
