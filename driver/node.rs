// SPDX-License-Identifier: GPL-2.0

//! The device nodes, their files, and the effect of an unbind on open files.

use super::{
    counter::{
        self,
        Counter,
        LastRead,
        Layout, //
    },
    generation::Watched,
    kernel::{
        miscdevice::{
            FileOperations,
            Registration,
            Request, //
        },
        mm::Area, //
    },
    prelude::*,
    sysgenid::Reseeds, //
};
use kernel::iov::IovIterSource;

/// The name of a node below `/dev`. One device at a time can have it.
struct Name {
    name: &'static CStr,
    path: &'static str,
    /// Whether a [`Claim`] exists.
    claimed: Atomic<bool>,
}

/// `/dev/vmgenid`.
static VMGENID: Name = Name::new(c"vmgenid", "/dev/vmgenid");

/// `/dev/sysgenid`.
static SYSGENID: Name = Name::new(c"sysgenid", "/dev/sysgenid");

impl Name {
    const fn new(name: &'static CStr, path: &'static str) -> Self {
        Self {
            name,
            path,
            claimed: Atomic::new(false),
        }
    }

    /// Claims the name. Returns `None` if another device has it.
    fn claim(&'static self) -> Option<Claim> {
        // INVARIANT: Only one caller changes `false` to `true`, until the claim is dropped.
        self.claimed
            .cmpxchg(false, true, Full)
            .ok()
            .map(|_| Claim(self))
    }
}

/// The exclusive right to register a node of this name.
///
/// # Invariants
///
/// At most one exists at a time for each name.
struct Claim(&'static Name);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.claimed.store(false, Release);
    }
}

/// The source of the value that the files of a node return.
pub(crate) enum Source {
    /// The generation counter: `/dev/vmgenid`.
    Counter(Counter),
    /// The number of reseeds: `/dev/sysgenid`.
    Reseeds(Arc<Reseeds>),
}

impl Source {
    fn name(&self) -> &'static Name {
        match self {
            Self::Counter(_) => &VMGENID,
            Self::Reseeds(_) => &SYSGENID,
        }
    }

    /// Returns the path of the node.
    pub(crate) fn path(&self) -> &'static str {
        self.name().path
    }
}

/// The data that the open files of a node share. It outlives an unbind as long as a file is open.
pub(crate) struct Files {
    generation: Arc<Watched>,
    source: Source,
    bound: Atomic<bool>,
}

impl Files {
    /// Returns `ENODEV` if the device was unbound.
    fn check_bound(&self) -> Result {
        if read_once(&self.bound) {
            Ok(())
        } else {
            Err(ENODEV)
        }
    }
}

/// Its drop makes calls on open files return `ENODEV`, and wakes processes that sleep in them.
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
            // This takes the lock of the wait queue. A poller that was added before is woken. A
            // poller that is added later sees that the device is not bound.
            Source::Counter(_) => generation.handled.notify_all(),
            // The count changes once more, so that a process that only maps the page calls the
            // driver, and gets `ENODEV`. A reseed that is due comes first. `increment` takes the
            // lock under which a reader checks `bound` and goes to sleep.
            Source::Reseeds(reseeds) => {
                let _ = generation.apply_rule(true);
                reseeds.increment();
            }
        }
    }
}

/// A registered node.
///
/// The fields are dropped in this order. `misc_deregister()` removes the node, and waits for calls
/// of `open`. Then calls on open files return `ENODEV`. Then another device can claim the name. A
/// call on an open file that has passed its check before ends as without an unbind.
#[pin_data]
pub(crate) struct Node {
    #[pin]
    _registration: Registration<OpenFile>,
    _bound: Bound,
    _claim: Claim,
}

impl Node {
    /// Registers the node of `source`.
    ///
    /// # Errors
    ///
    /// `EEXIST`: Another device has the node. And `ENOMEM`, and those of `misc_register()`.
    pub(crate) fn new(generation: Arc<Watched>, source: Source) -> Result<Pin<KBox<Self>>> {
        let claim = source.name().claim().ok_or(EEXIST)?;
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
    /// The value that was returned last; for `/dev/sysgenid`, the count that was acknowledged last.
    last: LastRead,
}

impl OpenFile {
    /// Applies the rule, and returns the value for `read`. For the counter this is the barrier.
    ///
    /// Where the rule takes longer than the caller may wait, the pollers are woken later, and see
    /// an event if `is_read`.
    ///
    /// # Errors
    ///
    /// `ENODEV`: The device was unbound. And those of [`Counter::read`], [`Watched::apply_rule`]
    /// and [`Reseeds::next`].
    #[inline(always)]
    fn value(&self, may_wait: impl FnOnce() -> bool, is_read: bool) -> Result<u32> {
        let files: &Files = &self.files;
        if let Source::Counter(counter) = &files.source {
            // Also where VMClock's page is being changed: nothing is due.
            let unchanged = counter.read_unchanged(&self.last, || files.generation.is_published());
            if let Some(value) = unchanged.filter(|_| read_once(&files.bound)) {
                return Ok(value);
            }
        }
        self.changed_value(may_wait(), is_read)
    }

