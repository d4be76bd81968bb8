// SPDX-License-Identifier: MIT OR Apache-2.0

//! Fault injection: each allocation, and each copy to or from userspace, that a call makes fails
//! once, one after the other, until the call has no further one. The kernel counts them
//! (`/proc/self/fail-nth`), both the driver's and its own.
//!
//! Once a fault is on its way, only the call under test may enter the kernel.

use crate::{
    NODE,
    machine::{self, Device, Log, driver},
    promises::plain,
    sys::{self, Map},
};
use anyhow::{Context, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    fd::OwnedFd,
    fs::OFlags,
    io::Errno,
};
use std::{collections::BTreeMap, fs, path::Path};

/// More faults than any call has: a walk that gets here does not end.
const MOST: u32 = 100_000;

#[derive(clap::ValueEnum, Clone, Copy)]
pub enum Call {
    /// The first probe after a load of the module.
    FirstBind,
    Bind,
    Open,
    Mmap,
    Readv,
    Poll,
    Epoll,
}

/// Walks through all faults of one call. Prints how many there were, and their outcomes.
pub fn walk(call: Call) -> anyhow::Result<()> {
    let faults = Faults::new()?;
    match call {
        Call::FirstBind => bind(&faults, true),
        Call::Bind => bind(&faults, false),
        Call::Open => calls(&faults, || Ok(()), |()| sys::open(NODE)),
        Call::Mmap => calls(&faults, || sys::open(NODE), Map::readonly),
        Call::Readv => reads(&faults),
        Call::Poll => calls(&faults, || sys::open(NODE), poll_once),
        Call::Epoll => calls(&faults, || sys::open(NODE), epoll_once),
    }
}

/// This process's faults.
struct Faults(OwnedFd);

impl Faults {
    fn new() -> anyhow::Result<Self> {
        let path = "/proc/self/fail-nth";
        Ok(Self(sys::open_as(path, OFlags::RDWR).context(path)?))
    }

    /// Makes the call, in which the fault number `nth` is injected. `None`: the call has fewer.
    fn inject<T>(&self, nth: u32, call: impl FnOnce() -> T) -> anyhow::Result<Option<T>> {
        let number = nth.to_string();
        rustix::io::pwrite(&self.0, number.as_bytes(), 0).context("fail-nth")?;
        let result = call();

        // Reading this file is also a copy to userspace, which fails if the fault is still due.
        let mut left = [b'?'; 16];
        let untouched = match rustix::io::pread(&self.0, &mut left, 0) {
            Ok(_) => left[0] != b'0',
            Err(_) => true,
        };
        // Writing to it fails for the same reason.
        while rustix::io::pwrite(&self.0, b"0", 0).is_err() {}
        Ok((!untouched).then_some(result))
    }
}

/// The outcomes of the faults, and how often each came.
#[derive(Default)]
struct Outcomes(BTreeMap<String, u32>);

impl Outcomes {
    fn add(&mut self, outcome: impl Into<String>) {
        *self.0.entry(outcome.into()).or_default() += 1;
    }

    fn say(&self) {
        println!("{} faults", self.0.values().sum::<u32>());
        for (outcome, count) in &self.0 {
            println!("{count} times: {outcome}");
        }
    }
}

/// Walks through the faults of a call, on a new subject each time. A call may fail with ENOMEM,
/// EFAULT or EINVAL, and the next one has to succeed.
fn calls<F, T>(
    faults: &Faults,
    make: impl Fn() -> rustix::io::Result<F>,
    call: impl Fn(&F) -> rustix::io::Result<T>,
) -> anyhow::Result<()> {
    let mut outcomes = Outcomes::default();
    for nth in 1..MOST {
        let subject = make().context("prepare")?;
        let Some(result) = faults.inject(nth, || call(&subject))? else {
            outcomes.say();
            return Ok(());
        };
        match result {
            Ok(_) => outcomes.add("harmless"),
            Err(Errno::NOMEM) => outcomes.add("NOMEM"),
            Err(Errno::FAULT) => outcomes.add("FAULT"),
            // mmap returns this where the kernel cannot record the memory's type.
            Err(Errno::INVAL) => outcomes.add("INVAL"),
            Err(errno) => bail!("fault {nth}: {errno:?}"),
        }
        call(&subject).with_context(|| format!("after fault {nth}"))?;
        plain().with_context(|| format!("after fault {nth}"))?;
    }
    bail!("no end")
}

fn is_readable(file: &OwnedFd) -> rustix::io::Result<bool> {
    let mut fds = [PollFd::new(file, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&Timespec::default()))? > 0)
}

fn poll_once(file: &OwnedFd) -> rustix::io::Result<()> {
    is_readable(file).map(drop)
}

fn epoll_once(file: &OwnedFd) -> rustix::io::Result<()> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(
        &epoll,
        file,
        epoll::EventData::new_u64(0),
        epoll::EventFlags::IN,
    )?;
    let mut events = [const { std::mem::MaybeUninit::uninit() }; 1];
    epoll::wait(&epoll, &mut events, Some(&Timespec::default())).map(drop)
}

