// SPDX-License-Identifier: GPL-2.0

//! Waiting until tasks have left a section of code that does not sleep.
//!
//! Unlike a flush of the work queue, this does not wait for threads that sleep, for example for a
//! lock. `synchronize_rcu_tasks()` waits for all tasks, and takes 0.1 s and more:
//! [`wait_for_workers`] waits only for work queue threads that are runnable.
//!
//! C header: [`include/linux/sched.h`](srctree/include/linux/sched.h)

use super::prelude::*;
use core::ptr;
use kernel::{
    sync::rcu,
    task::Task,
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// A thread that has used the CPU for `LONG` nanoseconds, accounted in `PARTS` parts, is taken to
/// have left its section. A single part can contain the time in which the machine was stopped.
const LONG: u64 = 50_000_000;
const PARTS: u32 = 20;

/// Waits until each runnable work queue thread, other than the caller, has left the section of code
/// that it is in. Returns at once if there is none. Sleeps.
///
/// This is for sections that do not sleep and that take some microseconds of CPU time. A thread has
/// left such a section when it has slept or exited, or has used the CPU for much longer. (A thread
/// need not sleep between two works.) This does not wait for sections that begin later.
///
/// This sees a thread as runnable that took a lock in its section before the caller took that lock.
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

/// Returns whether a work queue thread, other than the caller, is runnable.
pub(crate) fn has_runnable_worker() -> bool {
    next_runnable_worker(None).is_some()
}

/// Waits until interrupts and tasks have left the code that they are in, if it does not sleep.
/// Sleeps, with `CONFIG_TASKS_RCU` for 0.1 s and more. Without that, only work queue threads are
/// waited for if they were preempted in such code.
pub(crate) fn wait_for_tasks() {
    rcu::synchronize_rcu();
    // SAFETY: This can be called from any context that may sleep.
    #[cfg(CONFIG_TASKS_RCU)]
    unsafe {
        bindings::synchronize_rcu_tasks()
    };
    wait_for_workers();
}

/// Returns the next runnable work queue thread, other than the caller, after `last` in the list of
/// processes (a kernel thread is one). If `last` has exited, the search starts from the beginning.
fn next_runnable_worker(last: Option<ARef<Task>>) -> Option<ARef<Task>> {
    let first = &raw mut bindings::init_task;
    let current = Task::current_raw();
    let _rcu = rcu::read_lock();

    let mut task = first;
    if let Some(last) = &last {
        // SAFETY: The task is valid, by the reference. `__unhash_process()` clears the pointer and
        // then unlinks the task: if it is set, the task was in the list under the RCU read lock.
        if !unsafe { (&raw const (*last.as_ptr()).thread_pid).read_volatile() }.is_null() {
            task = last.as_ptr();
        }
    }
    loop {
        // SAFETY: `task` is `init_task`, or was in the list at some time since the RCU read lock
        // was taken. So the task that its link points at is not freed before the lock is released.
        task = unsafe {
            let next = (&raw const (*task).tasks.next).read_volatile();
            kernel::container_of!(next, bindings::task_struct, tasks)
        };
        if ptr::eq(task, first) {
            return None;
        }
        // SAFETY: The task is valid, as said above. The load is volatile: the task changes its
        // flags, but keeps `PF_WQ_WORKER` as long as it executes work.
        let flags = unsafe { (&raw const (*task).flags).read_volatile() };
        if flags & bindings::PF_WQ_WORKER == 0 || ptr::eq(task, current) {
            continue;
        }
        // SAFETY: The task is valid, and `Task` is a transparent wrapper. The list's reference to
        // it is put an RCU grace period after the task was unlinked.
        let task = unsafe { &*task.cast_const().cast::<Task>() };
        if is_runnable(task) {
            return Some(task.into());
        }
    }
}

/// Whether a task whose number of sleeps has changed has left its section. With `PREEMPT_RT`, a
/// wait for a `spinlock_t` counts as a sleep.
const COUNTS_SLEEPS: bool = !cfg!(CONFIG_PREEMPT_RT);

/// `TASK_WAKING` of `include/linux/sched.h`, which the bindings leave out.
const TASK_WAKING: u32 = 0x200;

/// Returns whether a task is in `TASK_RUNNING` on a run queue, or (`PREEMPT_RT`) in a lock wait.
fn is_runnable(task: &Task) -> bool {
    let task = task.as_ptr();
    // SAFETY: The task is valid. The loads are volatile: the scheduler writes at any time.
    let (state, on_rq) = unsafe {
        (
            (&raw const (*task).__state).read_volatile(),
            (&raw const (*task).on_rq).read_volatile(),
        )
    };
    match state {
        bindings::TASK_RUNNING => on_rq != 0,
        // The task waits for a `spinlock_t`, or is being woken from that wait.
        bindings::TASK_RTLOCK_WAIT | TASK_WAKING => cfg!(CONFIG_PREEMPT_RT),
        _ => false,
    }
}

/// A task's number of sleeps (voluntary context switches), and its CPU time in nanoseconds.
struct Usage {
    sleeps: kernel::ffi::c_ulong,
    time: u64,
}

fn usage(task: &Task) -> Usage {
    let task = task.as_ptr();
    // SAFETY: The task is valid. The loads are volatile: the scheduler writes at any time.
    unsafe {
        Usage {
            sleeps: (&raw const (*task).nvcsw).read_volatile(),
            time: (&raw const (*task).se.sum_exec_runtime).read_volatile(),
        }
    }
}
