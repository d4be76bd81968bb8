// SPDX-License-Identifier: MIT OR Apache-2.0

//! System calls with arguments that no ordinary program passes. All `unsafe` of this crate is here.
#![expect(unsafe_code, reason = "bad pointers and mappings are the subject")]

use anyhow::Context as _;
use io_uring::{opcode, squeue, types};
use object::{Object, ObjectSymbol};
use rustix::{
    event::{FdSetElement, FdSetIter, PollFlags, Timespec, fd_set_insert, fd_set_num_elements},
    fs::{Mode, OFlags},
    io::{Errno, IoSliceMut, Result},
    ioctl::{
        self, Setter, Updater,
        opcode::{read_write, write},
    },
    mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags, UserfaultfdFlags, userfaultfd},
    process::{Pid, Signal, WaitOptions, kill_process, waitpid},
    time::{ClockId, clock_gettime},
};
use std::{
    ffi::c_void,
    io,
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

pub fn open(path: &str) -> Result<OwnedFd> {
    open_as(path, OFlags::RDONLY)
}

pub fn open_as(path: &str, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Reads the counter: the barrier.
pub fn read(file: &OwnedFd) -> Result<u32> {
    let mut bytes = [0; 4];
    match rustix::io::read(file, &mut bytes)? {
        4 => Ok(u32::from_ne_bytes(bytes)),
        _ => Err(Errno::IO),
    }
}

/// [`read`] through an IO vector.
pub fn readv(file: &OwnedFd) -> Result<u32> {
    let mut bytes = [0; 4];
    match rustix::io::readv(file, &mut [IoSliceMut::new(&mut bytes)])? {
        4 => Ok(u32::from_ne_bytes(bytes)),
        _ => Err(Errno::IO),
    }
}

/// A mapping of a file, or of anonymous memory.
pub struct Map {
    at: *mut c_void,
    len: usize,
    /// The number of the word that counts as word 0.
    first: usize,
}

/// The word of VMClock's page that has the low half of its counter (`linux/vmclock-abi.h`).
pub const VMCLOCK_COUNTER: usize = 104 / 4;

/// Returns the offset of the counter's page: 0 for `CTRA`, one page for VMClock.
pub fn offset(file: &OwnedFd) -> u64 {
    let first = Map::of(file, page(), ProtFlags::READ, MapFlags::SHARED, 0);
    match first.map(drop) {
        Err(Errno::NODEV) => page() as u64,
        _ => 0,
    }
}

// SAFETY: A mapping belongs to the process, not to a thread.
unsafe impl Send for Map {}
// SAFETY: A shared reference gives access only to words that are loaded and stored atomically.
unsafe impl Sync for Map {}

impl Map {
    /// Maps the counter's page as a library does. Word 0 is the counter.
    pub fn readonly(file: &OwnedFd) -> Result<Self> {
        let at = |offset| Self::of(file, page(), ProtFlags::READ, MapFlags::SHARED, offset);
        match at(0) {
            Err(Errno::NODEV) => {
                let mut map = at(page() as u64)?;
                map.first = VMCLOCK_COUNTER;
                Ok(map)
            }
            result => result,
        }
    }

    /// Maps the page of `/dev/vmclock0`. Word 0 is the low half of the counter.
    pub fn vmclock(file: &OwnedFd) -> Result<Self> {
        let mut map = Self::of(file, page(), ProtFlags::READ, MapFlags::SHARED, 0)?;
        map.first = VMCLOCK_COUNTER;
        Ok(map)
    }

    /// Maps `len` bytes of the counter's page. Word 0 is the counter.
    pub fn counter(file: &OwnedFd, prot: ProtFlags, flags: MapFlags, len: usize) -> Result<Self> {
        let offset = offset(file);
        let mut map = Self::of(file, len, prot, flags, offset)?;
        if offset != 0 {
            map.first = VMCLOCK_COUNTER;
        }
        Ok(map)
    }

    pub fn of(
        file: &OwnedFd,
        len: usize,
        prot: ProtFlags,
        flags: MapFlags,
        offset: u64,
    ) -> Result<Self> {
        // SAFETY: A new mapping at an address of the kernel's choice replaces no other mapping.
        let at = unsafe { rustix::mm::mmap(ptr::null_mut(), len, prot, flags, file, offset) }?;
        // The kernel maps whole pages.
        let len = len.next_multiple_of(page());
        let first = 0;
        Ok(Self { at, len, first })
    }

    /// Anonymous memory, readable and writable.
    pub fn anonymous(len: usize) -> Result<Self> {
        Self::of_nothing(len, MapFlags::PRIVATE)
    }

    /// The same, shared with children.
    pub fn shared(len: usize) -> Result<Self> {
        Self::of_nothing(len, MapFlags::SHARED)
    }

    fn of_nothing(len: usize, flags: MapFlags) -> Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: As above.
        let at = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, prot, flags) }?;
        let first = 0;
        Ok(Self { at, len, first })
    }

    pub fn address(&self) -> usize {
        self.at as usize
    }

    /// A word. Other processes, or the hypervisor, may write to it at any time.
    #[inline(always)]
    pub fn word(&self, n: usize) -> &AtomicU32 {
        let n = self.first + n;
        assert!(n < self.len / 4);
        // SAFETY: In bounds and aligned; the mapping lives as long as `self`. Whether it can be
        // loaded depends on the protection that the caller chose; if it cannot, the program ends by
        // a signal.
        unsafe { &*self.at.cast::<AtomicU32>().add(n) }
    }

    /// Loads a word.
    #[inline(always)]
    pub fn load(&self, n: usize) -> u32 {
        self.word(n).load(Ordering::Relaxed)
    }

    /// Changes the protection of the part that begins at `from`.
    pub fn protect(&self, from: usize, prot: MprotectFlags) -> Result<()> {
        assert!(from < self.len);
        // SAFETY: The range is ours.
        unsafe { rustix::mm::mprotect(self.at.byte_add(from), self.len - from, prot) }
    }

    /// `madvise(2)` for all of it. The advice must be one that fails or leaves the mapping in place.
    pub fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: The range is ours, and its contents are loaded as words only.
        match unsafe { libc::madvise(self.at, self.len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Grows the mapping to `len`; it may move.
    pub fn grow(&mut self, len: usize) -> Result<()> {
        // SAFETY: The range is ours, and there is no reference to it.
        self.at = unsafe { rustix::mm::mremap(self.at, self.len, len, MremapFlags::MAYMOVE) }?;
        self.len = len;
        Ok(())
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: The range is ours.
        let _ = unsafe { rustix::mm::munmap(self.at, self.len) };
    }
}

/// How many times the kernel's generator has been reseeded, plus one, whatever the reason was:
/// the generation that the vDSO's `getrandom` compares (`struct vdso_rng_data`).
///
/// A kernel that has been up for less than two minutes reseeds every few seconds.
pub fn reseeds() -> anyhow::Result<u64> {
    /// `VDSO_RNG_PAGE_OFFSET` of `include/vdso/datapage.h`.
    const PAGE: usize = 2;
    static AT: OnceLock<usize> = OnceLock::new();
    if AT.get().is_none() {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let vvar = maps.lines().find(|line| line.ends_with("[vvar]"));
        let start = vvar.and_then(|line| line.split('-').next());
        let start = usize::from_str_radix(start.context("no vDSO data")?, 16)?;
        let _ = AT.set(start + PAGE * page());
    }
    let at = AT.get().context("no vDSO data")?;
    // SAFETY: The kernel maps these pages, readable, for as long as the process lives, and stores
    // the word atomically.
    Ok(unsafe { &*(*at as *const AtomicU64) }.load(Ordering::Acquire))
}

/// The guest's monotonic clock, in nanoseconds.
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Writes to an address of this process by `process_vm_writev(2)`, as a debugger does. rustix lacks
/// this call.
pub fn write_remote(address: usize, bytes: &[u8]) -> Result<usize> {
    let local = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let remote = libc::iovec {
        iov_base: address as *mut c_void,
        iov_len: bytes.len(),
    };
    // SAFETY: The local vector is valid. The remote one is in a mapping of the caller's, which is
    // loaded as words only.
    let written = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
    usize::try_from(written)
        .map_err(|_| Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Has the process itself answer the page faults of a range, until the file is closed:
/// `userfaultfd(2)`, `linux/userfaultfd.h`.
pub fn answer_faults(address: usize, len: usize) -> Result<OwnedFd> {
    /// The number of the interface, and of its ioctls.
    const API: u8 = 0xaa;
    /// `UFFDIO_REGISTER_MODE_MISSING`
    const MISSING: u64 = 1;
    // SAFETY: No thread has a fault in the range meanwhile.
    let file = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC) }?;
    let mut api = [u64::from(API), 0, 0];
    let mut range = [address as u64, len as u64, MISSING, 0];
    // SAFETY: `UFFDIO_API` takes three words, `UFFDIO_REGISTER` takes four.
    unsafe {
        ioctl::ioctl(
            &file,
            Updater::<{ read_write::<[u64; 3]>(API, 0x3f) }, _>::new(&mut api),
        )?;
        ioctl::ioctl(
            &file,
            Updater::<{ read_write::<[u64; 4]>(API, 0) }, _>::new(&mut range),
        )?;
    }
    Ok(file)
}

/// Adds these bytes to the kernel's generator, and credits it with their bits: `RNDADDENTROPY` of
/// `random(4)`, which needs `CAP_SYS_ADMIN`.
pub fn credit(seed: &[u8; 32]) -> Result<()> {
    /// `struct rand_pool_info`
    #[repr(C)]
    struct Info {
        entropy_count: i32,
        buf_size: i32,
        buf: [u8; 32],
    }
    let info = Info {
        entropy_count: 8 * 32,
        buf_size: 32,
        buf: *seed,
    };
    let file = open("/dev/random")?;
    // SAFETY: The ioctl reads a `struct rand_pool_info` with as many bytes as that says.
    unsafe {
        ioctl::ioctl(
            &file,
            Setter::<{ write::<[i32; 2]>(b'R', 3) }, _>::new(info),
        )
    }
}

/// `getrandom` of the vDSO, which computes random bytes in the process: `lib/vdso/getrandom.c`. The
/// C library that this program is linked with does not use it.
pub struct VdsoRandom {
    /// The addresses of the vDSO, and those of this function.
    pub image: Range<usize>,
    pub function: Range<usize>,
    call: VdsoGetrandom,
    state: *mut c_void,
    size: usize,
}

type VdsoGetrandom = unsafe extern "C" fn(*mut u8, usize, u32, *mut c_void, usize) -> isize;

impl VdsoRandom {
    pub fn new() -> anyhow::Result<Self> {
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let line = maps.lines().find(|line| line.ends_with("[vdso]"));
        let range = line.and_then(|line| line.split(' ').next()?.split_once('-'));
        let (start, end) = range.context("there is no vDSO")?;
        let [start, end] = [start, end].map(|at| usize::from_str_radix(at, 16));
        let (start, end) = (start?, end?);
        // SAFETY: The vDSO is mapped there for as long as the process runs, and never changes.
        let image = unsafe { std::slice::from_raw_parts(start as *const u8, end - start) };
        let image = object::read::elf::ElfFile64::<object::Endianness>::parse(image)?;
        let mut symbols = image.dynamic_symbols();
        let name = match cfg!(target_arch = "aarch64") {
            true => "__kernel_getrandom",
            false => "__vdso_getrandom",
        };
        let symbol = symbols.find(|symbol| symbol.name() == Ok(name));
        let symbol = symbol.context("the vDSO has no getrandom")?;
        let function = start + symbol.address() as usize;
        // SAFETY: This is the function of the vDSO that has this type.
        let call: VdsoGetrandom = unsafe { std::mem::transmute(function) };

        // `struct vgetrandom_opaque_params`: the state's size, and how to map it.
        let mut params = [0u32; 16];
        // SAFETY: With these arguments the function writes that structure.
        let told = unsafe {
            call(
                ptr::null_mut(),
                0,
                0,
                params.as_mut_ptr().cast(),
                usize::MAX,
            )
        };
        anyhow::ensure!(told == 0, "the vDSO says {told} about its state");
        let [size, prot, flags, ..] = params;
        // SAFETY: This is a new mapping of the kernel's choice.
        let state =
            unsafe { libc::mmap(ptr::null_mut(), page(), prot as i32, flags as i32, -1, 0) };
        anyhow::ensure!(state != libc::MAP_FAILED, "the state cannot be mapped");
        let size = size as usize;
        Ok(Self {
            image: start..end,
            function: function..function + symbol.size() as usize,
            call,
            state,
            size,
        })
    }

    /// Fills `bytes`.
    pub fn draw(&mut self, bytes: &mut [u8]) -> anyhow::Result<()> {
        // SAFETY: The buffer is valid, and the state is this one's alone.
        let drawn =
            unsafe { (self.call)(bytes.as_mut_ptr(), bytes.len(), 0, self.state, self.size) };
        anyhow::ensure!(drawn == bytes.len() as isize, "the vDSO returned {drawn}");
        Ok(())
    }
}

/// Makes this thread a real-time one, which rustix cannot.
pub fn set_fifo(priority: u8) -> Result<()> {
    let param = libc::sched_param {
        sched_priority: priority.into(),
    };
    // SAFETY: The parameter is valid for reading.
    answer(unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &param) } as isize).map(drop)
}

