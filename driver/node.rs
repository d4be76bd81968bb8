// SPDX-License-Identifier: GPL-2.0

//! The device nodes, and the files of `/dev/vmgenid`.

use super::{
    binding::{
        Binding,
        Unbind, //
    },
    counter::Counter,
    generation_id::Patience,
    kernel::{
        miscdevice::{
            FileOperations,
            KiocbExt,
            Ready,
            Registration,
            Waiter, //
        },
        rwonce::ReadOnce, //
    }, //
};
use kernel::{
    fs::Kiocb,
    iov::IovIterDest,
    mm::virt::VmaNew,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        Arc, //
    },
    uaccess::UserSliceWriter, //
};

/// The name of a node below `/dev`, which one device can have.
pub(crate) struct Name {
    name: &'static CStr,
    /// Whether a [`Claim`] exists.
    claimed: Atomic<bool>,
}

/// `/dev/vmgenid`.
pub(crate) static VMGENID: Name = Name::new(c"vmgenid");

/// `/dev/sysgenid`.
pub(crate) static SYSGENID: Name = Name::new(c"sysgenid");

impl Name {
    const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            claimed: Atomic::new(false),
        }
    }

    /// Claims the name. `None`: it belongs to another device.
    pub(crate) fn claim(&'static self) -> Option<Claim> {
        // INVARIANT: Only one caller turns `false` to `true`, until a claim is dropped.
        self.claimed
            .cmpxchg(false, true, Full)
            .ok()
            .map(|_| Claim(self))
    }
}

/// The right to have a node of this name.
///
/// # Invariants
///
/// At most one exists at a time for each name.
pub(crate) struct Claim(&'static Name);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.claimed.store(false, Release);
    }
}

/// A registered node.
///
/// The order of the fields is that of the teardown. The node goes, so that nobody opens it any
/// more: `misc_deregister()` waits for whoever is in `open` just now. Then open files answer
/// `ENODEV`, and who sleeps in `poll` is woken to be told. Then the name is free for another device.
/// What the files use stays until the last one is closed; a call that began
/// before may still be under way, and ends as it would have.
#[pin_data]
pub(crate) struct Node<T: FileOperations<Data = Arc<D>>, D: Unbind + Send + Sync> {
    #[pin]
    _registration: Registration<T>,
    _binding: Binding<D>,
    _claim: Claim,
}

impl<T: FileOperations<Data = Arc<D>>, D: Unbind + Send + Sync> Node<T, D> {
    /// Makes the node for what its files use.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; those of `misc_register()`.
    pub(crate) fn new(claim: Claim, data: Arc<D>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _registration <- Registration::new(claim.0.name, data.clone()),
            _binding: Binding::new(data),
            _claim: claim,
        })
    }
}

/// The size of the counter, in bytes: the only size that can be read.
const SIZE: usize = size_of::<u32>();

/// Checks a read of `len` bytes at `pos`. `false`: there is nothing to do.
fn check_read(len: usize, pos: i64) -> Result<bool> {
    match (len, pos) {
        (SIZE, 0) => Ok(true),
        (0, _) => Ok(false),
        _ => Err(EINVAL),
    }
}

/// What the reader of a file has got last: what `poll` compares with.
struct LastRead {
    /// At first the counter at `open`.
    value: Atomic<u32>,

    /// Whether a read that must not wait was told to come back when `poll` says so.
    owed: Atomic<bool>,
}

impl LastRead {
    fn new(value: u32) -> Self {
        Self {
            value: Atomic::new(value),
            owed: Atomic::new(false),
        }
    }

    /// Notes what a read returned.
    fn returned(&self, value: u32) {
        self.value.store(value, Relaxed);
        self.owed.store(false, Relaxed);
    }

    /// Notes that a read was put off where the counter is `value`, maybe for the sake of an ID
    /// that came without a new counter.
    fn put_off(&self, value: u32) {
        self.owed.store(true, Relaxed);
        // So that no read takes the short way, on which nothing is noted.
        self.value.store(!value, Relaxed);
    }

    /// Returns whether a read that returns `value` has nothing to note.
    #[inline(always)]
    fn is(&self, value: u32) -> bool {
        value == self.value.read_once()
    }

    /// Returns whether a read has something new to return, where the counter is `value`.
    fn is_new(&self, value: u32) -> bool {
        !self.is(value) || self.owed.load(Relaxed)
    }
}

/// An open file.
pub(crate) struct OpenFile {
    counter: Arc<Counter>,
    last: LastRead,
}

impl OpenFile {
    fn new(counter: Arc<Counter>) -> Self {
        let last = LastRead::new(counter.peek());
        Self { counter, last }
    }

