// SPDX-License-Identifier: GPL-2.0

//! The number of the kernel's reseeds, which the files of `/dev/sysgenid` return.
//!
//! The page that processes map belongs to the kernel. It changes after the kernel's random number
//! generator was reseeded (and at an unbind), so a process that sees the change can draw at once.
//! Until then, for some milliseconds, a clone continues with the data that it has cached.

use super::{
    counter::LastRead,
    kernel::mm::SharedPage,
    prelude::*, //
};
use kernel::{
    new_poll_condvar,
    sync::{
        new_mutex,
        Mutex, //
    }, //
};

/// The number of generation IDs with which the kernel was reseeded, plus that of unbinds. It wraps.
#[pin_data]
pub(crate) struct Reseeds {
    /// The value in the page.
    #[pin]
    count: Mutex<u32>,
    pub(crate) page: SharedPage,

    /// Readers and pollers wait here.
    #[pin]
    pub(crate) changed: PollCondVar,
}

impl Reseeds {
    /// Allocates the page. The count starts at 0.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let page = SharedPage::new()?;
        Arc::pin_init(
            pin_init!(Self {
                count <- new_mutex!(0, "Reseeds::count"),
                page,
                changed <- new_poll_condvar!("Reseeds::changed"),
            }),
            GFP_KERNEL,
        )
    }

    /// Returns the state of a file that is being opened: the count is acknowledged.
    pub(crate) fn open(&self) -> LastRead {
        // Not while `increment` is between the count and the page: the process may load the page
        // next, and must not find an older count there.
        LastRead::new(*self.count.lock())
    }

    /// Waits until the count differs from `acknowledged`, and returns it. Calls `check_bound`
    /// before each comparison.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: The count is acknowledged, and `may_wait` is `false`.
    /// - `ERESTARTSYS`: A signal came.
    ///
    /// And those of `check_bound`.
    pub(crate) fn next(
        &self,
        acknowledged: &LastRead,
        may_wait: bool,
        check_bound: impl Fn() -> Result,
    ) -> Result<u32> {
        let mut count = self.count.lock();
        loop {
            check_bound()?;
            if acknowledged.is_new(*count) {
                return Ok(*count);
            }
            if !may_wait {
                return Err(EAGAIN);
            }
            if self.changed.wait_interruptible(&mut count) {
                return Err(ERESTARTSYS);
            }
        }
    }

    /// Stores that the user of a file has acknowledged `count`.
    ///
    /// # Errors
    ///
    /// `EINVAL`: `count` is not the current count. And those of `check_bound`.
    pub(crate) fn acknowledge(
        &self,
        acknowledged: &LastRead,
        count: u32,
        check_bound: impl Fn() -> Result,
    ) -> Result {
        let current = self.count.lock();
        check_bound()?;
        if count != *current {
            return Err(EINVAL);
        }
        acknowledged.returned(count);
        Ok(())
    }

    /// Counts a reseed that is complete.
    pub(crate) fn increment(&self) {
        let mut count = self.count.lock();
        *count = count.wrapping_add(1);
        self.page.store(*count);
        drop(count);
        self.changed.notify_all();
    }
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_reseeds)]
mod tests {
    use super::*;

    #[test]
    fn each_reseed_counts() -> Result {
        let reseeds = Reseeds::new()?;
        assert_eq!(*reseeds.count.lock(), 0);
        reseeds.increment();
        reseeds.increment();
        assert_eq!(*reseeds.count.lock(), 2);
        // It wraps.
        *reseeds.count.lock() = u32::MAX;
        reseeds.increment();
        assert_eq!(*reseeds.count.lock(), 0);
        Ok(())
    }
}
