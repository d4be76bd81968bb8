// SPDX-License-Identifier: GPL-2.0

//! Loads, and their order.

use kernel::sync::{
    atomic::{
        Atomic,
        Relaxed, //
    },
    barrier, //
};

/// An atomic that the driver loads.
pub(crate) trait Load {
    type Value;
    fn load_relaxed(&self) -> Self::Value;
}

macro_rules! impl_load {
    ($($type:ty)*) => {$(
        impl Load for Atomic<$type> {
            type Value = $type;

            #[inline(always)]
            fn load_relaxed(&self) -> $type {
                self.load(Relaxed)
            }
        }
    )*};
}
impl_load!(bool u32 u64);

/// Loads the value: `READ_ONCE()`.
#[inline(always)]
pub(crate) fn read_once<T: Load>(atomic: &T) -> T::Value {
    atomic.load_relaxed()
}

/// Orders the loads before it before the loads after it: `smp_rmb()`.
#[inline(always)]
pub(crate) fn read_barrier() {
    barrier::smp_mb(barrier::Read);
}
