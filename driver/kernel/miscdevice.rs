// SPDX-License-Identifier: GPL-2.0

//! What [`kernel::miscdevice`] lacks: data of the registration, a mode, `poll`, plain `read` and
//! `write`, `llseek`, reads that do not wait.
//!
//! This stands on the kernel crate's own abstraction: [`Adapter`] is its `MiscDevice`, whose
//! `file_operations` are taken over and added to. In the kernel crate, the methods of
//! [`FileOperations`] would be some more of `MiscDevice`'s, and [`Registration`] the
//! `MiscDeviceRegistration`, with the data that its `open` callbacks cannot get at today.
//!
//! C headers: [`include/linux/miscdevice.h`](srctree/include/linux/miscdevice.h),
//! [`include/linux/poll.h`](srctree/include/linux/poll.h)

use super::rwonce::ReadOnce;
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
    sync::{
        atomic::Atomic,
        poll::{
            PollCondVar,
            PollTable, //
        }, //
    },
    types::{
        ForeignOwnable,
        Opaque, //
    },
    uaccess::{
        UserPtr,
        UserSlice,
        UserSliceReader,
        UserSliceWriter, //
    },
};

/// `FMODE_NOWAIT` of `include/linux/fs.h`, which bindgen cannot evaluate.
const FMODE_NOWAIT: bindings::fmode_t = 1 << 27;

/// `IOCB_NOWAIT` of `include/linux/fs.h`, `RWF_NOWAIT` of `include/uapi/linux/fs.h`; likewise.
const IOCB_NOWAIT: c_int = 0x08;

/// What a file is ready for: the answer to `poll(2)`.
#[derive(Clone, Copy)]
pub(crate) struct Ready(u32);

impl Ready {
    /// Nothing yet.
    pub(crate) const NOT: Self = Self(0);

    /// A read gives something new.
    pub(crate) const READ: Self = Self(bindings::POLLIN | bindings::POLLRDNORM);

    /// Nothing will ever come any more.
    pub(crate) const GONE: Self = Self(bindings::POLLHUP | bindings::POLLERR);
}

/// Where a poller is told what to wait for.
pub(crate) struct Waiter<'a> {
    file: &'a File,
    table: PollTable<'a>,
}

impl Waiter<'_> {
    /// Has the poller woken whenever `condvar` is notified. To be called before looking whether
    /// the file is ready: what changes after the look wakes the poller then.
    pub(crate) fn wait_for(&self, condvar: &PollCondVar) {
        self.table.register_wait(self.file, condvar);
    }
}

/// An extension of [`Kiocb`].
pub(crate) trait KiocbExt {
    /// Returns whether the call must not wait: `EAGAIN` is the answer if it would have to.
    fn nowait(&self) -> bool;

    /// Returns whether the file was opened, or set, not to wait: `O_NONBLOCK`.
    fn nonblock(&self) -> bool;
}

impl<T: ForeignOwnable> KiocbExt for Kiocb<'_, T> {
    fn nowait(&self) -> bool {
        // SAFETY: By the type invariants the `struct kiocb` is valid; its flags belong to the call.
        unsafe { (*self.as_raw()).ki_flags & IOCB_NOWAIT != 0 }
    }

    fn nonblock(&self) -> bool {
        // SAFETY: By the type invariants the `struct kiocb` is valid, and has a file that is.
        // `fcntl(2)` may change its flags; this is one load of a word.
        let flags = unsafe { (&raw const (*(*self.as_raw()).ki_filp).f_flags).read_volatile() };
        flags & O_NONBLOCK != 0
    }
}

/// Shorthand for what a callback gets of a file's private data.
pub(crate) type Borrowed<'a, T> = <<T as FileOperations>::Ptr as ForeignOwnable>::Borrowed<'a>;

