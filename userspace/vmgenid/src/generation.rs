// SPDX-License-Identifier: MIT OR Apache-2.0

use std::fmt;

/// A number for the time between two restores of the machine.
///
/// Callers compare two of them for equality only: the number can grow, wrap, and go down. Another
/// number means that the machine was restored from a snapshot.
///
/// It has 32 bits, or 64 if the source is VMClock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation(pub(crate) u64);

impl Generation {
    /// The number of the source, for logs.
    pub const fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
