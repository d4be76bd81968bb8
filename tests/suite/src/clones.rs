// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a restore is to a process that was running all the time.

use crate::{
    context::{Context, await_random, counter, genctr, no_splat, reseeds, wait},
    tests,
};
use anyhow::{Context as _, Result, ensure};
use vm::{Options, Vm};

tests! {
    after_the_barrier_clones_draw_different_bytes
    the_counter_is_new_before_the_first_instruction
    a_restored_guest_has_one_reseed_and_the_new_counter
}

/// How old a guest has to be, in seconds, so that its kernel no longer reseeds
/// every other second by itself: CRNG_RESEED_INTERVAL in drivers/char/random.c,
/// twice, and some.
const OLD: u32 = 130;

/// What a spinner wrote down at the restore.
#[derive(Debug)]
struct Restored {
    mapped: u32,
    read: u32,
    random: String,
}

/// Waits until the spinner in `vm` has seen the counter change.
fn restored(vm: &Vm) -> Result<Restored> {
    let line = wait("the spinner sees the restore", || {
        let log = vm.shell("cat /tmp/spinner 2>/dev/null || true")?;
        Ok(log
            .lines()
            .find(|line| line.starts_with("from "))
            .map(String::from))
    })?;
    // "from 42: mapped 43, read 43, random HEX, looks N"
    let field = |name: &str| {
        let mut fields = line.split([':', ',']).map(str::trim);
        let value = fields.find_map(|field| field.strip_prefix(name)?.strip_prefix(' '));
        value.with_context(|| format!("the spinner says: {line}"))
    };
    Ok(Restored {
        mapped: field("mapped")?.parse()?,
        read: field("read")?.parse()?,
        random: field("random")?.into(),
    })
}

/// A guest in which a spinner runs.
fn spinning(context: &Context, options: Options) -> Result<Vm> {
    let vm = context.boot(options)?;
    await_random(&vm)?;
    vm.spawn(
        ["contract", "spin", "--out", "/tmp/spinner"],
        "/tmp/spinner.err",
    )?;
    wait("the spinner spins", || {
        Ok(vm
            .shell("cat /tmp/spinner || true")?
            .contains("spinning")
            .then_some(()))
    })?;
    Ok(vm)
}

fn after_the_barrier_clones_draw_different_bytes(context: &Context) -> Result<()> {
    // One processor for the spinner, one for the kernel's own work; no RDRAND
    // (qemu64 has none), so that nothing but the ID tells the clones apart.
    let mut vm = spinning(
        context,
        Options {
            smp: Some(2),
            ..genctr(42)
        },
    )?;
    let rdrand = vm.shell("grep -cw rdrand /proc/cpuinfo || true")?;
    ensure!(rdrand.trim() == "0", "the guest has RDRAND");
    vm.shell(&format!(
        "while [ $(cut -d. -f1 /proc/uptime) -lt {OLD} ]; do sleep 1; done"
    ))?;
    let snapshot = "old".parse()?;
    vm.snapshot(&snapshot)?;

    let mut seen: Vec<Restored> = Vec::new();
    for value in 43..47 {
        let clone = vm.clone_from(&snapshot, Some(value), None)?;
        let restored = restored(&clone)?;
        ensure!(
            restored.mapped == value,
            "clone {value} saw {}",
            restored.mapped
        );
        ensure!(
            restored.read == value,
            "clone {value} read {}",
            restored.read
        );
        let twin = seen.iter().find(|other| other.random == restored.random);
        ensure!(
            twin.is_none(),
            "the same bytes twice: {restored:?} and {twin:?}"
        );
        seen.push(restored);
        no_splat(&clone)?;
    }
    Ok(())
}

fn the_counter_is_new_before_the_first_instruction(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    // Where the counter is: the second page of what VGIA points at.
    let table = "cat /sys/firmware/acpi/tables/SSDT* | tr -d '\\n' | grep -ao 'VGIA.....'";
    let bytes = vm.exec(["sh", "-c", table])?.stdout;
    ensure!(
        bytes.len() >= 9 && bytes[4] == 0x0c,
        "VGIA is not a dword: {bytes:x?}"
    );
    let vgia = u32::from_le_bytes(bytes[5..9].try_into()?);
    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;

    let paused = Options {
        paused: true,
        ..vm.options()?
    };
    let clone = vm.clone_unchecked(
        &snapshot,
        Options {
            genctr: Some(77),
            ..paused
        },
        None,
    )?;
    let status = clone.qmp(&vm::qapi::qmp::query_status {})?;
    ensure!(!status.running, "the clone runs already");
    let words = clone.qmp(&vm::qapi::qmp::human_monitor_command {
        command_line: format!("xp /4wx {:#x}", vgia + 4096),
        cpu_index: None,
    })?;
    let expected = "0x0000004d 0x00000000 0x00000000 0x00000000";
    ensure!(
        words.trim().ends_with(expected),
        "in the guest's memory: {words}"
    );

    clone.qmp(&vm::qapi::qmp::cont {})?;
    let said = counter(&clone)?;
    ensure!(said == "read 77, mapped 77", "the clone says: {said}");
    Ok(())
}

fn a_restored_guest_has_one_reseed_and_the_new_counter(context: &Context) -> Result<()> {
    let mut vm = spinning(context, genctr(42))?;
    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;
    vm.restore(&snapshot, Some(43))?;
    let restored = restored(&vm)?;
    ensure!(
        (restored.mapped, restored.read) == (43, 43),
        "the spinner saw {restored:?}"
    );
    wait("a reseed", || Ok((reseeds(&vm)? > 0).then_some(())))?;
    vm.shell("sleep 1")?;
    let count = reseeds(&vm)?;
    ensure!(count == 1, "{count} reseeds for one restore");
    no_splat(&vm)
}
