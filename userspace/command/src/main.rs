// SPDX-License-Identifier: MIT OR Apache-2.0

//! `vmgenid`, the command. Its man pages are made from the comments here.

mod hooks;
mod record;
mod status;
mod watch;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use hooks::Renew;
use humantime::Duration;
use serde::Serialize;
use std::{
    io::{Write, stdout},
    path::PathBuf,
    process::ExitCode,
};
use vmgenid::{Counter, Error, Generation};
use watch::Watch;

/// Say when this virtual machine was restored from a snapshot
///
/// The generation is a number that changes when this virtual machine is restored from a snapshot.
/// The command looks for it at /dev/vmgenid, then at /dev/vmclock0 (if its page has a VM generation
/// counter), then at /dev/sysgenid. On standard error it says what the last two cannot promise.
///
/// Durations are numbers with a unit: 500ms, 30s, 5min, 1h.
#[derive(Parser)]
#[command(name = "vmgenid", version, after_long_help = EXIT_STATUS)]
struct Args {
    /// Use this source instead of the best one of this machine
    #[arg(long, global = true)]
    source: Option<Source>,
    /// The path of that source's device node
    #[arg(long, global = true, value_name = "PATH", requires = "source")]
    device: Option<PathBuf>,
    #[command(subcommand)]
    what: What,
}

const EXIT_STATUS: &str = "\
Exit status:
  0  success
  1  an error, which standard error names; a hook that failed
  2  the command line is wrong
  3  this machine has no generation counter
  4  the timeout is over (wait); the machine was restored and not renewed since (status)
  5  the source cannot promise what --reseeded demands";

#[derive(Subcommand)]
enum What {
    /// Print the generation
    ///
    /// When the command prints it, the kernel's random number generator has been reseeded since the
    /// restore that began this generation, if the source can promise that.
    Get {
        /// Print JSON: {"source":"vmgenid","generation":"42"}
        #[arg(long)]
        json: bool,
    },
    /// Wait until the machine was restored, or until the kernel was reseeded
    ///
    /// For programs that must not continue without a certain answer: each exit status but 0 means
    /// that nothing was promised. The command prints the generation.
    #[command(group = clap::ArgGroup::new("until").required(true).multiple(true))]
    Wait {
        /// Wait until the generation is another one than N
        #[arg(long, value_name = "N", group = "until")]
        since: Option<u64>,
        /// End only when the kernel's random number generator has been reseeded in the generation
        /// that is printed. End with exit status 5 if the source cannot promise that: vmclock never
        /// can, sysgenid can with --since
        #[arg(long, group = "until")]
        reseeded: bool,
        /// End with exit status 4 after this time
        #[arg(long)]
        timeout: Option<Duration>,
        /// Print JSON: {"source":"vmgenid","generation":"43","reseeded":true}
        #[arg(long)]
        json: bool,
    },
    /// Print a line, and run a command, after each restore
    ///
    /// On standard error the command first says that it watches, and what. It misses no restore after
    /// that line. As a service of systemd (Type=notify) it also tells systemd.
    ///
    /// If the device is unbound from its driver, the command ends with exit status 1. With --state,
    /// the next start finds a restore that came in between.
    Watch {
        /// Print JSON:
        /// {"source":"vmgenid","time":1700000000.0,"from":"42","to":"43"}. "from" is null if the
        /// state file is damaged. The time is the machine's own, in seconds since 1970, which can be
        /// wrong for a while after a restore
        #[arg(long)]
        json: bool,
        /// Have /bin/sh run COMMAND after each restore, with VMGENID_SOURCE, VMGENID_FROM and
        /// VMGENID_TO in its environment. If COMMAND fails, it is run again after 1 second, 2, 4, and so
        /// on up to 64. If there were restores while it ran, it is run once more
        #[arg(long, value_name = "COMMAND")]
        exec: Option<String>,
        /// Keep the generation for which COMMAND has succeeded in FILE. A restore that this command
        /// did not see because it was not running is then found when it starts
        #[arg(long, value_name = "FILE")]
        state: Option<PathBuf>,
        /// End after the first restore, with the exit status of COMMAND
        #[arg(long)]
        once: bool,
        /// End if there was no restore for this time
        #[arg(long)]
        timeout: Option<Duration>,
    },
    /// Run the hooks that have not succeeded since the machine was restored
    ///
    /// The hooks are the executable files in the folders DIR whose names consist of letters, digits,
    /// "-" and "_" only (as for run-parts). They run one after the other, sorted by name, with
    /// VMGENID_SOURCE, VMGENID_FROM and VMGENID_TO in their environment. A file in a folder hides the
    /// files of the same name in later folders.
    ///
    /// Hooks that fail are run again after 1 second, 2, 4, and so on up to 64. If the machine is
    /// restored meanwhile, all hooks run anew.
    ///
    /// A hook runs at least once after each restore. It runs again if the machine stops, or if a
    /// snapshot of it is taken, before its success is recorded. So a hook has to bear being run twice.
    Renew {
        /// Keep in FILE the generation, and which hooks have succeeded in it. If there is no FILE,
        /// the command makes it, and runs no hook
        #[arg(long, value_name = "FILE", default_value = RECORD)]
        state: PathBuf,
        /// Kill a hook that has not ended after this time
        #[arg(long, value_name = "DURATION", default_value = "90s")]
        hook_timeout: Duration,
        /// End with exit status 1 when hooks have failed so many times
        #[arg(long, value_name = "N", default_value_t = 8)]
        tries: u32,
        #[arg(value_name = "DIR", default_value = HOOKS)]
        dirs: Vec<PathBuf>,
    },
    /// Print which sources this machine has, and why not others
    ///
    /// Also which module is loaded, and whether all hooks have run since the last restore.
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The state file of "vmgenid renew"
        #[arg(long, value_name = "FILE", default_value = RECORD)]
        state: PathBuf,
    },
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
    /// Write the man pages into a folder
    #[command(hide = true)]
    Man { dir: PathBuf },
}

