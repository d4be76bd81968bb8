// SPDX-License-Identifier: MIT OR Apache-2.0

//! `poll`, and the calls that depend on it.

use crate::{
    button::Button,
    machine::{Device, Log, Masked, a_while, change, reseeded_by},
    promises::{fails, open, same},
    sys::{self, Map, Uring, page},
    wait::{Epoll, LONG, NOW, SHORT, Said, WAYS, by_poll, expect, woken},
};
use anyhow::{Context, ensure};
use rustix::{
    fd::OwnedFd,
    fs::OFlags,
    io::{Errno, IoSliceMut, ReadWriteFlags},
    mm::MprotectFlags,
};

// Promises for which the counter does not change.

/// Expect that no way to poll reports anything while the counter does not change, after the open
/// and after a read, also for a file opened for writing.
pub fn nothing_is_readable_until_the_counter_changes() -> anyhow::Result<()> {
    let file = open()?;
    expect(&file, Said::Nothing).context("at open")?;
    sys::read(&file)?;
    expect(&file, Said::Nothing).context("after read")?;
    let writer = sys::open_as(crate::NODE, OFlags::RDWR).context("open as root, to write")?;
    expect(&writer, Said::Nothing).context("a file to write to")
}

/// Expect that each way to wait reports nothing within 50 ms.
pub fn who_waits_for_nothing_waits() -> anyhow::Result<()> {
    let file = open()?;
    for (name, way) in WAYS {
        same(name, way(&file, &SHORT)?, Said::Nothing)?;
    }
    Ok(())
}

/// Expect that io_uring's read returns an unchanged counter.
pub fn io_uring_reads_an_unchanged_counter_at_once() -> anyhow::Result<()> {
    let file = open()?;
    let expected = sys::read(&file)?;
    for _ in 0..10 {
        let read = Uring::new()?.read(&file, &LONG)?;
        same("io_uring's read", read, Some(expected))?;
    }
    Ok(())
}

/// Reads by `preadv2(2)` with RWF_NOWAIT: the answer at once, or `EAGAIN`.
pub fn read_nowait(file: &OwnedFd) -> rustix::io::Result<u32> {
    let mut bytes = [0; 4];
    let slices = &mut [IoSliceMut::new(&mut bytes)];
    match rustix::io::preadv2(file, slices, 0, ReadWriteFlags::NOWAIT)? {
        4 => Ok(u32::from_ne_bytes(bytes)),
        _ => Err(Errno::IO),
    }
}

/// Expect that preadv2 with RWF_NOWAIT returns an unchanged counter.
pub fn a_read_that_may_not_wait_need_not() -> anyhow::Result<()> {
    let file = open()?;
    let expected = sys::read(&file)?;
    same("preadv2, RWF_NOWAIT", read_nowait(&file)?, expected)
}

/// Expect that an unbind wakes each way to wait with a hangup, that all of them report it from then
/// on (edge-triggered epoll once), that reads which must not wait are ENODEV, and that only a new
/// file works after a rebind.
pub fn an_unbound_device_hangs_up() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let file = open()?;
    let level = Epoll::level_triggered(&file)?;
    let edge = Epoll::edge_triggered(&file)?;
    woken(&file, Said::Gone, || Ok(()), || device.unbind())?;
    expect(&file, Said::Gone)?;
    same("level-triggered epoll", level.wait(&LONG)?, Said::Gone)?;
    same("it, again", level.wait(&NOW)?, Said::Gone)?;
    same("edge-triggered epoll", edge.wait(&LONG)?, Said::Gone)?;
    same("it, again", edge.wait(&NOW)?, Said::Nothing)?;
    fails("preadv2, RWF_NOWAIT", read_nowait(&file), Errno::NODEV)?;
    let read = Uring::new()?.read(&file, &LONG);
    let errno = read.map_err(|err| err.downcast_ref().copied().unwrap_or(Errno::IO));
    fails("io_uring's read", errno, Errno::NODEV)?;

    device.bind()?;
    expect(&file, Said::Gone).context("the old file")?;
    expect(&open()?, Said::Nothing).context("a new file")
}

// Promises for which the counter changes.

