// SPDX-License-Identifier: MIT OR Apache-2.0

//! A real-time process that a restore finds asleep. It preempts whatever the restore finds
//! running, a kernel thread in the middle of a reseed included, and draws from the kernel's
//! generator as soon as the counter is new.

use crate::{
    NODE,
    actors::warm::{self, draw},
    sys,
};
use anyhow::Context;
use std::{path::PathBuf, thread, time::Duration};

/// Below the kernel's own real-time threads (50), above everything else.
const PRIORITY: u8 = 10;

/// How long the process sleeps between two looks at the counter.
const NAP: Duration = Duration::from_micros(200);

/// How many draws come at a stretch.
const STRETCH: usize = 25;

/// How long the process sleeps after a stretch. A preempted kernel thread runs meanwhile. The first
/// sleeps are short, so the thread advances only a little in each: it may install an old key, which
/// another reseed soon replaces, and the draws in between have to be seen.
fn rest(stretches: usize) -> Duration {
    match stretches as u64 {
        few @ ..100 => Duration::from_micros(few),
        _ => Duration::from_millis(2),
    }
}

#[derive(clap::Args)]
pub struct Args {
    /// Where to write the draws, as `draws` does
    #[arg(long)]
    out: PathBuf,
    /// The CPU to run on
    #[arg(long)]
    cpu: usize,
    /// How many draws
    #[arg(long)]
    count: usize,
    /// Wait until the counter is at least this
    #[arg(long)]
    until: u32,
    /// Do not read the device before the draws
    #[arg(long)]
    no_barrier: bool,
    /// Look at the counter by reading the device, and not at the mapped page; the read that returns
    /// the new counter is the barrier
    #[arg(long, conflicts_with = "no_barrier")]
    by_read: bool,
    /// Draw from the vDSO, with a key that the process has held since before
    #[arg(long)]
    vdso: bool,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    let map = sys::Map::readonly(&file).context("mmap")?;
    let read = || sys::read(&file).context("read");
    let mut draws = warm::Record::new(&args.out, args.count)?;
    let mut vdso = args.vdso.then(sys::VdsoRandom::new).transpose()?;
    let mut draw = |bytes: &mut [u8]| match &mut vdso {
        Some(vdso) => vdso.draw(bytes),
        None => draw(bytes),
    };
    // After one draw, the vDSO has a key.
    draw(&mut [0; 16])?;
    warm::pin(args.cpu)?;
    sys::set_fifo(PRIORITY).context("SCHED_FIFO")?;

    println!("waiting from {} on", read()?);
    loop {
        thread::sleep(NAP);
        let value = if args.by_read { read()? } else { map.load(0) };
        if value >= args.until {
            break;
        }
    }
    let start = sys::now();
    let barrier = !args.no_barrier && !args.by_read;
    // The barrier is over when read() has returned the new counter.
    while barrier && read()? < args.until {}
    for (n, (time, bytes)) in draws.iter_mut().enumerate() {
        if n > 0 && n % STRETCH == 0 {
            thread::sleep(rest(n / STRETCH));
        }
        draw(bytes)?;
        *time = sys::now() - start;
    }
    draws.write()
}

/// Prints the time of 1,000 draws of 16 bytes from the vDSO, then by system calls, in nanoseconds.
pub fn vdso() -> anyhow::Result<()> {
    let mut vdso = sys::VdsoRandom::new()?;
    // After one draw, the vDSO has a key.
    vdso.draw(&mut [0; 16])?;
    let time = |draw: &mut dyn FnMut(&mut [u8]) -> anyhow::Result<()>| -> anyhow::Result<u64> {
        let start = sys::now();
        for _ in 0..1000 {
            draw(&mut [0; 16])?;
        }
        Ok(sys::now() - start)
    };
    let by_vdso = time(&mut |bytes| vdso.draw(bytes))?;
    println!("{by_vdso} {}", time(&mut draw)?);
    Ok(())
}
