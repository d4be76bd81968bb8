// SPDX-License-Identifier: MIT OR Apache-2.0

//! What calls cost. With `-icount shift=0,sleep=off` a guest's nanosecond is
//! one instruction.

use crate::{NODE, sys};
use anyhow::Context;
use rustix::time::{ClockId, clock_gettime};
use std::{
    array,
    hint::black_box,
    os::fd::OwnedFd,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

const CALLS: u32 = 20_000;

/// The least of five measurements of one call, in nanoseconds.
fn measure(mut call: impl FnMut()) -> f64 {
    let now = || {
        let now = clock_gettime(ClockId::Monotonic);
        now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
    };
    let times: [f64; 5] = array::from_fn(|_| {
        let start = now();
        for i in 0..CALLS {
            black_box(i);
            call();
        }
        (now() - start) / f64::from(CALLS)
    });
    times.into_iter().fold(f64::INFINITY, f64::min)
}

pub fn run() -> anyhow::Result<()> {
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    let null = sys::open("/dev/null").context("open /dev/null")?;
    let map = sys::Map::readonly(&file).context("mmap")?;
    // What a library does before each use: compare, and branch away if it differs.
    let counter = map.word(0);
    let local = AtomicU32::new(counter.load(Relaxed));
    let seeded = counter.load(Relaxed);
    let local = black_box(&local);
    let check = move |word: &AtomicU32| assert!(word.load(Relaxed) == seeded);
    let mut bytes = [0u8; 4];
    let mut read = |file: &OwnedFd, len| assert!(rustix::io::read(file, &mut bytes) == Ok(len));

    let empty = measure(|| ());
    let rows = [
        (
            "check of the mapped counter",
            measure(move || check(counter)),
        ),
        ("check of a local variable", measure(move || check(local))),
        ("read of the counter", measure(|| read(&file, 4))),
        ("read of /dev/null", measure(|| read(&null, 0))),
        (
            "open, mmap, touch, munmap, close",
            measure(|| {
                let file = sys::open(NODE).expect("open");
                black_box(sys::Map::readonly(&file).expect("mmap").load(0));
            }),
        ),
    ];
    for (what, time) in rows {
        println!("{what}: {:.1}", time - empty);
    }
    Ok(())
}
