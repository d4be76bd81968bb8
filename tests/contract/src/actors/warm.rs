// SPDX-License-Identifier: MIT OR Apache-2.0

//! A warm guest: every kind of process that may observe the counter when the machine is restored.
//! Each writes down the first look that shows another value, and acts on it as a library should.

use crate::{
    NODE,
    actors::cost::VMCLOCK,
    sys,
    wait::{Epoll, LONG, Said},
};
use anyhow::{Context, bail, ensure};
use chacha20::ChaCha20Rng;
use rand_core::{SeedableRng, TryRng};
use rustix::{
    fd::OwnedFd,
    process::{Signal, set_parent_process_death_signal},
    rand::GetRandomFlags,
    thread::{CpuSet, sched_setaffinity},
};
use std::{
    fs::{File, OpenOptions},
    hint::spin_loop,
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::{
        Ordering::{Relaxed, SeqCst},
        compiler_fence,
    },
    thread,
    time::Duration,
};

#[derive(clap::Args)]
pub struct Args {
    /// Where each writes a line when the counter has changed
    #[arg(long)]
    out: PathBuf,
    /// How many processors the machine has: a spinner for each
    #[arg(long)]
    cpus: usize,
}

/// Memory that all lookers share, and that the host can find in the guest's: a mark of random words,
/// then the number of looks of each looker.
pub struct Board(pub sys::Map);

pub const MARK: usize = 8;

impl Board {
    pub fn new(len: usize) -> anyhow::Result<Self> {
        let board = Self(sys::Map::shared(len).context("mmap")?);
        let mut mark = [0; 4 * MARK];
        draw(&mut mark)?;
        for (n, bytes) in mark.chunks_exact(4).enumerate() {
            let word = u32::from_ne_bytes(bytes.try_into()?);
            board.0.word(n).store(word, Relaxed);
        }
        Ok(board)
    }

    /// The address and the mark, for the host.
    pub fn describe(&self) -> String {
        let mark: Vec<_> = (0..MARK)
            .map(|n| format!("{:08x}", self.0.load(n)))
            .collect();
        format!("{:#x} {}", self.0.address(), mark.join(" "))
    }
}

/// A process that observes the counter.
struct Looker<'a> {
    name: String,
    /// Its place on the board.
    place: usize,
    board: &'a Board,
    file: &'a OwnedFd,
    map: &'a sys::Map,
    out: File,
}