/// Expect that a change is readable in every way until it is read, and that it is not for a file
/// that is opened after it.
pub fn a_change_is_readable_until_it_is_read() -> anyhow::Result<()> {
    let file = open()?;
    let mut log = Log::from_now_on()?;
    for _ in 0..3 {
        let value = change()?;
        log.await_reseed()?;
        for _ in 0..3 {
            expect(&file, Said::Readable).context("before read")?;
        }
        same("read", sys::read(&file)?, value)?;
        expect(&file, Said::Nothing).context("after read")?;
    }
    // A file that is opened later starts with the value at that time.
    change()?;
    expect(&file, Said::Readable)?;
    expect(&open()?, Said::Nothing).context("a file opened since")
}

/// Expect that a file is not readable any more after a read of any kind.
pub fn every_way_to_read_takes_note() -> anyhow::Result<()> {
    let file = open()?;
    let mut bytes = [0; 4];
    let mut other = [0; 2];
    let check = |name: &str, read: &mut dyn FnMut() -> anyhow::Result<()>| {
        change()?;
        expect(&file, Said::Readable).context("before")?;
        read().with_context(|| name.to_string())?;
        expect(&file, Said::Nothing).with_context(|| name.to_string())
    };
    check("read", &mut || {
        sys::read(&file).map(drop).map_err(Into::into)
    })?;
    check("pread", &mut || {
        same("length", rustix::io::pread(&file, &mut bytes, 0)?, 4)
    })?;
    check("readv", &mut || {
        let (one, two) = bytes.split_at_mut(2);
        let slices = &mut [IoSliceMut::new(one), IoSliceMut::new(two)];
        same("length", rustix::io::readv(&file, slices)?, 4)
    })?;
    check("preadv", &mut || {
        let slices = &mut [
            IoSliceMut::new(&mut other),
            IoSliceMut::new(&mut bytes[..2]),
        ];
        same("length", rustix::io::preadv(&file, slices, 0)?, 4)
    })?;
    check("preadv2, RWF_NOWAIT", &mut || {
        read_nowait(&file).map(drop).map_err(Into::into)
    })?;
    check("io_uring", &mut || {
        Uring::new()?.read(&file, &LONG)?.context("hangs").map(drop)
    })
}

/// Expect that a read of one file leaves another file readable.
pub fn two_open_files_are_told_apart() -> anyhow::Result<()> {
    let [one, two] = [open()?, open()?];
    change()?;
    expect(&one, Said::Readable)?;
    sys::read(&one)?;
    expect(&one, Said::Nothing).context("the one that read")?;
    expect(&two, Said::Readable).context("the other")?;
    change()?;
    expect(&one, Said::Readable)?;
    expect(&two, Said::Readable)?;
    sys::read(&two)?;
    expect(&one, Said::Readable).context("the other, after")?;
    expect(&two, Said::Nothing)
}

/// Expect that a file is not readable any more after a read by a duplicate or by a child.
pub fn a_duplicate_and_a_child_share_what_was_read() -> anyhow::Result<()> {
    let file = open()?;
    let duplicate = rustix::io::fcntl_dupfd_cloexec(&file, 0)?;
    change()?;
    expect(&file, Said::Readable)?;
    expect(&duplicate, Said::Readable)?;
    sys::read(&duplicate)?;
    expect(&file, Said::Nothing).context("read through the duplicate")?;

    change()?;
    expect(&file, Said::Readable)?;
    ensure!(
        sys::forked(|| expect(&file, Said::Readable).is_ok() && sys::read(&file).is_ok())?,
        "the child does not see the change"
    );
    expect(&file, Said::Nothing).context("read by the child")?;
    expect(&duplicate, Said::Nothing)
}

