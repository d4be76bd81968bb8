// SPDX-License-Identifier: MIT OR Apache-2.0

//! The promises of `Documentation/dev-vmgenid.rst`, one test each. Each test can be run alone and
//! in any order, and leaves a guest that works. The counter does not change during the tests of
//! [`ALL`].

pub mod library;
pub mod lifecycle;
pub mod poll;
pub mod sysgenid;

use crate::{
    NODE,
    machine::{self, Device},
    sys::{self, Map, page},
    wait::{Said, expect},
};
use anyhow::{Context, anyhow, bail, ensure};
use object::{Object, ObjectSegment};
use rustix::{
    fd::OwnedFd,
    fs::{FileType, OFlags, SeekFrom},
    io::{Errno, IoSliceMut},
    mm::{MapFlags, MprotectFlags, ProtFlags},
    process::{Resource, Rlimit, setrlimit},
};
use std::{
    fmt::{self, Debug},
    fs,
    io::Write,
    os::unix::{
        fs::FileExt,
        process::{CommandExt, ExitStatusExt},
    },
    process::{Command, ExitCode, Stdio},
};

type Promise = fn() -> anyhow::Result<()>;

/// A promise that is not kept on every machine has a word after its name, which tells the suite
/// where to test it: `On` in tests/suite/src/on.rs.
macro_rules! promises {
    ($all:ident: $($name:ident $([$at:literal])?)*; $($module:ident { $($its:ident $([$on:literal])?)* })*) => {
        pub const $all: &[(&str, &str, Promise)] = &[
            $((stringify!($name), concat!($(" ", $at)?), $name),)*
            $($((
                concat!(stringify!($module), "::", stringify!($its)),
                concat!($(" ", $on)?),
                $module::$its,
            ),)*)*
        ];
    };
}

promises! { ALL:
    the_node_is_a_misc_device_that_everybody_can_read
    read_returns_the_counter_again_and_again
    readv_returns_the_counter_in_any_split
    a_read_of_0_bytes_returns_0
    a_read_of_any_other_count_is_einval
    pread_at_0_reads_and_elsewhere_is_einval
    a_bad_buffer_is_efault
    lseek_answers_0
    mmap_shows_the_counter_and_zeros
    mmap_elsewhere_or_of_more_pages_is_einval
    mmap_to_write_or_execute_is_refused
    mprotect_to_write_or_execute_is_eacces
    mremap_to_grow_is_efault
    no_other_way_changes_the_page
    process_vm_writev_does_not_change_the_page
    userfaultfd_does_not_change_the_page
    the_page_is_left_out_of_core_dumps
    fork_inherits_the_page
    write_is_refused
    ioctl_is_enotty
    the_module_stays_while_a_file_or_mapping_is_open ["mainline"]
    an_unbound_device_answers_enodev;
    library {
        the_best_source_is_taken
        who_waits_in_vain_is_told
        no_permission_is_said
        another_device_is_refused
        without_the_device_there_is_no_counter
    }
    poll {
        nothing_is_readable_until_the_counter_changes
        who_waits_for_nothing_waits
        io_uring_reads_an_unchanged_counter_at_once
        a_read_that_may_not_wait_need_not
        an_unbound_device_hangs_up
    }
}

