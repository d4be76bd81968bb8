// SPDX-License-Identifier: MIT OR Apache-2.0

//! What calls cost, and how long things take. With `-icount shift=0,sleep=off` a
//! guest's nanosecond is one instruction.

use crate::{
    NODE,
    actors::warm,
    machine::{Masked, change, reseeded_by, within_a_minute},
    sys,
    wait::{Epoll, LONG, Said},
};
use anyhow::{Context, bail, ensure};
use chacha20::ChaCha20Rng;
use rand_core::{SeedableRng, TryRng};
use rustix::{
    event::{PollFd, PollFlags},
    fd::OwnedFd,
};
use std::{
    array,
    convert::Infallible,
    fs,
    hint::{black_box, spin_loop},
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    thread,
    time::Duration,
};
use vmgenid::{Guard, GuardedRng, WithoutCounter};

const CALLS: u32 = 20_000;

/// How many changes of the counter are measured.
const CHANGES: u32 = 20;

pub const VMCLOCK: &str = "/dev/vmclock0";

/// The debugfs folder of our test module.
const VMFORKS: &str = "/sys/kernel/debug/vmforks";

#[derive(clap::Subcommand)]
pub enum What {
    /// Each call, one line each, as far as its device is there (the default)
    Calls,
    /// The first probe: a driver is bound to the device
    Probe { driver: String },
    /// From the notification to its end; the host has to change the counter
    Notification,
    /// The first read of a new counter, beside one forced reseed; the host has to change the
    /// counter
    Barrier,
    /// Many processes that map the page: the memory that this takes
    Mappings {
        #[arg(long)]
        count: u32,
    },
    /// Many waiters, each with a file and an epoll of its own: until the last one
    /// has been woken; the host has to change the counter
    Waiters {
        #[arg(long)]
        count: u32,
    },
    /// What happens when after a restore
    Timeline {
        /// Where to write it
        #[arg(long)]
        out: PathBuf,
        /// Read the device when the counter has changed
        #[arg(long)]
        barrier: bool,
    },
}

pub fn run(what: What) -> anyhow::Result<()> {
    match what {
        What::Calls => calls(),
        What::Probe { driver } => probe(&driver),
        What::Notification => notification(),
        What::Barrier => barrier(),
        What::Mappings { count } => mappings(count),
        What::Waiters { count } => waiters(count),
        What::Timeline { out, barrier } => timeline(&out, barrier),
    }
}

/// The least of five measurements of one call, in nanoseconds.
fn measure(mut call: impl FnMut()) -> f64 {
    let times: [f64; 5] = array::from_fn(|_| {
        let start = sys::now();
        for i in 0..CALLS {
            black_box(i);
            call();
        }
        (sys::now() - start) as f64 / f64::from(CALLS)
    });
    times.into_iter().fold(f64::INFINITY, f64::min)
}

/// The same, of a call that does not reseed the kernel's generator. (A young kernel also reseeds it
/// without a call.)
fn measure_without_reseed(mut call: impl FnMut()) -> anyhow::Result<f64> {
    for _ in 0..5 {
        let before = sys::reseeds()?;
        let least = measure(&mut call);
        if sys::reseeds()? == before {
            return Ok(least);
        }
    }
    bail!("the kernel's generator was reseeded in each measurement")
}

fn calls() -> anyhow::Result<()> {
    let empty = measure(|| ());
    let row = |what: &str, time: f64| println!("{what}: {:.1}", time - empty);
    let open = |path| sys::open(path).with_context(|| format!("open {path}"));
    let null = open("/dev/null")?;

    // What a library does before each use: compare, and branch away if it differs.
    let local = AtomicU32::new(7);
    row("check of a local variable", check(&local));
    row("read of /dev/null", measure(|| read(&null, 0)));

    if fs::exists(NODE)? {
        let file = open(NODE)?;
        let map = sys::Map::readonly(&file).context("mmap")?;
        row("check of the mapped counter", check(map.word(0)));
        row(
            "read of the counter",
            measure_without_reseed(|| read(&file, 4))?,
        );
        row(
            "poll",
            measure_without_reseed(|| {
                let mut fds = [PollFd::new(&file, PollFlags::IN)];
                assert!(rustix::event::poll(&mut fds, Some(&crate::wait::NOW)) == Ok(0));
            })?,
        );
        row(
            "open, mmap, touch, munmap, close",
            measure(|| use_once(NODE)),
        );
        library(row)?;
    }

    if fs::exists(VMCLOCK)? {
        let file = open(VMCLOCK)?;
        let map = sys::Map::readonly(&file).context("mmap")?;
        row("check of the mapped vmclock", check_vmclock(&map));
        let mut page = [0u8; 112];
        row(
            "pread of the vmclock, 112 bytes",
            measure(|| assert!(rustix::io::pread(&file, &mut page, 0) == Ok(112))),
        );
        row(
            "open, mmap, touch, munmap, close of the vmclock",
            measure(|| use_once(VMCLOCK)),
        );
    }
    Ok(())
}

