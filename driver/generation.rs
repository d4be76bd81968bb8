// SPDX-License-Identifier: GPL-2.0

//! A generation ID that is watched, and what is done when it changes.

use super::{
    id::{
        GenerationId,
        Id,
        Published, //
    },
    kernel::{
        acpi,
        irq,
        kthread::{
            Job,
            Priority,
            Work,
            Worker, //
        },
        memremap::Range,
        pm, //
    },
    notifiers::Notifiers,
    rule::{
        self,
        Reseeder, //
    },
    sysgenid::Reseeds, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    new_poll_condvar,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        poll::PollCondVar,
        Arc, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// What all generations of the module share.
pub(crate) struct Shared {
    reseeder: Reseeder,

    /// The thread that applies the rule.
    worker: Arc<Worker>,

    /// `None`: The reseed itself or the built-in driver calls them.
    notifiers: Option<Arc<Notifiers>>,
}

impl Shared {
    /// Opens `/dev/random`, and starts the threads.
    ///
    /// # Errors
    ///
    /// Those of [`Reseeder::new`] and [`Worker::new`], and `ENOMEM`.
    pub(crate) fn new() -> Result<Arc<Self>> {
        let reseeder = Reseeder::new()?;
        let shared = Self {
            worker: Worker::new(crate::NAME, Priority::Interrupt)?,
            notifiers: reseeder.notifiers().map(Notifiers::start).transpose()?,
            reseeder,
        };
        Ok(Arc::new(shared, GFP_KERNEL)?)
    }
}

/// A generation ID, and who is told about a reseed with it.
#[pin_data]
pub(crate) struct Generation {
    id: GenerationId,

    /// Written by the driver's thread only.
    published: Published,
    shared: Arc<Shared>,

    /// Where reseeds are counted, if they are.
    reseeds: Option<Arc<Reseeds>>,

    /// Pollers wait here until a notification was handled.
    #[pin]
    handled: PollCondVar,

    /// Whether the pollers are to be woken when the rule was applied next.
    awaited: Atomic<bool>,

    /// Whether to reseed even with the same ID.
    resumed: Atomic<bool>,

    /// Whether the last reseed failed.
    failed: Atomic<bool>,
}

/// A [`Generation`] to which the driver's thread applies the rule.
pub(crate) type Watched = Work<Generation>;

impl Job for Generation {
    /// Applies the rule.
    fn run(&self) {
        if self.resumed.xchg(false, Full) && matches!(self.shared.reseeder, Reseeder::DevRandom(_))
        {
            let _ = self.shared.reseeder.reseed(self.id.load());
        }
        let applied = rule::apply(
            &self.published,
            || self.id.load(),
            |id| self.shared.reseeder.reseed(id),
            |id| self.tell(id),
        );
        self.failed.store(applied.is_err(), Relaxed);
        if self.awaited.xchg(false, Full) {
            self.handled.notify_all();
        }
    }
}

impl Generation {
    /// Tells about a reseed with `id`.
    fn tell(&self, id: Id) {
        if let Some(reseeds) = &self.reseeds {
            reseeds.count();
        }
        if let Some(notifiers) = &self.shared.notifiers {
            notifiers.call_later(id);
        }
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
    fn is_published(&self) -> bool {
        self.published.is(self.id.load())
    }
}

impl Watched {
    /// Maps the ID in `range`. `counted`: whether to count the reseeds with it.
    ///
    /// # Errors
    ///
    /// Those of [`GenerationId::new`], and `ENOMEM`.
    pub(crate) fn map(range: Range, shared: Arc<Shared>, counted: bool) -> Result<Arc<Self>> {
        let id = GenerationId::new(range)?;
        let published = Published::none(id.load());
        let reseeds = counted.then(Reseeds::new).transpose()?;
        let worker = shared.worker.clone();
        let generation = pin_init!(Generation {
            id,
            published,
            shared,
            reseeds,
            handled <- new_poll_condvar!("Generation::handled"),
            awaited: Atomic::new(false),
            resumed: Atomic::new(false),
            failed: Atomic::new(false),
        });
        Arc::pin_init(Work::new(worker, generation), GFP_KERNEL)
    }

    /// Applies the rule now, at each notification of `dev`, and when the machine was suspended or
    /// hibernated, until `dev` is unbound.
    ///
    /// # Errors
    ///
    /// Those of [`acpi::register_notify_handler`] and [`pm::register`], and `EIO` if the generator
    /// could not be reseeded.
    pub(crate) fn watch(self: &Arc<Self>, dev: &Device<Bound>) -> Result {
        acpi::register_notify_handler(dev, self.clone())?;
        pm::register(dev, self.clone())?;
        // A later change is notified. An earlier one is handled here.
        self.apply_rule(true)
    }

    /// Applies the reseed rule. When this returns `Ok`, the ID that was in memory at the call is
    /// published. Where it is published already this is four loads.
    ///
    /// Without `may_wait` this takes 2 ms at most, or somewhat longer on a busy CPU.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: This takes longer. See [`Watched::wake_when_applied`].
    /// - `EIO`: The generator could not be reseeded.
    #[inline(always)]
    pub(crate) fn apply_rule(&self, may_wait: bool) -> Result {
        if self.is_published() {
            return Ok(());
        }
        self.have_rule_applied(may_wait)
    }

    #[cold]
    #[inline(never)]
    fn have_rule_applied(&self, may_wait: bool) -> Result {
        self.queue();
        if may_wait {
            self.flush();
            return if self.failed.load(Relaxed) {
                Err(EIO)
            } else {
                Ok(())
            };
        }
        for _ in 0..40 {
            if self.is_published() {
                return Ok(());
            }
            fsleep(Delta::from_micros(50));
        }
        Err(EAGAIN)
    }

    /// Has the pollers woken when the rule was applied, also if there is no notification.
    #[cold]
    pub(crate) fn wake_when_applied(&self) {
        self.awaited.store(true, Relaxed);
        // If a run is under way that did not see this, there is another one.
        self.queue();
    }
}

impl acpi::NotifyHandler for Watched {
    fn notify(&self, _event: u32) {
        // A failure is in the answer to the next read.
        let _ = self.apply_rule(true);
        self.handled.notify_all();
    }
}

impl irq::SciHandler for Watched {
    fn interrupted(&self) {
        if !self.is_published() {
            self.queue();
        }
    }
}

impl pm::Resume for Watched {
    fn resumed(&self) {
        // The kernel may have reseeded at the end of a suspension, in a process that is not waited
        // for. After hibernation it has not, and where the ID is in ACPI NVS memory it has restored
        // the old one.
        self.resumed.store(true, Relaxed);
        self.queue();
        self.flush();
        self.handled.notify_all();
    }
}
