// SPDX-License-Identifier: GPL-2.0

//! The generation counter, and why reading it is a barrier.

use super::prelude::*;

/// The size of the counter, in bytes: the only size that can be read.
pub(crate) const SIZE: usize = size_of::<u32>();

/// Where the counter is in its page: the index of its u32.
#[derive(Clone, Copy, PartialEq)]
#[repr(usize)]
pub(crate) enum Layout {
    /// That of `CTRA`: a little-endian u32 at the start, then zeros.
    Word = 0,

    /// `struct vmclock_abi` of `include/uapi/linux/vmclock-abi.h`, which has a le64. The driver
    /// takes its low half.
    VmClock = 26,
}

/// The u32 of `struct vmclock_abi` that the driver loads: the offset in bytes, divided by 4.
mod vmclock {
    pub(super) const MAGIC: usize = 0;
    pub(super) const SIZE: usize = 1;
    /// The version is the low half of this word.
    pub(super) const VERSION: usize = 2;
    pub(super) const SEQ_COUNT: usize = 3;
    pub(super) const FLAGS: usize = 6;
    /// The number of words.
    pub(super) const LEN: usize = 28;
}

/// How many words of the page the driver maps: a power of 2.
const WORDS: usize = vmclock::LEN.next_power_of_two();

/// A generation counter, in a page that the hypervisor writes to.
pub(crate) struct Counter {
    pub(crate) page: ReservedPage,
    pub(crate) layout: Layout,
    memory: Mapping<u32, WORDS>,
}

impl Counter {
    /// Maps the counter in `page`. An error completes "CTRA ..." in the log.
    pub(crate) fn new(page: ReservedPage, layout: Layout) -> Result<Self, &'static str> {
        let counter = Self {
            memory: Mapping::new(page.range()).map_err(|_| "cannot be mapped: out of memory")?,
            layout,
            page,
        };
        if layout == Layout::VmClock {
            counter.check_vmclock()?;
        }
        Ok(counter)
    }

    fn check_vmclock(&self) -> Result<(), &'static str> {
        let word = |index| self.word(index);

        if word(vmclock::MAGIC) != u32::from_le_bytes(*b"VCLK") {
            Err("does not begin with its magic number")
        } else if (word(vmclock::SIZE) as usize) < 4 * vmclock::LEN {
            Err("is too short for a generation counter")
        } else if word(vmclock::VERSION) & 0xffff != 1 {
            Err("has another version than 1")
        } else if word(vmclock::FLAGS) & 1 << 8 == 0 {
            Err("has no generation counter")
        } else if self.load(true).is_err() {
            Err("has been changing for 100 ms")
        } else {
            Ok(())
        }
    }

    #[inline(always)]
    fn word(&self, index: usize) -> u32 {
        u32::from_le(read_once(&self.memory[index % WORDS]))
    }

    /// Returns the counter, without a barrier. Sleeps while the hypervisor changes VMClock's page.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: It was changing for 2 ms, and `may_wait` is `false`.
    /// - `EIO`: It was changing for 100 ms.
    #[inline(never)]
    pub(crate) fn load(&self, may_wait: bool) -> Result<u32> {
        if self.layout == Layout::Word {
            return Ok(self.word(self.layout as usize));
        }

        let steps = if may_wait { 2000 } else { 40 };
        for _ in 0..=steps {
            let seq_count = self.word(vmclock::SEQ_COUNT);
            read_barrier();
            let value = self.word(self.layout as usize);
            read_barrier();
            if seq_count % 2 == 0 && self.word(vmclock::SEQ_COUNT) == seq_count {
                return Ok(value);
            }
            fsleep(Delta::from_micros(50));
        }
        Err(if may_wait { EIO } else { EAGAIN })
    }

    /// Loads the counter, then applies the rule. Returns the loaded counter.
    pub(crate) fn read(&self, may_wait: bool, rule: impl FnOnce() -> Result) -> Result<u32> {
        let (value, applied) = counter_first(|| self.load(may_wait), rule);
        applied.and(value)
    }

    /// Loads the counter, then calls `is_published`. Returns the loaded counter if both it and the
    /// ID are those of the file's last read.
    ///
    /// While the hypervisor changes VMClock's page, this can return the old counter, as if it had
    /// been called before.
    #[inline(always)]
    pub(crate) fn read_unchanged(
        &self,
        last: &LastRead,
        is_published: impl FnOnce() -> bool,
    ) -> Option<u32> {
        let (value, published) = counter_first(|| self.word(self.layout as usize), is_published);
        (published && !last.is_new(value)).then_some(value)
    }
}

/// Loads the counter, then applies the rule: the order that makes a read a barrier.
///
/// The hypervisor changes the ID first and the counter second. So if the loaded counter is new, the
/// rule finds the ID that came with it.
#[inline(always)]
fn counter_first<C, T>(counter: impl FnOnce() -> C, rule: impl FnOnce() -> T) -> (C, T) {
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
