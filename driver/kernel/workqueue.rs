// SPDX-License-Identifier: GPL-2.0

//! What [`kernel::workqueue`] lacks: the queue that replaces its deprecated `system_unbound()`, and
//! waiting for work items.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use super::prelude::*;
use kernel::workqueue::{
    HasWork,
    Queue,
    Work,
    WorkItem, //
};

/// Queues `item` in the queue for work that is bound to no CPU: `system_dfl_wq`. If it is queued
/// already, its run is yet to begin.
pub(crate) fn enqueue<T>(item: Arc<T>)
where
    T: WorkItem<Pointer = Arc<T>> + HasWork<T> + Send + Sync + 'static,
{
    // SAFETY: This queue exists as long as the machine runs.
    let queue = unsafe { Queue::from_raw(bindings::system_dfl_wq) };
    let _ = queue.enqueue::<Arc<T>, 0>(item);
}

/// Blocks until the queued runs of `item` complete. Not to be called by its own run.
pub(crate) fn flush<T: HasWork<T>>(item: &T) {
    let item: *const T = item;
    // SAFETY: The item is valid, and so is the work in it, which is initialized by construction.
    // Only the `struct work_struct` is written to, which is `Opaque`.
    unsafe { bindings::flush_work(Work::raw_get(T::raw_get_work(item.cast_mut()))) };
}
