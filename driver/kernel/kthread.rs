// SPDX-License-Identifier: GPL-2.0

//! Threads of the kernel's, for what cannot wait for a work queue.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use core::ptr::NonNull;
use kernel::{
    bindings,
    error::from_err_ptr,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// What a [`Thread`] does.
pub(crate) trait Task: Send + Sync + 'static {
    /// Called after each wake-up that came since it was called last. It may sleep.
    fn run(&self);
}

/// A thread that goes before all that are not of real-time priority, as those of interrupts do.
///
/// When it is dropped, it has done all that it was woken for, and is gone. It must not be dropped
/// by its own [`Task::run`].
///
/// # Invariants
///
/// - `worker` points at a valid worker that this value owns, and whose thread is running.
/// - `job`'s work is queued in no other worker.
pub(crate) struct Thread<T: Task> {
    worker: NonNull<bindings::kthread_worker>,
    // Dropped after the worker was destroyed.
    job: Pin<KBox<Job<T>>>,
}

// SAFETY: A worker can be destroyed from any thread; the `Arc` can be sent.
unsafe impl<T: Task> Send for Thread<T> {}
// SAFETY: Work can be queued from any thread.
unsafe impl<T: Task> Sync for Thread<T> {}

/// # Invariants
///
/// `work` was initialized, and its function is `run::<T>`.
#[repr(C)]
#[pin_data]
struct Job<T: Task> {
    // It comes first: its address is that of the whole.
    #[pin]
    work: Opaque<bindings::kthread_work>,
    task: Arc<T>,
}

impl<T: Task> Job<T> {
    fn new(task: Arc<T>) -> impl PinInit<Self> {
        // INVARIANT: As `kthread_init_work()` does it.
        pin_init!(Self {
            task,
            work <- Opaque::ffi_init(|slot: *mut bindings::kthread_work| {
                let work = bindings::kthread_work {
                    func: Some(run::<T>),
                    ..pin_init::zeroed()
                };
                // SAFETY: The initializer can write to the provided `slot`, and the list head in
                // it is initialized right after that.
                unsafe {
                    slot.write(work);
                    bindings::INIT_LIST_HEAD(&raw mut (*slot).node);
                }
            }),
        })
    }
}

impl<T: Task> Thread<T> {
    /// Starts a thread called `name`, which sleeps until it is woken.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: there is no memory.
    /// - `EINTR`: the caller is being killed.
    pub(crate) fn new(name: &'static CStr, task: Arc<T>) -> Result<Self> {
        let job = KBox::pin_init(Job::new(task), GFP_KERNEL)?;

        // SAFETY: The format takes one C string.
        let worker = from_err_ptr(unsafe {
            bindings::kthread_create_worker_on_node(
                0,
                bindings::NUMA_NO_NODE,
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        })?;
        let worker = NonNull::new(worker).ok_or(ENOMEM)?;

        // SAFETY: The worker is valid, and ours; so is its thread, which begins here.
        unsafe {
            let thread = (*worker.as_ptr()).task;
            bindings::sched_set_fifo(thread);
            bindings::wake_up_process(thread);
        }
        // INVARIANT: It was just made, for this value, and nobody else has `job`.
        Ok(Self { worker, job })
    }

    /// Has it call [`Task::run`], from its beginning. Can be called anywhere, also by an interrupt's
    /// handler.
    pub(crate) fn wake(&self) {
        // If it is queued already it has yet to begin.
        //
        // SAFETY: By the type invariants both are valid, and the work belongs to this worker. The
        // worker is not destroyed while `self` is borrowed.
        unsafe { bindings::kthread_queue_work(self.worker.as_ptr(), self.job.work.get()) };
    }
}

impl<T: Task> Drop for Thread<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariants the worker is valid, ours, and its thread was started. Who
        // could queue more has borrowed `self`.
        unsafe { bindings::kthread_destroy_worker(self.worker.as_ptr()) };
    }
}

/// # Safety
///
/// To be used only as the function of a [`Job`]'s work, which has to be valid until this returns.
unsafe extern "C" fn run<T: Task>(work: *mut bindings::kthread_work) {
    // SAFETY: `Opaque` is transparent, so this is the first field of a `Job<T>`, which is dropped
    // only after its worker, who calls this, is gone. Only its other field is accessed.
    let task = unsafe { &(*work.cast::<Job<T>>()).task };

    task.run();
}
