// SPDX-License-Identifier: MIT OR Apache-2.0

//! The page of `/dev/vmclock0`: `struct vmclock_abi` of `include/uapi/linux/vmclock-abi.h`, Linux
//! 7.3. All of it is little-endian.

use crate::{Error, linux::map::Page};
#[cfg(loom)]
use loom::sync::atomic::fence;
#[cfg(not(loom))]
use std::sync::atomic::fence;
use std::{
    sync::atomic::Ordering::Acquire,
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

/// The page has a generation counter.
const COUNTER_PRESENT: u32 = 1 << 8;

/// Where it is: a u64, the last member.
pub const COUNTER: usize = 104;

/// The longest time for an update: a million times as long as an update should take.
const LONGEST_UPDATE: Duration = Duration::from_millis(100);

/// Returns why the page has no counter, or `None`.
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
/// [`Error::Busy`]: the hypervisor has been writing for 100 ms.
pub fn load(page: &Page) -> Result<u64, Error> {
    let begin = Instant::now();
    loop {
        if let Some(counter) = try_load(|offset| page.u32(offset)) {
            return Ok(counter);
        }
        if begin.elapsed() > LONGEST_UPDATE {
            return Err(Error::Busy);
        }
        thread::yield_now();
    }
}

/// Loads the counter, with `load` for each u32. Returns `None` while the hypervisor writes.
fn try_load(load: impl Fn(usize) -> u32) -> Option<u64> {
    let before = load(SEQUENCE);
    fence(Acquire);
    let counter = (u64::from(load(COUNTER + 4)) << 32) | u64::from(load(COUNTER));
    fence(Acquire);
    (before % 2 == 0 && before == load(SEQUENCE)).then_some(counter)
}

#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use loom::{
        sync::{
            Arc,
            atomic::{
                AtomicU32,
                Ordering::{Relaxed, Release},
            },
        },
        thread,
    };

    /// In each order of loads and stores that the memory model allows, a load is of one counter, not
    /// of halves of two.
    #[test]
    fn no_counter_is_torn() {
        loom::model(|| {
            // The sequence count, and the two halves of the counter.
            let page = Arc::new([(); 3].map(|()| AtomicU32::new(0)));
            let hypervisor = {
                let page = page.clone();
                thread::spawn(move || {
                    let [sequence, low, high] = &*page;
                    sequence.store(1, Relaxed);
                    fence(Release);
                    low.store(7, Relaxed);
                    high.store(7, Relaxed);
                    fence(Release);
                    sequence.store(2, Relaxed);
                })
            };
            let counter = try_load(|offset| {
                let word = match offset {
                    SEQUENCE => 0,
                    COUNTER => 1,
                    _ => 2,
                };
                page[word].load(Relaxed)
            });
            assert!(matches!(counter, None | Some(0) | Some(0x7_0000_0007)));
            hypervisor.join().unwrap();
        });
    }
}
