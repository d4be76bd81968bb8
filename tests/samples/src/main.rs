// SPDX-License-Identifier: MIT OR Apache-2.0

//! The Rust program in the README, which a test runs in clones.

include!(concat!(env!("OUT_DIR"), "/readme.rs"));
