// SPDX-License-Identifier: MIT OR Apache-2.0

//! The benchmark: what this driver costs, beside its peers, in one run.
//!
//! Figures are guest instructions, counted by QEMU (`-icount shift=0,sleep=off`:
//! a nanosecond of the guest is an instruction, on one CPU), so they are the
//! same on every host. What several CPUs do at once cannot be counted so: what
//! clones draw without and with the barrier is shown as it was observed.

mod early;
mod growth;
mod pairs;
mod pictures;
mod report;
mod sizes;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use harness::{Add, Machine, Options, Vm};
use report::{Report, Timeline};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
};
use suite::{
    age::grow_old,
    changes::Guest,
    clones,
    context::{Context, await_random, genctr, machine, wait},
    draws::Same,
    vmforks,
};

/// Measures this driver beside its peers
#[derive(Parser)]
struct Cli {
    /// The folder for the results
    #[arg(long)]
    out: PathBuf,
    /// Which driver that is, for the results
    #[arg(long, required_unless_present = "pairs")]
    driver: Option<String>,
    /// Measure nothing, but make the table and the pictures of the results in there
    #[arg(long, group = "parts")]
    again: bool,
    /// Measure only guest instructions and sizes: the first table
    #[arg(long, group = "parts")]
    only_calls: bool,
    /// Measure only how early the reseed comes, which takes most of the time
    #[arg(long, group = "parts")]
    only_early: bool,
    /// Do not measure how early the reseed comes
    #[arg(long, group = "parts")]
    keep_early: bool,
    /// Print the guest instructions of the calls, of this driver and of its peer in C, and write
    /// nothing; the kernel is that of VMGENID_KERNEL
    #[arg(long, group = "parts")]
    print_calls: bool,
    /// Take pairs of clones until there are N with patches/linux, for pairs.md, and nothing else
    #[arg(long, value_name = "N", group = "parts")]
    pairs: Option<u32>,
    /// How many restores of each process in each guest show how early the reseed comes
    #[arg(long, value_name = "N", default_value_t = 101, value_parser = clap::value_parser!(u32).range(2..))]
    restores: u32,
}

/// How many clones a timeline is the median of.
const CLONES: u32 = 9;

/// The drivers that are compared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Driver {
    /// This one.
    Ours,
    /// The same node in C, where read() is no barrier.
    C,
    /// Linux's own.
    Mainline,
}

impl Driver {
    const ALL: [Self; 3] = [Self::Ours, Self::C, Self::Mainline];

    /// The name of its column.
    fn title(self) -> &'static str {
        match self {
            Self::Ours => "this driver",
            Self::C => "C, no barrier",
            Self::Mainline => "mainline's",
        }
    }

    /// Its name in the guest's kernel.
    fn name(self) -> &'static str {
        match self {
            Self::C => "vmgenid_c",
            _ => "vmgenid",
        }
    }

    /// Where it is on the host.
    fn module(self, context: &Context) -> Result<PathBuf> {
        Ok(match self {
            Self::Ours => context.module("vmgenid.ko"),
            Self::C => context.module("vmgenid_c.ko"),
            Self::Mainline => context.module_in_tree("virt/vmgenid.ko"),
        })
    }
}

