// SPDX-License-Identifier: GPL-2.0

//! What [`kernel::miscdevice`] lacks: data of the registration, a mode, `poll`, plain `read`,
//! `llseek`, non-blocking reads.
//!
//! [`Adapter`] implements the kernel crate's `MiscDevice`; this file adds to its `file_operations`.
//! In the kernel crate, the methods of [`FileOperations`] would be methods of `MiscDevice`, and
//! [`Registration`] would be `MiscDeviceRegistration` with data for `open`.
//!
//! C headers: [`include/linux/miscdevice.h`](srctree/include/linux/miscdevice.h),
//! [`include/linux/poll.h`](srctree/include/linux/poll.h)

use super::{
    mm::Area,
    prelude::*, //
};
use core::marker::PhantomData;
use kernel::{
    ffi::c_char,
    fs::{
        file::flags::O_NONBLOCK,
        File,
        Kiocb,
        LocalFile, //
    },
    iov::{
        IovIterDest,
        IovIterSource, //
    },
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions,
        MiscDeviceRegistration, //
    },
    mm::virt::VmaNew,
    sync::poll::{
        PollCondVar,
        PollTable, //
    },
    types::ForeignOwnable, //
};

/// `FMODE_NOWAIT` of `include/linux/fs.h`, which bindgen cannot evaluate.
const FMODE_NOWAIT: bindings::fmode_t = 1 << 27;

/// `IOCB_NOWAIT` of `include/linux/fs.h`, `RWF_NOWAIT` of `include/uapi/linux/fs.h`; likewise.
const IOCB_NOWAIT: c_int = 0x08;

/// A call of `read(2)`, `readv(2)`, `pread(2)` and so on.
pub(crate) struct Request<'a> {
    file: &'a LocalFile,

    /// Whether this call must not wait, although another call of the same file may.
    nowait: bool,

    /// The size of the buffer, in bytes: with `readv(2)`, of all buffers.
    pub(crate) len: usize,

    /// The position.
    pub(crate) pos: i64,
}

