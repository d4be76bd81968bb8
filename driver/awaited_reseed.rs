// SPDX-License-Identifier: GPL-2.0

//! The reseed rule, where the kernel's own driver has the device, and reseeds.
//!
//! All that this module can do is to wait until that is done, and to know it when it is. The
//! built-in driver (`drivers/virt/vmgenid.c`) acts on the ACPI notification: it copies the ID,
//! compares it with the one that it copied last, and, if they differ, reseeds the kernel and calls
//! the vmfork notifiers. None of these tells which ID it was. A call of a notifier alone is not
//! enough: it may be the end of what was begun before a snapshot, with the ID of then, and all of
//! the clones go through that.
//!
//! But handlers that were installed last are called first. So what ours sees in memory, the built-in
//! one sees after it, in the same work item: that or something newer. When all work items of that
//! moment have ended, and the ID in memory is still the same, then that is the one that the built-in
//! driver has, and whoever found that to be new has reseeded. (Unless nobody has called the vmfork
//! notifiers: then there is no built-in driver at work.)
//!
//! So the built-in driver has to be bound when this module is, and to stay so. That is what is there
//! after boot: it is built in. Who unbinds it has mainline's crash at the next notification.

use super::{
    generation_id::{
        GenerationId,
        Id,
        Patience,
        Published, //
    },
    kernel::{
        acpi,
        random,
        vmfork,
        workqueue::OwnedQueue, //
    }, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    new_mutex,
    new_work,
    prelude::*,
    sync::{
        Arc,
        CondVarTimeoutResult,
        Mutex, //
    },
    time::msecs_to_jiffies,
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

/// What is left where there is no generation counter.
pub(crate) const WITHOUT_COUNTER: &str = "the kernel's own driver reseeds";

/// How long a read waits for the built-in driver, in milliseconds.
const TIMEOUT: u32 = 1000;

/// The last ID that the built-in driver is known to have reseeded the kernel with.
#[pin_data]
pub(crate) struct Rule {
    /// Written under `progress`.
    published: Published,

    #[pin]
    progress: Mutex<Progress>,
}

/// What is known about the next one.
struct Progress {
    /// What was in memory when the last notification came, before the built-in driver's turn.
    noted: Id,

    /// How many times something was noted, and how many of these times are over: the kernel was
    /// reseeded with what was noted then, or with something newer.
    notes: u64,
    settled: u64,

    /// Whether the kernel was reseeded since the last ID was published.
    reseeded: bool,

    /// Whether a read has complained that it was not.
    overdue: bool,

    /// Whether notifications are noted: the device is bound.
    watched: bool,
}

impl Progress {
    fn new(first: Id) -> Self {
        Self {
            noted: first,
            notes: 0,
            settled: 0,
            reseeded: false,
            overdue: false,
            watched: false,
        }
    }
}

impl Rule {
    /// `first` is the built-in driver's concern.
    pub(super) fn new(first: Id) -> impl PinInit<Self> {
        pin_init!(Self {
            published: Published::new(first),
            progress <- new_mutex!(Progress::new(first), "Rule::progress"),
        })
    }

    /// Returns whether the kernel was reseeded with `id` last. If so, what follows comes after
    /// that reseed.
    #[inline(always)]
    pub(super) fn is_published(&self, id: Id) -> bool {
        self.published.is(id)
    }

    /// Takes note that a notification is being handled, and that the built-in driver's turn is yet
    /// to come. Returns what is in memory.
    fn note(&self, look: impl FnOnce() -> Id) -> Id {
        let mut progress = self.progress.lock();
        // Under the lock: it is no older than what anybody saw who has counted the notes before.
        progress.noted = look();
        progress.notes += 1;
        progress.noted
    }

    /// Takes note that the kernel was reseeded, with whatever.
    fn reseeded(&self) {
        self.progress.lock().reseeded = true;
    }

    /// Publishes the ID that was noted last if `handled()`, which waits until all is done that was
    /// under way, leaves no doubt about it. Returns whether it did.
    fn settle(&self, look: impl FnOnce() -> Id, handled: impl FnOnce()) -> bool {
        let (noted, notes) = {
            let progress = self.progress.lock();
            (progress.noted, progress.notes)
        };
        handled();

        let mut progress = self.progress.lock();
        if !progress.reseeded {
            return false;
        }
        progress.settled = notes;
        // In memory there is another one by now: its own notification is still to come.
        if look() != noted || self.is_published(noted) {
            return false;
        }
        progress.reseeded = false;
        progress.overdue = false;
        self.published.set(noted);
        true
    }

    /// Takes what is in memory as published, without a proof. Returns whether it is another one
    /// than before.
    fn start(&self, look: impl FnOnce() -> Id) -> bool {
        let mut progress = self.progress.lock();
        // Under the lock: what comes later is settled later.
        let id = look();
        let differs = !self.is_published(id);
        *progress = Progress {
            notes: progress.notes,
            settled: progress.settled,
            watched: true,
            ..Progress::new(id)
        };
        self.published.set(id);
        differs
    }

    /// Nobody takes notes any more.
    fn end(&self) {
        self.progress.lock().watched = false;
    }
}

impl GenerationId {
    /// Waits until the built-in driver has reseeded the kernel.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: the caller has not [`Patience::Full`].
    /// - `EINTR`: a signal came.
    /// - `ENODEV`: the device was unbound meanwhile.
    /// - `ETIMEDOUT`: it was not done within a second.
    #[cold]
    #[inline(never)]
    pub(super) fn reseed(&self, patience: Patience) -> Result {
        if patience != Patience::Full {
            return Err(EAGAIN);
        }

        let mut progress = self.rule.progress.lock();
        let mut left = msecs_to_jiffies(TIMEOUT);
        // What is noted from now on is what the caller saw, or newer: in a storm of changes there may
        // always be another one in memory.
        let notes = progress.notes;
        while !self.is_reseeded() && progress.settled <= notes {
            if !progress.watched {
                return Err(ENODEV);
            }
            let waited = self
                .notified()
                .wait_interruptible_timeout(&mut progress, left);
            left = match waited {
                CondVarTimeoutResult::Woken { jiffies } => jiffies,
                // Not to be restarted: then a timer's signals would put the end off for ever.
                CondVarTimeoutResult::Signal { .. } => return Err(EINTR),
                CondVarTimeoutResult::Timeout if self.is_reseeded() || progress.settled > notes => {
                    break
                }
                CondVarTimeoutResult::Timeout => {
                    if !progress.overdue {
                        progress.overdue = true;
                        pr_warn!(
                            "the generation ID has changed, but for a second the kernel was not reseeded: reads fail until it is\n"
                        );
                    }
                    return Err(ETIMEDOUT);
                }
            };
        }
        Ok(())
    }

    /// There is nothing to be done before the notification.
    pub(super) fn hasten(&self, _patience: Patience) -> Result {
        Ok(())
    }

    fn settle(&self) {
        let published = self
            .rule
            .settle(|| self.look(), acpi::wait_for_notifications);
        if published {
            if let Some(reseeds) = self.reseeds() {
                reseeds.count();
            }
        }
        self.notified().notify_all();
    }
}

/// What is done when a notification has been noted.
#[pin_data]
struct Settling {
    id: Arc<GenerationId>,
    #[pin]
    work: Work<Settling>,
}

kernel::impl_has_work! {
    impl HasWork<Self> for Settling { self.work }
}

impl WorkItem for Settling {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.id.settle();
    }
}

