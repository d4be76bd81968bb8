// SPDX-License-Identifier: MIT OR Apache-2.0

//! The page of `/dev/vmclock0`: `struct vmclock_abi` of `include/uapi/linux/vmclock-abi.h`, Linux
//! 7.3. All of it is little-endian.

use crate::{Error, map::Page};
use std::{
    sync::atomic::{Ordering::Acquire, fence},
    thread,
    time::{Duration, Instant},
};

/// "VCLK", a u32 at 0.
const MAGIC: u32 = 0x4b4c_4356;

/// Where the size of the structure is: a u32.
const SIZE: usize = 4;

/// Where the sequence count is: a u32, odd while the hypervisor writes.
const SEQUENCE: usize = 12;

/// Where the flags are: a u64.
const FLAGS: usize = 24;

/// There is a generation counter.
const COUNTER_PRESENT: u32 = 1 << 8;

/// Where it is: a u64, the last member.
pub const COUNTER: usize = 104;

/// How long an update can take: a million times as long as it should.
const PATIENCE: Duration = Duration::from_millis(100);

/// Returns what is missing for a page to have a counter, if something is.
pub fn missing(page: &Page) -> Option<&'static str> {
    if page.u32(0) != MAGIC {
        Some("its page does not begin with VCLK")
    } else if (page.u32(SIZE) as usize) < COUNTER + 8 {
        Some("its page is too old to have a VM generation counter")
    } else if page.u32(FLAGS) & COUNTER_PRESENT == 0 {
        Some("the hypervisor does not say that its page has a VM generation counter")
    } else {
        None
    }
}

/// Loads the counter under the sequence count.
///
/// # Errors
///
/// [`Error::Busy`]: the hypervisor has begun to write, and does not end.
pub fn load(page: &Page) -> Result<u64, Error> {
    let begin = Instant::now();
    loop {
        let before = page.u32(SEQUENCE);
        fence(Acquire);
        let counter = (u64::from(page.u32(COUNTER + 4)) << 32) | u64::from(page.u32(COUNTER));
        fence(Acquire);
        if before % 2 == 0 && before == page.u32(SEQUENCE) {
            return Ok(counter);
        }
        if begin.elapsed() > PATIENCE {
            return Err(Error::Busy);
        }
        thread::yield_now();
    }
}
