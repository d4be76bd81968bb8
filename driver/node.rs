// SPDX-License-Identifier: GPL-2.0

//! The device nodes, their files, and what happens to open files when the device is unbound.

use super::{
    counter::{
        self,
        Counter,
        LastRead, //
    },
    generation::Watched,
    kernel::{
        miscdevice::{
            FileOperations,
            Ready,
            Registration,
            Request,
            Waiter, //
        },
        mm::Area,
        rwonce::read_once, //
    },
    sysgenid::Reseeds, //
};
use kernel::{
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
    uaccess::UserSliceReader, //
};

/// The name of a node below `/dev`, which one device can have.
pub(crate) struct Name {
    path: &'static str,
    name: &'static CStr,
    /// Whether a [`Claim`] exists.
    claimed: Atomic<bool>,
}

/// `/dev/vmgenid`.
pub(crate) static VMGENID: Name = Name::new("/dev/vmgenid", c"vmgenid");

/// `/dev/sysgenid`.
pub(crate) static SYSGENID: Name = Name::new("/dev/sysgenid", c"sysgenid");

impl Name {
    const fn new(path: &'static str, name: &'static CStr) -> Self {
        Self {
            path,
            name,
            claimed: Atomic::new(false),
        }
    }

    /// Returns the path.
    pub(crate) fn path(&self) -> &'static str {
        self.path
    }

    /// Claims the name. `None`: Another device has it.
    pub(crate) fn claim(&'static self) -> Option<Claim> {
        // INVARIANT: Only one caller turns `false` to `true`, until the claim is dropped.
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

/// What the files of a node return.
pub(crate) enum Source {
    /// The generation counter: `/dev/vmgenid`.
    Counter(Counter),
    /// The number of reseeds: `/dev/sysgenid`.
    Reseeds(Arc<Reseeds>),
}

/// What the open files of a node use. It outlives an unbind until the last file is closed.
pub(crate) struct Files {
    generation: Arc<Watched>,
    source: Source,
    bound: Atomic<bool>,
}

impl Files {
    /// `ENODEV`: The device was unbound.
    #[inline(always)]
    fn check_bound(&self) -> Result {
        if read_once(&self.bound) {
            Ok(())
        } else {
            Err(ENODEV)
        }
    }
}

/// Has open files answer `ENODEV` when it is dropped, and wakes the processes that sleep in them.
struct Bound(Arc<Files>);

impl Drop for Bound {
    fn drop(&mut self) {
        let Files {
            generation,
            source,
            bound,
        } = &*self.0;
        bound.store(false, Relaxed);
        match source {
            // This takes the lock of the wait queue. A poller that was added before is woken; one
            // that is added later sees that the device is not bound.
            Source::Counter(_) => generation.handled().notify_all(),
            // The page does not change any more. A process that only looks at the page is told once,
            // so that it asks; after the reseed, if one is due. `count` takes the lock that a process
            // holds between its look at `bound` and its sleep.
            Source::Reseeds(reseeds) => {
                let _ = generation.apply_rule(true);
                reseeds.count();
            }
        }
    }
}

/// A registered node.
///
/// The order of the fields is that of the teardown. First the node goes, so that no process can open
/// it any more: `misc_deregister()` waits for processes that are in `open` just now. Then open files
/// answer `ENODEV`. Then another device can have the name. A call on an open file that began before
/// ends as it would have without an unbind.
#[pin_data]
pub(crate) struct Node {
    #[pin]
    _registration: Registration<Operations>,
    _bound: Bound,
    _claim: Claim,
}

impl Node {
    /// Makes the node.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, and those of `misc_register()`.
    pub(crate) fn new(
        claim: Claim,
        generation: Arc<Watched>,
        source: Source,
    ) -> Result<Pin<KBox<Self>>> {
        let files = Files {
            generation,
            source,
            bound: Atomic::new(true),
        };
        let files = Arc::new(files, GFP_KERNEL)?;
        KBox::try_pin_init(
            try_pin_init!(Self {
                _registration <- Registration::new(claim.0.name, files.clone()),
                _bound: Bound(files),
                _claim: claim,
            }? Error),
            GFP_KERNEL,
        )
    }
}

/// An open file.
pub(crate) struct OpenFile {
    files: Arc<Files>,
    /// What was returned last, for `/dev/sysgenid` what was acknowledged last.
    last: LastRead,
}

impl OpenFile {
    /// Returns what is there to read. With a counter this is the barrier.
    ///
    /// # Errors
    ///
    /// `ENODEV`: The device was unbound. And those of [`Watched::apply_rule`].
    #[inline(always)]
    fn read(&self, may_wait: bool) -> Result<u32> {
        let files = &*self.files;
        files.check_bound()?;
        match &files.source {
            Source::Counter(counter) => counter.read(|| files.generation.apply_rule(may_wait)),
            Source::Reseeds(reseeds) => self.next_reseed(reseeds, may_wait),
        }
    }

    #[inline(never)]
    fn next_reseed(&self, reseeds: &Reseeds, may_wait: bool) -> Result<u32> {
        self.files.generation.apply_rule(may_wait)?;
        reseeds.next(&self.last, may_wait, || self.files.check_bound())
    }
}

/// What the files do. See `Documentation/vmgenid.rst` for what each call promises.
pub(crate) struct Operations;

impl FileOperations for Operations {
    type Data = Arc<Files>;
    type Ptr = KBox<OpenFile>;

    const MODE: u16 = 0o444;

    fn open(files: &Arc<Files>) -> Result<KBox<OpenFile>> {
        // This is no barrier.
        let last = match &files.source {
            Source::Counter(counter) => LastRead::new(counter.load()),
            Source::Reseeds(reseeds) => reseeds.open(),
        };
        let files = files.clone();
        Ok(KBox::new(OpenFile { files, last }, GFP_KERNEL)?)
    }

    #[inline(always)]
    fn read(file: &OpenFile, request: Request) -> Result<Option<u32>> {
        if request.len != counter::SIZE || request.pos != 0 {
            match &file.files.source {
                _ if request.len == 0 => return Ok(None),
                // SysGenID takes any larger buffer, at any position.
                Source::Reseeds(_) if request.len >= counter::SIZE => (),
                _ => return Err(EINVAL),
            }
        }
        file.read(!request.nonblock).map(Some).inspect_err(|&err| {
            if let (EAGAIN, Source::Counter(_)) = (err, &file.files.source) {
                // The next read may return the same counter, if an ID came without a new one.
                file.last.put_off();
                file.files.generation.wake_when_applied();
            }
        })
    }

    #[inline(always)]
    fn returned(file: &OpenFile, value: u32) {
        // A count of reseeds is acknowledged by a write.
        if matches!(file.files.source, Source::Counter(_)) {
            file.last.returned(value);
        }
    }

    fn write(file: &OpenFile, mut buf: UserSliceReader) -> Result<usize> {
        let Source::Reseeds(reseeds) = &file.files.source else {
            return Err(EINVAL);
        };
        if buf.len() != counter::SIZE {
            // As SysGenID says it.
            return Err(ENOBUFS);
        }
        reseeds.acknowledge(&file.last, buf.read()?, || file.files.check_bound())?;
        Ok(counter::SIZE)
    }

    fn poll(file: &OpenFile, waiter: &Waiter<'_>) -> Ready {
        waiter.wait_for(match &file.files.source {
            Source::Counter(_) => file.files.generation.handled(),
            Source::Reseeds(reseeds) => reseeds.changed(),
        });
        match file.read(false) {
            Ok(value) if file.last.is_new(value) => Ready::READ,
            Ok(_) => Ready::NOT,
            Err(EAGAIN) => {
                file.files.generation.wake_when_applied();
                Ready::NOT
            }
            Err(_) => Ready::GONE,
        }
    }

    fn mmap(file: &OpenFile, area: Area<'_>) -> Result {
        file.files.check_bound()?;
        match &file.files.source {
            Source::Counter(counter) => area.map_reserved(counter.page()),
            Source::Reseeds(reseeds) => area.map_shared(reseeds.page()),
        }
    }
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_node)]
mod tests {
    use super::*;

    #[test]
    fn one_device_has_the_name() {
        // This test has it or, where there is a device, that device.
        let claim = VMGENID.claim();
        assert!(VMGENID.claim().is_none());
        let ours = claim.is_some();
        drop(claim);
        assert_eq!(VMGENID.claim().is_some(), ours);
    }
}
