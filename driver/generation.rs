// SPDX-License-Identifier: GPL-2.0

//! A generation ID, and the events at which the driver applies the rule to it.

use super::{
    id::{
        GenerationId,
        Id,
        Published, //
    },
    kernel::{
        events::{
            self,
            Events, //
        },
        kthread::{
            Job,
            Work,
            Worker, //
        },
        memremap::Range, //
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

/// The data that all generations of the module share.
pub(crate) struct Shared {
    reseeder: Reseeder,

    /// The thread that applies the rule.
    worker: Arc<Worker>,

    /// `None` if the reseed itself or the built-in driver calls the notifiers.
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
            worker: Worker::new(crate::NAME)?,
            notifiers: reseeder.notifiers().map(Notifiers::new).transpose()?,
            reseeder,
        };
        Ok(Arc::new(shared, GFP_KERNEL)?)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(notifiers) = &self.notifiers {
            notifiers.finish();
        }
    }
}

/// A generation ID, the last published one, and the state of the rule for it.
#[pin_data]
pub(crate) struct Generation {
    id: GenerationId,

    /// Only the driver's thread writes to it.
    published: Published,
    shared: Arc<Shared>,

    /// The count of reseeds, if they are counted.
    reseeds: Option<Arc<Reseeds>>,

    /// Pollers of the counter wait here.
    #[pin]
    handled: PollCondVar,

    /// Whether the next run wakes the pollers.
    awaited: Atomic<bool>,

    /// Whether the next run reseeds even if the ID is unchanged.
    resumed: Atomic<bool>,

    /// Whether the last application of the rule failed.
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
    /// Counts the reseed with `id`, and queues a call of the vmfork notifiers.
    fn tell(&self, id: Id) {
        if let Some(reseeds) = &self.reseeds {
            reseeds.count();
        }
        if let Some(notifiers) = &self.shared.notifiers {
            notifiers.call_later(id);
        }
    }

    /// Returns the range of the ID.
    pub(crate) fn range(&self) -> &Range {
        self.id.range()
    }

    /// Returns the count of reseeds, if they are counted.
    pub(crate) fn reseeds(&self) -> Option<&Arc<Reseeds>> {
        self.reseeds.as_ref()
    }

    /// Returns the wait queue of the counter's pollers.
    pub(crate) fn handled(&self) -> &PollCondVar {
        &self.handled
    }

    /// Returns whether the ID in memory is published: four loads.
    #[inline(always)]
    pub(crate) fn is_published(&self) -> bool {
        self.published.is(self.id.load())
    }
}

impl Watched {
    /// Maps the ID in `range`. Its reseeds are counted if `counted`.
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

    /// Applies the rule now and, until `dev` is unbound, at each notification of `dev`, after each
    /// suspend and hibernation and, if `early_look`, in ACPI's interrupt (the SCI).
    ///
    /// That interrupt brings the notification, some milliseconds before the driver is notified:
    /// ACPI's own thread finds out which event has occurred, a work queue runs the firmware's method
    /// for it, and another work queue calls the notify handlers. Until then processes draw from a
    /// generator that has the same state in all clones. The early look finds the new ID at once, and
    /// wakes the driver's thread, which preempts processes of normal priority. It does not close
    /// that window: processes run on other CPUs until the reseed, and on each CPU until it takes the
    /// interrupt. If the SCI is missing or cannot be shared, one line says so.
    ///
    /// # Errors
    ///
    /// Those of [`events::register`], and `EIO` if the generator could not be reseeded.
    pub(crate) fn watch(self: &Arc<Self>, dev: &Device<Bound>, early_look: bool) -> Result {
        events::register(dev, self.clone())?;
        // The handlers above see later changes. This call handles earlier ones, and the first ID.
        self.apply_rule(true)?;

        if early_look {
            if let Err(reason) = events::on_sci(dev, crate::NAME, self.clone()) {
                dev_info!(
                    dev,
                    "no early look at the generation ID, the notification has to do: {}\n",
                    reason
                );
            }
        }
        Ok(())
    }

    /// Applies the reseed rule. When this returns `Ok`, the ID that was in memory at the call, or a
    /// later one, is published.
    ///
    /// Without `may_wait` this sleeps for some 2 ms at most, and longer on a busy CPU.
    ///
    /// # Errors
    ///
    /// - `EAGAIN`: The ID was not published in that time. See [`Watched::wake_when_applied`].
    /// - `EIO`: The generator could not be reseeded. Not without `may_wait`.
    pub(crate) fn apply_rule(&self, may_wait: bool) -> Result {
        if self.is_published() {
            return Ok(());
        }
        self.queue();
        if may_wait {
            self.flush();
        }
        let mut steps = if may_wait { 0 } else { 40 };
        while steps > 0 && !self.is_published() {
            steps -= 1;
            fsleep(Delta::from_micros(50));
        }
        if steps > 0 {
            Ok(())
        } else if self.failed.load(Relaxed) {
            Err(EIO)
        } else if may_wait {
            Ok(())
        } else {
            Err(EAGAIN)
        }
    }

    /// Queues a run of the rule that wakes the pollers.
    #[cold]
    pub(crate) fn wake_when_applied(&self) {
        self.awaited.store(true, Relaxed);
        // If a run in progress did not see this, the queued one does.
        self.queue();
    }
}

impl Events for Watched {
    fn notified(&self) {
        // If this fails, the next read applies the rule again, and returns the error.
        let _ = self.apply_rule(true);
        self.handled.notify_all();
    }

    fn interrupted(&self) {
        if !self.is_published() {
            self.queue();
        }
    }

    fn resumed(&self) {
        // After a suspend the kernel may have reseeded in a user process, for which the rule does
        // not wait. After hibernation the kernel has not reseeded. If the ID is in ACPI NVS memory,
        // the kernel has restored that memory, and so the old ID, from the image.
        self.resumed.store(true, Relaxed);
        self.queue();
        self.flush();
        self.handled.notify_all();
    }
}
