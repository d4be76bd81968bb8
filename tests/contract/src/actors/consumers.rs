// SPDX-License-Identifier: MIT OR Apache-2.0

//! The ways to draw from the kernel's generator. None of them needs a device.

use crate::{
    actors::warm::{self, Board, MARK},
    sys,
};
use anyhow::{Context, ensure};
use rustix::fd::OwnedFd;
use std::{
    sync::atomic::{
        Ordering::{Relaxed, SeqCst},
        compiler_fence,
    },
    thread,
    time::Duration,
};

/// One of these ways.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Consumer {
    /// The system call.
    Getrandom,
    Urandom,
    /// `getrandom` of the vDSO, which computes in the process.
    Vdso,
    /// `/proc/sys/kernel/random/uuid`.
    Uuid,
    /// `get_random_u32()` in the kernel, four times, by the test module `vmforks`.
    U32,
}

impl Consumer {
    pub const ALL: [Self; 5] = [
        Self::Getrandom,
        Self::Urandom,
        Self::Vdso,
        Self::Uuid,
        Self::U32,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Getrandom => "getrandom",
            Self::Urandom => "urandom",
            Self::Vdso => "vdso",
            Self::Uuid => "uuid",
            Self::U32 => "u32",
        }
    }
}

/// All of them, in one process.
pub struct Consumers {
    pub vdso: sys::VdsoRandom,
    urandom: OwnedFd,
    uuid: OwnedFd,
    u32: OwnedFd,
}

impl Consumers {
    /// Each has drawn once: the vDSO has a key.
    pub fn new() -> anyhow::Result<Self> {
        let open = |path: &str| sys::open(path).with_context(|| format!("open {path}"));
        let mut consumers = Self {
            vdso: sys::VdsoRandom::new()?,
            urandom: open("/dev/urandom")?,
            uuid: open("/proc/sys/kernel/random/uuid")?,
            u32: open("/sys/kernel/debug/vmforks/u32")?,
        };
        for consumer in Consumer::ALL {
            consumers.draw(consumer, &mut [0; 16])?;
        }
        Ok(consumers)
    }

    pub fn draw(&mut self, consumer: Consumer, bytes: &mut [u8; 16]) -> anyhow::Result<()> {
        match consumer {
            Consumer::Getrandom => warm::draw(bytes),
            Consumer::Urandom => {
                let len =
                    rustix::io::read(&self.urandom, &mut bytes[..]).context("read urandom")?;
                ensure!(len == bytes.len(), "urandom returned {len} bytes");
                Ok(())
            }
            Consumer::Vdso => self.vdso.draw(bytes),
            Consumer::Uuid => digits(&self.uuid, bytes).context("uuid"),
            Consumer::U32 => digits(&self.u32, bytes).context("u32"),
        }
    }
}

/// Reads a file from its beginning: 32 hexadecimal digits, and what is between them.
fn digits(file: &OwnedFd, bytes: &mut [u8; 16]) -> anyhow::Result<()> {
    let mut text = [0; 64];
    let len = rustix::io::pread(file, &mut text, 0)?;
    let digits = text[..len]
        .iter()
        .filter_map(|&c| char::from(c).to_digit(16));
    let mut count = 0;
    for digit in digits {
        let byte = bytes.get_mut(count / 2).context("too many digits")?;
        *byte = (*byte << 4) | digit as u8;
        count += 1;
    }
    ensure!(count == 32, "{count} digits");
    Ok(())
}

#[derive(clap::Args)]
pub struct Args {
    /// How many processors the machine has: a thread for each
    #[arg(long)]
    cpus: usize,
}

/// How many draws of each thread are kept.
const RING: usize = 1 << 16;

/// How many words a draw has.
const WORDS: usize = 4;

/// Draws without end, by each consumer in turn, on each processor. Knows nothing of restores: it prints
/// where the host finds its memory. There each thread notes the number of the draws that it has begun,
/// and what it has drawn.
pub fn run(args: &Args) -> anyhow::Result<()> {
    // The tests' own programs come first.
    rustix::process::nice(19).context("nice")?;
    let len = sys::page() + args.cpus * RING * WORDS * 4;
    let board = Board::new(len)?;
    // The host finds only pages that are there.
    for word in MARK..len / 4 {
        board.0.word(word).store(0, Relaxed);
    }
    let one = |cpu: usize| -> anyhow::Result<()> {
        warm::pin(cpu)?;
        let mut consumers = Consumers::new()?;
        let begun = board.0.word(MARK + cpu);
        let ring = sys::page() / 4 + cpu * RING * WORDS;
        for (n, consumer) in (0..).zip(Consumer::ALL.into_iter().cycle()) {
            let mut bytes = [0; 4 * WORDS];
            begun.store(n as u32 + 1, Relaxed);
            compiler_fence(SeqCst);
            consumers.draw(consumer, &mut bytes)?;
            for (word, bytes) in bytes.chunks_exact(4).enumerate() {
                let place = ring + n % RING * WORDS + word;
                let bytes = u32::from_ne_bytes(bytes.try_into()?);
                board.0.word(place).store(bytes, Relaxed);
            }
            compiler_fence(SeqCst);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let one = &one;
        for cpu in 0..args.cpus {
            scope.spawn(move || warm::end_all(one(cpu)));
        }
        while (0..args.cpus).any(|cpu| board.0.load(MARK + cpu) == 0) {
            thread::sleep(Duration::from_millis(10));
        }
        println!("board {}", board.describe());
    });
    Ok(())
}
