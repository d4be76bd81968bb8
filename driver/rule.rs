// SPDX-License-Identifier: GPL-2.0

//! The reseed rule: when the kernel's random number generator is reseeded with a new generation ID,
//! and when that ID is published.
//!
//! A published ID promises that each draw from the generator that begins later is not the same in
//! two clones. One reseed is not enough for that. Linux's `crng_reseed()` extracts a key, and
//! installs it later without looking whether a newer key is there. A snapshot in between leaves a
//! kernel thread in each clone that installs the same old key, over the key of a reseed that came
//! first. So the rule reseeds when no such thread can be left:
//!
//! 1. It mixes the ID into the pool. A key that is extracted later depends on the ID.
//! 2. A key that was extracted before is installed by a thread that has not slept since: see
//!    [`Threads`]. If there is one, the rule waits until it has slept. It reseeds before it waits,
//!    too, for processes that draw meanwhile.
//! 3. It reseeds, and publishes the ID.
//!
//! Limitations: a user process can be in `crng_reseed()`, too, and is not waited for. Such a process
//! belongs to root, and is in the ioctl `RNDRESEEDCRNG` of `/dev/random`, or writes to
//! `/sys/power/state`.

use super::{
    id::{
        Id,
        Published, //
    },
    kernel::{
        random::{
            self,
            DevRandom, //
        },
        sched::{
            Patience,
            Threads, //
        }, //
    }, //
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        rcu,
        Mutex, //
    }, //
};

/// What reseeds the generator.
pub(crate) enum Reseeder {
    /// The ioctl of `/dev/random`, which does not sleep.
    DevRandom(DevRandom),

    /// `add_vmfork_randomness()`, where `/dev/random` could not be opened. It calls the vmfork
    /// notifiers, and so the rule waits for them.
    Vmfork(random::Vmfork),
}

impl Reseeder {
    /// Opens `/dev/random`, or makes do without it where that is possible. Says so in the log.
    ///
    /// # Errors
    ///
    /// Those of [`DevRandom::open`].
    pub(crate) fn new() -> Result<Self> {
        match (DevRandom::open(), random::VMFORK) {
            (Ok(device), _) => Ok(Self::DevRandom(device)),
            (Err(err), Some(vmfork)) => {
                pr_warn!(
                    "cannot open /dev/random ({:?}): reads of /dev/vmgenid wait for the vmfork notifiers\n",
                    err
                );
                Ok(Self::Vmfork(vmfork))
            }
            (Err(err), None) => {
                pr_err!(
                    "cannot open /dev/random ({:?}), and cannot reseed without: mount /dev, then load the module again\n",
                    err
                );
                Err(err)
            }
        }
    }

    /// Returns the vmfork notifiers, if [`Reseeder::reseed`] does not call them and this module can.
    pub(crate) fn notifiers(&self) -> Option<random::Vmfork> {
        match self {
            Self::DevRandom(_) => random::VMFORK,
            Self::Vmfork(_) => None,
        }
    }

    /// Reseeds with `id` such that no older reseed can replace the result.
    ///
    /// If the generator is not initialized, this waits for a reseed that may be initializing it just
    /// now. Any later one depends on the ID.
    ///
    /// # Errors
    ///
    /// `EAGAIN`: This takes longer than `patience` allows. The generator may have been reseeded, but
    /// an older reseed may replace the result.
    pub(crate) fn reseed(&self, id: Id, patience: &mut Patience) -> Result {
        random::add_device_randomness(id.as_bytes());

        let ready = random::is_initialized();
        if !ready || Threads::Workers.any_runnable() {
            if let Self::DevRandom(device) = self {
                // For processes that draw meanwhile. `ENODATA`: It is not initialized.
                let _ = device.reseed();
            }
            if !Self::wait(ready, patience) {
                return Err(EAGAIN);
            }
        }

        match self {
            Self::DevRandom(device) => {
                let _ = device.reseed();
            }
            Self::Vmfork(add_vmfork_randomness) => add_vmfork_randomness(id.as_bytes()),
        }
        Ok(())
    }

    /// Waits until all keys are installed that were extracted before this was called. Returns whether
    /// that is so.
    fn wait(ready: bool, patience: &mut Patience) -> bool {
        if ready {
            // The generator's own work reseeds, and the built-in driver, in ACPI's work queue.
            Threads::Workers.wait_until_slept(patience)
        } else {
            // Timers and interrupts can initialize it, also in the threads that the kernel may have
            // for them.
            rcu::synchronize_rcu();
            Threads::All.wait_until_slept(patience)
        }
    }
}

/// The last ID that was published, and the right to publish the next one.
#[pin_data]
pub(crate) struct Rule {
    /// Written under `reseeding`.
    published: Published,

    #[pin]
    reseeding: Mutex<()>,
}

impl Rule {
    /// `first` is the ID in memory. It is not published yet.
    pub(crate) fn new(first: Id) -> impl PinInit<Self> {
        pin_init!(Self {
            published: Published::none(first),
            reseeding <- new_mutex!((), "Rule::reseeding"),
        })
    }

    /// Returns what was published last.
    #[inline(always)]
    pub(crate) fn published(&self) -> &Published {
        &self.published
    }

    /// Calls `reseed` while no caller of [`Rule::apply`] reseeds. Sleeps.
    pub(crate) fn exclusively(&self, reseed: impl FnOnce()) {
        let _guard = self.reseeding.lock();
        reseed();
    }

