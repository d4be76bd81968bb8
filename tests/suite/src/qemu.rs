// SPDX-License-Identifier: MIT OR Apache-2.0

//! The QEMU series: its additions, and that nothing changes without its options.

use crate::{
    context::{Context, await_random, counter, genctr, no_node, reseeds, wait},
    matrix, tests,
};
use anyhow::{Context as _, Result, bail, ensure};
use harness::{Flavour, Machine, Options, Vm, qapi::qmp};
use std::{fs, process::Command};

tests! {
    its_own_tests_pass (30 min) [Tiny]
    its_own_tests_of_virt_pass (30 min) [Arm64]
    without_genctr_the_firmware_tables_are_those_of_stock_qemu [Tiny]
    without_genctr_the_migration_stream_is_that_of_stock_qemu [Tiny]
    genctr_set_at_run_time_comes_with_a_new_id
    a_reset_guest_sees_the_new_counter
    a_snapshot_with_a_counter_is_refused_without_genctr
    a_snapshot_without_a_counter_is_left_alone
    the_same_counter_is_warned_about
}

const GUID: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";

/// Expect that all qtests of the device pass. Stock QEMU has 3 of them, the series adds 13 and 5.
fn its_own_tests_pass(context: &Context) -> Result<()> {
    qtests_pass(context, "qemu", "qemu-system-x86_64", 3 + 13 + 5)
}

/// Expect the same of those for the machine `virt`.
fn its_own_tests_of_virt_pass(context: &Context) -> Result<()> {
    qtests_pass(context, "qemu-arm64", "qemu-system-aarch64", 8)
}

fn qtests_pass(context: &Context, qemu: &str, program: &str, number: usize) -> Result<()> {
    let qemu = context.host.link(qemu);
    // The tests run in the build root, which has no /dev/kvm: they would use it.
    let folder = tempfile::tempdir_in(context.top.join("out"))?;
    // They make their boot disk below tests/.
    fs::create_dir(folder.path().join("tests"))?;
    let output = Command::new(context.top.join("scripts/buildroot"))
        .args(["--", "env"])
        .args(
            [
                ("QTEST_QEMU_BINARY", program),
                ("QTEST_QEMU_IMG", "qemu-img"),
            ]
            .map(|(name, program)| format!("{name}={}/bin/{program}", qemu.display())),
        )
        .arg(qemu.join("bin/vmgenid-test"))
        .args(["--tap", "-k"])
        .current_dir(folder.path())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && said.contains("/vmgenid/"),
        "{}: {said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let passed = said.lines().filter(|line| line.starts_with("ok ")).count();
    ensure!(
        passed == number,
        "it ran {passed} tests, not {number}: {said}"
    );
    Ok(())
}

/// Boots a guest with each QEMU. The devices differ only in their random IDs.
fn flavours(context: &Context) -> Result<[Vm; 2]> {
    let boot = |qemu| {
        context.boot(Options {
            qemu,
            no_genctr: true,
            ..Options::default()
        })
    };
    Ok([boot(Flavour::Stock)?, boot(Flavour::Genctr)?])
}

/// Expect that without `genctr` the ACPI tables and the fw_cfg files are those of stock QEMU, and
/// that they differ with it.
fn without_genctr_the_firmware_tables_are_those_of_stock_qemu(context: &Context) -> Result<()> {
    let [stock, ours] = flavours(context)?;
    for (what, script) in [
        (
            "the ACPI tables",
            "cd /sys/firmware/acpi/tables; md5sum SSDT* DSDT; od -An -v -tx1 SSDT*",
        ),
        (
            "the fw_cfg files",
            "cd /sys/firmware/qemu_fw_cfg/by_name; find -L . -name size | sort | xargs grep ''",
        ),
    ] {
        let stock = stock.shell(script)?;
        let ours = ours.shell(script)?;
        ensure!(stock.len() > 100, "{what}: {stock}");
        ensure!(stock == ours, "{what} differ: stock\n{stock}\nours\n{ours}");
    }
    let files = ours.shell("ls /sys/firmware/qemu_fw_cfg/by_name/etc")?;
    ensure!(files.contains("vmgenid_guid"), "fw_cfg has: {files}");
    ensure!(!files.contains("vmgenid_data"), "fw_cfg has: {files}");

    // With a counter they differ, so the comparison can fail.
    let with = context.boot(genctr(42))?;
    let files = with.shell("ls /sys/firmware/qemu_fw_cfg/by_name/etc")?;
    ensure!(
        files.contains("vmgenid_data") && !files.contains("vmgenid_guid"),
        "fw_cfg has: {files}"
    );
    let table = with.shell("cat /sys/firmware/acpi/tables/SSDT* | grep -c CTRA")?;
    ensure!(table.trim() == "1", "no CTRA in the SSDT");
    Ok(())
}