// Promises for which the counter changes. The host changes it on request, which is a line on
// standard output.
promises! { CHANGES:;
    library {
        a_change_is_seen_and_the_barrier_reseeds
        who_waits_is_woken
        a_signal_does_not_end_a_wait
        an_event_loop_is_told
        after_an_unbind_it_is_gone
        a_child_draws_its_own
    }
    poll {
        a_change_is_readable_until_it_is_read
        every_way_to_read_takes_note
        two_open_files_are_told_apart
        a_duplicate_and_a_child_share_what_was_read
        a_read_that_fails_leaves_it_readable
        a_look_is_enough_to_reseed
        a_notification_wakes_who_waits
        without_a_notification_nobody_is_woken
        an_interrupt_for_others_wakes_nobody_too_early ["pc"]
        edge_triggered_epoll_tells_each_change
        level_triggered_epoll_tells_until_it_is_read
        io_uring_reads_a_changed_counter
        io_uring_reads_what_changed_before_the_open
        a_read_that_may_not_wait_says_so
    }
    lifecycle {
        a_mapping_follows_the_counter_after_the_unbind
        changes_while_unbound_reseed_once_at_bind
        no_reseed_after_the_unbind ["not-builtin mainline"]
        the_driver_override_decides
        the_module_stays_while_it_is_in_use ["mainline"]
        changes_while_unloaded_do_nothing ["mainline"]
        a_stale_node_is_refused
        many_rebinds_under_a_storm
    }
}

// Promises of the other node, with the module loaded with sysgenid=1.
promises! { SYSGENID:;
    sysgenid {
        the_node_is_a_misc_device_that_everybody_can_read
        a_read_waits_for_what_is_new
        only_what_is_so_can_be_acknowledged
        the_page_is_mapped_read_only
        the_watcher_ioctls_are_missing
        the_page_changes_after_the_reseed
        a_change_is_new_until_it_is_acknowledged
        a_reader_is_woken
        a_signal_ends_a_read
        each_file_has_its_own_acknowledgement
        the_library_uses_it
        an_unbound_device_answers_enodev
        a_mapping_follows_after_a_rebind
        an_unbind_reseeds_what_is_due
        the_module_stays_while_it_is_mapped ["mainline"]
    }
}

pub fn run(name: &str) -> anyhow::Result<()> {
    let (.., promise) = ALL
        .iter()
        .chain(CHANGES)
        .chain(SYSGENID)
        .find(|(each, ..)| *each == name)
        .with_context(|| format!("no such promise: {name}"))?;
    promise()
}

/// What kernel selftests exit with if there is nothing to test (`KSFT_SKIP`).
pub const SKIP: u8 = 4;

/// A promise that cannot be tested, since the kernel was configured without a system call.
#[derive(Debug)]
pub struct Skip(pub &'static str);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "this kernel has no {}", self.0)
    }
}

impl std::error::Error for Skip {}

/// The result of a system call that not every kernel has.
fn of_this_kernel<T>(call: &'static str, result: Result<T, Errno>) -> anyhow::Result<T> {
    match result {
        Err(Errno::NOSYS) => bail!(Skip(call)),
        result => result.context(call),
    }
}

/// Tests each promise of [`ALL`] in a process of its own, and prints KTAP
/// (`Documentation/dev-tools/ktap.rst`).
pub fn run_all() -> ExitCode {
    println!("KTAP version 1");
    if !fs::exists(NODE).unwrap_or(false) {
        println!("1..0 # SKIP no {NODE}");
        return ExitCode::from(SKIP);
    }
    println!("1..{}", ALL.len());
    let mut code = ExitCode::SUCCESS;
    for (number, (name, ..)) in (1..).zip(ALL) {
        let run = Command::new("/proc/self/exe")
            .args(["promise", name])
            .output();
        let (status, said) = match run {
            Ok(output) => (output.status.code(), output.stdout),
            Err(err) => (None, err.to_string().into_bytes()),
        };
        let said = String::from_utf8_lossy(&said);
        if status == Some(SKIP.into()) {
            println!("ok {number} {name} # SKIP {}", said.trim());
            continue;
        }
        for line in said.lines() {
            println!("# {line}");
        }
        let kept = status == Some(0);
        println!("{}ok {number} {name}", if kept { "" } else { "not " });
        if !kept {
            code = ExitCode::FAILURE;
        }
    }
    code
}

pub fn open() -> anyhow::Result<OwnedFd> {
    sys::open(NODE).with_context(|| format!("open {NODE}"))
}