/// A generator whose functions are not inlined. So the bare and the guarded measurement execute the
/// same code of it.
struct OutOfLine(ChaCha20Rng);

impl SeedableRng for OutOfLine {
    type Seed = [u8; 32];

    fn from_seed(seed: Self::Seed) -> Self {
        Self(ChaCha20Rng::from_seed(seed))
    }
}

impl TryRng for OutOfLine {
    type Error = Infallible;

    #[inline(never)]
    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        self.0.try_next_u32()
    }

    #[inline(never)]
    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        self.0.try_next_u64()
    }

    #[inline(never)]
    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        self.0.try_fill_bytes(bytes)
    }
}

/// The cost of the crate for a program that links it.
fn library(row: impl Fn(&str, f64)) -> anyhow::Result<()> {
    let guard = Guard::open(WithoutCounter::Refuse)?;
    let counter = black_box(guard.counter().context("no counter")?);
    let seeded = counter.barrier()?;
    row(
        "the crate's check of the counter",
        measure(move || assert!(counter.get() == seeded)),
    );
    let guard = black_box(&guard);
    let stamp = guard.barrier()?;
    row(
        "the crate's check of the counter and of forks",
        measure(move || assert!(guard.is_unchanged_since(&stamp))),
    );

    let mut bare = OutOfLine::from_seed([7; 32]);
    let mut guarded = GuardedRng::<OutOfLine>::new(guard.clone())?;
    let mut bytes = [0; 1024];
    for len in [16, 1024] {
        let bytes = &mut bytes[..len];
        row(
            &format!("ChaCha20, {len} bytes"),
            measure(|| {
                let bytes = black_box(&mut *bytes);
                let Ok(()) = bare.try_fill_bytes(bytes);
                // A caller would use the bytes.
                black_box(bytes);
            }),
        );
        row(
            &format!("ChaCha20, {len} bytes, guarded"),
            measure(|| {
                let bytes = black_box(&mut *bytes);
                if let Err(err) = guarded.try_fill_bytes(bytes) {
                    panic!("{err}");
                }
                black_box(bytes);
            }),
        );
    }
    Ok(())
}

fn read(file: &OwnedFd, len: usize) {
    let mut bytes = [0u8; 4];
    assert!(rustix::io::read(file, &mut bytes) == Ok(len));
}

fn use_once(path: &str) {
    let file = sys::open(path).expect("open");
    black_box(sys::Map::readonly(&file).expect("mmap").load(0));
}

/// Whether a word is unchanged.
fn check(word: &AtomicU32) -> f64 {
    let word = black_box(word);
    let seeded = word.load(Relaxed);
    measure(move || assert!(word.load(Relaxed) == seeded))
}

/// The same by the rules of `vmclock-abi.h`: the sequence count, the word (here
/// the low half of the disruption marker), the sequence count again.
fn check_vmclock(map: &sys::Map) -> f64 {
    let (sequence, marker) = black_box((map.word(3), map.word(4)));
    let seeded = marker.load(Relaxed);
    measure(move || {
        let before = sequence.load(Relaxed);
        let seen = marker.load(Relaxed);
        assert!(seen == seeded && before & 1 == 0 && sequence.load(Relaxed) == before);
    })
}

fn probe(driver: &str) -> anyhow::Result<()> {
    let devices = "/sys/bus/platform/devices";
    let device = fs::read_dir(devices)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find(|name| name.starts_with("QEMUVGID:"))
        .context("there is no device")?;
    let path = format!("/sys/bus/platform/drivers/{driver}/bind");
    let mut bind = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .with_context(|| format!("open {path}"))?;
    let start = sys::now();
    bind.write_all(device.as_bytes()).context("bind")?;
    println!("probe: {}", sys::now() - start);
    Ok(())
}

