// SPDX-License-Identifier: GPL-2.0

//! The kernel's random number generator: input, and forced reseeds.
//!
//! C header: [`include/linux/random.h`](srctree/include/linux/random.h)

use super::prelude::*;
use kernel::fs::{
    file::flags,
    File, //
};

/// `RNDRESEEDCRNG` of `include/uapi/linux/random.h`, which the bindings leave out.
const RNDRESEEDCRNG: c_uint = 0x5207;

/// The device number of `/dev/random`: `MKDEV(MEM_MAJOR, 8)` (`drivers/char/mem.c`).
const DEV_RANDOM: bindings::dev_t = 1 << 20 | 8;

/// Mixes `bytes` into the pool, without crediting entropy for them.
pub(crate) fn add_device_randomness(bytes: &[u8]) {
    // SAFETY: The pointer is valid for reading `len` bytes.
    unsafe { bindings::add_device_randomness(bytes.as_ptr().cast(), bytes.len()) };
}

/// Returns whether the generator is initialized. If so, the reseed that initialized it is complete.
pub(crate) fn is_initialized() -> bool {
    // SAFETY: The function can be called from any context.
    unsafe { bindings::rng_is_initialized() }
}

/// `add_vmfork_randomness()`: mixes in the new ID of a virtual machine that was restored or cloned,
/// reseeds the generator if it is initialized, and calls the vmfork notifiers.
///
/// The notifiers may sleep, and may take `rtnl_lock`. Callers must not hold a lock that is taken
/// under that one.
pub(crate) type Vmfork = fn(&[u8]);

/// The function. It is `None` if the kernel's own driver, `drivers/virt/vmgenid.c`, is built in:
/// then it is not exported to modules, and that driver calls it.
#[cfg(CONFIG_VMGENID = "m")]
pub(crate) const VMFORK: Option<Vmfork> = Some(|id| {
    // SAFETY: The pointer is valid for reading `len` bytes.
    unsafe { bindings::add_vmfork_randomness(id.as_ptr().cast(), id.len()) }
});
#[cfg(not(CONFIG_VMGENID = "m"))]
pub(crate) const VMFORK: Option<Vmfork> = None;

/// The `ioctl` operation of a file.
type Ioctl = unsafe extern "C" fn(*mut bindings::file, c_uint, c_ulong) -> isize;

/// An open file of `/dev/random`.
///
/// # Invariants
///
/// `file` is an open file of the character device 1:8, and `ioctl` is its `ioctl` operation.
pub(crate) struct DevRandom {
    file: ARef<File>,
    ioctl: Ioctl,
}

impl DevRandom {
    /// Opens `/dev/random`, as the current process sees it (root directory, mount namespace). The
    /// file system of `/dev` cannot be unmounted until the file is closed.
    ///
    /// # Errors
    ///
    /// `ENODEV`: The path names another file than the character device 1:8. And those of
    /// `filp_open()`, for example `ENOENT`.
    pub(crate) fn open() -> Result<Self> {
        let flags = flags::O_RDONLY | flags::O_NONBLOCK | flags::O_NOCTTY;
        // SAFETY: The path is a C string.
        let file = from_err_ptr(unsafe {
            bindings::filp_open(c"/dev/random".as_char_ptr(), flags as c_int, 0)
        })?;
        let file = NonNull::new(file.cast::<File>()).ok_or(ENODEV)?;
        // SAFETY: `filp_open()` returned a valid file with a reference that now belongs to `file`.
        // No system call has this file, so there is no `fdget_pos()` region.
        let file = unsafe { ARef::from_raw(file) };

        let raw = file.as_ptr();
        // SAFETY: The file is open, so its inode and operations are valid. The operations, the
        // number and the type do not change; `chmod(2)` changes other bits of `i_mode`.
        let (mode, rdev, ioctl) = unsafe {
            let inode = (*raw).f_inode;
            (
                u32::from((*inode).i_mode),
                (*inode).i_rdev,
                (*(*raw).f_op).unlocked_ioctl,
            )
        };
        if mode & bindings::S_IFMT != bindings::S_IFCHR || rdev != DEV_RANDOM {
            return Err(ENODEV);
        }
        // INVARIANT: The type and the number were checked just above.
        Ok(Self {
            file,
            ioctl: ioctl.ok_or(ENODEV)?,
        })
    }

    /// Extracts a new key for the generator from the pool, and installs it. Does nothing if the
    /// generator is not initialized. Does not sleep.
    ///
    /// A reseed that began earlier may install its older key after this call.
    ///
    /// # Errors
    ///
    /// `EPERM`: The current task has no `CAP_SYS_ADMIN`. Kernel threads have it, unless a security
    /// module denies it.
    pub(crate) fn reseed(&self) -> Result {
        // SAFETY: By the type invariants the operation belongs to the file, which is open. This
        // command takes no argument.
        let result = unsafe { (self.ioctl)(self.file.as_ptr(), RNDRESEEDCRNG, 0) };
        match to_result(result as c_int) {
            Err(ENODATA) => Ok(()),
            result => result,
        }
    }
}
