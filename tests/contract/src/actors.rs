// SPDX-License-Identifier: MIT OR Apache-2.0

//! The programs that a test starts in the guest, to see what a restore, a fault or an unbind does
//! to them.

pub mod atonce;
pub mod consumers;
pub mod contend;
pub mod cost;
pub mod faults;
pub mod preempt;
pub mod spin;
pub mod steps;
pub mod stream;
pub mod stress;
pub mod warm;
