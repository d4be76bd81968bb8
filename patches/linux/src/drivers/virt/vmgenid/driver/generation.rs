// SPDX-License-Identifier: GPL-2.0

//! A generation ID, and the events at which the driver has the kernel's random number generator
//! look at it.
//!
//! The generator also looks by itself, before it gives random bytes away. So nothing waits for the
//! driver: it tells pollers, and counts reseeds.

use super::{
    counter::{
        Counter,
        Layout, //
    },
    firmware::Firmware,
    id::{
        GenerationId,
        Id,
        Published, //
    },
    kernel::acpi::{
        self,
        NotifyHandler, //
    },
    prelude::*,
    sysgenid::Reseeds, //
};
use kernel::{
    devres,
    irq::{
        Flags,
        IrqReturn,
        ThreadedHandler,
        ThreadedIrqReturn, //
    },
    new_mutex,
    new_poll_condvar,
    random::{
        self,
        VmIdPoll,
        VmforkHandler,
        VmforkRegistration, //
    },
    sync::Mutex, //
};

/// A generation ID, and the last one that the generator was reseeded with.
#[pin_data]
pub(crate) struct Generation {
    pub(crate) id: GenerationId,

    /// Written to while `reseeding` is held.
    published: Published,
    #[pin]
    reseeding: Mutex<()>,

    /// `None` if the generator looks at the ID of another device. Then the driver reseeds.
    poll: Option<VmIdPoll>,

    /// The count of reseeds, if they are counted.
    pub(crate) reseeds: Option<Arc<Reseeds>>,

    /// Pollers of the counter wait here.
    #[pin]
    pub(crate) handled: PollCondVar,
}

/// A [`Generation`] at which the generator looks.
pub(crate) type Watched = Generation;

impl Generation {
    /// Maps the ID in `range`, and has the generator look at it. Its reseeds are counted if
    /// `counted`.
    pub(crate) fn map(range: Range, counted: bool) -> Result<Arc<Self>> {
        let id = GenerationId::new(range)?;
        let published = Published::none(id.load());
        let reseeds = counted.then(Reseeds::new).transpose()?;
        let poll = match VmIdPoll::new(&id.range) {
            Err(EBUSY) => None,
            poll => Some(poll?),
        };
        Arc::pin_init(
            pin_init!(Self {
                id,
                published,
                reseeding <- new_mutex!((), "Generation::reseeding"),
                poll,
                reseeds,
                handled <- new_poll_condvar!("Generation::handled"),
            }),
            GFP_KERNEL,
        )
    }

    /// Has the ID looked at now and, until `dev` is unbound, at each notification of `dev`.
    ///
    /// With a device tree, the device's own interrupt is the notification. Without that interrupt,
    /// one line says so: then pollers are woken when somebody else has drawn random bytes.
    pub(crate) fn watch(self: &Arc<Self>, dev: &Device<Bound>, firmware: &Firmware<'_>) -> Result {
        if self.poll.is_none() {
            dev_warn!(
                dev,
                "another ID is looked at: this one reseeds when it is notified\n"
            );
        }
        devres::register(
            dev,
            VmforkRegistration::new(Events(self.clone())),
            GFP_KERNEL,
        )?;
        match firmware {
            Firmware::Acpi(_) => acpi::register_notify_handler(dev, Events(self.clone()))?,
            Firmware::DeviceTree(device) => match device.devm_request_threaded_irq_by_index(
                Flags::SHARED,
                0,
                crate::NAME,
                Events(self.clone()),
            ) {
                Ok(()) => (),
                Err(EPROBE_DEFER) => return Err(EPROBE_DEFER),
                Err(err) => dev_warn!(
                    dev,
                    "interrupts[0] {}: no notification, only draws reseed\n",
                    match err {
                        EBUSY => "belongs to another driver",
                        _ => "is missing or cannot be mapped",
                    }
                ),
            },
        }
        // The handlers above see later changes. This call handles earlier ones, and the first ID.
        self.apply_rule(true)
    }

    /// Makes `getrandom()` of the vDSO compare `counter`.
    pub(crate) fn look_at_counter(&self, dev: &Device<Bound>, counter: &Counter) {
        if let (Some(poll), Layout::Word) = (&self.poll, counter.layout) {
            match poll.look_at_counter(&counter.page) {
                Ok(()) | Err(EOPNOTSUPP) => (),
                Err(err) => dev_warn!(
                    dev,
                    "the vDSO does not look at the generation counter: {:?}\n",
                    err
                ),
            }
        }
    }

    /// Returns whether the generator was reseeded with the ID in memory: four loads.
    #[inline(always)]
    pub(crate) fn is_published(&self) -> bool {
        self.published.is(self.id.load())
    }

    /// When this returns, the generator was reseeded with the ID that was in memory at the call, or
    /// with a later one. Does not sleep for long, whatever `may_wait` is.
    pub(crate) fn apply_rule(&self, _may_wait: bool) -> Result {
        if self.is_published() {
            return Ok(());
        }
        let _guard = self.reseeding.lock();
        let id = self.id.load();
        if self.published.is(id) {
            return Ok(());
        }
        self.reseed(id);
        self.published.set(id);
        if let Some(reseeds) = &self.reseeds {
            reseeds.increment();
        }
        Ok(())
    }

    fn reseed(&self, id: Id) {
        match &self.poll {
            Some(poll) => poll.look(),
            None => random::add_vmfork_randomness(id.as_bytes()),
        }
    }

    /// Looks at the ID, and wakes the pollers.
    #[cold]
    pub(crate) fn wake_when_applied(&self) {
        let _ = self.apply_rule(true);
        self.handled.notify_all();
    }
}

/// The handler of the events.
struct Events(Arc<Generation>);

impl NotifyHandler for Events {
    fn notify(&self, _event: u32) {
        self.0.wake_when_applied();
    }
}

impl ThreadedHandler for Events {
    fn handle(&self) -> ThreadedIrqReturn {
        // In the hard interrupt already: the thread is only for the pollers.
        if let Some(poll) = &self.0.poll {
            poll.look();
        }
        ThreadedIrqReturn::WakeThread
    }

    fn handle_threaded(&self) -> IrqReturn {
        self.0.wake_when_applied();
        IrqReturn::Handled
    }
}

impl VmforkHandler for Events {
    fn forked(&self, id: &[u8; 16]) {
        // The generator may have found the ID of this device before the notification came.
        if id[..] == *self.0.id.load().as_bytes() {
            self.0.wake_when_applied();
        }
    }
}
