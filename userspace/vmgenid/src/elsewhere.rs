// SPDX-License-Identifier: MIT OR Apache-2.0

//! The crate on other systems than Linux. A library that uses it compiles there, and gets
//! [`Error::NoCounter`].

use crate::{Error, Generation, Source};
use std::{
    io::{self, ErrorKind},
    path::Path,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

/// No value of this type exists.
#[derive(Clone, Debug)]
pub enum Never {}

/// An open source of generations: on this system there is none.
#[derive(Debug)]
pub struct Counter(Never);

#[allow(missing_docs)]
impl Counter {
    pub fn open() -> Result<Self, Error> {
        Err(Error::NoCounter)
    }

    pub fn open_path(_: Source, path: impl AsRef<Path>) -> Result<Self, Error> {
        Err(Error::Open {
            path: path.as_ref().into(),
            error: ErrorKind::Unsupported.into(),
        })
    }

    #[must_use]
    pub fn source(&self) -> Source {
        match self.0 {}
    }

    #[must_use]
    pub fn get(&self) -> Generation {
        match self.0 {}
    }

    pub fn barrier(&self) -> Result<Generation, Error> {
        match self.0 {}
    }

    pub fn wait(&self, _: Generation, _: Option<Duration>) -> Result<Option<Generation>, Error> {
        match self.0 {}
    }

    pub(crate) fn word(&self) -> &Word {
        match self.0 {}
    }
}

/// Without this page a `fork` cannot be detected.
pub struct Page(Never);

impl Page {
    pub fn map(_: Option<Never>, _: usize) -> io::Result<Arc<Self>> {
        Err(ErrorKind::Unsupported.into())
    }
}

#[derive(Clone, Debug)]
pub struct Word(Never);

impl Word {
    pub fn new(page: Arc<Page>, _: usize) -> Self {
        match page.0 {}
    }

    pub fn load(&self) -> u64 {
        match self.0 {}
    }

    pub fn process(&self) -> &AtomicU64 {
        match self.0 {}
    }
}

/// Fills `bytes` from the kernel's random number generator: not on this system.
///
/// # Errors
///
/// [`Error::System`], always.
pub fn random(_: &mut [u8]) -> Result<(), Error> {
    Err(Error::system("getrandom")(io::Error::from(
        ErrorKind::Unsupported,
    )))
}

#[cfg(test)]
mod tests {
    use crate::{Error, Guard, WithoutCounter};

    #[test]
    fn every_choice_is_refused() {
        let refuse = Guard::open(WithoutCounter::Refuse);
        assert!(matches!(refuse, Err(Error::NoCounter)));
        for choice in [
            WithoutCounter::CacheNothing,
            WithoutCounter::NoticeForksOnly,
        ] {
            assert!(matches!(Guard::open(choice), Err(Error::System { .. })));
        }
    }
}
