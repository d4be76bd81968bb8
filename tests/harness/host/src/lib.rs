// SPDX-License-Identifier: MIT OR Apache-2.0

//! Virtual machines to try the driver in: booted in seconds, commands run in
//! them over virtio-serial, snapshots taken and restored as clones.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let host = harness::Host::from_env()?;
//! let mut original = harness::Vm::boot(&host, harness::Options::default())?;
//! original.spawn(["sh", "-c", "while sleep 1; do date; done"], "/tmp/dates")?;
//! original.snapshot(&"ready".parse()?)?;
//! let clone = original.clone_from(&"ready".parse()?, Some(43), None)?;
//! print!("{}", clone.shell("cat /tmp/dates")?);
//! # Ok(())
//! # }
//! ```
//!
//! A [`Vm`] without a name ends, and its folder goes, when it is dropped. One
//! with a name stays until it is stopped.

mod agent;
mod folder;
pub mod gdb;
mod host;
mod initramfs;
pub mod interrupt;
pub mod kernel;
mod lineage;
mod name;
mod options;
mod qemu;
mod qmp;
mod stream;
mod terminal;
mod vm;

pub use agent::Command;
pub use agent::Output;
pub use host::AtEnd;
pub use host::AtStart;
pub use host::Host;
pub use name::Name;
pub use options::Accelerator;
pub use options::Add;
pub use options::Firmware;
pub use options::Flavour;
pub use options::Machine;
pub use options::Options;
pub use options::Source;
pub use qapi;
pub use terminal::Terminal;
pub use vm::Summary;
pub use vm::Vm;
pub use wire::Size;
pub use wire::Status;
pub use wire::Stream;
