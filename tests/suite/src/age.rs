// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guests that have been up for so long that their kernel no longer reseeds every other second.

use crate::{
    clones::two_cpus,
    context::{
        Context, await_random, counter, expect_reseeds, genctr, generation, no_splat,
        settled_reseeds, wait,
    },
    tests,
};
use anyhow::{Context as _, Result, ensure};
use harness::{Machine, Options, Vm, kernel};
use std::{collections::BTreeSet, time::Duration};

tests! {
    a_clock_that_wraps_cannot_be_moved
    every_machine_grows_old
    a_guest_whose_clock_was_moved_is_as_one_that_waited [Soak]
}

/// The age of such a guest, in seconds: a little more than twice CRNG_RESEED_INTERVAL in
/// drivers/char/random.c.
const OLD: u64 = 130;

/// Moves the guest's clock, and waits until the kernel has made the reseed that was due. The next
/// one comes after CRNG_RESEED_INTERVAL.
///
/// A process that spins or draws should be started after this.
pub fn grow_old(vm: &mut Vm) -> Result<()> {
    // Debian's soft lockup detector reports CPUs when the clock is moved, so this guest waits
    // instead.
    if kernel::default() == kernel::DEBIAN {
        return await_old_age(vm);
    }
    let young = generation(vm)?;
    // An RCU grace period that spans the move of the clock is no stall.
    let stalls = |suppress: u32| {
        format!("echo {suppress} >/sys/module/rcupdate/parameters/rcu_cpu_stall_suppress")
    };
    vm.shell(&stalls(1))?;
    vm.age(Duration::from_secs(OLD))?;
    let mut last = None;
    wait("the reseed that was due meanwhile", || {
        let before = last.replace(generation(vm)?);
        vm.shell("sleep 0.5")?;
        Ok((last == before && last > Some(young)).then_some(()))
    })?;
    vm.shell(&stalls(0))?;
    await_old_age(vm)
}

/// Waits until a guest is old.
pub fn await_old_age(vm: &Vm) -> Result<()> {
    let rdrand = vm.shell("grep -cw rdrand /proc/cpuinfo || true")?;
    ensure!(rdrand.trim() == "0", "the guest has RDRAND");
    vm.shell(&format!(
        "while [ $(cut -d. -f1 /proc/uptime) -lt {OLD} ]; do sleep 1; done"
    ))
    .map(drop)
}

/// What the kernel's generator does without a restore.
#[derive(Debug)]
struct Course {
    /// Whether the kernel reseeds within some twenty seconds after a reseed.
    reseeds: bool,
    /// How many of 100 draws after that are the same in two clones.
    common: usize,
}

impl Course {
    fn of(vm: &mut Vm) -> Result<Self> {
        vm.shell("before=$(contract reseeds); while [ $(contract reseeds) = $before ]; do sleep 0.1; done")?;
        let before = generation(vm)?;
        vm.snapshot(&"s".parse()?)?;
        let (mut reseeds, mut drawn) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            let clone = vm.clone_unchecked(&"s".parse()?, vm.options()?, None)?;
            clone.shell("sleep 20")?;
            let draws = clone.shell(
                "exec taskset 1 sh -c 'for n in $(seq 100); do \
                 head -c 16 /dev/urandom | od -An -tx1; done'",
            )?;
            let draws: BTreeSet<_> = draws.lines().map(String::from).collect();
            ensure!(draws.len() == 100, "{} draws", draws.len());
            drawn.push(draws);
            reseeds.push(generation(&clone)? > before);
            no_splat(&clone)?;
        }
        let course = Self {
            reseeds: reseeds[0],
            common: drawn[0].intersection(&drawn[1]).count(),
        };
        ensure!(
            reseeds[0] == reseeds[1],
            "the clones differ: {reseeds:?}, {course:?}"
        );
        Ok(course)
    }
}

/// Expect that the clock of each machine can be moved, with one CPU and with two, and that the
/// kernel reports nothing, keeps its counter, and logs no reseed because of an ID.
fn every_machine_grows_old(context: &Context) -> Result<()> {
    for machine in [Machine::Pc, Machine::Q35] {
        for cpus in [1, 2] {
            let options = Options {
                machine,
                smp: Some(cpus),
                ..genctr(42)
            };
            let mut vm = context.boot(options)?;
            await_random(&vm)?;
            let before = settled_reseeds(&vm)?;
            let grown = grow_old(&mut vm).and_then(|()| no_splat(&vm));
            grown.with_context(|| format!("{machine:?}, {cpus} CPUs"))?;
            let counter = counter(&vm)?;
            ensure!(counter == "read 42, mapped 42", "afterwards: {counter}");
            expect_reseeds(&vm, before)?;
        }
    }
    Ok(())
}

/// Expect an error for a guest that counts by ACPI's clock, which wraps every five seconds.
fn a_clock_that_wraps_cannot_be_moved(context: &Context) -> Result<()> {
    let mut vm = context.boot(Options {
        append: vec!["tsc=unstable hpet=disable".into()],
        ..genctr(42)
    })?;
    let moved = vm.age(Duration::from_secs(OLD));
    let said = moved.map_or_else(|err| format!("{err:#}"), |()| "nothing".into());
    ensure!(said.contains("the guest's is: acpi_pm"), "it says: {said}");
    Ok(())
}

/// Expect that a guest whose clock was moved reseeds as seldom as one that has waited, and that
/// without a device the clones of both have draws in common. A young guest reseeds, and its clones
/// have none.
fn a_guest_whose_clock_was_moved_is_as_one_that_waited(context: &Context) -> Result<()> {
    let boot = || -> Result<Vm> {
        let vm = context.boot(Options {
            no_device: true,
            no_module: true,
            genctr: None,
            ..two_cpus()
        })?;
        await_random(&vm)?;
        Ok(vm)
    };
    // The young guest comes first: it becomes old.
    let mut young = boot()?;
    let course = Course::of(&mut young)?;
    eprintln!("young: {course:?}");
    ensure!(course.reseeds && course.common == 0, "young: {course:?}");
    drop(young);

    let mut waited = boot()?;
    let mut moved = boot()?;
    grow_old(&mut moved)?;
    let course = Course::of(&mut moved)?;
    eprintln!("its clock was moved: {course:?}");
    ensure!(!course.reseeds && course.common > 0, "moved: {course:?}");
    drop(moved);

    await_old_age(&waited)?;
    let course = Course::of(&mut waited)?;
    eprintln!("it has waited: {course:?}");
    ensure!(!course.reseeds && course.common > 0, "waited: {course:?}");
    Ok(())
}