impl Looker<'_> {
    /// Looks until it sees another value than `last`. A look is counted before it is made. If the
    /// machine is saved at a count of N, look N may have been made before the snapshot. The next
    /// look is made after it.
    fn until_changed(
        &self,
        last: u32,
        mut look: impl FnMut() -> anyhow::Result<u32>,
    ) -> anyhow::Result<u32> {
        let looks = self.board.0.word(MARK + self.place);
        loop {
            looks.store(looks.load(Relaxed).wrapping_add(1), Relaxed);
            compiler_fence(SeqCst);
            let seen = look()?;
            compiler_fence(SeqCst);
            if seen != last {
                return Ok(seen);
            }
        }
    }

    /// What a process finds when it has seen a change: how often the kernel has been reseeded, and
    /// 32 random bytes, which must be in no other clone.
    fn learn(&self) -> anyhow::Result<(u64, [u8; 32])> {
        let reseeds = sys::reseeds()?;
        let mut bytes = [0; 32];
        draw(&mut bytes)?;
        Ok((reseeds, bytes))
    }

    /// Writes an observation down, as one line.
    fn note(
        &mut self,
        [from, seen, read, look]: [u32; 4],
        (reseeds, bytes): (u64, [u8; 32]),
    ) -> anyhow::Result<()> {
        let name = &self.name;
        let random = hex(&bytes);
        // One write, so that lines stay whole.
        let line = format!("{name} {from} {seen} {read} {reseeds} {look} {random}\n");
        self.out.write_all(line.as_bytes()).context("write")
    }

    /// How many looks have been counted.
    fn looks(&self) -> u32 {
        self.board.0.load(MARK + self.place)
    }

    /// Spins on the mapping.
    fn spin(mut self) -> anyhow::Result<()> {
        let mut last = self.map.load(0);
        loop {
            let seen = self.until_changed(last, || {
                spin_loop();
                Ok(self.map.load(0))
            })?;
            let looks = self.looks();
            // The barrier.
            let read = sys::read(self.file).context("read")?;
            let learned = self.learn()?;
            self.note([last, seen, read, looks], learned)?;
            last = read;
        }
    }

    /// Reads without end: what a read returns comes after the reseed.
    fn read(mut self) -> anyhow::Result<()> {
        let mut last = sys::read(self.file).context("read")?;
        loop {
            let seen = self.until_changed(last, || sys::read(self.file).context("read"))?;
            let learned = self.learn()?;
            self.note([last, seen, seen, self.looks()], learned)?;
            last = seen;
        }
    }

    /// Sleeps in epoll. When it wakes, the kernel has been reseeded.
    fn wait(mut self) -> anyhow::Result<()> {
        let file = sys::open(NODE)?;
        let epoll = Epoll::edge_triggered(&file)?;
        let mut last = sys::read(&file).context("read")?;
        self.board.0.word(MARK + self.place).store(1, Relaxed);
        loop {
            match epoll.wait(&LONG)? {
                Said::Nothing => continue,
                Said::Readable => {}
                Said::Gone => bail!("the device is gone"),
            }
            // No barrier is needed: the process is woken after the reseed.
            let learned = self.learn()?;
            let seen = self.map.load(0);
            let read = sys::read(&file).context("read")?;
            self.note([last, seen, read, 0], learned)?;
            last = read;
        }
    }
}

/// Starts all lookers, and prints where the board is.
pub fn run(args: &Args) -> anyhow::Result<()> {
    // They get all CPU time that other processes leave.
    rustix::process::nice(19).context("nice")?;
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    let map = sys::Map::readonly(&file).context("mmap")?;
    let board = Board::new(sys::page())?;
    let mut options = OpenOptions::new();
    let options = options.create(true).append(true);
    let looker = |name: String, place: usize| -> anyhow::Result<Looker> {
        Ok(Looker {
            name,
            place,
            board: &board,
            file: &file,
            map: &map,
            out: options
                .open(&args.out)
                .with_context(|| format!("open {:?}", args.out))?,
        })
    };

    // The child inherits the file and the mapping. It is forked before there are threads.
    let child = looker("child".into(), args.cpus + 1)?;
    sys::fork(|| {
        let with_parent = set_parent_process_death_signal(Some(Signal::KILL));
        end_all(with_parent.context("prctl").and_then(|()| child.spin()))
    })?;

    thread::scope(|scope| -> anyhow::Result<()> {
        for cpu in 0..args.cpus {
            let spinner = looker(format!("spinner-{cpu}"), cpu)?;
            scope.spawn(move || end_all(pin(cpu).and_then(|()| spinner.spin())));
        }
        let reader = looker("reader".into(), args.cpus)?;
        scope.spawn(|| end_all(reader.read()));
        let waiter = looker("waiter".into(), args.cpus + 2)?;
        scope.spawn(|| end_all(waiter.wait()));
        // All of them have seen the present counter. A process that began later would not see it
        // change.
        while (0..args.cpus + 3).any(|place| board.0.load(MARK + place) == 0) {
            thread::sleep(Duration::from_millis(10));
        }
        println!("board {}", board.describe());
        Ok(())
    })
}

/// Keeps this thread on one processor.
pub fn pin(cpu: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).context("sched_setaffinity")
}

pub fn end_all(result: anyhow::Result<()>) -> ! {
    if let Err(err) = result {
        println!("{err:#}");
    }
    std::process::exit(1)
}

