// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::{Error, Guard, Stamp};
use std::fmt;

/// Something that must not outlive a restore, or a `fork`: a random number generator's state, a
/// batch of UUIDs, nonces, a session. [`Cached`] makes a new one after each restore and each fork.
///
/// ```
/// # fn main() -> Result<(), vmgenid::Error> {
/// use vmgenid::{Cached, Guard, WithoutCounter, random};
///
/// // Sixteen numbers of 16 bytes each, for the price of one system call.
/// let guard = Guard::open(WithoutCounter::NoticeForksOnly)?;
/// let mut numbers = Cached::new(guard, || {
///     let mut bytes = [0; 256];
///     random(&mut bytes)?;
///     Ok::<_, vmgenid::Error>(bytes.chunks(16).map(Vec::from).collect::<Vec<_>>())
/// })?;
///
/// let number = loop {
///     match numbers.with(|numbers| numbers.pop())? {
///         Some(number) => break number,
///         None => numbers.discard(),
///     }
/// };
/// assert_eq!(number.len(), 16);
/// # Ok(())
/// # }
/// ```
pub struct Cached<T, F> {
    value: T,
    /// The stamp with which `value` may be used again.
    stamp: Stamp,
    /// The stamp before `value` was made.
    made_at: Stamp,
    guard: Guard,
    make: F,
}

impl<T, F> Cached<T, F> {
    /// Makes the first one. `make` is called again after each restore and each fork, always after
    /// the barrier.
    ///
    /// # Errors
    ///
    /// Those of `make`, and those of [`Guard::barrier`].
    pub fn new<E: From<Error>>(guard: Guard, mut make: F) -> Result<Self, E>
    where
        F: FnMut() -> Result<T, E>,
    {
        let made_at = guard.barrier()?;
        let mut new = Self {
            value: make()?,
            stamp: Stamp::NEVER,
            made_at,
            guard,
            make,
        };
        new.keep();
        Ok(new)
    }

    /// Returns what `use_it` returns. If the machine was restored, or the process forked, before
    /// `use_it` had ended, this drops the result, makes a new `T`, and calls `use_it` again. So
    /// `use_it` must do nothing but change the `T` and compute its result.
    ///
    /// This compares the guard's stamp once, after `use_it` has ended. A restore that comes later
    /// comes after the caller has the result.
    ///
    /// # Errors
    ///
    /// Those of `make`, and those of [`Guard::barrier`]. After an error the caller must not use
    /// anything that `use_it` has stored elsewhere. The next call tries to make a new `T`.
    #[inline(always)]
    pub fn with<R, E: From<Error>>(&mut self, mut use_it: impl FnMut(&mut T) -> R) -> Result<R, E>
    where
        F: FnMut() -> Result<T, E>,
    {
        let result = use_it(&mut self.value);
        if self.guard.is_unchanged_since(&self.stamp) {
            return Ok(result);
        }
        drop(result);
        self.with_new(use_it)
    }

    #[cold]
    #[inline(never)]
    fn with_new<R, E: From<Error>>(&mut self, mut use_it: impl FnMut(&mut T) -> R) -> Result<R, E>
    where
        F: FnMut() -> Result<T, E>,
    {
        loop {
            self.renew()?;
            let result = use_it(&mut self.value);
            if self.is_unchanged() {
                return Ok(result);
            }
        }
    }

    /// Returns the `T`. At this moment no other clone and no other process has it. This is for uses
    /// that cannot be repeated. After the use, [`is_unchanged`](Self::is_unchanged) tells whether
    /// there was a restore or a fork in between.
    ///
    /// # Errors
    ///
    /// As [`with`](Self::with).
    pub fn get<E: From<Error>>(&mut self) -> Result<&mut T, E>
    where
        F: FnMut() -> Result<T, E>,
    {
        if !self.guard.is_unchanged_since(&self.stamp) {
            self.renew()?;
            while !self.is_unchanged() {
                self.renew()?;
            }
        }
        Ok(&mut self.value)
    }

    /// Returns whether there was no restore and no fork since the present `T` was made.
    pub fn is_unchanged(&self) -> bool {
        self.guard.is_unchanged_since(&self.made_at)
    }

    /// Makes a new `T` before the next use.
    pub fn discard(&mut self) {
        self.stamp = Stamp::NEVER;
        self.made_at = Stamp::NEVER;
    }

    /// Returns the guard.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    fn renew<E: From<Error>>(&mut self) -> Result<(), E>
    where
        F: FnMut() -> Result<T, E>,
    {
        // If one of the next steps fails, the next call does not use the old `T`.
        self.discard();
        let made_at = self.guard.barrier()?;
        self.value = (self.make)()?;
        self.made_at = made_at;
        self.keep();
        Ok(())
    }

    /// Allows more than one use of the `T`, if the guard does.
    fn keep(&mut self) {
        if self.guard.may_keep(&self.made_at) {
            self.stamp = self.made_at;
        }
    }
}

/// Without the `T`: it may be secret.
impl<T, F> fmt::Debug for Cached<T, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cached")
            .field("guard", &self.guard)
            .field("made_at", &self.made_at)
            .finish_non_exhaustive()
    }
}
