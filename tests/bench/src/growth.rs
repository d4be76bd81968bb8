// SPDX-License-Identifier: MIT OR Apache-2.0

//! The cost of many: processes that map the page, waiters, clones.

use super::{Driver, counted, report::Growth, rows};
use anyhow::{Context as _, Result, ensure};
use harness::{Options, Vm};
use std::{fs, time::Instant};
use suite::{
    changes::Guest,
    context::{Context, await_random, counter, genctr},
};

pub fn measure(context: &Context) -> Result<Vec<Growth>> {
    let mut growth = Vec::from(in_a_guest(context)?);
    growth.extend(clones(context)?);
    Ok(growth)
}

/// Processes and waiters of one guest.
fn in_a_guest(context: &Context) -> Result<[Growth; 3]> {
    let mut options = counted(context, Driver::Ours, true)?;
    options.memory = Some(1024);
    let guest = Guest::new(context.boot(options)?);
    await_random(&guest.vm)?;
    guest.vm.shell(
        "mount -t debugfs debugfs /sys/kernel/debug && insmod /vmforks.ko && insmod /driver.ko",
    )?;
    let named = |what: &str, unit: &str| Growth {
        what: what.into(),
        unit: unit.into(),
        costs: Vec::new(),
    };
    let mut tables = named("processes that map the page", "bytes of page tables");
    let mut memory = named("processes that map the page", "bytes of resident memory");
    let mut wakes = named(
        "waiters in epoll",
        "instructions from the notification to the last one's wake",
    );
    for count in [1, 10, 100, 1000] {
        eprintln!("growth: {count} processes, {count} waiters");
        let count_text = count.to_string();
        let run = |what: &str| -> Result<_> {
            let mut said = String::new();
            let argv = ["contract", "cost", what, "--count", &count_text];
            let status = guest.run(&argv, |line| said += &format!("{line}\n"))?;
            ensure!(status.success(), "{argv:?}: {said}");
            rows(&said)
        };
        let mappings = run("mappings")?;
        tables.costs.push((count, mappings["page tables"]));
        memory.costs.push((count, mappings["resident"]));
        wakes.costs.push((count, run("waiters")?["woken"]));
    }
    Ok([tables, memory, wakes])
}

/// Clones of one snapshot, which run at once: what each adds to the memory that
/// the host has to give, and to the time until all have seen their counter. (As
/// observed: the host has as many CPUs as it has.)
fn clones(context: &Context) -> Result<[Growth; 2]> {
    let mut vm = context.boot(Options {
        memory: Some(128),
        ..genctr(42)
    })?;
    await_random(&vm)?;
    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;
    let named = |unit: &str| Growth {
        what: "clones of one snapshot at once".into(),
        unit: unit.into(),
        costs: Vec::new(),
    };
    let mut memory = named("MiB of the host's memory (as observed)");
    let mut time = named("ms until each has read its counter (as observed)");
    for count in [1, 2, 4, 8, 16] {
        eprintln!("growth: {count} clones");
        let start = Instant::now();
        let mut clones = Vec::new();
        for value in 43..43 + count {
            let clone = vm.clone_from(&snapshot, Some(value), None)?;
            let said = counter(&clone)?;
            ensure!(said == format!("read {value}, mapped {value}"), "{said}");
            clones.push(clone);
        }
        time.costs
            .push((count, 1e3 * start.elapsed().as_secs_f64()));
        let sizes: Result<Vec<f64>> = clones.iter().map(proportional_set_size).collect();
        memory.costs.push((count, sizes?.iter().sum()));
    }
    Ok([memory, time])
}

/// A QEMU's share of the host's memory, in MiB.
fn proportional_set_size(vm: &Vm) -> Result<f64> {
    let pid = vm.pid()?.context("QEMU has ended")?;
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib: f64 = pss
        .and_then(|pss| pss.trim().strip_suffix("kB"))
        .context("no Pss")?
        .trim()
        .parse()?;
    Ok(kib / 1024.0)
}