/// Measures, prints and writes the results.
fn main() -> ExitCode {
    let cli = Cli::parse();
    let run = || -> Result<()> {
        if cli.print_calls {
            return print_calls(&Context::new()?);
        }
        if let Some(count) = cli.pairs {
            harness::interrupt::catch()?;
            let context = Context::new()?;
            pairs::measure(&context, count, &cli.out)?;
            return context.reports.judge(Ok(()));
        }
        let driver = cli.driver.context("--driver is missing")?;
        let keeps = cli.again || cli.only_calls || cli.only_early || cli.keep_early;
        let mut report = match keeps {
            true => Report::load(&cli.out)?,
            false => Report::default(),
        };
        if cli.again {
            return report.write(&cli.out);
        }
        harness::interrupt::catch()?;
        let context = Context::new()?;
        if !cli.only_early {
            calls(&context, &mut report)?;
            report.measured(report::CALLS, &driver);
        }
        if !cli.only_early && !cli.only_calls {
            observe(&context, &mut report)?;
            report.measured(report::OBSERVED, &driver);
        }
        if !cli.keep_early && !cli.only_calls {
            eprintln!("the reseed, by how early it comes");
            report.early = early::measure(&context, cli.restores)?;
            report.measured(report::EARLY, &driver);
        }
        context.reports.judge(Ok(()))?;
        report.write(&cli.out)
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("bench: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_calls(context: &Context) -> Result<()> {
    for driver in [Driver::Ours, Driver::C] {
        let vm = context.boot(counted(context, driver, false)?)?;
        await_random(&vm)?;
        vm.shell("insmod /driver.ko")?;
        println!("{}:\n{}", driver.title(), vm.shell("contract cost")?);
    }
    context.reports.judge(Ok(()))
}

/// Measurements that are the same on every host.
fn calls(context: &Context, report: &mut Report) -> Result<()> {
    report.figures.clear();
    for driver in Driver::ALL {
        eprintln!("measuring: {}", driver.title());
        let title = driver.title();
        for (what, value) in sizes::of(&driver.module(context)?)? {
            report.add(what, title, value as f64);
        }
        let vm = boot(context, driver, false)?;
        report.add("module memory, bytes", title, memory(&vm, driver)?);
        report.add_all(title, &vm.shell(&probe(driver))?)?;
        if driver != Driver::Mainline {
            report.add_all(title, &vm.shell("contract cost && getrandom")?)?;
        }
        report.add_all(title, &notification(context, driver)?)?;
    }
    eprintln!("measuring: vmclock");
    report.add_all("vmclock", &vmclock(context)?)
}

/// Measurements that depend on the host, and the cost of many processes and clones.
fn observe(context: &Context, report: &mut Report) -> Result<()> {
    report.timelines.clear();
    report.draws.clear();
    for barrier in [false, true] {
        eprintln!("a restore, {} the barrier", with_or_without(barrier));
        report.timelines.push(timeline(context, barrier)?);
    }
    report.growth = growth::measure(context)?;

    eprintln!("what clones draw");
    let mut vm = context.boot(without_early_look())?;
    await_random(&vm)?;
    grow_old(&mut vm)?;
    for barrier in [false, true] {
        let how: &[&str] = if barrier { &["--barrier"] } else { &[] };
        let draws = clones::drawn(&mut vm, how)?;
        eprintln!(
            "{} the barrier: {}",
            with_or_without(barrier),
            Same::of(&draws)
        );
        report.draws.push(report::Draws::new(barrier, &draws));
    }
    Ok(())
}

/// Without the early look, the effect of the barrier is better visible.
fn without_early_look() -> Options {
    Options {
        parameter: vec!["early_look=0".into()],
        ..clones::two_cpus()
    }
}

fn with_or_without(barrier: bool) -> &'static str {
    if barrier { "with" } else { "without" }
}

/// A guest whose instructions are counted, with this driver's module in it, not
/// yet loaded.
fn counted(context: &Context, driver: Driver, vmforks: bool) -> Result<Options> {
    let file = |host: PathBuf, guest: &str| Add {
        host,
        guest: guest.into(),
    };
    let mut add = vec![file(driver.module(context)?, "/driver.ko")];
    if machine() != Machine::Virt {
        // The one program that is linked dynamically, and its libraries.
        let libraries = context.host.link("buildroot/root/usr/lib/x86_64-linux-gnu");
        add.extend([
            file(context.program("getrandom"), "/bin/getrandom"),
            file(libraries.join("libc.so.6"), "/usr/lib/libc.so.6"),
            file(
                libraries.join("ld-linux-x86-64.so.2"),
                "/lib64/ld-linux-x86-64.so.2",
            ),
        ]);
    }
    if vmforks {
        add.push(file(context.module("vmforks.ko"), "/vmforks.ko"));
    }
    Ok(Options {
        icount: true,
        smp: Some(1),
        no_module: true,
        add,
        // Output on the serial line costs more than the measured calls. The layout of memory is the
        // same in each run.
        append: vec!["quiet norandmaps".into()],
        ..genctr(42)
    })
}

/// Loads the driver and does not bind it, so that its first probe is yet to come.
fn boot(context: &Context, driver: Driver, vmforks: bool) -> Result<Vm> {
    let vm = context.boot(counted(context, driver, vmforks)?)?;
    await_random(&vm)?;
    vm.shell("echo 0 >/sys/bus/platform/drivers_autoprobe && insmod /driver.ko")?;
    Ok(vm)
}

fn probe(driver: Driver) -> String {
    format!("contract cost probe {}", driver.name())
}

fn memory(vm: &Vm, driver: Driver) -> Result<f64> {
    let size = vm.shell(&format!("cat /sys/module/{}/coresize", driver.name()))?;
    Ok(size.trim().parse()?)
}

/// From the notification to its end; for this driver, also the barrier.
fn notification(context: &Context, driver: Driver) -> Result<String> {
    let guest = Guest::new(context.boot(counted(context, driver, true)?)?);
    await_random(&guest.vm)?;
    guest.vm.shell(
        "mount -t debugfs debugfs /sys/kernel/debug && insmod /vmforks.ko && insmod /driver.ko",
    )?;
    let mut said = String::new();
    // Only this driver's read is a barrier.
    let whats: &[&str] = match driver {
        Driver::Ours => &["notification", "barrier"],
        _ => &["notification"],
    };
    for what in whats {
        let status = guest.run(&["contract", "cost", what], |line| {
            said += &format!("{line}\n");
        })?;
        ensure!(status.success(), "{}: {said}", driver.title());
    }
    Ok(said)
}

/// QEMU's vmclock, and Linux's driver of it.
fn vmclock(context: &Context) -> Result<String> {
    let mut options = counted(context, Driver::Mainline, false)?;
    let load = context.add_ptp_vmclock(&mut options);
    options.qemu_arg = ["-device", "vmclock"].map(String::from).into();
    let vm = context.boot(options)?;
    await_random(&vm)?;
    vm.shell(&load)?;
    let said = vm.shell("contract cost")?;
    ensure!(said.contains("vmclock"), "there is no vmclock: {said}");
    Ok(said)
}

/// What happens when after a restore, to a process that spins on a CPU of its own
/// and one that waits: the medians of several clones, in microseconds, as observed.
/// (On the one CPU of a guest whose instructions are counted, the kernel goes first,
/// and there is nothing to see.)
fn timeline(context: &Context, barrier: bool) -> Result<Timeline> {
    let mut vm = vmforks::boot(context, without_early_look())?;
    let mut argv = vec!["contract", "cost", "timeline", "--out", "/tmp/timeline"];
    argv.extend(barrier.then_some("--barrier"));
    vm.spawn(argv, "/tmp/timeline.err")?;
    let said = |vm: &Vm, path: &str| vm.shell(&format!("cat {path} 2>/dev/null || true"));
    wait("the process spins", || {
        Ok(said(&vm, "/tmp/timeline.err")?
            .starts_with("spinning")
            .then_some(()))
    })?;
    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;
    let mut times = BTreeMap::<String, Vec<f64>>::new();
    for value in 43..43 + CLONES {
        let clone = vm.clone_from(&snapshot, Some(value), None)?;
        let said = wait("the restore", || {
            let said = said(&clone, "/tmp/timeline")?;
            Ok((!said.is_empty()).then_some(said))
        })?;
        for (what, time) in rows(&said)? {
            times.entry(what).or_default().push(time / 1e3);
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let events = times.into_iter().map(|(what, times)| (what, median(times)));
    Ok(Timeline {
        barrier,
        events: events.collect(),
    })
}

/// "WHAT: NUMBER", line by line.
fn rows(said: &str) -> Result<BTreeMap<String, f64>> {
    let row = |line: &str| -> Result<_> {
        let Some((what, value)) = line.rsplit_once(": ") else {
            bail!("the guest says: {line}");
        };
        Ok((
            what.into(),
            value.parse().with_context(|| line.to_string())?,
        ))
    };
    said.lines().map(row).collect()
}

/// A file of the results.
fn save(path: &Path, text: &str) -> Result<()> {
    // The file is replaced in one step.
    let new = path.with_extension("new");
    std::fs::write(&new, text)
        .and_then(|()| std::fs::rename(&new, path))
        .with_context(|| format!("write {}", path.display()))
}