/// The migration stream of a machine that has not run yet, as QEMU writes it into a file. It has
/// nothing but the state of the device models.
fn stream(context: &Context, flavour: Flavour, device: &str) -> Result<Vec<u8>> {
    let options = Options {
        no_device: true,
        paused: true,
        qemu: flavour,
        qemu_arg: ["-device", device, "-rtc", "base=2026-01-01,clock=vm"]
            .map(String::from)
            .into(),
        memory: Some(64),
        ..Options::default()
    };
    let vm = context.boot(options)?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("stream");
    vm.migrate_to_file(&file)?;
    fs::read(&file).with_context(|| format!("read {}", file.display()))
}

/// Expect that without `genctr` the migration stream is that of stock QEMU, and that it differs
/// with `genctr`.
fn without_genctr_the_migration_stream_is_that_of_stock_qemu(context: &Context) -> Result<()> {
    let device = format!("vmgenid,id=vmgenid,guid={GUID}");
    // The division of the RAM into sections depends on timing, so two streams of the same machine
    // can differ on a busy host. Two streams are equal only if both QEMUs write the same.
    let mut stock = Vec::new();
    let mut ours = Vec::new();
    while !ours.iter().any(|ours| stock.contains(ours)) {
        ensure!(
            stock.len() < 8,
            "none of {0} streams is like one of {0} of stock QEMU",
            stock.len()
        );
        stock.push(stream(context, Flavour::Stock, &device)?);
        ours.push(stream(context, Flavour::Genctr, &device)?);
    }
    ensure!(
        stock[0].windows(7).any(|at| at == b"vmgenid"),
        "the stream has no vmgenid at all"
    );

    let with = stream(context, Flavour::Genctr, &format!("{device},genctr=42"))?;
    ensure!(
        !stock.contains(&with) && !ours.contains(&with),
        "a counter makes no difference to the stream"
    );
    Ok(())
}

fn id(vm: &Vm) -> Result<String> {
    Ok(vm.qmp(&qmp::query_vm_generation_id {})?.guid)
}

/// Expect that a counter that is set at run time comes with a new ID and a reseed, that the same
/// value is refused, and that neither a refused value nor a refused ID changes the ID.
fn genctr_set_at_run_time_comes_with_a_new_id(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    await_random(&vm)?;
    let first = id(&vm)?;
    vm.set_genctr(43)?;
    let second = id(&vm)?;
    ensure!(first != second, "the ID is still {first}");
    wait("a reseed", || Ok((reseeds(&vm)? > 0).then_some(())))?;
    ensure!(counter(&vm)? == "read 43, mapped 43", "{}", counter(&vm)?);

    // The same value again would be no new generation.
    let same = vm.qom_set_counter(43);
    ensure!(same.is_err(), "QEMU took the same value again");
    ensure!(id(&vm)? == second, "the refused value changed the ID");
    // The ID alone cannot be changed: the counter would say that nothing has changed.
    let guid = vm.qmp(&qmp::qom_set {
        path: "/machine/peripheral/vmgenid".into(),
        property: "guid".into(),
        value: GUID.into(),
    });
    let said = guid.err().context("QEMU took another guid")?;
    ensure!(format!("{said:#}").contains("guid"), "QEMU says: {said:#}");
    ensure!(id(&vm)? == second, "the refused guid changed the ID");
    Ok(())
}

/// Expect that after a reset the guest reads the counter that was set last, and then each later
/// one, and that a clone that is reset keeps its own.
fn a_reset_guest_sees_the_new_counter(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    vm.set_genctr(43)?;
    // The firmware of the next boot copies the counter from this file, 4096 bytes in
    // (VMGENID_GENCTR_OFFSET). The guest would see an old value there before QEMU corrected it.
    let blob = "/sys/firmware/qemu_fw_cfg/by_name/etc/vmgenid_data/raw";
    let said = vm.shell(&format!("tail -c +4097 {blob} | head -c 4 | od -An -tu4"))?;
    ensure!(said.trim() == "43", "in the blob: {said}");
    vm.reset()?;
    ensure!(
        counter(&vm)? == "read 43, mapped 43",
        "after a reset: {}",
        counter(&vm)?
    );
    // From now on, QEMU writes to the page of the new boot.
    vm.set_genctr(44)?;
    ensure!(
        counter(&vm)? == "read 44, mapped 44",
        "set after a reset: {}",
        counter(&vm)?
    );
    // A clone that is reset keeps its own.
    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;
    let mut clone = vm.clone_from(&snapshot, Some(45), None)?;
    clone.reset()?;
    ensure!(
        counter(&clone)? == "read 45, mapped 45",
        "a clone: {}",
        counter(&clone)?
    );
    Ok(())
}

