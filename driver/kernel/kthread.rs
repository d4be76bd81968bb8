// SPDX-License-Identifier: GPL-2.0

//! Kernel threads, and work for them.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use super::prelude::*;
use core::ops::Deref;

/// A kernel thread that runs one work after the other (`struct kthread_worker`).
///
/// # Invariants
///
/// Points at a valid worker that this value owns.
pub(crate) struct Worker(NonNull<bindings::kthread_worker>);

// SAFETY: Any thread can destroy a worker. (The worker's own thread would block for ever.)
unsafe impl Send for Worker {}
// SAFETY: Any thread can queue work.
unsafe impl Sync for Worker {}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: There is no memory.
    /// - `EINTR`: The caller is being killed.
    pub(crate) fn new(name: &'static CStr) -> Result<Arc<Self>> {
        // SAFETY: The format takes one C string.
        let worker = from_err_ptr(unsafe {
            bindings::kthread_create_worker_on_node(
                0,
                bindings::NUMA_NO_NODE,
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        })?;
        // INVARIANT: The worker was just created, for this value.
        let worker = Self(NonNull::new(worker).ok_or(ENOMEM)?);

        // SAFETY: The worker is valid. So is its thread: it has not started.
        unsafe {
            let thread = (*worker.0.as_ptr()).task;
            bindings::sched_set_fifo(thread);
            bindings::wake_up_process(thread);
        }
        Ok(Arc::new(worker, GFP_KERNEL)?)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the worker is valid and owned. No `Work` has a reference.
        unsafe { bindings::kthread_destroy_worker(self.0.as_ptr()) };
    }
}

/// Code for a [`Worker`].
pub(crate) trait Job: Send + Sync + 'static {
    /// Called in the worker's thread after [`Work::queue`]. May sleep.
    fn run(&self);
}

/// A [`Job`] that can be queued.
///
/// A drop blocks until the queued runs complete. In [`Job::run`] it blocks for ever.
///
/// # Invariants
///
/// `work` is initialized, its function is `run::<T>`, and it is queued only on `worker`.
#[repr(C)]
#[pin_data(PinnedDrop)]
pub(crate) struct Work<T: Job> {
    // The first field: `run` casts its address to that of the struct.
    #[pin]
    work: Opaque<bindings::kthread_work>,
    worker: Arc<Worker>,
    #[pin]
    job: T,
}

// SAFETY: Any thread can queue and flush work, and a `Job` is `Send`.
unsafe impl<T: Job> Send for Work<T> {}
// SAFETY: As above, and a `Job` is `Sync`.
unsafe impl<T: Job> Sync for Work<T> {}

impl<T: Job> Work<T> {
    /// Creates work: `worker` runs `job`.
    pub(crate) fn new(worker: Arc<Worker>, job: impl PinInit<T>) -> impl PinInit<Self> {
        // INVARIANT: This initializes the work as `kthread_init_work()` does.
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

    /// Queues a run of the job. Does nothing if a run is queued that has not begun. Can be called
    /// in hard interrupt context.
    pub(crate) fn queue(&self) {
        // SAFETY: By the type invariants both are valid, and the work belongs to this worker.
        unsafe { bindings::kthread_queue_work(self.worker.0.as_ptr(), self.work.get()) };
    }

    /// Blocks until the runs that were queued before complete. In [`Job::run`] it blocks for ever.
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
        // No reference is left with which a thread could queue another run.
        self.flush();
    }
}

/// # Safety
///
/// This function should be only used as the function of a [`Work`].
unsafe extern "C" fn run<T: Job>(work: *mut bindings::kthread_work) {
    // SAFETY: As `Opaque` is transparent, this is the first field of a `Work`. Its drop waits.
    let work = unsafe { &*work.cast::<Work<T>>() };

    work.job.run();
}
