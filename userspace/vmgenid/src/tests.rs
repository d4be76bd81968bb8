// SPDX-License-Identifier: MIT OR Apache-2.0

//! Tests without a device: files that are no device, and a vmclock's page written by the test.
//! tests/suite has the other tests, in virtual machines.

use crate::*;
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create, open};
use std::{
    io::ErrorKind,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::Instant,
};

/// A page that the test writes, and a counter mapped from it.
struct Laid(OwnedFd);

impl Laid {
    fn new() -> Self {
        let fd = memfd_create("page", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 4096).unwrap();
        Self(fd)
    }

    /// A vmclock as Linux 7.3 describes it.
    fn vmclock(counter: u64) -> Self {
        let page = Self::new();
        page.put(0, b"VCLK");
        page.put(4, &4096u32.to_le_bytes());
        page.put(8, &1u16.to_le_bytes());
        page.put(24, &(1u64 << 8).to_le_bytes());
        page.put(104, &counter.to_le_bytes());
        page
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        let written = rustix::io::pwrite(&self.0, bytes, offset).unwrap();
        assert_eq!(written, bytes.len());
    }

    fn map(&self, source: Source) -> Result<Counter, Error> {
        // Not to be written: a sysgenid is told what was seen.
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Counter::map(source, open(path, flags, Mode::empty()).unwrap())
    }
}

impl Laid {
    fn guard(&self, source: Source) -> Guard {
        Guard::new(Arc::new(self.map(source).unwrap()))
    }
}

/// A cached count of how often it was made. `also` is called each time, with the count.
fn counted(
    guard: Guard,
    mut also: impl FnMut(u32) -> Result<(), Error>,
) -> Cached<u32, impl FnMut() -> Result<u32, Error>> {
    let mut made = 0;
    let make = move || {
        made += 1;
        also(made).map(|()| made)
    };
    Cached::new(guard, make).unwrap()
}

fn missing(page: &Laid) -> &'static str {
    match page.map(Source::Vmclock) {
        Err(Error::NotTheDevice {
            source: Source::Vmclock,
            why,
        }) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_vmclock_has_64_bits_under_a_sequence_count() {
    let number = 0x0123_4567_89ab_cdef;
    let page = Laid::vmclock(number);
    let counter = page.map(Source::Vmclock).unwrap();
    assert_eq!(counter.get().number(), number);
    assert_eq!(counter.barrier().unwrap(), counter.get());
    assert_eq!(counter.source(), Source::Vmclock);
    // Only the upper half.
    let before = counter.get();
    page.put(108, &[0]);
    assert_ne!(counter.get(), before);
}

#[test]
fn a_vmclock_that_is_being_written_is_waited_for() {
    let page = Laid::vmclock(1);
    let counter = page.map(Source::Vmclock).unwrap();
    page.put(12, &7u32.to_le_bytes());
    assert!(matches!(counter.barrier(), Err(Error::Busy)));

    // Half of it is new already.
    page.put(104, &0xffff_ffffu32.to_le_bytes());
    let waiting = AtomicBool::new(false);
    let number = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            waiting.store(true, Relaxed);
            patiently(&counter)
        });
        while !waiting.load(Relaxed) {
            thread::yield_now();
        }
        page.put(104, &u64::MAX.to_le_bytes());
        page.put(12, &8u32.to_le_bytes());
        reader.join().unwrap()
    });
    assert_eq!(number, u64::MAX);
}

/// The longest time until the writing thread gets a CPU again.
fn patiently(counter: &Counter) -> u64 {
    loop {
        match counter.barrier() {
            Err(Error::Busy) => {}
            result => break result.unwrap().number(),
        }
    }
}

#[test]
fn no_half_of_a_vmclocks_counter_is_seen() {
    let page = Laid::vmclock(0);
    let counter = page.map(Source::Vmclock).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..20_000u32 {
                page.put(12, &(2 * n - 1).to_le_bytes());
                page.put(104, &n.to_le_bytes());
                page.put(108, &n.to_le_bytes());
                page.put(12, &(2 * n).to_le_bytes());
            }
            done.store(true, Relaxed);
        });
        while !done.load(Relaxed) {
            let number = patiently(&counter);
            assert_eq!(number >> 32, number & 0xffff_ffff);
        }
    });
}