/// The file operations of a misc device without a file position: `lseek` answers 0.
pub(crate) trait FileOperations: Sized + Send + Sync + 'static {
    /// What the registration owns, and all its files are opened from.
    type Data: Send + Sync;

    /// The private data of an open file.
    type Ptr: ForeignOwnable + Send + Sync;

    /// The mode of the device node, as in `chmod(2)`.
    const MODE: u16;

    /// Called when the device is opened.
    fn open(data: &Self::Data) -> Result<Self::Ptr>;

    /// Whether there is a [`FileOperations::write`]; without, the VFS answers `EINVAL`.
    const WRITE: bool = false;

    /// Handler for `read(2)` and `pread(2)`: reads into `buf` from the position `pos`.
    ///
    /// It is what [`FileOperations::read_iter`] does, without the cost of an IO vector. `nonblock`:
    /// the file is not to be waited for.
    fn read(
        file: Borrowed<'_, Self>,
        nonblock: bool,
        buf: UserSliceWriter,
        pos: i64,
    ) -> Result<usize>;

    /// The same, where little is to be done. `None`: [`FileOperations::read`] has to do it; the
    /// buffer is untouched.
    ///
    /// What is common and short comes first, without the frame and the registers that the rest
    /// needs.
    #[inline(always)]
    fn read_fast(
        _file: Borrowed<'_, Self>,
        _buf: UserSliceWriter,
        _pos: i64,
    ) -> Option<Result<usize>> {
        None
    }

    /// Handler for all the other ways to read: `readv(2)`, `preadv(2)`, io_uring.
    ///
    /// Where [`KiocbExt::nowait`] says so it does not wait, but answers `EAGAIN`. io_uring then
    /// polls the file, and tries again when that is ready.
    fn read_iter(kiocb: Kiocb<'_, Self::Ptr>, iov: &mut IovIterDest<'_>) -> Result<usize>;

    /// Handler for `write(2)` and its relatives: writes what `buf` has, wherever.
    fn write(_file: Borrowed<'_, Self>, _buf: UserSliceReader) -> Result<usize> {
        Err(EINVAL)
    }

    /// Handler for `poll(2)`, `select(2)`, `epoll_wait(2)`: says what to wait for, and then what the
    /// file is ready for at once.
    ///
    /// Callers hold locks of their own that are taken for polling only: epoll's, io_uring's.
    fn poll(file: Borrowed<'_, Self>, waiter: &Waiter<'_>) -> Ready;

    /// Handler for `mmap(2)`.
    fn mmap(file: Borrowed<'_, Self>, vma: &VmaNew) -> Result;
}

/// Makes a kernel-crate misc device of a `T`. Nobody outside of this file can register it.
struct Adapter<T>(PhantomData<T>);

#[vtable]
impl<T: FileOperations> MiscDevice for Adapter<T> {
    type Ptr = T::Ptr;

    fn open(file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<T::Ptr> {
        let misc = Opaque::cast_from(misc.as_raw());
        // SAFETY: `Adapter<T>` is registered by `Registration::<T>::new` only, hence this is the
        // field of a `Registration<T>`. It is valid: it was initialized whole before it was
        // registered, and `misc_deregister()` waits for running calls of `open`.
        let registration = unsafe { &*kernel::container_of!(misc, Registration<T>, misc) };

        let private = T::open(&registration.data)?;

        // SAFETY: The file is valid, and nobody else has it yet: it is being opened.
        unsafe { (*file.as_ptr()).f_mode |= FMODE_NOWAIT };

        Ok(private)
    }

    fn read_iter(kiocb: Kiocb<'_, T::Ptr>, iov: &mut IovIterDest<'_>) -> Result<usize> {
        T::read_iter(kiocb, iov)
    }

    fn mmap(private: Borrowed<'_, T>, _file: &File, vma: &VmaNew) -> Result {
        T::mmap(private, vma)
    }
}

impl<T: FileOperations> Adapter<T> {
    const OPTIONS: MiscDeviceOptions = MiscDeviceOptions { name: c"" };

