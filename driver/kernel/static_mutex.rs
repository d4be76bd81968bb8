// SPDX-License-Identifier: GPL-2.0

//! A mutex for statics that needs no call to initialize it.
//!
//! What [`kernel::sync::global_lock`] does with an unsafe promise ("I call `init` first, and only
//! once"), this does by itself, with one more load in `lock()`.

use core::{
    cell::UnsafeCell,
    mem::MaybeUninit,
    pin::Pin, //
};
use kernel::{
    processor::cpu_relax,
    str::CStr,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        lock::mutex::{
            Mutex,
            MutexGuard, //
        },
        LockClassKey, //
    }, //
};

const EMPTY: u32 = 0;
const BUSY: u32 = 1;
const READY: u32 = 2;

/// A [`Mutex`] that lives in a static and is initialized by the first who locks it.
///
/// A static is never dropped: what its value owns when the module is unloaded is leaked. Who comes
/// second while the first initializes the mutex spins: lock it once before there is anybody else,
/// as in `module_init()`.
///
/// # Examples
///
/// ```ignore
/// static NAMES: StaticMutex<KVec<u32>> =
///     StaticMutex::new(c"NAMES", || static_lock_class!(), KVec::new);
///
/// NAMES.lock().push(42, GFP_KERNEL)?;
/// ```
///
/// # Invariants
///
/// - `state` only goes from `EMPTY` to `BUSY` to `READY`.
/// - Whoever took it from `EMPTY` to `BUSY` has exclusive access to `mutex`, until `READY`.
/// - When it is `READY`, `mutex` is initialized.
pub(crate) struct StaticMutex<T: 'static> {
    state: Atomic<u32>,
    mutex: UnsafeCell<MaybeUninit<Mutex<T>>>,
    name: &'static CStr,
    class: fn() -> Pin<&'static LockClassKey>,
    value: fn() -> T,
}

impl<T: Send> StaticMutex<T> {
    /// Creates the mutex; `value` makes what it protects.
    pub(crate) const fn new(
        name: &'static CStr,
        class: fn() -> Pin<&'static LockClassKey>,
        value: fn() -> T,
    ) -> Self {
        // INVARIANT: It is `EMPTY`.
        Self {
            state: Atomic::new(EMPTY),
            mutex: UnsafeCell::new(MaybeUninit::uninit()),
            name,
            class,
            value,
        }
    }

    /// Locks the mutex. May sleep.
    pub(crate) fn lock(&'static self) -> MutexGuard<'static, T> {
        while self.state.load(Acquire) != READY {
            // INVARIANT: Only one caller succeeds.
            if self.state.cmpxchg(EMPTY, BUSY, Relaxed).is_ok() {
                let init = Mutex::new((self.value)(), self.name, (self.class)());
                // SAFETY: By the type invariants the access is exclusive. A static does not move,
                // and the mutex is never dropped.
                unsafe { pin_init::raw_init((*self.mutex.get()).as_mut_ptr(), init) };
                // INVARIANT: It is initialized.
                self.state.store(READY, Release);
            }
            cpu_relax();
        }

        // SAFETY: By the type invariants the mutex is initialized; nobody has exclusive access to
        // it any more.
        unsafe { (*self.mutex.get()).assume_init_ref() }.lock()
    }
}

// SAFETY: All access to the value is through the mutex; `state` orders access to the mutex itself.
unsafe impl<T: Send> Sync for StaticMutex<T> {}
