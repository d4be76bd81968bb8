// SPDX-License-Identifier: MIT OR Apache-2.0

//! The draws that clones have in common before the kernel is reseeded: by the notification alone,
//! as mainline's driver does it, and with the early look; on several machines, as observed.

use super::Driver;
use anyhow::{Context as _, Result, ensure};
use harness::{
    Add, Machine, Options, Vm,
    qapi::qmp::{cont, human_monitor_command, stop},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeSet, time::Duration};
use suite::{
    age::await_old_age,
    context::{Context, await_random, genctr, wait},
    draws::Draws,
};

/// The counter that the guests begin with.
const FIRST: u32 = 42;

/// How the kernel comes to be reseeded.
pub const BY_NOTIFICATION: &str = "C, by the notification";
pub const WITHOUT: &str = "this driver, early_look=0";
pub const WITH: &str = "this driver";
pub const DRIVERS: [&str; 3] = [BY_NOTIFICATION, WITHOUT, WITH];

/// The process that draws.
pub const SPINNER: &str = "spins on the counter, then getrandom";
pub const BLIND: &str = "getrandom all the time";
pub const AWS_LC: &str = "spins on the counter, then AWS-LC";
pub const PROCESSES: [&str; 3] = [SPINNER, BLIND, AWS_LC];

/// What one process in the clones of one guest had in common.
#[derive(Serialize, Deserialize)]
pub struct Cell {
    pub machine: String,
    pub cpus: u16,
    pub driver: String,
    pub process: String,
    /// How many draws were written down. Where both clones have all of them in common, the time is
    /// a lower bound.
    pub draws: u32,
    /// How many clones were compared with the one before.
    pub pairs: usize,
    /// For each pair with draws in common: how many, and until when, in milliseconds since the
    /// process was restored.
    pub alike: Vec<(u32, f64)>,
    /// How many times the process ended itself, as AWS-LC does if its generation changes
    /// while it is at work.
    pub aborted: u32,
}

struct Guest {
    vm: Vm,
    machine: &'static str,
    cpus: u16,
    driver: &'static str,
    counter: u32,
}