    /// The kernel crate's operations, and what they lack.
    const FOPS: bindings::file_operations = bindings::file_operations {
        read: Some(Self::read),
        write: if T::WRITE { Some(Self::write) } else { None },
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
        let waiter = Waiter {
            // SAFETY:
            // - The file is valid for the duration of this call.
            // - There is no active fdget_pos region on the file on this thread.
            file: unsafe { File::from_raw_file(file) },
            // SAFETY: By the safety requirements of this function.
            table: unsafe { PollTable::from_raw(table) },
        };

        T::poll(private, &waiter).0
    }

    /// # Safety
    ///
    /// `file` must be a valid file of a registered `Adapter<T>`, and `ppos` a valid position: the VFS
    /// passes null for streams only, and `Adapter<T>` does not open any.
    unsafe extern "C" fn read(
        file: *mut bindings::file,
        buf: *mut c_char,
        len: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The read call of a file can access the private data, and borrow from it.
        let private = unsafe { T::Ptr::borrow((*file).private_data) };
        let slice = UserSlice::new(UserPtr::from_ptr(buf.cast()), len).writer();

        // SAFETY: The position is valid by the safety requirements.
        match T::read_fast(private, slice, unsafe { *ppos }) {
            // The compiler would take the length from what the copy gets, by way of a register
            // that has to be saved for that.
            Some(Ok(len)) => Atomic::new(len).read_once() as isize,
            Some(Err(err)) => errno(err),
            // SAFETY: The requirements are those of this function. The borrow has ended.
            None => unsafe { Self::read_all(file, buf, len, ppos) },
        }
    }

    /// # Safety
    ///
    /// Those of `read`.
    #[cold]
    #[inline(never)]
    unsafe extern "C" fn read_all(
        file: *mut bindings::file,
        buf: *mut c_char,
        len: usize,
        ppos: *mut bindings::loff_t,
    ) -> isize {
        // SAFETY: The file is valid; `fcntl(2)` may change its flags, and this is one load of a word.
        let flags = unsafe { (&raw const (*file).f_flags).read_volatile() };
        // SAFETY: The read call of a file can access the private data, and borrow from it.
        let private = unsafe { T::Ptr::borrow((*file).private_data) };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast()), len).writer();

        // SAFETY: The position is valid by the safety requirements.
        answer(T::read(private, flags & O_NONBLOCK != 0, buf, unsafe {
            *ppos
        }))
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

        answer(T::write(private, buf))
    }
}

/// What a call returns.
fn answer(result: Result<usize>) -> isize {
    match result {
        Ok(len) => len as isize,
        Err(err) => errno(err),
    }
}

/// What a call that failed returns: out of line, so that the others do not pay for it.
#[cold]
#[inline(never)]
fn errno(err: Error) -> isize {
    err.to_errno() as isize
}

/// A registered misc device, and what its files are opened from.
///
/// # Invariants
///
/// - `misc` is registered, with the operations of `Adapter<T>`.
/// - Nothing else is registered with the operations of `Adapter<T>`.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: FileOperations> {
    data: T::Data,
    #[pin]
    misc: Opaque<bindings::miscdevice>,
}

// SAFETY: `misc_deregister()` can be called from any thread; the data is `Send`.
unsafe impl<T: FileOperations> Send for Registration<T> {}
// SAFETY: `open` gives shared access to the data, from any thread; the data is `Sync`.
unsafe impl<T: FileOperations> Sync for Registration<T> {}

impl<T: FileOperations> Registration<T> {
    /// Registers the misc device `name`. From the moment it is, it can be opened.
    ///
    /// # Errors
    ///
    /// Those of `misc_register()`. A name that is taken gives `EEXIST` and a stack dump; the
    /// caller sees to it that it is free.
    pub(crate) fn new(name: &'static CStr, data: T::Data) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            data,
            misc <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                let mut misc = MiscDeviceOptions { name }.into_raw::<Adapter<T>>();
                misc.fops = &Adapter::<T>::FOPS;
                misc.mode = T::MODE;

                // SAFETY: The initializer can write to the provided `slot`.
                unsafe { slot.write(misc) };

                // SAFETY: The device was just written. It is pinned, and the destructor
                // deregisters it.
                // INVARIANT: If this succeeds it is registered; this is the only place that
                // names the operations.
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
