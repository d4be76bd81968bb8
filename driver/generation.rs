// SPDX-License-Identifier: GPL-2.0

//! A generation ID that is watched, and what is done when it changes.

use super::{
    id::{
        GenerationId,
        Id, //
    },
    kernel::{
        acpi,
        irq,
        memremap::Range,
        pm,
        sched::Patience,
        workqueue, //
    },
    rule::{
        Reseeder,
        Rule, //
    },
    sysgenid::Reseeds, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    irq::ThreadedIrqReturn,
    new_mutex,
    new_poll_condvar,
    new_work,
    prelude::*,
    sync::{
        poll::PollCondVar,
        Arc,
        ArcBorrow,
        Mutex, //
    },
    workqueue::{
        impl_has_work,
        Work,
        WorkItem, //
    }, //
};

/// The calls of the vmfork notifiers that are due, one for each published ID.
struct Due {
    /// The ID that was published last.
    id: Id,
    calls: usize,
}

/// The work that applies the rule for a caller that could not wait.
const RULE: u64 = 0;

/// The work that calls the vmfork notifiers. They may sleep for long: that of WireGuard takes
/// `rtnl_lock`. Nobody waits for this work except the end of the module.
const NOTIFIERS: u64 = 1;

/// A generation ID, the rule for it, and who is told about a reseed.
#[pin_data]
pub(crate) struct Generation {
    id: GenerationId,
    #[pin]
    rule: Rule,
    reseeder: Arc<Reseeder>,

    /// Where reseeds are counted, if they are.
    reseeds: Option<Arc<Reseeds>>,

    /// Pollers wait here. They are woken after the rule was applied.
    #[pin]
    handled: PollCondVar,
    #[pin]
    rule_work: Work<Generation, RULE>,

    #[pin]
    due: Mutex<Due>,
    #[pin]
    notifiers_work: Work<Generation, NOTIFIERS>,
}

impl_has_work! {
    impl HasWork<Self, 0> for Generation { self.rule_work }
    impl HasWork<Self, 1> for Generation { self.notifiers_work }
}

impl Generation {
    /// Maps the ID in `range`. `reseeds`: where to count the reseeds with this ID.
    ///
    /// # Errors
    ///
    /// Those of [`GenerationId::new`], and `ENOMEM`.
    pub(crate) fn new(
        range: Range,
        reseeder: Arc<Reseeder>,
        reseeds: Option<Arc<Reseeds>>,
    ) -> Result<Arc<Self>> {
        let id = GenerationId::new(range)?;
        let first = id.load();
        Arc::pin_init(
            pin_init!(Self {
                id,
                rule <- Rule::new(first),
                reseeder,
                reseeds,
                handled <- new_poll_condvar!("Generation::handled"),
                rule_work <- new_work!("Generation::rule_work"),
                due <- new_mutex!(Due { id: [0; 2], calls: 0 }, "Generation::due"),
                notifiers_work <- new_work!("Generation::notifiers_work"),
            }),
            GFP_KERNEL,
        )
    }

    /// Applies the rule now, at each notification of `dev`, and when the machine was suspended or
    /// hibernated, until `dev` is unbound.
    ///
    /// # Errors
    ///
    /// Those of [`acpi::register_notify_handler`] and [`pm::register`].
    pub(crate) fn watch(self: &Arc<Self>, dev: &Device<Bound>) -> Result {
        acpi::register_notify_handler(dev, self.clone())?;
        pm::register(dev, self.clone())?;
        // A later change is notified. An earlier one is handled here.
        self.as_arc_borrow().handle_change();
        Ok(())
    }

    /// Returns where the ID is.
    pub(crate) fn range(&self) -> &Range {
        self.id.range()
    }

    /// Returns where the reseeds with this ID are counted, if they are.
    pub(crate) fn reseeds(&self) -> Option<&Arc<Reseeds>> {
        self.reseeds.as_ref()
    }

