// SPDX-License-Identifier: MIT OR Apache-2.0

//! `vmgenid renew`.

use crate::{
    record::Record,
    watch::{complain, environment, pause_after, tell_systemd},
};
use anyhow::{Context, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open},
};
use sd_notify::NotifyState;
use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};
use vmgenid::{Counter, Generation};

/// How long a hook may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

pub struct Renew {
    pub counter: Counter,
    pub state: PathBuf,
    pub hook_timeout: Duration,
    pub tries: u32,
    pub dirs: Vec<PathBuf>,
}

impl Renew {
    pub fn run(&self) -> Result<ExitCode> {
        let mut now = self.counter.barrier()?;
        let mut record = Record::open(Some(&self.state), self.counter.source(), now)?;
        // A hook that runs twice is better than one that does not run: this is said at the end.
        let mut written = record.write();
        let mut failures = 0;
        loop {
            if record.state.due {
                self.run_hooks(now, &mut record)?;
                if record.state.failed.is_empty() && self.counter.get() == now {
                    record.renewed();
                    written = record.write();
                    if written.is_ok() {
                        let to = &record.state.generation;
                        eprintln!("vmgenid: renewed in generation {to}");
                    }
                }
            }
            // The machine may have been restored meanwhile.
            let mut new = self.counter.barrier()?;
            if new == now {
                if !record.state.due {
                    written?;
                    return Ok(ExitCode::SUCCESS);
                }
                failures += 1;
                let failed: Vec<_> = record.state.failed.keys().map(String::as_str).collect();
                let failed = failed.join(", ");
                ensure!(failures < self.tries, "failed {failures} times: {failed}");
                let pause = pause_after(failures);
                let again = format!("failed: {failed}; again in {} s", pause.as_secs());
                eprintln!("vmgenid: {again}");
                tell_systemd(&[NotifyState::Status(&again)]);
                match self.counter.wait(now, Some(pause))? {
                    Some(restored) => new = restored,
                    None => continue,
                }
            }
            now = new;
            failures = 0;
            record.restored(now);
            written = record.write();
        }
    }

    /// Runs the hooks that have not succeeded, until the machine is restored.
    fn run_hooks(&self, now: Generation, record: &mut Record) -> Result<()> {
        let first = std::mem::take(&mut record.state.failed).is_empty();
        for (name, hook) in find(&self.dirs, first)? {
            if self.counter.get() != now {
                break;
            }
            if record.state.done.contains(&name) {
                continue;
            }
            match self.run_hook(&hook, record) {
                Ok(()) => {
                    record.state.done.insert(name);
                }
                Err(err) => {
                    eprintln!("vmgenid: {}: {err:#}", hook.display());
                    record.state.failed.insert(name, format!("{err:#}"));
                }
            }
            complain(record.write());
        }
        Ok(())
    }

    fn run_hook(&self, hook: &Path, record: &Record) -> Result<()> {
        // A process group of its own, to kill the hook's children, too.
        let mut child = environment(&mut Command::new(hook), self.counter.source(), record)
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot run it")?;
        let group = Pid::from_child(&child);
        if !ends_within(&child, self.hook_timeout)? {
            // The group may be gone just now.
            let _ = kill_process_group(group, Signal::TERM);
            let _ = ends_within(&child, GRACE)?;
            let _ = kill_process_group(group, Signal::KILL);
            child.wait()?;
            bail!("killed after {:?}", self.hook_timeout);
        }
        let status = child.wait()?;
        ensure!(status.success(), "{status}");
        Ok(())
    }
}

/// Waits for the end of a process.
fn ends_within(child: &Child, time: Duration) -> Result<bool> {
    let fd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).context("pidfd_open")?;
    // A time that does not fit has no end.
    let time = Timespec::try_from(time).ok();
    let ended = retry_on_intr(|| poll(&mut [PollFd::new(&fd, PollFlags::IN)], time.as_ref()));
    Ok(ended.context("poll")? > 0)
}

/// The hooks by name. Names the files that are none, if that is not known yet.
fn find(dirs: &[PathBuf], say: bool) -> Result<BTreeMap<String, PathBuf>> {
    let mut hooks = BTreeMap::new();
    // Earlier folders win.
    for dir in dirs.iter().rev() {
        let entries = match fs::read_dir(dir) {
            Err(err) if err.kind() == ErrorKind::NotFound => continue,
            entries => entries.with_context(|| format!("cannot read {}", dir.display()))?,
        };
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot read {}", dir.display()))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            hooks.insert(name, entry.path());
        }
    }
    hooks.retain(|name, path| match why_not(name, path) {
        None => true,
        Some(why) => {
            if say {
                eprintln!("vmgenid: {}: not run: {why}", path.display());
            }
            false
        }
    });
    Ok(hooks)
}

/// Why this file is not a hook, by the rules of Debian's run-parts.
fn why_not(name: &str, path: &Path) -> Option<&'static str> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    match fs::metadata(path) {
        _ if !name.chars().all(fits) => {
            Some("its name has other characters than letters, digits, - and _")
        }
        Ok(file) if !file.is_file() => Some("not a file"),
        Ok(file) if file.permissions().mode() & 0o111 == 0 => Some("not executable"),
        Ok(_) => None,
        Err(_) => Some("a link that leads nowhere"),
    }
}
