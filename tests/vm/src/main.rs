// SPDX-License-Identifier: MIT OR Apache-2.0

use anyhow::Result;
use clap::Parser;
use clap::error::ErrorKind;
use harness::Host;
use harness::Name;
use harness::Options;
use harness::Stream;
use harness::Terminal;
use harness::Vm;
use harness::interrupt;
use std::io;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::Duration;

/// Guests with a VM generation counter: boot, snapshot, clone
///
/// An error is one line on standard error, and exit status 1; or 125 for run and exec, which pass
/// on the exit status of CMD.
#[derive(Parser)]
#[command(
    name = "vm",
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
struct Cli {
    /// How long the guest may say nothing before it counts as hung [default: 120,
    /// more if VMGENID_KERNEL is a slow one, or VMGENID_TIMEOUT of the environment]
    #[arg(long, global = true, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Boot a VM, run CMD in it and end it; without CMD a shell
    ///
    /// Its output and its exit status are those of CMD; 128 + n if signal n ended
    /// CMD, 127 if there is no CMD.
    Run {
        #[command(flatten)]
        options: Options,
        #[arg(last = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Boot a VM that stays
    Start {
        name: Name,
        #[command(flatten)]
        options: Options,
    },
    /// Run CMD in a VM; without CMD a shell
    Exec {
        name: Name,
        #[arg(last = true, value_name = "CMD")]
        command: Vec<String>,
    },
    /// Print what a VM wrote to its console
    Log { name: Name },
    /// Give the generation counter of a running VM another value
    Set {
        name: Name,
        #[arg(long, value_name = "N")]
        genctr: u32,
    },
    /// Save a running VM
    Snapshot { name: Name, snapshot: Name },
    /// Go back to a snapshot, or make a clone from it
    Restore {
        name: Name,
        snapshot: Name,
        /// The counter's new value, which it has not had before
        #[arg(long, value_name = "N")]
        genctr: Option<u32>,
        /// Make a clone of this name, with a disk of its own; the original continues
        #[arg(long = "as", value_name = "NEWNAME")]
        clone: Option<Name>,
    },
    /// End a VM; its snapshots, if it has any, stay
    Stop { name: Name },
    /// End a VM and remove all of it
    Delete { name: Name },
    /// Show the VMs there are
    List,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return misused(&e),
    };
    let passes_status = matches!(cli.action, Action::Run { .. } | Action::Exec { .. });
    match act(cli) {
        Ok(status) => ExitCode::from(status),
        Err(e) if e.is::<interrupt::Interrupted>() => ExitCode::from(130),
        Err(e) if broken_pipe(&e) => ExitCode::from(141),
        Err(e) => {
            eprintln!("vm: {e:#}");
            ExitCode::from(if passes_status { 125 } else { 1 })
        }
    }
}

/// Prints help as clap has it, and an error in the arguments in one line.
fn misused(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        error.exit();
    }
    let text = error.to_string();
    let what: Vec<_> = text
        .lines()
        .take_while(|line| !line.is_empty())
        .map(str::trim)
        .collect();
    let what = what.join(" ");
    eprintln!("vm: {}; see vm --help", what.trim_start_matches("error: "));
    ExitCode::from(2)
}

fn act(cli: Cli) -> Result<u8> {
    interrupt::catch()?;
    let mut host = Host::from_env()?;
    if let Some(seconds) = cli.timeout {
        host.timeout = Duration::from_secs(seconds);
    }
    match cli.action {
        Action::Run { options, command } => {
            let vm = Vm::boot(&host, options)?;
            warn(&vm);
            return run(&vm, command);
        }
        Action::Exec { name, command } => return run(&Vm::open(&host, &name)?, command),
        Action::Start { name, options } => {
            let vm = Vm::start(&host, &name, options)?;
            warn(&vm);
            eprintln!("started {name} ({})", facts(&vm)?);
        }
        Action::Log { name } => io::stdout().write_all(&Vm::open(&host, &name)?.console()?)?,
        Action::Set { name, genctr } => {
            Vm::open(&host, &name)?.set_genctr(genctr)?;
            eprintln!("set {name} (genctr {genctr})");
        }
        Action::Snapshot { name, snapshot } => {
            Vm::open(&host, &name)?.snapshot(&snapshot)?;
            eprintln!("saved {name} as {snapshot}");
        }
        Action::Restore {
            name,
            snapshot,
            genctr,
            clone,
        } => {
            let mut vm = Vm::open(&host, &name)?;
            if clone.is_some() {
                vm = vm.clone_from(&snapshot, genctr, clone.as_ref())?;
            } else {
                vm.restore(&snapshot, genctr)?;
            }
            warn(&vm);
            eprintln!(
                "restored {snapshot} of {name} as {} ({})",
                vm.name(),
                facts(&vm)?
            );
        }
        Action::Stop { name } => {
            if Vm::open(&host, &name)?.stop()? {
                eprintln!("stopped {name}; its snapshots stay: vm restore, or vm delete");
            } else {
                eprintln!("stopped {name}");
            }
        }
        Action::Delete { name } => {
            Vm::open(&host, &name)?.delete()?;
            eprintln!("deleted {name}");
        }
        Action::List => list(&host)?,
    }
    Ok(0)
}

/// Runs a command with our input and output as its own.
fn run(vm: &Vm, mut argv: Vec<String>) -> Result<u8> {
    let mut terminal = None;
    if argv.is_empty() {
        argv = vec!["sh".into()];
        terminal = Terminal::take()?;
    }
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    let mut command = vm.command(argv).stdin(stdin);
    if let Some(terminal) = &terminal {
        command = command.terminal(terminal);
        if let Ok(kind) = std::env::var("TERM") {
            command = command.env("TERM", &kind);
        }
    }
    let status = command.stream(|stream, bytes| match stream {
        Stream::Stdout => io::stdout()
            .write_all(bytes)
            .and_then(|()| io::stdout().flush()),
        Stream::Stderr => io::stderr().write_all(bytes),
    })?;
    Ok(status.code())
}

fn warn(vm: &Vm) {
    let messages = vm.messages();
    if !messages.is_empty() {
        eprintln!("QEMU says: {messages}");
    }
}

fn facts(vm: &Vm) -> Result<String> {
    let mut facts = vm.pid()?.map_or("ended".into(), |pid| format!("pid {pid}"));
    if let Some(counter) = vm.options()?.counter() {
        facts += &format!(", genctr {counter}");
    }
    Ok(facts)
}

fn list(host: &Host) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{:<16} {:<8} {:>10} {:>8}  SNAPSHOTS",
        "NAME", "STATE", "GENCTR", "PID"
    )?;
    for vm in Vm::list(host)? {
        let state = if vm.pid.is_some() {
            "running"
        } else {
            "stopped"
        };
        let counter = vm.counter.map_or("-".into(), |counter| counter.to_string());
        let pid = vm.pid.map_or("-".into(), |pid| pid.to_string());
        let snapshots = vm.snapshots.join(" ");
        writeln!(
            out,
            "{:<16} {state:<8} {counter:>10} {pid:>8}  {snapshots}",
            vm.name
        )?;
    }
    Ok(())
}

fn broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<io::Error>();
    io.is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}
