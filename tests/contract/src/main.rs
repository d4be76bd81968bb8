// SPDX-License-Identifier: MIT OR Apache-2.0

//! The programs that the tests run in the guest: one test for each promise of `/dev/vmgenid`, and
//! programs that observe a restore.

mod actors;
mod button;
mod machine;
mod promises;
mod sys;
mod wait;

use actors::{
    atonce, consumers, contend, cost, faults, preempt, spin, steps, stream, stress, warm,
};
use anyhow::Context;
use clap::Parser;
use std::{io::Read, process::ExitCode, time::Duration};

/// The device node under test.
const NODE: &str = "/dev/vmgenid";

#[derive(Parser)]
#[command(about = "Tests of /dev/vmgenid, to be run in a guest")]
enum Program {
    /// Print the counter, by read and by mapping
    Counter,
    /// Print the counter by mapping alone, without the barrier
    Peek {
        #[arg(long, default_value = NODE)]
        node: String,
    },
    /// Print how often the kernel's generator has been reseeded, for whatever reason
    Reseeds {
        /// Instead, in so many draws of 16 bytes, and the most in one of them
        #[arg(long)]
        draws: Option<u32>,
    },
    /// Credit the kernel's generator with 32 bytes of standard input, as a machine with a source of
    /// entropy does, and wait until it is initialized
    Seed,
    /// List the promises
    List {
        /// Those for which the host has to change the counter
        #[arg(long)]
        changes: bool,
        /// Those of /dev/sysgenid, for which the host also has to change the counter
        #[arg(long, conflicts_with = "changes")]
        sysgenid: bool,
    },
    /// Test one promise
    Promise { name: String },
    /// Test all promises for which the counter need not change, and print the results as KTAP; as
    /// root, on any machine that has the device
    Run,
    /// Spin on the mapped counter, and write down what happens when it changes
    Spin(spin::Args),
    /// Observe the counter in every way at once, and write down the first observation of each
    /// change
    Warm(warm::Args),
    /// Spin on the mapped counter; when it changes, draw from the kernel again
    /// and again
    Draws(warm::Draws),
    /// Sleep as a real-time process; when the counter changes, draw from the
    /// kernel again and again
    Preempt(preempt::Args),
    /// Draw from the kernel in every way, without end
    Consumers(consumers::Args),
    /// Print how many nanoseconds 1,000 draws from the vDSO take, and 1,000 by system calls
    Vdso,
    /// Sleep until the counter changes, and write down what happens then
    Wait(wait::Args),
    /// Draw from generators of the crate without end, and write down their output
    Stream(stream::Args),
    /// Unbind and bind, unload and load, while many processes use the node
    Stress(stress::Args),
    /// One of those processes
    #[command(hide = true)]
    Busy(stress::Busy),
    /// Read the counter in many threads, until killed
    Readers {
        #[arg(long, default_value_t = 8)]
        threads: usize,
    },
    /// Compute until killed, and print each interruption of so many milliseconds or more
    Held {
        #[arg(long)]
        ms: u64,
        /// As a real-time process (SCHED_FIFO) of this priority
        #[arg(long)]
        fifo: Option<u8>,
    },
    /// Observe the counter from many threads until killed, and check each time that the reseed came
    /// first
    Contend(contend::Args),
    /// Let each allocation and each copy of a call fail, one after the other
    Faults { call: faults::Call },
    /// Print the outcome of a probe, by an insmod or by a bind
    Probe {
        #[arg(long)]
        bind: bool,
    },
    /// Load, bind, unbind and unload, and print the outcome of each step
    Steps(steps::Args),
    /// Read the counter into a page of a file
    ReadInto { file: String },
    /// Measure costs, which are guest instructions under -icount
    Cost {
        #[command(subcommand)]
        what: Option<cost::What>,
    },
    /// Act on each change of the counter, and say how long that took; until killed
    AtOnce(atonce::Args),
    /// Let a read return EAGAIN, and check that poll reports nothing once the counter has been read
    Owed,
    /// Disable the device's own interrupt in arm64's interrupt controller, or enable it: off, on
    Interrupt { state: String },
    /// Have the machine's power button pressed, and see each press
    Button(button::Args),
    /// Map the counter's page and dump core
    #[command(hide = true)]
    Crash,
}

