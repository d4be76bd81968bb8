// SPDX-License-Identifier: GPL-2.0

//! `/dev/sysgenid`: a counter of the kernel's reseeds, for who knows the interface of Amazon Linux's
//! SysGenID driver.
//!
//! The page that processes map is the kernel's own, and changes only after the kernel's random number
//! generator has been reseeded. So who sees the change can draw at once. Until it changes, some
//! milliseconds after the restore, a clone goes on with what it has.

use super::{
    binding::Unbind,
    generation_id::{
        GenerationId,
        Patience, //
    },
    kernel::{
        miscdevice::{
            FileOperations,
            KiocbExt,
            Ready,
            Waiter, //
        },
        mm::VmaNewExt,
        page::SharedPage, //
    }, //
};
use kernel::{
    fs::Kiocb,
    iov::IovIterDest,
    mm::virt::VmaNew,
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
    },
    uaccess::{
        UserSliceReader,
        UserSliceWriter, //
    }, //
};

/// How many times the kernel was reseeded because of a generation ID, or nobody would see that any
/// more. It wraps.
#[pin_data]
pub(crate) struct Reseeds {
    /// What is in the page. Written under `changing`.
    count: Atomic<u32>,
    page: SharedPage,
    #[pin]
    changing: Mutex<()>,
    #[pin]
    changed: PollCondVar,
}

impl Reseeds {
    /// None so far.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: there is no memory.
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

    fn get(&self) -> u32 {
        self.count.load(Relaxed)
    }

    /// Counts one more. To be called when it has been done.
    pub(crate) fn count(&self) {
        let changing = self.changing.lock();
        let count = self.get().wrapping_add(1);
        self.count.store(count, Relaxed);
        self.page.store(count);
        drop(changing);
        self.changed.notify_all();
    }
}

/// The reseeds of a bound device; it outlives an unbind until the last file is closed.
pub(crate) struct Sysgenid {
    id: Arc<GenerationId>,
    reseeds: Arc<Reseeds>,
    bound: Atomic<bool>,
}

impl Sysgenid {
    /// # Errors
    ///
    /// `ENOMEM`: there is no memory.
    pub(crate) fn new(id: Arc<GenerationId>, reseeds: Arc<Reseeds>) -> Result<Arc<Self>> {
        let sysgenid = Self {
            id,
            reseeds,
            bound: Atomic::new(true),
        };
        Ok(Arc::new(sysgenid, GFP_KERNEL)?)
    }

    /// `ENODEV`: the device was unbound.
    fn check_bound(&self) -> Result {
        if self.bound.load(Relaxed) {
            Ok(())
        } else {
            Err(ENODEV)
        }
    }
}

impl Unbind for Sysgenid {
    fn unbind(&self) {
        self.bound.store(false, Relaxed);
        // The page changes no more: who looks at that alone is told once, to come and ask; as ever
        // after the kernel was reseeded, if that is due. Who has looked, and does not sleep yet,
        // holds the lock that this takes.
        let _ = self.id.hasten(Patience::Brief);
        self.reseeds.count();
    }
}

/// An open file: what was acknowledged last, at first the count at `open`.
pub(crate) struct OpenFile {
    sysgenid: Arc<Sysgenid>,
    acknowledged: Atomic<u32>,
}

impl OpenFile {
    /// Returns the count if it was not acknowledged; waits for that if it may.
    ///
    /// # Errors
    ///
    /// - `ENODEV`: the device was unbound.
    /// - `EAGAIN`: it would have to wait.
    /// - `ERESTARTSYS`: a signal came.
    fn next(&self, patience: Patience) -> Result<u32> {
        let Sysgenid { id, reseeds, .. } = &*self.sysgenid;
        self.sysgenid.check_bound()?;
        // What the notification is about to do.
        id.hasten(patience)?;

        let mut changing = reseeds.changing.lock();
        loop {
            self.sysgenid.check_bound()?;
            let count = reseeds.get();
            if count != self.acknowledged.load(Relaxed) {
                return Ok(count);
            }
            if patience != Patience::Full {
                return Err(EAGAIN);
            }
            if reseeds.changed.wait_interruptible(&mut changing) {
                return Err(ERESTARTSYS);
            }
        }
    }

