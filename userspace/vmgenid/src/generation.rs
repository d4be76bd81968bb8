// SPDX-License-Identifier: MIT OR Apache-2.0

use std::fmt;

/// What the machine is, between two restores.
///
/// Compare it for being the same, and for nothing else: it can grow, wrap, and go down. Another one
/// means that the machine was restored from a snapshot.
///
/// It is 32 bits wide, or 64 where it comes from VMClock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Generation(pub(crate) u64);

impl Generation {
    /// The number that the source gives; for people to look at.
    pub const fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
