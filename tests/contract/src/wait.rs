// SPDX-License-Identifier: MIT OR Apache-2.0

//! The ways to wait for the counter to change. All have to give the same result.

use crate::sys::{self, Uring};
use anyhow::{Context, bail, ensure};
use rustix::{
    buffer::spare_capacity,
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    fd::OwnedFd,
    thread::gettid,
};
use std::{
    fs,
    io::Write,
    path::PathBuf,
    sync::mpsc,
    thread::{self, ScopedJoinHandle},
};

/// The events of a file for a process that waits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Said {
    Nothing,
    Readable,
    /// Its device is unbound.
    Gone,
}

pub type Way = fn(&OwnedFd, &Timespec) -> anyhow::Result<Said>;

pub const WAYS: [(&str, Way); 5] = [
    ("poll", by_poll),
    ("select", by_select),
    ("epoll", by_epoll),
    ("edge-triggered epoll", by_edge_triggered_epoll),
    ("io_uring", by_io_uring),
];

pub const NOW: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};
pub const SHORT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};
/// The bound for an event that is going to happen.
pub const LONG: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};

/// All events that can be requested. The file is never writable, and never has urgent data.
fn everything() -> PollFlags {
    use PollFlags as P;
    P::IN | P::RDNORM | P::RDBAND | P::PRI | P::OUT | P::WRNORM | P::WRBAND | P::RDHUP
}

fn meaning(flags: PollFlags) -> anyhow::Result<Said> {
    let readable = PollFlags::IN | PollFlags::RDNORM;
    let gone = PollFlags::HUP | PollFlags::ERR;
    match flags {
        flags if flags.is_empty() => Ok(Said::Nothing),
        flags if flags == readable => Ok(Said::Readable),
        flags if flags == gone => Ok(Said::Gone),
        flags => bail!("the flags are {flags:?}"),
    }
}

pub fn by_poll(file: &OwnedFd, timeout: &Timespec) -> anyhow::Result<Said> {
    let mut fds = [PollFd::new(file, everything())];
    let count = poll(&mut fds, Some(timeout)).context("poll")?;
    let said = meaning(fds[0].revents())?;
    ensure!((count == 0) == (said == Said::Nothing), "poll: {count}");
    Ok(said)
}

pub fn by_select(file: &OwnedFd, timeout: &Timespec) -> anyhow::Result<Said> {
    match sys::select(file, timeout).context("select")? {
        [false, false, false] => Ok(Said::Nothing),
        [true, false, false] => Ok(Said::Readable),
        // So the kernel translates POLLHUP and POLLERR.
        [true, true, false] => Ok(Said::Gone),
        sets => bail!("select: {sets:?}"),
    }
}

/// An epoll instance with one file.
pub struct Epoll(OwnedFd);

impl Epoll {
    pub fn new(file: &OwnedFd, how: epoll::EventFlags) -> anyhow::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).context("epoll_create")?;
        let flags = epoll::EventFlags::from_bits_retain(everything().bits().into());
        epoll::add(&epoll, file, epoll::EventData::new_u64(7), flags | how).context("epoll_ctl")?;
        Ok(Self(epoll))
    }

    pub fn level_triggered(file: &OwnedFd) -> anyhow::Result<Self> {
        Self::new(file, epoll::EventFlags::empty())
    }

    pub fn edge_triggered(file: &OwnedFd) -> anyhow::Result<Self> {
        Self::new(file, epoll::EventFlags::ET)
    }

    pub fn wait(&self, timeout: &Timespec) -> anyhow::Result<Said> {
        let mut list = Vec::with_capacity(2);
        epoll::wait(&self.0, spare_capacity(&mut list), Some(timeout)).context("epoll_wait")?;
        match list[..] {
            [] => Ok(Said::Nothing),
            [epoll::Event { flags, .. }] => {
                meaning(PollFlags::from_bits_retain(flags.bits() as u16))
            }
            _ => bail!("epoll has one file, and reports {}", list.len()),
        }
    }
}

fn by_epoll(file: &OwnedFd, timeout: &Timespec) -> anyhow::Result<Said> {
    Epoll::level_triggered(file)?.wait(timeout)
}