pub fn page() -> usize {
    rustix::param::page_size()
}

fn answer(result: isize) -> Result<usize> {
    usize::try_from(result).map_err(|_| {
        let err = std::io::Error::last_os_error();
        Errno::from_io_error(&err).unwrap_or(Errno::IO)
    })
}

/// `read(2)` to any address.
pub fn read_at_address(file: &OwnedFd, address: usize, len: usize) -> Result<usize> {
    // SAFETY: Tests pass addresses that are not mapped, or are their own; the kernel checks them.
    answer(unsafe { libc::read(file.as_raw_fd(), address as *mut c_void, len) })
}

/// `readv(2)` to any addresses, as (address, length).
pub fn readv_at_addresses(file: &OwnedFd, parts: &[(usize, usize)]) -> Result<usize> {
    let parts: Vec<_> = parts
        .iter()
        .map(|&(address, iov_len)| libc::iovec {
            iov_base: address as *mut c_void,
            iov_len,
        })
        .collect();
    // SAFETY: As in `read_at_address`.
    answer(unsafe { libc::readv(file.as_raw_fd(), parts.as_ptr(), parts.len() as i32) })
}

/// `write(2)` from any address.
pub fn write_at_address(file: &OwnedFd, address: usize, len: usize) -> Result<usize> {
    // SAFETY: As in `read_at_address`; the kernel only reads.
    answer(unsafe { libc::write(file.as_raw_fd(), address as *const c_void, len) })
}

