// SPDX-License-Identifier: MIT OR Apache-2.0

//! The results, and the files that show them.

use super::{early, pictures, rows, save};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt::Write, fs, path::Path};
use suite::draws;

/// The column of the kernel's own calls, with any driver.
const KERNEL: &str = "the kernel";

/// The column of this driver's limits.
const LIMIT: &str = "limit";

const COLUMNS: [&str; 6] = [
    "this driver",
    LIMIT,
    "C, no barrier",
    "mainline's",
    "vmclock",
    KERNEL,
];

/// The rows, in the order of the table.
const ROWS: [&str; 25] = [
    CHECK,
    "check of a local variable",
    READ,
    "read of /dev/null",
    "poll",
    OPEN,
    "getrandom of 16 bytes, system call",
    "getrandom of 16 bytes, vDSO",
    CRATE,
    CRATE_AND_FORKS,
    BARE[0],
    GUARDED[0],
    BARE[1],
    GUARDED[1],
    "probe",
    HANDLED,
    "notification to the vmfork notifiers",
    "read of a new counter",
    "reseeds in that read",
    "that read, in forced reseeds",
    FORCED,
    "module code, bytes",
    TEXT,
    "module data, bytes",
    "module memory, bytes",
];

const CHECK: &str = "check of the mapped counter";
const CRATE: &str = "the crate's check of the counter";
const CRATE_AND_FORKS: &str = "the crate's check of the counter and of forks";
const BARE: [&str; 2] = ["ChaCha20, 16 bytes", "ChaCha20, 1024 bytes"];
const GUARDED: [&str; 2] = [
    "ChaCha20, 16 bytes, guarded",
    "ChaCha20, 1024 bytes, guarded",
];
const READ: &str = "read of the counter";
const OPEN: &str = "open, mmap, touch, munmap, close";
const HANDLED: &str = "notification until it is handled";
const FORCED: &str = "forced reseed (RNDRESEEDCRNG)";
const TEXT: &str = "module text, bytes";

/// The rows of vmclock, each with the row of this driver in which it is shown.
const LIKE: [(&str, &str); 3] = [
    ("check of the mapped vmclock", CHECK),
    ("pread of the vmclock, 112 bytes", READ),
    ("open, mmap, touch, munmap, close of the vmclock", OPEN),
];

type Figures = BTreeMap<String, BTreeMap<String, f64>>;

#[derive(Default, Serialize, Deserialize)]
pub struct Report {
    /// The licence of the file: JSON has no comments.
    #[serde(rename = "SPDX-License-Identifier")]
    licence: String,
    /// Guest instructions, unless the row says bytes: row, column, figure.
    pub figures: Figures,
    pub timelines: Vec<Timeline>,
    pub growth: Vec<Growth>,
    /// As observed, in this run: not for comparison.
    pub draws: Vec<Draws>,
    #[serde(default)]
    pub early: Vec<early::Cell>,
    /// With which driver each part was measured.
    #[serde(default)]
    drivers: BTreeMap<String, String>,
}

/// The parts that are measured one by one.
pub const CALLS: &str = "The first table, calls.svg";
pub const OBSERVED: &str = "A restore, what many cost, restore.svg, draws.svg";
pub const EARLY: &str = "What two clones draw alike, early.svg";

/// What happened when after a restore, in microseconds, as observed.
#[derive(Serialize, Deserialize)]
pub struct Timeline {
    pub barrier: bool,
    pub events: BTreeMap<String, f64>,
}

/// What a thing costs when there are many.
#[derive(Serialize, Deserialize)]
pub struct Growth {
    pub what: String,
    pub unit: String,
    /// The number of them, and their cost together.
    pub costs: Vec<(u32, f64)>,
}

/// What clones drew from the kernel, from the moment on that they saw the counter
/// change.
#[derive(Serialize, Deserialize)]
pub struct Draws {
    pub barrier: bool,
    pub clones: usize,
    /// For each bin of a quarter of a millisecond that has draws, the share of them that another
    /// clone also had.
    pub same: Vec<Option<f64>>,
}

/// The width of a bin, in milliseconds.
pub const BIN: f64 = 0.25;

impl Draws {
    pub fn new(barrier: bool, clones: &[draws::Draws]) -> Self {
        let mut bins = vec![(0u32, 0u32); 400];
        for (time, twice) in draws::marked(clones).into_iter().flatten() {
            let bin = (time.as_secs_f64() * 1e3 / BIN) as usize;
            if let Some((all, same)) = bins.get_mut(bin) {
                *all += 1;
                *same += u32::from(twice);
            }
        }
        let share = |(all, same)| (all > 0).then(|| f64::from(same) / f64::from(all));
        Self {
            barrier,
            clones: clones.len(),
            same: bins.into_iter().map(share).collect(),
        }
    }
}

