// SPDX-License-Identifier: GPL-2.0

//! What [`kernel::workqueue`] lacks: a queue of one's own, which has an end.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use core::{
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    prelude::*,
    workqueue::Queue, //
};

/// A workqueue. When it is dropped, all that was queued has been done.
///
/// It must not be dropped by what runs in it.
///
/// # Invariants
///
/// Points at a valid workqueue that this value owns.
pub(crate) struct OwnedQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A workqueue can be destroyed from any thread.
unsafe impl Send for OwnedQueue {}
// SAFETY: Work can be queued from any thread.
unsafe impl Sync for OwnedQueue {}

impl OwnedQueue {
    /// Makes a queue that is bound to no CPU, and whose work goes before that of others.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: there is no memory.
    pub(crate) fn new(name: &'static CStr) -> Result<Self> {
        // SAFETY: The format takes one C string. `0` stands for the usual limit.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(
                c"%s".as_char_ptr(),
                bindings::wq_flags_WQ_UNBOUND | bindings::wq_flags_WQ_HIGHPRI,
                0,
                name.as_char_ptr(),
            )
        };
        // INVARIANT: It was just made, for this value.
        NonNull::new(queue).map(Self).ok_or(ENOMEM)
    }
}

impl Deref for OwnedQueue {
    type Target = Queue;

    fn deref(&self) -> &Queue {
        // SAFETY: By the type invariants it is valid, for as long as `self`.
        unsafe { Queue::from_raw(self.0.as_ptr()) }
    }
}

impl Drop for OwnedQueue {
    fn drop(&mut self) {
        // SAFETY: By the type invariants it is valid and ours. Who could queue more has borrowed
        // `self`.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}
