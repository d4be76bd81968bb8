// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::{
    Error, Generation, Source,
    linux::{
        map::{Page, Word},
        vmclock,
    },
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FileType, Mode, OFlags, fstat, major, open},
    io::{Errno, pread, read, retry_on_intr, write},
    param::page_size,
};
use std::{
    io::ErrorKind,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// An open source of the generation.
///
/// [`get`](Self::get) is for the fast path, before each use of cached data. If the generation is
/// another one, the caller calls [`barrier`](Self::barrier), then makes new data. [`Cached`] does
/// this, and detects forks, too.
///
/// ```no_run
/// use vmgenid::Counter;
///
/// let counter = Counter::open()?;
/// let mut seeded_at = counter.barrier()?;
/// # let (seed, draw) = (|| (), || ());
/// let mut pool = seed();
/// loop {
///     let bytes = draw(/* &mut pool */);
///     if counter.get() == seeded_at {
///         break bytes;
///     }
///     seeded_at = counter.barrier()?;
///     pool = seed();
/// }
/// # ; Ok::<(), vmgenid::Error>(())
/// ```
///
/// # After `fork`
///
/// The child has the mapping and the file. All methods work in both processes. [`Guard`] detects
/// the fork; a `Counter` does not. The two processes share the readiness of [`AsFd`], because it is
/// one open file. A child with an event loop of its own opens a counter of its own.
/// [`wait`](Self::wait) always opens the device anew.
///
/// # After an unbind
///
/// [`barrier`](Self::barrier) and [`wait`](Self::wait) return [`Error::Gone`]. [`get`](Self::get)
/// continues to follow the hypervisor. With [`Source::Sysgenid`] it changes once more, and then no
/// longer. [`Source::Vmclock`] has no such error.
///
/// [`Cached`]: crate::Cached
/// [`Guard`]: crate::Guard
#[derive(Debug)]
pub struct Counter {
    source: Source,
    fd: OwnedFd,
    page: Arc<Page>,
    word: Word,
    /// Whether the page is VMClock's.
    vmclock: bool,
}

/// The major number of the three devices: `MISC_MAJOR` of `include/uapi/linux/major.h`.
const MISC: u32 = 10;

impl Counter {
    /// Opens the best source of this machine. [`Source`] describes the promises of each source;
    /// [`source`](Self::source) returns which one it is.
    ///
    /// # Errors
    ///
    /// - [`Error::NoCounter`]: there is none.
    /// - [`Error::Open`]: there is one, and it cannot be opened. A worse one is not taken instead,
    ///   except of a VMClock that the caller may not open: Linux gives it to root only.
    /// - [`Error::NotTheDevice`]: something else has its name.
    pub fn open() -> Result<Self, Error> {
        let at = |source: &Source| (*source, Path::new(source.path()));
        Self::open_first(&Source::ALL.iter().map(at).collect::<Vec<_>>())
    }

    pub(crate) fn open_first(sources: &[(Source, &Path)]) -> Result<Self, Error> {
        let mut missing = Error::NoCounter;
        for (source, path) in sources {
            match Self::open_path(*source, path) {
                Err(Error::Open { error, .. }) if is_missing(&error) => {}
                Err(refused @ Error::Open { .. })
                    if *source == Source::Vmclock && is_refused(&refused) =>
                {
                    missing = refused;
                }
                // Most vmclocks have no counter.
                Err(Error::NotTheDevice {
                    source: Source::Vmclock,
                    ..
                }) => {}
                result => return result,
            }
        }
        Err(missing)
    }

    /// Opens a device node at another path.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], and those of [`from_fd`](Self::from_fd).
    pub fn open_path(source: Source, path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let open = |flags| open(path, flags | OFlags::CLOEXEC, Mode::empty());
        let fd = match source {
            // To acknowledge changes. A process without the permission opens the file for reading.
            Source::Sysgenid => open(OFlags::RDWR | OFlags::NONBLOCK)
                .or_else(|_| open(OFlags::RDONLY | OFlags::NONBLOCK)),
            Source::Vmgenid | Source::Vmclock => open(OFlags::RDONLY),
        };
        let fd = fd.map_err(|error| Error::Open {
            path: path.into(),
            error: error.into(),
        })?;
        Self::from_fd(source, fd)
    }

    /// Uses a device that is open already, for example one that was opened before the process
    /// entered a sandbox. It has to be readable. [`Source::Vmgenid`] has to be open without
    /// `O_NONBLOCK`: otherwise [`barrier`](Self::barrier) fails with `EAGAIN` where it would have
    /// to wait.
    ///
    /// # Errors
    ///
    /// - [`Error::NotTheDevice`]: it is something else, or has no counter.
    /// - [`Error::Gone`]: it was unbound.
    /// - [`Error::System`]: it could not be mapped.
    pub fn from_fd(source: Source, fd: OwnedFd) -> Result<Self, Error> {
        let not_the_device = |why| Err(Error::NotTheDevice { source, why });
        let stat = fstat(&fd).map_err(Error::system("fstat"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
            return not_the_device("not a character device");
        }
        if major(stat.st_rdev) != MISC {
            return not_the_device("not a misc device, whose major number is 10");
        }
        // Both devices refuse a read of another size. This check comes before the mapping, which
        // other devices have, too.
        let odd = match source {
            Source::Vmgenid => Some(5),
            Source::Sysgenid => Some(3),
            Source::Vmclock => None,
        };
        if let Some(odd) = odd {
            match retry_on_intr(|| read(&fd, &mut [0; 5][..odd])) {
                Err(Errno::INVAL) => {}
                Err(Errno::NODEV) => return Err(Error::Gone),
                Err(Errno::BADF) => return not_the_device("not open for reading"),
                _ => return not_the_device("it gives more or less than a counter"),
            }
        }

        let counter = Self::map(source, fd)?;
        counter.barrier()?;
        // The rest of the page has to be zeros, or the 64-bit load would never be equal to the
        // result of the barrier.
        if !counter.vmclock && counter.get().number() >> 32 != 0 {
            return not_the_device("its page has more than a counter");
        }
        Ok(counter)
    }

    /// Maps the device.
    pub(crate) fn map(source: Source, fd: OwnedFd) -> Result<Self, Error> {
        let map = |offset| Page::map(Some(fd.as_fd()), offset);
        let (page, vmclock) = match (source, map(0)) {
            // The counter is VMClock's, and so is the page, which is the second one.
            (Source::Vmgenid, Err(Errno::NODEV)) => (map(page_size()), true),
            (_, page) => (page, source == Source::Vmclock),
        };
        let page = page.map_err(|errno| match (source, errno) {
            // A read of an unbound device fails with the same error. A read of another device does not.
            (Source::Vmgenid, Errno::NODEV)
                if retry_on_intr(|| read(&fd, &mut [0; 4])) == Err(Errno::NODEV) =>
            {
                Error::Gone
            }
            (_, Errno::NODEV) => Error::NotTheDevice {
                source,
                why: "it cannot be mapped",
            },
            _ => Error::system("mmap")(errno),
        })?;
        if vmclock {
            if let Some(why) = vmclock::missing(&page) {
                return Err(Error::NotTheDevice { source, why });
            }
        }
        // A u32, and zeros after it: as a u64 it is the same number. VMClock has a u64.
        let word = Word::new(page.clone(), if vmclock { vmclock::COUNTER } else { 0 });
        Ok(Self {
            source,
            fd,
            page,
            word,
            vmclock,
        })
    }

    /// Returns which source this is.
    #[must_use]
    pub fn source(&self) -> Source {
        self.source
    }

    /// Returns the generation: one load, no barrier. The caller compares it with the result of
    /// [`barrier`](Self::barrier), and calls that if they differ.
    ///
    /// If the machine was restored before this call, and the source [is
    /// immediate](Source::is_immediate), this is the new generation.
    #[inline(always)]
    #[must_use]
    pub fn get(&self) -> Generation {
        Generation(self.word.load())
    }

    pub(crate) fn word(&self) -> &Word {
        &self.word
    }

    /// Returns the generation. When this returns, the kernel's random number generator has been
    /// reseeded since the restore that began this generation, if the source
    /// [has a barrier](Source::has_barrier). Later draws from the kernel differ from those of all other
    /// clones. (If the kernel's generator is not initialised yet, drawing from it waits for that.)
    /// After a restore this may sleep until the kernel has been reseeded.
    ///
    /// The caller calls this before it draws. Then a restore in between is seen as a change.
    ///
    /// # Errors
    ///
    /// - [`Error::Gone`]: the device was unbound; there is no barrier.
    /// - [`Error::NotTheDevice`]: the file does not behave like any of the devices.
    /// - [`Error::Busy`]: only where the counter is VMClock's.
    pub fn barrier(&self) -> Result<Generation, Error> {
        let number = match self.source {
            // A read returns 32 bits. The page has all 64, maybe of an earlier generation.
            Source::Vmgenid if self.vmclock => loop {
                let (number, read) = (vmclock::load(&self.page)?, self.read()?);
                if number as u32 == read {
                    break number;
                }
            },
            Source::Vmgenid => u64::from(self.read()?),
            Source::Vmclock => vmclock::load(&self.page)?,
            Source::Sysgenid => {
                // This project's driver starts a reseed that is due, and counts it when it is complete.
                loop {
                    match poll_in(&self.fd, Some(Duration::ZERO))? {
                        Polled::Hangup => return Err(Error::Gone),
                        Polled::Interrupted => {}
                        Polled::Changed | Polled::Timeout => break,
                    }
                }
                let number = self.page.u32(0);
                // For processes that poll the file. A failure is no error: the file then stays
                // readable.
                let _ = write(&self.fd, &number.to_ne_bytes());
                u64::from(number)
            }
        };
        Ok(Generation(number))
    }

    fn read(&self) -> Result<u32, Error> {
        let mut number = [0; 4];
        match retry_on_intr(|| read(&self.fd, &mut number)) {
            Ok(4) => Ok(u32::from_ne_bytes(number)),
            Ok(_) => Err(Error::NotTheDevice {
                source: self.source,
                why: "a read of 4 bytes gives less",
            }),
            Err(Errno::NODEV) => Err(Error::Gone),
            Err(errno) => Err(Error::system("read")(errno)),
        }
    }

    /// Waits until the generation is another one than `since`, but no longer than `timeout`, and
    /// returns it, after the barrier. `None`: it is still the same.
    ///
    /// Many threads can wait for one counter, and others use it meanwhile: each call opens the
    /// device anew, by way of `/proc`.
    ///
    /// # Errors
    ///
    /// - [`Error::Gone`]: the device was unbound, maybe while this waited.
    /// - [`Error::CannotWait`]: the source does not tell, or there is no `/proc`.
    /// - Those of [`barrier`](Self::barrier).
    pub fn wait(
        &self,
        since: Generation,
        timeout: Option<Duration>,
    ) -> Result<Option<Generation>, Error> {
        // A time that does not fit is for ever.
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            // An open file reports changes since it was opened, read or written. Other threads read
            // and write the counter's file, so this needs a file of its own.
            let own = self.reopen()?;
            if self.get() != since {
                return self.barrier().map(Some);
            }
            if self.source == Source::Vmclock {
                // It reports all changes of its page since the last read. The first read is here.
                match retry_on_intr(|| pread(&own, &mut [0; 8], vmclock::COUNTER as u64)) {
                    Ok(8) if self.get() == since => {}
                    Ok(8) => continue,
                    Ok(_) => {
                        return Err(Error::NotTheDevice {
                            source: self.source,
                            why: "its page cannot be read",
                        });
                    }
                    Err(errno) => return Err(Error::system("pread")(errno)),
                }
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            match poll_in(&own, left)? {
                Polled::Timeout => return Ok(None),
                // Compare again, with the rest of the time.
                Polled::Changed | Polled::Interrupted => {}
                Polled::Hangup => {
                    return Err(match self.source {
                        Source::Vmclock => Error::CannotWait {
                            why: "this hypervisor's vmclock sends no notifications",
                        },
                        Source::Vmgenid | Source::Sysgenid => Error::Gone,
                    });
                }
            }
        }
    }

    /// Opens the device once more.
    fn reopen(&self) -> Result<OwnedFd, Error> {
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        open(&path, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::NODEV | Errno::NXIO => Error::Gone,
            Errno::NOENT => Error::CannotWait {
                why: "/proc is not mounted",
            },
            _ => Error::Open {
                path: path.into(),
                error: errno.into(),
            },
        })
    }
}

/// The open device, for `poll`. It is readable when the generation differs from that of the last
/// [`barrier`](Counter::barrier), at first from that at the open.
///
/// It stays readable until [`barrier`](Counter::barrier) is called on this counter, also by another
/// user of the counter, such as a [`Guard`](crate::Guard). So an event loop has a counter of its
/// own. With [`Source::Sysgenid`] the barrier ends the readiness only for a process that may write
/// to the device, as root may; other processes poll edge-triggered. With [`Source::Vmclock`] the
/// file is also readable after changes of the clock, until it is read.
impl AsFd for Counter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Counter {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// The open device, for example to pass it to another process. The mapping ends.
impl From<Counter> for OwnedFd {
    fn from(counter: Counter) -> Self {
        counter.fd
    }
}

/// Whether the device does not exist.
fn is_missing(error: &std::io::Error) -> bool {
    let missing = [Errno::NOENT, Errno::NXIO, Errno::NODEV];
    missing
        .map(Errno::raw_os_error)
        .map(Some)
        .contains(&error.raw_os_error())
}

/// Whether the caller may not open the device.
fn is_refused(error: &Error) -> bool {
    matches!(error, Error::Open { error, .. } if error.kind() == ErrorKind::PermissionDenied)
}

enum Polled {
    Timeout,
    Changed,
    Hangup,
    Interrupted,
}

fn poll_in(fd: &OwnedFd, timeout: Option<Duration>) -> Result<Polled, Error> {
    // What does not fit is for ever.
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    match poll(&mut fds, timeout.as_ref()) {
        Ok(0) => Ok(Polled::Timeout),
        Ok(_) if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) => Ok(Polled::Hangup),
        Ok(_) => Ok(Polled::Changed),
        Err(Errno::INTR) => Ok(Polled::Interrupted),
        Err(errno) => Err(Error::system("poll")(errno)),
    }
}