/// What the units use.
const RECORD: &str = "/var/lib/vmgenid/renewed";
const HOOKS: &str = "/etc/vmgenid/restored.d";

#[derive(Clone, Copy, ValueEnum)]
enum Source {
    Vmgenid,
    Vmclock,
    Sysgenid,
}

impl From<Source> for vmgenid::Source {
    fn from(source: Source) -> Self {
        match source {
            Source::Vmgenid => Self::Vmgenid,
            Source::Vmclock => Self::Vmclock,
            Source::Sysgenid => Self::Sysgenid,
        }
    }
}

/// What has an exit status of its own.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("no restore in {0}")]
    Timeout(Duration),
    #[error("the source is {0}: it cannot promise that the kernel was reseeded")]
    NoPromise(vmgenid::Source),
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err(err) => {
            eprintln!("vmgenid: {err:#}");
            ExitCode::from(match (err.downcast_ref(), err.downcast_ref()) {
                (Some(Error::NoCounter), _) => 3,
                (_, Some(Refusal::Timeout(_))) => 4,
                (_, Some(Refusal::NoPromise(_))) => 5,
                _ => 1,
            })
        }
    }
}

fn run(args: Args) -> Result<ExitCode> {
    match args.what {
        What::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "vmgenid", &mut stdout());
            return Ok(ExitCode::SUCCESS);
        }
        What::Man { dir } => {
            clap_mangen::generate_to(Args::command(), &dir)
                .context("cannot write the man pages")?;
            return Ok(ExitCode::SUCCESS);
        }
        What::Status { json, state } => return status::print(json, &state),
        _ => {}
    }
    let counter = open(args.source, args.device)?;
    match args.what {
        What::Wait {
            since,
            reseeded,
            timeout,
            json,
        } => wait(&counter, since, reseeded, timeout, json),
        What::Watch {
            json,
            exec,
            state,
            once,
            timeout,
        } => Watch {
            counter,
            json,
            exec,
            state,
            once,
            timeout: timeout.map(Into::into),
        }
        .run(),
        What::Renew {
            state,
            hook_timeout,
            tries,
            dirs,
        } => Renew {
            counter,
            state,
            hook_timeout: hook_timeout.into(),
            tries,
            dirs,
        }
        .run(),
        What::Get { json } => {
            let generation = counter.barrier()?;
            print_generation(&counter, generation, None, json)
        }
        What::Completions { .. } | What::Man { .. } | What::Status { .. } => unreachable!(),
    }
}

fn open(source: Option<Source>, device: Option<PathBuf>) -> Result<Counter> {
    let counter = match source.map(vmgenid::Source::from) {
        None => Counter::open()?,
        Some(source) => Counter::open_path(source, device.unwrap_or_else(|| source.path().into()))?,
    };
    if let Some(limit) = limit(counter.source()) {
        eprintln!("vmgenid: the source is {}: {limit}", counter.source());
    }
    Ok(counter)
}

/// What the source cannot promise.
fn limit(source: vmgenid::Source) -> Option<&'static str> {
    if !source.is_immediate() {
        Some("a restore is seen some milliseconds late")
    } else if !source.has_barrier() {
        Some("the kernel may be reseeded some milliseconds after a change is seen")
    } else {
        None
    }
}

/// Prints a line. The reader of standard output may be gone.
fn print(line: &str) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{line}").context("cannot write to standard output")?;
    out.flush().context("cannot write to standard output")
}

/// The generation is a string: programs that read JSON numbers as floating point lose digits of 64 bits.
#[derive(Serialize)]
struct Now {
    source: String,
    generation: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    reseeded: Option<bool>,
}

fn print_generation(
    counter: &Counter,
    generation: Generation,
    reseeded: Option<bool>,
    json: bool,
) -> Result<ExitCode> {
    if json {
        print(&serde_json::to_string(&Now {
            source: counter.source().to_string(),
            generation: generation.to_string(),
            reseeded,
        })?)?;
    } else {
        print(&generation.to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn wait(
    counter: &Counter,
    since: Option<u64>,
    reseeded: bool,
    timeout: Option<Duration>,
    json: bool,
) -> Result<ExitCode> {
    let source = counter.source();
    // The count of sysgenid changes after the reseed: a change is a promise, the count itself is none.
    let promised = source.has_barrier() || (!source.is_immediate() && since.is_some());
    if reseeded && !promised {
        return Err(Refusal::NoPromise(source).into());
    }
    let mut now = counter.barrier()?;
    if since == Some(now.number()) {
        let changed = counter.wait(now, timeout.map(Into::into))?;
        now = match (changed, timeout) {
            (Some(now), _) => now,
            (None, Some(timeout)) => return Err(Refusal::Timeout(timeout).into()),
            (None, None) => anyhow::bail!("the wait ended without a restore"),
        };
    }
    print_generation(counter, now, Some(promised), json)
}