    /// Calls `reseed` with the ID that `load` returns, then publishes it and calls `published`,
    /// unless that ID is published already. One caller at a time: the others wait, and look again.
    ///
    /// # Errors
    ///
    /// `EAGAIN`: This takes longer than `patience` allows. And those of `reseed`.
    #[cold]
    pub(crate) fn apply(
        &self,
        patience: &mut Patience,
        load: impl FnOnce() -> Id,
        reseed: impl FnOnce(Id, &mut Patience) -> Result,
        published: impl FnOnce(Id),
    ) -> Result {
        let _guard = if patience.is_endless() {
            self.reseeding.lock()
        } else {
            loop {
                if let Some(guard) = self.reseeding.try_lock() {
                    break guard;
                }
                if !patience.wait() {
                    return Err(EAGAIN);
                }
            }
        };

        let id = load();
        // Another caller may have done it while this one waited.
        if self.published.is(id) {
            return Ok(());
        }

        reseed(id, patience)?;
        self.published.set(id);
        published(id);
        Ok(())
    }
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

    /// The IDs that the rule reseeds with when it finds these, one after the other. Each is published
    /// once.
    fn reseeds(rule: &Rule, found: &[Id]) -> KVec<Id> {
        let mut reseeds = KVec::new();
        let mut published = KVec::new();
        for &id in found {
            if !rule.published().is(id) {
                let reseed = |id, _: &mut Patience| Ok(reseeds.push(id, GFP_KERNEL)?);
                let publish = |id| assert!(published.push(id, GFP_KERNEL).is_ok());
                assert!(rule
                    .apply(&mut Patience::endless(), || id, reseed, publish)
                    .is_ok());
            }
        }
        assert_eq!(&reseeds[..], &published[..]);
        reseeds
    }

    #[test]
    fn the_first_id_is_a_change() {
        stack_pin_init!(let rule = Rule::new(A));
        assert!(!rule.published().is(A));
        assert_eq!(&reseeds(&rule, &[A, A, A])[..], &[A]);
    }

    #[test]
    fn a_change_is_one_reseed() {
        stack_pin_init!(let rule = Rule::new(A));
        assert_eq!(&reseeds(&rule, &[A, B, B, B])[..], &[A, B]);
        assert!(rule.published().is(B));
    }

    #[test]
    fn an_id_that_comes_back_is_a_change() {
        stack_pin_init!(let rule = Rule::new(A));
        assert_eq!(&reseeds(&rule, &[B, A, B, B])[..], &[B, A, B]);
    }

    #[test]
    fn each_half_is_compared() {
        stack_pin_init!(let rule = Rule::new(A));
        reseeds(&rule, &[A]);
        assert!(!rule.published().is([A[0], B[1]]));
        assert!(!rule.published().is([B[0], A[1]]));
        assert!(!rule.published().is([A[1], A[0]]));
        // An ID that was loaded half written is one more change. The whole ID is not missed.
        assert_eq!(&reseeds(&rule, &[[B[0], A[1]], B])[..], &[[B[0], A[1]], B]);
    }

    #[test]
    fn every_bit_is_compared() {
        stack_pin_init!(let rule = Rule::new([0, 0]));
        reseeds(&rule, &[[0, 0]]);
        for bit in 0..64 {
            assert!(!rule.published().is([1 << bit, 0]));
            assert!(!rule.published().is([0, 1 << bit]));
        }
    }

    #[test]
    fn a_caller_that_had_to_wait_looks_again() {
        stack_pin_init!(let rule = Rule::new(A));
        // The caller saw B without the lock. Meanwhile another one has reseeded with it.
        reseeds(&rule, &[B]);
        let again = |_, _: &mut Patience| Err(EINVAL);
        assert!(rule
            .apply(&mut Patience::endless(), || B, again, |_| unreachable!())
            .is_ok());
    }

    #[test]
    fn the_id_is_loaded_once_under_the_lock() {
        stack_pin_init!(let rule = Rule::new(A));
        // The hypervisor goes on writing. The rule publishes what it reseeded with.
        let loads = Atomic::new(0u64);
        let load = || [loads.fetch_add(1, Relaxed) + 1, 7];
        let mut with = A;
        let reseed = |id, _: &mut Patience| {
            with = id;
            Ok(())
        };
        assert!(rule
            .apply(&mut Patience::endless(), load, reseed, |_| ())
            .is_ok());
        assert_eq!(loads.load(Relaxed), 1);
        assert_eq!(with, [1, 7]);
        assert!(rule.published().is([1, 7]));
    }

    #[test]
    fn the_id_is_published_after_the_reseed() {
        stack_pin_init!(let rule = Rule::new(A));
        let reseed = |id, _: &mut Patience| {
            assert!(!rule.published().is(id));
            Ok(())
        };
        let publish = |id| assert!(rule.published().is(id));
        assert!(rule
            .apply(&mut Patience::endless(), || B, reseed, publish)
            .is_ok());
    }

    #[test]
    fn an_id_is_not_published_without_a_reseed() {
        stack_pin_init!(let rule = Rule::new(A));
        let reseed = |_, _: &mut Patience| Err(EAGAIN);
        let applied = rule.apply(&mut Patience::brief(), || B, reseed, |_| unreachable!());
        assert_eq!(applied, Err(EAGAIN));
        assert!(!rule.published().is(B));
    }

    #[test]
    fn a_caller_without_patience_does_not_wait_for_another() {
        stack_pin_init!(let rule = Rule::new(A));
        rule.exclusively(|| {
            let applied = rule.apply(
                &mut Patience::brief(),
                || B,
                |_, _| unreachable!(),
                |_| unreachable!(),
            );
            assert_eq!(applied, Err(EAGAIN));
        });
        assert!(!rule.published().is(B));
    }
}
