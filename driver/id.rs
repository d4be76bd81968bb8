// SPDX-License-Identifier: GPL-2.0

//! The generation ID in memory, and the last one that was published.
//!
//! The ID is 128 bits of guest memory. The hypervisor writes a new ID for each clone. The ID is
//! secret: the driver does not log it, and passes it only to the kernel's random number generator.

use super::prelude::*;

/// The size of a generation ID, in bytes.
pub(crate) const SIZE: usize = 16;

/// The bytes of a generation ID, in two native words.
pub(crate) type Id = [u64; 2];

/// The last published ID: no older reseed can replace the result of the reseed with it.
///
/// [`Published::is`] can run while [`Published::set`] does. It does not compare with one word of
/// the next ID and one of the last.
pub(crate) struct Published([Atomic<u64>; 2]);

impl Published {
    /// Returns the state before an ID is published: each bit differs from `first`, that in memory.
    pub(crate) fn none(first: Id) -> Self {
        Self(first.map(|word| Atomic::new(!word)))
    }

    /// Returns whether `id` is published. If so, the caller's later loads come after that reseed.
    #[inline(always)]
    pub(crate) fn is(&self, id: Id) -> bool {
        let [first, second] = &self.0;
        if id[0] != read_once(first) {
            return false;
        }
        // Pairs with the `Release` of `first` in `set`.
        read_barrier();
        let same = id[1] == read_once(second);
        // Pairs with the `Release` of `second`.
        read_barrier();
        same
    }

    /// Publishes `id`. The caller has reseeded with it. One caller at a time.
    pub(crate) fn set(&self, id: Id) {
        let [first, second] = &self.0;
        // The next ID does not begin with this word. Nor does the last one: IDs are random.
        first.store(!id[0], Relaxed);
        second.store(id[1], Release);
        first.store(id[0], Release);
    }
}

/// A generation ID in guest memory.
pub(crate) struct GenerationId {
    pub(crate) range: Range,

    /// The hypervisor writes to it while no vCPU runs, or before it changes the counter.
    memory: Mapping<u64, 2>,
}

impl GenerationId {
    /// Maps the ID in `range`.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: `range` is not 8-byte aligned, or is shorter than [`SIZE`].
    /// - `ENOMEM`: There is no memory, or no room for the mapping.
    pub(crate) fn new(range: Range) -> Result<Self> {
        Ok(Self {
            memory: Mapping::new(&range)?,
            range,
        })
    }

    /// Loads the ID.
    #[inline(always)]
    pub(crate) fn load(&self) -> Id {
        self.memory.each_ref().map(read_once)
    }
}
