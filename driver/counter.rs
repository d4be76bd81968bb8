// SPDX-License-Identifier: GPL-2.0

//! The generation counter, and why reading it is a barrier.

use super::{
    generation_id::GenerationId,
    kernel::{
        memremap::{
            Mapping,
            ReservedPage, //
        },
        mm::VmaNewExt, //
    }, //
};
use kernel::{
    mm::virt::VmaNew,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed, //
        },
        Arc, //
    }, //
};

/// The generation counter of a device: a little-endian u32 at the start of a page of its own.
///
/// Shared by the bound device and all open files; it outlives an unbind until the last file is
/// closed.
pub(crate) struct Counter {
    id: Arc<GenerationId>,
    page: ReservedPage,
    memory: Mapping<Atomic<u32>>,
    bound: Atomic<bool>,
}

impl Counter {
    /// Maps the counter in `page`, which belongs to `id`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: there is no memory, or no room for the mapping.
    pub(crate) fn new(id: Arc<GenerationId>, page: ReservedPage) -> Result<Arc<Self>> {
        let counter = Self {
            id,
            page,
            memory: Mapping::new(page.range())?,
            bound: Atomic::new(true),
        };
        Ok(Arc::new(counter, GFP_KERNEL)?)
    }

    /// Returns the counter, without a barrier.
    pub(crate) fn peek(&self) -> u32 {
        // `Acquire`: what is looked at next, the ID, is no older than the counter.
        u32::from_le(self.memory.load(Acquire))
    }

    /// Returns the counter; whatever it is, the kernel's random number generator has been
    /// reseeded with the ID that came with it.
    ///
    /// The order is what makes it a barrier. The hypervisor changes the ID first and the counter
    /// second. The counter is loaded first here and the ID is looked at second: if this counter
    /// is new, that ID is, too.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the device was unbound.
    #[inline]
    pub(crate) fn read(&self) -> Result<u32> {
        if !self.bound.load(Relaxed) {
            return Err(ENODEV);
        }
        let value = self.peek();
        self.id.apply_reseed_rule();
        Ok(value)
    }

    /// Maps the counter's page into a process.
    ///
    /// # Errors
    ///
    /// `ENODEV` as for [`Counter::read`], else those of [`VmaNewExt::map_readonly`].
    pub(crate) fn mmap(&self, vma: &VmaNew) -> Result {
        if !self.bound.load(Relaxed) {
            return Err(ENODEV);
        }
        vma.map_readonly(&self.page)
    }
}

/// That a counter's device is bound. When this is dropped it no longer is: open files answer
/// `ENODEV` from then on.
pub(crate) struct Binding(Arc<Counter>);

impl Binding {
    /// Says that the device of `counter` is bound.
    pub(crate) fn new(counter: Arc<Counter>) -> Self {
        Self(counter)
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        self.0.bound.store(false, Relaxed);
    }
}
