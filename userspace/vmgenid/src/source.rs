// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where a generation is to be had from.

use std::fmt;

/// Who says that the machine was restored, and what his word is worth.
///
/// | | [`Vmgenid`](Self::Vmgenid) | [`Vmclock`](Self::Vmclock) | [`Sysgenid`](Self::Sysgenid) |
/// |---|---|---|---|
/// | changes | before the first instruction after the restore | likewise | milliseconds later, after the kernel's reseed |
/// | [`barrier`](crate::Counter::barrier) waits for the kernel's reseed | yes | **no** | with this project's driver |
/// | so what can be in two clones is | nothing | what is drawn from the kernel in the first milliseconds | what is drawn from anywhere in the first milliseconds |
/// | [`wait`](crate::Counter::wait) | yes | if the hypervisor notifies | yes |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// `/dev/vmgenid`, of the driver that this crate belongs to: the generation counter of the
    /// hypervisor, and a barrier. The only one with nothing missing.
    Vmgenid,

    /// `/dev/vmclock0`, of Linux's `ptp_vmclock`, where the hypervisor says that its page has a VM
    /// generation counter (`VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT` of `linux/vmclock-abi.h`).
    ///
    /// It changes as early as `/dev/vmgenid`, but there is no barrier: the kernel reseeds itself
    /// when it handles another device's notification, some milliseconds after the restore, if there is
    /// one. Who sees the change and draws from the kernel before that draws what the other clones
    /// draw. So nothing is kept by a [`Guard`](crate::Guard) that was made in the first
    /// [second](crate::Guard::SETTLES) after a change.
    Vmclock,

    /// `/dev/sysgenid`, of Amazon Linux, or of the driver that this crate belongs to.
    ///
    /// It changes after the kernel's reseed, so that whoever sees the change can draw at once. Until
    /// it changes, for some milliseconds after the restore, clones go on with what they have, and
    /// nothing here can tell. With Amazon's own driver, only root can open it.
    Sysgenid,
}

impl Source {
    /// All, the best one first: the order in which [`Counter::open`](crate::Counter::open) tries
    /// them.
    pub const ALL: [Self; 3] = [Self::Vmgenid, Self::Vmclock, Self::Sysgenid];

    /// Where its device node is by default.
    pub const fn path(self) -> &'static str {
        match self {
            Self::Vmgenid => "/dev/vmgenid",
            Self::Vmclock => "/dev/vmclock0",
            Self::Sysgenid => "/dev/sysgenid",
        }
    }

    /// Whether [`Counter::barrier`](crate::Counter::barrier) returns after the kernel's reseed,
    /// so that the kernel's random numbers are this clone's own from then on.
    ///
    /// [`Source::Sysgenid`] has one with this project's driver, which reseeds the kernel in `poll` if
    /// that is due. With Amazon's it has none, so this is `false`.
    pub const fn has_barrier(self) -> bool {
        match self {
            Self::Vmgenid => true,
            Self::Vmclock | Self::Sysgenid => false,
        }
    }

    /// Whether the change is there before the first instruction after a restore.
    pub const fn is_immediate(self) -> bool {
        match self {
            Self::Vmgenid | Self::Vmclock => true,
            Self::Sysgenid => false,
        }
    }

    /// Where in its page the counter is, in bytes.
    pub(crate) const fn offset(self) -> usize {
        match self {
            // A u32, and zeros after it: as a u64 it is the same number.
            Self::Vmgenid | Self::Sysgenid => 0,
            Self::Vmclock => crate::vmclock::COUNTER,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.path().trim_start_matches("/dev/"))
    }
}
