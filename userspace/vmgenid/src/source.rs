// SPDX-License-Identifier: MIT OR Apache-2.0

//! The devices that a generation can come from.

use std::fmt;

/// The device that reports restores, with its promises.
///
/// | | [`Vmgenid`](Self::Vmgenid) | [`Vmclock`](Self::Vmclock) | [`Sysgenid`](Self::Sysgenid) |
/// |---|---|---|---|
/// | changes | before the first instruction after the restore | likewise | milliseconds later, after the kernel's reseed |
/// | [`barrier`](crate::Counter::barrier) waits for the kernel's reseed | yes | **no** | **no** |
/// | two clones can draw the same | never | from the kernel, in the first milliseconds | from any generator, in the first milliseconds |
/// | [`wait`](crate::Counter::wait) | yes | if the hypervisor notifies | yes |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// `/dev/vmgenid`, of the driver that this crate belongs to: the generation counter of the
    /// hypervisor, and a barrier. The page is that of the generation ID's device, or VMClock's; the
    /// crate finds out which.
    Vmgenid,

    /// `/dev/vmclock0`, of Linux's `ptp_vmclock`, where the hypervisor says that its page has a VM
    /// generation counter (`VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT` of `linux/vmclock-abi.h`).
    ///
    /// It changes as early as `/dev/vmgenid`, but there is no barrier: the kernel reseeds when it
    /// handles another device's notification, some milliseconds after the restore, if there is such a
    /// device. A process that sees the change, and draws from the kernel before that, draws the same as
    /// in other clones. So a [`Guard`](crate::Guard) keeps nothing that was made in the first
    /// [second](crate::Guard::SETTLES) after a change.
    Vmclock,

    /// `/dev/sysgenid`, of Amazon Linux, or of the driver that this crate belongs to.
    ///
    /// It changes after the kernel's reseed: a process that sees the change can draw at once. Until
    /// it changes, for some milliseconds after the restore, clones continue with the data that they
    /// have cached, and this crate cannot detect that. With Amazon's own driver, only root can open it.
    Sysgenid,
}

impl Source {
    /// All sources, the best one first. [`Counter::open`](crate::Counter::open) tries them in this
    /// order.
    pub const ALL: &'static [Self] = &[Self::Vmgenid, Self::Vmclock, Self::Sysgenid];

    /// The default path of its device node.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Vmgenid => "/dev/vmgenid",
            Self::Vmclock => "/dev/vmclock0",
            Self::Sysgenid => "/dev/sysgenid",
        }
    }

    /// Whether [`Counter::barrier`](crate::Counter::barrier) returns after the kernel's reseed,
    /// so that later draws from the kernel differ from those of all other clones.
    ///
    /// [`Source::Sysgenid`] has no barrier. This project's driver starts a reseed that is due when it is
    /// polled, but does not always complete it before `poll` returns.
    #[must_use]
    pub const fn has_barrier(self) -> bool {
        match self {
            Self::Vmgenid => true,
            Self::Vmclock | Self::Sysgenid => false,
        }
    }

    /// Whether the generation changes before the first instruction after a restore.
    #[must_use]
    pub const fn is_immediate(self) -> bool {
        match self {
            Self::Vmgenid | Self::Vmclock => true,
            Self::Sysgenid => false,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.path().trim_start_matches("/dev/"))
    }
}
