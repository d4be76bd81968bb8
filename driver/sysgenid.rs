// SPDX-License-Identifier: GPL-2.0

//! The number of the kernel's reseeds, which the files of `/dev/sysgenid` return.
//!
//! The page that processes map belongs to the kernel. It changes after the kernel's random number
//! generator was reseeded (and at an unbind), so a process that sees the change can draw at once.
//! Until then, for some milliseconds, a clone continues with the data that it has cached.

use super::{
    counter::LastRead,
    kernel::mm::SharedPage, //
};
use kernel::{
    new_poll_condvar,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        new_mutex,
        poll::PollCondVar,
        Arc,
        Mutex, //
    }, //
};

/// The number of generation IDs with which the kernel was reseeded, plus that of unbinds. It wraps.
#[pin_data]
pub(crate) struct Reseeds {
    /// The value in the page. Written under `changing`.
    count: Atomic<u32>,
    page: SharedPage,
    #[pin]
    changing: Mutex<()>,
    #[pin]
    changed: PollCondVar,
}

impl Reseeds {
    /// Allocates the page. The count starts at 0.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: There is no memory.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let page = SharedPage::new()?;
        Arc::pin_init(
            pin_init!(Self {
                count: Atomic::new(0),
                page,
                changing <- new_mutex!((), "Reseeds::changing"),
                changed <- new_poll_condvar!("Reseeds::changed"),
            }),
            GFP_KERNEL,
        )
    }

    /// Returns the count.
    fn get(&self) -> u32 {
        self.count.load(Relaxed)
    }

    /// Returns the page that begins with the count.
    pub(crate) fn page(&self) -> &SharedPage {
        &self.page
    }

    /// Returns the state of a file that is being opened: the count is acknowledged.
    pub(crate) fn open(&self) -> LastRead {
        // Not while `count()` is between the count and the page: the process may load the page
        // next, and must not find an older count there.
        let _changing = self.changing.lock();
        LastRead::new(self.get())
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
        let mut changing = self.changing.lock();
        loop {
            check_bound()?;
            let count = self.get();
            if acknowledged.is_new(count) {
                return Ok(count);
            }
            if !may_wait {
                return Err(EAGAIN);
            }
            if self.changed.wait_interruptible(&mut changing) {
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
        let _changing = self.changing.lock();
        check_bound()?;
        if count != self.get() {
            return Err(EINVAL);
        }
        acknowledged.returned(count);
        Ok(())
    }

    /// Returns the wait queue of readers and pollers.
    pub(crate) fn changed(&self) -> &PollCondVar {
        &self.changed
    }

    /// Counts a reseed that is complete.
    pub(crate) fn count(&self) {
        let changing = self.changing.lock();
        let count = self.get().wrapping_add(1);
        self.count.store(count, Relaxed);
        self.page.store(count);
        drop(changing);
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
        assert_eq!(reseeds.get(), 0);
        reseeds.count();
        reseeds.count();
        assert_eq!(reseeds.get(), 2);
        // It wraps.
        reseeds.count.store(u32::MAX, Relaxed);
        reseeds.count();
        assert_eq!(reseeds.get(), 0);
        Ok(())
    }
}
