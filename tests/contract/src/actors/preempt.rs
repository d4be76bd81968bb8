// SPDX-License-Identifier: MIT OR Apache-2.0

//! A real-time process that a restore finds asleep. It preempts whatever the restore finds
//! running, a kernel thread in the middle of a reseed included, and draws from the kernel's
//! generator as soon as the counter is new.

use crate::{
    NODE,
    actors::{
        consumers::{Consumer, Consumers},
        warm::{self, draw},
    },
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
    /// Do not read the device before the draws, and draw by each consumer of the kernel's generator in
    /// turn. With the counter UNTIL + 2 N, or one more, the consumer number N is the first. While the
    /// process waits, it draws from the vDSO
    #[arg(long)]
    no_barrier: bool,
    /// Look at the counter by reading the device, and not at the mapped page; the read that returns
    /// the new counter is the barrier
    #[arg(long, conflicts_with = "no_barrier")]
    by_read: bool,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    let map = sys::Map::readonly(&file).context("mmap")?;
    let read = || sys::read(&file).context("read");
    let mut draws = warm::Record::new(&args.out, args.count)?;
    let mut consumers = args.no_barrier.then(Consumers::new).transpose()?;
    warm::pin(args.cpu)?;
    sys::set_fifo(PRIORITY).context("SCHED_FIFO")?;

    print!("waiting from {} on", read()?);
    if let Some(Consumers { vdso, .. }) = &consumers {
        print!("; vDSO {:x?}, getrandom {:x?}", vdso.image, vdso.function);
    }
    println!();
    let mut last = [0; 16];
    let mut turn = 0;
    let value = loop {
        let value = if args.by_read { read()? } else { map.load(0) };
        if value >= args.until {
            break value;
        }
        turn += 1;
        match &mut consumers {
            // Where the snapshot was taken in this draw, it began before the restore. It is not one
            // of those that are written down.
            Some(consumers) if turn % 2 == 0 => consumers.draw(Consumer::Vdso, &mut last)?,
            _ => thread::sleep(NAP),
        }
    };
    let start = sys::now();
    let barrier = !args.no_barrier && !args.by_read;
    // The barrier is over when read() has returned the new counter.
    while barrier && read()? < args.until {}
    let first = (value - args.until) as usize / 2;
    let consumer = |n: usize| match args.no_barrier {
        true => Consumer::ALL[(first + n / STRETCH) % Consumer::ALL.len()],
        false => Consumer::Getrandom,
    };
    for (n, (time, bytes)) in draws.iter_mut().enumerate() {
        if n > 0 && n % STRETCH == 0 {
            thread::sleep(rest(n / STRETCH));
        }
        match &mut consumers {
            Some(consumers) => consumers.draw(consumer(n), bytes)?,
            None => draw(bytes)?,
        }
        *time = sys::now() - start;
    }
    println!("last {}", warm::hex(&last));
    draws.write(|n| consumer(n).name())
}

/// Prints the time of a draw of 16 bytes by the vDSO, then by a system call, in nanoseconds: of the
/// quickest 64 draws in a row, divided by 64.
pub fn vdso() -> anyhow::Result<()> {
    const DRAWS: u32 = 64;

    let mut vdso = sys::VdsoRandom::new()?;
    // After one draw, the vDSO has a key.
    vdso.draw(&mut [0; 16])?;
    let time = |draw: &mut dyn FnMut(&mut [u8]) -> anyhow::Result<()>| -> anyhow::Result<f64> {
        let mut quickest = u64::MAX;
        for _ in 0..50 {
            let start = sys::now();
            for _ in 0..DRAWS {
                draw(&mut [0; 16])?;
            }
            quickest = quickest.min(sys::now() - start);
        }
        Ok(quickest as f64 / f64::from(DRAWS))
    };
    let by_vdso = time(&mut |bytes| vdso.draw(bytes))?;
    println!("{by_vdso} {}", time(&mut draw)?);
    Ok(())
}
