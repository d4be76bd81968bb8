// SPDX-License-Identifier: MIT OR Apache-2.0

//! Prints a UUID each second, from a pool of 1000. Clones of the virtual machine, and children of the
//! process, do not continue with the same pool.

use std::{error::Error, thread::sleep, time::Duration};
use uuid::{Builder, Uuid};
use vmgenid::{Cached, Guard, WithoutCounter, random};

fn make_pool() -> Result<Vec<Uuid>, vmgenid::Error> {
    let mut bytes = [[0; 16]; 1000];
    random(bytes.as_flattened_mut())?;
    let uuid = |bytes| Builder::from_random_bytes(bytes).into_uuid();
    Ok(bytes.map(uuid).into())
}

fn main() -> Result<(), Box<dyn Error>> {
    let guard = Guard::open(WithoutCounter::Refuse)?;
    let mut pool = Cached::new(guard, make_pool)?;
    loop {
        match pool.with(Vec::pop)? {
            Some(uuid) => println!("{uuid}"),
            None => {
                pool.discard();
                continue;
            }
        }
        sleep(Duration::from_secs(1));
    }
}
