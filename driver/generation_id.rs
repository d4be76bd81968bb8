// SPDX-License-Identifier: GPL-2.0

//! The generation ID, and the reseed rule.
//!
//! The ID is 128 bits of guest memory that the hypervisor fills anew for each clone. It is secret:
//! nothing here logs it or hands it out, but to the kernel's random number generator.

use super::{
    kernel::{
        acpi,
        memremap::{
            Mapping,
            Range, //
        },
        random,
        rwonce::{
            read_barrier,
            ReadOnce, //
        }, //
    },
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
        new_mutex,
        poll::PollCondVar,
        Arc,
        Mutex, //
    }, //
};

/// The size of a generation ID, in bytes.
pub(crate) const SIZE: usize = 16;

/// One look at a generation ID: 16 bytes, in two native words. Never as a number.
type Id = [u64; 2];

/// The last ID that the kernel was reseeded with, and when it is to be reseeded again.
#[pin_data]
struct ReseedRule {
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

impl ReseedRule {
    fn new(first: Id) -> impl PinInit<Self> {
        pin_init!(Self {
            published: first.map(Atomic::new),
            reseeding <- new_mutex!((), "ReseedRule::reseeding"),
        })
    }

    /// Returns whether the kernel was reseeded with `id` last. If so, what follows comes after
    /// that reseed.
    #[inline(always)]
    fn is_published(&self, id: Id) -> bool {
        let [first, second] = &self.published;
        let same = id[0] == first.read_once() && id[1] == second.read_once();
        // Pairs with the `Release` in `reseed`.
        read_barrier();
        same
    }