/// Waits for another counter, then walks through the faults of a readv. A readv that cannot copy the
/// counter is EFAULT, and the file stays readable. (The kernel injects no fault into `put_user()`, by
/// which a read copies.)
fn reads(faults: &Faults) -> anyhow::Result<()> {
    let file = sys::open(NODE).context("open")?;
    let map = Map::readonly(&file).context("mmap")?;
    let before = sys::readv(&file).context("readv")?;
    println!("reading {before}");
    while map.load(0) == before {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    // A poll that must not wait can return before the kernel is reseeded.
    machine::within_a_minute("readable after the change", || Ok(is_readable(&file)?))?;

    let mut outcomes = Outcomes::default();
    for nth in 1..MOST {
        match faults.inject(nth, || sys::readv(&file))? {
            Some(Err(Errno::FAULT)) => {
                outcomes.add("FAULT");
                ensure!(is_readable(&file)?, "not readable after EFAULT");
            }
            Some(result) => bail!("fault {nth}: {result:?}"),
            None => {
                ensure!(!is_readable(&file)?, "readable after a readv");
                outcomes.say();
                return plain().map(drop);
            }
        }
    }
    bail!("no end")
}

/// The driver's messages about parts that it works without.
fn warnings(log: &mut Log) -> anyhow::Result<Vec<String>> {
    let mut lines = log.lines()?;
    let said = ["reseeding only", "no generation ID", NO_EARLY_LOOK];
    lines.retain(|line| said.iter().any(|said| line.contains(said)));
    Ok(lines)
}

const NO_EARLY_LOOK: &str = "no early look";

/// Whether the driver shares ACPI's interrupt.
fn looks_early() -> anyhow::Result<bool> {
    let interrupts = fs::read_to_string("/proc/interrupts")?;
    let handler = format!(", {}", machine::name());
    Ok(interrupts.lines().any(|line| line.ends_with(&handler)))
}

/// The outcome of a probe; an error if the outcome is not allowed.
fn outcome(device: &Device, log: &mut Log) -> anyhow::Result<&'static str> {
    let bound = device.is_bound();
    let registered = Path::new("/sys/class/misc/vmgenid").exists();
    let node = Path::new(NODE).exists();
    let warnings = warnings(log)?;
    let without = warnings.iter().any(|line| line.contains(NO_EARLY_LOOK));
    ensure!(
        looks_early()? == (bound && !without),
        "bound: {bound}, but it looks early: {}; {warnings:?}",
        looks_early()?
    );
    Ok(match (bound, registered, node, warnings.len()) {
        (true, true, true, 0) => {
            plain()?;
            "bound, all there"
        }
        (true, true, true, 1) if without => {
            plain()?;
            "bound without the early look, one line"
        }
        // devtmpfs, a part of the kernel, fails without a message.
        (true, true, false, 0) => "bound, but devtmpfs has no node",
        (true, false, false, 1) => "bound without a node, one line",
        (false, false, false, 0) => "not bound",
        (false, false, false, 1) => "not bound, one line",
        state => bail!("bound, registered, node, lines: {state:?}: {warnings:?}"),
    })
}

/// Walks through the faults of a probe. With `anew`, the module is reloaded before each probe.
fn bind(faults: &Faults, anew: bool) -> anyhow::Result<()> {
    let device = Device::bound()?;
    let mut log = Log::from_now_on()?;
    let reload = || -> anyhow::Result<()> {
        if anew {
            machine::unload().context("rmmod")?;
            machine::load()?;
        }
        Ok(())
    };
    // The kernel must not bind the device when the module is loaded.
    fs::write("/sys/bus/platform/drivers_autoprobe", "0").context("drivers_autoprobe")?;
    device.unbind().context("unbind")?;

    let mut outcomes = Outcomes::default();
    for nth in 1..MOST {
        reload()?;
        log.skip()?;
        let file = sys::open_as(&format!("{}/bind", driver()), OFlags::WRONLY).context("bind")?;
        let bind = || rustix::io::pwrite(&file, device.name().as_bytes(), 0);
        let result = faults.inject(nth, bind)?;
        drop(file);
        let outcome =
            outcome(&device, &mut log).with_context(|| format!("fault {nth}: {result:?}"))?;
        let bound = !outcome.starts_with("not");
        match result {
            Some(result) => {
                ensure!(
                    result.is_ok() == bound,
                    "fault {nth}: {result:?}, but {outcome}"
                );
                outcomes.add(outcome);
            }
            None => {
                ensure!(outcome == "bound, all there", "untouched, but {outcome}");
                outcomes.say();
                return Ok(());
            }
        }
        if bound {
            device
                .unbind()
                .with_context(|| format!("unbind after fault {nth}"))?;
        }
        // The next bind works.
        device
            .bind()
            .with_context(|| format!("bind after fault {nth}"))?;
        plain().with_context(|| format!("bound after fault {nth}"))?;
        device
            .unbind()
            .with_context(|| format!("unbind again after fault {nth}"))?;
        let left = Path::new(NODE).exists() || Path::new("/sys/class/misc/vmgenid").exists();
        ensure!(!left, "unbound after fault {nth}, and yet a node");
    }
    bail!("no end")
}

/// Prints the outcome of one probe, by an insmod or by a bind: for faults of functions, which the
/// kernel counts for all callers.
pub fn probe(again: bool) -> anyhow::Result<()> {
    let mut log = Log::from_now_on()?;
    // The name of the device in QEMU. `vmgenctr` makes its own device when it is loaded.
    let device = || Device::named("QEMUVGID:00");
    let result = if again {
        device().try_bind()
    } else {
        let module = sys::open("/vmgenid.ko").context("open the module")?;
        rustix::system::finit_module(&module, c"", 0).map_err(Into::into)
    };
    let outcome = outcome(&device(), &mut log)?;
    match result {
        Ok(()) => println!("{outcome}"),
        Err(err) => println!("{outcome}, {}", err.raw_os_error().unwrap_or_default()),
    }
    Ok(())
}
