// SPDX-License-Identifier: GPL-2.0

//! The generation ID, and whether the kernel was reseeded with it.
//!
//! The ID is 128 bits of guest memory that the hypervisor fills anew for each clone. It is secret:
//! nothing here logs it or hands it out, but to the kernel's random number generator.

use super::{
    kernel::{
        memremap::{
            Mapping,
            Range, //
        },
        rwonce::{
            read_barrier,
            ReadOnce, //
        }, //
    },
    reseed::Rule,
    sysgenid::Reseeds, //
};
use kernel::{
    new_poll_condvar,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed,
            Release, //
        },
        poll::PollCondVar,
        Arc, //
    }, //
};

/// The size of a generation ID, in bytes.
pub(crate) const SIZE: usize = 16;

/// One look at a generation ID: 16 bytes, in two native words. Never as a number.
pub(crate) type Id = [u64; 2];

/// How long a caller can be kept who needs the kernel to be reseeded.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Patience {
    /// Not at all: it must not sleep.
    None,
    /// While this module reseeds, where it does that itself.
    Brief,
    /// Also until somebody else has reseeded.
    Full,
}

/// The last ID that the kernel is known to have been reseeded with.
///
/// Who looks without a lock can see one word of the next ID already, and one of the last. Both
/// being equal to what is in memory would then take an ID made of halves of two others; IDs are
/// random.
pub(crate) struct Published([Atomic<u64>; 2]);

impl Published {
    pub(crate) fn new(first: Id) -> Self {
        Self(first.map(Atomic::new))
    }

    /// Returns whether it is `id`. If so, what follows comes after that reseed.
    #[inline(always)]
    pub(crate) fn is(&self, id: Id) -> bool {
        let [first, second] = &self.0;
        let same = id[0] == first.read_once() && id[1] == second.read_once();
        // Pairs with the `Release` in `set`.
        read_barrier();
        same
    }

    /// Publishes an ID, after the reseed. One caller at a time.
    pub(crate) fn set(&self, id: Id) {
        for (published, word) in self.0.iter().zip(id) {
            published.store(word, Release);
        }
    }
}

/// A generation ID somewhere in guest memory.
#[pin_data]
pub(crate) struct GenerationId {
    range: Range,

    /// Written by the hypervisor: while no vCPU runs, or at any time before it changes the
    /// counter.
    memory: Mapping<[Atomic<u64>; 2]>,

    /// Who reseeds the kernel, and when.
    #[pin]
    pub(super) rule: Rule,

    #[pin]
    notified: PollCondVar,

    /// If they are counted.
    reseeds: Option<Arc<Reseeds>>,
}

impl GenerationId {
    /// Maps the ID in `range`. `reseeds`: where to count the reseeds with this ID.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: `range` is not 8-byte aligned.
    /// - `ENOMEM`: there is no memory, or no room for the mapping.
    pub(crate) fn new(range: Range, reseeds: Option<Arc<Reseeds>>) -> Result<Arc<Self>> {
        let memory = Mapping::<[Atomic<u64>; 2]>::new(&range)?;
        let first = memory.each_ref().map(|word| word.load(Relaxed));

        Arc::pin_init(
            pin_init!(Self {
                range,
                memory,
                rule <- Rule::new(first),
                notified <- new_poll_condvar!("GenerationId::notified"),
                reseeds,
            }),
            GFP_KERNEL,
        )
    }

    /// Returns where the ID is.
    pub(crate) fn range(&self) -> &Range {
        &self.range
    }

    /// Returns what is in memory now.
    #[inline(always)]
    pub(super) fn look(&self) -> Id {
        self.memory.each_ref().map(ReadOnce::read_once)
    }

    /// The reseed rule: when this returns `Ok`, the kernel's random number generator has been
    /// reseeded with the ID that was in memory when it was called.
    ///
    /// Where the ID is unchanged this is four loads. Else it may sleep, and call the vmfork
    /// notifiers, which take `rtnl_lock`: not to be called under a lock that is taken inside that.
    ///
    /// # Errors
    ///
    /// Those of [`GenerationId::reseed`], where the kernel has not been.
    #[inline(always)]
    pub(crate) fn apply_reseed_rule(&self, patience: Patience) -> Result {
        if self.is_reseeded() {
            Ok(())
        } else {
            self.reseed(patience)
        }
    }

    /// Returns whether the reseed rule would return at once.
    #[inline(always)]
    pub(crate) fn is_reseeded(&self) -> bool {
        self.rule.is_published(self.look())
    }

    /// Returns where the reseeds with this ID are counted, if they are.
    pub(crate) fn reseeds(&self) -> Option<&Arc<Reseeds>> {
        self.reseeds.as_ref()
    }

    /// Returns where to wait for a notification. It has been acted upon when the waiters wake.
    pub(crate) fn notified(&self) -> &PollCondVar {
        &self.notified
    }
}