impl vmfork::Notifier for GenerationId {
    fn reseeded(&self) {
        self.rule.reseeded();
    }
}

/// What is called before the built-in driver.
struct Watch {
    settling: Arc<Settling>,
    // What is in there has been done when this is dropped: no code of ours runs after an unbind.
    queue: OwnedQueue,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let id = &self.settling.id;
        id.rule.end();
        id.notified().notify_all();
    }
}

impl acpi::NotifyHandler for Watch {
    fn notify(&self, _event: u32) {
        let GenerationId { rule, .. } = &*self.settling.id;
        let look = || self.settling.id.look();
        if rule.is_published(look()) {
            self.settling.id.notified().notify_all();
            return;
        }

        let id = rule.note(look);
        // The built-in driver takes no lock. Where several notifications are handled at once, one
        // of them may reseed with what another one has copied before. All reseed with this.
        random::add_device_randomness(id.as_bytes());
        // If it is queued already it has yet to begin, and sees what was noted.
        let _ = self.queue.enqueue(self.settling.clone());
    }
}

/// Follows what the built-in driver does about `dev`'s notifications, until `dev` is unbound.
///
/// What came before is left to the built-in driver: it is taken as done.
///
/// # Errors
///
/// Those of [`acpi::register_notify_handler`], [`vmfork::register_notifier`] and
/// [`OwnedQueue::new`].
pub(crate) fn watch(dev: &Device<Bound>, id: &Arc<GenerationId>) -> Result {
    vmfork::register_notifier(dev, id.clone())?;
    let settling = Arc::pin_init(
        pin_init!(Settling {
            id: id.clone(),
            work <- new_work!("Settling::work"),
        }),
        GFP_KERNEL,
    )?;
    let queue = OwnedQueue::new(c"vmgenctr")?;
    let watch = Arc::new(Watch { settling, queue }, GFP_KERNEL)?;
    acpi::register_notify_handler(dev, watch)?;

    // No change after this is missed.
    if id.rule.start(|| id.look()) {
        if let Some(reseeds) = id.reseeds() {
            reseeds.count();
        }
    }
    Ok(())
}

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_reseed_rule)]
mod tests {
    use super::*;
    use pin_init::stack_pin_init;