#[test]
fn a_vmclock_without_a_counter_is_none() {
    let page = Laid::vmclock(1);
    // As QEMU 10.0 makes it.
    page.put(24, &0u64.to_le_bytes());
    assert!(missing(&page).contains("does not say"));
    page.put(4, &104u32.to_le_bytes());
    assert!(missing(&page).contains("too old"));
    page.put(0, b"VLCK");
    assert!(missing(&page).contains("VCLK"));
}

#[test]
fn a_word_of_32_bits_is_one_of_64() {
    let page = Laid::new();
    page.put(0, &[1, 2, 3, 4]);
    let counter = page.map(Source::Vmgenid).unwrap();
    assert_eq!(counter.get().number(), 0x0403_0201);
    assert_eq!(counter.get().to_string(), "67305985");
}

#[test]
fn any_other_generation_is_a_change() {
    let page = Laid::new();
    let counter = Arc::new(page.map(Source::Sysgenid).unwrap());
    let guard = Guard::new(counter);
    // It grows, goes down, wraps, comes back.
    for next in [1u32, 7, 6, u32::MAX, 0, u32::MAX, 0x8000_0000, 0] {
        let stamp = guard.barrier().unwrap();
        assert!(guard.is_unchanged_since(&stamp));
        page.put(0, &next.to_le_bytes());
        assert!(!guard.is_unchanged_since(&stamp));
    }
}

#[test]
fn what_is_cached_is_made_anew() {
    let page = Laid::new();
    let mut cached = counted(page.guard(Source::Sysgenid), |_| Ok(()));
    assert_eq!(cached.with(|n| *n).unwrap(), 1);
    assert_eq!(*cached.get().unwrap(), 1);
    page.put(0, &[1]);
    assert!(!cached.is_unchanged());
    assert_eq!(cached.with(|n| *n).unwrap(), 2);
    page.put(0, &[2]);
    assert_eq!(*cached.get().unwrap(), 3);
    assert_eq!(cached.with(|n| *n).unwrap(), 3);
    cached.discard();
    assert_eq!(cached.with(|n| *n).unwrap(), 4);
}

/// Without a barrier, data that is made at once can be equal in other clones.
#[test]
fn nothing_is_kept_until_a_vmclock_settles() {
    let page = Laid::vmclock(1);
    let mut cached = counted(page.guard(Source::Vmclock), |_| Ok(()));
    for counter in 1..3u64 {
        page.put(104, &counter.to_le_bytes());
        let begin = Instant::now();
        let [first, second] = [0; 2].map(|_| cached.with(|made| *made).unwrap());
        // Unless this thread has slept that long.
        assert!(first < second || begin.elapsed() > Guard::SETTLES);
        thread::sleep(Guard::SETTLES);
        // Made once more, because now it may be kept.
        let third = cached.with(|made| *made).unwrap();
        assert!(third > second);
        assert_eq!(cached.with(|made| *made).unwrap(), third);
        assert_eq!(*cached.get().unwrap(), third);
    }
}

#[test]
fn what_must_not_be_kept_can_be_used() {
    let page = Laid::vmclock(1);
    let guard = page.guard(Source::Vmclock);
    let mut cached = Cached::new(guard, || Ok::<_, Error>(())).unwrap();
    cached.get().unwrap();
    assert!(cached.is_unchanged());
    page.put(104, &[2]);
    assert!(!cached.is_unchanged());
}

#[test]
fn a_result_from_across_a_restore_is_thrown_away() {
    let page = Laid::new();
    let mut cached = counted(page.guard(Source::Sysgenid), |_| Ok(()));
    // Three restores, each in the middle of it.
    let mut restores = 0;
    let result = cached.with(|n| {
        if restores < 3 {
            restores += 1;
            page.put(0, &[restores]);
        }
        *n
    });
    assert_eq!(result.unwrap(), 4);
}

