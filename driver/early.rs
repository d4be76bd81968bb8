// SPDX-License-Identifier: GPL-2.0

//! The early look: comparing the ID in the interrupt that brings the notification.
//!
//! That interrupt is ACPI's, the SCI. Before the driver is notified, ACPI's own thread finds out
//! which event has occurred, a work queue runs the firmware's method for it, and another work queue
//! calls the notify handlers. Until then processes draw from a generator that has the same state in
//! all clones. A handler that shares the interrupt finds the new ID at once, and wakes the driver's
//! thread, which preempts processes of normal priority.
//!
//! Limitations: this shortens the time in which processes that do not call `read()` draw the same
//! as in other clones. It does not remove it: processes run on other CPUs until the reseed, and on
//! each CPU until it takes the interrupt. Hardware-reduced ACPI has no SCI.

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

/// Compares the ID in each SCI until `dev` is unbound. If that is impossible, logs why.
pub(crate) fn look(dev: &Device<Bound>, generation: &Arc<Watched>) {
    if let Err(reason) = irq::register_sci_handler(dev, crate::NAME, generation.clone()) {
        dev_info!(
            dev,
            "no early look at the generation ID, the notification has to do: {}\n",
            reason
        );
    }
}