pub fn same<T: PartialEq + Debug>(what: &str, got: T, expected: T) -> anyhow::Result<()> {
    ensure!(
        got == expected,
        "{what}: expected {expected:?}, got {got:?}"
    );
    Ok(())
}

pub fn fails<T: Debug>(
    what: &str,
    got: rustix::io::Result<T>,
    expected: Errno,
) -> anyhow::Result<()> {
    match got {
        Err(errno) if errno == expected => Ok(()),
        got => bail!("{what}: expected {expected:?}, got {got:?}"),
    }
}

/// Reads the counter, and loads it from a mapping. The two have to agree.
pub fn counter(file: &OwnedFd) -> anyhow::Result<u32> {
    let read = sys::read(file).context("read")?;
    same("the mapped counter", Map::readonly(file)?.load(0), read)?;
    Ok(read)
}

/// Checks that the node can be read, mapped and polled. Returns the counter.
pub fn plain() -> anyhow::Result<u32> {
    let file = open()?;
    let value = counter(&file)?;
    expect(&file, Said::Nothing)?;
    Ok(value)
}

/// Expect that the node is a character device of the misc class with mode 0444, and that an
/// ordinary user can read and map it.
fn the_node_is_a_misc_device_that_everybody_can_read() -> anyhow::Result<()> {
    let stat = rustix::fs::stat(NODE)?;
    same(
        "type",
        FileType::from_raw_mode(stat.st_mode),
        FileType::CharacterDevice,
    )?;
    same("mode", stat.st_mode & 0o7777, 0o444)?;
    same("major number", rustix::fs::major(stat.st_rdev), 10)?;
    let minor = rustix::fs::minor(stat.st_rdev).to_string();
    let misc = fs::read_to_string("/proc/misc")?;
    ensure!(
        misc.lines()
            .any(|line| line.split_whitespace().eq([minor.as_str(), "vmgenid"])),
        "/proc/misc does not have {minor} vmgenid:\n{misc}"
    );

    let nobody = Command::new("/proc/self/exe")
        .arg("counter")
        .uid(65534)
        .gid(65534)
        .output()?;
    let expected = counter(&open()?)?;
    same(
        "what an ordinary user sees",
        String::from_utf8_lossy(&nobody.stdout).trim(),
        &format!("read {expected}, mapped {expected}"),
    )
}

/// Expect that each read returns the counter, and that the file position does not move.
fn read_returns_the_counter_again_and_again() -> anyhow::Result<()> {
    let file = open()?;
    let expected = counter(&file)?;
    for _ in 0..100 {
        same("read", sys::read(&file)?, expected)?;
    }
    same("file position", rustix::fs::tell(&file)?, 0)?;
    ensure!(
        expected != 0,
        "the guest was started with a counter of 0, which shows nothing"
    );
    Ok(())
}

/// Expect that readv of 4 bytes in any split returns the counter, and that any other total is
/// EINVAL.
fn readv_returns_the_counter_in_any_split() -> anyhow::Result<()> {
    let file = open()?;
    let expected = counter(&file)?;
    for split in [
        &[4][..],
        &[1, 3],
        &[2, 2],
        &[3, 1],
        &[1, 1, 1, 1],
        &[0, 4],
        &[2, 0, 2],
        &[4, 0],
    ] {
        let mut parts: Vec<Vec<u8>> = split.iter().map(|&len| vec![0; len]).collect();
        let mut slices: Vec<_> = parts.iter_mut().map(|part| IoSliceMut::new(part)).collect();
        let len =
            rustix::io::readv(&file, &mut slices).with_context(|| format!("readv of {split:?}"))?;
        same("readv", len, 4)?;
        let bytes = <[u8; 4]>::try_from(parts.concat()).map_err(|_| anyhow!("not 4 bytes"))?;
        same(
            &format!("readv of {split:?}"),
            u32::from_ne_bytes(bytes),
            expected,
        )?;
        same("file position", rustix::fs::tell(&file)?, 0)?;
    }
    for split in [&[1, 2][..], &[2, 3], &[4, 4], &[0, 3]] {
        let mut parts: Vec<Vec<u8>> = split.iter().map(|&len| vec![0; len]).collect();
        let mut slices: Vec<_> = parts.iter_mut().map(|part| IoSliceMut::new(part)).collect();
        fails(
            &format!("readv of {split:?}"),
            rustix::io::readv(&file, &mut slices),
            Errno::INVAL,
        )?;
    }
    Ok(())
}