impl Request<'_> {
    /// Returns whether the call may wait. With `O_NONBLOCK`, `RWF_NOWAIT` and io_uring it returns
    /// `EAGAIN` instead. io_uring then polls the file, and tries again when it is ready.
    #[inline(always)]
    pub(crate) fn may_wait(&self) -> bool {
        !self.nowait && self.file.flags() & O_NONBLOCK == 0
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
    fn read(&self, request: Request<'_>) -> Result<Option<u32>>;

    /// Called when `value` from [`FileOperations::read`] was copied to the process.
    fn returned(&self, value: u32);

    /// Handler for `write(2)` and the like, at any position.
    fn write(&self, data: &mut IovIterSource<'_>) -> Result<usize>;

    /// Handler for `poll(2)`, `select(2)`, `epoll_wait(2)`: passes the wait queue of the file's
    /// pollers to `wait_for`, then returns whether the file is readable, so that the poller misses
    /// no change. An error stands for `POLLHUP` and `POLLERR`.
    ///
    /// Must not sleep for long: the timeout may be 0, and epoll and io_uring hold a mutex.
    fn poll(&self, wait_for: impl FnOnce(&PollCondVar)) -> Result<bool>;

    /// Handler for `mmap(2)`.
    fn mmap(&self, area: Area<'_>) -> Result;
}

/// The kernel crate's misc device for `T`. Only this file can register it.
struct Adapter<T>(PhantomData<T>);

#[vtable]
impl<T: FileOperations> MiscDevice for Adapter<T> {
    type Ptr = KBox<T>;

    fn open(file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<KBox<T>> {
        let misc = Opaque::cast_from(misc.as_raw());
        // SAFETY: Only `Registration::<T>::new` registers an `Adapter<T>`, so this is the field of
        // a `Registration<T>`. That is valid: `data` was initialized before the device was
        // registered, and `misc_deregister()` waits for running calls of `open`.
        let registration = unsafe { &*kernel::container_of!(misc, Registration<T>, misc) };

        let private = T::open(&registration.data)?;

        // SAFETY: The file is valid. It is being opened: no other thread has access to it.
        unsafe { (*file.as_ptr()).f_mode |= FMODE_NOWAIT };

        Ok(private)
    }

    fn read_iter(kiocb: Kiocb<'_, KBox<T>>, iov: &mut IovIterDest<'_>) -> Result<usize> {
        // SAFETY: By the type invariants the `struct kiocb` is valid, and so is its file. The flags
        // belong to the call. An `fdget_pos()` region of this call is on this thread.
        let (nowait, file) = unsafe {
            let kiocb = kiocb.as_raw();
            let file = LocalFile::from_raw_file((*kiocb).ki_filp);
            ((*kiocb).ki_flags & IOCB_NOWAIT != 0, file)
        };
        let request = Request {
            file,
            nowait,
            len: iov.len(),
            pos: kiocb.ki_pos(),
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

    fn mmap(private: &T, _file: &File, vma: &VmaNew) -> Result {
        private.mmap(Area::new(vma))
    }
}

/// Returns `EFAULT`. It is a function so that only a call that fails has instructions for it.
#[cfg(CONFIG_X86_64)]
#[cold]
#[inline(never)]
fn efault() -> Error {
    EFAULT
}

/// Copies `value` to the process: `put_user()`.
///
/// The kernel crate has only `copy_to_user()`, with which a `read(2)` takes some 30 instructions more.
fn put_user(value: u32, to: *mut c_char) -> Result {
    #[cfg(CONFIG_X86_64)]
    {
        let result: *mut c_char;
        // SAFETY: This calls the function as C's `put_user()` does. The function checks the address,
        // and returns 0 or `-EFAULT` in `ecx`. It changes `rbx`, which cannot be an operand.
        unsafe {
            core::arch::asm!(
                "mov {rbx}, rbx",
                "call __put_user_4",
                "mov rbx, {rbx}",
                rbx = out(reg) _,
                in("eax") value,
                inout("rcx") to => result,
            )
        };
        match result.addr() as c_int {
            0 => Ok(()),
            _ => Err(efault()),
        }
    }
    #[cfg(not(CONFIG_X86_64))]
    {
        use kernel::uaccess::*;
        let to = UserSlice::new(UserPtr::from_ptr(to.cast()), size_of::<u32>());
        to.writer().write(&value)
    }
}

impl<T: FileOperations> Adapter<T> {
    const OPTIONS: MiscDeviceOptions = MiscDeviceOptions { name: c"" };

    /// The kernel crate's operations, and those that it lacks.
    const FOPS: bindings::file_operations = bindings::file_operations {
        read: Some(Self::read),
        poll: Some(Self::poll),
        llseek: Some(bindings::noop_llseek),
        // SAFETY: The pointer is to a constant.
        ..unsafe { *Self::OPTIONS.into_raw::<Self>().fops }
    };

    /// Borrows the private data of a file.
    ///
    /// # Safety
    ///
    /// The caller must be an operation of `file`, a file of a registered `Adapter<T>`, other than
    /// `open` and `release`. `'a` must end with that call.
    unsafe fn private<'a>(file: *mut bindings::file) -> &'a T {
        // SAFETY: Between `open` and `release`, an operation can borrow from the private data.
        unsafe { KBox::borrow((*file).private_data) }
    }

    /// # Safety
    ///
    /// `file` must be a valid file of a registered `Adapter<T>`, and `table` null or valid.
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        table: *mut bindings::poll_table,
    ) -> bindings::__poll_t {
        // SAFETY: By the safety requirements of this function.
        let (private, table) = unsafe { (Self::private(file), PollTable::from_raw(table)) };
        // SAFETY: The file is valid. `poll` calls have no `fdget_pos()` region.
        let file = unsafe { File::from_raw_file(file) };

        match private.poll(|condvar| table.register_wait(file, condvar)) {
            Ok(true) => bindings::POLLIN | bindings::POLLRDNORM,
            Ok(false) => 0,
            Err(_) => bindings::POLLHUP | bindings::POLLERR,
        }
    }

    /// The same as `read_iter` without the cost of an IO vector.
    ///
    /// # Safety
    ///
    /// `file` must be a valid file of a registered `Adapter<T>`, and `ppos` a valid position: the
    /// VFS passes null for streams only, and `Adapter<T>` does not open any.
    unsafe extern "C" fn read(
        file: *mut bindings::file,
        buf: *mut c_char,
        len: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: By the safety requirements of this function.
        let (private, pos) = unsafe { (Self::private(file), *ppos) };
        let request = Request {
            // SAFETY: The file is valid. An `fdget_pos()` region of this call is on this thread.
            file: unsafe { LocalFile::from_raw_file(file) },
            nowait: false,
            len,
            pos,
        };

        let result = private.read(request).and_then(|value| {
            let Some(value) = value else { return Ok(0) };
            put_user(value, buf)?;
            private.returned(value);
            Ok(size_of::<u32>() as isize)
        });
        result.unwrap_or_else(|err| err.to_errno() as isize)
    }
}

/// A registered misc device, and the data for `open`.
///
/// # Invariants
///
/// - `misc` is registered, with the operations of `Adapter<T>`.
/// - Each device with the operations of `Adapter<T>` is the `misc` of a `Registration<T>`.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: FileOperations> {
    data: T::Data,
    #[pin]
    misc: Opaque<bindings::miscdevice>,
}

// SAFETY: Any thread can call `misc_deregister()`; the data is `Send`.
unsafe impl<T: FileOperations> Send for Registration<T> {}
// SAFETY: `open` gives shared access to the data, from any thread; the data is `Sync`.
unsafe impl<T: FileOperations> Sync for Registration<T> {}

impl<T: FileOperations> Registration<T> {
    /// Registers the misc device `name`. Processes can open it before this returns.
    ///
    /// # Errors
    ///
    /// Those of `misc_register()`. A name that is in use gives `EEXIST` and a stack dump; the
    /// caller ensures that it is free.
    pub(crate) fn new(name: &'static CStr, data: T::Data) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            data,
            misc <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                let mut misc = MiscDeviceOptions { name }.into_raw::<Adapter<T>>();
                misc.fops = &Adapter::<T>::FOPS;
                misc.mode = T::MODE;

                // SAFETY: The initializer can write to the provided `slot`.
                unsafe { slot.write(misc) };

                // SAFETY: The device was just written. It is pinned; the destructor deregisters it.
                // INVARIANT: If this succeeds the device is registered. No other function registers
                // these operations.
                to_result(unsafe { bindings::misc_register(slot) })
            }),
        })
    }
}

#[pinned_drop]
impl<T: FileOperations> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants the device is registered.
        unsafe { bindings::misc_deregister(self.misc.get()) };
    }
}
