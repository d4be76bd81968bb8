// SPDX-License-Identifier: GPL-2.0

//! Read-only mappings of one page.

use super::memremap::ReservedPage;
pub(crate) use kernel::page::SharedPage;
use kernel::{
    mm::virt::VmaNew,
    page::PAGE_SIZE,
    prelude::*, //
};

/// A VMA that `mmap(2)` is setting up, without any page in it.
pub(crate) struct Area<'a>(&'a VmaNew);

impl<'a> Area<'a> {
    /// Wraps the VMA that the `mmap` operation of a file gets.
    pub(super) fn new(vma: &'a VmaNew) -> Self {
        Self(vma)
    }

    /// Returns whether the area is one page, at this offset in pages.
    pub(crate) fn is_page(&self, offset: usize) -> bool {
        self.0.pgoff() == offset && self.0.end() - self.0.start() == PAGE_SIZE
    }

    /// Checks that the area is one page at this offset, and makes it read-only for ever.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: The area is not exactly one page at that offset.
    /// - `EPERM`: The area is to be writable or executable.
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

    /// Maps `page`, to which processes give the offset `offset` in pages. The area is left out of
    /// core dumps, cannot grow, and is inherited by `fork()`. The errors are those of
    /// [`Area::make_readonly`], and `ENOMEM`.
    pub(crate) fn map_reserved(self, page: &ReservedPage, offset: usize) -> Result {
        self.make_readonly(offset)?;
        self.0.map_reserved_page(page)
    }

    /// Maps a page of the kernel in the same way, at offset 0. The mapping holds a reference to it.
    pub(crate) fn map_shared(self, page: &SharedPage) -> Result {
        self.make_readonly(0)?;
        self.0.set_dontexpand();
        self.0.set_dontdump();
        self.0
            .set_mixedmap()
            .vm_insert_page(self.0.start(), page.page())
    }
}