/// Expect that a snapshot with a counter is refused without `genctr` and by stock QEMU, with a
/// message about it, and that the original still works.
fn a_snapshot_with_a_counter_is_refused_without_genctr(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;
    for qemu in [Flavour::Genctr, Flavour::Stock] {
        let options = Options {
            genctr: None,
            no_genctr: true,
            qemu,
            ..vm.options()?
        };
        let Err(err) = vm.clone_unchecked(&snapshot, options, None) else {
            bail!("{qemu:?} QEMU restored it");
        };
        let err = format!("{err:#}");
        // Stock QEMU can only say that it does not know the subsection.
        let expected = if qemu == Flavour::Genctr {
            "genctr="
        } else {
            "vmgenid"
        };
        ensure!(err.contains(expected), "{qemu:?} QEMU says: {err}");
    }
    ensure!(
        counter(&vm)? == "read 42, mapped 42",
        "the original: {}",
        counter(&vm)?
    );
    Ok(())
}

/// Expect that a guest whose tables have no counter gets none when it is restored, that QEMU says so,
/// and that a reset gives it one.
fn a_snapshot_without_a_counter_is_left_alone(context: &Context) -> Result<()> {
    for (machine, qemu) in [
        (Machine::Pc, Flavour::Genctr),
        (Machine::Pc, Flavour::Stock),
        (Machine::Microvm, Flavour::Genctr),
    ] {
        let mut vm = context.boot(Options {
            no_genctr: true,
            machine,
            qemu,
            ..Options::default()
        })?;
        await_random(&vm)?;
        let snapshot = "s".parse()?;
        vm.snapshot(&snapshot)?;

        let options = Options {
            no_genctr: false,
            genctr: Some(5),
            qemu: Flavour::Genctr,
            ..vm.options()?
        };
        let mut clone = vm.clone_unchecked(&snapshot, options, None)?;
        let said = clone.messages();
        ensure!(
            said.contains("without a generation counter"),
            "QEMU says: {said}"
        );
        wait("a reseed", || Ok((reseeds(&clone)? > 0).then_some(())))?;
        no_node(&clone)?;

        // Nor does it get one in the next snapshot, only by a reset.
        let next = "t".parse()?;
        clone.snapshot(&next)?;
        let options = Options {
            genctr: Some(6),
            ..clone.options()?
        };
        let mut second = clone.clone_unchecked(&next, options, None)?;
        ensure!(
            second.messages().contains("without a generation counter"),
            "in the second clone"
        );
        no_node(&second)?;
        second.reset()?;
        ensure!(
            counter(&second)? == "read 6, mapped 6",
            "after a reset: {}",
            counter(&second)?
        );

        // A QEMU whose guest got a counter by a reset forgets that when it loads the snapshot.
        let told = |vm: &Vm| {
            vm.messages()
                .matches("without a generation counter")
                .count()
        };
        let before = told(&second);
        second.qmp(&qmp::stop {})?;
        matrix::load_snapshot(&second, "t")?;
        second.qmp(&qmp::cont {})?;
        no_node(&second)?;
        let after = told(&second);
        ensure!(after == before + 1, "QEMU says: {}", second.messages());
    }
    Ok(())
}

/// Expect one warning where a clone is restored with the counter of the snapshot, and no message
/// with another counter.
fn the_same_counter_is_warned_about(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;
    let clone = vm.clone_unchecked(&snapshot, vm.options()?, None)?;
    let said = clone.messages();
    ensure!(said.matches("warning").count() == 1, "QEMU says: {said}");
    ensure!(
        said.contains("the generation counter is that of"),
        "QEMU says: {said}"
    );
    let other = vm.clone_from(&snapshot, Some(43), None)?;
    ensure!(
        other.messages().is_empty(),
        "QEMU says: {}",
        other.messages()
    );
    Ok(())
}
