// SPDX-License-Identifier: GPL-2.0

//! The data that all generations of the module share, and the calls of the vmfork notifiers.
//!
//! The notifiers may sleep for long: that of WireGuard takes `rtnl_lock`. So a work item calls them,
//! after the reseed. Nothing waits for it except the end of the module.

use super::{
    kernel::{
        kthread::Worker,
        random::Vmfork,
        workqueue, //
    },
    prelude::*,
    rule::Reseeder, //
};
use kernel::{
    new_work,
    workqueue::{
        impl_has_work,
        Work,
        WorkItem, //
    }, //
};

/// The data that all generations of the module share.
#[pin_data]
pub(crate) struct Shared {
    pub(crate) reseeder: Reseeder,

    /// The thread that applies the rule.
    pub(crate) worker: Arc<Worker>,

    /// Calls the vmfork notifiers. `None` if the reseed itself or the built-in driver does.
    notifiers: Option<Vmfork>,

    /// The number of calls that are due: one for each published ID.
    due: Atomic<usize>,
    #[pin]
    work: Work<Shared>,
}

impl_has_work! {
    impl HasWork<Self> for Shared { self.work }
}

impl Shared {
    /// Opens `/dev/random`, and starts the thread.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let reseeder = Reseeder::new()?;
        let worker = Worker::new(crate::NAME)?;
        Arc::pin_init(
            pin_init!(Self {
                notifiers: reseeder.notifiers(),
                reseeder,
                worker,
                due: Atomic::new(0),
                work <- new_work!("Shared::work"),
            }),
            GFP_KERNEL,
        )
    }

    /// Has the notifiers called once more.
    pub(crate) fn notify_later(self: &Arc<Self>) {
        if self.notifiers.is_some() {
            self.due.fetch_add(1, Relaxed);
            workqueue::enqueue(self.clone());
        }
    }

    /// Blocks until no call is due. Many that are due become one, since the module is unloaded: after
    /// a storm of changes there can be thousands, each of which prints a line.
    pub(crate) fn finish(self: Arc<Self>) {
        if self.due.xchg(0, Full) > 0 {
            self.notify_later();
        }
        workqueue::flush(&*self);
    }
}

impl WorkItem for Shared {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let Some(call) = this.notifiers else { return };
        loop {
            let due = this.due.load(Relaxed);
            if due == 0 {
                return;
            }
            if this.due.cmpxchg(due, due - 1, Full).is_ok() {
                // The ID is in the pool already.
                call(&[]);
            }
        }
    }
}
