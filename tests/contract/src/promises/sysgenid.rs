// SPDX-License-Identifier: MIT OR Apache-2.0

//! The promises of `/dev/sysgenid`: those of SysGenID's driver that `Documentation/sysgenid.rst`
//! names. The host changes the counter on request.

use crate::{
    machine::{
        Device, Log, Masked, a_while, change, reseeded_by, told_of, unload, within_a_minute,
    },
    promises::{fails, same},
    sys::{self, Map, page},
    wait::{Epoll, LONG, NOW, Said, by_poll, expect, woken},
};
use anyhow::{Context, ensure};
use rustix::{
    fd::OwnedFd,
    fs::{FileType, OFlags},
    io::{Errno, IoSliceMut},
    mm::{MapFlags, MprotectFlags, ProtFlags},
    process::{Pid, Signal, WaitOptions, kill_process, waitpid},
};
use std::{fs, thread, time::Duration};
use vmgenid::{Counter, Error, Guard, Source, WithoutCounter};

const NODE: &str = "/dev/sysgenid";

fn open() -> anyhow::Result<OwnedFd> {
    sys::open(NODE).with_context(|| format!("open {NODE}"))
}

/// Opens the node as root can, to acknowledge. Its reads do not wait.
fn open_to_write() -> anyhow::Result<OwnedFd> {
    sys::open_as(NODE, OFlags::RDWR | OFlags::NONBLOCK).with_context(|| format!("open {NODE}"))
}

fn mapped() -> anyhow::Result<Map> {
    Map::readonly(&open()?).context("mmap")
}

fn acknowledge(file: &OwnedFd, count: u32) -> rustix::io::Result<usize> {
    rustix::io::write(file, &count.to_ne_bytes())
}

/// Has the counter changed, and returns the new count.
fn changed() -> anyhow::Result<u32> {
    let map = mapped()?;
    let before = map.load(0);
    change()?;
    within_a_minute("the count", || Ok(map.load(0) != before))?;
    let after = map.load(0);
    same("the count", after, before.wrapping_add(1))?;
    Ok(after)
}

/// Expect that the node is a character device of the misc class with mode 0444.
pub fn the_node_is_a_misc_device_that_everybody_can_read() -> anyhow::Result<()> {
    let stat = rustix::fs::stat(NODE)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    same("type", kind, FileType::CharacterDevice)?;
    same("mode", stat.st_mode & 0o7777, 0o444)?;
    same("major number", rustix::fs::major(stat.st_rdev), 10)
}

/// Expect that a read with O_NONBLOCK is EAGAIN until there is a new count, that it then returns 4
/// bytes at any offset, that a count from 1 to 3 is EINVAL, and that a bad buffer is EFAULT.
pub fn a_read_waits_for_what_is_new() -> anyhow::Result<()> {
    let file = open_to_write()?;
    let mut bytes = [0; 8];
    same("read of 0", rustix::io::read(&file, &mut [0; 0])?, 0)?;
    for len in 1..4 {
        let read = rustix::io::read(&file, &mut bytes[..len]);
        fails(&format!("read of {len}"), read, Errno::INVAL)?;
    }
    for len in [4, 5, 8] {
        let read = rustix::io::read(&file, &mut bytes[..len]);
        fails(&format!("read of {len}"), read, Errno::AGAIN)?;
    }
    let slices = &mut [IoSliceMut::new(&mut bytes)];
    fails("readv", rustix::io::readv(&file, slices), Errno::AGAIN)?;

    let count = changed()?;
    for len in [4, 5, 8] {
        let mut bytes = [0xff; 8];
        same("read", rustix::io::read(&file, &mut bytes[..len])?, 4)?;
        same(
            "the count",
            u32::from_ne_bytes(bytes[..4].try_into()?),
            count,
        )?;
        same("what is after it", &bytes[4..], &[0xff; 4][..])?;
    }
    let (mut one, mut two) = ([0; 1], [0; 3]);
    let slices = &mut [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)];
    same("readv", rustix::io::readv(&file, slices)?, 4)?;
    let bytes = [one[0], two[0], two[1], two[2]];
    same("the count", u32::from_ne_bytes(bytes), count)?;
    // The offset makes no difference.
    let mut bytes = [0; 4];
    same("pread", rustix::io::pread(&file, &mut bytes, 4096)?, 4)?;
    let bad = Map::anonymous(page())?;
    bad.protect(0, MprotectFlags::empty())?;
    let read = sys::read_at_address(&file, bad.address(), 4);
    fails("read to nowhere", read, Errno::FAULT)
}

