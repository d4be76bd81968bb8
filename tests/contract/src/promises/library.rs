// SPDX-License-Identifier: MIT OR Apache-2.0

//! The promises of the crate `vmgenid` that need a device.

use crate::{
    NODE,
    actors::warm::hex,
    machine::{Device, Masked, a_while, change, private_node, reseeded_by, within_a_minute},
    promises::same,
    sys,
    wait::{Epoll, LONG, NOW, Said, in_sleep},
};
use anyhow::{Context, bail, ensure};
use chacha20::ChaCha20Rng;
use rand_core::{SeedableRng, TryRng};
use rustix::{
    fs::{Mode, chmod, stat},
    process::{Pid, Signal, getpid, kill_process},
    thread::{set_thread_gid, set_thread_uid},
};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{ErrorKind, Write},
    os::fd::AsFd,
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    thread,
    time::Duration,
};
use vmgenid::{Cached, Counter, Error, Generation, Guard, GuardedRng, Source, WithoutCounter};

pub type Rng = GuardedRng<ChaCha20Rng>;

fn guarded() -> anyhow::Result<Rng> {
    Ok(GuardedRng::new(Guard::open(WithoutCounter::Refuse)?)?)
}

fn draw(rng: &mut Rng) -> anyhow::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    rng.try_fill_bytes(&mut bytes)?;
    Ok(bytes)
}

/// Checks that a result is this error.
macro_rules! refused {
    ($result:expr, $pattern:pat $(if $guard:expr)?) => {
        match $result {
            Err($pattern) $(if $guard)? => {}
            Err(err) => bail!("{}: {err:?}", stringify!($result)),
            Ok(_) => bail!("{} is no error", stringify!($result)),
        }
    };
}

// Promises for which the counter need not change.

/// Expect that `/dev/vmgenid` is the best source, and that its generation is the counter that a
/// read returns, also by a file that the caller opened.
pub fn the_best_source_is_taken() -> anyhow::Result<()> {
    let counter = Counter::open()?;
    same("source", counter.source(), Source::Vmgenid)?;
    let read = u64::from(sys::read(&sys::open(NODE)?)?);
    same("get", counter.get().number(), read)?;
    same("barrier", counter.barrier()?.number(), read)?;
    let given = sys::open(NODE)?;
    let given = Counter::from_fd(Source::Vmgenid, given)?;
    same("get, of a file that was given", given.get(), counter.get())
}

/// Expect that a wait with a timeout returns nothing while the counter does not change, and that
/// epoll reports nothing.
pub fn who_waits_in_vain_is_told() -> anyhow::Result<()> {
    let counter = Counter::open()?;
    let since = counter.barrier()?;
    for timeout in [Duration::ZERO, Duration::from_millis(50)] {
        same("wait", counter.wait(since, Some(timeout))?, None)?;
    }
    same(
        "epoll",
        Epoll::level_triggered(&counter.as_fd().try_clone_to_owned()?)?.wait(&NOW)?,
        Said::Nothing,
    )
}

/// Expect that a node that the user may not open is an error, and is not taken for a machine
/// without a counter.
pub fn no_permission_is_said() -> anyhow::Result<()> {
    let _mode = Unreadable::new()?;
    let denied = as_nobody(|| {
        refused!(Counter::open(), Error::Open { error, .. } if error.kind() == ErrorKind::PermissionDenied);
        for without in [
            WithoutCounter::Refuse,
            WithoutCounter::RefuseWithoutBarrier,
            WithoutCounter::CacheNothing,
            WithoutCounter::NoticeForksOnly,
        ] {
            refused!(Guard::open(without), Error::Open { .. });
        }
        Ok(())
    })?;
    ensure!(denied, "see above");
    Ok(())
}

struct Unreadable(Mode);

impl Unreadable {
    fn new() -> anyhow::Result<Self> {
        let mode = Mode::from_raw_mode(stat(NODE).context("stat")?.st_mode);
        chmod(NODE, Mode::empty()).context("chmod")?;
        Ok(Self(mode))
    }
}

impl Drop for Unreadable {
    fn drop(&mut self) {
        let _ = chmod(NODE, self.0);
    }
}

