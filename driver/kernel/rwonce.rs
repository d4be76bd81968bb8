// SPDX-License-Identifier: GPL-2.0

//! Inlined loads, for the few in each `read()` of the device.
//!
//! Without `CONFIG_RUST_INLINE_HELPERS` each `load(Relaxed)` of the kernel crate is a call of a C
//! function. Inlined loads save 40 instructions of a `read()`.

use super::prelude::*;

/// Loads the value: `READ_ONCE()`. The same as `atomic.load(Relaxed)`.
#[inline(always)]
pub(crate) fn read_once<T: AtomicType>(atomic: &Atomic<T>) -> T {
    const { assert!(size_of::<T>() <= size_of::<usize>()) };

    // SAFETY: The pointer is valid and aligned. As with C's `READ_ONCE()`, the volatile load of a
    // word is one access, and its race with other atomic accesses is well-defined in the kernel's
    // memory model.
    unsafe { atomic.as_ptr().read_volatile() }
}

/// Orders the loads before it before the loads after it: `smp_rmb()`.
#[inline(always)]
pub(crate) fn read_barrier() {
    // x86 does not reorder loads: its `__smp_rmb()` is `barrier()`.
    #[cfg(CONFIG_X86)]
    // SAFETY: There is no instruction.
    unsafe {
        core::arch::asm!("", options(nostack, preserves_flags))
    };

    #[cfg(not(CONFIG_X86))]
    kernel::sync::barrier::smp_mb(kernel::sync::barrier::Read);
}