/// Expect that read, readv and pread of 0 bytes return 0.
fn a_read_of_0_bytes_returns_0() -> anyhow::Result<()> {
    let file = open()?;
    same("read", rustix::io::read(&file, &mut [0; 0])?, 0)?;
    same("readv", rustix::io::readv(&file, &mut [])?, 0)?;
    same("pread", rustix::io::pread(&file, &mut [0; 0], 0)?, 0)
}

/// Expect that a read of any count other than 0 and 4 is EINVAL, also into a bad buffer.
fn a_read_of_any_other_count_is_einval() -> anyhow::Result<()> {
    let file = open()?;
    let buffer = Map::anonymous(2 * page())?;
    for len in [1, 2, 3, 5, 6, 7, 8, 16, 4095, 4096, 2 * page()] {
        let what = format!("read of {len}");
        fails(
            &what,
            sys::read_at_address(&file, buffer.address(), len),
            Errno::INVAL,
        )?;
        // The driver checks the count first: an invalid buffer makes no difference.
        fails(
            &what,
            sys::read_at_address(&file, page(), len),
            Errno::INVAL,
        )?;
    }
    Ok(())
}

/// Expect that pread and preadv return the counter at offset 0 and EINVAL at any other offset, and
/// that the file position does not move.
fn pread_at_0_reads_and_elsewhere_is_einval() -> anyhow::Result<()> {
    let file = open()?;
    let expected = counter(&file)?;
    let mut bytes = [0; 4];
    same("pread at 0", rustix::io::pread(&file, &mut bytes, 0)?, 4)?;
    same("pread at 0", u32::from_ne_bytes(bytes), expected)?;
    let mut bytes = [0; 4];
    same(
        "preadv at 0",
        rustix::io::preadv(&file, &mut [IoSliceMut::new(&mut bytes)], 0)?,
        4,
    )?;
    same("preadv at 0", u32::from_ne_bytes(bytes), expected)?;
    for offset in [1, 4, 4096, i64::MAX as u64] {
        let what = format!("pread at {offset}");
        fails(
            &what,
            rustix::io::pread(&file, &mut bytes, offset),
            Errno::INVAL,
        )?;
        let what = format!("preadv at {offset}");
        let slices = &mut [IoSliceMut::new(&mut bytes)];
        fails(
            &what,
            rustix::io::preadv(&file, slices, offset),
            Errno::INVAL,
        )?;
    }
    same("file position", rustix::fs::tell(&file)?, 0)
}

/// Expect that read and readv into a buffer that is bad, or bad half way, are EFAULT, and that the
/// file works afterwards.
fn a_bad_buffer_is_efault() -> anyhow::Result<()> {
    let file = open()?;
    let pages = Map::anonymous(2 * page())?;
    pages.protect(page(), MprotectFlags::empty())?;
    let end = pages.address() + page();

    for (what, address) in [
        ("null", 0),
        ("unmapped", page()),
        ("protected", end),
        ("the kernel's", usize::MAX - 4095),
        ("half way bad", end - 2),
        ("the counter's own page", Map::readonly(&file)?.address()),
    ] {
        fails(
            &format!("read: {what}"),
            sys::read_at_address(&file, address, 4),
            Errno::FAULT,
        )?;
    }
    fails(
        "readv: bad",
        sys::readv_at_addresses(&file, &[(end, 4)]),
        Errno::FAULT,
    )?;
    fails(
        "readv: half way bad",
        sys::readv_at_addresses(&file, &[(end - 2, 4)]),
        Errno::FAULT,
    )?;
    fails(
        "readv: second bad",
        sys::readv_at_addresses(&file, &[(end - 2, 2), (end, 2)]),
        Errno::FAULT,
    )?;

    // Nothing has happened to the file.
    counter(&file).map(drop)
}

