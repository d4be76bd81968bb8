// SPDX-License-Identifier: MIT OR Apache-2.0

#![doc = include_str!("../README.md")]

mod cached;
mod error;
mod generation;
mod guard;
#[cfg(feature = "rand_core")]
mod rng;
mod source;

// With `--cfg vmgenid_elsewhere`, which `make check` sets, the crate is compiled as on other
// systems.
#[cfg(any(not(target_os = "linux"), vmgenid_elsewhere))]
mod elsewhere;
#[cfg(any(not(target_os = "linux"), vmgenid_elsewhere))]
use elsewhere as system;
#[cfg(all(target_os = "linux", not(vmgenid_elsewhere)))]
mod linux;
#[cfg(all(target_os = "linux", not(vmgenid_elsewhere)))]
use linux as system;

pub use cached::Cached;
pub use error::Error;
pub use generation::Generation;
pub use guard::{Guard, Stamp, WithoutCounter};
#[cfg(feature = "rand_core")]
pub use rng::GuardedRng;
pub use source::Source;
pub use system::{Counter, random};

#[cfg(all(test, target_os = "linux", not(any(vmgenid_elsewhere, loom))))]
mod tests;
