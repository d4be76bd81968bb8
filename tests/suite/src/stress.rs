// SPDX-License-Identifier: MIT OR Apache-2.0

//! The device is rebound and the module reloaded, while many processes use the device and the
//! counter changes.

use crate::{changes::Guest, context::Context, on, promises, tests};
use anyhow::{Context as _, Result, ensure};
use harness::{Add, Options, kernel};
use std::env;

tests! {
    rebinds_and_reloads_leave_a_sound_driver (20 min)
    a_thousand_rebinds_and_two_hundred_reloads [Soak]
    stress_ng_finds_nothing (20 min)
    soak [Soak]
}

/// Runs the guest's stress program, then all the promises in the same guest.
fn stress(context: &Context, args: &[&str], mut hear: impl FnMut(&str)) -> Result<()> {
    let options = Options {
        memory: Some(2 * kernel::needs(&kernel::default()).memory),
        ..Options::default()
    };
    let guest = Guest::boot(context, options)?;
    // Linux's own races, between opens of a node and its removal (fs/dcache.c, 7.3.4): KCSAN leaves out
    // reports with these functions.
    guest.vm.shell(
        "mount -t debugfs debugfs /sys/kernel/debug
        for function in d_alloc_parallel dentry_kill; do
            [ ! -e /sys/kernel/debug/kcsan ] || echo !$function >/sys/kernel/debug/kcsan
        done
        umount /sys/kernel/debug",
    )?;
    let argv = [&["contract", "stress"], args].concat();
    let mut said = String::new();
    let status = guest.run(&argv, |line| {
        hear(line);
        said += &format!("{line}\n");
    })?;
    ensure!(status.success(), "{status}: {said}");
    for list in [&["list"][..], &["list", "--changes"]] {
        for (promise, on) in promises::list(context, "contract", list)? {
            if !on::is_ignored(&on) {
                guest.check(&["contract", "promise", &promise])?;
            }
        }
    }
    Ok(())
}

/// Expect that no process gets a result that is not allowed while the device is rebound and the
/// module reloaded, and that all promises hold in the same guest afterwards.
fn rebinds_and_reloads_leave_a_sound_driver(context: &Context) -> Result<()> {
    // With slow kernels, as many rebinds and reloads as fit into four minutes.
    let args: &[&str] = match kernel::default().as_str() {
        "tiny" | "builtin" => &["--binds", "50", "--loads", "10"],
        _ => &["--minutes", "4"],
    };
    stress(context, args, |line| eprintln!("stress: {line}"))
}

/// Expect the same of 1000 rebinds and 200 reloads. `make soak` runs this.
fn a_thousand_rebinds_and_two_hundred_reloads(context: &Context) -> Result<()> {
    let args = ["--binds", "1000", "--loads", "200"];
    stress(context, &args, |line| eprintln!("{line}"))
}

/// Expect the same of rebinds and reloads for SOAK minutes (60). `make soak` runs this.
fn soak(context: &Context) -> Result<()> {
    let minutes = env::var("SOAK").unwrap_or("60".into());
    stress(context, &["--minutes", &minutes], |line| {
        eprintln!("{line}")
    })
}

/// Expect that stress-ng's test of devices exercises `/dev/vmgenid` without a failure, and that all
/// promises for which the counter need not change hold afterwards.
fn stress_ng_finds_nothing(context: &Context) -> Result<()> {
    let folder = context.host.link("stress-ng");
    let entries = folder.read_dir();
    let entries = entries.context("there is no stress-ng: scripts/stress-ng fetches it")?;
    let add = |entry: std::io::Result<std::fs::DirEntry>| {
        let host = entry?.path();
        let name = host.file_name().context("no name")?.to_string_lossy();
        let guest = format!("/stress-ng/{name}");
        Ok(Add { host, guest })
    };
    let options = Options {
        memory: Some(2 * kernel::needs(&kernel::default()).memory),
        add: entries.map(add).collect::<Result<_>>()?,
        ..Options::default()
    };
    let guest = Guest::boot(context, options)?;
    let output = guest.vm.shell(
        "cd /stress-ng && ./ld.so --library-path . ./stress-ng \
            --dev 4 --dev-file /dev/vmgenid --timeout 20s --verify 2>&1",
    )?;
    ensure!(
        output.contains("1 of 1 devices opened and exercised") && output.contains("failed: 0"),
        "stress-ng says: {output}"
    );
    for (promise, _) in promises::list(context, "contract", &["list"])? {
        guest.check(&["contract", "promise", &promise])?;
    }
    Ok(())
}
