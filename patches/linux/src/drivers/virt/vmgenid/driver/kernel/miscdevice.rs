// SPDX-License-Identifier: GPL-2.0

//! Misc devices whose files return one number.

use super::mm::Area;
use core::marker::PhantomData;
use kernel::{
    fs::{
        File,
        Kiocb, //
    },
    iov::{
        IovIterDest,
        IovIterSource, //
    },
    miscdevice::{
        Llseek,
        MiscDevice,
        MiscDeviceOptions,
        MiscDeviceRegistration, //
    },
    mm::virt::VmaNew,
    prelude::*,
    sync::poll::{
        events,
        PollCondVar,
        PollTable, //
    }, //
};

/// A call of `read(2)`, `readv(2)`, `pread(2)` and so on.
pub(crate) struct Request {
    /// The size of the buffer, in bytes: with `readv(2)`, of all buffers.
    pub(crate) len: usize,

    /// The position.
    pub(crate) pos: i64,

    /// Whether the call must not wait.
    nowait: bool,
}

impl Request {
    /// Returns whether the call may wait. If not, it returns `EAGAIN` instead.
    pub(crate) fn may_wait(&self) -> bool {
        !self.nowait
    }
}

/// An open file of a misc device. A `read` returns a native-endian u32. The file has no position:
/// `lseek` returns 0.
pub(crate) trait FileOperations: Sized + Send + Sync + 'static {
    /// The data of the registration, for `open`.
    type Data: Send + Sync;

    /// The mode of the device node, as in `chmod(2)`.
    const MODE: u16;

    /// Called when the device is opened.
    fn open(data: &Self::Data) -> Result<KBox<Self>>;

    /// Handler for `read(2)`, `pread(2)`, `readv(2)`, io_uring and the like. With `None` the call
    /// returns 0. A value is returned only if `request.len` is at least the size of a u32.
    fn read(&self, request: Request) -> Result<Option<u32>>;

    /// Called when `value` from [`FileOperations::read`] was copied to the process.
    fn returned(&self, value: u32);

    /// Handler for `write(2)` and the like, at any position.
    fn write(&self, data: &mut IovIterSource<'_>) -> Result<usize>;

    /// Handler for `poll(2)`, `select(2)`, `epoll_wait(2)`: passes the wait queue of the file's
    /// pollers to `wait_for`, then returns whether the file is readable, so that the poller misses
    /// no change. An error stands for `POLLHUP` and `POLLERR`.
    fn poll(&self, wait_for: impl FnOnce(&PollCondVar)) -> Result<bool>;

    /// Handler for `mmap(2)`.
    fn mmap(&self, area: Area<'_>) -> Result;
}

/// The misc device for `T`.
struct Adapter<T>(PhantomData<T>);

#[vtable]
impl<T: FileOperations> MiscDevice for Adapter<T> {
    type Ptr = KBox<T>;
    type RegistrationData = T::Data;

    const MODE: u16 = T::MODE;
    const LLSEEK: Llseek = Llseek::Noop;
    const NOWAIT: bool = true;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<KBox<T>> {
        T::open(misc.data())
    }

    fn read_iter(kiocb: Kiocb<'_, KBox<T>>, iov: &mut IovIterDest<'_>) -> Result<usize> {
        let request = Request {
            len: iov.len(),
            pos: kiocb.ki_pos(),
            nowait: kiocb.nowait(),
        };
        let Some(value) = kiocb.file().read(request)? else {
            return Ok(0);
        };
        if iov.copy_to_iter(&value.to_ne_bytes()) != size_of::<u32>() {
            return Err(EFAULT);
        }
        kiocb.file().returned(value);
        Ok(size_of::<u32>())
    }

    fn write_iter(kiocb: Kiocb<'_, KBox<T>>, iov: &mut IovIterSource<'_>) -> Result<usize> {
        kiocb.file().write(iov)
    }

    fn poll(private: &T, file: &File, table: PollTable<'_>) -> u32 {
        match private.poll(|condvar| table.register_wait(file, condvar)) {
            Ok(true) => events::IN | events::RDNORM,
            Ok(false) => 0,
            Err(_) => events::HUP | events::ERR,
        }
    }

    fn mmap(private: &T, _file: &File, vma: &VmaNew) -> Result {
        private.mmap(Area::new(vma))
    }
}

/// A registered misc device, and the data for `open`.
#[pin_data]
pub(crate) struct Registration<T: FileOperations> {
    #[pin]
    inner: MiscDeviceRegistration<Adapter<T>>,
}

impl<T: FileOperations> Registration<T> {
    /// Registers the misc device `name`. Processes can open it before this returns.
    ///
    /// # Errors
    ///
    /// Those of `misc_register()`. A name that is in use gives `EEXIST` and a stack dump; the
    /// caller ensures that it is free.
    pub(crate) fn new(name: &'static CStr, data: T::Data) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            inner <- MiscDeviceRegistration::register(MiscDeviceOptions { name }, data),
        })
    }
}
