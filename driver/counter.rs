// SPDX-License-Identifier: GPL-2.0

//! The generation counter, and why reading it is a barrier.

use super::{
    generation_id::GenerationId,
    kernel::{
        memremap::{
            Mapping,
            ReservedPage, //
        },
        mm::VmaNewExt,
        rwonce::{
            read_barrier,
            ReadOnce, //
        }, //
    }, //
};
use kernel::{
    mm::virt::VmaNew,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        poll::PollCondVar,
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
    #[inline(always)]
    pub(crate) fn peek(&self) -> u32 {
        u32::from_le(self.memory.read_once())
    }

    /// `ENODEV`: the device was unbound.
    #[inline(always)]
    fn check_bound(&self) -> Result {
        if self.bound.read_once() {
            Ok(())
        } else {
            Err(ENODEV)
        }
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
    #[inline(always)]
    pub(crate) fn read(&self) -> Result<u32> {
        self.check_bound()?;
        let value = self.peek();
        read_barrier();
        self.id.apply_reseed_rule();
        Ok(value)
    }

    /// [`Counter::read`], where that does not sleep.
    ///
    /// # Errors
    ///
    /// `ENODEV` as there, and `EAGAIN`: the kernel has to be reseeded first.
    #[inline(always)]
    pub(crate) fn try_read(&self) -> Result<u32> {
        self.check_bound()?;
        let value = self.peek();
        read_barrier();
        if self.id.is_reseeded() {
            Ok(value)
        } else {
            Err(EAGAIN)
        }
    }

    /// Returns where to wait for a change, and for the unbinding of the device.
    pub(crate) fn changed(&self) -> &PollCondVar {
        self.id.notified()
    }

    /// Maps the counter's page into a process.
    ///
    /// # Errors
    ///
    /// `ENODEV` as for [`Counter::read`], else those of [`VmaNewExt::map_readonly`].
    pub(crate) fn mmap(&self, vma: &VmaNew) -> Result {
        self.check_bound()?;
        vma.map_readonly(&self.page)
    }
}

/// That a counter's device is bound. When this is dropped it no longer is: open files answer
/// `ENODEV` from then on, and who sleeps in `poll` wakes to see that.
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
        // Takes the lock of the wait queue: who was put into it before is woken; who comes later
        // sees that the device is not bound.
        self.0.changed().notify_all();
    }
}
