// SPDX-License-Identifier: GPL-2.0

//! The device node, `/dev/vmgenid`.

use super::{
    counter::{
        Binding,
        Counter, //
    },
    kernel::miscdevice::{
        FileOperations,
        Registration, //
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
            Release, //
        },
        Arc,
        ArcBorrow, //
    },
    uaccess::UserSliceWriter, //
};

/// The name of the node below `/dev`.
pub(crate) const NAME: &CStr = c"vmgenid";

/// Whether a [`Claim`] exists.
static CLAIMED: Atomic<bool> = Atomic::new(false);

/// The right to have the node.
///
/// # Invariants
///
/// At most one exists at a time.
pub(crate) struct Claim(());

impl Claim {
    /// Claims the node. `None`: it belongs to another device.
    pub(crate) fn take() -> Option<Self> {
        // INVARIANT: Only one caller turns `false` to `true`, until a claim is dropped.
        CLAIMED.cmpxchg(false, true, Full).ok().map(|_| Self(()))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        CLAIMED.store(false, Release);
    }
}

/// The registered node.
///
/// The order of the fields is that of the teardown: the node goes, so that nobody opens it any
/// more; open files are told; then the name is free for another device.
#[pin_data]
pub(crate) struct Node {
    #[pin]
    _registration: Registration<Operations>,
    _binding: Binding,
    _claim: Claim,
}

impl Node {
    /// Makes the node for `counter`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; those of `misc_register()`.
    pub(crate) fn new(claim: Claim, counter: Arc<Counter>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _registration <- Registration::new(NAME, counter.clone()),
            _binding: Binding::new(counter),
            _claim: claim,
        })
    }
}

/// The size of the counter, in bytes: the only size that can be read.
const SIZE: usize = size_of::<u32>();

/// Checks a read of `len` bytes at `pos`. `false`: there is nothing to do.
#[inline]
fn check_read(len: usize, pos: i64) -> Result<bool> {
    match (len, pos) {
        (SIZE, 0) => Ok(true),
        (0, _) => Ok(false),
        _ => Err(EINVAL),
    }
}

/// What the node's files do. See `Documentation/vmgenid.rst` for what each call promises.
struct Operations;

impl FileOperations for Operations {
    type Data = Arc<Counter>;
    type Ptr = Arc<Counter>;

    const MODE: u16 = 0o444;

    fn open(counter: &Arc<Counter>) -> Result<Arc<Counter>> {
        // No barrier here: `misc_open()` holds a mutex under which the vmfork notifiers must not
        // be called.
        Ok(counter.clone())
    }

    fn read(counter: ArcBorrow<'_, Counter>, mut buf: UserSliceWriter, pos: i64) -> Result<usize> {
        if !check_read(buf.len(), pos)? {
            return Ok(0);
        }
        buf.write(&counter.read()?)?;
        Ok(SIZE)
    }

    fn read_iter(kiocb: Kiocb<'_, Arc<Counter>>, iov: &mut IovIterDest<'_>) -> Result<usize> {
        if !check_read(iov.len(), kiocb.ki_pos())? {
            return Ok(0);
        }
        let value = kiocb.file().read()?;
        match iov.copy_to_iter(&value.to_ne_bytes()) {
            SIZE => Ok(SIZE),
            _ => Err(EFAULT),
        }
    }

    fn mmap(counter: ArcBorrow<'_, Counter>, vma: &VmaNew) -> Result {
        counter.mmap(vma)
    }
}
