// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mapped memory. All `unsafe` of this crate is here.
#![expect(unsafe_code, reason = "mmap, and loads from what it returns")]

use rustix::{
    io::{Errno, Result},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap},
    param::page_size,
};
use std::{
    ffi::c_void,
    mem,
    os::fd::BorrowedFd,
    ptr::{self, NonNull},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

/// The part of a page that is used, in bytes. All pages are larger.
const SIZE: usize = 4096;

/// Two neighbours: a page of the process's own, which is wiped in the child after `fork`, and the
/// first page of a device. One address is enough for both.
///
/// # Invariants
///
/// - `at` is page aligned. From there, at least [`SIZE`] bytes are mapped and readable. This
///   process does not write there.
/// - Before it is one whole page that is private, anonymous, readable and writable, which `fork` wipes. It
///   is accessed through atomics only.
/// - Both stay so until this is dropped.
#[derive(Debug)]
pub struct Page {
    at: NonNull<c_void>,
}

impl Page {
    /// Maps the page of a file at `offset`, a multiple of [`page_size`]. The file must not become
    /// shorter later: a device's does not. Without a file, the page is zeros.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the kernel is older than 4.14, and cannot wipe. Else those of `mmap(2)`.
    pub fn map(fd: Option<BorrowedFd<'_>>, offset: usize) -> Result<Arc<Self>> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let len = 2 * page_size();
        // SAFETY: A new mapping, at an address of the kernel's choice.
        let both = unsafe { mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE) }?;
        // SAFETY: The second page is within what was just mapped.
        let second = unsafe { both.byte_add(page_size()) };
        // INVARIANT: The code below establishes the rest, before another reference to this exists.
        let page = Self {
            at: NonNull::new(second).ok_or(Errno::FAULT)?,
        };
        // SAFETY: The page is ours alone, and all zeros already.
        unsafe { madvise(both, page_size(), Advice::LinuxWipeOnFork) }?;
        if let Some(fd) = fd {
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: The replaced mapping is ours, and there is no reference to it.
            if let Err(err) =
                unsafe { mmap(second, SIZE, ProtFlags::READ, flags, fd, offset as u64) }
            {
                // The old mapping is gone: another thread may have mapped something there.
                mem::forget(page);
                // SAFETY: The first page is still ours, and there is no reference to it.
                let _ = unsafe { munmap(both, page_size()) };
                return Err(err);
            }
        }
        Ok(Arc::new(page))
    }

    /// Loads the little-endian u32 at a multiple of 4.
    pub fn u32(&self, offset: usize) -> u32 {
        assert!(offset % 4 == 0 && offset + 4 <= SIZE);
        // SAFETY: By the type invariants, and since the offset was checked, there is a readable
        // and aligned word there as long as `self` is borrowed.
        let word = unsafe { self.at.byte_add(offset).cast::<AtomicU32>().as_ref() };
        u32::from_le(word.load(Relaxed))
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: By the type invariants both are ours; there is no borrow any more. `munmap`
        // cannot fail for mappings that exist, so the result is ignored.
        let _ = unsafe { munmap(self.at.as_ptr().byte_sub(page_size()), 2 * page_size()) };
    }
}

// SAFETY: A mapping belongs to the process, not to a thread.
unsafe impl Send for Page {}
// SAFETY: All accesses through a shared reference are atomic.
unsafe impl Sync for Page {}

/// 64 bits of a page that the kernel or the hypervisor writes.
#[cfg(target_pointer_width = "64")]
type Cell = AtomicU64;

/// A 32-bit machine has no plain load of 64 bits, and its other instructions may write. A mix of an
/// old and a new half does no harm: it differs from the cached value, and the caller calls the
/// barrier.
#[cfg(not(target_pointer_width = "64"))]
type Cell = [AtomicU32; 2];

/// The distance from a [`Word`] back to the word of its process, in bytes. The latter is in the
/// page before the device's.
const APART: usize = 128;

/// A little-endian u64 in a [`Page`].
///
/// # Invariants
///
/// - `at` points at 8 bytes, aligned, that are readable as long as `page` is there.
/// - [`APART`] bytes before that are 8 bytes, aligned, in the page that `fork` wipes.
#[derive(Clone, Debug)]
pub struct Word {
    at: NonNull<Cell>,
    _page: Arc<Page>,
}

impl Word {
    /// The word at a multiple of 8, below 128.
    pub fn new(page: Arc<Page>, offset: usize) -> Self {
        assert!(offset % 8 == 0 && offset < APART);
        Self {
            // INVARIANT: By those of the page, and since the offset was checked.
            // SAFETY: Likewise.
            at: unsafe { page.at.byte_add(offset).cast() },
            _page: page,
        }
    }

    /// Loads the word: one instruction, on 64-bit machines.
    #[inline(always)]
    pub fn load(&self) -> u64 {
        // SAFETY: By the type invariants.
        let cell = unsafe { self.at.as_ref() };
        #[cfg(target_pointer_width = "64")]
        let word = u64::from_le(cell.load(Relaxed));
        #[cfg(not(target_pointer_width = "64"))]
        let word = {
            let [low, high] = cell.each_ref().map(|half| u32::from_le(half.load(Relaxed)));
            (u64::from(high) << 32) | u64::from(low)
        };
        word
    }

    /// The number of the process: zero at first, and in the child after `fork`, until a number is
    /// stored.
    #[inline(always)]
    pub fn process(&self) -> &AtomicU64 {
        // SAFETY: By the type invariants. The kernel writes there, too, but only in a child that
        // does not run yet.
        unsafe { self.at.byte_sub(APART).cast().as_ref() }
    }
}

// SAFETY: A pointer to memory of the process, not of a thread.
unsafe impl Send for Word {}
// SAFETY: All accesses through a shared reference are atomic.
unsafe impl Sync for Word {}