fn vmforks(name: &str) -> anyhow::Result<u64> {
    let path = format!("{VMFORKS}/{name}");
    let said = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(said.trim().parse()?)
}

fn notification() -> anyhow::Result<()> {
    // The host's notification is held back: the test module sends the one that is measured.
    let _masked = Masked::new()?;
    let [mut handled, mut notifiers] = [u64::MAX; 2];
    for _ in 0..CHANGES {
        let before = vmforks("count")?;
        change()?;
        reseeded_by("the notification", || {
            fs::write(format!("{VMFORKS}/notify"), "1").context("notify")
        })?;
        // The driver calls the notifiers from a work item, after the reseed.
        within_a_minute("the notifiers", || Ok(vmforks("count")? != before))?;
        ensure!(
            vmforks("count")? == before + 1,
            "the notifiers were not called once"
        );
        handled = handled.min(vmforks("handled")?);
        notifiers = notifiers.min(vmforks("took")?);
    }
    println!("notification until it is handled: {handled}");
    println!("notification to the vmfork notifiers: {notifiers}");
    Ok(())
}

/// Like a restore, except that the machine continues: the notification is held back, so that the
/// read finds the new ID.
fn barrier() -> anyhow::Result<()> {
    /// Of `linux/random.h`.
    const RNDRESEEDCRNG: u32 = 0x5207;
    let _masked = Masked::new()?;
    let random = sys::open("/dev/random").context("open /dev/random")?;
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    // How long a call takes, and how many reseeds there are in that time.
    let timed = |call: &dyn Fn() -> rustix::io::Result<()>| -> anyhow::Result<_> {
        let before = sys::reseeds()?;
        let start = sys::now();
        call()?;
        let time = sys::now() - start;
        Ok((time, sys::reseeds()? - before))
    };
    let [mut ioctl, mut read] = [(u64::MAX, 0); 2];
    for _ in 0..CHANGES {
        let forced = timed(&|| sys::ioctl(&random, RNDRESEEDCRNG, 0)).context("RNDRESEEDCRNG")?;
        ensure!(forced.1 > 0, "RNDRESEEDCRNG did not reseed");
        ioctl = ioctl.min(forced);
        let value = change()?;
        let barrier = timed(&|| sys::read(&file).map(|seen| assert!(seen == value)))?;
        ensure!(barrier.1 > 0, "a read of {value} did not reseed");
        read = read.min(barrier);
    }
    ensure!(ioctl.1 == 1, "{} reseeds in one", ioctl.1);
    println!("forced reseed (RNDRESEEDCRNG): {}", ioctl.0);
    println!("read of a new counter: {}", read.0);
    println!("reseeds in that read: {}", read.1);
    println!(
        "that read, in forced reseeds: {:.2}",
        read.0 as f64 / ioctl.0 as f64
    );
    Ok(())
}

/// Waits without a bound: where the guest's clock counts instructions, it advances fast while all
/// processes sleep.
fn until_told(epoll: &Epoll) -> anyhow::Result<Said> {
    loop {
        match epoll.wait(&LONG)? {
            Said::Nothing => {}
            said => return Ok(said),
        }
    }
}

fn timeline(out: &Path, barrier: bool) -> anyhow::Result<()> {
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    let map = sys::Map::readonly(&file).context("mmap")?;
    let last = sys::read(&file).context("read")?;
    let calls = vmforks("count")?;
    let part = out.with_extension("part");
    let mut to = fs::File::create(&part).with_context(|| format!("create {part:?}"))?;

    // A thread that sleeps until the counter changes.
    let waiter = sys::open(NODE)?;
    let epoll = Epoll::edge_triggered(&waiter)?;
    let waiter = thread::spawn(move || -> anyhow::Result<u64> {
        match until_told(&epoll)? {
            Said::Readable => Ok(sys::now()),
            said => bail!("the waiter: {said:?}"),
        }
    });
    // The thread sleeps before this one begins to spin, on the last CPU: interrupts go to the
    // first.
    thread::sleep(Duration::from_millis(100));
    warm::pin(thread::available_parallelism()?.get() - 1)?;
    println!("spinning on {last}");

    // `resumed` is the time before the last look that did not see the change: the restore came
    // after that time.
    let [mut before, mut resumed] = [sys::now(); 2];
    let mut reseeds = sys::reseeds()?;
    while map.load(0) == last {
        resumed = before;
        before = sys::now();
        reseeds = sys::reseeds()?;
        spin_loop();
    }
    let seen = sys::now();
    if barrier {
        sys::read(&file).context("read")?;
    }
    while sys::reseeds()? == reseeds {
        spin_loop();
    }
    let reseeded = sys::now();
    let woken = waiter.join().expect("the waiter panicked")?;

    let mut line = |what: &str, time: u64| writeln!(to, "{what}: {}", time as i64 - resumed as i64);
    line("counter seen by mapping", seen)?;
    let what = if barrier {
        "barrier done"
    } else {
        "kernel reseeded"
    };
    line(what, reseeded)?;
    line("poll woken", woken)?;
    // The notifiers may be called after the waiter is woken.
    within_a_minute("the notifiers", || Ok(vmforks("count")? != calls))?;
    line("vmfork notifiers called", vmforks("at")?)?;
    fs::rename(&part, out).context("rename")
}