impl Report {
    pub fn add(&mut self, row: &str, column: &str, value: f64) {
        let like = LIKE.iter().find(|(name, _)| *name == row);
        let row = like.map_or(row, |(_, row)| row);
        let own = row.starts_with("getrandom")
            || row.contains("/dev/null")
            || row.contains("local")
            || row == FORCED;
        let column = if own { KERNEL } else { column };
        let columns = self.figures.entry(row.into()).or_default();
        columns.entry(column.into()).or_insert(value);
    }

    /// Records with which driver a part was measured.
    pub fn measured(&mut self, part: &str, driver: &str) {
        self.drivers.insert(part.into(), driver.into());
    }

    /// Adds the rows that a guest's program prints.
    pub fn add_all(&mut self, column: &str, said: &str) -> Result<()> {
        for (row, value) in rows(said)? {
            self.add(&row, column, value);
        }
        Ok(())
    }

    pub fn get(&self, row: &str, column: &str) -> Option<f64> {
        self.figures.get(row)?.get(column).copied()
    }

    /// What this driver must not exceed.
    fn add_limits(&mut self) {
        let ratio = |row: &str, column: &str| Some(1.05 * self.get(row, column)?);
        let guarded = |row: &str| Some(6.0 + self.get(row, COLUMNS[0])?);
        let limits = [
            (CHECK, Some(3.0)),
            (CRATE, Some(6.0)),
            (CRATE_AND_FORKS, Some(6.0)),
            (GUARDED[0], guarded(BARE[0])),
            (GUARDED[1], guarded(BARE[1])),
            (READ, Some(345.0)),
            (OPEN, ratio(OPEN, "C, no barrier")),
            (HANDLED, ratio(HANDLED, "mainline's")),
            (TEXT, Some(6144.0)),
        ];
        for (row, limit) in limits {
            if let Some(limit) = limit {
                self.add(row, LIMIT, limit);
            }
        }
    }

    /// Loads the results that were written to a folder.
    pub fn load(folder: &Path) -> Result<Self> {
        let json = folder.join("results.json");
        let results = fs::read(&json).with_context(|| format!("read {}", json.display()))?;
        serde_json::from_slice(&results).with_context(|| json.display().to_string())
    }

    /// Writes all files, and says what has changed since they were last written.
    pub fn write(mut self, folder: &Path) -> Result<()> {
        self.add_limits();
        self.licence = "MIT OR Apache-2.0".into();
        let missing: Vec<_> = ROWS
            .into_iter()
            .filter(|row| !self.figures.contains_key(*row))
            .collect();
        ensure!(missing.is_empty(), "not measured: {}", missing.join("; "));
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        match Self::load(folder) {
            Ok(before) => eprintln!("{}", self.compared_with(&before)),
            Err(err) => eprintln!("there is nothing to compare it with: {err:#}"),
        }
        let table = self.table();
        print!("{table}");
        save(&folder.join("results.md"), &table)?;
        pictures::draw(&self, folder)?;
        let json = folder.join("results.json");
        save(&json, &(serde_json::to_string_pretty(&self)? + "\n"))
    }

    /// One line about the figure that differs most.
    fn compared_with(&self, before: &Self) -> String {
        let mut most = (0.0, String::from("nothing"));
        for (row, columns) in &self.figures {
            for (column, value) in columns {
                if let Some(was) = before.get(row, column) {
                    let change = (value - was).abs() / was.abs().max(1.0);
                    if change > most.0 {
                        most = (change, format!("{row}, {column}: {value} was {was}"));
                    }
                }
            }
        }
        format!(
            "compared with the results before, at most {:.2} % differ: {}",
            100.0 * most.0,
            most.1
        )
    }

    /// Everything, in Markdown.
    fn table(&self) -> String {
        let mut text = String::from("<!-- SPDX-License-Identifier: MIT OR Apache-2.0 -->\n\n");
        let line = |text: &mut String, cells: Vec<String>| {
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        };
        let header = |text: &mut String, cells: Vec<String>| {
            let rule = vec![String::from("---:"); cells.len() - 1];
            line(text, cells);
            line(text, [vec!["---".into()], rule].concat());
        };
        text += "Each part is of the driver as it was last changed by this commit:\n\n";
        for part in [CALLS, OBSERVED, EARLY] {
            let driver = self.drivers.get(part);
            let driver = driver.map_or("an earlier one", String::as_str);
            let _ = writeln!(text, "- {part}: {driver}.");
        }
        text.push('\n');
        header(
            &mut text,
            ["guest instructions"]
                .iter()
                .chain(&COLUMNS)
                .map(|name| name.to_string())
                .collect(),
        );
        for row in ROWS {
            let mut cells = vec![row.to_string()];
            for column in COLUMNS {
                cells.push(self.get(row, column).map_or(String::new(), number));
            }
            line(&mut text, cells);
        }
        text += "\nAfter a restore, in microseconds since the guest's clock runs again (two CPUs, as observed; medians):\n\n";
        let mut events: Vec<&String> = self
            .timelines
            .iter()
            .flat_map(|t| t.events.keys())
            .collect();
        events.sort();
        events.dedup();
        header(
            &mut text,
            vec![
                "".into(),
                "without the barrier".into(),
                "with the barrier".into(),
            ],
        );
        for event in events {
            let mut cells = vec![event.clone()];
            for timeline in &self.timelines {
                cells.push(
                    timeline
                        .events
                        .get(event)
                        .copied()
                        .map_or(String::new(), number),
                );
            }
            line(&mut text, cells);
        }
        text += "\nWhat many cost:\n\n";
        for growth in &self.growth {
            let counts = growth.costs.iter().map(|(count, _)| count.to_string());
            let name = format!("{}, {}", growth.what, growth.unit);
            header(&mut text, [name].into_iter().chain(counts).collect());
            let costs = growth.costs.iter().map(|&(_, cost)| number(cost));
            line(
                &mut text,
                ["for all".into()].into_iter().chain(costs).collect(),
            );
            let each = growth
                .costs
                .iter()
                .map(|&(count, cost)| number(cost / f64::from(count)));
            line(
                &mut text,
                ["for each".into()].into_iter().chain(each).collect(),
            );
            text.push('\n');
        }
        self.early_table(&mut text);
        text
    }