/// Expect that lseek returns 0 for any target, and that the file works after each.
fn lseek_answers_0() -> anyhow::Result<()> {
    let file = open()?;
    for to in [
        SeekFrom::Start(0),
        SeekFrom::Start(4),
        SeekFrom::Current(100),
        SeekFrom::End(0),
    ] {
        same(&format!("lseek to {to:?}"), rustix::fs::seek(&file, to)?, 0)?;
        counter(&file)?;
    }
    Ok(())
}

/// Expect that each kind of mapping shows the counter, that the rest of the page is zeros where it
/// is that of `CTRA`, and that a mapping outlives its file.
fn mmap_shows_the_counter_and_zeros() -> anyhow::Result<()> {
    let file = open()?;
    let expected = sys::read(&file)?;
    for flags in [
        MapFlags::SHARED,
        MapFlags::PRIVATE,
        MapFlags::SHARED | MapFlags::POPULATE,
    ] {
        // A length is rounded up to whole pages by the kernel.
        for len in [1, 4, page()] {
            let map = Map::counter(&file, ProtFlags::READ, flags, len)?;
            same("the mapped counter", u32::from_le(map.load(0)), expected)?;
        }
        if sys::offset(&file) == 0 {
            let map = Map::of(&file, page(), ProtFlags::READ, flags, 0)?;
            for word in 1..page() / 4 {
                same(&format!("word {word} of the page"), map.load(word), 0)?;
            }
        }
    }

    // A mapping needs no file.
    let map = Map::readonly(&file)?;
    drop(file);
    same(
        "the counter, mapped, when the file is closed",
        map.load(0),
        expected,
    )
}

/// Expect that mmap at any other offset or of more than one page is EINVAL, whatever the
/// protection, and that it is ENODEV at offset 0 with VMClock.
fn mmap_elsewhere_or_of_more_pages_is_einval() -> anyhow::Result<()> {
    let file = open()?;
    let (page, read, write) = (page(), ProtFlags::READ, ProtFlags::WRITE);
    // The counter's page is at 0 or, with VMClock, at one page; then 0 is `ENODEV`.
    let at = sys::offset(&file) as usize;
    let other = if at == 0 {
        (page, Errno::INVAL)
    } else {
        (0, Errno::NODEV)
    };
    for flags in [MapFlags::SHARED, MapFlags::PRIVATE] {
        for (len, offset) in [
            (page, 2 * page),
            (page, 16 * page),
            (page + 1, 0),
            (2 * page, 0),
            (2 * page, page),
        ] {
            let what = format!("mmap of {len} bytes at {offset}");
            let map = Map::of(&file, len, read, flags, offset as u64).map(|map| map.address());
            fails(&what, map, Errno::INVAL)?;
        }
        let map = Map::of(&file, page, read, flags, other.0 as u64);
        let what = format!("mmap at {}", other.0);
        fails(&what, map.map(|map| map.address()), other.1)?;
    }
    // Whatever the protection; shared and writable, the kernel answers first.
    for (len, offset) in [(page, 2 * page), (2 * page, at)] {
        for prot in [read | write, read | ProtFlags::EXEC] {
            let what = format!("mmap of {len} bytes at {offset}, {prot:?}");
            let map = Map::of(&file, len, prot, MapFlags::PRIVATE, offset as u64);
            fails(&what, map.map(|map| map.address()), Errno::INVAL)?;
        }
    }
    Ok(())
}

