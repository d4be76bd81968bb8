// SPDX-License-Identifier: GPL-2.0

//! The reseed rule: when the driver reseeds the kernel's random number generator with a new
//! generation ID, and when it publishes that ID.
//!
//! A published ID promises that no draw which begins later is the same in two clones. One reseed
//! does not give that: `crng_reseed()` extracts a key, and installs it later without checking for a
//! newer key. If the snapshot is taken in between, a kernel thread in each clone installs the same
//! old key over the key of a reseed that was faster. So:
//!
//! 1. The rule mixes the ID into the pool. A key that is extracted later depends on the ID.
//! 2. A work queue thread installs a key that was extracted before: in the generator's own work, or
//!    in that of a notification, which the built-in driver handles. The thread does not sleep in
//!    between. If such a thread is runnable, the rule reseeds for processes that draw meanwhile,
//!    and waits until the thread has left `crng_reseed()`: see [`sched`]. With a device tree, the
//!    built-in driver handles a notification in the device's interrupt. The caller of
//!    [`Reseeder::reseed`] has waited for that interrupt.
//! 3. The rule reseeds, and publishes the ID.
//!
//! One thread applies the rule for all devices and all callers, so its reseeds do not overlap.
//!
//! Limitations: the rule does not wait for these.
//! - A process of root that reseeds the generator: in the ioctl `RNDRESEEDCRNG` of `/dev/random`,
//!   or in a power transition that it has started.
//! - Before the generator is initialized, and without `CONFIG_TASKS_RCU`: a process of root that
//!   initializes it (`RNDADDENTROPY`, `RNDADDTOENTCNT`). Until then `/dev/urandom` and
//!   `GRND_INSECURE` can return the same in all clones.

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
        sched, //
    },
    prelude::*, //
};

/// How the driver reseeds the generator.
pub(crate) enum Reseeder {
    /// The ioctl of `/dev/random`, which does not sleep.
    DevRandom(DevRandom),

    /// `add_vmfork_randomness()`, where `/dev/random` could not be opened. It calls the vmfork
    /// notifiers, so readers wait for them.
    Vmfork(random::Vmfork),
}

impl Reseeder {
    /// Opens `/dev/random`, or logs the failure and takes `add_vmfork_randomness()`, if exported.
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

    /// Returns the function that calls the vmfork notifiers. `None`: [`Reseeder::reseed`] calls
    /// them, or only the built-in driver can.
    pub(crate) fn notifiers(&self) -> Option<random::Vmfork> {
        match self {
            Self::DevRandom(_) => random::VMFORK,
            Self::Vmfork(_) => None,
        }
    }

    /// Reseeds with `id` such that no older reseed can replace the result. One caller at a time.
    ///
    /// If the generator is not initialized, this waits for a reseed in flight that may initialize
    /// it. A reseed that begins later depends on the ID.
    pub(crate) fn reseed(&self, id: Id) -> Result {
        random::add_device_randomness(id.as_bytes());

        let ready = random::is_initialized();
        if !ready || sched::has_runnable_worker() {
            if let Self::DevRandom(device) = self {
                device.reseed()?;
            }
            if ready {
                sched::wait_for_workers();
            } else {
                sched::wait_for_tasks();
            }
        }

        match self {
            Self::DevRandom(device) => device.reseed(),
            Self::Vmfork(add_vmfork_randomness) => {
                add_vmfork_randomness(id.as_bytes());
                Ok(())
            }
        }
    }
}

/// Loads the ID. Unless it is published already, calls `reseed` with it, publishes it, and calls
/// `tell`. One caller at a time.
///
/// # Errors
///
/// Those of `reseed`. Then the ID is not published.
pub(crate) fn apply(
    published: &Published,
    load: impl FnOnce() -> Id,
    reseed: impl FnOnce(Id) -> Result,
    tell: impl FnOnce(),
) -> Result {
    let id = load();
    if published.is(id) {
        return Ok(());
    }

    reseed(id)?;
    published.set(id);
    tell();
    Ok(())
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_reseed_rule)]
mod tests {
    use super::*;
    use kernel::sync::atomic::{
        Atomic,
        Relaxed, //
    };

    const A: Id = [0x1111, 0xaaaa];
    const B: Id = [0x2222, 0xbbbb];

    /// Applies the rule to each ID in turn. Returns the IDs that it reseeds with; each is published
    /// once.
    fn reseeds(published: &Published, found: &[Id]) -> KVec<Id> {
        let mut reseeds = KVec::new();
        let mut told = KVec::new();
        for &id in found {
            let reseed = |id| Ok(reseeds.push(id, GFP_KERNEL)?);
            let tell = || assert!(told.push(id, GFP_KERNEL).is_ok());
            assert!(apply(published, || id, reseed, tell).is_ok());
            assert!(published.is(id));
        }
        assert_eq!(&reseeds[..], &told[..]);
        reseeds
    }

    #[test]
    fn the_first_id_is_a_change() {
        let published = Published::none(A);
        assert!(!published.is(A));
        assert_eq!(&reseeds(&published, &[A, A, A])[..], &[A]);
    }

    #[test]
    fn a_change_is_one_reseed() {
        let published = Published::none(A);
        assert_eq!(&reseeds(&published, &[A, B, B, B])[..], &[A, B]);
    }

    #[test]
    fn an_id_that_comes_back_is_a_change() {
        let published = Published::none(A);
        assert_eq!(&reseeds(&published, &[B, A, B, B])[..], &[B, A, B]);
    }

    #[test]
    fn each_half_is_compared() {
        let published = Published::none(A);
        reseeds(&published, &[A]);
        assert!(!published.is([A[0], B[1]]));
        assert!(!published.is([B[0], A[1]]));
        assert!(!published.is([A[1], A[0]]));
        // A half-written ID is a change of its own. The rule does not miss the whole ID.
        let found = [[B[0], A[1]], B];
        assert_eq!(&reseeds(&published, &found)[..], &found);
    }

    #[test]
    fn every_bit_is_compared() {
        let published = Published::none([0, 0]);
        reseeds(&published, &[[0, 0]]);
        for bit in 0..64 {
            assert!(!published.is([1 << bit, 0]));
            assert!(!published.is([0, 1 << bit]));
        }
    }

    #[test]
    fn the_id_is_loaded_once() {
        // The hypervisor writes again meanwhile. The rule publishes the ID that it reseeded with.
        let published = Published::none(A);
        let loads = Atomic::new(0u64);
        let load = || [loads.fetch_add(1, Relaxed) + 1, 7];
        let reseed = |id| {
            assert_eq!(id, [1, 7]);
            Ok(())
        };
        assert!(apply(&published, load, reseed, || ()).is_ok());
        assert_eq!(loads.load(Relaxed), 1);
        assert!(published.is([1, 7]));
    }

    #[test]
    fn the_id_is_published_after_the_reseed() {
        let published = Published::none(A);
        let reseed = |id| {
            assert!(!published.is(id));
            Ok(())
        };
        let tell = || assert!(published.is(B));
        assert!(apply(&published, || B, reseed, tell).is_ok());
    }

    #[test]
    fn without_a_reseed_nothing_is_published() {
        let published = Published::none(A);
        let reseed = |_| Err(EPERM);
        let tell = || unreachable!();
        assert_eq!(apply(&published, || B, reseed, tell), Err(EPERM));
        assert!(!published.is(B));
    }
}