/// Expect that only a write of 4 bytes with the present count, to a file opened for writing, is an
/// acknowledgement, and that the file is readable until then.
pub fn only_what_is_so_can_be_acknowledged() -> anyhow::Result<()> {
    let file = open_to_write()?;
    let old = mapped()?.load(0);
    same("write of what is known", acknowledge(&file, old)?, 4)?;
    let count = changed()?;
    for wrong in [old, count.wrapping_add(1), !count] {
        fails("write of another", acknowledge(&file, wrong), Errno::INVAL)?;
    }
    for len in [0, 1, 3, 5, 8] {
        let write = rustix::io::write(&file, &[0; 8][..len]);
        fails(&format!("write of {len}"), write, Errno::NOBUFS)?;
    }
    let bad = Map::anonymous(page())?;
    bad.protect(0, MprotectFlags::empty())?;
    let write = sys::write_at_address(&file, bad.address(), 4);
    fails("write from nowhere", write, Errno::FAULT)?;
    expect(&file, Said::Readable).context("after all of these")?;
    same("write", acknowledge(&file, count)?, 4)?;
    expect(&file, Said::Nothing)?;
    fails("read", sys::read(&file), Errno::AGAIN)?;
    same("write, again", acknowledge(&file, count)?, 4)?;
    // A file opened for reading cannot acknowledge.
    fails("write", acknowledge(&open()?, count), Errno::BADF)
}

/// Expect that one page can be mapped, at offset 0 and only to read, that all its words but the
/// first are zeros, and that a child sees changes in a mapping that it inherited.
pub fn the_page_is_mapped_read_only() -> anyhow::Result<()> {
    let file = open()?;
    let (read, write, exec) = (ProtFlags::READ, ProtFlags::WRITE, ProtFlags::EXEC);
    for flags in [MapFlags::SHARED, MapFlags::PRIVATE] {
        for len in [1, 4, page()] {
            let map = Map::of(&file, len, read, flags, 0)?;
            map.load(0);
            for word in 1..page() / 4 {
                same(&format!("word {word}"), map.load(word), 0)?;
            }
            for prot in [MprotectFlags::WRITE, MprotectFlags::EXEC] {
                let protect = map.protect(0, MprotectFlags::READ | prot);
                fails(&format!("mprotect {prot:?}"), protect, Errno::ACCESS)?;
            }
        }
        for (len, offset) in [(page(), page()), (2 * page(), 0)] {
            let map = Map::of(&file, len, read, flags, offset as u64);
            let map = map.map(|map| map.address());
            fails(&format!("{len} at {offset}"), map, Errno::INVAL)?;
        }
        let map = Map::of(&file, page(), read | exec, flags, 0).map(|map| map.address());
        fails("to execute", map, Errno::PERM)?;
        let writer = open_to_write()?;
        let map = Map::of(&writer, page(), read | write, flags, 0).map(|map| map.address());
        fails("to write", map, Errno::PERM)?;
    }
    let mut map = Map::readonly(&file)?;
    fails("mremap", map.grow(2 * page()), Errno::FAULT)?;
    let inherited = || changed().is_ok_and(|count| map.load(0) == count);
    ensure!(sys::forked(inherited)?, "a child does not see the change");
    Ok(())
}

/// Expect that `SYSGENID_SET_WATCHER_TRACKING`, `_WAIT_WATCHERS` and `_TRIGGER_GEN_UPDATE` of
/// Amazon Linux's `include/uapi/linux/sysgenid.h` are ENOTTY and do not change the count.
pub fn the_watcher_ioctls_are_missing() -> anyhow::Result<()> {
    let file = open_to_write()?;
    let before = mapped()?.load(0);
    for number in 1..4 {
        let ioctl = sys::ioctl(&file, 0xe400 | number, 1);
        fails(&format!("ioctl {number}"), ioctl, Errno::NOTTY)?;
    }
    fails("ioctl", sys::unknown_ioctl(&file), Errno::NOTTY)?;
    same("the count", mapped()?.load(0), before)
}