/// `ioctl(2)` with an unused number.
pub fn unknown_ioctl(file: &OwnedFd) -> Result<()> {
    ioctl(file, 0x7fff_0000, 0)
}

/// `ioctl(2)` with an argument that is a small number.
pub fn ioctl(file: &OwnedFd, request: u32, argument: u8) -> Result<()> {
    // SAFETY: The argument is not a pointer that a driver could follow.
    answer(unsafe { libc::ioctl(file.as_raw_fd(), request.into(), u64::from(argument)) } as isize)
        .map(drop)
}

/// Runs `child` in a forked process, and does not wait for it.
pub fn fork(child: impl FnOnce() -> bool) -> Result<Pid> {
    // SAFETY: The program has one thread when it forks.
    let pid = answer(unsafe { libc::fork() } as isize)?;
    match Pid::from_raw(pid as i32) {
        Some(pid) => Ok(pid),
        None => {
            let ok = child();
            // SAFETY: Ends the process without running what the parent will run.
            unsafe { libc::_exit(if ok { 0 } else { 1 }) }
        }
    }
}

/// Makes a signal interrupt a system call that waits. The call is not restarted, and the signal has
/// no other effect.
pub fn let_interrupt(signal: Signal) -> Result<()> {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: All zeros is a valid `sigaction`: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as *const () as usize;
    // SAFETY: The action is valid, and its handler does nothing.
    answer(unsafe { libc::sigaction(signal.as_raw(), &action, ptr::null_mut()) } as isize).map(drop)
}

