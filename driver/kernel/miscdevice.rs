// SPDX-License-Identifier: GPL-2.0

//! What [`kernel::miscdevice`] lacks: data of the registration, a mode, `poll`, plain `read` and
//! `write`, `llseek`, non-blocking reads.
//!
//! [`Adapter`] implements the kernel crate's `MiscDevice`; this file adds to its `file_operations`.
//! In the kernel crate, the methods of [`FileOperations`] would be methods of `MiscDevice`, and
//! [`Registration`] would be `MiscDeviceRegistration` with data for `open`.
//!
//! C headers: [`include/linux/miscdevice.h`](srctree/include/linux/miscdevice.h),
//! [`include/linux/poll.h`](srctree/include/linux/poll.h)

use super::mm::Area;
use core::marker::PhantomData;
use kernel::{
    bindings,
    error::to_result,
    ffi::{
        c_char,
        c_int, //
    },
    fs::{
        file::flags::O_NONBLOCK,
        File,
        Kiocb, //
    },
    iov::IovIterDest,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions,
        MiscDeviceRegistration, //
    },
    mm::virt::VmaNew,
    prelude::*,
    sync::poll::{
        PollCondVar,
        PollTable, //
    },
    types::{
        ForeignOwnable,
        Opaque, //
    },
    uaccess::{
        UserPtr,
        UserSlice,
        UserSliceReader, //
    },
};

/// `FMODE_NOWAIT` of `include/linux/fs.h`, which bindgen cannot evaluate.
const FMODE_NOWAIT: bindings::fmode_t = 1 << 27;

/// `IOCB_NOWAIT` of `include/linux/fs.h`, `RWF_NOWAIT` of `include/uapi/linux/fs.h`; likewise.
const IOCB_NOWAIT: c_int = 0x08;

/// The events of a file that `poll(2)` returns.
#[derive(Clone, Copy)]
pub(crate) struct Ready(u32);

impl Ready {
    /// None.
    pub(crate) const NOT: Self = Self(0);

    /// A read returns something new.
    pub(crate) const READ: Self = Self(bindings::POLLIN | bindings::POLLRDNORM);

    /// The device was unbound.
    pub(crate) const GONE: Self = Self(bindings::POLLHUP | bindings::POLLERR);
}

/// A call of `read(2)`, `readv(2)`, `pread(2)` and so on.
pub(crate) struct Request {
    /// The size of the buffer, in bytes: with `readv(2)`, of all buffers.
    pub(crate) len: usize,

    /// The position.
    pub(crate) pos: i64,

    /// Whether the call must not wait (`O_NONBLOCK`, `RWF_NOWAIT`, io_uring): it returns `EAGAIN`
    /// instead. io_uring then polls the file, and tries again when it is ready.
    pub(crate) nonblock: bool,
}

/// The private data of a file, as a callback borrows it.
pub(crate) type Borrowed<'a, T> = <<T as FileOperations>::Ptr as ForeignOwnable>::Borrowed<'a>;