#[test]
fn a_restore_while_it_is_made_is_noticed() {
    let page = Laid::new();
    let mut cached = counted(page.guard(Source::Sysgenid), |made| {
        if made == 1 {
            page.put(0, &[1]);
        }
        Ok(())
    });
    assert_eq!(cached.with(|n| *n).unwrap(), 2);
}

#[test]
fn after_an_error_the_old_one_is_not_used() {
    let page = Laid::new();
    let mut cached = counted(page.guard(Source::Sysgenid), |made| match made {
        2 | 3 => Err(Error::Busy),
        _ => Ok(()),
    });
    page.put(0, &[1]);
    assert!(matches!(cached.with(|n| *n), Err(Error::Busy)));
    assert!(matches!(cached.get(), Err(Error::Busy)));
    // Not even if the generation comes back.
    page.put(0, &[0]);
    assert!(!cached.is_unchanged());
    assert_eq!(cached.with(|n| *n).unwrap(), 4);
}

#[test]
fn without_a_counter_it_is_as_the_caller_said() {
    if Counter::open().is_ok() {
        return;
    }
    let refused = Guard::open(WithoutCounter::Refuse);
    assert!(matches!(refused, Err(Error::NoCounter)), "{refused:?}");

    let made = |without| {
        let guard = Guard::open(without).unwrap();
        assert!(guard.counter().is_none());
        let mut cached = counted(guard, |_| Ok(()));
        let first = cached.with(|n| *n).unwrap();
        (first, cached.with(|n| *n).unwrap(), *cached.get().unwrap())
    };
    assert_eq!(made(WithoutCounter::NoticeForksOnly), (1, 1, 1));
    // Nothing is used twice.
    let (first, second, third) = made(WithoutCounter::CacheNothing);
    assert!(first < second && second < third);
}

fn given(source: Source, path: &str) -> Error {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = open(path, flags, Mode::empty()).unwrap();
    Counter::from_fd(source, fd).unwrap_err()
}

#[test]
fn other_files_are_not_the_device() {
    for &source in Source::ALL {
        for path in [
            "/proc/self/exe",
            "/proc/version",
            "/",
            "/dev/null",
            "/dev/zero",
            "/dev/urandom",
        ] {
            let err = given(source, path);
            let Error::NotTheDevice { source: said, why } = &err else {
                panic!("{path}: {err:?}");
            };
            assert_eq!(*said, source);
            assert!(why.starts_with("not a "), "{path}: {why}");
        }
        let page = Laid::new();
        let err = Counter::from_fd(source, page.0).unwrap_err();
        assert!(err.to_string().contains("not a character device"), "{err}");
    }
}

#[test]
fn other_devices_are_not_the_device() {
    // Of the same class. Not every machine has one.
    for path in [
        "/dev/fuse",
        "/dev/loop-control",
        "/dev/kvm",
        "/dev/vhost-net",
    ] {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(fd) = open(path, flags, Mode::empty()) else {
            continue;
        };
        for &source in Source::ALL {
            let err = Counter::from_fd(source, fd.try_clone().unwrap()).unwrap_err();
            assert!(matches!(err, Error::NotTheDevice { .. }), "{path}: {err:?}");
        }
    }
}

#[test]
fn what_is_not_there_is_not_there() {
    let none = [(Source::Vmgenid, Path::new("/nonexistent/vmgenid"))];
    assert!(matches!(Counter::open_first(&none), Err(Error::NoCounter)));
    let err = Counter::open_path(none[0].0, none[0].1).unwrap_err();
    let Error::Open { path, error } = &err else {
        panic!("{err:?}");
    };
    assert_eq!((&**path, error.kind()), (none[0].1, ErrorKind::NotFound));
    assert!(err.to_string().contains("/nonexistent/vmgenid"), "{err}");
}

