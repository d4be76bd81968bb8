// SPDX-License-Identifier: MIT OR Apache-2.0

//! The table and the picture of `make pairs`: what two clones of a snapshot at a random moment draw
//! alike.

use super::{pictures, save};
use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use std::{fmt::Write, fs, path::Path, time::Instant};
use suite::{
    age::await_old_age,
    context::Context,
    pairs::{self, CONSUMERS, DRAWS, Guest, Reseeds},
};

/// What reseeds the generator, how the table calls it, and how many times fewer pairs it gets.
pub const RESEEDS: [(Reseeds, &str, u32); 3] = [
    (Reseeds::Mainline, "Linux 7.3", 20),
    (Reseeds::Module, "with this module, no read()", 20),
    (Reseeds::Series, "with patches/linux", 1),
];

const CPUS: [u16; 3] = [1, 2, 4];

/// One guest for each number of CPUs: the order of the results.
fn guests() -> impl Iterator<Item = (Reseeds, &'static str, u32, u16)> {
    let all = RESEEDS.into_iter();
    all.flat_map(|(reseeds, name, share)| CPUS.map(|cpus| (reseeds, name, share, cpus)))
}

/// The pairs of one guest.
#[derive(Default, Serialize, Deserialize)]
pub struct Cell {
    reseeds: String,
    cpus: u16,
    pub pairs: u32,
    /// For each consumer: how many draws were alike, and in how many pairs one was.
    pub draws: [u32; CONSUMERS.len()],
    pub alike: [u32; CONSUMERS.len()],
}

#[derive(Serialize, Deserialize)]
pub struct Results {
    /// The licence of the file: JSON has no comments.
    #[serde(rename = "SPDX-License-Identifier")]
    licence: String,
    cells: Vec<Cell>,
}

impl Results {
    /// The results in a folder, or of no pairs.
    fn load(folder: &Path) -> Result<Self> {
        let json = folder.join("pairs.json");
        if json.exists() {
            let results = fs::read(&json).with_context(|| format!("read {}", json.display()))?;
            let results: Self =
                serde_json::from_slice(&results).with_context(|| json.display().to_string())?;
            let cells = results.cells.iter();
            ensure!(
                guests()
                    .map(|(_, name, _, cpus)| (name, cpus))
                    .eq(cells.map(|cell| (cell.reseeds.as_str(), cell.cpus))),
                "{} has other guests: remove it, to begin anew",
                json.display()
            );
            return Ok(results);
        }
        let cells = guests().map(|(_, name, _, cpus)| Cell {
            reseeds: name.into(),
            cpus,
            ..Cell::default()
        });
        Ok(Self {
            licence: "MIT OR Apache-2.0".into(),
            cells: cells.collect(),
        })
    }

    fn write(&self, folder: &Path) -> Result<()> {
        save(&folder.join("pairs.md"), &self.table())?;
        pictures::pairs(self, folder)?;
        let json = serde_json::to_string_pretty(self)? + "\n";
        save(&folder.join("pairs.json"), &json)
    }

    /// The pairs of the guests of that name, on however many CPUs.
    pub fn sum(&self, name: &str) -> Cell {
        let mut sum = Cell::default();
        for cell in self.cells.iter().filter(|cell| cell.reseeds == name) {
            sum.pairs += cell.pairs;
            for n in 0..CONSUMERS.len() {
                sum.draws[n] += cell.draws[n];
                sum.alike[n] += cell.alike[n];
            }
        }
        sum
    }

    fn table(&self) -> String {
        let mut text = format!(
            "<!-- SPDX-License-Identifier: MIT OR Apache-2.0 -->\n\n\
             Pairs of clones in which a draw was alike, of all pairs; in brackets the draws that were \
             alike. Of each pair the first {} draws of each consumer on each CPU that began after the \
             restore are compared.\n\n| |",
            DRAWS as usize / CONSUMERS.len()
        );
        for consumer in CONSUMERS {
            let _ = write!(text, " `{consumer}` |");
        }
        text += &format!("\n| --- |{}\n", " ---: |".repeat(CONSUMERS.len()));
        for cell in &self.cells {
            let s = if cell.cpus == 1 { "" } else { "s" };
            let _ = write!(text, "| {}, {} CPU{s} |", cell.reseeds, cell.cpus);
            for (alike, draws) in cell.alike.iter().zip(cell.draws) {
                let _ = write!(text, " {alike} of {} ({draws}) |", cell.pairs);
            }
            text.push('\n');
        }
        text
    }
}

/// Takes pairs of each guest in turn, until there are `count` with patches/linux, and fewer with
/// the others. Begins with the results that are in the folder, and writes them after each round.
pub fn measure(context: &Context, count: u32, folder: &Path) -> Result<()> {
    let mut results = Results::load(folder)?;
    let mut booted = Vec::new();
    for (place, (reseeds, name, share, cpus)) in guests().enumerate() {
        let wanted = count.div_ceil(share * CPUS.len() as u32);
        if results.cells[place].pairs < wanted {
            eprintln!("{name}: a guest with {cpus} CPUs boots");
            booted.push((pairs::boot(context, reseeds, cpus, &[])?, place, wanted));
        }
    }
    // They have grown old meanwhile: a young kernel reseeds every few seconds.
    let mut guests = Vec::new();
    for (vm, place, wanted) in booted {
        await_old_age(&vm)?;
        guests.push((Guest::start(context, vm)?, place, wanted));
    }
    results.write(folder)?;
    loop {
        guests.retain(|&(_, place, wanted)| results.cells[place].pairs < wanted);
        if guests.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        for (guest, place, _) in &mut guests {
            let cell = &mut results.cells[*place];
            let pair = guest.pair();
            let pair = pair.with_context(|| format!("{}, {} CPUs", cell.reseeds, cell.cpus))?;
            cell.pairs += 1;
            for (n, draws) in pair.alike.into_iter().enumerate() {
                cell.draws[n] += draws;
                cell.alike[n] += u32::from(draws > 0);
            }
        }
        results.write(folder)?;
        let pairs: u32 = results.cells.iter().map(|cell| cell.pairs).sum();
        eprintln!(
            "{pairs} pairs, {:.1} s for {}",
            start.elapsed().as_secs_f64(),
            guests.len()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expect a row for each guest, and that the picture has the sum over the numbers of CPUs.
    #[test]
    fn each_guest_has_a_row() {
        let mut results = Results::load(Path::new("/nonexistent")).unwrap();
        for cell in &mut results.cells {
            (cell.pairs, cell.alike, cell.draws) = (9, [3; CONSUMERS.len()], [7; CONSUMERS.len()]);
        }
        let table = results.table();
        let row = "| with this module, no read(), 2 CPUs | 3 of 9 (7) | 3 of 9 (7) |";
        assert!(table.lines().any(|line| line.starts_with(row)), "{table}");
        assert_eq!(table.matches("3 of 9").count(), 45);
        assert_eq!(results.sum(RESEEDS[2].1).draws, [21; CONSUMERS.len()]);
    }
}
