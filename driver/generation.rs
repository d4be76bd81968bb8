// SPDX-License-Identifier: GPL-2.0

//! A generation ID, and the events at which the driver applies the rule to it.

use super::{
    firmware::Firmware,
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
            Work, //
        }, //
    },
    prelude::*,
    rule::{
        self,
        Reseeder, //
    },
    shared::Shared,
    sysgenid::Reseeds, //
};
use kernel::new_poll_condvar;

/// A generation ID, the last published one, and the state of the rule for it.
#[pin_data]
pub(crate) struct Generation {
    pub(crate) id: GenerationId,

    /// Only the driver's thread writes to it.
    published: Published,
    shared: Arc<Shared>,

    /// The count of reseeds, if they are counted.
    pub(crate) reseeds: Option<Arc<Reseeds>>,

    /// Pollers of the counter wait here.
    #[pin]
    pub(crate) handled: PollCondVar,

    /// Whether the next run wakes the pollers.
    awaited: Atomic<bool>,

    /// Whether the next run reseeds even if the ID is unchanged.
    resumed: Atomic<bool>,

    /// Whether the last application of the rule failed.
    failed: Atomic<bool>,

    /// The device's own interrupt; 0 if it has none. The kernel's driver reseeds in it.
    irq: Atomic<u32>,
}

/// A [`Generation`] to which the driver's thread applies the rule.
pub(crate) type Watched = Work<Generation>;

impl Job for Generation {
    /// Applies the rule.
    fn run(&self) {
        if self.resumed.xchg(false, Full) && matches!(self.shared.reseeder, Reseeder::DevRandom(_))
        {
            let _ = self.reseed(self.id.load());
        }
        let applied = rule::apply(
            &self.published,
            || self.id.load(),
            |id| self.reseed(id),
            || {
                if let Some(reseeds) = &self.reseeds {
                    reseeds.increment();
                }
                self.shared.notify_later();
            },
        );
        self.failed.store(applied.is_err(), Relaxed);
        if self.awaited.xchg(false, Full) {
            self.handled.notify_all();
        }
    }
}

impl Generation {
    /// Waits until the device's own interrupt is not being handled, and reseeds with `id`.
    fn reseed(&self, id: Id) -> Result {
        match self.irq.load(Relaxed) {
            0 => (),
            irq => events::synchronize(irq),
        }
        self.shared.reseeder.reseed(id)
    }

    /// Returns whether the ID in memory is published: four loads.
    #[inline(always)]
    pub(crate) fn is_published(&self) -> bool {
        self.published.is(self.id.load())
    }
}

impl Watched {
    /// Maps the ID in `range`. Its reseeds are counted if `counted`.
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
            irq: Atomic::new(0),
        });
        Arc::pin_init(Work::new(worker, generation), GFP_KERNEL)
    }

    /// Applies the rule now and, until `dev` is unbound, at each notification of `dev`, after each
    /// suspend and hibernation and, if `early_look`, in ACPI's interrupt (the SCI).
    ///
    /// With a device tree, the device's own interrupt is the notification. Without that interrupt,
    /// one line says so: then only reads, polls and suspends apply the rule.
    ///
    /// ACPI's interrupt brings the notification, some milliseconds before the driver is notified:
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
    pub(crate) fn watch(
        self: &Arc<Self>,
        dev: &Device<Bound>,
        firmware: &Firmware<'_>,
        early_look: bool,
    ) -> Result {
        events::register(dev, self.clone())?;
        if let Firmware::DeviceTree(device) = firmware {
            match device.optional_irq_by_index(0).and_then(|irq| {
                self.irq.store(irq.irq(), Relaxed);
                events::on_interrupt(dev, irq, crate::NAME, self.clone())
            }) {
                Ok(()) => (),
                Err(EPROBE_DEFER) => return Err(EPROBE_DEFER),
                Err(err) => dev_warn!(
                    dev,
                    "interrupts[0] {}: no notification, only reads and polls of /dev/vmgenid reseed\n",
                    match err {
                        EBUSY => "belongs to another driver",
                        _ => "is missing or cannot be mapped",
                    }
                ),
            }
        }
        // The handlers above see later changes. This call handles earlier ones, and the first ID.
        self.apply_rule(true)?;

        if let (true, Firmware::Acpi(_)) = (early_look, firmware) {
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
    /// - `EIO`: The generator could not be reseeded.
    pub(crate) fn apply_rule(&self, may_wait: bool) -> Result {
        if self.is_published() {
            return Ok(());
        }
        self.queue();
        let result = if may_wait {
            self.flush();
            Ok(())
        } else {
            for _ in 0..40 {
                if self.is_published() {
                    return Ok(());
                }
                fsleep(Delta::from_micros(50));
            }
            Err(EAGAIN)
        };
        if self.failed.load(Relaxed) {
            return Err(EIO);
        }
        result
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

    fn signalled(&self) {
        self.wake_when_applied();
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
