// SPDX-License-Identifier: MIT OR Apache-2.0

//! The draws of a process that draws from the kernel again and again, from the moment at which it
//! sees the counter change.

use crate::context::wait;
use anyhow::{Context as _, Result};
use harness::Vm;
use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

const OUT: &str = "/tmp/draws";

/// Starts the process, with these further arguments. Returns its PID.
pub fn start(vm: &Vm, more: &[&str]) -> Result<u32> {
    let mut argv = vec!["contract", "draws", "--out", OUT];
    argv.extend(more);
    let pid = vm.spawn(argv, "/tmp/draws.err")?;
    wait("the process spins", || {
        let said = vm.shell("cat /tmp/draws.err")?;
        Ok(said.starts_with("spinning").then_some(pid))
    })
}

/// The draws of one clone: the time since the change was seen, and the bytes.
pub struct Draws(Vec<(Duration, String)>);

impl Draws {
    /// Waits for the draws of the process in `vm`.
    pub fn of(vm: &Vm) -> Result<Self> {
        Self::of_file(vm, OUT, "/tmp/draws.err")
    }

    /// The same, of a process that writes to these files.
    pub fn of_file(vm: &Vm, out: &str, errors: &str) -> Result<Self> {
        let said = wait("the draws", || {
            let said = vm.shell(&format!("cat {out} 2>/dev/null || cat {errors}"))?;
            Ok((!said.starts_with("spinning")).then_some(said))
        })?;
        said.parse().with_context(|| said)
    }

    /// The time and the bytes of each draw.
    pub fn all(&self) -> impl Iterator<Item = (Duration, &str)> {
        self.0.iter().map(|(time, bytes)| (*time, &**bytes))
    }
}

impl FromStr for Draws {
    type Err = anyhow::Error;

    fn from_str(said: &str) -> Result<Self> {
        let draw = |line: &str| -> Result<_> {
            let (time, bytes) = line.split_once(' ').context("not a draw")?;
            Ok((Duration::from_nanos(time.parse()?), bytes.into()))
        };
        let draws: Result<_> = said.lines().map(draw).collect();
        draws.map(Self)
    }
}

/// The share of equal draws in several clones.
pub struct Same {
    clones: usize,
    /// How many clones have a draw that another clone also has.
    with: usize,
    /// The largest number of draws of one clone that other clones also have.
    pub most: usize,
    /// The time of the last such draw.
    last: Duration,
}

/// For each clone, the time of each draw, and whether its bytes were drawn more than once.
pub fn marked(clones: &[Draws]) -> Vec<Vec<(Duration, bool)>> {
    let mut owners = BTreeMap::<&str, usize>::new();
    for (_, bytes) in clones.iter().flat_map(|Draws(draws)| draws) {
        *owners.entry(bytes).or_default() += 1;
    }
    let mark = |(time, bytes): &(Duration, String)| (*time, owners[&**bytes] > 1);
    clones
        .iter()
        .map(|Draws(draws)| draws.iter().map(mark).collect())
        .collect()
}

impl Same {
    pub fn of(clones: &[Draws]) -> Self {
        let mut same = Self {
            clones: clones.len(),
            with: 0,
            most: 0,
            last: Duration::ZERO,
        };
        for draws in marked(clones) {
            let twice = draws.into_iter().filter(|(_, twice)| *twice);
            let times: Vec<_> = twice.map(|(time, _)| time).collect();
            same.with += usize::from(!times.is_empty());
            same.most = same.most.max(times.len());
            same.last = same.last.max(times.last().copied().unwrap_or_default());
        }
        same
    }

    /// How many draws of the kernel's own 32-bit numbers have a number in common with the same draw of
    /// the other clone. (Of 128 bits each, one number can be the same.)
    pub fn words(one: &Draws, other: &Draws) -> usize {
        let words = |bytes: &str| -> Option<Vec<String>> {
            let digits = bytes.strip_suffix(" u32")?.as_bytes();
            let words = digits.chunks(8).map(String::from_utf8_lossy);
            Some(words.map(String::from).collect())
        };
        let pairs = one.all().zip(other.all());
        let alike = pairs.filter(|((_, one), (_, other))| {
            let both = words(one).zip(words(other));
            both.is_some_and(|(one, other)| one.iter().zip(other).any(|(a, b)| *a == b))
        });
        alike.count()
    }
}

impl fmt::Display for Same {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clones = self.clones;
        if self.with == 0 {
            return write!(f, "{clones} clones have no draw in common");
        }
        write!(
            f,
            "{} of {clones} clones have draws in common: up to {} times 16 bytes, for up to {:.1} ms \
             after the change was seen",
            self.with,
            self.most,
            self.last.as_secs_f64() * 1e3
        )
    }
}
