// SPDX-License-Identifier: GPL-2.0

//! The parts of the driver. Each file uses only files above it.

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
