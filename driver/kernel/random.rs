// SPDX-License-Identifier: GPL-2.0

//! Input to the kernel's random number generator.
//!
//! C header: [`include/linux/random.h`](srctree/include/linux/random.h)

use kernel::bindings;

/// Mixes in what tells this device from others, without crediting entropy for it.
pub(crate) fn add_device_randomness(bytes: &[u8]) {
    // SAFETY: The pointer is valid for reading `len` bytes.
    unsafe { bindings::add_device_randomness(bytes.as_ptr().cast(), bytes.len()) };
}

/// Mixes in the unique ID of a virtual machine that was just forked or cloned, reseeds at once,
/// and calls the chain of vmfork notifiers.
///
/// When this returns, no output depends only on what the other clones know as well. If the
/// generator is not initialized yet, that holds for its first output.
///
/// The notifiers may sleep, and may take `rtnl_lock`: to be called where that is allowed.
///
/// Modules can call it only where `drivers/virt/vmgenid.c` is a module, too.
#[cfg(CONFIG_VMGENID = "m")]
pub(crate) fn add_vmfork_randomness(unique_vm_id: &[u8]) {
    // SAFETY: The pointer is valid for reading `len` bytes.
    unsafe { bindings::add_vmfork_randomness(unique_vm_id.as_ptr().cast(), unique_vm_id.len()) };
}