#[derive(clap::Args)]
pub struct Draws {
    /// Where to write the draws: nanoseconds since the change was seen, and 16 bytes
    #[arg(long)]
    out: PathBuf,
    /// How many
    #[arg(long, default_value_t = 4000)]
    count: usize,
    /// Read the device first
    #[arg(long)]
    barrier: bool,
    /// The device to map, whose counter is observed
    #[arg(long, default_value = NODE)]
    node: String,
    /// Draw from the kernel once, to seed a generator of its own, and then from that one, as AWS-LC
    /// does for 4,096 calls
    #[arg(long)]
    once: bool,
    /// Draw all the time, and not only after the change; a draw that began before the change is not
    /// written down
    #[arg(long, conflicts_with = "barrier")]
    blind: bool,
}

/// Spins on the mapping. When the counter changes, draws from the kernel again and again, at once
/// or after the barrier.
pub fn draws(args: &Draws) -> anyhow::Result<()> {
    let file = sys::open(&args.node).with_context(|| format!("open {}", args.node))?;
    let map = match &*args.node {
        VMCLOCK => sys::Map::vmclock(&file),
        _ => sys::Map::readonly(&file),
    };
    let map = map.context("mmap")?;
    let last = match &*args.node {
        NODE => sys::read(&file).context("read")?,
        _ => map.load(0),
    };
    let mut draws = Record::new(&args.out, args.count)?;
    println!("spinning on {last}");
    let seen = loop {
        if args.blind {
            draw(&mut [0; 16])?;
        }
        match map.load(0) {
            seen if seen != last => break seen,
            _ => spin_loop(),
        }
    };
    let start = sys::now();
    if args.barrier {
        let read = sys::read(&file).context("read")?;
        ensure!(read == seen, "saw {seen}, read {read}");
    }
    let mut own = None;
    if args.once {
        let mut seed = [0; 32];
        draw(&mut seed)?;
        own = Some(ChaCha20Rng::from_seed(seed));
    }
    for (time, bytes) in draws.iter_mut() {
        match &mut own {
            Some(rng) => rng.try_fill_bytes(bytes)?,
            None => draw(bytes)?,
        }
        *time = sys::now() - start;
    }
    draws.write(|_| "getrandom")
}

/// The draws of a process: nanoseconds since the change was seen, and 16 bytes. The memory and the
/// file for them are there before the change.
pub struct Record<'a> {
    draws: Vec<(u64, [u8; 16])>,
    path: &'a Path,
    part: PathBuf,
    out: File,
}

impl<'a> Record<'a> {
    /// For `count` draws, to be written to `path`.
    pub fn new(path: &'a Path, count: usize) -> anyhow::Result<Self> {
        let part = path.with_extension("part");
        let out = File::create(&part).with_context(|| format!("create {part:?}"))?;
        Ok(Self {
            draws: vec![(0, [0; 16]); count],
            path,
            part,
            out,
        })
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut (u64, [u8; 16])> {
        self.draws.iter_mut()
    }

    /// Writes all draws at once, since the host waits for the file. `name` says where a draw is from.
    pub fn write(mut self, name: impl Fn(usize) -> &'static str) -> anyhow::Result<()> {
        let draws = self.draws.iter().enumerate();
        let lines = draws.map(|(n, (time, bytes))| format!("{time} {} {}\n", hex(bytes), name(n)));
        self.out.write_all(lines.collect::<String>().as_bytes())?;
        // The file is whole once it has its name.
        std::fs::rename(&self.part, self.path).context("rename")
    }
}

/// Fills the buffer from the kernel.
pub fn draw(bytes: &mut [u8]) -> anyhow::Result<()> {
    let expected = bytes.len();
    let len = rustix::rand::getrandom(bytes, GetRandomFlags::empty()).context("getrandom")?;
    ensure!(len == expected, "getrandom returned {len} bytes");
    Ok(())
}

/// In hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .filter_map(|digit| char::from_digit(digit.into(), 16))
        .collect()
}
