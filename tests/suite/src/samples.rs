// SPDX-License-Identifier: MIT OR Apache-2.0

//! The programs in the README, unchanged.

use crate::{
    clones::two_cpus,
    context::{Context, await_random, wait},
    tests,
};
use anyhow::{Result, bail, ensure};
use harness::{Add, Vm};
use std::collections::BTreeSet;

tests! {
    [Tiny];
    each_clone_prints_other_numbers
    a_machine_without_a_counter_is_refused
}

const PROGRAMS: [&str; 2] = ["samples", "sample-c"];

fn boot(context: &Context, mut options: harness::Options) -> Result<Vm> {
    options.add.extend(PROGRAMS.map(|name| Add {
        host: context.program(name),
        guest: format!("/bin/{name}"),
    }));
    context.boot(options)
}

/// Waits until the program has printed so many numbers, and returns them.
fn numbers(vm: &Vm, program: &str, count: usize) -> Result<Vec<String>> {
    wait("the numbers of a sample", || {
        let said = vm.shell(&format!("cat /tmp/{program}"))?;
        // The last line may not be complete.
        let (complete, _) = said.rsplit_once('\n').unwrap_or_default();
        let lines: Vec<_> = complete.lines().map(String::from).collect();
        for line in &lines {
            let is_number = line.len() == 16 && line.bytes().all(|b| b.is_ascii_hexdigit());
            ensure!(is_number, "{program} prints {line:?}");
        }
        Ok((lines.len() >= count).then_some(lines))
    })
}

/// Expect that a program that runs while its machine is cloned prints other numbers in each clone.
fn each_clone_prints_other_numbers(context: &Context) -> Result<()> {
    let mut vm = boot(context, two_cpus())?;
    await_random(&vm)?;
    for program in PROGRAMS {
        vm.spawn([program], &format!("/tmp/{program}"))?;
    }
    let before = PROGRAMS.map(|program| numbers(&vm, program, 2));
    vm.snapshot(&"s".parse()?)?;
    let clone = |counter| vm.clone_from(&"s".parse()?, Some(counter), None);
    let clones = [clone(43)?, clone(44)?];
    for (program, before) in PROGRAMS.iter().zip(before) {
        // Between the count and the snapshot, a program may have printed one more number, and drawn
        // another one.
        let most = before?.len() + 2;
        let [one, other] = [0, 1].map(|n| numbers(&clones[n], program, most + 4));
        let (one, other) = (one?, other?);
        let same = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
        ensure!(
            same <= most,
            "{program}: {same} equal numbers, {most} may be"
        );
        let one: BTreeSet<_> = one[same..].iter().collect();
        if let Some(twice) = other[same..].iter().find(|number| one.contains(number)) {
            bail!("{program} printed {twice} in both clones");
        }
    }
    Ok(())
}

/// Expect one line on standard error, and a failure, where there is no counter.
fn a_machine_without_a_counter_is_refused(context: &Context) -> Result<()> {
    let options = harness::Options {
        no_genctr: true,
        genctr: None,
        ..two_cpus()
    };
    let vm = boot(context, options)?;
    for program in PROGRAMS {
        let output = vm.exec([program])?;
        let err = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == 1, "{program}: {}", output.status);
        ensure!(output.stdout.is_empty(), "{program} printed a number");
        ensure!(err.trim().lines().count() == 1, "{program} says {err:?}");
    }
    Ok(())
}
