// SPDX-License-Identifier: GPL-2.0

//! The code of both modules, `vmgenid` and `vmgenctr`. Each file uses only files above it.

pub(crate) mod kernel {
    pub(crate) mod acpi;
    pub(crate) mod events;
    pub(crate) mod kthread;
    pub(crate) mod memremap;
    pub(crate) mod miscdevice;
    pub(crate) mod mm;
    pub(crate) mod platform;
    pub(crate) mod random;
    pub(crate) mod rwonce;
    pub(crate) mod sched;
    pub(crate) mod static_mutex;
    pub(crate) mod workqueue;

    /// The names that most wrappers use.
    mod prelude {
        pub(super) use core::ptr::NonNull;
        pub(super) use kernel::{
            bindings,
            error::{
                from_err_ptr,
                to_result, //
            },
            ffi::{
                c_int,
                c_uint,
                c_ulong,
                c_void, //
            },
            page::PAGE_SIZE,
            prelude::*,
            sync::{
                aref::ARef,
                atomic::{
                    Atomic,
                    AtomicType,
                    Relaxed,
                    Release, //
                },
                Arc, //
            },
            types::{
                Opaque,
                ScopeGuard, //
            },
        };
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
pub(crate) mod rule;

pub(crate) mod firmware;

pub(crate) mod counter;
pub(crate) mod shared;
pub(crate) mod sysgenid;

pub(crate) mod generation;

pub(crate) mod node;
pub(crate) mod registry;

pub(crate) mod probe;