/// Expect that while notifications are held back, the count changes only when a read of the other
/// node or a call on this one has reseeded the kernel, and that the late notification does not
/// change it.
pub fn the_page_changes_after_the_reseed() -> anyhow::Result<()> {
    let map = mapped()?;
    let counter = sys::open(crate::NODE)?;
    let mut log = Log::from_now_on()?;
    let masked = Masked::new()?;
    let mut expected = map.load(0);
    // A read of the other node, and each call on this one. A file that is opened now knows the
    // present count: its read waits for the next one.
    let nonblock = open_to_write()?;
    let looks: [(&str, &dyn Fn() -> anyhow::Result<()>); 4] = [
        ("read of the counter", &|| {
            sys::read(&counter).map(drop).map_err(Into::into)
        }),
        ("read", &|| {
            sys::read(&open()?).map(drop).map_err(Into::into)
        }),
        ("read, O_NONBLOCK", &|| {
            within_a_minute("read", || match sys::read(&nonblock) {
                Err(Errno::AGAIN) => Ok(false),
                read => Ok(read.map(|_| true)?),
            })
        }),
        ("poll", &|| {
            same("poll", by_poll(&nonblock, &LONG)?, Said::Readable)
        }),
    ];
    let changes = looks.len();
    for (name, look) in looks {
        change()?;
        a_while();
        same("the count, before the reseed", map.load(0), expected)?;
        acknowledge(&nonblock, expected)?;
        reseeded_by(name, look)?;
        expected = expected.wrapping_add(1);
        same(name, map.load(0), expected)?;
    }
    drop(masked);
    log.expect_reseeds(told_of(changes))?;
    same("the count, after the notification", map.load(0), expected)
}

/// Expect that a change wakes each way to wait, and that it can be read and polled until it is
/// acknowledged.
pub fn a_change_is_new_until_it_is_acknowledged() -> anyhow::Result<()> {
    let file = open_to_write()?;
    let level = Epoll::level_triggered(&file)?;
    expect(&file, Said::Nothing)?;
    for _ in 0..3 {
        woken(&file, Said::Readable, || Ok(()), || changed().map(drop))?;
        let count = mapped()?.load(0);
        for _ in 0..3 {
            expect(&file, Said::Readable)?;
            same("read", sys::read(&file)?, count)?;
        }
        same("level-triggered epoll", level.wait(&LONG)?, Said::Readable)?;
        acknowledge(&file, count)?;
        expect(&file, Said::Nothing)?;
        same("level-triggered epoll", level.wait(&NOW)?, Said::Nothing)?;
    }
    Ok(())
}

/// Starts a child that sleeps in `read`, and that succeeds if the result is this one.
fn reader(expected: Result<u32, Errno>) -> anyhow::Result<Pid> {
    let file = open()?;
    let pid = sys::fork(|| sys::read(&file) == expected).context("fork")?;
    let call = format!("/proc/{}/syscall", pid.as_raw_pid());
    within_a_minute("the reader sleeps", || {
        let read = format!("{} ", libc::SYS_read);
        Ok(fs::read_to_string(&call)?.starts_with(&read))
    })?;
    Ok(pid)
}

/// Expect that a change wakes all processes that sleep in `read`, with the new count.
pub fn a_reader_is_woken() -> anyhow::Result<()> {
    let next = mapped()?.load(0).wrapping_add(1);
    let readers = [reader(Ok(next))?, reader(Ok(next))?];
    a_while();
    same("the count", changed()?, next)?;
    for reader in readers {
        ensure!(sys::ended(reader)?, "a reader got something else");
    }
    Ok(())
}

/// Expect that a signal ends a process that sleeps in `read`.
pub fn a_signal_ends_a_read() -> anyhow::Result<()> {
    let reader = reader(Ok(0))?;
    kill_process(reader, Signal::TERM)?;
    within_a_minute("the reader ends", || {
        let ended = waitpid(Some(reader), WaitOptions::NOHANG)?;
        Ok(ended.is_some_and(|(_, status)| status.terminating_signal() == Some(libc::SIGTERM)))
    })
}

/// Expect that an acknowledgement is for one open file and its duplicates, and that a file that is
/// opened later knows the count.
pub fn each_file_has_its_own_acknowledgement() -> anyhow::Result<()> {
    let [one, two] = [open_to_write()?, open_to_write()?];
    let count = changed()?;
    acknowledge(&one, count)?;
    expect(&one, Said::Nothing)?;
    expect(&two, Said::Readable)?;
    // A file that is opened later knows the count already.
    expect(&open()?, Said::Nothing)?;
    let duplicate = rustix::io::fcntl_dupfd_cloexec(&two, 0)?;
    acknowledge(&duplicate, count)?;
    expect(&two, Said::Nothing)
}

