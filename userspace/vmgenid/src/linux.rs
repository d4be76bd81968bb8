// SPDX-License-Identifier: MIT OR Apache-2.0

mod counter;
mod map;
mod vmclock;

pub use counter::Counter;
pub use map::{Page, Word};

use crate::Error;
use rustix::{
    io::retry_on_intr,
    rand::{GetRandomFlags, getrandom},
};

/// Fills `bytes` from the kernel's random number generator, by `getrandom(2)`. It waits until the
/// generator has been initialised.
///
/// Callers call it after a [barrier](Counter::barrier).
///
/// # Errors
///
/// [`Error::System`]: the system call does not exist, or a filter forbids it.
pub fn random(bytes: &mut [u8]) -> Result<(), Error> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        done += retry_on_intr(|| getrandom(&mut *rest, GetRandomFlags::empty()))
            .map_err(Error::system("getrandom"))?;
    }
    Ok(())
}