fn main() -> ExitCode {
    let result = match Program::parse() {
        Program::Counter => counter(),
        Program::Peek { node } => peek(&node),
        Program::Reseeds { draws } => reseeds(draws),
        Program::Seed => seed(),
        Program::List { changes, sysgenid } => {
            let list = match (changes, sysgenid) {
                (true, _) => promises::CHANGES,
                (_, true) => promises::SYSGENID,
                _ => promises::ALL,
            };
            for (name, on, _) in list {
                println!("{name}{on}");
            }
            Ok(())
        }
        Program::Promise { name } => promises::run(&name),
        Program::Run => return promises::run_all(),
        Program::Spin(args) => spin::run(args),
        Program::Warm(args) => warm::run(&args),
        Program::Draws(args) => warm::draws(&args),
        Program::Preempt(args) => preempt::run(&args),
        Program::Consumers(args) => consumers::run(&args),
        Program::Vdso => preempt::vdso(),
        Program::Wait(args) => wait::run(args),
        Program::Stream(args) => stream::run(&args),
        Program::Stress(args) => stress::run(args),
        Program::Busy(args) => stress::busy(args),
        Program::Readers { threads } => spin::readers(threads),
        Program::Held { ms, fifo } => spin::held(Duration::from_millis(ms), fifo),
        Program::Contend(args) => contend::run(&args),
        Program::Faults { call } => faults::walk(call),
        Program::Probe { bind } => faults::probe(bind),
        Program::Steps(args) => steps::run(&args),
        Program::ReadInto { file } => contend::read_into(&file),
        Program::Cost { what } => cost::run(what.unwrap_or(cost::What::Calls)),
        Program::AtOnce(args) => atonce::run(&args),
        Program::Owed => atonce::owed(),
        Program::Interrupt { state } => machine::enable_interrupt(state == "on"),
        Program::Button(args) => button::run(&args),
        Program::Crash => promises::crash(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            println!("{err:#}");
            match err.downcast_ref() {
                Some(promises::Skip(..)) => ExitCode::from(promises::SKIP),
                None => ExitCode::FAILURE,
            }
        }
    }
}

fn counter() -> anyhow::Result<()> {
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    let mapped = sys::Map::readonly(&file).context("mmap")?;
    let read = sys::read(&file).context("read")?;
    println!("read {read}, mapped {}", mapped.load(0));
    Ok(())
}

fn reseeds(draws: Option<u32>) -> anyhow::Result<()> {
    let start = sys::reseeds()?;
    let Some(draws) = draws else {
        println!("{start}");
        return Ok(());
    };
    let (mut before, mut most) = (start, 0);
    for _ in 0..draws {
        warm::draw(&mut [0; 16])?;
        let now = sys::reseeds()?;
        most = most.max(now - before);
        before = now;
    }
    println!("{} {most}", before - start);
    Ok(())
}

fn seed() -> anyhow::Result<()> {
    let mut seed = [0; 32];
    std::io::stdin().read_exact(&mut seed).context("stdin")?;
    sys::credit(&seed).context("RNDADDENTROPY")?;
    let flags = rustix::rand::GetRandomFlags::empty();
    rustix::rand::getrandom(&mut seed, flags)
        .map(drop)
        .context("getrandom")
}

fn peek(node: &str) -> anyhow::Result<()> {
    let file = sys::open(node).with_context(|| format!("open {node}"))?;
    println!(
        "mapped {}",
        sys::Map::readonly(&file).context("mmap")?.load(0)
    );
    Ok(())
}
