// SPDX-License-Identifier: GPL-2.0

//! The early look: whether there is a new generation ID, in the interrupt already that brings the
//! notification.
//!
//! That interrupt is ACPI's (the SCI). Until it has become a notification, other processes run, and
//! draw from a random number generator that all clones have in common: ACPI's own thread finds out
//! which event it was, a work queue evaluates the firmware's code for it, and another work queue
//! calls who is notified. A handler that shares the interrupt can look at the ID at once.
//!
//! It only looks. What is to be done then takes a thread: the reseed may sleep, and the vmfork
//! notifiers wait for `rtnl_lock`. That thread is not the interrupt's: the line is masked until
//! all of its threads are done, and a machine whose power button does nothing as long as somebody
//! holds `rtnl_lock` is worse off than before.
//!
//! There is one on each CPU, and a new ID wakes them all. The first one to come reseeds, wherever
//! it is. The others wait for it in the mutex of the reseed rule, which spins while its owner runs:
//! so what they have preempted is not back before the reseed is over. That is as good as the
//! kernel's mutexes are at it, and no better. If the owner has to sleep (for `rtnl_lock`, say) or is
//! preempted, by its host, too, they sleep, and what would draw there goes on.
//!
//! The notification stays what wakes who waits for it, and what catches all that this has missed.

use super::{
    generation_id::{
        GenerationId,
        Patience, //
    },
    kernel::{
        acpi,
        irq::{
            self,
            SharedHandler, //
        },
        kthread::{
            Task,
            Threads, //
        }, //
    }, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    irq::IrqReturn,
    prelude::*,
    sync::Arc, //
};

/// What looks.
struct Look {
    id: Arc<GenerationId>,
    reseeders: Threads<GenerationId>,
}

impl SharedHandler for Look {
    fn handle(&self) -> IrqReturn {
        if self.id.is_reseeded() {
            return IrqReturn::None;
        }
        self.reseeders.wake();
        IrqReturn::Handled
    }
}

impl Task for GenerationId {
    fn run(&self) {
        let _ = self.apply_reseed_rule(Patience::Full);
    }
}

/// Looks at `id` in each of ACPI's interrupts, until `dev` is unbound. Where that is not to be had,
/// it says so, and the notification has to do.
pub(crate) fn look(dev: &Device<Bound>, id: &Arc<GenerationId>) {
    if let Err(reason) = try_look(dev, id) {
        dev_info!(
            dev,
            "no early look at the generation ID, the notification has to do: {}\n",
            reason
        );
    }
}

fn try_look(dev: &Device<Bound>, id: &Arc<GenerationId>) -> Result<(), &'static str> {
    let line = acpi::event_interrupt()?;
    let look = Threads::new(crate::NAME, id.clone())
        .and_then(|reseeders| {
            let id = id.clone();
            Ok(Arc::new(Look { id, reseeders }, GFP_KERNEL)?)
        })
        .map_err(|_| "no threads are to be had")?;
    irq::register_shared(dev, line, look).map_err(|_| "ACPI's interrupt cannot be shared")
}
