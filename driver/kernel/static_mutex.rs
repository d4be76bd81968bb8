// SPDX-License-Identifier: GPL-2.0

//! [`kernel::sync::global_lock`] without an `init` call: the first `lock` initializes the mutex.

use super::prelude::*;
use kernel::{
    processor::cpu_relax,
    sync::{
        GlobalGuard,
        GlobalLock,
        GlobalLockBackend,
        SetOnce, //
    }, //
};

/// A mutex in a static. The first caller of [`StaticMutex::lock`] initializes it.
///
/// # Invariants
///
/// Only the caller that has changed `begun` to `true` initializes `mutex`, and then populates
/// `ready`. `mutex` is used only when `ready` is populated.
pub(crate) struct StaticMutex<B: GlobalLockBackend + 'static> {
    mutex: GlobalLock<B>,
    begun: Atomic<bool>,
    ready: SetOnce<()>,
}

impl<B: GlobalLockBackend> StaticMutex<B> {
    /// # Safety
    ///
    /// The type `B` must not be used with any other lock.
    pub(crate) const unsafe fn new(value: B::Item) -> Self {
        // INVARIANT: The mutex is neither initialized nor used.
        Self {
            // SAFETY: `lock` calls `init` before it locks. The caller uses `B` with no other lock.
            mutex: unsafe { GlobalLock::new(value) },
            begun: Atomic::new(false),
            ready: SetOnce::new(),
        }
    }

    /// Locks the mutex. Sleeps.
    pub(crate) fn lock(&'static self) -> GlobalGuard<B> {
        while self.ready.as_ref().is_none() {
            if self.begun.cmpxchg(false, true, Relaxed).is_ok() {
                // SAFETY: By the type invariants this is the only call.
                unsafe { self.mutex.init() };
                // INVARIANT: The mutex is initialized.
                self.ready.populate(());
            }
            cpu_relax();
        }
        self.mutex.lock()
    }
}

/// Defines a [`StaticMutex`]. Its value is not dropped when the module is unloaded.
macro_rules! static_mutex {
    ($vis:vis static $name:ident: Mutex<$type:ty> = $value:expr;) => {
        #[allow(non_camel_case_types, clippy::upper_case_acronyms)]
        $vis enum $name {}

        impl kernel::sync::GlobalLockBackend for $name {
            const NAME: &'static CStr = kernel::c_str!(::core::stringify!($name));
            type Item = $type;
            type Backend = kernel::sync::lock::mutex::MutexBackend;

            fn get_lock_class() -> Pin<&'static kernel::sync::LockClassKey> {
                kernel::static_lock_class!()
            }
        }

        $vis static $name: $crate::driver::kernel::static_mutex::StaticMutex<$name> = {
            let value: $type = $value;
            // SAFETY: This is the only lock with this backend type.
            unsafe { $crate::driver::kernel::static_mutex::StaticMutex::new(value) }
        };
    };
}
pub(crate) use static_mutex;
