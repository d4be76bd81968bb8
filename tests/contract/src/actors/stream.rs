// SPDX-License-Identifier: MIT OR Apache-2.0

//! A process that draws from the generators of the crate `vmgenid` without end.

use crate::{actors::warm::hex, promises::library::Rng};
use anyhow::{Context, ensure};
use rand_core::TryRng;
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};
use vmgenid::{Counter, Guard, WithoutCounter};

#[derive(clap::Args)]
pub struct Args {
    /// Where to write the draws, when the file OUT.stop appears: thread, number of the draw,
    /// generation before and after, its first and its last 16 bytes
    #[arg(long)]
    out: PathBuf,
    #[arg(long, default_value_t = 1)]
    threads: u32,
    /// How many bytes each draw has: so many that a snapshot comes in the middle of
    /// one
    #[arg(long, default_value_t = 1 << 18)]
    len: usize,
    /// Assume that this machine is never restored
    #[arg(long)]
    forks_only: bool,
}

struct Draw {
    before: u64,
    after: u64,
    ends: [u8; 32],
}

/// Draws without end, each thread from a generator of its own.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let guard = Guard::open(match args.forks_only {
        true => WithoutCounter::NoticeForksOnly,
        false => WithoutCounter::Refuse,
    })?;
    let counter = guard.counter().cloned();
    let generation = || {
        let counter: Option<&Arc<Counter>> = counter.as_ref();
        counter.map_or(0, |counter| counter.get().number())
    };
    let stop = args.out.with_extension("stop");
    let part = args.out.with_extension("part");
    let out = Mutex::new(File::create(&part).with_context(|| format!("create {part:?}"))?);
    let begun = AtomicU32::new(0);
    let one = |thread: u32| -> anyhow::Result<()> {
        let mut rng = Rng::new(guard.clone())?;
        let mut bytes = vec![0; args.len];
        let mut draws = Vec::new();
        while !Path::exists(&stop) {
            let before = generation();
            rng.try_fill_bytes(&mut bytes)?;
            let after = generation();
            let mut ends = [0; 32];
            ends[..16].copy_from_slice(&bytes[..16]);
            ends[16..].copy_from_slice(&bytes[args.len - 16..]);
            if draws.is_empty() {
                begun.fetch_add(1, Relaxed);
            }
            draws.push(Draw {
                before,
                after,
                ends,
            });
        }
        let mut out = out.lock().expect("a thread panicked");
        for (n, draw) in draws.iter().enumerate() {
            let (first, last) = draw.ends.split_at(16);
            let (before, after) = (draw.before, draw.after);
            let (first, last) = (hex(first), hex(last));
            writeln!(out, "{thread} {n} {before} {after} {first} {last}")?;
        }
        Ok(())
    };
    thread::scope(|scope| -> anyhow::Result<()> {
        let one = &one;
        let threads: Vec<_> = (0..args.threads)
            .map(|thread| scope.spawn(move || one(thread)))
            .collect();
        while begun.load(Relaxed) < args.threads {
            ensure!(
                !threads.iter().any(|one| one.is_finished()),
                "a thread ended"
            );
            thread::sleep(Duration::from_millis(10));
        }
        println!("drawing");
        threads
            .into_iter()
            .try_for_each(|one| one.join().expect("a thread panicked"))
    })?;
    fs::rename(&part, &args.out).context("rename")
}
