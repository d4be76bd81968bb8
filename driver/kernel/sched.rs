// SPDX-License-Identifier: GPL-2.0

//! Waiting until kernel threads that are in the middle of something have slept.
//!
//! Code that does not sleep, and that a kernel thread runs, is over when the thread has slept. In
//! contrast to a flush of the work queue, this does not wait for threads that sleep already, for
//! example for a lock. In contrast to `synchronize_rcu_tasks()`, which waits for all tasks and takes
//! 0.1 s and more, it takes as long as those threads need.
//!
//! C header: [`include/linux/sched.h`](srctree/include/linux/sched.h)

use core::{
    ptr,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    ffi::c_ulong,
    sync::{
        aref::ARef,
        rcu, //
    },
    task::Task,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Which kernel threads.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(crate) enum Threads {
    /// Those of work queues.
    Workers = bindings::PF_WQ_WORKER,
    /// All of them.
    All = bindings::PF_KTHREAD,
}

/// How long a caller can wait.
pub(crate) struct Patience(Option<u32>);

impl Patience {
    /// How long each wait is.
    const STEP: Delta = Delta::from_micros(50);

    /// As long as it takes.
    pub(crate) const fn endless() -> Self {
        Self(None)
    }

    /// For 2 ms in all, or somewhat longer on a busy CPU.
    pub(crate) const fn brief() -> Self {
        Self(Some(40))
    }

    /// Returns whether this is [`Patience::endless`].
    pub(crate) fn is_endless(&self) -> bool {
        self.0.is_none()
    }

    /// Sleeps for a moment. `false`: The time is over.
    pub(crate) fn wait(&mut self) -> bool {
        if let Some(steps) = &mut self.0 {
            if *steps == 0 {
                return false;
            }
            *steps -= 1;
        }
        fsleep(Self::STEP);
        true
    }
}

/// How many times a task may be counted as having slept although it only waited for a `spinlock_t`.
///
/// With `PREEMPT_RT` a `spinlock_t` sleeps. A code section in which the number of such waits is at
/// most this one is over when a thread has slept more often.
const LOCK_WAITS: c_ulong = if cfg!(CONFIG_PREEMPT_RT) { 1 } else { 0 };

impl Threads {
    /// Returns whether one of them, other than the caller, runs or could run.
    pub(crate) fn any_runnable(self) -> bool {
        self.runnable_after(None).is_some()
    }

    /// Waits until each of them that runs or could run, other than the caller, has slept once or has
    /// exited. Returns whether that is so: `false` if it takes longer than `patience` allows.
    ///
    /// A section of code that begins later is not waited for. A section that began earlier is over,
    /// provided that the thread does not sleep in it, and that (with `PREEMPT_RT`) it waits for one
    /// `spinlock_t` at most. Threads that were made visible to the caller by a lock, which their
    /// section and the caller have taken, are not missed.
    pub(crate) fn wait_until_slept(self, patience: &mut Patience) -> bool {
        let mut last = None;
        while let Some(thread) = self.runnable_after(last.take()) {
            let seen = sleeps(&thread);
            while is_runnable(thread.as_ptr()) && sleeps(&thread) - seen <= LOCK_WAITS {
                if !patience.wait() {
                    return false;
                }
            }
            last = Some(thread);
        }
        true
    }

    /// Returns the next runnable one after `last` in the list of processes. Where `last` has exited
    /// the search begins anew.
    fn runnable_after(self, last: Option<ARef<Task>>) -> Option<ARef<Task>> {
        let first = &raw mut bindings::init_task;
        let current = Task::current_raw();
        let _rcu = rcu::read_lock();

        let mut task = match &last {
            // SAFETY: The task is valid, by the reference.
            Some(last) if !unsafe { (*last.as_ptr()).thread_pid }.is_null() => last.as_ptr(),
            _ => first,
        };
        loop {
            // SAFETY: `task` is `init_task`, or was in the list at some time since the RCU read
            // lock was taken. So what its link points at is valid until that is released. Kernel
            // threads are processes of one thread each.
            task = unsafe {
                let next = (&raw const (*task).tasks.next).read_volatile();
                kernel::container_of!(next, bindings::task_struct, tasks)
            };
            if ptr::eq(task, first) {
                return None;
            }
            // SAFETY: Valid, as said above. The flags that are looked at do not change.
            let flags = unsafe { (&raw const (*task).flags).read_volatile() };
            if flags & self as u32 != 0 && !ptr::eq(task, current) && is_runnable(task) {
                // SAFETY: Valid, and in the list, so that somebody has a reference. `Task` is a
                // transparent wrapper.
                return Some(
                    unsafe { NonNull::new_unchecked(task).cast::<Task>().as_ref() }.into(),
                );
            }
        }
    }
}

/// Returns whether a task runs, could run, or waits for a `spinlock_t`.
///
/// Callers make sure that the task is valid.
fn is_runnable(task: *mut bindings::task_struct) -> bool {
    // SAFETY: The task is valid. The scheduler writes to both words at any time.
    let (state, on_rq) = unsafe {
        (
            (&raw const (*task).__state).read_volatile(),
            (&raw const (*task).on_rq).read_volatile(),
        )
    };
    match state {
        bindings::TASK_RUNNING => on_rq != 0,
        bindings::TASK_RTLOCK_WAIT => true,
        _ => false,
    }
}

/// Returns how many times a task has slept. It wraps.
fn sleeps(task: &Task) -> c_ulong {
    // SAFETY: The task is valid. The scheduler writes to the word at any time.
    unsafe { (&raw const (*task.as_ptr()).nvcsw).read_volatile() }
}
