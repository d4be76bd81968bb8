// SPDX-License-Identifier: GPL-2.0

//! The early look: comparing the ID in the interrupt already that brings the notification.
//!
//! That interrupt is ACPI's, the SCI. Before it has become a notification, ACPI's own thread finds
//! out which event it was, a work queue runs the firmware's method for it, and another work queue
//! calls the notify handlers. Meanwhile other processes draw from a generator that all clones have
//! in common. A handler that shares the interrupt sees the new ID at once, and wakes the driver's
//! thread, which goes before all of these.
//!
//! Limitations: this shortens the time in which processes that do not call `read()` draw what other
//! clones draw. It does not end it: processes run on other CPUs meanwhile, and on each CPU until it
//! takes the interrupt. Only `read()` is a barrier. Hardware-reduced ACPI has no such interrupt.

use super::{
    generation::Watched,
    kernel::irq, //
};
use kernel::{
    device::{
        Bound,
        Device, //
    },
    prelude::*,
    sync::Arc, //
};

/// Looks at the ID in each SCI, until `dev` is unbound. Where that is not possible it says why, and
/// the notification has to do.
pub(crate) fn look(dev: &Device<Bound>, generation: &Arc<Watched>) {
    if let Err(reason) = irq::register_sci_handler(dev, crate::NAME, generation.clone()) {
        dev_info!(
            dev,
            "no early look at the generation ID, the notification has to do: {}\n",
            reason
        );
    }
}
