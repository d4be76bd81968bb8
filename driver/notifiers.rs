// SPDX-License-Identifier: GPL-2.0

//! Calling the vmfork notifiers, once for each published ID.
//!
//! The notifiers may sleep for long: that of WireGuard takes `rtnl_lock`. So a work item calls them,
//! after the reseed. Nothing waits for it except the end of the module.

use super::{
    id::Id,
    kernel::{
        random::Vmfork,
        workqueue, //
    }, //
};
use kernel::{
    new_mutex,
    new_work,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
    workqueue::{
        impl_has_work,
        Work,
        WorkItem, //
    }, //
};

/// The calls that are due.
struct Due {
    /// The ID that was published last.
    id: Id,
    calls: usize,
}

/// The vmfork notifiers, as something to call later.
#[pin_data]
pub(crate) struct Notifiers {
    call: Vmfork,
    #[pin]
    due: Mutex<Due>,
    #[pin]
    work: Work<Notifiers>,
}

impl_has_work! {
    impl HasWork<Self> for Notifiers { self.work }
}

impl Notifiers {
    /// # Errors
    ///
    /// `ENOMEM`: There is no memory.
    pub(crate) fn new(call: Vmfork) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                call,
                due <- new_mutex!(Due { id: [0; 2], calls: 0 }, "Notifiers::due"),
                work <- new_work!("Notifiers::work"),
            }),
            GFP_KERNEL,
        )
    }

    /// Has the notifiers called once more: `id` was published.
    pub(crate) fn call_later(self: &Arc<Self>, id: Id) {
        {
            let mut due = self.due.lock();
            due.id = id;
            due.calls += 1;
        }
        workqueue::enqueue(self.clone());
    }

    /// Blocks until no call is due. Many that are due become one, since the module is unloaded: after
    /// a storm of changes there can be thousands, each of which prints a line.
    pub(crate) fn finish(&self) {
        {
            let mut due = self.due.lock();
            due.calls = due.calls.min(1);
        }
        workqueue::flush(self);
    }

    /// Returns the ID of the next call that is due.
    fn next(&self) -> Option<Id> {
        let mut due = self.due.lock();
        due.calls = due.calls.checked_sub(1)?;
        Some(due.id)
    }
}

impl WorkItem for Notifiers {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        while let Some(id) = this.next() {
            (this.call)(id.as_bytes());
        }
    }
}