    #[cold]
    #[inline(never)]
    fn changed_value(&self, may_wait: bool, is_read: bool) -> Result<u32> {
        let Files {
            generation, source, ..
        } = &*self.files;
        self.files.check_bound()?;

        let rule = || generation.apply_rule(may_wait);
        let value = match source {
            Source::Counter(counter) => counter.read(may_wait, rule),
            Source::Reseeds(_) => rule().map(|()| 0),
        };
        if value == Err(EAGAIN) {
            // The next read may return the same counter, if the ID has changed without it.
            if is_read && matches!(source, Source::Counter(_)) {
                self.last.put_off();
            }
            generation.wake_when_applied();
        }
        let value = value?;

        match source {
            Source::Counter(_) => Ok(value),
            Source::Reseeds(reseeds) => {
                reseeds.next(&self.last, may_wait, || self.files.check_bound())
            }
        }
    }
}

/// The file operations of both nodes. `Documentation/vmgenid.rst` documents each call.
impl FileOperations for OpenFile {
    type Data = Arc<Files>;

    const MODE: u16 = 0o444;

    fn open(files: &Arc<Files>) -> Result<KBox<Self>> {
        // This does not apply the rule: `open` is not a barrier.
        let last = match &files.source {
            Source::Counter(counter) => LastRead::new(counter.load(true)?),
            Source::Reseeds(reseeds) => reseeds.open(),
        };
        let files = files.clone();
        Ok(KBox::new(Self { files, last }, GFP_KERNEL)?)
    }

    #[inline(always)]
    fn read(&self, request: Request<'_>) -> Result<Option<u32>> {
        if request.len != counter::SIZE || request.pos != 0 {
            match &self.files.source {
                _ if request.len == 0 => return Ok(None),
                // SysGenID accepts any larger buffer, at any position.
                Source::Reseeds(_) if request.len >= counter::SIZE => (),
                _ => return Err(EINVAL),
            }
        }
        self.value(|| request.may_wait(), true).map(Some)
    }

    #[inline(always)]
    fn returned(&self, value: u32) {
        // A process acknowledges a count of reseeds by a write.
        if self.last.is_new(value) && matches!(self.files.source, Source::Counter(_)) {
            self.last.returned(value);
        }
    }

    fn write(&self, data: &mut IovIterSource<'_>) -> Result<usize> {
        let Source::Reseeds(reseeds) = &self.files.source else {
            return Err(EINVAL);
        };
        let mut count = [0; counter::SIZE];
        if data.len() != count.len() {
            // The error of SysGenID.
            return Err(ENOBUFS);
        }
        if data.copy_from_iter(&mut count) != count.len() {
            return Err(EFAULT);
        }
        let count = u32::from_ne_bytes(count);
        reseeds.acknowledge(&self.last, count, || self.files.check_bound())?;
        Ok(counter::SIZE)
    }

    fn poll(&self, wait_for: impl FnOnce(&PollCondVar)) -> Result<bool> {
        wait_for(match &self.files.source {
            Source::Counter(_) => &self.files.generation.handled,
            Source::Reseeds(reseeds) => &reseeds.changed,
        });
        match self.value(|| false, false) {
            Ok(value) => Ok(self.last.is_new(value)),
            Err(EAGAIN) => Ok(false),
            Err(err) => Err(err),
        }
    }

    fn mmap(&self, area: Area<'_>) -> Result {
        self.files.check_bound()?;
        match &self.files.source {
            Source::Counter(counter) => match counter.layout {
                Layout::Word => area.map_reserved(&counter.page, 0),
                // A process that expects the counter at offset 0 does not find it there.
                Layout::VmClock if area.is_page(0) => Err(ENODEV),
                Layout::VmClock => area.map_reserved(&counter.page, 1),
            },
            Source::Reseeds(reseeds) => area.map_shared(&reseeds.page),
        }
    }
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_node)]
mod tests {
    use super::*;

    #[test]
    fn one_device_has_the_name() {
        // Either this test has the name or, if a device is bound, that device.
        let claim = VMGENID.claim();
        assert!(VMGENID.claim().is_none());
        let ours = claim.is_some();
        drop(claim);
        assert_eq!(VMGENID.claim().is_some(), ours);
    }
}
