// SPDX-License-Identifier: GPL-2.0

//! The reseed rule, where this driver reseeds the kernel itself.

use super::{
    generation_id::{
        GenerationId,
        Id,
        Patience,
        Published, //
    },
    kernel::{
        acpi,
        random, //
    }, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    }, //
};

/// What is left where there is no generation counter.
pub(crate) const WITHOUT_COUNTER: &str = "reseeding only";

/// The last ID that the kernel was reseeded with, and when it is to be reseeded again.
#[pin_data]
pub(crate) struct Rule {
    /// Written under `reseeding`.
    published: Published,

    #[pin]
    reseeding: Mutex<()>,
}

impl Rule {
    /// Adds the first ID to the random number generator as device randomness.
    pub(super) fn new(first: Id) -> impl PinInit<Self> {
        random::add_device_randomness(first.as_bytes());
        Self::starting(first)
    }

    fn starting(first: Id) -> impl PinInit<Self> {
        pin_init!(Self {
            published: Published::new(first),
            reseeding <- new_mutex!((), "Rule::reseeding"),
        })
    }

    /// Returns whether the kernel was reseeded with `id` last. If so, what follows comes after
    /// that reseed.
    #[inline(always)]
    pub(super) fn is_published(&self, id: Id) -> bool {
        self.published.is(id)
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
        self.published.set(id);
    }
}

impl GenerationId {
    /// # Errors
    ///
    /// `EAGAIN`: the caller has no [`Patience`].
    #[cold]
    #[inline(never)]
    pub(super) fn reseed(&self, patience: Patience) -> Result {
        if patience == Patience::None {
            return Err(EAGAIN);
        }

        self.rule.reseed(
            || self.look(),
            |id| {
                random::add_vmfork_randomness(id.as_bytes());
                if let Some(reseeds) = self.reseeds() {
                    reseeds.count();
                }
            },
        );
        Ok(())
    }

    /// Does what the notification is about to do, if there is patience for that.
    ///
    /// # Errors
    ///
    /// Those of [`GenerationId::reseed`].
    pub(super) fn hasten(&self, patience: Patience) -> Result {
        self.apply_reseed_rule(patience)
    }
}

impl acpi::NotifyHandler for GenerationId {
    fn notify(&self, _event: u32) {
        let _ = self.apply_reseed_rule(Patience::Full);
        self.notified().notify_all();
    }
}

/// Applies the rule whenever `dev` is notified, until it is unbound.
///
/// # Errors
///
/// Those of [`acpi::register_notify_handler`].
pub(crate) fn watch(dev: &Device<Bound>, id: &Arc<GenerationId>) -> Result {
    acpi::register_notify_handler(dev, id.clone())?;
    // No change after this is missed; one that came before is caught here.
    id.apply_reseed_rule(Patience::Full)
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_reseed_rule)]
mod tests {
    use super::*;
    use kernel::sync::atomic::{
        Atomic,
        Relaxed, //
    };
    use pin_init::stack_pin_init;

    const A: Id = [0x1111, 0xaaaa];
    const B: Id = [0x2222, 0xbbbb];

    /// The IDs that the rule reseeds with when it finds these, one after the other.
    fn reseeds(rule: &Rule, found: &[Id]) -> KVec<Id> {
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
        stack_pin_init!(let rule = Rule::starting(A));
        assert!(rule.is_published(A));
        assert!(reseeds(&rule, &[A, A, A]).is_empty());
    }

    #[test]
    fn a_change_is_one_reseed() {
        stack_pin_init!(let rule = Rule::starting(A));
        assert!(!rule.is_published(B));
        assert_eq!(&reseeds(&rule, &[A, B, B, B])[..], &[B]);
        assert!(rule.is_published(B));
    }

    #[test]
    fn an_id_that_comes_back_is_a_change() {
        stack_pin_init!(let rule = Rule::starting(A));
        assert_eq!(&reseeds(&rule, &[B, A, B, B])[..], &[B, A, B]);
    }

    #[test]
    fn each_half_is_looked_at() {
        stack_pin_init!(let rule = Rule::starting(A));
        assert!(!rule.is_published([A[0], B[1]]));
        assert!(!rule.is_published([B[0], A[1]]));
        assert!(!rule.is_published([A[1], A[0]]));
        // Seen half written: one more, and the whole ID is not missed.
        assert_eq!(&reseeds(&rule, &[[B[0], A[1]], B])[..], &[[B[0], A[1]], B]);
    }

    #[test]
    fn every_bit_is_looked_at() {
        stack_pin_init!(let rule = Rule::starting([0, 0]));
        for bit in 0..64 {
            assert!(!rule.is_published([1 << bit, 0]));
            assert!(!rule.is_published([0, 1 << bit]));
        }
    }

    #[test]
    fn who_had_to_wait_looks_again() {
        stack_pin_init!(let rule = Rule::starting(A));
        // B was seen without the lock; by now somebody else has reseeded with it.
        assert_eq!(&reseeds(&rule, &[B])[..], &[B]);
        let mut again = false;
        rule.reseed(|| B, |_| again = true);
        assert!(!again);
    }

    #[test]
    fn the_reseed_is_with_what_is_there_under_the_lock() {
        stack_pin_init!(let rule = Rule::starting(A));
        let mut with = A;
        assert!(!rule.is_published([1, 1]));
        rule.reseed(|| B, |id| with = id);
        assert_eq!(with, B);
        assert!(rule.is_published(B));
        assert!(!rule.is_published([1, 1]));
    }

    #[test]
    fn the_id_is_copied_once() {
        stack_pin_init!(let rule = Rule::starting(A));
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
        stack_pin_init!(let rule = Rule::starting(A));
        let mut early = true;
        rule.reseed(|| B, |id| early = rule.is_published(id));
        assert!(!early);
        assert!(rule.is_published(B));
    }
}
