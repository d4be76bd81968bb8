// SPDX-License-Identifier: GPL-2.0

//! Threads of the kernel's, for what cannot wait for a work queue.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use super::cpuhotplug::{
    Online,
    Registration, //
};
use core::ptr::NonNull;
use kernel::{
    bindings,
    cpu::{
        nr_cpu_ids,
        CpuId, //
    },
    cpumask::CpumaskVar,
    error::from_err_ptr,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        SetOnce, //
    },
    types::Opaque, //
};

/// What a thread does.
pub(crate) trait Task: Send + Sync + 'static {
    /// Called after each wake-up that came since it was called last. It may sleep.
    fn run(&self);
}

/// A thread on each CPU, that goes before all that is not of real-time priority there, as those of
/// interrupts do.
///
/// There is one for each CPU that is online, or was since. That of a CPU that is offline runs on any
/// other one, until its own is online again.
///
/// When this is dropped they have done all that they were woken for, and are gone; those whose CPU
/// belongs to something more urgent end on another one. It must not be dropped by their own
/// [`Task::run`].
pub(crate) struct Threads<T: Task> {
    // Dropped first: it makes threads.
    _online: Pin<KBox<Registration>>,
    slots: Arc<Slots<T>>,
}

impl<T: Task> Threads<T> {
    /// Starts the threads, which sleep until they are woken. They are called `name`, a slash, and
    /// the CPU's number.
    ///
    /// A CPU that comes online later, when there is no memory for its thread, goes without one.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: there is no memory for one of them.
    ///
    /// And those of [`Registration::new`].
    pub(crate) fn new(name: &'static CStr, task: Arc<T>) -> Result<Self> {
        let mut threads = KVec::new();
        for _ in 0..nr_cpu_ids() {
            threads.push(SetOnce::new(), GFP_KERNEL)?;
        }
        let slots = Slots {
            name,
            task,
            threads,
            missing: Atomic::new(false),
        };
        let slots = Arc::new(slots, GFP_KERNEL)?;
        let online = Registration::new(slots.clone())?;
        if slots.missing.load(Relaxed) {
            return Err(ENOMEM);
        }
        Ok(Self {
            _online: online,
            slots,
        })
    }

    /// Has each of them call [`Task::run`], from its beginning. Can be called by an interrupt's
    /// handler, but not in an NMI.
    pub(crate) fn wake(&self) {
        for thread in self.slots.threads.iter().filter_map(SetOnce::as_ref) {
            thread.wake();
        }
    }
}

/// Where the threads are, by their CPUs' numbers.
struct Slots<T: Task> {
    name: &'static CStr,
    task: Arc<T>,
    threads: KVec<SetOnce<Thread<T>>>,
    /// Whether there is a CPU without one.
    missing: Atomic<bool>,
}

impl<T: Task> Online for Slots<T> {
    fn online(&self, cpu: CpuId) {
        let Some(slot) = self.threads.get(cpu.as_u32() as usize) else {
            return;
        };
        match slot.as_ref() {
            Some(thread) => thread.go_home(),
            // It stays when the CPU goes: what it does may be waiting for who waits for that.
            None => match Thread::new(self.name, cpu, self.task.clone()) {
                Ok(thread) => {
                    slot.populate(thread);
                }
                Err(_) => self.missing.store(true, Relaxed),
            },
        }
    }
}

/// One of the threads.
///
/// # Invariants
///
/// - `worker` points at a valid worker that this value owns, and `thread` at its thread, which is
///   running.
/// - `job`'s work is queued in no other worker.
struct Thread<T: Task> {
    worker: NonNull<bindings::kthread_worker>,
    thread: NonNull<bindings::task_struct>,
    // Dropped after the worker was destroyed.
    job: Pin<KBox<Job<T>>>,
    /// The CPU.
    home: CpumaskVar,
}

// SAFETY: A worker can be destroyed from any thread; the `Arc` can be sent, and so can a mask.
unsafe impl<T: Task> Send for Thread<T> {}
// SAFETY: Work can be queued, and a thread moved, from any thread. Nobody writes to the mask but who
// owns it.
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
    /// Starts a thread on `cpu`.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: there is no memory.
    /// - `EINTR`: the caller is being killed.
    fn new(name: &'static CStr, cpu: CpuId, task: Arc<T>) -> Result<Self> {
        let job = KBox::pin_init(Job::new(task), GFP_KERNEL)?;
        let mut home = CpumaskVar::new_zero(GFP_KERNEL)?;
        home.set(cpu);

        // SAFETY: The format takes a C string and an `unsigned int`.
        let worker = from_err_ptr(unsafe {
            bindings::kthread_create_worker_on_node(
                0,
                bindings::NUMA_NO_NODE,
                c"%s/%u".as_char_ptr(),
                name.as_char_ptr(),
                cpu.as_u32(),
            )
        })?;
        let worker = NonNull::new(worker).ok_or(ENOMEM)?;

        // SAFETY: The worker is valid, and ours; so is its thread, which begins here. The CPU is a
        // possible one.
        let thread = unsafe {
            let thread = (*worker.as_ptr()).task;
            bindings::kthread_bind(thread, cpu.as_u32());
            bindings::sched_set_fifo(thread);
            bindings::wake_up_process(thread);
            NonNull::new_unchecked(thread)
        };
        // INVARIANT: It was just made, for this value, and nobody else has `job`.
        Ok(Self {
            worker,
            thread,
            job,
            home,
        })
    }

    /// Has it run on the CPUs in `home` only. It may sleep.
    fn go_home(&self) {
        // Where that fails it goes on where it is.
        //
        // SAFETY: By the type invariants the thread is valid until the worker is destroyed, and the
        // mask is. We may sleep.
        unsafe { bindings::set_cpus_allowed_ptr(self.thread.as_ptr(), self.home.as_raw()) };
    }

    /// See [`Threads::wake`].
    fn wake(&self) {
        // If it is queued already it has yet to begin.
        //
        // SAFETY: By the type invariants both are valid, and the work belongs to this worker. The
        // worker is not destroyed while `self` is borrowed.
        unsafe { bindings::kthread_queue_work(self.worker.as_ptr(), self.job.work.get()) };
    }
}

impl<T: Task> Drop for Thread<T> {
    fn drop(&mut self) {
        // It has to run once more.
        self.home.setall();
        self.go_home();

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