/// Expect that mmap to write or to execute is EPERM, and EACCES where the mapping is shared and
/// writable and the file is not. Expect that a file opened for writing can be mapped to read.
fn mmap_to_write_or_execute_is_refused() -> anyhow::Result<()> {
    let (shared, private) = (MapFlags::SHARED, MapFlags::PRIVATE);
    let (read, write, exec) = (ProtFlags::READ, ProtFlags::WRITE, ProtFlags::EXEC);
    let reader = open()?;
    let writer = sys::open_as(NODE, OFlags::RDWR).context("open as root, to write")?;
    for (what, file, flags, prot, expected) in [
        (
            "write, private",
            &reader,
            private,
            read | write,
            Errno::PERM,
        ),
        ("write only, private", &reader, private, write, Errno::PERM),
        (
            "execute, private",
            &reader,
            private,
            read | exec,
            Errno::PERM,
        ),
        ("execute, shared", &reader, shared, read | exec, Errno::PERM),
        (
            "write, shared, file read-only",
            &reader,
            shared,
            read | write,
            Errno::ACCESS,
        ),
        (
            "write, shared, file writable",
            &writer,
            shared,
            read | write,
            Errno::PERM,
        ),
        (
            "write, private, file writable",
            &writer,
            private,
            read | write,
            Errno::PERM,
        ),
        (
            "execute, shared, file writable",
            &writer,
            shared,
            read | exec,
            Errno::PERM,
        ),
    ] {
        let map = Map::counter(file, prot, flags, page());
        fails(
            &format!("mmap: {what}"),
            map.map(|map| map.address()),
            expected,
        )?;
    }
    same(
        "through a writable file",
        Map::readonly(&writer)?.load(0),
        sys::read(&reader)?,
    )
}

/// Expect that mprotect to write or to execute is EACCES, and that mprotect to nothing and back to
/// read works.
fn mprotect_to_write_or_execute_is_eacces() -> anyhow::Result<()> {
    let reader = open()?;
    let writer = sys::open_as(NODE, OFlags::RDWR).context("open as root, to write")?;
    for file in [&reader, &writer] {
        for flags in [MapFlags::SHARED, MapFlags::PRIVATE] {
            let map = Map::counter(file, ProtFlags::READ, flags, page())?;
            let read = MprotectFlags::READ;
            for prot in [
                read | MprotectFlags::WRITE,
                MprotectFlags::WRITE,
                read | MprotectFlags::EXEC,
            ] {
                fails(
                    &format!("mprotect to {prot:?}"),
                    map.protect(0, prot),
                    Errno::ACCESS,
                )?;
            }
            map.protect(0, MprotectFlags::empty())
                .context("mprotect to nothing")?;
            map.protect(0, read).context("mprotect back to read")?;
            same("the mapped counter", map.load(0), sys::read(file)?)?;
        }
    }
    Ok(())
}

/// Expect that mremap to two pages is EFAULT, and that the mapping still shows the counter.
fn mremap_to_grow_is_efault() -> anyhow::Result<()> {
    let file = open()?;
    let mut map = Map::readonly(&file)?;
    fails("mremap to two pages", map.grow(2 * page()), Errno::FAULT)?;
    same("the mapped counter", map.load(0), sys::read(&file)?)
}

/// Expect that the process's memory file does not write to the page, and that madvise() does not
/// take the page away.
fn no_other_way_changes_the_page() -> anyhow::Result<()> {
    // With memory of the process itself, each call succeeds.
    let ours = Map::anonymous(page())?;
    let memory = fs::OpenOptions::new().write(true).open("/proc/self/mem")?;
    let written = memory.write_at(&[1; 4], ours.address() as u64)?;
    same("/proc/self/mem", (written, ours.load(0)), (4, 0x0101_0101))?;
    ours.advise(libc::MADV_DONTNEED)?;
    same("what madvise took away", ours.load(0), 0)?;

    the_page_stays(|map| {
        let written = memory.write_at(&[0xff; 4], map.address() as u64);
        ensure!(written.is_err(), "/proc/self/mem: {written:?}");
        for advice in [libc::MADV_DONTNEED, libc::MADV_REMOVE, libc::MADV_FREE] {
            let advised = map.advise(advice);
            ensure!(advised.is_err(), "madvise({advice}): {advised:?}");
        }
        Ok(())
    })
}