/// The file operations of a misc device. Its files return a native-endian u32 to each read, and
/// have no position: `lseek` returns 0.
pub(crate) trait FileOperations: Sized + Send + Sync + 'static {
    /// The data of the registration, for `open`.
    type Data: Send + Sync;

    /// The private data of an open file.
    type Ptr: ForeignOwnable + Send + Sync;

    /// The mode of the device node, as in `chmod(2)`.
    const MODE: u16;

    /// Called when the device is opened.
    fn open(data: &Self::Data) -> Result<Self::Ptr>;

    /// Returns what [`FileOperations::read`] would return to a request of 4 bytes at position 0, if
    /// neither that nor [`FileOperations::returned`] would change anything. Else returns `None`.
    ///
    /// It saves 16 of the 375 instructions of a `read(2)`.
    fn read_unchanged(file: Borrowed<'_, Self>) -> Option<u32>;

    /// Handler for `read(2)`, `pread(2)`, `readv(2)`, io_uring and the like. With `None` the call
    /// returns 0. A value is returned only if `request.len` is at least the size of a u32.
    fn read(file: Borrowed<'_, Self>, request: Request) -> Result<Option<u32>>;

    /// Called when `value` from [`FileOperations::read`] was copied to the process.
    fn returned(file: Borrowed<'_, Self>, value: u32);

    /// Handler for `write(2)`, at any position.
    fn write(file: Borrowed<'_, Self>, buf: UserSliceReader) -> Result<usize>;

    /// Handler for `poll(2)`, `select(2)`, `epoll_wait(2)`: passes the wait queue of the file's
    /// pollers to `wait_for`, then returns the events, so that the poller misses no change.
    ///
    /// Must not sleep for long: the timeout may be 0, and epoll and io_uring hold a mutex.
    fn poll(file: Borrowed<'_, Self>, wait_for: impl FnOnce(&PollCondVar)) -> Ready;

    /// Handler for `mmap(2)`.
    fn mmap(file: Borrowed<'_, Self>, area: Area<'_>) -> Result;
}

/// The kernel crate's misc device for `T`. Only this file can register it.
struct Adapter<T>(PhantomData<T>);

#[vtable]
impl<T: FileOperations> MiscDevice for Adapter<T> {
    type Ptr = T::Ptr;

    fn open(file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<T::Ptr> {
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

    fn read_iter(kiocb: Kiocb<'_, T::Ptr>, iov: &mut IovIterDest<'_>) -> Result<usize> {
        // SAFETY: By the type invariants the `struct kiocb` is valid, and so is its file. The flags
        // belong to the call.
        let (nowait, file) = unsafe {
            let kiocb = kiocb.as_raw();
            ((*kiocb).ki_flags & IOCB_NOWAIT != 0, (*kiocb).ki_filp)
        };
        let request = Request {
            len: iov.len(),
            pos: kiocb.ki_pos(),
            // SAFETY: The file is valid, as said above.
            nonblock: nowait || unsafe { nonblock(file) },
        };

        let Some(value) = T::read(kiocb.file(), request)? else {
            return Ok(0);
        };
        if iov.copy_to_iter(&value.to_ne_bytes()) != size_of::<u32>() {
            return Err(EFAULT);
        }
        T::returned(kiocb.file(), value);
        Ok(size_of::<u32>())
    }

    fn mmap(private: Borrowed<'_, T>, _file: &File, vma: &VmaNew) -> Result {
        T::mmap(private, Area::new(vma))
    }
}

/// Returns whether the file has the flag `O_NONBLOCK`.
///
/// # Safety
///
/// The file must be valid.
unsafe fn nonblock(file: *const bindings::file) -> bool {
    // SAFETY: The file is valid. `fcntl(2)` may change its flags; this is one load of a word.
    unsafe { (&raw const (*file).f_flags).read_volatile() & O_NONBLOCK != 0 }
}

/// Copies `value` to the process. Returns the result of `read(2)`.
fn copy(buf: *mut c_char, value: u32) -> isize {
    let buf = UserSlice::new(UserPtr::from_ptr(buf.cast()), size_of::<u32>());
    match buf.writer().write(&value) {
        Ok(()) => size_of::<u32>() as isize,
        Err(err) => err.to_errno() as isize,
    }
}

impl<T: FileOperations> Adapter<T> {
    const OPTIONS: MiscDeviceOptions = MiscDeviceOptions { name: c"" };

    /// The kernel crate's operations, and those that it lacks.
    const FOPS: bindings::file_operations = bindings::file_operations {
        read: Some(Self::read),
        write: Some(Self::write),
        poll: Some(Self::poll),
        llseek: Some(bindings::noop_llseek),
        // SAFETY: The pointer is to a constant.
        ..unsafe { *Self::OPTIONS.into_raw::<Self>().fops }
    };

    /// # Safety
    ///
    /// `file` must be a valid file of a registered `Adapter<T>`, and `table` null or valid.
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        table: *mut bindings::poll_table,
    ) -> bindings::__poll_t {
        // SAFETY: The poll call of a file can access the private data, and borrow from it.
        let private = unsafe { T::Ptr::borrow((*file).private_data) };
        // SAFETY: The table is null or valid by the safety requirements.
        let table = unsafe { PollTable::from_raw(table) };
        // SAFETY:
        // - The file is valid for the duration of this call.
        // - There is no active fdget_pos region on the file on this thread.
        let file = unsafe { File::from_raw_file(file) };

        T::poll(private, |condvar| table.register_wait(file, condvar)).0
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
        // SAFETY: The position is valid by the safety requirements.
        if len == size_of::<u32>() && unsafe { *ppos } == 0 {
            // SAFETY: The read call of a file can access the private data, and borrow from it.
            let private = unsafe { T::Ptr::borrow((*file).private_data) };
            if let Some(value) = T::read_unchanged(private) {
                return copy(buf, value);
            }
        }
        // SAFETY: By the safety requirements of this function.
        unsafe { Self::read_any(file, buf, len, ppos) }
    }

    /// # Safety
    ///
    /// As for `read`.
    #[cold]
    #[inline(never)]
    unsafe extern "C" fn read_any(
        file: *mut bindings::file,
        buf: *mut c_char,
        len: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The read call of a file can access the private data, and borrow from it.
        let private = || unsafe { T::Ptr::borrow((*file).private_data) };
        let request = Request {
            len,
            // SAFETY: The position is valid by the safety requirements.
            pos: unsafe { *ppos },
            // SAFETY: The file is valid by the safety requirements.
            nonblock: unsafe { nonblock(file) },
        };

        let value = match T::read(private(), request) {
            Ok(Some(value)) => value,
            Ok(None) => return 0,
            Err(err) => return err.to_errno() as isize,
        };
        let result = copy(buf, value);
        if result > 0 {
            T::returned(private(), value);
        }
        result
    }

    /// # Safety
    ///
    /// `file` must be a valid file of a registered `Adapter<T>`.
    unsafe extern "C" fn write(
        file: *mut bindings::file,
        buf: *const c_char,
        len: usize,
        _ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The write call of a file can access the private data, and borrow from it.
        let private = unsafe { T::Ptr::borrow((*file).private_data) };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast_mut().cast()), len).reader();

        match T::write(private, buf) {
            Ok(len) => len as isize,
            Err(err) => err.to_errno() as isize,
        }
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
