// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::Source;
use std::{fmt, io, path::PathBuf};

/// Why there is no answer.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// This machine has none of the devices: its hypervisor has no generation counter, or no driver
    /// is loaded.
    NoCounter,

    /// The caller demands a barrier, and the best source that this machine has is without one.
    NoBarrier {
        /// Which one that is.
        source: Source,
    },

    /// The device is there and cannot be opened: no permission, too many open files, ...
    Open {
        /// Which one.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },

    /// The file is not the device that it was said to be, or one that has no counter.
    NotTheDevice {
        /// What it was said to be.
        source: Source,
        /// What is otherwise.
        why: &'static str,
    },

    /// The device was unbound from its driver, so there is no barrier. Open it again after it was
    /// bound again.
    Gone,

    /// The hypervisor has begun to change the counter, and has not ended for a tenth of a second.
    /// Try again.
    Busy,

    /// This source does not tell when it changes: look at it from time to time.
    CannotWait {
        /// Why not.
        why: &'static str,
    },

    /// A system call failed that should not.
    System {
        /// Which one.
        call: &'static str,
        /// Why.
        error: io::Error,
    },
}

impl Error {
    pub(crate) fn system<E: Into<io::Error>>(call: &'static str) -> impl Fn(E) -> Self {
        move |error| Self::System {
            call,
            error: error.into(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCounter => {
                f.write_str("this machine has no generation counter: ")?;
                for (n, source) in Source::ALL.iter().enumerate() {
                    write!(f, "{}no {}", if n == 0 { "" } else { ", " }, source.path())?;
                }
                Ok(())
            }
            Self::NoBarrier { source } => {
                write!(f, "no barrier: this machine has only {}", source.path())
            }
            Self::Open { path, error } => {
                write!(f, "cannot open {}: {error}", path.display())
            }
            Self::NotTheDevice { source, why } => write!(f, "not a usable {source}: {why}"),
            Self::Gone => f.write_str("the device of the generation counter was unbound"),
            Self::Busy => f.write_str("the hypervisor does not end changing the counter"),
            Self::CannotWait { why } => write!(f, "cannot wait for a restore: {why}"),
            Self::System { call, error } => write!(f, "{call}: {error}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Open { error, .. } | Self::System { error, .. } => Some(error),
            _ => None,
        }
    }
}
