// SPDX-License-Identifier: MIT OR Apache-2.0

//! The device is unbound and bound, the module unloaded and loaded, again and again, while many
//! processes use the node in every way there is, and the host changes the counter. Each process
//! knows the results that are allowed at any moment, and ends with an error at any other result.

use crate::{
    NODE,
    machine::{self, Device},
    promises::lifecycle::look,
    sys::{self, Map, Uring, page},
    wait::{Epoll, Said, by_poll},
};
use anyhow::{Context, bail, ensure};
use rustix::{
    event::Timespec,
    io::{Errno, IoSliceMut},
    mm::{MapFlags, ProtFlags},
};
use std::{
    fs,
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

#[derive(clap::Args)]
pub struct Args {
    /// How often to unbind and bind the device
    #[arg(long, value_name = "N", default_value_t = 1000)]
    binds: u32,
    /// How often to unload and load the module
    #[arg(long, value_name = "N", default_value_t = 200)]
    loads: u32,
    /// How many processes use the node meanwhile
    #[arg(long, value_name = "N", default_value_t = 64)]
    processes: usize,
    /// Do both for so long, however often that is
    #[arg(long, conflicts_with_all = ["binds", "loads"])]
    minutes: Option<u64>,
}

#[derive(clap::Args)]
pub struct Busy {
    board: PathBuf,
    seat: usize,
}

/// What the processes do, by their seats.
const KINDS: [(&str, Work); 9] = [
    ("read", |seat, file| reads(seat, file, sys::read)),
    ("readv", |seat, file| reads(seat, file, readv)),
    ("pread", |seat, file| reads(seat, file, pread)),
    ("io_uring", |seat, file| reads(seat, file, uring)),
    ("mmap", maps),
    ("poll", polls),
    ("epoll", epolls),
    ("open", opens),
    ("fork", forks),
];

/// Uses a file until its device is unbound, or for some calls.
type Work = fn(&Seat, OwnedFd) -> anyhow::Result<()>;

const GO: u32 = 0;
/// The processes close their files, and wait.
const PAUSE: u32 = 1;
const STOP: u32 = 2;

/// How many calls a process makes with one open file.
const CALLS: usize = 50;

const MOMENT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// Memory that all the processes share: a word that says what to do, then the counts
/// of each seat.
struct Board(Map);

impl Board {
    const WORDS: usize = 3;
    const SIZE: usize = 4096;

    fn open(path: &PathBuf) -> anyhow::Result<Self> {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options
            .open(path)
            .with_context(|| format!("open {path:?}"))?;
        file.set_len(Self::SIZE as u64)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let map = Map::of(
            &file.into(),
            Self::SIZE.max(page()),
            prot,
            MapFlags::SHARED,
            0,
        );
        Ok(Self(map.context("mmap")?))
    }

    fn order(&self) -> &AtomicU32 {
        self.0.word(0)
    }

    fn count(&self, seat: usize, n: usize) -> &AtomicU32 {
        self.0.word(1 + Self::WORDS * seat + n)
    }

    fn sum(&self, seats: impl Iterator<Item = usize>) -> [u64; Self::WORDS] {
        seats.fold([0; Self::WORDS], |mut sum, seat| {
            for (n, sum) in sum.iter_mut().enumerate() {
                *sum += u64::from(self.count(seat, n).load(Relaxed));
            }
            sum
        })
    }
}

struct Seat {
    board: Board,
    number: usize,
}

impl Seat {
    fn go_on(&self) -> bool {
        self.board.order().load(Relaxed) == GO
    }

    /// Counts a call that worked.
    fn did(&self) {
        self.board.count(self.number, 0).fetch_add(1, Relaxed);
    }

    /// Counts a file whose device was unbound.
    fn gone(&self) {
        self.board.count(self.number, 1).fetch_add(1, Relaxed);
    }

    /// Counts a node that was not there.
    fn absent(&self) {
        self.board.count(self.number, 2).fetch_add(1, Relaxed);
    }
}

/// One of the processes.
pub fn busy(args: Busy) -> anyhow::Result<()> {
    let (kind, work) = KINDS[args.seat % KINDS.len()];
    let seat = Seat {
        board: Board::open(&args.board)?,
        number: args.seat,
    };
    // The kernel's own threads, and the process that moves this one between CPUs, run first.
    rustix::process::nice(15)?;
    let done: anyhow::Result<()> = loop {
        match seat.board.order().load(Relaxed) {
            GO => {}
            PAUSE => {
                thread::sleep(Duration::from_millis(5));
                continue;
            }
            _ => break Ok(()),
        }
        let worked = match sys::open(NODE) {
            Ok(file) => work(&seat, file),
            Err(Errno::NOENT | Errno::NODEV) => {
                seat.absent();
                thread::sleep(Duration::from_millis(1));
                Ok(())
            }
            Err(errno) => Err(errno).context("open"),
        };
        if worked.is_err() {
            break worked;
        }
    };
    done.with_context(|| format!("{kind}, process {}", args.seat))
}

fn readv(file: &OwnedFd) -> rustix::io::Result<u32> {
    let (mut one, mut two) = ([0; 1], [0; 3]);
    let slices = &mut [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
    match rustix::io::readv(file, slices)? {
        4 => Ok(u32::from_ne_bytes([one[0], two[0], two[1], two[2]])),
        _ => Err(Errno::IO),
    }
}

fn pread(file: &OwnedFd) -> rustix::io::Result<u32> {
    let mut bytes = [0; 4];
    match rustix::io::pread(file, &mut bytes, 0)? {
        4 => Ok(u32::from_ne_bytes(bytes)),
        _ => Err(Errno::IO),
    }
}

fn uring(file: &OwnedFd) -> rustix::io::Result<u32> {
    let read = Uring::new().and_then(|mut ring| ring.read(file, &crate::wait::LONG));
    match read {
        Ok(Some(value)) => Ok(value),
        Ok(None) => Err(Errno::TIME),
        Err(err) => Err(err.downcast_ref().copied().unwrap_or(Errno::IO)),
    }
}

/// Checks that a file whose device was unbound stays unusable.
fn gone_for_good(seat: &Seat, file: &OwnedFd) -> anyhow::Result<()> {
    let read = sys::read(file);
    ensure!(
        read == Err(Errno::NODEV),
        "read of a file that is gone: {read:?}"
    );
    let said = by_poll(file, &crate::wait::LONG)?;
    ensure!(said == Said::Gone, "poll of a file that is gone: {said:?}");
    let map = Map::readonly(file).map(drop);
    ensure!(
        map == Err(Errno::NODEV),
        "mmap of a file that is gone: {map:?}"
    );
    seat.gone();
    Ok(())
}

/// The value of a read lies between two values of the mapping, because the counter grows.
fn reads(
    seat: &Seat,
    file: OwnedFd,
    read: fn(&OwnedFd) -> rustix::io::Result<u32>,
) -> anyhow::Result<()> {
    let map = match Map::readonly(&file) {
        Err(Errno::NODEV) => return gone_for_good(seat, &file),
        map => map.context("mmap")?,
    };
    for _ in 0..CALLS {
        if !seat.go_on() {
            break;
        }
        let before = map.load(0);
        match read(&file) {
            Ok(value) => ensure!(
                (before..=map.load(0)).contains(&value),
                "{value} between {before} and {}",
                map.load(0)
            ),
            Err(Errno::NODEV) => return gone_for_good(seat, &file),
            Err(errno) => return Err(errno).context("read"),
        }
        seat.did();
    }
    Ok(())
}

fn maps(seat: &Seat, file: OwnedFd) -> anyhow::Result<()> {
    let mut last = 0;
    let mut maps = Vec::new();
    for _ in 0..CALLS {
        if !seat.go_on() {
            break;
        }
        match Map::readonly(&file) {
            Ok(map) => maps.push(map),
            Err(Errno::NODEV) => return gone_for_good(seat, &file),
            Err(errno) => return Err(errno).context("mmap"),
        }
        for map in &maps {
            let now = map.load(0);
            ensure!(last <= now, "{now} after {last}");
            last = now;
        }
        seat.did();
    }
    // Mappings need no file, and no device.
    drop(file);
    thread::sleep(Duration::from_millis(1));
    ensure!(
        maps.iter().all(|map| last <= map.load(0)),
        "a mapping fell back"
    );
    Ok(())
}

/// Reads the file that `poll` reports as readable. Returns whether more is to come.
fn follow(seat: &Seat, file: &OwnedFd, said: Said, last: &mut u32) -> anyhow::Result<bool> {
    match said {
        Said::Nothing => {}
        Said::Gone => return gone_for_good(seat, file).map(|()| false),
        Said::Readable => match sys::read(file) {
            Ok(value) if *last < value => *last = value,
            Ok(value) => bail!("it was readable, but {value} is what was read last"),
            Err(Errno::NODEV) => return gone_for_good(seat, file).map(|()| false),
            Err(errno) => return Err(errno).context("read"),
        },
    }
    seat.did();
    Ok(seat.go_on())
}

/// The first read of a file. `None`: its device was unbound.
fn first(seat: &Seat, file: &OwnedFd) -> anyhow::Result<Option<u32>> {
    match sys::read(file) {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NODEV) => gone_for_good(seat, file).map(|()| None),
        Err(errno) => Err(errno).context("read"),
    }
}

fn polls(seat: &Seat, file: OwnedFd) -> anyhow::Result<()> {
    let Some(mut last) = first(seat, &file)? else {
        return Ok(());
    };
    for _ in 0..CALLS {
        let said = by_poll(&file, &MOMENT)?;
        if !follow(seat, &file, said, &mut last)? {
            break;
        }
    }
    Ok(())
}

fn epolls(seat: &Seat, file: OwnedFd) -> anyhow::Result<()> {
    let epolls = [
        Epoll::level_triggered(&file)?,
        Epoll::edge_triggered(&file)?,
    ];
    let Some(mut last) = first(seat, &file)? else {
        return Ok(());
    };
    for n in 0..CALLS {
        let said = epolls[n % 2].wait(&MOMENT)?;
        if !follow(seat, &file, said, &mut last)? {
            break;
        }
    }
    Ok(())
}

fn opens(seat: &Seat, file: OwnedFd) -> anyhow::Result<()> {
    let duplicate = rustix::io::fcntl_dupfd_cloexec(&file, 0)?;
    drop(file);
    match Map::readonly(&duplicate).map(drop) {
        Ok(()) => seat.did(),
        Err(Errno::NODEV) => gone_for_good(seat, &duplicate)?,
        Err(errno) => return Err(errno).context("mmap"),
    }
    Ok(())
}

fn forks(seat: &Seat, file: OwnedFd) -> anyhow::Result<()> {
    let map = match Map::readonly(&file) {
        Err(Errno::NODEV) => return gone_for_good(seat, &file),
        map => map.context("mmap")?,
    };
    let before = map.load(0);
    let child = || match sys::read(&file) {
        Ok(value) => (before..=map.load(0)).contains(&value),
        Err(errno) => errno == Errno::NODEV && map.load(0) >= before,
    };
    ensure!(sys::forked(child)?, "the child was told something else");
    seat.did();
    Ok(())
}

/// The processes, which are killed when this is dropped.
struct Processes {
    board: Board,
    children: Vec<Child>,
}

impl Processes {
    fn start(count: usize) -> anyhow::Result<Self> {
        ensure!(Board::WORDS * count < Board::SIZE / 4, "too many processes");
        let path = PathBuf::from("/tmp/stress");
        let _ = fs::remove_file(&path);
        let mut processes = Self {
            board: Board::open(&path)?,
            children: Vec::new(),
        };
        for seat in 0..count {
            let mut command = Command::new("/proc/self/exe");
            command.arg("busy").arg(&path).arg(seat.to_string());
            let child = command.stdin(Stdio::null()).spawn();
            processes.children.push(child.context("start a process")?);
        }
        Ok(processes)
    }

    /// Fails if a process has ended. The process has printed the reason.
    fn check(&mut self) -> anyhow::Result<()> {
        for child in &mut self.children {
            if let Some(status) = child.try_wait()? {
                bail!("one of the processes ended: {status}");
            }
        }
        Ok(())
    }

    fn sum(&self) -> [u64; Board::WORDS] {
        self.board.sum(0..self.children.len())
    }

    /// Waits until most of them have done something.
    fn let_them_work(&mut self) -> anyhow::Result<()> {
        let enough = self.sum()[0] + self.children.len() as u64;
        machine::within_a_minute("the processes use the node", || {
            self.check()?;
            Ok(self.sum()[0] >= enough)
        })
    }

    fn stop(mut self) -> anyhow::Result<()> {
        self.board.order().store(STOP, Relaxed);
        let ended = machine::within_a_minute("all processes end", || {
            Ok(self
                .children
                .iter_mut()
                .all(|child| !matches!(child.try_wait(), Ok(None))))
        });
        for (seat, child) in self.children.iter_mut().enumerate() {
            match child.try_wait()? {
                Some(status) => ensure!(status.success(), "process {seat} ended: {status}"),
                None => {
                    let stack = fs::read_to_string(format!("/proc/{}/stack", child.id()));
                    let (kind, _) = KINDS[seat % KINDS.len()];
                    println!("{kind}, process {seat} hangs: {stack:?}");
                }
            }
        }
        ended?;
        self.report()
    }

    fn report(&self) -> anyhow::Result<()> {
        for (n, (kind, _)) in KINDS.iter().enumerate() {
            let seats = (0..self.children.len()).filter(|seat| seat % KINDS.len() == n);
            let [did, gone, absent] = self.board.sum(seats);
            println!("{kind}: {did} calls, {gone} files gone, {absent} times no node");
            ensure!(did > 0 || self.children.len() <= n, "{kind} did nothing");
        }
        let [_, gone, absent] = self.sum();
        ensure!(gone > 0, "no process met an unbind");
        ensure!(absent > 0, "no process met a missing node");
        Ok(())
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What has been done so far.
#[derive(Default)]
struct Done {
    binds: u32,
    loads: u32,
    refused: u32,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let device = Device::bound()?;
    let before = look()?;
    let storm = machine::storm()?;
    let mut processes = Processes::start(args.processes)?;
    let mut done = Done::default();
    let (start, mut told) = (Instant::now(), Instant::now());
    let over = |done: &Done| match args.minutes {
        Some(minutes) => start.elapsed().as_secs() >= 60 * minutes,
        None => done.binds >= args.binds && done.loads >= args.loads,
    };

    processes.let_them_work()?;
    while !over(&done) {
        // Rebinds and reloads are mixed, so that both come to their end at the same time. With a
        // time limit there are 5 rebinds for each reload.
        let share = match args.minutes {
            Some(_) => done.binds > 5 * done.loads,
            None => done.loads * args.binds < done.binds * args.loads || done.binds >= args.binds,
        };
        if share {
            reload(&device, &processes, &mut done)
                .with_context(|| format!("reload {}", done.loads))?;
        } else {
            rebind(&device).with_context(|| format!("rebind {}", done.binds))?;
            done.binds += 1;
        }
        processes.let_them_work()?;
        if told.elapsed() >= Duration::from_secs(10) {
            told = Instant::now();
            tell(start, &done, &processes);
        }
    }
    tell(start, &done, &processes);
    processes.stop()?;
    drop(storm);
    let after = look()?;
    ensure!(before < after, "the counter has not changed");
    println!("the counter went from {before} to {after}");
    Ok(())
}

fn tell(start: Instant, done: &Done, processes: &Processes) {
    let [did, gone, absent] = processes.sum();
    println!(
        "{} s: {} unbind/bind, {} rmmod/insmod ({} refused); {did} calls, {gone} files gone, {absent} times no node",
        start.elapsed().as_secs(),
        done.binds,
        done.loads,
        done.refused
    );
}

fn rebind(device: &Device) -> anyhow::Result<()> {
    device.unbind()?;
    let open = sys::open(NODE).map(drop);
    ensure!(open == Err(Errno::NOENT), "open, when unbound: {open:?}");
    device.bind()?;
    look().map(drop)
}

fn reload(device: &Device, processes: &Processes, done: &mut Done) -> anyhow::Result<()> {
    // Meanwhile another process usually has a file open.
    let mut unload = || match machine::unload() {
        Err(Errno::AGAIN) => {
            done.refused += 1;
            Ok(false)
        }
        unloaded => unloaded.map(|()| true).context("rmmod"),
    };
    if !unload()? {
        // The module is unloaded with the device unbound, while all processes try to open the node,
        // or with the device bound, while all processes pause.
        if done.loads % 2 == 0 {
            device.unbind()?;
        } else {
            processes.board.order().store(PAUSE, Relaxed);
        }
        // On a busy host, processes of a low priority need a while to close the file.
        machine::within_minutes(5, "rmmod", &mut unload)?;
    }
    machine::load()?;
    processes.board.order().store(GO, Relaxed);
    done.loads += 1;
    look().map(drop)
}
