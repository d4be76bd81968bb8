// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::{Cached, Error, Guard, random};
use rand_core::{SeedableRng, TryCryptoRng, TryRng};
use std::convert::Infallible;

/// A random number generator. No two clones, and no two processes, continue from the same state.
///
/// It is seeded from the kernel at first, and again after each restore and each `fork`, after the
/// [barrier](crate::Counter::barrier). The check comes after the output is computed. If there was a
/// restore, the generator drops that output, reseeds, and computes the output again.
///
/// ```
/// # fn main() -> Result<(), vmgenid::Error> {
/// use chacha20::ChaCha20Rng;
/// use rand_core::TryRng;
/// use vmgenid::{Guard, GuardedRng, WithoutCounter};
///
/// // On a machine without a counter this is a generator like any other.
/// let guard = Guard::open(WithoutCounter::NoticeForksOnly)?;
/// let mut rng = GuardedRng::<ChaCha20Rng>::new(guard)?;
/// let mut key = [0; 32];
/// rng.try_fill_bytes(&mut key)?;
/// # assert_ne!(key, [0; 32]);
/// # Ok(())
/// # }
/// ```
///
/// A restore or a fork can end in an error: [`Error::Gone`], if the device was unbound before.
/// [`rand_core::UnwrapErr`] panics instead. After an error, the caller's buffer is filled with
/// zeros.
///
/// It adds six instructions to a call, as `make bench` counts them.
pub struct GuardedRng<R>(Cached<R, Make<R>>);

type Make<R> = fn() -> Result<R, Error>;

impl<R: SeedableRng> GuardedRng<R> {
    /// Seeds a generator.
    ///
    /// # Errors
    ///
    /// Those of [`Guard::barrier`], and of [`random`].
    pub fn new(guard: Guard) -> Result<Self, Error> {
        Cached::new(guard, seed as Make<R>).map(Self)
    }

    /// Reseeds before the next use.
    pub fn reseed(&mut self) {
        self.0.discard();
    }

    /// Returns the guard.
    pub fn guard(&self) -> &Guard {
        self.0.guard()
    }
}

fn seed<R: SeedableRng>() -> Result<R, Error> {
    let mut seed = R::Seed::default();
    random(seed.as_mut())?;
    Ok(R::from_seed(seed))
}

impl<R: SeedableRng + TryRng<Error = Infallible>> TryRng for GuardedRng<R> {
    type Error = Error;

    #[inline(always)]
    fn try_next_u32(&mut self) -> Result<u32, Error> {
        self.0.with(|rng| infallible(rng.try_next_u32()))
    }

    #[inline(always)]
    fn try_next_u64(&mut self) -> Result<u64, Error> {
        self.0.with(|rng| infallible(rng.try_next_u64()))
    }

    #[inline(always)]
    fn try_fill_bytes(&mut self, dst: &mut [u8]) -> Result<(), Error> {
        let result = self.0.with(|rng| infallible(rng.try_fill_bytes(dst)));
        if result.is_err() {
            // The generator has written to it.
            dst.fill(0);
        }
        result
    }
}

impl<R: SeedableRng + TryCryptoRng<Error = Infallible>> TryCryptoRng for GuardedRng<R> {}

fn infallible<T>(result: Result<T, Infallible>) -> T {
    match result {
        Ok(value) => value,
    }
}

/// Without its state.
impl<R> std::fmt::Debug for GuardedRng<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("GuardedRng").field(&self.0).finish()
    }
}
