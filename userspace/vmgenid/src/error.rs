// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::Source;
use std::{io, path::PathBuf};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This machine has none of the devices: its hypervisor has no generation counter, or no driver
    /// is loaded.
    #[error("this machine has no generation counter: {}", missing())]
    NoCounter,

    /// The caller demands a barrier, and the best source that this machine has is without one.
    #[error("no barrier: this machine has only {}", .source.path())]
    NoBarrier {
        /// Which one that is.
        // Raw: `thiserror` takes a field that is written `source` for the cause.
        r#source: Source,
    },

    /// The device is there and cannot be opened: no permission, too many open files, ...
    #[error("cannot open {path}: {error}")]
    Open {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        error: io::Error,
    },

    /// The file is not the device that it was said to be, or one that has no counter.
    #[error("not a usable {source}: {why}")]
    NotTheDevice {
        /// What it was said to be.
        r#source: Source,
        /// What is otherwise.
        why: &'static str,
    },

    /// The device was unbound from its driver, so there is no barrier. Open it again after it was
    /// bound again.
    #[error("the device of the generation counter was unbound")]
    Gone,

    /// The hypervisor has begun to change the counter, and has not ended for a tenth of a second.
    /// Try again.
    #[error("the hypervisor does not end changing the counter")]
    Busy,

    /// This source does not tell when it changes: look at it from time to time.
    #[error("cannot wait for a restore: {why}")]
    CannotWait {
        /// Why not.
        why: &'static str,
    },

    /// A system call failed that should not.
    #[error("{call}: {error}")]
    System {
        /// Which one.
        call: &'static str,
        /// Why.
        #[source]
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

fn missing() -> String {
    let no = |source: &Source| format!("no {}", source.path());
    Source::ALL.iter().map(no).collect::<Vec<_>>().join(", ")
}