/// Runs `what` in a child that has become the user `nobody`.
fn as_nobody(what: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<bool> {
    let nobody = 65534;
    in_child(|| {
        set_thread_gid(rustix::thread::Gid::from_raw(nobody)).context("setgid")?;
        set_thread_uid(rustix::thread::Uid::from_raw(nobody)).context("setuid")?;
        what()
    })
}

/// Starts a child, which prints what went wrong.
fn child(what: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Pid> {
    let child = || match what() {
        Ok(()) => true,
        Err(err) => {
            println!("in the child: {err:#}");
            false
        }
    };
    sys::fork(child).context("fork")
}

/// Runs `what` in a child, and returns whether it succeeded.
fn in_child(what: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<bool> {
    Ok(sys::ended(child(what)?)?)
}

/// Expect that a file which is not the source's device is refused: other devices, the device of
/// another source, a regular file, and a file opened for writing only.
pub fn another_device_is_refused() -> anyhow::Result<()> {
    for path in [
        "/dev/null",
        "/dev/zero",
        "/dev/console",
        "/dev/vda",
        "/dev/kmsg",
    ] {
        for &source in Source::ALL {
            refused!(Counter::open_path(source, path), Error::NotTheDevice { source: said, .. } if said == source);
        }
    }
    // A device of the right class, for the right source and for another one.
    let number = stat(NODE)?.st_rdev;
    private_node("/tmp/node", number)?;
    Counter::open_path(Source::Vmgenid, "/tmp/node").context("the device elsewhere")?;
    refused!(
        Counter::open_path(Source::Vmclock, "/tmp/node"),
        Error::NotTheDevice { .. }
    );
    refused!(
        Counter::from_fd(Source::Vmgenid, File::create("/tmp/file")?.into()),
        Error::NotTheDevice { .. }
    );
    let writer = sys::open_as("/tmp/node", rustix::fs::OFlags::WRONLY)?;
    refused!(
        Counter::from_fd(Source::Vmgenid, writer),
        Error::NotTheDevice { .. }
    );
    Ok(())
}

/// Expect that there is no counter while the device is unbound, and that a generator that may do
/// without one draws different bytes.
pub fn without_the_device_there_is_no_counter() -> anyhow::Result<()> {
    let device = Device::bound()?;
    device.unbind()?;
    let result = (|| {
        refused!(Counter::open(), Error::NoCounter);
        refused!(Guard::open(WithoutCounter::Refuse), Error::NoCounter);
        for without in [
            WithoutCounter::CacheNothing,
            WithoutCounter::NoticeForksOnly,
        ] {
            let mut rng = Rng::new(Guard::open(without)?)?;
            ensure!(
                draw(&mut rng)? != draw(&mut rng)?,
                "{without:?}: the same twice"
            );
        }
        Ok(())
    })();
    device.bind()?;
    result
}

// Promises for which the host changes the counter.

/// A cached value, which is how often it has been made.
fn counted() -> anyhow::Result<Cached<u32, impl FnMut() -> Result<u32, Error>>> {
    let guard = Guard::open(WithoutCounter::Refuse)?;
    let mut made = 0;
    Ok(Cached::new(guard, move || {
        made += 1;
        Ok::<_, Error>(made)
    })?)
}

/// Expect that `get` sees a change without a reseed, that a cached value is made anew once, after a
/// reseed, and that the late notification does not reseed again.
pub fn a_change_is_seen_and_the_barrier_reseeds() -> anyhow::Result<()> {
    let counter = Counter::open()?;
    let before = counter.barrier()?;
    let mut cached = counted()?;
    same("made", cached.with(|made| *made)?, 1)?;

    // The notification is held back, so it is the crate that reseeds the kernel.
    let masked = Masked::new()?;
    let mut log = crate::machine::Log::from_now_on()?;
    let value = u64::from(change()?);
    ensure!(counter.get() != before, "get: still {before}");
    a_while();
    same("reseeds before the barrier", log.reseeds()?, 0)?;
    let made = reseeded_by("the crate", || Ok(cached.with(|made| *made)?))?;
    same("made", made, 2)?;
    same("made", *cached.get()?, 2)?;
    same("barrier", counter.barrier()?.number(), value)?;
    same("get", counter.get().number(), value)?;
    drop(masked);
    log.expect_reseeds(1)
}

/// Expect that a wait returns a change that came before it, and that a change wakes a child and
/// several threads that wait on one counter, which another thread reads.
pub fn who_waits_is_woken() -> anyhow::Result<()> {
    let counter = Counter::open()?;
    let since = counter.barrier()?;
    let asleep = AtomicU32::new(0);
    let busy = AtomicBool::new(true);
    // A change that came before the wait.
    change()?;
    let new = counter.wait(since, None)?.context("no change")?;
    same("wait", Some(new), Some(counter.barrier()?))?;

    // A child of this process sleeps on a counter that it inherited.
    let child = child(|| {
        let newer = counter.wait(new, Some(Duration::from_secs(60)))?;
        ensure!(newer.is_some_and(|newer| newer != new), "{newer:?}");
        Ok(())
    })?;
    // Many threads sleep on the same one, while another one reads it.
    thread::scope(|scope| {
        let wait = || {
            asleep.fetch_add(1, Relaxed);
            counter.wait(new, Some(Duration::from_secs(60)))
        };
        let waiters: Vec<_> = (0..4).map(|_| scope.spawn(wait)).collect();
        scope.spawn(|| {
            while busy.load(Relaxed) {
                counter.barrier().expect("barrier");
            }
        });
        while asleep.load(Relaxed) < 4 {
            thread::yield_now();
        }
        a_while();
        let value = u64::from(change()?);
        for waiter in waiters {
            let woken = waiter.join().expect("a waiter panicked")?;
            same("woken", woken.map(Generation::number), Some(value))?;
        }
        ensure!(sys::ended(child)?, "the child");
        busy.store(false, Relaxed);
        Ok(())
    })
}

/// Expect that signals do not end a wait, and that a change does.
pub fn a_signal_does_not_end_a_wait() -> anyhow::Result<()> {
    sys::let_interrupt(Signal::USR1).context("sigaction")?;
    let counter = Counter::open()?;
    let since = counter.barrier()?;
    // A signal to the process goes to its first thread, which waits.
    let interrupt = || -> anyhow::Result<u32> {
        let call = format!("/proc/{}/syscall", getpid().as_raw_pid());
        for _ in 0..20 {
            within_a_minute("it sleeps", || Ok(in_sleep(&fs::read_to_string(&call)?)))?;
            kill_process(getpid(), Signal::USR1)?;
        }
        a_while();
        change()
    };
    thread::scope(|scope| {
        let interrupt = scope.spawn(interrupt);
        let woken = counter.wait(since, Some(Duration::from_secs(60)))?;
        let value = u64::from(interrupt.join().expect("panicked")?);
        same("woken", woken.map(Generation::number), Some(value))
    })
}

/// Expect that epoll reports the counter's file as readable from a change until the barrier.
pub fn an_event_loop_is_told() -> anyhow::Result<()> {
    let counter = Counter::open()?;
    let epoll = Epoll::level_triggered(&counter.as_fd().try_clone_to_owned()?)?;
    same("at first", epoll.wait(&NOW)?, Said::Nothing)?;
    change()?;
    same("changed", epoll.wait(&LONG)?, Said::Readable)?;
    same("not read", epoll.wait(&NOW)?, Said::Readable)?;
    counter.barrier()?;
    same("after the barrier", epoll.wait(&NOW)?, Said::Nothing)
}

/// Expect that waits and barriers fail after an unbind, that cached data stays valid until the
/// counter changes, that nothing is returned after that, and that a new guard works when the device
/// is bound again.
pub fn after_an_unbind_it_is_gone() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let counter = Counter::open()?;
    let before = counter.barrier()?;
    let mut rng = guarded()?;
    let mut cached = counted()?;
    draw(&mut rng)?;

    // A thread that waits is also told.
    thread::scope(|scope| {
        let waiter = scope.spawn(|| counter.wait(before, Some(Duration::from_secs(60))));
        a_while();
        device.unbind()?;
        refused!(waiter.join().expect("panicked"), Error::Gone);
        anyhow::Ok(())
    })?;
    refused!(counter.barrier(), Error::Gone);
    refused!(counter.wait(before, None), Error::Gone);
    // Nothing has changed, so the cached data stays valid.
    draw(&mut rng)?;
    same("made", cached.with(|made| *made)?, 1)?;

    // Something has changed: nothing is returned.
    change()?;
    ensure!(counter.get() != before, "the mapping does not follow");
    for _ in 0..3 {
        refused!(rng.try_next_u32(), Error::Gone);
        refused!(rng.try_next_u64(), Error::Gone);
        refused!(rng.try_fill_bytes(&mut [0; 1000]), Error::Gone);
        refused!(cached.get(), Error::Gone);
    }
    refused!(Guard::open(WithoutCounter::Refuse), Error::NoCounter);
    device.bind()?;
    draw(&mut guarded()?)?;
    Ok(())
}

/// Expect that a parent, its children and a grandchild draw different bytes, also from a generator
/// that was there before the fork.
pub fn a_child_draws_its_own() -> anyhow::Result<()> {
    let mut rng = guarded()?;
    let mut another = guarded()?;
    let mut bare = ChaCha20Rng::from_seed([7; 32]);
    draw(&mut rng)?;
    let (reader, writer) = rustix::pipe::pipe()?;
    let mut say = |name: &str, rng: &mut Rng| -> anyhow::Result<()> {
        let Ok(control) = bare.try_next_u64();
        let line = format!("{name} {} {control}\n", hex(&draw(rng)?));
        File::from(writer.try_clone()?).write_all(line.as_bytes())?;
        Ok(())
    };
    for child in ["first", "second"] {
        let done = in_child(|| {
            say(child, &mut rng)?;
            // A generator that this child has not used yet.
            say(child, &mut another)?;
            let done = in_child(|| {
                say("grandchild", &mut another)?;
                say("grandchild", &mut rng)
            })?;
            ensure!(done, "the grandchild");
            say(child, &mut rng)
        })?;
        ensure!(done, "{child}");
    }
    say("parent", &mut rng)?;
    say("parent", &mut another)?;
    drop(writer);
    let said = std::io::read_to_string(File::from(reader))?;

    let (mut draws, mut control) = (BTreeSet::new(), BTreeSet::new());
    for line in said.lines() {
        let words: Vec<_> = line.split(' ').collect();
        ensure!(
            draws.insert(words[1].to_owned()),
            "twice: {line}, of {said}"
        );
        control.insert(words[2].to_owned());
    }
    same("lines", draws.len(), 12)?;
    // The bare generator repeats itself, so the test can fail.
    ensure!(control.len() < 12, "the bare generator repeats nothing");
    Ok(())
}