#[test]
fn what_is_wrong_is_not_taken_for_missing() {
    // The first one is something else, which is said; the second is not asked.
    let wrong = [
        (Source::Vmgenid, Path::new("/dev/zero")),
        (Source::Sysgenid, Path::new("/nonexistent/sysgenid")),
    ];
    let err = Counter::open_first(&wrong).unwrap_err();
    assert!(
        matches!(
            err,
            Error::NotTheDevice {
                source: Source::Vmgenid,
                ..
            }
        ),
        "{err:?}"
    );
    // But a vmclock without a counter is a machine without one.
    let clock = [(Source::Vmclock, Path::new("/dev/zero"))];
    assert!(matches!(Counter::open_first(&clock), Err(Error::NoCounter)));
}

#[test]
fn a_short_read_is_no_generation() {
    let page = Laid::new();
    let counter = page.map(Source::Vmgenid).unwrap();
    // A file that ends too soon, which the device does not.
    for len in [2, 0] {
        ftruncate(&page.0, len).unwrap();
        let err = counter.barrier().unwrap_err();
        let why = "a read of 4 bytes gives less";
        assert!(err.to_string().contains(why), "{err}");
        assert!(matches!(err, Error::NotTheDevice { .. }), "{err:?}");
    }
}

#[test]
fn errors_say_where_and_what() {
    let said = Error::NoCounter.to_string();
    for &source in Source::ALL {
        assert!(said.contains(source.path()), "{said}");
        assert_eq!(format!("/dev/{source}"), source.path());
    }
    fn is_error<T: std::error::Error + Send + Sync + 'static>() {}
    is_error::<Error>();
}

#[test]
fn all_is_for_any_thread() {
    fn is<T: Send + Sync>() {}
    is::<Counter>();
    is::<Guard>();
    is::<Cached<u8, fn() -> Result<u8, Error>>>();
    #[cfg(feature = "rand_core")]
    is::<GuardedRng<chacha20::ChaCha20Rng>>();
}

#[test]
fn a_mapping_outlives_its_counter() {
    let page = Laid::new();
    let counter = Arc::new(page.map(Source::Sysgenid).unwrap());
    let weak = Arc::downgrade(&counter);
    let guard = Guard::new(counter);
    let stamp = guard.barrier().unwrap();
    drop(page);
    assert!(weak.upgrade().is_some());
    let clone = guard.clone();
    drop(guard);
    assert!(clone.is_unchanged_since(&stamp));
    assert!(
        clone
            .counter()
            .unwrap()
            .as_fd()
            .try_clone_to_owned()
            .is_ok()
    );
    drop(clone);
    assert!(weak.upgrade().is_none());
}

#[cfg(feature = "rand_core")]
mod rng {
    use super::*;
    use chacha20::ChaCha20Rng;
    use rand_core::{SeedableRng, TryRng};

    fn words(rng: &mut GuardedRng<ChaCha20Rng>) -> Vec<u64> {
        (0..100).map(|_| rng.try_next_u64().unwrap()).collect()
    }

    #[test]
    fn a_restore_is_another_stream() {
        let page = Laid::new();
        let guard = page.guard(Source::Sysgenid);
        let mut rng = GuardedRng::<ChaCha20Rng>::new(guard).unwrap();
        let first = words(&mut rng);
        page.put(0, &[1]);
        let second = words(&mut rng);
        rng.reseed();
        let third = words(&mut rng);
        let mut all = [first, second, third].concat();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 300);
    }

    #[test]
    fn no_restore_is_the_generators_own_stream() {
        let page = Laid::new();
        let guard = page.guard(Source::Sysgenid);
        let make = || Ok::<_, Error>(ChaCha20Rng::from_seed([7; 32]));
        let mut cached = Cached::new(guard, make).unwrap();
        let mut bare = ChaCha20Rng::from_seed([7; 32]);
        for _ in 0..1000 {
            let Ok(word) = bare.try_next_u32();
            assert_eq!(cached.with(|rng| rng.try_next_u32()).unwrap(), Ok(word));
        }
    }
}
