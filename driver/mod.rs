// SPDX-License-Identifier: GPL-2.0

//! The rooms that `vmgenid` and `vmgenctr` are made of. What tells the two apart is who reseeds the
//! kernel, which the kernel's own configuration says.

pub(crate) mod binding;
pub(crate) mod counter;
pub(crate) mod device;
#[cfg(CONFIG_VMGENID = "m")]
pub(crate) mod early;
pub(crate) mod firmware;
pub(crate) mod generation_id;
pub(crate) mod kernel {
    pub(crate) mod acpi;
    #[cfg(CONFIG_VMGENID = "m")]
    pub(crate) mod cpuhotplug;
    #[cfg(CONFIG_VMGENID = "m")]
    pub(crate) mod irq;
    #[cfg(CONFIG_VMGENID = "m")]
    pub(crate) mod kthread;
    pub(crate) mod memremap;
    pub(crate) mod miscdevice;
    pub(crate) mod mm;
    pub(crate) mod page;
    #[cfg(CONFIG_VMGENID = "y")]
    pub(crate) mod platform;
    pub(crate) mod random;
    pub(crate) mod rwonce;
    pub(crate) mod static_mutex;
    #[cfg(CONFIG_VMGENID = "y")]
    pub(crate) mod vmfork;
    #[cfg(CONFIG_VMGENID = "y")]
    pub(crate) mod workqueue;
}
pub(crate) mod known;
pub(crate) mod node;
#[cfg_attr(CONFIG_VMGENID = "y", path = "awaited_reseed.rs")]
pub(crate) mod reseed;
pub(crate) mod sysgenid;
