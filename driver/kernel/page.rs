// SPDX-License-Identifier: GPL-2.0

//! Pages of the kernel that processes can map read-only.
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
///
/// # Invariants
///
/// Only [`SharedPage::store`] writes to the page. Processes that map it cannot write.
pub(crate) struct SharedPage(Page);

impl SharedPage {
    /// Allocates a page that begins with 0.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: There is no memory.
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

    /// Returns the page, for read-only mappings.
    pub(super) fn page(&self) -> &Page {
        &self.0
    }
}
