// SPDX-License-Identifier: MIT OR Apache-2.0

//! A machine like Firecracker's: QEMU's microvm, with hardware-reduced ACPI, a Generic Event Device
//! whose interrupt is exclusive, and VMClock's counter. There is no early look: until the
//! notification is handled, only the barrier protects a process.
//!
//! With VMGENID_MACHINE=microvm VMGENID_SOURCE=vmclock all promises, and all tests with clones, run
//! on it. `matrix.rs` restores it in every way.

use crate::{
    age::grow_old,
    clones::{self, drawn, look_and_draw, two_cpus},
    context::{Context, await_random, genctr, no_splat},
    draws::Same,
    notifications::expect_notified,
    tests,
};
use anyhow::{Result, ensure};
use harness::{Machine, Options, Source};

tests! {
    one_line_says_that_there_is_no_early_look
    the_generic_event_device_notifies
    no_look_is_stale_and_no_draw_is_twice (20 min)
    the_barrier_is_what_makes_draws_differ (20 min)
    a_library_that_maps_vmclock0_repeats_itself (20 min)
}

pub fn firecracker(options: Options) -> Options {
    Options {
        machine: Machine::Microvm,
        source: Source::Vmclock,
        ..options
    }
}

/// Expect one line about the early look, and none with `early_look=0`.
fn one_line_says_that_there_is_no_early_look(context: &Context) -> Result<()> {
    let lines = "dmesg | grep -c 'no early look at the generation ID' || true";
    for (parameter, expected) in [("early_look=1", "1"), ("early_look=0", "0")] {
        let vm = context.boot(Options {
            parameter: vec![parameter.into()],
            ..firecracker(genctr(42))
        })?;
        let said = vm.shell(lines)?;
        ensure!(said.trim() == expected, "{parameter}: {said} lines");
        let why = vm.shell("dmesg | grep 'hardware-reduced ACPI has no SCI' || true")?;
        ensure!((expected == "1") != why.is_empty(), "{parameter}: {why}");
        no_splat(&vm)?;
    }
    Ok(())
}

/// Expect that the notification, which comes by the event device, reseeds the kernel and wakes a
/// poller.
fn the_generic_event_device_notifies(context: &Context) -> Result<()> {
    expect_notified(context.boot(firecracker(genctr(42)))?)
}

/// Expect of clones what is expected on a PC: no stale look, and no draw twice.
fn no_look_is_stale_and_no_draw_is_twice(context: &Context) -> Result<()> {
    look_and_draw(context, firecracker(two_cpus()))
}

/// Expect that some draws of clones are the same without the barrier, and none after it.
fn the_barrier_is_what_makes_draws_differ(context: &Context) -> Result<()> {
    let mut vm = context.boot(firecracker(two_cpus()))?;
    clones::draws_differ(&mut vm, true)?;
    no_splat(&vm)
}

/// Expect that clones repeat each other's draws where a client seeds on the bare VMClock, and that
/// they do not on `/dev/sysgenid`, nor where the client reads `/dev/vmgenid` before it seeds. The
/// client does what AWS-LC's pull request 3418 does: it maps the node, seeds once when the counter
/// has changed, and draws 4,096 times from that seed.
fn a_library_that_maps_vmclock0_repeats_itself(context: &Context) -> Result<()> {
    let mut options = firecracker(two_cpus());
    options.parameter = vec!["sysgenid=1".into()];
    let load = context.add_ptp_vmclock(&mut options);
    let mut vm = context.boot(options)?;
    await_random(&vm)?;
    vm.shell(&load)?;
    grow_old(&mut vm)?;
    let mut most = |node: &str, more: &[&str]| -> Result<usize> {
        let how = [&["--once", "--count", "4096", "--node", node], more].concat();
        let same = Same::of(&drawn(&mut vm, &how)?);
        eprintln!("seeded once, on {node}: {same}");
        Ok(same.most)
    };
    // The CPU of the process decides whether another process draws before it.
    let mut repeats = false;
    for _ in 0..8 {
        repeats = repeats || most("/dev/vmclock0", &[])? > 0;
    }
    ensure!(
        repeats,
        "the bare VMClock repeats nothing, so this shows nothing"
    );
    for (node, more) in [("/dev/sysgenid", &[][..]), ("/dev/vmgenid", &["--barrier"])] {
        let calls = most(node, more)?;
        ensure!(
            calls == 0,
            "{node}: {calls} calls of 4,096 are another clone's"
        );
    }
    no_splat(&vm)
}