    /// Calls `reseed` with what `look` finds, unless that is the ID that was published last. The
    /// ID is published after that. One caller at a time: the others wait, and look again.
    #[cold]
    fn reseed(&self, look: impl Fn() -> Id, reseed: impl FnOnce(Id)) {
        let _guard = self.reseeding.lock();

        let id = look();
        // Somebody else may have done it while we waited.
        if self.is_published(id) {
            return;
        }

        reseed(id);
        for (published, word) in self.published.iter().zip(id) {
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

    #[pin]
    rule: ReseedRule,

    #[pin]
    notified: PollCondVar,

    /// If they are counted.
    reseeds: Option<Arc<Reseeds>>,
}

impl GenerationId {
    /// Maps the ID in `range`, and adds it to the random number generator as device randomness.
    /// `reseeds`: where to count the reseeds with this ID.
    ///
    /// # Errors
    ///
    /// - `EINVAL`: `range` is not 8-byte aligned.
    /// - `ENOMEM`: there is no memory, or no room for the mapping.
    pub(crate) fn new(range: Range, reseeds: Option<Arc<Reseeds>>) -> Result<Arc<Self>> {
        let memory = Mapping::<[Atomic<u64>; 2]>::new(&range)?;
        let first = memory.each_ref().map(|word| word.load(Relaxed));
        random::add_device_randomness(first.as_bytes());

        Arc::pin_init(
            pin_init!(Self {
                range,
                memory,
                rule <- ReseedRule::new(first),
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

    #[inline(always)]
    fn look(&self) -> Id {
        self.memory.each_ref().map(ReadOnce::read_once)
    }

    /// The reseed rule: when this returns, the kernel's random number generator has been reseeded
    /// with the ID that was in memory when it was called.
    ///
    /// Where the ID is unchanged this is four loads. Else it sleeps, and calls the vmfork
    /// notifiers, which take `rtnl_lock`: not to be called under a lock that is taken inside that.
    #[inline(always)]
    pub(crate) fn apply_reseed_rule(&self) {
        if !self.is_reseeded() {
            self.reseed();
        }
    }

    /// Returns whether the reseed rule would return at once.
    #[inline(always)]
    pub(crate) fn is_reseeded(&self) -> bool {
        self.rule.is_published(self.look())
    }

    #[cold]
    #[inline(never)]
    fn reseed(&self) {
        self.rule.reseed(
            || self.look(),
            |id| {
                random::add_vmfork_randomness(id.as_bytes());
                if let Some(reseeds) = &self.reseeds {
                    reseeds.count();
                }
            },
        );
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

impl acpi::NotifyHandler for GenerationId {
    fn notify(&self, _event: u32) {
        self.apply_reseed_rule();
        self.notified.notify_all();
    }
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_reseed_rule)]
mod tests {
    use super::*;
    use pin_init::stack_pin_init;

    const A: Id = [0x1111, 0xaaaa];
    const B: Id = [0x2222, 0xbbbb];

    /// The IDs that the rule reseeds with when it finds these, one after the other.
    fn reseeds(rule: &ReseedRule, found: &[Id]) -> KVec<Id> {
        let mut reseeds = KVec::new();
        for &id in found {
            if !rule.is_published(id) {
                rule.reseed(
                    || id,
                    |id| {
                        let _ = reseeds.push(id, GFP_KERNEL);
                    },
                );
            }
        }
        reseeds
    }

    #[test]
    fn the_first_id_is_no_change() {
        stack_pin_init!(let rule = ReseedRule::new(A));
        assert!(rule.is_published(A));
        assert!(reseeds(&rule, &[A, A, A]).is_empty());
    }

    #[test]
    fn a_change_is_one_reseed() {
        stack_pin_init!(let rule = ReseedRule::new(A));
        assert!(!rule.is_published(B));
        assert_eq!(&reseeds(&rule, &[A, B, B, B])[..], &[B]);
        assert!(rule.is_published(B));
    }

    #[test]
    fn an_id_that_comes_back_is_a_change() {
        stack_pin_init!(let rule = ReseedRule::new(A));
        assert_eq!(&reseeds(&rule, &[B, A, B, B])[..], &[B, A, B]);
    }

    #[test]
    fn each_half_is_looked_at() {
        stack_pin_init!(let rule = ReseedRule::new(A));
        assert!(!rule.is_published([A[0], B[1]]));
        assert!(!rule.is_published([B[0], A[1]]));
        assert!(!rule.is_published([A[1], A[0]]));
        // Seen half written: one more, and the whole ID is not missed.
        assert_eq!(&reseeds(&rule, &[[B[0], A[1]], B])[..], &[[B[0], A[1]], B]);
    }

    #[test]
    fn every_bit_is_looked_at() {
        stack_pin_init!(let rule = ReseedRule::new([0, 0]));
        for bit in 0..64 {
            assert!(!rule.is_published([1 << bit, 0]));
            assert!(!rule.is_published([0, 1 << bit]));
        }
    }

    #[test]
    fn who_had_to_wait_looks_again() {
        stack_pin_init!(let rule = ReseedRule::new(A));
        // B was seen without the lock; by now somebody else has reseeded with it.
        assert_eq!(&reseeds(&rule, &[B])[..], &[B]);
        let mut again = false;
        rule.reseed(|| B, |_| again = true);
        assert!(!again);
    }

    #[test]
    fn the_reseed_is_with_what_is_there_under_the_lock() {
        stack_pin_init!(let rule = ReseedRule::new(A));
        let mut with = A;
        assert!(!rule.is_published([1, 1]));
        rule.reseed(|| B, |id| with = id);
        assert_eq!(with, B);
        assert!(rule.is_published(B));
        assert!(!rule.is_published([1, 1]));
    }

    #[test]
    fn the_id_is_copied_once() {
        stack_pin_init!(let rule = ReseedRule::new(A));
        // The hypervisor goes on writing: what is published is what was reseeded with.
        let looks = Atomic::new(0u64);
        let mut with = A;
        rule.reseed(|| [looks.fetch_add(1, Relaxed) + 1, 7], |id| with = id);
        assert_eq!(looks.load(Relaxed), 1);
        assert_eq!(with, [1, 7]);
        assert!(rule.is_published([1, 7]));
    }

    #[test]
    fn the_id_is_published_after_the_reseed() {
        stack_pin_init!(let rule = ReseedRule::new(A));
        let mut early = true;
        rule.reseed(|| B, |id| early = rule.is_published(id));
        assert!(!early);
        assert!(rule.is_published(B));
    }
}
