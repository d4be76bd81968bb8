// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the barrier does where it is the kernel's own driver that reseeds: it waits.

use crate::{
    NODE,
    machine::{Device, Log, Masked, change},
    poll::read_nowait,
    promises::{fails, open, same},
    sys::{self, Uring},
    wait::{LONG, Said, by_poll, expect},
};
use anyhow::{Context, ensure};
use rustix::{
    fs::OFlags,
    io::Errno,
    process::{Signal, getpid, kill_process},
    thread::{NanosleepRelativeResult, nanosleep},
    time::Timespec,
};
use std::{
    thread,
    time::{Duration, Instant},
};

/// What the driver says once for each ID that the kernel was not reseeded with.
const OVERDUE: &str = "the kernel was not reseeded";

fn overdue(log: &mut Log) -> anyhow::Result<usize> {
    let lines = log.lines()?;
    Ok(lines.iter().filter(|line| line.contains(OVERDUE)).count())
}

pub fn a_read_returns_after_the_kernels_reseed() -> anyhow::Result<()> {
    let file = open()?;
    let mut log = Log::from_now_on()?;
    for round in 0..20 {
        let value = change()?;
        same("read", sys::read(&file)?, value)?;
        let reseeds = log.reseeds()?;
        ensure!(reseeds == 1, "round {round}: {reseeds} reseeds, not 1");
    }
    Ok(())
}

pub fn a_read_without_a_reseed_times_out() -> anyhow::Result<()> {
    let file = open()?;
    let before = sys::read(&file)?;
    let mut log = Log::from_now_on()?;

    let masked = Masked::new()?;
    let value = change()?;
    let start = Instant::now();
    fails("read", sys::read(&file), Errno::TIMEDOUT)?;
    let waited = start.elapsed();
    ensure!(waited >= Duration::from_millis(950), "after {waited:?}");
    fails("readv", sys::readv(&file), Errno::TIMEDOUT)?;
    fails("another file", sys::read(&open()?), Errno::TIMEDOUT)?;
    expect(&file, Said::Nothing)?;
    same("lines in the log", overdue(&mut log)?, 1)?;

    drop(masked);
    same("poll", by_poll(&file, &LONG)?, Said::Readable)?;
    let read = sys::read(&file)?;
    same("read", read, value)?;
    ensure!(read != before, "the counter has not changed");
    same("lines in the log, later", overdue(&mut log)?, 0)
}

pub fn a_read_that_must_not_wait_is_eagain() -> anyhow::Result<()> {
    let file = sys::open_as(NODE, OFlags::RDONLY | OFlags::NONBLOCK)?;
    let other = open()?;
    same("the two", sys::read(&file)?, sys::read(&other)?)?;

    let masked = Masked::new()?;
    let value = change()?;
    fails("read, O_NONBLOCK", sys::read(&file), Errno::AGAIN)?;
    fails("readv, O_NONBLOCK", sys::readv(&file), Errno::AGAIN)?;
    fails("preadv2, RWF_NOWAIT", read_nowait(&other), Errno::AGAIN)?;
    // It has had this counter from its open on, and yet its read is owed.
    let late = sys::open_as(NODE, OFlags::RDONLY | OFlags::NONBLOCK)?;
    fails("read, late", sys::read(&late), Errno::AGAIN)?;
    expect(&file, Said::Nothing)?;
    drop(masked);

    for (what, file) in [
        ("O_NONBLOCK", &file),
        ("RWF_NOWAIT", &other),
        ("late", &late),
    ] {
        same(what, by_poll(file, &LONG)?, Said::Readable)?;
    }
    same("read, O_NONBLOCK", sys::read(&file)?, value)?;
    same("preadv2, RWF_NOWAIT", read_nowait(&other)?, value)?;
    same("read, late", sys::read(&late)?, value)?;
    expect(&file, Said::Nothing)
}

pub fn a_signal_ends_the_wait() -> anyhow::Result<()> {
    let file = open()?;
    let us = getpid();
    let masked = Masked::new()?;
    let value = change()?;
    for let_it in [sys::let_interrupt, sys::let_restart] {
        let_it(Signal::USR1)?;
        let child = sys::fork(|| {
            let delay = Timespec {
                tv_sec: 0,
                tv_nsec: 200_000_000,
            };
            matches!(nanosleep(&delay), NanosleepRelativeResult::Ok)
                && kill_process(us, Signal::USR1).is_ok()
        })?;
        fails("read", sys::read(&file), Errno::INTR)?;
        ensure!(sys::ended(child)?, "the child could not send the signal");
    }
    drop(masked);
    same("read", sys::read(&file)?, value)
}

pub fn a_late_reseed_ends_the_wait() -> anyhow::Result<()> {
    let file = open()?;
    let mut log = Log::from_now_on()?;
    let masked = Masked::new()?;
    change()?;
    let value = change()?;
    let reader = thread::spawn(move || (sys::read(&file), file));
    thread::sleep(Duration::from_millis(200));
    drop(masked);
    let (read, _file) = reader.join().ok().context("the reader")?;
    same("read", read?, value)?;
    // Two changes, one notification.
    same("reseeds", log.reseeds()?, 1)
}

pub fn io_uring_waits_for_the_reseed() -> anyhow::Result<()> {
    let file = open()?;
    sys::read(&file)?;
    let value = change()?;
    same(
        "io_uring's read",
        Uring::new()?.read(&file, &LONG)?,
        Some(value),
    )
}

pub fn an_unbind_ends_the_wait() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let file = open()?;
    let masked = Masked::new()?;
    change()?;
    let reader = thread::spawn(move || sys::read(&file));
    thread::sleep(Duration::from_millis(200));
    device.unbind()?;
    fails(
        "read",
        reader.join().ok().context("the reader")?,
        Errno::NODEV,
    )?;
    drop(masked);
    device.bind()?;
    let value = change()?;
    same("read", sys::read(&open()?)?, value)
}

pub fn a_storm_ends_with_the_last_counter() -> anyhow::Result<()> {
    let file = open()?;
    for _ in 0..5 {
        let storm = crate::machine::storm()?;
        for _ in 0..50 {
            // Each is the counter after a reseed, or late.
            match sys::read(&file) {
                Ok(_) | Err(Errno::TIMEDOUT) => {}
                Err(err) => return Err(err).context("read"),
            }
        }
        drop(storm);
        let value = change()?;
        same("read", sys::read(&file)?, value)?;
    }
    Ok(())
}