/// Expect that a read that fails, or that reads nothing, leaves the file as readable as it was.
pub fn a_read_that_fails_leaves_it_readable() -> anyhow::Result<()> {
    let file = open()?;
    let pages = Map::anonymous(2 * page())?;
    pages.protect(page(), MprotectFlags::empty())?;
    let end = pages.address() + page();

    let value = change()?;
    expect(&file, Said::Readable)?;
    for (what, address) in [("bad", end), ("null", 0), ("half way bad", end - 2)] {
        let read = sys::read_at_address(&file, address, 4);
        fails(&format!("read: {what}"), read, Errno::FAULT)?;
        expect(&file, Said::Readable).with_context(|| format!("after a read: {what}"))?;
    }
    for parts in [
        &[(end, 4)][..],
        &[(end - 2, 4)],
        &[(end - 2, 2), (end, 2)],
        &[(end - 3, 3), (0, 1)],
    ] {
        let read = sys::readv_at_addresses(&file, parts);
        fails("readv", read, Errno::FAULT)?;
        expect(&file, Said::Readable).with_context(|| format!("after a readv: {parts:?}"))?;
    }
    for len in [1, 8] {
        let read = sys::read_at_address(&file, pages.address(), len);
        fails("read of another count", read, Errno::INVAL)?;
    }
    same("read of 0", rustix::io::read(&file, &mut [0; 0])?, 0)?;
    same("the mapped counter", Map::readonly(&file)?.load(0), value)?;
    expect(&file, Said::Readable).context("after what does not read")?;

    same("read", sys::read(&file)?, value)?;
    expect(&file, Said::Nothing)?;
    // Nor does a failed read make something of nothing.
    fails(
        "read",
        sys::read_at_address(&file, end - 2, 4),
        Errno::FAULT,
    )?;
    expect(&file, Said::Nothing)
}

/// Expect that while the notification is held back, each way to poll reports a change, after a
/// reseed, and that the late notification does not reseed again.
pub fn a_look_is_enough_to_reseed() -> anyhow::Result<()> {
    for (name, way) in WAYS {
        let file = open()?;
        let mut log = Log::from_now_on()?;
        let masked = Masked::new()?;
        let value = change()?;
        a_while();
        same("reseeds before", log.reseeds()?, 0)?;
        // Where the reseed would sleep, the driver's thread reseeds, and wakes this one.
        let said = reseeded_by(name, || way(&file, &LONG))?;
        same(name, said, Said::Readable)?;
        same("read", sys::read(&file)?, value)?;
        drop(masked);
        log.expect_reseeds(1).context(name)?;
    }
    Ok(())
}

/// Expect that the notification wakes each way to wait after the reseed, and that the kernel is
/// reseeded once.
pub fn a_notification_wakes_who_waits() -> anyhow::Result<()> {
    let file = open()?;
    for _ in 0..3 {
        let mut log = Log::from_now_on()?;
        let before = sys::reseeds()?;
        // Each thread checks, when it is woken, that the reseed came first.
        let look = || {
            let reseeds = sys::reseeds()?;
            ensure!(reseeds != before, "woken before the reseed");
            Ok(())
        };
        woken(&file, Said::Readable, look, || change().map(drop))?;
        // No process has read.
        expect(&file, Said::Readable)?;
        sys::read(&file)?;
        log.expect_reseeds(1)?;
    }
    Ok(())
}

/// Expect that while the notification is held back, epoll reports nothing and the kernel is not
/// reseeded, and that the notification then wakes epoll and reseeds once.
pub fn without_a_notification_nobody_is_woken() -> anyhow::Result<()> {
    let file = open()?;
    let edge = Epoll::edge_triggered(&file)?;
    let level = Epoll::level_triggered(&file)?;
    let masked = Masked::new()?;
    let mut log = Log::from_now_on()?;
    change()?;
    same("edge-triggered", edge.wait(&SHORT)?, Said::Nothing)?;
    same("level-triggered", level.wait(&SHORT)?, Said::Nothing)?;
    same("reseeds", log.reseeds()?, 0)?;
    drop(masked);
    same("edge-triggered", edge.wait(&LONG)?, Said::Readable)?;
    same("level-triggered", level.wait(&LONG)?, Said::Readable)?;
    log.expect_reseeds(1)
}

/// Expect that an interrupt for another device, at which the early look may reseed, wakes no
/// process before the reseed, and that the notification then wakes it.
pub fn an_interrupt_for_others_wakes_nobody_too_early() -> anyhow::Result<()> {
    let file = open()?;
    let mut button = Button::open()?;
    let mut log = Log::from_now_on()?;
    for _ in 0..3 {
        let edge = Epoll::edge_triggered(&file)?;
        let masked = Masked::new()?;
        let before = sys::reseeds()?;
        let value = change()?;
        button.press()?;
        if edge.wait(&SHORT)? != Said::Nothing {
            ensure!(sys::reseeds()? != before, "woken before the reseed");
        }
        drop(masked);
        same("the notification", edge.wait(&LONG)?, Said::Readable)?;
        log.expect_reseeds(1)?;
        same("read", sys::read(&file)?, value)?;
    }
    Ok(())
}

