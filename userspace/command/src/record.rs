// SPDX-License-Identifier: MIT OR Apache-2.0

//! The state file: in which generation the machine was renewed.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, Permissions},
    io::{ErrorKind, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;
use vmgenid::{Generation, Source};

/// How each state file begins: a file that begins otherwise is not overwritten.
const BEGINS: &str = "{\"vmgenid\":";

/// What is in the file.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct State {
    /// The version of this format, 1. It is the first member: see [`BEGINS`].
    vmgenid: u32,
    /// The boot ID: `sysgenid` counts from the start of each boot.
    boot: String,
    source: String,
    /// The generation that the rest is about.
    pub generation: String,
    /// The machine was restored, and has not been renewed since.
    pub due: bool,
    /// The generation in which the machine was renewed last. `None`: unknown.
    pub from: Option<String>,
    /// The hooks that have succeeded in this generation.
    #[serde(default)]
    pub done: BTreeSet<String>,
    /// The hooks that have failed in this generation, and how.
    #[serde(default)]
    pub failed: BTreeMap<String, String>,
}

/// What a state file says.
pub enum Found {
    Nothing,
    Damaged,
    State(State),
}

impl State {
    /// Reads a state file.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or is not a state file.
    pub fn read(path: &Path) -> Result<Found> {
        let bytes = match fs::read(path) {
            Err(err) if err.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
            bytes => bytes.with_context(|| format!("cannot read {}", path.display()))?,
        };
        match serde_json::from_slice(&bytes) {
            Ok(state @ Self { vmgenid: 1, .. }) => Ok(Found::State(state)),
            // A file system that was not shut down can leave a file empty, or with zeros.
            _ if bytes.starts_with(BEGINS.as_bytes()) || bytes.iter().all(|byte| *byte == 0) => {
                Ok(Found::Damaged)
            }
            _ => bail!("{} is not a state file of vmgenid", path.display()),
        }
    }

    fn new(source: Source, boot: &str, now: Generation) -> Self {
        Self {
            vmgenid: 1,
            boot: boot.into(),
            source: source.to_string(),
            generation: now.to_string(),
            due: false,
            from: Some(now.to_string()),
            done: BTreeSet::new(),
            failed: BTreeMap::new(),
        }
    }

    /// Whether the machine was restored since.
    fn is_old(&self, now: &Self) -> bool {
        // The counter of a hypervisor differs from all that this machine had in earlier boots, too.
        let another_boot = self.source == Source::Sysgenid.to_string() && self.boot != now.boot;
        self.source != now.source || (self.generation != now.generation && !another_boot)
    }
}

/// A state, and the file that it is kept in, if it is kept.
pub struct Record {
    path: Option<PathBuf>,
    source: Source,
    boot: String,
    pub state: State,
}

impl Record {
    /// Takes up what the file says, and writes it again, so that what cannot be written is known early.
    ///
    /// # Errors
    ///
    /// Those of [`State::read`]; [`write`](Self::write) tells of its own.
    pub fn open(path: Option<&Path>, source: Source, now: Generation) -> Result<Self> {
        let boot = match path {
            // A sandbox may lack it.
            None => String::new(),
            Some(_) => fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .context("cannot read the boot ID")?
                .trim()
                .into(),
        };
        let current = State::new(source, &boot, now);
        let state = match path.map(State::read).transpose()? {
            None | Some(Found::Nothing) => current,
            Some(Found::Damaged) => {
                eprintln!("vmgenid: the state file is damaged: this counts as a restore");
                State {
                    due: true,
                    from: None,
                    ..current
                }
            }
            Some(Found::State(old)) if old.is_old(&current) => State {
                due: true,
                from: old.from,
                ..current
            },
            // The same generation. If that is of another boot, what was due still is.
            Some(Found::State(old)) => State {
                boot: current.boot,
                generation: current.generation,
                ..old
            },
        };
        Ok(Self {
            path: path.map(Into::into),
            source,
            boot,
            state,
        })
    }

    /// The machine was restored.
    pub fn restored(&mut self, now: Generation) {
        self.state = State {
            due: true,
            from: self.state.from.take(),
            ..State::new(self.source, &self.boot, now)
        };
    }

    /// The machine is renewed.
    pub fn renewed(&mut self) {
        self.state.due = false;
        self.state.from = Some(self.state.generation.clone());
    }

    /// Writes the file, so that it is either the old one or the new one, whenever the machine stops.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn write(&self) -> Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let write = || -> Result<()> {
            let dir = match path.parent() {
                Some(dir) if dir != Path::new("") => dir,
                _ => Path::new("."),
            };
            let mut file = NamedTempFile::new_in(dir)?;
            file.write_all(serde_json::to_string(&self.state)?.as_bytes())?;
            let readable = Permissions::from_mode(0o644);
            file.as_file().set_permissions(readable)?;
            file.as_file().sync_all()?;
            file.persist(path)?;
            Ok(File::open(dir)?.sync_all()?)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(source: Source, boot: &str, generation: &str) -> State {
        State {
            vmgenid: 1,
            boot: boot.into(),
            source: source.to_string(),
            generation: generation.into(),
            due: false,
            from: None,
            done: BTreeSet::new(),
            failed: BTreeMap::new(),
        }
    }

    /// Expect that another generation is a restore, except `sysgenid`'s in another boot, where the
    /// count has started again; and that another source is one.
    #[test]
    fn another_generation_is_a_restore_unless_the_count_has_started_again() {
        let was = |source| state(source, "boot 1", "5");
        for source in [Source::Vmgenid, Source::Sysgenid] {
            assert!(!was(source).is_old(&state(source, "boot 1", "5")));
            assert!(was(source).is_old(&state(source, "boot 1", "6")));
            assert!(!was(source).is_old(&state(source, "boot 2", "5")));
        }
        assert!(was(Source::Vmgenid).is_old(&state(Source::Vmgenid, "boot 2", "6")));
        assert!(!was(Source::Sysgenid).is_old(&state(Source::Sysgenid, "boot 2", "0")));
        assert!(was(Source::Vmgenid).is_old(&state(Source::Sysgenid, "boot 1", "5")));
        assert!(was(Source::Sysgenid).is_old(&state(Source::Vmgenid, "boot 1", "5")));
    }
}
