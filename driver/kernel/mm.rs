// SPDX-License-Identifier: GPL-2.0

//! What [`VmaNew`] lacks: mappings that stay read-only, also of memory without a `struct page`; and
//! pages of the kernel for them.
//!
//! C headers: [`include/linux/highmem.h`](srctree/include/linux/highmem.h),
//! [`include/linux/mm.h`](srctree/include/linux/mm.h)

use super::{
    memremap::ReservedPage,
    prelude::*, //
};
use kernel::{
    alloc::flags::__GFP_ZERO,
    mm::virt::VmaNew,
    page::Page, //
};

/// A page that begins with a native-endian u32; the rest of it is zeros.
///
/// # Invariants
///
/// Only [`SharedPage::store`] writes to the page. Processes that map it cannot write.
pub(crate) struct SharedPage(Page);

impl SharedPage {
    /// Allocates a page that begins with 0.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?))
    }

    /// Stores the u32 atomically: a process that loads it also sees the stores before this call.
    pub(crate) fn store(&self, value: u32) {
        // SAFETY: The page is valid.
        let address = unsafe { bindings::kmap_local_page(self.0.as_ptr()) };
        // SAFETY: The whole page is mapped there until it is unmapped below. By the type invariants
        // all other accesses are also atomic, or are loads by processes.
        let word = unsafe { Atomic::<u32>::from_ptr(address.cast()) };
        word.store(value, Release);
        // SAFETY: The page was mapped above, and no other page since.
        unsafe { bindings::kunmap_local(address) };
    }
}

/// A VMA that `mmap(2)` is setting up, without any page in it.
///
/// The methods that map a page consume it.
///
/// # Invariants
///
/// Nothing is mapped into the area, and neither `VM_PFNMAP` nor `VM_MIXEDMAP` is set.
pub(crate) struct Area<'a>(&'a VmaNew);

impl<'a> Area<'a> {
    /// Wraps the VMA that the `mmap` operation of a file gets.
    pub(super) fn new(vma: &'a VmaNew) -> Self {
        // INVARIANT: The VMA is new and empty. The callers, all in this folder, only pass it on.
        Self(vma)
    }

    /// Returns whether the area is one page, at this offset in pages.
    pub(crate) fn is_page(&self, offset: usize) -> bool {
        let vma = self.0;
        // SAFETY: The area is undergoing initialization, so no other thread has access to it.
        let pgoff = unsafe { (*vma.as_ptr()).vm_pgoff };
        pgoff == offset && vma.end() - vma.start() == PAGE_SIZE
    }

    /// Checks that the area is one page at this offset, and makes it read-only.
    fn make_readonly(&self, offset: usize) -> Result {
        if !self.is_page(offset) {
            return Err(EINVAL);
        }
        let vma = self.0;
        if vma.writable() || vma.executable() {
            return Err(EPERM);
        }
        vma.try_clear_maywrite()?;
        vma.try_clear_mayexec()
    }

    /// Maps `page`, to which processes give the offset `offset` in pages: cached. The area can never
    /// become writable or executable.
    ///
    /// The area is left out of core dumps, cannot grow, and is inherited by `fork()`. The page is
    /// not System RAM, so the mapping needs no reference.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: The area is not exactly one page at that offset.
    /// - `EPERM`: The area is to be writable or executable.
    /// - `ENOMEM`: There is no memory for the page tables.
    ///
    /// And those of `remap_pfn_range()`.
    pub(crate) fn map_reserved(self, page: &ReservedPage, offset: usize) -> Result {
        self.make_readonly(offset)?;

        // The function maps what is at the area's offset in this range: `page`, its last page.
        let before = offset * PAGE_SIZE;
        let start = page
            .range()
            .start()
            .checked_sub(before as u64)
            .ok_or(EINVAL)?;
        // SAFETY: The area is undergoing initialization and has the page's size. By the type
        // invariants nothing is mapped there. By the invariants of `ReservedPage` the kernel does
        // not use the page for anything else.
        to_result(unsafe { bindings::vm_iomap_memory(self.0.as_ptr(), start, before + PAGE_SIZE) })
    }

    /// Maps a page of the kernel in the same way, at offset 0, with the errors of
    /// `vm_insert_page()` instead. The mapping holds a reference to the page.
    pub(crate) fn map_shared(self, page: &SharedPage) -> Result {
        self.make_readonly(0)?;
        self.0.set_dontexpand();
        self.0.set_dontdump();
        self.0
            .set_mixedmap()
            .vm_insert_page(self.0.start(), &page.0)
    }
}