    /// How much clones have in common, for each driver, process and machine.
    fn early_table(&self, text: &mut String) {
        *text += "What two clones of a machine draw alike after a restore, and until when, in \
            milliseconds since the process continues (as observed, TCG): median, 99th percentile, \
            worst. \"To the end\": pairs that drew all alike as long as they were looked at, \
            so that the time is the least that it was.";
        // Each was compared with the one before it.
        let restores = self.early.iter().map(|cell| cell.pairs + 1).max();
        let _ = writeln!(
            text,
            " Each process was restored {} times in each machine.\n",
            restores.unwrap_or_default()
        );
        let _ = writeln!(
            text,
            "| process | driver | machine, CPUs | pairs with any | to the end | draws alike | until, ms | ended itself |\n\
             | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
        );
        for process in early::PROCESSES {
            for driver in early::DRIVERS {
                let cells = self.early.iter();
                let cells: Vec<_> = cells
                    .filter(|cell| cell.process == process && cell.driver == driver)
                    .collect();
                let mut row = |machine: String, sum: early::Sum| {
                    let counts = early::spread(&sum.counts).map(number);
                    let times = early::spread(&sum.times).map(|time| format!("{time:.3}"));
                    let _ = writeln!(
                        text,
                        "| {process} | {driver} | {machine} | {} of {} | {} | {} | {} | {} |",
                        sum.with,
                        sum.pairs,
                        sum.all,
                        counts.join(", "),
                        times.join(", "),
                        sum.aborted
                    );
                };
                if !cells.is_empty() {
                    row("all".into(), early::Sum::of(cells.iter().copied()));
                }
                for cell in cells {
                    row(
                        format!("{}, {}", cell.machine, cell.cpus),
                        early::Sum::of([cell]),
                    );
                }
            }
        }
        text.push('\n');
        let mean = |driver| {
            let cells = self.early.iter();
            let blind = cells.filter(|cell| cell.process == early::BLIND && cell.driver == driver);
            early::Sum::of(blind).mean()
        };
        let (with, by_notification) = (mean(early::WITH), mean(early::BY_NOTIFICATION));
        let ratio = match with > 0.0 {
            true => format!("1/{:.0} of it", by_notification / with),
            false => "nothing of it".into(),
        };
        let _ = writeln!(
            text,
            "{}, on average: {by_notification:.3} ms by the notification, {with:.3} ms with the \
             early look: {ratio}.",
            early::BLIND,
        );
    }
}

/// A number as people read it.
pub fn number(value: f64) -> String {
    if value.abs() < 1000.0 && value.fract() != 0.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expect that numbers have commas, and a decimal where they are small and not whole.
    #[test]
    fn numbers_have_commas() {
        assert_eq!(number(3.04), "3.0");
        assert_eq!(number(345.0), "345");
        assert_eq!(number(1000.6), "1,001");
        assert_eq!(number(1234567.0), "1,234,567");
        assert_eq!(number(-12.5), "-12.5");
    }

    /// Expect that a row of the kernel's own keeps its first value, and that a row of vmclock is
    /// shown in the row of this driver.
    #[test]
    fn what_is_the_kernels_own_is_there_once() {
        let mut report = Report::default();
        report
            .add_all(
                "this driver",
                "read of /dev/null: 266.1\nread of the counter: 344.1\n",
            )
            .unwrap();
        report
            .add_all(
                "vmclock",
                "read of /dev/null: 270\npread of the vmclock, 112 bytes: 385.3\n",
            )
            .unwrap();
        assert_eq!(report.get("read of /dev/null", KERNEL), Some(266.1));
        assert_eq!(report.get(READ, "vmclock"), Some(385.3));
        assert_eq!(report.get(READ, "this driver"), Some(344.1));
        assert!(rows("nonsense").is_err());
    }
}
