// SPDX-License-Identifier: GPL-2.0

//! What [`kernel::miscdevice`] lacks: data of the registration, a mode, plain `read`, `llseek`.
//!
//! This stands on the kernel crate's own abstraction: [`Adapter`] is its `MiscDevice`, whose
//! `file_operations` are taken over and added to.
//!
//! C header: [`include/linux/miscdevice.h`](srctree/include/linux/miscdevice.h)

use core::marker::PhantomData;
use kernel::{
    bindings,
    error::to_result,
    ffi::c_char,
    fs::{
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
    types::{
        ForeignOwnable,
        Opaque, //
    },
    uaccess::{
        UserPtr,
        UserSlice,
        UserSliceWriter, //
    },
};

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

    /// Handler for `read(2)` and `pread(2)`: reads into `buf` from the position `pos`.
    ///
    /// It is what [`FileOperations::read_iter`] does, without the cost of an IO vector.
    fn read(file: Borrowed<'_, Self>, buf: UserSliceWriter, pos: i64) -> Result<usize>;

    /// Handler for all the other ways to read: `readv(2)`, `preadv(2)`, io_uring.
    fn read_iter(kiocb: Kiocb<'_, Self::Ptr>, iov: &mut IovIterDest<'_>) -> Result<usize>;

    /// Handler for `mmap(2)`.
    fn mmap(file: Borrowed<'_, Self>, vma: &VmaNew) -> Result;
}

/// Makes a kernel-crate misc device of a `T`. Nobody outside of this file can register it.
struct Adapter<T>(PhantomData<T>);

#[vtable]
impl<T: FileOperations> MiscDevice for Adapter<T> {
    type Ptr = T::Ptr;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<T::Ptr> {
        let misc = Opaque::cast_from(misc.as_raw());
        // SAFETY: `Adapter<T>` is registered by `Registration::<T>::new` only, hence this is the
        // field of a `Registration<T>`. It is valid: it was initialized whole before it was
        // registered, and `misc_deregister()` waits for running calls of `open`.
        let registration = unsafe { &*kernel::container_of!(misc, Registration<T>, misc) };

        T::open(&registration.data)
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
        llseek: Some(bindings::noop_llseek),
        // SAFETY: The pointer is to a constant.
        ..unsafe { *Self::OPTIONS.into_raw::<Self>().fops }
    };

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
        let file = unsafe { T::Ptr::borrow((*file).private_data) };
        let buf = UserSlice::new(UserPtr::from_ptr(buf.cast()), len).writer();

        // SAFETY: The position is valid by the safety requirements.
        match T::read(file, buf, unsafe { *ppos }) {
            Ok(len) => len as isize,
            Err(err) => err.to_errno() as isize,
        }
    }
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
