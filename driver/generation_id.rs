// SPDX-License-Identifier: GPL-2.0

//! The generation ID, and the reseed rule.
//!
//! The ID is 128 bits of guest memory that the hypervisor fills anew for each clone. It is secret:
//! nothing here logs it or hands it out, but to the kernel's random number generator.

use super::kernel::{
    acpi,
    memremap::{
        Mapping,
        Range, //
    },
    random,
    static_mutex::StaticMutex, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        new_mutex,
        static_lock_class,
        Arc,
        Mutex, //
    }, //
};

/// The size of a generation ID, in bytes.
pub(crate) const SIZE: usize = 16;

/// One look at a generation ID: 16 bytes, in two native words. Never as a number.
type Id = [u64; 2];

/// A generation ID somewhere in guest memory, and the last one that the kernel was reseeded with.
#[pin_data]
pub(crate) struct GenerationId {
    range: Range,

    /// Written by the hypervisor: while no vCPU runs, or at any time before it changes the
    /// counter.
    memory: Mapping<[Atomic<u64>; 2]>,

    /// The ID that was added to the random number generator last. Written under `reseeding`,
    /// after that.
    ///
    /// Who looks without the lock can see one word of the next ID already, and one of the last.
    /// Both being equal to what is in memory would then take an ID made of halves of two others;
    /// IDs are random.
    published: [Atomic<u64>; 2],

    #[pin]
    reseeding: Mutex<()>,
}

/// The IDs that were ever bound, kept as long as the module is loaded: an ID that changes between
/// unbind and bind is a restore like any other.
static KNOWN: StaticMutex<KVec<Arc<GenerationId>>> =
    StaticMutex::new(c"vmgenid::KNOWN", || static_lock_class!(), KVec::new);

/// Forgets the IDs when it is dropped, that is when the module is unloaded.
pub(crate) struct Known(());

impl Known {
    /// To be called before anything is bound: the first use of the list.
    pub(crate) fn new() -> Self {
        drop(KNOWN.lock());
        Self(())
    }

    /// Returns whether `range` holds a byte of any ID that was ever bound.
    pub(crate) fn overlap(range: &Range) -> bool {
        KNOWN.lock().iter().any(|id| id.range.overlaps(range))
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        // A static is never dropped; its elements are, here.
        drop(core::mem::take(&mut *KNOWN.lock()));
    }
}

impl GenerationId {
    /// Returns the ID that lies in `range`, with the last value seen there.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: `range` is not 8-byte aligned.
    /// - `ENOMEM`: there is no memory, or no room for the mapping.
    pub(crate) fn get(range: &Range) -> Result<Arc<Self>> {
        let mut known = KNOWN.lock();

        if let Some(id) = known.iter().find(|id| id.range.start() == range.start()) {
            return Ok(id.clone());
        }

        let id = Self::new(*range)?;
        known.push(id.clone(), GFP_KERNEL)?;
        Ok(id)
    }

    /// Maps an ID and adds it to the random number generator as device randomness.
    fn new(range: Range) -> Result<Arc<Self>> {
        let memory = Mapping::<[Atomic<u64>; 2]>::new(&range)?;
        let first = memory.each_ref().map(|word| word.load(Relaxed));
        random::add_device_randomness(first.as_bytes());

        Arc::pin_init(
            pin_init!(Self {
                range,
                memory,
                published: first.map(Atomic::new),
                reseeding <- new_mutex!((), "GenerationId::reseeding"),
            }),
            GFP_KERNEL,
        )
    }

    fn look(&self) -> Id {
        self.memory.each_ref().map(|word| word.load(Relaxed))
    }

    /// The reseed rule: when this returns, the kernel's random number generator has been reseeded
    /// with the ID that was in memory when it was called.
    ///
    /// Where the ID is unchanged this is four loads. Else it sleeps, and calls the vmfork
    /// notifiers, which take `rtnl_lock`: not to be called under a lock that is taken inside that.
    #[inline]
    pub(crate) fn apply_reseed_rule(&self) {
        // `Acquire` pairs with `Release` in `reseed`: who sees the new ID there comes after the
        // reseed.
        if self.look() != self.published.each_ref().map(|word| word.load(Acquire)) {
            self.reseed();
        }
    }

    #[cold]
    fn reseed(&self) {
        let _guard = self.reseeding.lock();

        let id = self.look();
        // Somebody else may have done it while we waited.
        if id == self.published.each_ref().map(|word| word.load(Relaxed)) {
            return;
        }

        random::add_vmfork_randomness(id.as_bytes());
        for (published, word) in self.published.iter().zip(id) {
            published.store(word, Release);
        }
    }
}

impl acpi::NotifyHandler for GenerationId {
    fn notify(&self, _event: u32) {
        self.apply_reseed_rule();
    }
}
