// SPDX-License-Identifier: MIT OR Apache-2.0

//! Takes steps with the driver, one after the other, and prints all that a test needs to know after
//! each. It is one program, since many would take long in slow guests.

use crate::{
    NODE,
    machine::{self, Device, Log},
    promises::plain,
};
use anyhow::{Context, bail};
use rustix::io::Errno;
use std::fs;

#[derive(clap::Args)]
pub struct Args {
    /// load, unload, bind=DEVICE or unbind=DEVICE (if it is bound)
    #[arg(required = true)]
    steps: Vec<String>,
}

/// Takes each step. Prints, one line each: the step, the kernel's answer, the devices that are
/// bound, the node's counter, and the lines that the kernel has logged meanwhile.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut log = Log::from_now_on()?;
    for step in &args.steps {
        let answer = take(step).with_context(|| step.clone())?;
        println!("step {step}");
        println!("answer {}", answer.map_or("none".into(), name));
        let bound = Device::all_bound().into_iter().map(Device::of_platform);
        let bound: Vec<_> = bound.map(|device| device.acpi_name()).collect();
        println!("bound {}", bound.join(" "));
        println!("node {}", node()?);
        for line in log.lines()? {
            println!("log {}", with_acpi_name(&line));
        }
    }
    Ok(())
}

/// A line of the driver's about a device, with the name that ACPI has given the device.
fn with_acpi_name(line: &str) -> String {
    let ours = line.strip_prefix(machine::name()).and_then(|rest| {
        let (platform, said) = rest.trim_start().split_once(": ")?;
        let device = Device::of_platform(platform.into());
        Some(format!(
            "{} {}: {said}",
            machine::name(),
            device.acpi_name()
        ))
    });
    ours.unwrap_or_else(|| line.into())
}

/// Returns the error that the kernel has answered with, if any.
fn take(step: &str) -> anyhow::Result<Option<Errno>> {
    let result = match step.split_once('=') {
        None if step == "load" => return machine::load().map(|()| None),
        None if step == "unload" => return Ok(machine::unload().err()),
        Some(("bind", device)) => Device::named(device).try_bind(),
        Some(("unbind", device)) => {
            let device = Device::named(device);
            if device.is_bound() {
                device.unbind()?;
            }
            return Ok(None);
        }
        _ => bail!("no such step"),
    };
    match result {
        Ok(()) => Ok(None),
        Err(err) => Errno::from_io_error(&err).map(Some).context(err),
    }
}

/// The name of the error, as the kernel's headers have it.
fn name(errno: Errno) -> String {
    match errno {
        Errno::NODEV => "ENODEV".into(),
        Errno::INVAL => "EINVAL".into(),
        errno => errno.to_string(),
    }
}

/// The node's counter, if there is a node, which then has to work.
fn node() -> anyhow::Result<String> {
    if !fs::exists(NODE)? {
        return Ok("none".into());
    }
    Ok(plain()?.to_string())
}
