// SPDX-License-Identifier: MIT OR Apache-2.0

//! Many threads that look at the counter at once. Each checks that the kernel was reseeded before
//! it learned of a change.

use crate::{NODE, sys};
use anyhow::{Context, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::OwnedFd,
    mm::{MapFlags, ProtFlags},
};
use std::{
    sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
    thread,
    time::Duration,
};

#[derive(clap::Args)]
pub struct Args {
    /// Threads that read
    #[arg(long, default_value_t = 64)]
    readers: usize,
    /// Threads that wait in poll, then read
    #[arg(long, default_value_t = 0)]
    pollers: usize,
    /// Milliseconds after which these call poll again, where no notification wakes them
    #[arg(long)]
    poll_again: Option<u32>,
    /// The counter grows by one at a time, when all threads have seen the last value
    #[arg(long)]
    steps: bool,
}

/// The state before the first change.
struct Start {
    counter: u32,
    steps: bool,
    /// How often the kernel had been reseeded when all threads had seen `counter`; with `steps`,
    /// the last value that all have seen.
    reseeds: AtomicU64,
}

impl Start {
    /// Checks that the kernel has been reseeded since the last value, for a thread that has learned
    /// of a new one.
    fn check(&self, who: &str, value: u32) -> anyhow::Result<()> {
        let before = self.reseeds.load(SeqCst);
        let reseeds = sys::reseeds()?;
        ensure!(
            reseeds > before,
            "{who} learns of {value}, and the kernel has been reseeded {reseeds} times, as before"
        );
        Ok(())
    }

    /// All threads have seen the same value.
    fn all_have_seen(&self, value: u32) -> anyhow::Result<()> {
        if self.steps || value == self.counter {
            self.reseeds.store(sys::reseeds()?, SeqCst);
        }
        println!("all at {value}");
        Ok(())
    }
}

fn open() -> anyhow::Result<OwnedFd> {
    sys::open(NODE).with_context(|| format!("open {NODE}"))
}

/// Reads without end.
fn reader(start: &Start, seen: &AtomicU32) -> anyhow::Result<()> {
    let file = open()?;
    let mut last = start.counter;
    loop {
        // Time slices are long where all CPUs are busy, so each has many reads.
        for _ in 0..100 {
            let value = sys::read(&file).context("read")?;
            if value != last {
                start.check("a reader", value)?;
                ensure!(value > last, "a reader sees {value} after {last}");
                last = value;
            }
        }
        seen.store(last, SeqCst);
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until the counter is another one, without end.
fn poller(start: &Start, again: Option<u32>, seen: &AtomicU32) -> anyhow::Result<()> {
    let file = open()?;
    let mut last = sys::read(&file).context("read")?;
    let again = again.map(|again| Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(again) * 1_000_000,
    });
    loop {
        seen.store(last, SeqCst);
        let mut fds = [PollFd::new(&file, PollFlags::IN)];
        if poll(&mut fds, again.as_ref()).context("poll")? == 0 {
            continue;
        }
        ensure!(
            fds[0].revents() == PollFlags::IN,
            "poll says {:?}",
            fds[0].revents()
        );
        start.check("a poller", last + 1)?;
        let value = sys::read(&file).context("read")?;
        ensure!(value > last, "poll says readable, read says {value} again");
        last = value;
    }
}

/// Prints one line for each value that all threads have seen. A thread that sees an error prints
/// it, and ends the program.
pub fn run(args: &Args) -> anyhow::Result<()> {
    // The low priority leaves CPU time to other processes.
    rustix::process::nice(19).context("nice")?;
    let start = Start {
        counter: sys::read(&open()?).context("read")?,
        steps: args.steps,
        reseeds: AtomicU64::new(sys::reseeds()?),
    };
    let seen: Vec<_> = (0..args.readers + args.pollers)
        .map(|_| AtomicU32::new(start.counter.wrapping_sub(1)))
        .collect();
    let (readers, pollers) = seen.split_at(args.readers);
    let start = &start;
    thread::scope(|scope| {
        for seen in readers {
            scope.spawn(|| end_all(reader(start, seen)));
        }
        for seen in pollers {
            scope.spawn(|| end_all(poller(start, args.poll_again, seen)));
        }
        let mut last = start.counter.wrapping_sub(1);
        loop {
            let value = seen[0].load(SeqCst);
            if value != last && seen.iter().all(|seen| seen.load(SeqCst) == value) {
                end_all(start.all_have_seen(value));
                last = value;
            }
            thread::sleep(Duration::from_millis(5));
        }
    })
}

fn end_all(result: anyhow::Result<()>) {
    if let Err(err) = result {
        println!("{err:#}");
        std::process::exit(1);
    }
}

/// Reads the counter into a page of a file, whose device may take its time.
pub fn read_into(path: &str) -> anyhow::Result<()> {
    let file = open()?;
    let slow = sys::open(path).with_context(|| format!("open {path}"))?;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let offset = 1 << 19;
    let buffer = sys::Map::of(&slow, sys::page(), prot, MapFlags::PRIVATE, offset)
        .with_context(|| format!("mmap {path}"))?;
    println!("reading");
    match sys::read_at_address(&file, buffer.address(), 4).context("read")? {
        4 => println!("read {}", buffer.load(0)),
        len => bail!("read returned {len}"),
    }
    Ok(())
}