/// The memory of this process, in bytes: resident memory and page tables.
fn memory() -> anyhow::Result<[u32; 2]> {
    let status = fs::read_to_string("/proc/self/status")?;
    let bytes = |name: &str| -> anyhow::Result<u32> {
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        Ok(1024 * kib.with_context(|| format!("no {name}"))?.parse::<u32>()?)
    };
    Ok([bytes("VmRSS:")?, bytes("VmPTE:")?])
}

fn mappings(count: u32) -> anyhow::Result<()> {
    let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
    // Shared by all: how many are done, how many could not do it, and the sums.
    let board = sys::Map::shared(sys::page())?;
    let child = || -> anyhow::Result<()> {
        // The first call allocates what the measurement itself needs.
        memory()?;
        let before = memory()?;
        let map = sys::Map::readonly(&file)?;
        black_box(map.load(0));
        let after = memory()?;
        // The mapping stays until the process ends.
        std::mem::forget(map);
        for n in 0..2 {
            board.word(2 + n).fetch_add(after[n] - before[n], Relaxed);
        }
        Ok(())
    };
    let mut pids = Vec::new();
    for _ in 0..count {
        pids.push(sys::fork(|| {
            let result = child();
            board
                .word(usize::from(result.is_err()))
                .fetch_add(1, Relaxed);
            loop {
                thread::park();
            }
        })?);
    }
    while board.load(0) + board.load(1) < count {
        thread::sleep(Duration::from_millis(10));
    }
    for pid in pids {
        sys::end(pid)?;
    }
    ensure!(board.load(1) == 0, "{} of {count} failed", board.load(1));
    println!("resident: {}", board.load(2));
    println!("page tables: {}", board.load(3));
    Ok(())
}

fn waiters(count: u32) -> anyhow::Result<()> {
    let _masked = Masked::new()?;
    let [asleep, awake, last] = array::from_fn(|_| AtomicU64::new(0));
    let mut woken = u64::MAX;
    // This program opens more files than the default limit.
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: Some(8192),
            maximum: Some(8192),
        },
    )?;
    thread::scope(|scope| -> anyhow::Result<()> {
        for _ in 0..count {
            let file = sys::open(NODE).with_context(|| format!("open {NODE}"))?;
            let epoll = Epoll::edge_triggered(&file)?;
            let (asleep, awake, last) = (&asleep, &awake, &last);
            let wait = move || {
                asleep.fetch_add(1, Relaxed);
                let said = until_told(&epoll);
                // The file is open until here: the epoll would drop a file that is closed.
                drop(file);
                last.fetch_max(sys::now(), Relaxed);
                awake.fetch_add(1, Relaxed);
                assert!(matches!(said, Ok(Said::Readable)), "a waiter: {said:?}");
            };
            // The stacks are small, since there are many.
            let thread = thread::Builder::new().stack_size(1 << 16);
            thread.spawn_scoped(scope, wait)?;
        }
        while asleep.load(Relaxed) < count.into() {
            thread::sleep(Duration::from_millis(10));
        }
        // A waiter counts itself before it sleeps.
        thread::sleep(Duration::from_secs(1));
        change()?;
        let start = sys::now();
        fs::write(format!("{VMFORKS}/notify"), "1").context("notify")?;
        while awake.load(Relaxed) < count.into() {
            thread::sleep(Duration::from_millis(10));
        }
        woken = last.load(Relaxed) - start;
        Ok(())
    })?;
    println!("woken: {woken}");
    Ok(())
}