/// Expect that process_vm_writev(), which a debugger calls, does not write to the page.
fn process_vm_writev_does_not_change_the_page() -> anyhow::Result<()> {
    let ours = Map::anonymous(page())?;
    let written = sys::write_remote(ours.address(), &[2; 4]);
    let written = of_this_kernel("process_vm_writev", written)?;
    same("the page", (written, ours.load(0)), (4, 0x0202_0202))?;
    the_page_stays(|map| {
        let written = sys::write_remote(map.address(), &[0xff; 4]);
        ensure!(written.is_err(), "written: {written:?}");
        Ok(())
    })
}

/// Expect that userfaultfd() does not accept the page, and so puts no other page in its place.
fn userfaultfd_does_not_change_the_page() -> anyhow::Result<()> {
    let ours = Map::anonymous(page())?;
    let answered = sys::answer_faults(ours.address(), page());
    drop(of_this_kernel("userfaultfd", answered)?);
    the_page_stays(|map| {
        let answered = sys::answer_faults(map.address(), page());
        ensure!(answered.is_err(), "registered: {answered:?}");
        Ok(())
    })
}

/// Checks that each mapping of the page, and `read`, give the same counter after an attack on the
/// mapping.
fn the_page_stays(attack: impl Fn(&Map) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let file = open()?;
    for flags in [MapFlags::SHARED, MapFlags::PRIVATE] {
        let map = Map::counter(&file, ProtFlags::READ, flags, page())?;
        let expected = map.load(0);
        attack(&map)?;
        same("the mapped counter", map.load(0), expected)?;
        same("read", sys::read(&file)?, expected)?;
    }
    Ok(())
}

/// Maps the page and an ordinary file, each shared and private, says where, and
/// dies.
pub fn crash() -> anyhow::Result<()> {
    let limit = Rlimit {
        current: None,
        maximum: None,
    };
    setrlimit(Resource::Core, limit).context("setrlimit")?;
    // All that a core can have. A mapping that this core leaves out is left out of all cores.
    fs::write("/proc/self/coredump_filter", "0x1ff").context("coredump_filter")?;
    let ordinary = "/tmp/ordinary";
    fs::write(ordinary, vec![1; page()])?;
    let ordinary = sys::open(ordinary)?;
    let mut maps = Vec::new();
    for file in [&ordinary, &open()?] {
        for flags in [MapFlags::SHARED, MapFlags::PRIVATE] {
            let map = Map::counter(file, ProtFlags::READ, flags, page())?;
            map.load(0);
            println!("{}", map.address());
            maps.push(map);
        }
    }
    std::io::stdout().flush()?;
    std::process::abort();
}

/// Expect that a core dump has no byte of the counter's page, while it has the page of an ordinary
/// file.
fn the_page_is_left_out_of_core_dumps() -> anyhow::Result<()> {
    fs::write("/proc/sys/kernel/core_pattern", "/tmp/core.%p").context("core_pattern")?;
    let child = Command::new("/proc/self/exe")
        .arg("crash")
        .stdout(Stdio::piped())
        .spawn()?;
    let path = format!("/tmp/core.{}", child.id());
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(
        output.status.core_dumped(),
        "no core, but {}: {text}",
        output.status
    );
    let addresses: Vec<u64> = text
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let &[ordinary_shared, ordinary_private, shared, private] = &addresses[..] else {
        bail!("four addresses, not {text}");
    };

    let data = fs::read(&path).with_context(|| format!("read {path}"))?;
    fs::remove_file(&path)?;
    let core = object::File::parse(&*data).context("parse the core")?;
    let in_core = |address: u64| -> u64 {
        let mut segments = core.segments();
        let segment =
            segments.find(|at| (at.address()..at.address() + at.size()).contains(&address));
        segment.map_or(0, |segment| segment.file_range().1)
    };
    for address in [ordinary_shared, ordinary_private] {
        ensure!(
            in_core(address) > 0,
            "the core does not even have an ordinary file's page"
        );
    }
    for address in [shared, private] {
        same(
            "bytes of the counter's page in the core",
            in_core(address),
            0,
        )?;
    }
    Ok(())
}

