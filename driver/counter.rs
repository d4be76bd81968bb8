// SPDX-License-Identifier: GPL-2.0

//! The generation counter, and why reading it is a barrier.

use super::{
    binding::Unbind,
    generation_id::{
        GenerationId,
        Patience, //
    },
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
    /// reseeded with the ID that came with it. See [`counter_first`] for why.
    ///
    /// # Errors
    ///
    /// `ENODEV`: the device was unbound. And those of [`GenerationId::apply_reseed_rule`].
    #[inline(always)]
    pub(crate) fn read(&self, patience: Patience) -> Result<u32> {
        self.check_bound()?;
        let (value, reseeded) =
            counter_first(|| self.peek(), || self.id.apply_reseed_rule(patience));
        reseeded.map(|()| value)
    }

    /// [`Counter::read`] without any [`Patience`], and in few instructions.
    ///
    /// # Errors
    ///
    /// `ENODEV` as there, and `EAGAIN`: the kernel has to be reseeded first.
    #[inline(always)]
    pub(crate) fn try_read(&self) -> Result<u32> {
        self.check_bound()?;
        match counter_first(|| self.peek(), || self.id.is_reseeded()) {
            (value, true) => Ok(value),
            (_, false) => Err(EAGAIN),
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

/// Loads the counter, then looks at the ID: the order that makes a read a barrier.
///
/// The hypervisor changes the ID first and the counter second. If the counter that is loaded first
/// here is new, so is the ID that is looked at second.
#[inline(always)]
fn counter_first<T>(counter: impl FnOnce() -> u32, id: impl FnOnce() -> T) -> (u32, T) {
    let value = counter();
    read_barrier();
    (value, id())
}

impl Unbind for Counter {
    fn unbind(&self) {
        self.bound.store(false, Relaxed);
        // Takes the lock of the wait queue: who was put into it before is woken; who comes later
        // sees that the device is not bound.
        self.changed().notify_all();
    }
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_counter)]
mod tests {
    use super::*;

    /// A machine that is restored after its first step: whichever that is.
    struct Machine {
        steps: Atomic<u32>,
        reseeded: Atomic<bool>,
    }

    impl Machine {
        fn new() -> Self {
            Self {
                steps: Atomic::new(0),
                reseeded: Atomic::new(false),
            }
        }

        /// Returns whether the machine was restored before this step.
        fn step(&self) -> bool {
            self.steps.fetch_add(1, Relaxed) > 0
        }

        fn counter(&self) -> u32 {
            if self.step() {
                43
            } else {
                42
            }
        }

        fn rule(&self) {
            if self.step() {
                self.reseeded.store(true, Relaxed);
            }
        }
    }

    #[test]
    fn a_new_counter_comes_after_the_reseed() {
        let machine = Machine::new();
        let (value, ()) = counter_first(|| machine.counter(), || machine.rule());
        assert!(value == 42 || machine.reseeded.load(Relaxed));

        // Restored before both of them: the new counter, and the reseed.
        let machine = Machine::new();
        machine.step();
        let (value, ()) = counter_first(|| machine.counter(), || machine.rule());
        assert_eq!(value, 43);
        assert!(machine.reseeded.load(Relaxed));
    }
}