/// Expect that edge-triggered epoll reports each change, also for a file whose last change has not
/// been read, and that it reports nothing without a change.
pub fn edge_triggered_epoll_tells_each_change() -> anyhow::Result<()> {
    let file = open()?;
    let edge = Epoll::edge_triggered(&file)?;
    same("before", edge.wait(&SHORT)?, Said::Nothing)?;
    for n in 0..6 {
        change()?;
        same("a change", edge.wait(&LONG)?, Said::Readable)?;
        if n % 2 == 1 {
            sys::read(&file)?;
        }
        a_while();
        // The early look may have reported the change before the notification, so one more event is
        // allowed.
        edge.wait(&NOW)?;
        a_while();
        same("the same change", edge.wait(&NOW)?, Said::Nothing)?;
    }
    Ok(())
}

/// Expect that level-triggered epoll reports a change until it is read.
pub fn level_triggered_epoll_tells_until_it_is_read() -> anyhow::Result<()> {
    let file = open()?;
    let level = Epoll::level_triggered(&file)?;
    same("before", level.wait(&SHORT)?, Said::Nothing)?;
    for _ in 0..3 {
        change()?;
        same("a notification", level.wait(&LONG)?, Said::Readable)?;
        for _ in 0..3 {
            same("unread", level.wait(&NOW)?, Said::Readable)?;
        }
        sys::read(&file)?;
        same("read", level.wait(&SHORT)?, Said::Nothing)?;
    }
    Ok(())
}

/// Expect that io_uring's read returns a new counter, and that it is a barrier while the
/// notification is held back.
pub fn io_uring_reads_a_changed_counter() -> anyhow::Result<()> {
    let file = open()?;
    let mut log = Log::from_now_on()?;
    let value = change()?;
    log.await_reseed()?;
    let read = Uring::new()?.read(&file, &LONG)?;
    same("io_uring's read", read, Some(value))?;
    expect(&file, Said::Nothing)?;

    // With io_uring, a read is also a barrier.
    let masked = Masked::new()?;
    let value = change()?;
    a_while();
    same("reseeds before", log.reseeds()?, 0)?;
    let read = reseeded_by("io_uring", || Uring::new()?.read(&file, &LONG))?;
    same("io_uring's read", read, Some(value))?;
    expect(&file, Said::Nothing)?;
    drop(masked);
    log.expect_reseeds(1)
}

/// Expect that io_uring's read is a barrier for a change that came before the open. For `poll`,
/// such a change is none.
pub fn io_uring_reads_what_changed_before_the_open() -> anyhow::Result<()> {
    let mut log = Log::from_now_on()?;
    let masked = Masked::new()?;
    let value = change()?;
    let file = open()?;
    a_while();
    same("reseeds before", log.reseeds()?, 0)?;
    let read = reseeded_by("io_uring", || Uring::new()?.read(&file, &LONG))?;
    same("io_uring's read", read, Some(value))?;
    drop(masked);
    log.expect_reseeds(1)
}

/// Expect that a read that must not sleep either reseeds the kernel first, or is EAGAIN and `poll`
/// says when to come back.
pub fn a_read_that_may_not_wait_says_so() -> anyhow::Result<()> {
    type Read = fn(&OwnedFd) -> rustix::io::Result<u32>;
    let reads: [(&str, OFlags, Read); 3] = [
        ("O_NONBLOCK", OFlags::NONBLOCK, sys::read),
        ("readv, O_NONBLOCK", OFlags::NONBLOCK, sys::readv),
        ("RWF_NOWAIT", OFlags::empty(), read_nowait),
    ];
    for (what, flags, read) in reads {
        let file = sys::open_as(crate::NODE, OFlags::RDONLY | flags)?;
        let mut log = Log::from_now_on()?;
        let masked = Masked::new()?;
        let value = change()?;
        // For `poll`, a change before the open is none. But after a read that returned EAGAIN,
        // `poll` has to report the file as readable.
        let late = sys::open_as(crate::NODE, OFlags::RDONLY | flags)?;
        reseeded_by(what, || {
            for file in [&late, &file] {
                let mut got = read(file);
                if got == Err(Errno::AGAIN) {
                    same("poll", by_poll(file, &LONG)?, Said::Readable)?;
                    got = read(file);
                }
                same("read", got?, value)?;
                expect(file, Said::Nothing)?;
            }
            Ok(())
        })?;
        drop(masked);
        log.expect_reseeds(1).context(what)?;
    }
    Ok(())
}