/// Ends a child.
pub fn end(pid: Pid) -> Result<()> {
    kill_process(pid, Signal::KILL)?;
    waitpid(Some(pid), WaitOptions::empty()).map(drop)
}

/// Waits for a child to end, and returns whether it succeeded.
pub fn ended(pid: Pid) -> Result<bool> {
    let ended = waitpid(Some(pid), WaitOptions::empty())?;
    Ok(ended.is_some_and(|(_, status)| status.exit_status() == Some(0)))
}

/// Runs `child` in a forked process, and returns whether it succeeded.
pub fn forked(child: impl FnOnce() -> bool) -> Result<bool> {
    ended(fork(child)?)
}

/// `select(2)` with the file in all three sets. Returns whether it is in the resulting sets to
/// read, to write, and of exceptions.
pub fn select(file: &OwnedFd, timeout: &Timespec) -> Result<[bool; 3]> {
    let fd = file.as_raw_fd();
    let mut set = vec![FdSetElement::default(); fd_set_num_elements(1, fd + 1)];
    fd_set_insert(&mut set, fd);
    let [mut read, mut write, mut except] = [set.clone(), set.clone(), set];
    let sets = (Some(&mut *read), Some(&mut *write), Some(&mut *except));
    // SAFETY: The descriptor is open.
    unsafe { rustix::event::select(fd + 1, sets.0, sets.1, sets.2, Some(timeout)) }?;
    Ok([read, write, except].map(|set| FdSetIter::new(&set).next().is_some()))
}

