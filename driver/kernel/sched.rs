// SPDX-License-Identifier: GPL-2.0

//! Waiting until tasks are out of a section of code that does not sleep.
//!
//! In contrast to a flush of the work queue, this does not wait for threads that sleep, for example
//! for a lock. In contrast to `synchronize_rcu_tasks()`, which waits for all tasks and takes 0.1 s and
//! more, [`wait_for_workers`] takes as long as the section does.
//!
//! C header: [`include/linux/sched.h`](srctree/include/linux/sched.h)

use core::ptr;
use kernel::{
    bindings,
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

/// The CPU time after which a thread is taken to have left a section, in nanoseconds, and in how many
/// parts it has to be accounted. One part alone can be the time in which the machine was saved.
const LONG: u64 = 50_000_000;
const PARTS: u32 = 20;

/// Waits until each work queue thread that runs or could run, other than the caller, is out of what it
/// is doing now. Returns at once if there is none. Sleeps.
///
/// This is for sections of code that do not sleep and that take some microseconds of CPU time. A
/// thread is out of such a section when it has slept or exited, or when it has used the CPU for much
/// longer. (A thread does not sleep between two works.) Sections that begin later are not waited for.
///
/// No thread is missed that took a lock in its section, before the caller took the same lock: its
/// state was written before that.
pub(crate) fn wait_for_workers() {
    let mut last = None;
    while let Some(worker) = next_runnable_worker(last.take()) {
        let begin = usage(&worker);
        let (mut time, mut parts) = (begin.time, 0);
        while is_runnable(&worker) {
            let now = usage(&worker);
            if now.sleeps != begin.sleeps && COUNTS_SLEEPS {
                break;
            }
            if now.time != time {
                time = now.time;
                parts += 1;
            }
            if parts >= PARTS && time.wrapping_sub(begin.time) >= LONG {
                break;
            }
            fsleep(Delta::from_micros(50));
        }
        last = Some(worker);
    }
}

/// Returns whether there is a work queue thread, other than the caller, that runs or could run.
pub(crate) fn has_runnable_worker() -> bool {
    next_runnable_worker(None).is_some()
}

/// Waits until all tasks are out of what they are doing now in the kernel, provided that they do not
/// sleep in it; interrupts, too. Sleeps, for 0.1 s and more where tasks are preemptible.
pub(crate) fn wait_for_tasks() {
    rcu::synchronize_rcu();
    // SAFETY: This can be called from any context that may sleep.
    #[cfg(CONFIG_TASKS_RCU)]
    unsafe {
        bindings::synchronize_rcu_tasks()
    };
    wait_for_workers();
}

/// Returns the next runnable work queue thread after `last` in the list of processes. Where `last` has
/// exited the search begins anew.
fn next_runnable_worker(last: Option<ARef<Task>>) -> Option<ARef<Task>> {
    let first = &raw mut bindings::init_task;
    let current = Task::current_raw();
    let _rcu = rcu::read_lock();

    let mut task = first;
    if let Some(last) = &last {
        // SAFETY: The task is valid, by the reference. `detach_pid()` writes to the pointer before
        // the task leaves the list.
        if !unsafe { (&raw const (*last.as_ptr()).thread_pid).read_volatile() }.is_null() {
            task = last.as_ptr();
        }
    }
    loop {
        // SAFETY: `task` is `init_task`, or was in the list at some time since the RCU read lock was
        // taken. So what its link points at is valid until that is released. Kernel threads are
        // processes of one thread each.
        task = unsafe {
            let next = (&raw const (*task).tasks.next).read_volatile();
            kernel::container_of!(next, bindings::task_struct, tasks)
        };
        if ptr::eq(task, first) {
            return None;
        }
        // SAFETY: The task is valid, as said above. Only the thread itself writes to its flags; the
        // one that is looked at does not change while a work runs.
        let flags = unsafe { (&raw const (*task).flags).read_volatile() };
        if flags & bindings::PF_WQ_WORKER == 0 || ptr::eq(task, current) {
            continue;
        }
        // SAFETY: The task is valid, and `Task` is a transparent wrapper. The list has a reference to
        // it until the RCU read lock is released.
        let task = unsafe { &*task.cast_const().cast::<Task>() };
        if is_runnable(task) {
            return Some(task.into());
        }
    }
}

/// Whether a task that has slept once more was out of its section. With `PREEMPT_RT`, waiting for a
/// `spinlock_t` counts as sleeping.
const COUNTS_SLEEPS: bool = !cfg!(CONFIG_PREEMPT_RT);

/// `TASK_WAKING` of `include/linux/sched.h`, which the bindings leave out.
const TASK_WAKING: u32 = 0x200;

/// Returns whether a task runs, could run, or waits for a `spinlock_t`.
fn is_runnable(task: &Task) -> bool {
    let task = task.as_ptr();
    // SAFETY: The task is valid. The scheduler writes to both words at any time.
    let (state, on_rq) = unsafe {
        (
            (&raw const (*task).__state).read_volatile(),
            (&raw const (*task).on_rq).read_volatile(),
        )
    };
    match state {
        bindings::TASK_RUNNING => on_rq != 0,
        // It waits for a `spinlock_t`, or is being woken from that.
        bindings::TASK_RTLOCK_WAIT | TASK_WAKING => cfg!(CONFIG_PREEMPT_RT),
        _ => false,
    }
}

/// How often a task has slept, and for how many nanoseconds it has used the CPU.
struct Usage {
    sleeps: kernel::ffi::c_ulong,
    time: u64,
}

fn usage(task: &Task) -> Usage {
    let task = task.as_ptr();
    // SAFETY: The task is valid. The scheduler writes to both words at any time.
    unsafe {
        Usage {
            sleeps: (&raw const (*task).nvcsw).read_volatile(),
            time: (&raw const (*task).se.sum_exec_runtime).read_volatile(),
        }
    }
}