fn by_edge_triggered_epoll(file: &OwnedFd, timeout: &Timespec) -> anyhow::Result<Said> {
    Epoll::edge_triggered(file)?.wait(timeout)
}

fn by_io_uring(file: &OwnedFd, timeout: &Timespec) -> anyhow::Result<Said> {
    // With a timeout of 0, io_uring cannot tell "no event" from "not completed yet".
    let timeout = if *timeout == NOW { &SHORT } else { timeout };
    let flags = Uring::new()?.poll(file, everything(), timeout)?;
    meaning(flags.unwrap_or(PollFlags::empty()))
}

/// Checks in every way, without waiting, that the file has this state.
///
/// For a readable file this first waits: where the generator has to be reseeded, and that would
/// sleep, the file becomes readable when the driver's thread has reseeded, and `poll` then wakes
/// the waiters.
pub fn expect(file: &OwnedFd, expected: Said) -> anyhow::Result<()> {
    if expected == Said::Readable {
        let said = by_poll(file, &LONG)?;
        ensure!(
            said == expected,
            "poll: waited for {expected:?}, got {said:?}"
        );
    }
    for (name, way) in WAYS {
        let said = way(file, &NOW).context(name)?;
        ensure!(
            said == expected,
            "{name}: expected {expected:?}, got {said:?}"
        );
    }
    Ok(())
}

/// The system calls that these ways sleep in. Newer architectures lack the older ones.
const SLEEPS: &[i64] = &[
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_select,
    libc::SYS_pselect6,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_io_uring_enter,
];

/// Whether a thread sleeps in one of them, by its file `syscall` in /proc.
pub fn in_sleep(syscall: &str) -> bool {
    let number = syscall.split_whitespace().next().unwrap_or_default();
    number.parse().is_ok_and(|number| SLEEPS.contains(&number))
}

/// Calls `act` while one thread sleeps in each of the ways. Each thread has to be woken with the
/// expected result. It then calls `look`, which checks the state at that moment.
pub fn woken(
    file: &OwnedFd,
    expected: Said,
    look: impl Fn() -> anyhow::Result<()> + Sync,
    act: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    thread::scope(|scope| {
        let (send, sleeping) = mpsc::channel();
        let look = &look;
        let sleepers = WAYS.map(|(name, way)| {
            let send = send.clone();
            scope.spawn(move || -> anyhow::Result<()> {
                send.send(gettid())?;
                let said = way(file, &LONG).context(name)?;
                ensure!(
                    said == expected,
                    "{name}: woken for {expected:?}, got {said:?}"
                );
                look().context(name)
            })
        });
        for tid in sleeping.iter().take(WAYS.len()) {
            sleeps(tid.as_raw_pid(), &sleepers)?;
        }
        act()?;
        sleepers
            .into_iter()
            .try_for_each(|sleeper| sleeper.join().expect("a sleeper panicked"))
    })
}

/// Waits until a thread sleeps in one of these system calls.
fn sleeps<T>(tid: i32, sleepers: &[ScopedJoinHandle<'_, T>]) -> anyhow::Result<()> {
    crate::machine::within_a_minute("all sleep", || {
        ensure!(
            !sleepers.iter().any(ScopedJoinHandle::is_finished),
            "a thread did not wait, though nothing had happened"
        );
        let call = fs::read_to_string(format!("/proc/self/task/{tid}/syscall"))?;
        Ok(in_sleep(&call))
    })
}

#[derive(clap::Args)]
pub struct Args {
    /// Where to write one line for the start, and one for each change
    #[arg(long)]
    out: PathBuf,
}

/// Sleeps until the counter changes, and reads it; without end.
pub fn run(args: Args) -> anyhow::Result<()> {
    let file = sys::open(crate::NODE).with_context(|| format!("open {}", crate::NODE))?;
    let mut last = sys::read(&file).context("read")?;
    let mut out = fs::File::create(&args.out).with_context(|| format!("create {:?}", args.out))?;
    writeln!(out, "waiting, at {last}")?;
    loop {
        let mut fds = [PollFd::new(&file, PollFlags::IN)];
        poll(&mut fds, None).context("poll")?;
        let said = fds[0].revents();
        let read = sys::read(&file).context("read")?;
        writeln!(out, "from {last}: {said:?}, read {read}")?;
        last = read;
    }
}
