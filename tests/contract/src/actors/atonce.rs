// SPDX-License-Identifier: MIT OR Apache-2.0

//! A process that acts when the counter changes, and writes down how long each call took: none may
//! wait for a vmfork notifier, and those that must not sleep return at once.

use crate::{
    NODE,
    actors::warm::{draw, hex},
    promises::poll::read_nowait,
    sys,
    wait::{LONG, NOW, Said, by_poll},
};
use anyhow::{Context, ensure};
use rustix::{fd::OwnedFd, fs::OFlags, io::Errno};
use std::{thread, time::Duration};

#[derive(clap::Args)]
pub struct Args {
    /// The call; without this, the step of the counter selects it: 1, 2 or 3
    #[arg(long)]
    way: Option<Way>,
}

#[derive(clap::ValueEnum, Clone, Copy)]
enum Way {
    Read,
    Nonblock,
    Poll,
}

/// The calls, for a counter that grows by 1, 2, 3.
const WAYS: [Way; 3] = [Way::Read, Way::Nonblock, Way::Poll];

/// Makes the call, and returns a word for its answer.
fn ask(way: Way, file: &OwnedFd, nonblock: &OwnedFd) -> anyhow::Result<&'static str> {
    let read = match way {
        Way::Read => sys::read(file),
        Way::Nonblock => sys::read(nonblock),
        Way::Poll => {
            return match by_poll(nonblock, &NOW)? {
                Said::Readable => Ok("ready"),
                Said::Nothing => Ok("not-ready"),
                Said::Gone => anyhow::bail!("the device is gone"),
            };
        }
    };
    match read {
        Ok(_) => Ok("read"),
        Err(Errno::AGAIN) => Ok("EAGAIN"),
        Err(errno) => Err(errno).context("read"),
    }
}

/// Acts on each change of the counter. Two lines for each: "first COUNTER ANSWER MICROSECONDS" when
/// the first call has returned; "then COUNTER MICROSECONDS HEX" when the counter has been read, with
/// 32 bytes that were drawn after that.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    let nonblock = sys::open_as(NODE, OFlags::RDONLY | OFlags::NONBLOCK)?;
    let map = sys::Map::readonly(&file).context("mmap")?;
    let mut last = sys::read(&file).context("read")?;
    sys::read(&nonblock).context("read, O_NONBLOCK")?;
    println!("waiting at {last}");
    loop {
        while map.load(0) == last {
            thread::sleep(Duration::from_millis(1));
        }
        let value = map.load(0);
        let grown = value.wrapping_sub(last).wrapping_sub(1) as usize;
        let way = args.way.unwrap_or(WAYS[grown % WAYS.len()]);
        let start = sys::now();
        let micros = || (sys::now() - start) / 1000;
        let answer = ask(way, &file, &nonblock)?;
        println!("first {value} {answer} {}", micros());
        if answer != "read" {
            // Where the generator has to be reseeded first, poll reports the file as readable after
            // that.
            let said = by_poll(&nonblock, &LONG)?;
            ensure!(said == Said::Readable, "poll says {said:?}");
            let read = sys::read(&nonblock).context("read, O_NONBLOCK, once it is ready")?;
            ensure!(read == value, "the counter is {value}, not {read}");
        }
        let mut bytes = [0; 32];
        draw(&mut bytes)?;
        println!("then {value} {} {}", micros(), hex(&bytes));
        // After this, both files have returned the new counter.
        sys::read(&file).context("read")?;
        sys::read(&nonblock).context("read, O_NONBLOCK")?;
        last = value;
    }
}

/// Makes a read return EAGAIN at one value of the counter, which then becomes its own complement.
/// When the complement has been read, poll must report nothing.
pub fn owed() -> anyhow::Result<()> {
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    let map = sys::Map::readonly(&file).context("mmap")?;
    let before = sys::read(&file).context("read")?;
    println!("waiting at {before}");
    let until = |so: &dyn Fn(u32) -> bool| {
        while !so(map.load(0)) {
            thread::sleep(Duration::from_millis(1));
        }
        map.load(0)
    };
    let value = until(&|value| value != before);
    let put_off = read_nowait(&file);
    ensure!(
        put_off == Err(Errno::AGAIN),
        "the first read says {put_off:?}"
    );
    println!("put off at {value}");
    until(&|now| now == !value);
    // Another file's read has the kernel reseeded.
    let other = sys::read(&sys::open(NODE)?).context("another file's read")?;
    ensure!(other == !value, "another file's read says {other}");
    let read = sys::read(&file).context("read, once the kernel is reseeded")?;
    ensure!(read == !value, "it says {read}");
    let said = by_poll(&file, &NOW)?;
    ensure!(said == Said::Nothing, "after the read, poll says {said:?}");
    println!("nothing is owed");
    Ok(())
}
