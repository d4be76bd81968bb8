// SPDX-License-Identifier: GPL-2.0

//! Kernel threads, and work for them.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use core::{
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    error::from_err_ptr,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// The priority of a [`Worker`].
#[derive(PartialEq)]
pub(crate) enum Priority {
    /// That of interrupt threads: `SCHED_FIFO`, 50.
    Interrupt,
    /// That of processes.
    Normal,
}

/// A kernel thread that does one work after the other (`struct kthread_worker`).
///
/// # Invariants
///
/// Points at a valid worker that this value owns.
pub(crate) struct Worker(NonNull<bindings::kthread_worker>);

// SAFETY: A worker can be destroyed from any thread but its own, and its thread owns none.
unsafe impl Send for Worker {}
// SAFETY: Work can be queued from any thread.
unsafe impl Sync for Worker {}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: There is no memory.
    /// - `EINTR`: The caller is being killed.
    pub(crate) fn new(name: &'static CStr, priority: Priority) -> Result<Arc<Self>> {
        // SAFETY: The format takes one C string.
        let worker = from_err_ptr(unsafe {
            bindings::kthread_create_worker_on_node(
                0,
                bindings::NUMA_NO_NODE,
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        })?;
        // INVARIANT: The worker was just made, for this value.
        let worker = Self(NonNull::new(worker).ok_or(ENOMEM)?);

        // SAFETY: The worker is valid, and so is its thread, which has not begun.
        unsafe {
            let thread = (*worker.0.as_ptr()).task;
            if priority == Priority::Interrupt {
                bindings::sched_set_fifo(thread);
            }
            bindings::wake_up_process(thread);
        }
        Ok(Arc::new(worker, GFP_KERNEL)?)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the worker is valid and owned. Each work has a reference, so
        // that none is left.
        unsafe { bindings::kthread_destroy_worker(self.0.as_ptr()) };
    }
}

/// What a [`Worker`] does.
pub(crate) trait Job: Send + Sync + 'static {
    /// Called in the worker's thread after [`Work::queue`]. May sleep.
    fn run(&self);
}

/// A [`Job`] that can be queued.
///
/// When it is dropped, the queued runs complete. It must not be dropped by [`Job::run`]: that blocks
/// for ever.
///
/// # Invariants
///
/// `work` is initialized, its function is `run::<T>`, and only `worker` ever has it.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub(crate) struct Work<T: Job> {
    // `run` takes the address of this field as that of the whole.
    #[pin]
    work: Opaque<bindings::kthread_work>,
    worker: Arc<Worker>,
    #[pin]
    job: T,
}

// SAFETY: Work can be queued and cancelled from any thread, and a `Job` is `Send`.
unsafe impl<T: Job> Send for Work<T> {}
// SAFETY: As above, and a `Job` is `Sync`.
unsafe impl<T: Job> Sync for Work<T> {}

impl<T: Job> Work<T> {
    /// Makes work of `job`, for `worker`.
    pub(crate) fn new(worker: Arc<Worker>, job: impl PinInit<T>) -> impl PinInit<Self> {
        // INVARIANT: As `kthread_init_work()` does it.
        pin_init!(Self {
            worker,
            job <- job,
            work <- Opaque::ffi_init(|slot: *mut bindings::kthread_work| {
                let work = bindings::kthread_work {
                    func: Some(run::<T>),
                    ..pin_init::zeroed()
                };
                // SAFETY: The initializer can write to the provided `slot`, and the list head in it
                // is initialized right after that.
                unsafe {
                    slot.write(work);
                    bindings::INIT_LIST_HEAD(&raw mut (*slot).node);
                }
            }),
        })
    }

    /// Has the job run, from its beginning. Can be called in hard interrupt context.
    pub(crate) fn queue(&self) {
        // If the work is queued already, its run is yet to begin.
        //
        // SAFETY: By the type invariants both are valid, and the work belongs to this worker.
        unsafe { bindings::kthread_queue_work(self.worker.0.as_ptr(), self.work.get()) };
    }

    /// Blocks until the runs complete that were queued before. Not to be called by [`Job::run`].
    pub(crate) fn flush(&self) {
        // SAFETY: By the type invariants the work is valid.
        unsafe { bindings::kthread_flush_work(self.work.get()) };
    }
}

impl<T: Job> Deref for Work<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.job
    }
}

#[pinned_drop]
impl<T: Job> PinnedDrop for Work<T> {
    fn drop(self: Pin<&mut Self>) {
        // Nobody can queue another run.
        self.flush();
    }
}

/// # Safety
///
/// This function should be only used as that of a [`Work`].
unsafe extern "C" fn run<T: Job>(work: *mut bindings::kthread_work) {
    // SAFETY: `Opaque` is transparent, so this is the first field of a `Work<T>`, which waits for this
    // call before it is dropped.
    let work = unsafe { &*work.cast::<Work<T>>() };

    work.job.run();
}
