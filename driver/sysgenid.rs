// SPDX-License-Identifier: GPL-2.0

//! The number of the kernel's reseeds, which the files of `/dev/sysgenid` return.
//!
//! The page that processes map is the kernel's own, and changes only after the kernel's random number
//! generator was reseeded. A process that sees the change can draw at once. Until then, some
//! milliseconds after the restore, a clone goes on with what it has cached.

use super::{
    counter::LastRead,
    kernel::page::SharedPage, //
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

/// How many times the kernel was reseeded because of a generation ID, plus the number of unbinds. It
/// wraps.
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
    /// The count starts at 0.
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
        // Not between the count and the page: what the process sees there comes later.
        let _changing = self.changing.lock();
        LastRead::new(self.get())
    }

    /// Returns the count if `acknowledged` is another one, or waits until it is. Checks before each
    /// look whether the device is bound.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: This would have to wait, and the caller may not.
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

    /// Notes that the process which has a file knows `count`.
    ///
    /// # Errors
    ///
    /// `EINVAL`: This is not, or no longer, the count. And those of `check_bound`.
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

    /// Returns where to wait for a change.
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
