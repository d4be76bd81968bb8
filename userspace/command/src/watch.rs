// SPDX-License-Identifier: MIT OR Apache-2.0

//! `vmgenid watch`.

use crate::{print, record::Record};
use anyhow::{Context, Result};
use sd_notify::NotifyState;
use serde::Serialize;
use std::{
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Command, ExitCode, ExitStatus},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use vmgenid::{Counter, Source};

#[derive(Serialize)]
struct Restored<'a> {
    source: String,
    time: f64,
    from: Option<&'a str>,
    to: &'a str,
}

pub struct Watch {
    pub counter: Counter,
    pub json: bool,
    pub exec: Option<String>,
    pub state: Option<PathBuf>,
    pub once: bool,
    pub timeout: Option<Duration>,
}

impl Watch {
    pub fn run(&self) -> Result<ExitCode> {
        let mut last = self.counter.barrier()?;
        let mut record = Record::open(self.state.as_deref(), self.counter.source(), last)?;
        record.write()?;
        // The process that starts this one can wait for this line: nothing is missed after it.
        let watching = format!("watching {}, generation {last}", self.counter.source());
        eprintln!("vmgenid: {watching}");
        tell_systemd(&[NotifyState::Ready, NotifyState::Status(&watching)]);

        let mut failures = 0;
        loop {
            if record.state.due {
                // The command must not be missed, even if the line cannot be printed.
                let said = match failures {
                    0 => self.say(&record),
                    _ => Ok(()),
                };
                let status = self.exec(&record)?;
                if status.success() {
                    record.renewed();
                    complain(record.write());
                } else {
                    failures += 1;
                }
                said?;
                if self.once {
                    return Ok(exit_code(status));
                }
            }
            let pause = if record.state.due {
                Some(pause_after(failures))
            } else {
                self.timeout
            };
            match self.counter.wait(last, pause)? {
                Some(new) => {
                    last = new;
                    failures = 0;
                    record.restored(new);
                    complain(record.write());
                }
                None if record.state.due => {}
                None => return Ok(ExitCode::SUCCESS),
            }
        }
    }

    fn say(&self, record: &Record) -> Result<()> {
        let (from, to) = (record.state.from.as_deref(), &record.state.generation);
        if self.json {
            let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
            print(&serde_json::to_string(&Restored {
                source: self.counter.source().to_string(),
                time: since_1970.unwrap_or_default().as_secs_f64(),
                from,
                to,
            })?)
        } else {
            let from = from.unwrap_or("unknown");
            print(&format!("restored: generation {from} -> {to}"))
        }
    }

    fn exec(&self, record: &Record) -> Result<ExitStatus> {
        let Some(command) = &self.exec else {
            return Ok(ExitStatus::default());
        };
        let status = environment(&mut Command::new("/bin/sh"), self.counter.source(), record)
            .args(["-c", command])
            .status()
            .context("cannot run /bin/sh")?;
        if !status.success() {
            eprintln!("vmgenid: {command}: {status}");
        }
        Ok(status)
    }
}

/// What hooks and commands have in their environment.
pub fn environment<'a>(
    command: &'a mut Command,
    source: Source,
    record: &Record,
) -> &'a mut Command {
    command
        .env("VMGENID_SOURCE", source.to_string())
        .env("VMGENID_FROM", record.state.from.as_deref().unwrap_or(""))
        .env("VMGENID_TO", &record.state.generation)
}

/// How long to wait before another try.
pub fn pause_after(failures: u32) -> Duration {
    Duration::from_secs(1 << failures.saturating_sub(1).min(6))
}

/// Prints the error. The watcher continues.
pub fn complain(result: Result<()>) {
    if let Err(err) = result {
        eprintln!("vmgenid: {err:#}");
    }
}

/// Tells systemd, if it has started this process as a service.
pub fn tell_systemd(state: &[NotifyState<'_>]) {
    complain(sd_notify::notify(false, state).context("cannot tell systemd"));
}

/// The exit status as a shell says it.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .or(status.signal().map(|signal| 128 + signal))
        .and_then(|code| u8::try_from(code).ok());
    code.map_or(ExitCode::FAILURE, ExitCode::from)
}
