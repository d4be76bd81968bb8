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
    mm::virt::{
        flags,
        VmaNew, //
    },
    page::PAGE_SIZE,
    prelude::*, //
};

/// An extension of [`VmaNew`].
pub(crate) trait VmaNewExt {
    /// Maps `page` into the area: cached, and for good neither writable nor executable.
    ///
    /// The area is left out of core dumps, cannot grow, and is inherited by `fork()`. The page is
    /// not the kernel's, so nothing has to outlive the mapping.
    ///
    /// This sets `VM_PFNMAP`. In the kernel crate, `VmaNew::set_mixedmap` has to refuse such an
    /// area then; until it does, it must not be called after this.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: the area is not exactly one page at offset 0.
    /// - `EPERM`: it is asked to be writable or executable.
    /// - `EBUSY`: something is mapped into it already.
    /// - `ENOMEM`: there is no memory for the page tables.
    ///
    /// And those of `remap_pfn_range()`.
    fn map_readonly(&self, page: &ReservedPage) -> Result;

    /// Maps a page of the kernel's own in the same way, with the same errors. The mapping keeps the
    /// page.
    fn map_shared_readonly(&self, page: &SharedPage) -> Result;
}

/// Checks an area for one page, and makes it read-only for good.
fn make_readonly(vma: &VmaNew) -> Result {
    // SAFETY: By the type invariants the area is valid, and not shared yet.
    let offset = unsafe { (*vma.as_ptr()).vm_pgoff };
    if offset != 0 || vma.end() - vma.start() != PAGE_SIZE {
        return Err(EINVAL);
    }
    if vma.writable() || vma.executable() {
        return Err(EPERM);
    }
    if vma.flags() & (flags::PFNMAP | flags::MIXEDMAP) != 0 {
        return Err(EBUSY);
    }
    vma.try_clear_maywrite()?;
    vma.try_clear_mayexec()
}

impl VmaNewExt for VmaNew {
    fn map_readonly(&self, page: &ReservedPage) -> Result {
        make_readonly(self)?;

        // SAFETY: The area is undergoing initialization, has the page's size, and nothing is mapped
        // there yet: what can be, sets one of the two flags. By its invariants, the page is not
        // memory that the kernel gives to anybody else.
        to_result(unsafe {
            bindings::vm_iomap_memory(self.as_ptr(), page.range().start(), PAGE_SIZE)
        })
    }

    fn map_shared_readonly(&self, page: &SharedPage) -> Result {
        make_readonly(self)?;
        self.set_dontexpand();
        self.set_dontdump();
        self.set_mixedmap()
            .vm_insert_page(self.start(), page.page())
    }
}