impl Guest {
    fn boot(
        context: &Context,
        machine: (Machine, &'static str),
        cpus: u16,
        driver: &'static str,
    ) -> Result<Self> {
        let (file, parameters) = match driver {
            BY_NOTIFICATION => (Driver::C, ""),
            WITHOUT => (Driver::Ours, "sysgenid=1 early_look=0"),
            _ => (Driver::Ours, "sysgenid=1"),
        };
        let options = Options {
            machine: machine.0,
            smp: Some(cpus),
            no_module: true,
            add: vec![
                Add {
                    host: file.module(context)?,
                    guest: "/driver.ko".into(),
                },
                Add {
                    host: context.program("awslc"),
                    guest: "/bin/awslc".into(),
                },
            ],
            // As in the matrix: the TSC jumps at a restore, and QEMU can end with a HPET.
            append: vec!["tsc=unstable hpet=disable".into()],
            ..genctr(FIRST)
        };
        let vm = context.boot(options)?;
        await_random(&vm)?;
        vm.shell(&format!("insmod /driver.ko {parameters}"))?;
        Ok(Self {
            vm,
            machine: machine.1,
            cpus,
            driver,
            counter: FIRST,
        })
    }

    /// Restores a snapshot in the same QEMU, as a new clone: with a new ID, a new counter, and the
    /// notification, before the first instruction.
    fn restore(&mut self, snapshot: &str) -> Result<()> {
        self.counter += 1;
        self.vm.qmp(&stop {})?;
        // QEMU keeps the values, and gives them to the machine that it loads.
        self.vm.qom_set_counter(self.counter)?;
        let said = self.vm.qmp(&human_monitor_command {
            command_line: format!("loadvm {snapshot}"),
            cpu_index: None,
        })?;
        ensure!(said.is_empty(), "loadvm: {said}");
        self.vm.qmp(&cont {}).map(drop)
    }

    /// Compares each restore with the one before it.
    fn measure(&mut self, process: &'static str, restores: u32) -> Result<Cell> {
        let (program, draws) = match process {
            SPINNER => ("contract draws --out /tmp/draws --count", 16_000),
            BLIND => ("contract draws --blind --out /tmp/draws --count", 16_000),
            _ => ("awslc --counter --out /tmp/part --draws", 1500),
        };
        // If the process has ended itself, the draws that it had written down by then are used.
        let script = format!(
            "{program} {draws} || echo aborted; test -e /tmp/draws || mv /tmp/part /tmp/draws"
        );
        self.vm.spawn(["sh", "-c", &script], "/tmp/said")?;
        let said = |vm: &Vm| vm.shell("cat /tmp/said");
        wait("the process spins", || {
            Ok(said(&self.vm)?.starts_with("spinning").then_some(()))
        })?;
        let snapshot = match process {
            SPINNER => "spinner",
            BLIND => "blind",
            _ => "awslc",
        };
        self.vm.snapshot(&snapshot.parse()?)?;

        let (mut pairs, mut alike, mut aborted) = (0, Vec::new(), 0);
        let mut last: Option<Draws> = None;
        for _ in 0..restores {
            self.restore(snapshot)?;
            let drawn = Draws::of_file(&self.vm, "/tmp/draws", "/tmp/said")?;
            aborted += u32::from(said(&self.vm)?.contains("aborted"));
            if let Some(last) = &last {
                pairs += 1;
                alike.extend(Some(in_common(last, &drawn)).filter(|&(count, _)| count > 0));
            }
            last = Some(drawn);
        }
        self.vm.shell("rm -f /tmp/draws /tmp/said")?;
        Ok(Cell {
            machine: self.machine.into(),
            cpus: self.cpus,
            driver: self.driver.into(),
            process: process.into(),
            draws,
            pairs,
            alike,
            aborted,
        })
    }
}

/// How many draws of one clone the other clone also has, and until when.
fn in_common(one: &Draws, other: &Draws) -> (u32, f64) {
    let others: BTreeSet<_> = other.all().map(|(_, bytes)| bytes).collect();
    let common = one.all().filter(|(_, bytes)| others.contains(bytes));
    common.fold((0, 0.0), |(count, _), (time, _): (Duration, _)| {
        (count + 1, time.as_secs_f64() * 1e3)
    })
}

/// Measures with this many restores of each process in each guest.
pub fn measure(context: &Context, restores: u32) -> Result<Vec<Cell>> {
    let mut guests = Vec::new();
    for machine in [(Machine::Pc, "pc"), (Machine::Q35, "q35")] {
        for cpus in [1, 2, 4] {
            for driver in DRIVERS {
                guests.push(Guest::boot(context, machine, cpus, driver)?);
            }
        }
    }
    // All of them wait: their clock is ACPI's, which wraps every five seconds, so it cannot be moved.
    eprintln!("{} guests grow old", guests.len());
    for guest in &guests {
        await_old_age(&guest.vm)?;
        guest.vm.qmp(&stop {})?;
    }
    let mut cells = Vec::new();
    for mut guest in guests {
        let Guest {
            machine,
            cpus,
            driver,
            ..
        } = guest;
        guest.vm.qmp(&cont {})?;
        for process in PROCESSES {
            // The driver in C has no /dev/sysgenid.
            if driver == BY_NOTIFICATION && process == AWS_LC {
                continue;
            }
            let cell = guest
                .measure(process, restores)
                .with_context(|| format!("{machine}, {cpus} CPUs, {driver}: {process}"))?;
            eprintln!(
                "{machine}, {cpus} CPUs, {driver}: {process}: {}",
                Sum::of([&cell])
            );
            cells.push(cell);
        }
    }
    Ok(cells)
}

/// The cells of one driver and one process, together.
pub struct Sum {
    pub pairs: usize,
    /// How many pairs have draws in common.
    pub with: usize,
    /// How many pairs have all draws in common that were written down.
    pub all: usize,
    /// Of all pairs, sorted: how many draws, and for how long.
    pub counts: Vec<f64>,
    pub times: Vec<f64>,
    pub aborted: u32,
}

impl Sum {
    pub fn of<'a>(cells: impl IntoIterator<Item = &'a Cell>) -> Self {
        let (mut counts, mut times) = (Vec::new(), Vec::new());
        let (mut all, mut aborted) = (0, 0);
        let (mut pairs, mut with) = (0, 0);
        for cell in cells {
            counts.extend(cell.alike.iter().map(|&(count, _)| f64::from(count)));
            times.extend(cell.alike.iter().map(|&(_, time)| time));
            pairs += cell.pairs;
            with += cell.alike.len();
            let to_the_end = |&&(count, _): &&(u32, f64)| count == cell.draws;
            all += cell.alike.iter().filter(to_the_end).count();
            aborted += cell.aborted;
        }
        counts.resize(pairs, 0.0);
        times.resize(pairs, 0.0);
        counts.sort_by(f64::total_cmp);
        times.sort_by(f64::total_cmp);
        Self {
            pairs,
            with,
            all,
            counts,
            times,
            aborted,
        }
    }

    pub fn mean(&self) -> f64 {
        self.times.iter().sum::<f64>() / self.pairs.max(1) as f64
    }
}

/// The median, the 99th percentile and the worst of sorted values.
pub fn spread(sorted: &[f64]) -> [f64; 3] {
    let at = |share: f64| {
        let place = (share * sorted.len() as f64).ceil() as usize;
        let place = place.clamp(1, sorted.len().max(1)) - 1;
        sorted.get(place).copied().unwrap_or_default()
    };
    [at(0.5), at(0.99), at(1.0)]
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts = spread(&self.counts);
        let times = spread(&self.times);
        write!(
            f,
            "{} of {} pairs ({} to the end), draws {counts:.0?}, ms {times:.3?}, aborted {}",
            self.with, self.pairs, self.all, self.aborted
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expect that each percentile is one of the values.
    #[test]
    fn percentiles_are_of_what_was_seen() {
        let values: Vec<_> = (1..=100).map(f64::from).collect();
        assert_eq!(spread(&values), [50.0, 99.0, 100.0]);
        assert_eq!(spread(&[7.0]), [7.0; 3]);
        assert_eq!(spread(&[]), [0.0; 3]);
    }

    /// Expect the number of draws in common, and the time of the last of them.
    #[test]
    fn what_two_have_in_common_is_counted() {
        let one: Draws = "1000000 aa\n2000000 bb\n3000000 cc".parse().unwrap();
        let other: Draws = "1 bb\n2 dd\n3 aa".parse().unwrap();
        assert_eq!(in_common(&one, &other), (2, 2.0));
        let none: Draws = "1 ee".parse().unwrap();
        assert_eq!(in_common(&one, &none), (0, 0.0));
    }
}
