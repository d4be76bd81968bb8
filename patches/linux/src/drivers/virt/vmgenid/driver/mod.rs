// SPDX-License-Identifier: GPL-2.0

//! The parts of the driver. Each file uses only files above it.

use ::kernel::prelude::*;

/// The parts of the kernel crate that the driver is about, and what it adds to them.
pub(crate) mod kernel {
    pub(crate) use ::kernel::{
        acpi,
        io::memremap,
        platform, //
    };
    pub(crate) mod miscdevice;
    pub(crate) mod mm;
    pub(crate) mod rwonce;
}

/// Returns the end of a line of the log about an address that the kernel crate has refused.
fn wrong(err: Error) -> &'static str {
    match err {
        ERANGE => "is beyond the physical address width",
        EBUSY => "is in System RAM",
        ENOSPC => "is shorter than a page",
        ENXIO => "is not in memory that the firmware reserved",
        _ => "is not page aligned",
    }
}

/// The names that most files use.
mod prelude {
    pub(super) use super::kernel::{
        memremap::{
            Mapping,
            Range,
            ReservedPage, //
        },
        rwonce::{
            read_barrier,
            read_once, //
        },
    };
    pub(super) use kernel::{
        device::{
            Bound,
            Device, //
        },
        prelude::*,
        sync::{
            atomic::{
                Atomic,
                Full,
                Relaxed,
                Release, //
            },
            poll::PollCondVar,
            Arc, //
        },
        time::{
            delay::fsleep,
            Delta, //
        },
    };
}
pub(crate) mod id;

pub(crate) mod firmware;

pub(crate) mod counter;
pub(crate) mod sysgenid;

pub(crate) mod generation;

pub(crate) mod node;
pub(crate) mod registry;

pub(crate) mod probe;