/// Expect that the crate waits for this node, acknowledges its count and reseeds by its barrier,
/// that a guard that demands a barrier refuses it, and that the crate reports an unbind.
pub fn the_library_uses_it() -> anyhow::Result<()> {
    let best = Counter::open()?;
    same("the best source", best.source(), Source::Vmgenid)?;
    let counter = Counter::open_path(Source::Sysgenid, NODE)?;
    let before = counter.barrier()?;
    same("get", counter.get(), before)?;
    let short = Some(Duration::from_millis(50));
    same("wait", counter.wait(before, short)?, None)?;
    thread::scope(|scope| {
        let waiter = scope.spawn(|| counter.wait(before, Some(Duration::from_secs(60))));
        a_while();
        let count = u64::from(changed()?);
        let woken = waiter.join().expect("panicked")?;
        same("wait", woken.map(|new| new.number()), Some(count))
    })?;
    // It has been acknowledged.
    same("wait", counter.wait(counter.get(), short)?, None)?;
    // The best source that is left has no barrier.
    let hidden = "/dev/hidden";
    fs::rename(crate::NODE, hidden)?;
    let guard = Guard::open(WithoutCounter::RefuseWithoutBarrier);
    fs::rename(hidden, crate::NODE)?;
    ensure!(
        matches!(
            guard,
            Err(Error::NoBarrier {
                source: Source::Sysgenid
            })
        ),
        "a guard that demands a barrier: {guard:?}"
    );
    let epoll = Epoll::level_triggered(&open_to_write()?)?;
    same("epoll", epoll.wait(&NOW)?, Said::Nothing)?;

    // The crate's barrier polls the node, which makes this driver reseed the kernel.
    let masked = Masked::new()?;
    let mut log = Log::from_now_on()?;
    let before = counter.get();
    change()?;
    a_while();
    same("before the barrier", counter.get(), before)?;
    let after = reseeded_by("the barrier", || Ok(counter.barrier()?))?;
    ensure!(after != before, "the barrier has changed nothing");
    drop(masked);
    log.expect_reseeds(1)?;

    let device = Device::bound()?;
    let guard = Guard::new(counter.into());
    let counter = guard.counter().context("no counter")?;
    let stamp = guard.barrier()?;
    device.unbind()?;
    let gone = [
        counter.wait(counter.get(), None).map(drop),
        counter.barrier().map(drop),
        guard.barrier().map(drop),
    ];
    let unchanged = guard.is_unchanged_since(&stamp);
    device.bind()?;
    for gone in gone {
        ensure!(matches!(gone, Err(Error::Gone)), "it is not gone: {gone:?}");
    }
    ensure!(!unchanged, "a stamp is still valid after the unbind");
    Ok(())
}

/// Expect that an unbind wakes each way to wait, that read, write and mmap of the old file are
/// ENODEV, that there is no node, and that only a new file works after a rebind.
pub fn an_unbound_device_answers_enodev() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let file = open_to_write()?;
    let reader = reader(Err(Errno::NODEV))?;
    woken(&file, Said::Gone, || Ok(()), || device.unbind())?;
    ensure!(sys::ended(reader)?, "a reader got something else");
    fails("read", sys::read(&file), Errno::NODEV)?;
    fails("write", acknowledge(&file, 0), Errno::NODEV)?;
    fails("mmap", Map::readonly(&file).map(drop), Errno::NODEV)?;
    expect(&file, Said::Gone)?;
    ensure!(!fs::exists(NODE)?, "there is a node");
    device.bind()?;
    fails("read of the old file", sys::read(&file), Errno::NODEV)?;
    expect(&open()?, Said::Nothing)
}

/// Expect that a mapping counts the unbind, does not count a change while the device is unbound,
/// and follows the count after the bind.
pub fn a_mapping_follows_after_a_rebind() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let map = mapped()?;
    let before = map.load(0);
    device.unbind()?;
    // The unbind changes the count, so that a process that only maps the page calls the driver.
    same("unbound", map.load(0), before.wrapping_add(1))?;
    change()?;
    a_while();
    same("while it is unbound", map.load(0), before.wrapping_add(1))?;
    device.bind()?;
    same("after the bind", map.load(0), before.wrapping_add(2))?;
    same("a new mapping", mapped()?.load(0), map.load(0))?;
    same("the next", changed()?, map.load(0))
}

/// Expect that an unbind reseeds the kernel for a change that is due, and counts both that change
/// and itself.
pub fn an_unbind_reseeds_what_is_due() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let map = mapped()?;
    let mut log = Log::from_now_on()?;
    let masked = Masked::new()?;
    change()?;
    a_while();
    let before = map.load(0);
    same("reseeds before", log.reseeds()?, 0)?;
    let unbound = reseeded_by("the unbind", || device.unbind());
    let changes = map.load(0).wrapping_sub(before);
    device.bind()?;
    drop(masked);
    unbound?;
    same("changes", changes, 2)?;
    log.expect_reseeds(1)
}

/// Expect that the unload of the module is EAGAIN while the node is open or mapped.
pub fn the_module_stays_while_it_is_mapped() -> anyhow::Result<()> {
    let file = open()?;
    fails("rmmod, while it is open", unload(), Errno::AGAIN)?;
    let map = Map::readonly(&file)?;
    drop(file);
    fails("rmmod, while it is mapped", unload(), Errno::AGAIN)?;
    map.load(0);
    Ok(())
}
