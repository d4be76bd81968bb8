// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guests that several tests share, one test after the other.

use crate::{
    MINUTES, On, Trial,
    context::Context,
    deadline::{Guests, caught},
    reports::Reports,
};
use anyhow::{Result, ensure};
use harness::{Vm, qapi::qmp};
use std::{
    borrow::Borrow,
    sync::{Arc, Mutex, PoisonError},
};

/// A guest that is booted by the first test, and ends with the last one. One in
/// which a test failed is not used again.
pub struct Shared<G> {
    reports: Reports,
    guests: Guests,
    guest: Arc<Mutex<Option<G>>>,
    /// One for each test that is still to run.
    tests: Arc<()>,
}

/// A guest that can be shared. When it is dropped, the suite asks its kernel for reports.
pub trait Guest: Send + 'static {
    /// Whether the guest can be asked for reports. It cannot if it is down or paused.
    fn can_be_asked(&self) -> Result<bool>;
    /// Adds the reports on the present console.
    fn look(&self, reports: &Reports);
}

impl<G: Borrow<Vm> + Send + 'static> Guest for G {
    fn can_be_asked(&self) -> Result<bool> {
        Ok(self.borrow().qmp(&qmp::query_status {})?.running)
    }

    fn look(&self, reports: &Reports) {
        reports.look_at_console(self.borrow());
    }
}

impl<G: Guest> Shared<G> {
    pub fn new() -> Self {
        Self {
            reports: Reports::default(),
            guests: Guests::default(),
            guest: Arc::default(),
            tests: Arc::default(),
        }
    }

    fn share(&self) -> Self {
        Self {
            reports: self.reports.clone(),
            guests: self.guests.clone(),
            guest: self.guest.clone(),
            tests: self.tests.clone(),
        }
    }

    /// A test in the guest. A report of the guest's kernel during the test fails the test.
    pub fn trial(
        &self,
        name: String,
        on: Vec<On>,
        boot: impl FnOnce(&Context) -> Result<G> + Send + 'static,
        test: impl FnOnce(&G) -> Result<()> + Send + 'static,
    ) -> Trial {
        let shared = self.share();
        let (reports, guests) = (self.reports.clone(), self.guests.clone());
        let boot = move || boot(&Context::with(reports, guests)?);
        let run = Box::new({
            let name = name.clone();
            move || shared.run(&name, boot, test)
        });
        Trial { name, on, run }
    }

    /// The last test ends the guest, and its result includes what the guest's kernel reports then.
    /// No such report is lost: [`crate::main`] drops the tests that it does not run before it runs
    /// any, a panic is an error, and a test that leaves a guest that cannot be asked fails.
    fn run(
        self,
        name: &str,
        boot: impl FnOnce() -> Result<G>,
        test: impl FnOnce(&G) -> Result<()>,
    ) -> Result<()> {
        // One test at a time: some tests unload the module.
        let mut guest = self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        let last = Arc::into_inner(self.tests).is_some();
        crate::run(name, Some(MINUTES), &self.guests, || {
            let result = caught(|| {
                let guest = match &mut *guest {
                    Some(guest) => guest,
                    none => none.insert(boot()?),
                };
                test(guest)?;
                ensure!(guest.can_be_asked()?, "the guest does not run any more");
                Ok(())
            });
            // New lines on the console came during this test.
            guest.iter().for_each(|guest| guest.look(&self.reports));
            if last || result.is_err() || !self.reports.is_empty() {
                *guest = None;
            }
            self.reports.judge(result)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;
    use std::thread;

    /// A guest whose kernel reports a leak when it is asked at the end, unless it is paused.
    struct Leaky {
        reports: Reports,
        paused: bool,
    }

    impl Guest for Leaky {
        fn can_be_asked(&self) -> Result<bool> {
            Ok(!self.paused)
        }

        fn look(&self, _: &Reports) {}
    }

    impl Drop for Leaky {
        fn drop(&mut self) {
            if !self.paused {
                self.reports.add("a leak".into());
            }
        }
    }

    fn run(
        shared: Shared<Leaky>,
        paused: bool,
        test: impl FnOnce(&Leaky) -> Result<()>,
    ) -> Option<String> {
        let reports = shared.reports.clone();
        let result = shared.run("test", || Ok(Leaky { reports, paused }), test);
        result.err().map(|err| err.to_string())
    }

    fn leaks(failure: Option<String>) -> bool {
        failure.is_some_and(|failure| failure.contains("a leak"))
    }

    /// Expect that the last test has the guest's report, and that no earlier test has it.
    #[test]
    fn the_last_test_looks_at_the_guest() {
        let all = Shared::new();
        let [first, last, dropped] = [(); 3].map(|()| all.share());
        drop((all, dropped));
        assert_eq!(run(first, false, |_| Ok(())), None);
        assert!(leaks(run(last, false, |_| Ok(()))));
    }

    /// Expect that a test that fails or panics has the guest's report, and that the next test boots
    /// another guest.
    #[test]
    fn a_test_that_fails_or_panics_looks_at_the_guest() {
        let all = Shared::new();
        let [failing, panicking, last] = [(); 3].map(|()| all.share());
        drop(all);
        let failure = run(failing, false, |_| bail!("fails"));
        assert!(failure.as_ref().is_some_and(|text| text.contains("fails")));
        assert!(leaks(failure));
        assert!(leaks(run(panicking, false, |_| panic!("panics"))));
        assert!(leaks(run(last, false, |_| panic!("panics"))));
    }

    /// Expect that a test that leaves a paused guest fails.
    #[test]
    fn a_test_that_leaves_a_paused_guest_fails() {
        let failure = run(Shared::new(), true, |_| Ok(()));
        assert_eq!(failure.as_deref(), Some("the guest does not run any more"));
    }

    /// Expect that exactly one of four tests that run at the same time has the guest's report.
    #[test]
    fn of_tests_at_the_same_time_exactly_one_is_the_last() {
        for _ in 0..100 {
            let all = Shared::new();
            let tests = [(); 4].map(|()| all.share());
            drop(all);
            let found = thread::scope(|scope| {
                let tests = tests.map(|test| scope.spawn(|| run(test, false, |_| Ok(()))));
                tests.map(|test| test.join().unwrap()).map(leaks)
            });
            assert_eq!(found.into_iter().filter(|&leaks| leaks).count(), 1);
        }
    }
}
