// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::{Error, Guard, Stamp};
use std::fmt;

/// Something that must not outlive a restore, or a `fork`: a random number generator's state, a batch
/// of UUIDs, nonces, a session. It is made anew when there was one.
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
    /// What the guard has to see for `value` to be used again.
    stamp: Stamp,
    /// What the guard saw before `value` was made.
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
    /// `use_it` had ended, that is thrown away, a new `T` is made, and `use_it` is called again: it must
    /// do nothing but change the `T` and compute its result.
    ///
    /// This is one look at the guard, after all that can go wrong has gone wrong. A restore that comes
    /// later comes when the result is the caller's.
    ///
    /// # Errors
    ///
    /// Those of `make`, and those of [`Guard::barrier`]. What `use_it` has left anywhere is not to be
    /// used then. The next call tries to make a new `T`.
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

    /// Returns the `T`, which is this clone's and this process's own at this moment: for who wants to
    /// do with it what cannot be undone, or done twice. Whether it still is, when that is done,
    /// [`is_unchanged`](Self::is_unchanged) says.
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

    /// Returns whether there was no restore and no fork since the `T` that is there now was made.
    pub fn is_unchanged(&self) -> bool {
        self.guard.is_unchanged_since(&self.made_at)
    }

    /// Has the `T` made anew before the next use.
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
        // Whatever fails from here on, it is not the old one that is used next.
        self.discard();
        let made_at = self.guard.barrier()?;
        self.value = (self.make)()?;
        self.made_at = made_at;
        self.keep();
        Ok(())
    }

    /// Has the `T` used more than once, if it may be.
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
