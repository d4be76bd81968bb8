// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs that are running when the machine is restored.

use crate::{NODE, actors::warm, sys};
use anyhow::{Context, ensure};
use std::{fs, hint::spin_loop, io::Write, thread, time::Duration};

#[derive(clap::Args)]
pub struct Args {
    /// Where to write one line for the start, and one for each change
    #[arg(long)]
    out: std::path::PathBuf,
    /// Draw without the barrier, as a control
    #[arg(long)]
    no_barrier: bool,
}

/// Spins on the mapped counter. At a change it does what a library should do: it reads the device,
/// then draws from the kernel.
pub fn run(args: Args) -> anyhow::Result<()> {
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    let map = sys::Map::readonly(&file).context("mmap")?;
    let mut last = sys::read(&file).context("read")?;

    // Opened before the restore: after it, there is no time for that.
    let mut out = fs::File::create(&args.out).with_context(|| format!("create {:?}", args.out))?;
    writeln!(out, "spinning on {last}")?;

    loop {
        let mut looks = 0u64;
        let seen = loop {
            let seen = map.load(0);
            looks += 1;
            if seen != last {
                break seen;
            }
            spin_loop();
        };
        let read = if args.no_barrier {
            None
        } else {
            Some(sys::read(&file).context("read")?)
        };
        let mut bytes = [0; 32];
        warm::draw(&mut bytes)?;
        let random = warm::hex(&bytes);

        let read = read.map_or("-".to_string(), |value| value.to_string());
        writeln!(
            out,
            "from {last}: mapped {seen}, read {read}, random {random}, looks {looks}"
        )?;
        last = seen;
    }
}

/// Computes without end. Prints each interruption of `least` or longer.
pub fn held(least: Duration, fifo: Option<u8>) -> anyhow::Result<()> {
    if let Some(priority) = fifo {
        sys::set_fifo(priority).context("SCHED_FIFO")?;
    }
    println!("computing");
    let mut last = sys::now();
    loop {
        let now = sys::now();
        if u128::from(now - last) >= least.as_nanos() {
            println!("held from {last} to {now}");
        }
        last = now;
    }
}

/// Many threads that read without end, while the counter grows. What `read`
/// returns lies between what the mapping shows before and after.
pub fn readers(threads: usize) -> anyhow::Result<()> {
    let reader = || -> anyhow::Result<()> {
        let file = sys::open(NODE)?;
        let map = sys::Map::readonly(&file)?;
        loop {
            let before = map.load(0);
            let read = sys::read(&file)?;
            let after = map.load(0);
            ensure!(
                before <= read && read <= after,
                "read {read} between {before} and {after}"
            );
        }
    };
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                if let Err(err) = reader() {
                    println!("{err:#}");
                    std::process::exit(1);
                }
            });
        }
    });
    Ok(())
}
