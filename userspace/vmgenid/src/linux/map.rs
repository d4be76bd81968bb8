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

/// How much of a page is looked at, in bytes. All pages are larger.
const SIZE: usize = 4096;

/// Two neighbours: a page of the process's own, which is wiped in the child after `fork`, and the first
/// page of a device. So that one address is enough for both.
///
/// # Invariants
///
/// - `at` is page aligned. From there, at least [`SIZE`] bytes are mapped and readable. Nobody in this
///   process writes there.
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
        // INVARIANT: What is not so yet is so before anybody else has this.
        let page = Self {
            at: NonNull::new(second).ok_or(Errno::FAULT)?,
        };
        // SAFETY: The page is ours alone, and all zeros already.
        unsafe { madvise(both, page_size(), Advice::LinuxWipeOnFork) }?;
        if let Some(fd) = fd {
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: What it replaces is ours, and nobody has looked at it.
            if let Err(err) =
                unsafe { mmap(second, SIZE, ProtFlags::READ, flags, fd, offset as u64) }
            {
                // What was there is gone: the second page may be somebody else's by now.
                mem::forget(page);
                // SAFETY: The first one is still ours, and nobody has looked at it.
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
        // SAFETY: By the type invariants both are ours; nobody borrows them any more. That it cannot
        // fail for mappings that exist is why the result is not looked at.
        let _ = unsafe { munmap(self.at.as_ptr().byte_sub(page_size()), 2 * page_size()) };
    }
}

// SAFETY: A mapping belongs to the process, not to a thread.
unsafe impl Send for Page {}
// SAFETY: What a shared reference gives access to is loaded and stored atomically.
unsafe impl Sync for Page {}

/// 64 bits of a page that somebody else writes.
#[cfg(target_pointer_width = "64")]
type Cell = AtomicU64;

/// A 32-bit machine has no plain load of 64 bits, and what it has instead may want to write. Which of
/// the halves is old does not matter: it is compared for being the same, and then asked for again.
#[cfg(not(target_pointer_width = "64"))]
type Cell = [AtomicU32; 2];

/// How far before a [`Word`] is that of its process, in bytes: still before the device's page.
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

    /// What stands for the process: zero at first, and in the child after `fork`, until somebody stores
    /// something else there.
    #[inline(always)]
    pub fn process(&self) -> &AtomicU64 {
        // SAFETY: By the type invariants. Whoever else writes there is the kernel, in a child that
        // does not run yet.
        unsafe { self.at.byte_sub(APART).cast().as_ref() }
    }
}

// SAFETY: A pointer to memory of the process, not of a thread.
unsafe impl Send for Word {}
// SAFETY: What a shared reference gives access to is loaded and stored atomically.
unsafe impl Sync for Word {}