    /// Takes note that the owner of this file knows `count`.
    ///
    /// # Errors
    ///
    /// - `ENODEV`: the device was unbound.
    /// - `EINVAL`: that is not, or no longer, the count.
    fn acknowledge(&self, count: u32) -> Result {
        let reseeds = &self.sysgenid.reseeds;
        let _changing = reseeds.changing.lock();
        self.sysgenid.check_bound()?;
        if count != reseeds.get() {
            return Err(EINVAL);
        }
        self.acknowledged.store(count, Relaxed);
        Ok(())
    }
}

/// The size of the count, in bytes.
const SIZE: usize = size_of::<u32>();

/// Checks a read of `len` bytes. `false`: there is nothing to do.
fn check_read(len: usize) -> Result<bool> {
    match len {
        0 => Ok(false),
        1..SIZE => Err(EINVAL),
        _ => Ok(true),
    }
}

/// What the node's files do. See `Documentation/vmgenid.rst` for what each call promises.
pub(crate) struct Operations;

impl FileOperations for Operations {
    type Data = Arc<Sysgenid>;
    type Ptr = KBox<OpenFile>;

    const MODE: u16 = 0o444;
    const WRITE: bool = true;

    fn open(sysgenid: &Arc<Sysgenid>) -> Result<KBox<OpenFile>> {
        // Not between the count and the page: what the opener sees there comes after this.
        let _changing = sysgenid.reseeds.changing.lock();
        let file = OpenFile {
            sysgenid: sysgenid.clone(),
            acknowledged: Atomic::new(sysgenid.reseeds.get()),
        };
        Ok(KBox::new(file, GFP_KERNEL)?)
    }

    fn read(file: &OpenFile, nonblock: bool, mut buf: UserSliceWriter, _pos: i64) -> Result<usize> {
        if !check_read(buf.len())? {
            return Ok(0);
        }
        let patience = if nonblock {
            Patience::Brief
        } else {
            Patience::Full
        };
        buf.write(&file.next(patience)?)?;
        Ok(SIZE)
    }

    fn read_iter(kiocb: Kiocb<'_, KBox<OpenFile>>, iov: &mut IovIterDest<'_>) -> Result<usize> {
        if !check_read(iov.len())? {
            return Ok(0);
        }
        let patience = if kiocb.nowait() {
            Patience::None
        } else if kiocb.nonblock() {
            Patience::Brief
        } else {
            Patience::Full
        };
        let count = kiocb.file().next(patience)?;
        if iov.copy_to_iter(&count.to_ne_bytes()) != SIZE {
            return Err(EFAULT);
        }
        Ok(SIZE)
    }

    fn write(file: &OpenFile, mut buf: UserSliceReader) -> Result<usize> {
        if buf.len() != SIZE {
            // As SysGenID says it.
            return Err(ENOBUFS);
        }
        file.acknowledge(buf.read()?)?;
        Ok(SIZE)
    }

    fn poll(file: &OpenFile, waiter: &Waiter<'_>) -> Ready {
        waiter.wait_for(&file.sysgenid.reseeds.changed);
        match file.next(Patience::Brief) {
            Ok(_) => Ready::READ,
            Err(EAGAIN) => Ready::NOT,
            Err(_) => Ready::GONE,
        }
    }

    fn mmap(file: &OpenFile, vma: &VmaNew) -> Result {
        file.sysgenid.check_bound()?;
        vma.map_shared_readonly(&file.sysgenid.reseeds.page)
    }
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_sysgenid)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_read_whole() {
        assert_eq!(check_read(0), Ok(false));
        for len in [1, 2, 3] {
            assert_eq!(check_read(len), Err(EINVAL));
        }
        for len in [4, 5, 4096] {
            assert_eq!(check_read(len), Ok(true));
        }
    }

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
