// SPDX-License-Identifier: GPL-2.0

//! What [`VmaNew`] lacks: mappings that are read-only for good, also of memory without a `struct
//! page`.
//!
//! C header: [`include/linux/mm.h`](srctree/include/linux/mm.h)

use super::{
    memremap::ReservedPage,
    page::SharedPage, //
};
use kernel::{
    bindings,
    error::to_result,
    mm::virt::VmaNew,
    page::PAGE_SIZE,
    prelude::*, //
};

/// An area of a process's memory that `mmap(2)` is about to make, and into which nothing is mapped.
///
/// Its methods consume it, since only one mapping can be made in it.
///
/// # Invariants
///
/// Nothing is mapped into the area, and neither `VM_PFNMAP` nor `VM_MIXEDMAP` is set.
pub(crate) struct Area<'a>(&'a VmaNew);

impl<'a> Area<'a> {
    /// Wraps what the `mmap` operation of a file gets.
    pub(super) fn new(vma: &'a VmaNew) -> Self {
        // INVARIANT: The area was just made. The caller, in this folder, gives it to nobody else.
        Self(vma)
    }

    /// Checks that the area is one page at offset 0 that can be made read-only, and makes it that.
    fn make_readonly(&self) -> Result {
        let vma = self.0;
        // SAFETY: The area is undergoing initialization, so nobody else has access to it.
        let offset = unsafe { (*vma.as_ptr()).vm_pgoff };
        if offset != 0 || vma.end() - vma.start() != PAGE_SIZE {
            return Err(EINVAL);
        }
        if vma.writable() || vma.executable() {
            return Err(EPERM);
        }
        vma.try_clear_maywrite()?;
        vma.try_clear_mayexec()
    }

    /// Maps `page`: cached, and for good neither writable nor executable.
    ///
    /// The area is left out of core dumps, cannot grow, and is inherited by `fork()`. The page is
    /// not the kernel's, so nothing has to outlive the mapping.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: The area is not exactly one page at offset 0.
    /// - `EPERM`: The area is to be writable or executable.
    /// - `ENOMEM`: There is no memory for the page tables.
    ///
    /// And those of `remap_pfn_range()`.
    pub(crate) fn map_reserved(self, page: &ReservedPage) -> Result {
        self.make_readonly()?;

        // SAFETY: The area is undergoing initialization and has the page's size. By the type
        // invariants nothing is mapped there. The page is not memory that the kernel gives to
        // anybody else, by its invariants.
        to_result(unsafe {
            bindings::vm_iomap_memory(self.0.as_ptr(), page.range().start(), PAGE_SIZE)
        })
    }

    /// Maps a page of the kernel's own in the same way, with the same errors. The mapping holds a
    /// reference to the page.
    pub(crate) fn map_shared(self, page: &SharedPage) -> Result {
        self.make_readonly()?;
        self.0.set_dontexpand();
        self.0.set_dontdump();
        self.0
            .set_mixedmap()
            .vm_insert_page(self.0.start(), page.page())
    }
}