    /// Returns where to wait until a change has been handled.
    pub(crate) fn handled(&self) -> &PollCondVar {
        &self.handled
    }

    /// Returns whether the ID in memory is published.
    #[inline(always)]
    pub(crate) fn is_published(&self) -> bool {
        self.rule.published().is(self.id.load())
    }

    /// Applies the reseed rule. When this returns `Ok`, the ID that was in memory at the call is
    /// published. Where it is published already this is four loads.
    ///
    /// # Errors
    ///
    /// `EAGAIN`: This takes longer than `patience` allows.
    #[inline(always)]
    pub(crate) fn apply_rule(self: ArcBorrow<'_, Self>, patience: Patience) -> Result {
        if self.is_published() {
            return Ok(());
        }
        self.reseed(patience)
    }

    #[cold]
    #[inline(never)]
    fn reseed(self: ArcBorrow<'_, Self>, mut patience: Patience) -> Result {
        self.rule.apply(
            &mut patience,
            || self.id.load(),
            |id, patience| self.reseeder.reseed(id, patience),
            |id| self.published(id),
        )
    }

    /// Has a work item apply the rule and wake the pollers.
    #[cold]
    pub(crate) fn apply_rule_later(self: ArcBorrow<'_, Self>) {
        workqueue::enqueue::<_, RULE>(self.into());
    }

    /// Tells about a reseed with `id`.
    fn published(self: ArcBorrow<'_, Self>, id: Id) {
        if let Some(reseeds) = &self.reseeds {
            reseeds.count();
        }
        if self.reseeder.notifiers().is_some() {
            {
                let mut due = self.due.lock();
                due.id = id;
                due.calls += 1;
            }
            workqueue::enqueue::<_, NOTIFIERS>(self.into());
        }
    }

    /// Applies the rule, and wakes the pollers.
    fn handle_change(self: ArcBorrow<'_, Self>) {
        // Without an end to its patience, a caller gets no error.
        let _ = self.apply_rule(Patience::endless());
        self.handled.notify_all();
    }

    /// Returns the next ID that the vmfork notifiers are to be called for.
    fn next_due(&self) -> Option<Id> {
        let mut due = self.due.lock();
        due.calls = due.calls.checked_sub(1)?;
        Some(due.id)
    }

    /// Blocks until no work is left. Nobody may apply the rule any more.
    pub(crate) fn finish(&self) {
        workqueue::flush::<_, RULE>(self);
        workqueue::flush::<_, NOTIFIERS>(self);
    }
}

impl WorkItem<RULE> for Generation {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.as_arc_borrow().handle_change();
    }
}

impl WorkItem<NOTIFIERS> for Generation {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        while let (Some(call), Some(id)) = (this.reseeder.notifiers(), this.next_due()) {
            call(id.as_bytes());
        }
    }
}

impl acpi::NotifyHandler for Generation {
    fn notify(self: ArcBorrow<'_, Self>, _event: u32) {
        self.handle_change();
    }
}

impl irq::SciHandler for Generation {
    fn is_needed(&self) -> bool {
        !self.is_published()
    }

    fn handle(self: ArcBorrow<'_, Self>) -> ThreadedIrqReturn {
        match self.apply_rule(Patience::brief()) {
            Ok(()) => ThreadedIrqReturn::Handled,
            // The notification will do. The kernel looks for interrupts that nobody handles: this
            // one may be another's.
            Err(_) => ThreadedIrqReturn::None,
        }
    }
}

impl pm::Resume for Generation {
    fn resumed(self: ArcBorrow<'_, Self>, hibernated: bool) {
        if hibernated {
            // Where the ID is in ACPI NVS memory, the kernel has restored the old one. It has mixed
            // the time and the cycle counter into the pool, but does not reseed.
            self.rule.exclusively(|| {
                let _ = self
                    .reseeder
                    .reseed(self.id.load(), &mut Patience::endless());
            });
        }
        self.handle_change();
    }
}