    /// Returns the counter; if that would take more patience than there is, `poll` will say when to
    /// come back.
    fn next(&self, patience: Patience) -> Result<u32> {
        self.counter.read(patience).inspect_err(|&err| {
            if err == EAGAIN {
                self.last.put_off(self.counter.peek());
            }
        })
    }
}

/// What the files of `/dev/vmgenid` do. See `Documentation/vmgenid.rst` for what each call promises.
pub(crate) struct Operations;

impl FileOperations for Operations {
    type Data = Arc<Counter>;
    type Ptr = KBox<OpenFile>;

    const MODE: u16 = 0o444;

    fn open(counter: &Arc<Counter>) -> Result<KBox<OpenFile>> {
        // No barrier here: `misc_open()` holds a mutex under which the vmfork notifiers must not
        // be called.
        Ok(KBox::new(OpenFile::new(counter.clone()), GFP_KERNEL)?)
    }

    fn read(file: &OpenFile, nonblock: bool, mut buf: UserSliceWriter, pos: i64) -> Result<usize> {
        if !check_read(buf.len(), pos)? {
            return Ok(0);
        }
        let value = file.next(if nonblock {
            Patience::Brief
        } else {
            Patience::Full
        })?;
        buf.write(&value)?;
        file.last.returned(value);
        Ok(SIZE)
    }

    #[inline(always)]
    fn read_fast(file: &OpenFile, mut buf: UserSliceWriter, pos: i64) -> Option<Result<usize>> {
        if buf.len() != SIZE || pos != 0 {
            return None;
        }
        let value = file.counter.try_read().ok()?;
        if !file.last.is(value) {
            return None;
        }
        // As it was the last time: the user gets it, and that is all.
        Some(buf.write(&value).map(|()| SIZE))
    }

    fn read_iter(kiocb: Kiocb<'_, KBox<OpenFile>>, iov: &mut IovIterDest<'_>) -> Result<usize> {
        if !check_read(iov.len(), kiocb.ki_pos())? {
            return Ok(0);
        }
        let file = kiocb.file();
        let value = file.next(if kiocb.nowait() {
            Patience::None
        } else if kiocb.nonblock() {
            Patience::Brief
        } else {
            Patience::Full
        })?;
        if iov.copy_to_iter(&value.to_ne_bytes()) != SIZE {
            return Err(EFAULT);
        }
        file.last.returned(value);
        Ok(SIZE)
    }

    fn poll(file: &OpenFile, waiter: &Waiter<'_>) -> Ready {
        waiter.wait_for(file.counter.changed());
        match file.counter.read(Patience::Brief) {
            Ok(value) if file.last.is_new(value) => Ready::READ,
            Ok(_) | Err(EAGAIN) => Ready::NOT,
            Err(_) => Ready::GONE,
        }
    }

    fn mmap(file: &OpenFile, vma: &VmaNew) -> Result {
        file.counter.mmap(vma)
    }
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_node)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_read_whole_from_the_start() {
        assert_eq!(check_read(4, 0), Ok(true));
        for len in [1, 2, 3, 5, 8, 4096, usize::MAX] {
            assert_eq!(check_read(len, 0), Err(EINVAL));
        }
        for pos in [1, 4, -1, i64::MAX, i64::MIN] {
            assert_eq!(check_read(4, pos), Err(EINVAL));
        }
    }

    #[test]
    fn nothing_can_be_read_anywhere() {
        for pos in [0, 1, i64::MAX] {
            assert_eq!(check_read(0, pos), Ok(false));
        }
    }

    #[test]
    fn what_was_read_is_not_new() {
        let last = LastRead::new(42);
        assert!(!last.is_new(42));
        assert!(last.is_new(43));
        assert!(last.is_new(41));
        last.returned(43);
        assert!(!last.is_new(43));
        assert!(last.is_new(42));
    }

    #[test]
    fn a_read_that_was_put_off_is_owed() {
        let last = LastRead::new(42);
        last.put_off(42);
        // Whatever the counter is meanwhile, also what is not to be had the short way.
        for value in [0, 41, 42, 43, !42, u32::MAX] {
            assert!(last.is_new(value));
        }
        assert!(!last.is(42));
        last.returned(42);
        assert!(!last.is_new(42));
        assert!(last.is_new(43));
    }

    #[test]
    fn one_has_the_node() {
        // This or, where there is one, a device that the very same module is bound to.
        let claim = VMGENID.claim();
        assert!(VMGENID.claim().is_none());
        let ours = claim.is_some();
        drop(claim);
        assert_eq!(VMGENID.claim().is_some(), ours);
    }
}
