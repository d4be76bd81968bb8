// SPDX-License-Identifier: GPL-2.0

//! Calling the vmfork notifiers, once for each published ID.
//!
//! The notifiers may sleep for long: that of WireGuard takes `rtnl_lock`. So a separate thread
//! calls them, after the reseed. Only the unload of the module waits for it.

use super::{
    id::{
        Id,
        Published, //
    },
    kernel::{
        kthread::{
            Job,
            Priority,
            Work,
            Worker, //
        },
        random::Vmfork, //
    }, //
};
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    }, //
};

/// The calls of the vmfork notifiers that are due.
pub(crate) struct Due {
    call: Vmfork,
    calls: Atomic<u32>,
    /// The last published ID of all devices.
    id: Published,
}

/// The work that calls the vmfork notifiers.
pub(crate) type Notifiers = Work<Due>;

impl Notifiers {
    /// # Errors
    ///
    /// Those of [`Worker::new`], and `ENOMEM`.
    pub(crate) fn start(call: Vmfork) -> Result<Arc<Self>> {
        let due = Due {
            call,
            calls: Atomic::new(0),
            id: Published::none([0; 2]),
        };
        let worker = Worker::new(c"vmgenid-notify", Priority::Normal)?;
        Arc::pin_init(Work::new(worker, due), GFP_KERNEL)
    }

    /// Queues one more call of the notifiers: `id` was published. One caller at a time.
    pub(crate) fn call_later(&self, id: Id) {
        self.id.set(id);
        self.calls.fetch_add(1, Relaxed);
        self.queue();
    }
}

impl Job for Due {
    fn run(&self) {
        let mut calls = self.calls.xchg(0, Relaxed);
        while calls > 0 {
            (self.call)(self.id.get().as_bytes());
            calls -= 1;
        }
    }
}