/// A ring of io_uring, for one operation at a time.
pub struct Uring(io_uring::IoUring);

impl Uring {
    pub fn new() -> anyhow::Result<Self> {
        Ok(Self(io_uring::IoUring::new(4)?))
    }

    /// The result of an operation, or `None` if it does not complete in time.
    fn run(&mut self, entry: &squeue::Entry, timeout: &Timespec) -> anyhow::Result<Option<u32>> {
        // SAFETY: The callers see to it that what the entry names outlives the operation.
        unsafe { self.0.submission().push(entry) }?;
        let time = types::Timespec::new()
            .sec(timeout.tv_sec as u64)
            .nsec(timeout.tv_nsec as u32);
        let args = types::SubmitArgs::new().timespec(&time);
        match self.0.submitter().submit_with_args(1, &args) {
            Err(err) if err.raw_os_error() == Some(libc::ETIME) => return Ok(None),
            submitted => submitted?,
        };
        // The kernel reports the submission also where the time is up before the completion.
        let Some(done) = self.0.completion().next() else {
            return Ok(None);
        };
        if done.result() < 0 {
            return Err(Errno::from_raw_os_error(-done.result()).into());
        }
        Ok(Some(done.result() as u32))
    }

    /// IORING_OP_READ of the counter. `None`: it did not complete in time.
    pub fn read(&mut self, file: &OwnedFd, timeout: &Timespec) -> anyhow::Result<Option<u32>> {
        // Never freed: an operation that hangs may end at any time.
        let word: &'static AtomicU32 = Box::leak(Box::new(AtomicU32::new(0)));
        let fd = types::Fd(file.as_raw_fd());
        let entry = opcode::Read::new(fd, word.as_ptr().cast(), 4).build();
        match self.run(&entry, timeout)? {
            None => Ok(None),
            Some(4) => Ok(Some(word.load(Ordering::Relaxed))),
            Some(len) => anyhow::bail!("io_uring read {len} bytes"),
        }
    }

    /// IORING_OP_POLL_ADD. `None`: no event came in time.
    pub fn poll(
        &mut self,
        file: &OwnedFd,
        mask: PollFlags,
        timeout: &Timespec,
    ) -> anyhow::Result<Option<PollFlags>> {
        let fd = types::Fd(file.as_raw_fd());
        let entry = opcode::PollAdd::new(fd, mask.bits().into()).build();
        let flags = self.run(&entry, timeout)?;
        Ok(flags.map(|flags| PollFlags::from_bits_retain(flags as u16)))
    }
}
