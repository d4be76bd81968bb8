// SPDX-License-Identifier: GPL-2.0

//! Pages of the kernel's own that processes can map, to read.
//!
//! C header: [`include/linux/highmem.h`](srctree/include/linux/highmem.h)

use kernel::{
    alloc::flags::__GFP_ZERO,
    bindings,
    page::Page,
    prelude::*,
    sync::atomic::{
        Atomic,
        Release, //
    }, //
};

/// A page that begins with a native-endian u32; the rest of it is zeros.
pub(crate) struct SharedPage(Page);

impl SharedPage {
    /// Makes a page that begins with 0.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: there is no memory.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?))
    }

    /// Stores the u32, in one piece. Who sees it sees all that was done before.
    pub(crate) fn store(&self, value: u32) {
        // SAFETY: The page is valid.
        let address = unsafe { bindings::kmap_local_page(self.0.as_ptr()) };
        // SAFETY: A page is mapped there, whole, until it is unmapped below. Nobody accesses it but
        // through this, and processes, which cannot write.
        let word = unsafe { Atomic::<u32>::from_ptr(address.cast()) };
        word.store(value, Release);
        // SAFETY: Mapped above, and nothing else since.
        unsafe { bindings::kunmap_local(address) };
    }

    /// Returns the page, for mappings that cannot be written to.
    pub(super) fn page(&self) -> &Page {
        &self.0
    }
}
