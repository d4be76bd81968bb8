// SPDX-License-Identifier: MIT OR Apache-2.0

//! `vmgenid`, the command; see vmgenid(1).

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use serde::Serialize;
use std::{
    io::{Write, stdout},
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Command, ExitCode},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use vmgenid::{Counter, Error, Generation};

/// Say when this virtual machine was restored from a snapshot
///
/// The machine's generation counter is looked for at /dev/vmgenid, then
/// /dev/vmclock0, then /dev/sysgenid.
///
/// The exit status is 0 if all is well, 1 if something failed, 2 if the command
/// line is wrong, and 3 if this machine has no generation counter.
#[derive(Parser)]
#[command(name = "vmgenid", version)]
struct Args {
    /// Take this source instead of the best that there is
    #[arg(long, global = true)]
    source: Option<Source>,
    /// Its device node is here
    #[arg(long, global = true, value_name = "PATH", requires = "source")]
    device: Option<PathBuf>,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Print the generation. The kernel's random number generator has been reseeded
    /// since the restore that began it, if the source can promise that
    Get {
        /// As JSON: {"source":"vmgenid","generation":42}
        #[arg(long)]
        json: bool,
    },
    /// Wait for restores, and print a line for each: the generation before it, and
    /// the new one
    Watch {
        /// As JSON, a line each:
        /// {"source":"vmgenid","time":1700000000.0,"from":42,"to":43}. The time
        /// is the machine's own, in seconds since 1970
        #[arg(long)]
        json: bool,
        /// Have a shell run this after each restore. It has VMGENID_SOURCE,
        /// VMGENID_FROM and VMGENID_TO in its environment. While it runs, others
        /// are waited for; if there were many, it is run once more. If it fails,
        /// that is said
        #[arg(long, value_name = "COMMAND")]
        exec: Option<String>,
        /// End after the first restore, with the command's exit status
        #[arg(long)]
        once: bool,
        /// End after so many seconds without one
        #[arg(long, value_name = "SECONDS")]
        timeout: Option<f64>,
    },
}

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

/// This machine has no counter.
const NONE: u8 = 3;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => code,
        Err(err) => {
            eprintln!("vmgenid: {err:#}");
            match err.downcast_ref() {
                Some(Error::NoCounter) => ExitCode::from(NONE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    let counter = open(args)?;
    match &args.what {
        What::Get { json } => get(&counter, *json),
        What::Watch {
            json,
            exec,
            once,
            timeout,
        } => {
            let timeout = timeout
                .map(Duration::try_from_secs_f64)
                .transpose()
                .context("--timeout")?;
            Watch {
                counter,
                json: *json,
                exec: exec.as_deref(),
                once: *once,
                timeout,
            }
            .run()
        }
    }
}

fn open(args: &Args) -> Result<Counter> {
    let counter = match args.source.map(vmgenid::Source::from) {
        None => Counter::open()?,
        Some(source) => {
            let path = args.device.clone();
            Counter::open_path(source, path.unwrap_or_else(|| source.path().into()))?
        }
    };
    let source = counter.source();
    if source.is_immediate() && !source.has_barrier() {
        eprintln!(
            "vmgenid: the source is {source}: the kernel may be reseeded some milliseconds after a \
             change is seen"
        );
    }
    if !source.is_immediate() {
        eprintln!("vmgenid: the source is {source}: a restore is seen some milliseconds late");
    }
    Ok(counter)
}

/// Whoever reads our output may well have gone.
fn print(line: &str) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{line}").context("cannot write to standard output")?;
    out.flush().context("cannot write to standard output")
}

#[derive(Serialize)]
struct Now {
    source: String,
    generation: u64,
}

fn get(counter: &Counter, json: bool) -> Result<ExitCode> {
    let generation = counter.barrier()?;
    if json {
        let now = Now {
            source: counter.source().to_string(),
            generation: generation.number(),
        };
        print(&serde_json::to_string(&now)?)?;
    } else {
        print(&generation.to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Restored {
    source: String,
    time: f64,
    from: u64,
    to: u64,
}

struct Watch<'a> {
    counter: Counter,
    json: bool,
    exec: Option<&'a str>,
    once: bool,
    timeout: Option<Duration>,
}

impl Watch<'_> {
    fn run(&self) -> Result<ExitCode> {
        let mut last = self.counter.barrier()?;
        // Who starts us can wait for this line: nothing is missed after it.
        eprintln!(
            "vmgenid: watching {}, generation {last}",
            self.counter.source()
        );
        loop {
            let Some(new) = self.counter.wait(last, self.timeout)? else {
                return Ok(ExitCode::SUCCESS);
            };
            let code = self.restored(last, new)?;
            if self.once {
                return Ok(code);
            }
            last = new;
        }
    }

    fn restored(&self, from: Generation, to: Generation) -> Result<ExitCode> {
        let source = self.counter.source().to_string();
        let said = self.say(&source, from, to);
        // Whatever became of that: it is the command that must not be missed.
        let code = self.exec(&source, from, to)?;
        said.map(|()| code)
    }

    fn say(&self, source: &str, from: Generation, to: Generation) -> Result<()> {
        if self.json {
            let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
            print(&serde_json::to_string(&Restored {
                source: source.into(),
                time: since_1970.unwrap_or_default().as_secs_f64(),
                from: from.number(),
                to: to.number(),
            })?)
        } else {
            print(&format!("restored: generation {from} -> {to}"))
        }
    }

    fn exec(&self, source: &str, from: Generation, to: Generation) -> Result<ExitCode> {
        let Some(command) = self.exec else {
            return Ok(ExitCode::SUCCESS);
        };
        let status = Command::new("/bin/sh")
            .args(["-c", command])
            .env("VMGENID_SOURCE", source)
            .env("VMGENID_FROM", from.to_string())
            .env("VMGENID_TO", to.to_string())
            .status()
            .context("cannot run /bin/sh")?;
        if !status.success() {
            eprintln!("vmgenid: {command}: {status}");
        }
        // As a shell says it.
        let code = status
            .code()
            .or(status.signal().map(|signal| 128 + signal))
            .and_then(|code| u8::try_from(code).ok());
        Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
    }
}
