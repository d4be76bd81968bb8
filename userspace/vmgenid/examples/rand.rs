// SPDX-License-Identifier: MIT OR Apache-2.0

//! Prints a random number each second, with the crate `rand`. Clones of the virtual machine continue
//! with different numbers.

use chacha20::ChaCha20Rng;
use rand::{RngExt as _, rand_core::UnwrapErr};
use std::{error::Error, thread::sleep, time::Duration};
use vmgenid::{Guard, GuardedRng, WithoutCounter};

fn main() -> Result<(), Box<dyn Error>> {
    let guard = Guard::open(WithoutCounter::Refuse)?;
    // The methods of `rand` return no errors. This generator panics if the kernel cannot reseed: if the
    // device was unbound from its driver.
    let mut rng = UnwrapErr(GuardedRng::<ChaCha20Rng>::new(guard)?);
    loop {
        println!("{}", rng.random_range(0..u64::MAX));
        sleep(Duration::from_secs(1));
    }
}