    const A: Id = [0x1111, 0xaaaa];
    const B: Id = [0x2222, 0xbbbb];
    const C: Id = [0x3333, 0xcccc];

    #[test]
    fn the_first_id_is_no_change() {
        stack_pin_init!(let rule = Rule::new(A));
        assert!(rule.is_published(A));
        assert!(!rule.settle(|| A, || rule.reseeded()));
        assert!(rule.is_published(A));
    }

    #[test]
    fn an_id_is_published_when_its_notification_was_handled() {
        stack_pin_init!(let rule = Rule::new(A));
        rule.note(|| B);
        let mut early = true;
        assert!(rule.settle(
            || B,
            || {
                rule.reseeded();
                early = rule.is_published(B);
            }
        ));
        assert!(!early);
        assert!(rule.is_published(B));
    }

    #[test]
    fn without_a_reseed_nothing_is_published() {
        stack_pin_init!(let rule = Rule::new(A));
        rule.note(|| B);
        assert!(!rule.settle(|| B, || ()));
        assert!(!rule.is_published(B));
        // One reseed is for one ID.
        rule.reseeded();
        assert!(rule.settle(|| B, || ()));
        rule.note(|| C);
        assert!(!rule.settle(|| C, || ()));
        assert!(!rule.is_published(C));
    }

    #[test]
    fn a_reseed_of_before_the_notification_is_not_enough() {
        stack_pin_init!(let rule = Rule::new(A));
        // What a clone goes through whose snapshot was taken inside of the handling of B.
        rule.note(|| B);
        assert!(!rule.settle(|| C, || rule.reseeded()));
        assert!(!rule.is_published(B));
        assert!(!rule.is_published(C));
        rule.note(|| C);
        assert!(rule.settle(|| C, || rule.reseeded()));
        assert!(rule.is_published(C));
    }

    #[test]
    fn one_that_was_copied_for_another_is_published_by_its_own_notification() {
        stack_pin_init!(let rule = Rule::new(A));
        // The built-in driver has found C already when it was told of B.
        rule.note(|| B);
        assert!(!rule.settle(|| C, || rule.reseeded()));
        // So it has nothing to do when it is told of C.
        rule.note(|| C);
        assert!(rule.settle(|| C, || ()));
        assert!(rule.is_published(C));
    }

    #[test]
    fn a_notification_is_over_though_the_id_has_changed_again() {
        stack_pin_init!(let rule = Rule::new(A));
        let over = || {
            let progress = rule.progress.lock();
            (progress.notes, progress.settled)
        };
        rule.note(|| B);
        assert!(!rule.settle(|| C, || ()));
        assert_eq!(over(), (1, 0));
        assert!(!rule.settle(|| C, || rule.reseeded()));
        assert_eq!(over(), (1, 1));
        // What is noted while the last one is waited for is not over with that.
        rule.note(|| C);
        assert!(!rule.settle(
            || A,
            || {
                rule.note(|| B);
            }
        ));
        assert_eq!(over(), (3, 2));
    }

    #[test]
    fn what_is_noted_later_is_for_later() {
        stack_pin_init!(let rule = Rule::new(A));
        rule.note(|| B);
        assert!(!rule.settle(
            || C,
            || {
                rule.reseeded();
                rule.note(|| C);
            }
        ));
        assert!(!rule.is_published(C));
        assert!(rule.settle(|| C, || ()));
    }

    #[test]
    fn each_half_is_looked_at() {
        stack_pin_init!(let rule = Rule::new(A));
        assert!(!rule.is_published([A[0], B[1]]));
        assert!(!rule.is_published([B[0], A[1]]));
        rule.note(|| B);
        rule.reseeded();
        assert!(!rule.settle(|| [B[0], A[1]], || ()));
    }

    #[test]
    fn what_came_before_is_taken_as_done() {
        stack_pin_init!(let rule = Rule::new(A));
        assert!(!rule.start(|| A));
        assert!(rule.start(|| B));
        assert!(rule.is_published(B));
        assert!(!rule.is_published(A));
    }
}
