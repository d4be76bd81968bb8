// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::Source;
use std::{io, path::PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This machine has none of the devices: its hypervisor has no generation counter, or no driver
    /// is loaded.
    #[error("this machine has no generation counter: {}", missing())]
    NoCounter,

    /// The caller requires a barrier, and the best source of this machine has none.
    #[error("no barrier: this machine has only {}", .source.path())]
    NoBarrier {
        /// The source.
        // Raw: `thiserror` takes a field that is written `source` for the cause.
        r#source: Source,
    },

    /// The device exists and cannot be opened: no permission, too many open files, ...
    #[error("cannot open {path}: {error}")]
    Open {
        /// The device node.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        error: io::Error,
    },

    /// The file is not the device that the caller named, or the device has no counter.
    #[error("not a usable {source}: {why}")]
    NotTheDevice {
        /// The device that the caller named.
        r#source: Source,
        /// The difference.
        why: &'static str,
    },

    /// The device was unbound from its driver, so there is no barrier. The caller can open it again
    /// after a new bind.
    #[error("the device of the generation counter was unbound")]
    Gone,

    /// The hypervisor has been changing the counter for 100 ms. The caller can try again.
    #[error("the hypervisor does not end changing the counter")]
    Busy,

    /// This source sends no notification of a change. The caller can compare
    /// [`Counter::get`](crate::Counter::get) from time to time.
    #[error("cannot wait for a restore: {why}")]
    CannotWait {
        /// The reason.
        why: &'static str,
    },

    /// A system call failed.
    #[error("{call}: {error}")]
    System {
        /// The system call.
        call: &'static str,
        /// The error of the system call.
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
