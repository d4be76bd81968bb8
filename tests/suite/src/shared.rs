// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guests that several tests share, one test after the other.

use crate::context::Context;
use anyhow::Result;
use std::{
    borrow::Borrow,
    sync::{Arc, Mutex, PoisonError},
};
use vm::Vm;

/// A guest that is booted by the first test, and ends with the last one. One in
/// which a test failed is not used again.
pub struct Shared<G> {
    context: Context,
    guest: Mutex<Option<G>>,
}

impl<G: Borrow<Vm>> Shared<G> {
    pub fn new() -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            context: Context::new()?,
            guest: Mutex::new(None),
        }))
    }

    /// Runs a test. What the guest's kernel reported meanwhile counts, too.
    pub fn test(
        self: Arc<Self>,
        boot: impl FnOnce(&Context) -> Result<G>,
        test: impl FnOnce(&G) -> Result<()>,
    ) -> Result<()> {
        let result = self.alone(boot, test);
        // The last test is the one to tell if the guest leaked.
        let Some(shared) = Arc::into_inner(self) else {
            return result;
        };
        drop(shared.guest);
        shared.context.reports.judge(result)
    }

    fn alone(
        &self,
        boot: impl FnOnce(&Context) -> Result<G>,
        test: impl FnOnce(&G) -> Result<()>,
    ) -> Result<()> {
        // One at a time: some take the module out of use.
        let mut guest = self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        if guest.is_none() {
            *guest = Some(boot(&self.context)?);
        }
        let result = guest.as_ref().map_or(Ok(()), test);
        let reports = &self.context.reports;
        // What is on the console now came with this test.
        guest
            .iter()
            .for_each(|guest| reports.look_at_console(guest.borrow()));
        if result.is_err() || !reports.is_empty() {
            *guest = None;
        }
        reports.judge(result)
    }
}