/// Expect that a child sees the counter in the mapping that it inherited, and reads it from the
/// file that it inherited.
fn fork_inherits_the_page() -> anyhow::Result<()> {
    let file = open()?;
    let expected = sys::read(&file)?;
    let map = Map::readonly(&file)?;
    ensure!(
        sys::forked(|| map.load(0) == expected && sys::read(&file) == Ok(expected))?,
        "the child does not see {expected}"
    );
    Ok(())
}

/// Expect that write is EBADF on a file opened for reading and EINVAL on one opened for writing.
fn write_is_refused() -> anyhow::Result<()> {
    fails(
        "write, file read-only",
        rustix::io::write(&open()?, &[0; 4]),
        Errno::BADF,
    )?;
    for flags in [OFlags::WRONLY, OFlags::RDWR] {
        let file = sys::open_as(NODE, flags).context("open as root, to write")?;
        fails(
            "write, as root",
            rustix::io::write(&file, &[0; 4]),
            Errno::INVAL,
        )?;
    }
    counter(&open()?).map(drop)
}

/// Expect that an unknown ioctl is ENOTTY.
fn ioctl_is_enotty() -> anyhow::Result<()> {
    fails("ioctl", sys::unknown_ioctl(&open()?), Errno::NOTTY)
}

/// Expect that the unload of the module is EAGAIN while a file or a mapping is open, that it works
/// then and removes the node, and that a load brings the node back.
fn the_module_stays_while_a_file_or_mapping_is_open() -> anyhow::Result<()> {
    let file = open()?;
    fails("rmmod with an open file", machine::unload(), Errno::AGAIN)?;
    let map = Map::readonly(&file)?;
    drop(file);
    fails("rmmod with a mapping", machine::unload(), Errno::AGAIN)?;
    drop(map);
    machine::unload().context("rmmod of an unused module")?;
    fails("open without the module", sys::open(NODE), Errno::NOENT)?;

    machine::load()?;
    counter(&open()?).map(drop)
}

/// Expect that after an unbind the reads and mmap of an open file are ENODEV, that open is ENOENT,
/// that lseek, ioctl and the mapping are as before, and that a rebind makes a new node and does not
/// revive the old file.
fn an_unbound_device_answers_enodev() -> anyhow::Result<()> {
    let device = Device::bound()?;
    let file = open()?;
    let map = Map::readonly(&file)?;
    let expected = counter(&file)?;

    device.unbind()?;
    let mut bytes = [0; 4];
    fails("read", sys::read(&file), Errno::NODEV)?;
    let pread = rustix::io::pread(&file, &mut bytes, 0);
    fails("pread", pread, Errno::NODEV)?;
    let readv = rustix::io::readv(&file, &mut [IoSliceMut::new(&mut bytes)]);
    fails("readv", readv, Errno::NODEV)?;
    let again = Map::readonly(&file).map(|map| map.address());
    fails("mmap", again, Errno::NODEV)?;
    fails("open", sys::open(NODE), Errno::NOENT)?;
    same("lseek", rustix::fs::seek(&file, SeekFrom::Start(0))?, 0)?;
    fails("ioctl", sys::unknown_ioctl(&file), Errno::NOTTY)?;
    same("the mapped counter", map.load(0), expected)?;

    device.bind()?;
    same("the counter of the new node", counter(&open()?)?, expected)?;
    fails("read of the old file", sys::read(&file), Errno::NODEV)
}
