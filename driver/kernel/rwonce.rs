// SPDX-License-Identifier: GPL-2.0

//! Relaxed loads and read barriers without a call.
//!
//! Unless the kernel was built with `CONFIG_RUST_INLINE_HELPERS`, each access to an [`Atomic`] is
//! a call of a C function. On a path of a few instructions these calls cost more than all that
//! surrounds them.
//!
//! C headers: [`include/asm-generic/rwonce.h`](srctree/include/asm-generic/rwonce.h),
//! [`arch/x86/include/asm/barrier.h`](srctree/arch/x86/include/asm/barrier.h)

use kernel::sync::atomic::{
    Atomic,
    AtomicType, //
};

/// An extension of [`Atomic`].
pub(crate) trait ReadOnce<T> {
    /// Loads the value in place: `READ_ONCE()`. The same as `load(Relaxed)`.
    fn read_once(&self) -> T;
}

impl<T: AtomicType> ReadOnce<T> for Atomic<T> {
    #[inline(always)]
    fn read_once(&self) -> T {
        const { assert!(size_of::<T>() <= size_of::<usize>()) };

        // SAFETY: `as_ptr()` gives a valid and aligned pointer. As for C's `READ_ONCE()`, the
        // volatile load of a word is one access, and its race with other atomic accesses is
        // well-defined in the kernel's memory model.
        unsafe { self.as_ptr().read_volatile() }
    }
}

/// Orders the loads before it before the loads after it: `smp_rmb()`.
#[inline(always)]
pub(crate) fn read_barrier() {
    // There, the processor does that by itself: `__smp_rmb()` is `barrier()`.
    #[cfg(CONFIG_X86)]
    // SAFETY: No instruction.
    unsafe {
        core::arch::asm!("", options(nostack, preserves_flags))
    };

    #[cfg(not(CONFIG_X86))]
    kernel::sync::barrier::smp_mb(kernel::sync::barrier::Read);
}
