// SPDX-License-Identifier: GPL-2.0

//! The generation counter, and why reading it is a barrier.

use super::kernel::{
    memremap::{
        Mapping,
        ReservedPage, //
    },
    rwonce::{
        read_barrier,
        read_once, //
    }, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// The size of the counter, in bytes: the only size that can be read.
pub(crate) const SIZE: usize = size_of::<u32>();

/// A generation counter: a little-endian u32 at the start of a page of its own.
pub(crate) struct Counter {
    page: ReservedPage,
    memory: Mapping<u32, 1>,
}

impl Counter {
    /// Maps the counter in `page`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: There is no memory, or no room for the mapping.
    pub(crate) fn new(page: ReservedPage) -> Result<Self> {
        Ok(Self {
            memory: Mapping::new(page.range())?,
            page,
        })
    }

    /// Returns the page.
    pub(crate) fn page(&self) -> &ReservedPage {
        &self.page
    }

    /// Returns the counter, without a barrier.
    #[inline(always)]
    pub(crate) fn load(&self) -> u32 {
        u32::from_le(read_once(&self.memory[0]))
    }

    /// Loads the counter, then calls `rule`. Returns the loaded counter and the result of `rule`.
    #[inline(always)]
    pub(crate) fn read<T>(&self, rule: impl FnOnce() -> T) -> (u32, T) {
        counter_first(|| self.load(), rule)
    }
}

/// Loads the counter, then applies the rule: the order that makes a read a barrier.
///
/// The hypervisor changes the ID first and the counter second. So if the loaded counter is new, the
/// rule finds the ID that came with it.
#[inline(always)]
fn counter_first<T>(counter: impl FnOnce() -> u32, rule: impl FnOnce() -> T) -> (u32, T) {
    let value = counter();
    read_barrier();
    (value, rule())
}

/// The value that a file returned last, at first the value at `open`. `poll` compares with it.
///
/// It is one word, so that a read of an unchanged counter makes one comparison.
pub(crate) struct LastRead(Atomic<u64>);

impl LastRead {
    /// Set when a read has returned `EAGAIN`: `poll` reports also an unchanged counter.
    const RETRY: u64 = 1 << 32;

    pub(crate) fn new(value: u32) -> Self {
        Self(Atomic::new(value.into()))
    }

    /// Stores that a read has returned `value`.
    pub(crate) fn returned(&self, value: u32) {
        self.0.store(value.into(), Relaxed);
    }

    /// Stores that a read has returned `EAGAIN`. The next read may return the same counter: an ID
    /// can change without a new counter.
    pub(crate) fn put_off(&self) {
        self.0.store(read_once(&self.0) | Self::RETRY, Relaxed);
    }

    /// Returns whether `poll` reports the file as readable, if the next read returns `value`.
    #[inline(always)]
    pub(crate) fn is_new(&self, value: u32) -> bool {
        read_once(&self.0) != value.into()
    }
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_counter)]
mod tests {
    use super::*;

    /// A machine that is restored after the first step.
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

        // Restored before both steps: the new counter, and the reseed.
        let machine = Machine::new();
        machine.step();
        let (value, ()) = counter_first(|| machine.counter(), || machine.rule());
        assert_eq!(value, 43);
        assert!(machine.reseeded.load(Relaxed));
    }

    #[test]
    fn a_value_that_was_read_is_not_new() {
        let last = LastRead::new(42);
        assert!(!last.is_new(42));
        assert!(last.is_new(43));
        assert!(last.is_new(41));
        last.returned(43);
        assert!(!last.is_new(43));
        assert!(last.is_new(42));
    }

    #[test]
    fn a_read_that_returned_eagain_is_reported_until_the_next_read() {
        for value in [0, 42, u32::MAX] {
            let last = LastRead::new(value);
            last.put_off();
            // For each value of the counter.
            for counter in [0, 41, 42, 43, !value, u32::MAX] {
                assert!(last.is_new(counter));
            }
            last.returned(value);
            assert!(!last.is_new(value));
            last.put_off();
            last.returned(!value);
            assert!(!last.is_new(!value));
        }
    }
}
