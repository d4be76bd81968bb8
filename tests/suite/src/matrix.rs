// SPDX-License-Identifier: MIT OR Apache-2.0

//! Restores on each kind of machine, in each way that QEMU offers. The promises are the same for
//! all of them.

use crate::{
    On, Trial,
    context::{Context, counter, genctr, wait},
    tests,
    warm::{self, Draws, Moment, Warm},
};
use anyhow::{Context as _, Result, bail, ensure};
use harness::{
    Firmware, Machine, Options, Source, Vm,
    qapi::qmp::{self, cont, query_jobs, query_vm_generation_id, snapshot_load},
};
use rustix::process::{Pid, Signal, kill_process};
use std::{path::Path, thread, time::Instant};

tests! {
    [Tiny];
    a_killed_savevm_leaves_earlier_snapshots_whole (20 min)
}

/// The counter that the guests begin with.
const FIRST: u32 = 42;

/// Makes the kernel use another clock than the CPUs' TSC. With the TSC,
///
/// - a guest with more CPUs than a busy host has can hang while it boots: the kernel watches the
///   TSC, and CPU 0 waits for the answer of a CPU that itself waits for CPU 0, in
///   `stop_machine()` (`kernel/time/clocksource.c`);
/// - the clock jumps when a snapshot is loaded into the QEMU that runs, by the time since the
///   snapshot was taken: TCG's TSC never goes back (`cpu_ticks_prev` in `system/cpu-timers.c`).
///   A kernel that does not watch the TSC believes the jump, and RCU reports a stall.
///
/// The HPET is off, so the kernel uses ACPI's clock, which is an I/O port. While one CPU sets up
/// the PCI devices, an access of another CPU to memory-mapped registers can reach the wrong
/// device, and QEMU ends.
const CLOCK: &str = "tsc=unstable hpet=disable";

/// One test for each machine.
pub fn trials() -> Vec<Trial> {
    let machines = [Machine::Pc, Machine::Q35];
    let firmwares = [Firmware::Seabios, Firmware::Ovmf];
    let mut trials = Vec::new();
    let mut trial = |name: String, options: Options| {
        let test = move |context: &Context| restores(context, options);
        trials.push(crate::trial(&name.to_lowercase(), 20, vec![On::Tiny], test));
    };
    for smp in [1, 2, 4] {
        for machine in machines {
            for firmware in firmwares {
                // The second one has half of its RAM above 4 GiB.
                for (memory, layout) in [(128, ""), (256, "max-ram-below-4g=128M")] {
                    let mut options = Options {
                        machine,
                        firmware,
                        smp: Some(smp),
                        memory: Some(memory),
                        append: vec![CLOCK.into()],
                        ..genctr(FIRST)
                    };
                    let mut name = format!("matrix::{machine:?}_{firmware:?}_{smp}");
                    if !layout.is_empty() {
                        options.qemu_arg = vec!["-machine".into(), layout.into()];
                        name += "_above_4_gib";
                    }
                    trial(name, options);
                }
            }
        }
        // A machine like Firecracker's. It has neither the HPET nor ACPI's clock.
        for source in [Source::Ctra, Source::Vmclock] {
            let options = Options {
                machine: Machine::Microvm,
                source,
                smp: Some(smp),
                ..genctr(FIRST)
            };
            trial(format!("matrix::microvm_{source:?}_{smp}"), options);
        }
    }
    trials
}

/// Expect that the promises of a restore hold after -loadvm, after snapshot-load and after a
/// migration through a file, and that no process sees a change after a live migration.
fn restores(context: &Context, options: Options) -> Result<()> {
    let mut warm = Warm::boot(context, options)?;
    let mut draws = Draws::default();
    let moment = warm.snapshot("s")?;

    // By -loadvm.
    let clone = warm.vm.clone_from(&"s".parse()?, Some(43), None)?;
    warm::check(&clone, &moment, 43, &mut draws).context("-loadvm")?;
    drop(clone);

    // By snapshot-load, in the QEMU that runs.
    warm.vm.set_genctr(44)?;
    load_snapshot(&warm.vm, "s")?;
    warm.vm.qmp(&cont {})?;
    warm::check(&warm.vm, &moment, 44, &mut draws).context("snapshot-load")?;

    // By migration through a file.
    let folder = tempfile::tempdir_in(context.top.join("out"))?;
    let moment = warm.stop()?;
    let file = folder.path().join("stream");
    warm.vm.migrate_to_file(&file)?;
    let options = Options {
        genctr: Some(45),
        ..arriving(&warm, &format!("file:{}", file.display()))?
    };
    let clone = Vm::boot(&context.host, options)?;
    await_arrival(&clone)?;
    warm::check(&clone, &moment, 45, &mut draws).context("migration through a file")?;

    // By live migration: the machine stays the same one, so it keeps its counter and its ID.
    live_migration(context, warm.in_another(clone), folder.path()).context("live migration")
}

/// The options of a machine like this one, to which it can migrate.
fn arriving(warm: &Warm, uri: &str) -> Result<Options> {
    let mut options = warm.vm.options()?;
    options.paused = true;
    options.qemu_arg.extend(["-incoming".into(), uri.into()]);
    Ok(options)
}

/// Waits until the migration has completed, and starts the machine.
fn await_arrival(vm: &Vm) -> Result<()> {
    wait("the migration", || {
        let status = vm.qmp(&qmp::query_migrate {})?.status;
        if status == Some(qmp::MigrationStatus::failed) {
            bail!("the migration failed: {}", vm.messages());
        }
        Ok((status == Some(qmp::MigrationStatus::completed)).then_some(()))
    })?;
    vm.qmp(&cont {}).map(drop)
}

/// Loads a snapshot into the QEMU that runs.
pub fn load_snapshot(vm: &Vm, snapshot: &str) -> Result<()> {
    vm.qmp(&snapshot_load {
        job_id: "load".into(),
        tag: snapshot.into(),
        vmstate: "disk".into(),
        devices: vec!["disk".into()],
    })?;
    let error = wait("snapshot-load", || {
        let mut jobs = vm.qmp(&query_jobs {})?.into_iter();
        let done = jobs.find(|job| job.status == qmp::JobStatus::concluded);
        Ok(done.map(|job| job.error))
    })?;
    ensure!(error.is_none(), "snapshot-load: {error:?}");
    vm.qmp(&qmp::job_dismiss { id: "load".into() }).map(drop)
}

/// Migrates the machine with the same counter and the same ID, and checks that no process in the
/// guest sees a change.
fn live_migration(context: &Context, warm: Warm, folder: &Path) -> Result<()> {
    let counter = warm.vm.options()?.counter().context("no counter")?;
    let guid = warm.vm.qmp(&query_vm_generation_id {})?.guid;
    let uri = format!("unix:{}", folder.join("socket").display());
    let mut options = arriving(&warm, &uri)?;
    options.guid = Some(guid);
    // This machine's own -incoming argument is not for the machine that it migrates to.
    let old = options.qemu_arg.iter().position(|arg| arg == "-incoming");
    if let Some(old) = old {
        options.qemu_arg.drain(old..old + 2);
    }
    let clone = Vm::boot(&context.host, options)?;
    let moment: Moment = warm.moment(counter)?;
    warm.vm.migrate(&uri)?;
    await_arrival(&clone)?;
    let warm = warm.in_another(clone);
    warm::check_nothing(&warm.vm, &moment)?;
    let said = warm.vm.messages();
    ensure!(
        !said.contains("warning: vm"),
        "QEMU warns of a migration: {said}"
    );

    // The processes would have seen a change: they see the next one.
    warm.vm.qom_set_counter(counter + 1)?;
    warm::check_running(&warm.vm, &moment, counter + 1)
}

/// Expect that an earlier snapshot can still be restored, with its memory and a new counter, after
/// QEMU was killed while it saved another one.
fn a_killed_savevm_leaves_earlier_snapshots_whole(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(FIRST))?;
    vm.shell("echo before >/tmp/mark")?;
    let whole = "whole".parse()?;
    let start = Instant::now();
    vm.snapshot(&whole)?;
    let time = start.elapsed();
    vm.shell("echo after >/tmp/mark")?;

    let mut cut_short = 0;
    for n in 0..20 {
        let pid = vm
            .pid()?
            .and_then(Pid::from_raw)
            .context("QEMU has ended")?;
        // The moments are spread evenly over the time that a snapshot takes, in a mixed order.
        let moment = time.mul_f64(f64::from(n * 7 % 20) / 20.0);
        let saved = thread::scope(|scope| {
            let killer = scope.spawn(move || {
                thread::sleep(moment);
                kill_process(pid, Signal::KILL)
            });
            let saved = vm.snapshot(&format!("s{n}").parse()?);
            killer.join().expect("panicked")?;
            anyhow::Ok(saved)
        })?;
        cut_short += i32::from(saved.is_err());
        wait("QEMU's end", || Ok(vm.pid()?.is_none().then_some(())))?;
        let value = FIRST + 1 + n as u32;
        vm.restore(&whole, Some(value))
            .with_context(|| format!("killed after {moment:?} of {time:?}"))?;
        let said = [counter(&vm)?, vm.shell("cat /tmp/mark")?].join(", ");
        ensure!(
            said.trim() == format!("read {value}, mapped {value}, before"),
            "after a kill at {moment:?}: {said}"
        );
    }
    eprintln!("{cut_short} of 20 snapshots were cut short");
    ensure!(cut_short > 0, "QEMU was never killed while it saved");
    Ok(())
}
