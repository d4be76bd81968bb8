// SPDX-License-Identifier: MIT OR Apache-2.0

//! VMClock as the source of the generation counter: when the driver uses it, what the driver
//! refuses, and that Linux's own driver for it is not disturbed.
//!
//! With VMGENID_SOURCE=vmclock all promises, and all tests with clones, run on it.

use crate::{
    context::{Context, Reply, expect_counter, genctr, no_node, no_splat, wait},
    stepper, tests,
    vmforks::{self, Background},
};
use anyhow::{Context as _, Result, ensure};
use harness::{Add, Options, Source, Vm, kernel};
use std::{fs, process::Command, thread};
use tempfile::TempDir;

tests! {
    ctra_is_taken_where_both_exist
    the_parameter_chooses_vmclock
    a_counter_of_64_bits_gives_its_low_half
    a_page_that_lies_is_refused
    a_page_that_is_being_changed_is_waited_for
    calls_that_must_not_sleep_say_so_while_the_page_changes
    a_page_in_ram_is_refused
    two_vmclocks_are_refused
    without_an_id_device_there_is_no_node
    linuxs_driver_is_not_disturbed
}

/// `VMCLOCK_ADDR` of QEMU's `hw/acpi/vmclock.h`.
const PAGE: u64 = 0xfeff_b000;

/// Offsets in `struct vmclock_abi`.
const MAGIC: u64 = 0;
const SIZE: u64 = 4;
const VERSION: u64 = 8;
const SEQ_COUNT: u64 = 12;
const FLAGS: u64 = 24;
const COUNTER: u64 = 104;

fn vmclock(counter: u32) -> Options {
    Options {
        source: Source::Vmclock,
        ..genctr(counter)
    }
}

/// A machine with both counters: CTRA with 42, VMClock with 77.
fn both(parameter: &[&str]) -> Options {
    Options {
        parameter: parameter.iter().map(ToString::to_string).collect(),
        qemu_arg: ["-device", "vmclock,vm-generation-counter=77"]
            .map(String::from)
            .into(),
        ..genctr(42)
    }
}

fn module() -> String {
    kernel::driver(&kernel::default()).to_string()
}

/// Reloads the module. Returns the lines that the driver logs.
fn reload(vm: &Vm) -> Result<String> {
    vm.shell(&format!(
        "rmmod {module} 2>/dev/null; dmesg -c >/dev/null; insmod /vmgenid.ko && \
         dmesg | sed 's/^[^]]*] //' | grep -i vmgen || true",
        module = module()
    ))
}

/// Reloads the module, and checks that the driver gives this reason in one line and makes no node.
fn refused(vm: &Vm, why: &str) -> Result<()> {
    let said = reload(vm)?;
    let line = format!("VMClock {why}: no generation counter, reseeding only");
    ensure!(
        said.matches("VMClock").count() == 1 && said.contains(&line),
        "expected: {line}: {said}"
    );
    no_node(vm)
}

/// Expect that CTRA is the source where both exist and the module has no parameter.
fn ctra_is_taken_where_both_exist(context: &Context) -> Result<()> {
    let vm = context.boot(both(&[]))?;
    expect_counter(&vm, 42)?;
    no_splat(&vm)
}

/// Expect that VMClock is the source with `vmclock=1`, and that CTRA is the source where there is
/// no VMClock, or where VMClock has no counter, which the driver says in one line.
fn the_parameter_chooses_vmclock(context: &Context) -> Result<()> {
    let vm = context.boot(both(&["vmclock=1"]))?;
    expect_counter(&vm, 77)?;
    no_splat(&vm)?;
    let mut options = both(&["vmclock=1"]);
    options.qemu_arg.clear();
    expect_counter(&context.boot(options)?, 42)?;
    // Nor is a VMClock without a counter a source.
    let mut options = both(&["vmclock=1"]);
    options.qemu_arg = ["-device", "vmclock"].map(String::from).into();
    let vm = context.boot(options)?;
    expect_counter(&vm, 42)?;
    let said = vm.shell("dmesg | grep -c 'VMClock has no generation counter: not used'")?;
    ensure!(said.trim() == "1", "{said}");
    no_splat(&vm)
}

/// Expect that `read` returns the low 32 bits of a larger counter, and that the crate returns all
/// 64 bits.
fn a_counter_of_64_bits_gives_its_low_half(context: &Context) -> Result<()> {
    let vm = vmforks::boot(context, vmclock(5))?;
    vmforks::poke(&vm, PAGE + COUNTER + 4, 7)?;
    expect_counter(&vm, 5)?;
    // The crate has all 64 bits: those of the page.
    let said = vm.shell("vmgenid get")?;
    ensure!(said.trim() == ((7u64 << 32) + 5).to_string(), "{said}");
    no_splat(&vm)
}

/// Expect one line and no node for each field that is wrong, and a node again when the field is
/// right.
fn a_page_that_lies_is_refused(context: &Context) -> Result<()> {
    let vm = vmforks::boot(context, vmclock(42))?;
    for (offset, wrong, right, why) in [
        (
            MAGIC,
            0,
            0x4b4c_4356,
            "does not begin with its magic number",
        ),
        (SIZE, 111, 4096, "is too short for a generation counter"),
        (
            VERSION,
            0x00ff_0002,
            0x00ff_0001,
            "has another version than 1",
        ),
        (FLAGS, 0xff, 0x100, "has no generation counter"),
        (SEQ_COUNT, 1, 2, "has been changing for 100 ms"),
    ] {
        vmforks::poke(&vm, PAGE + offset, wrong)?;
        refused(&vm, why)?;
        vmforks::poke(&vm, PAGE + offset, right)?;
        let said = reload(&vm)?;
        ensure!(!said.contains("VMClock"), "{why}, mended: {said}");
        expect_counter(&vm, 42)?;
    }
    // The driver accepts a counter that has become smaller.
    vmforks::poke(&vm, PAGE + COUNTER, 41)?;
    expect_counter(&vm, 41)?;
    no_splat(&vm)
}

/// Expect that `open`, and a read of a new counter, wait for the hypervisor to end a change of the
/// page, but not for ever. A read of an unchanged counter does not wait: it returns as if it had come
/// before the change.
fn a_page_that_is_being_changed_is_waited_for(context: &Context) -> Result<()> {
    let vm = vmforks::boot(context, vmclock(42))?;
    vmforks::poke(&vm, PAGE + SEQ_COUNT, 1)?;
    let read = "dd if=/dev/vmgenid bs=4 count=1";
    let fails = |script: &str, error: &str| -> Result<()> {
        let output = vm.exec(["sh", "-c", script])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            !output.status.success() && said.contains(error),
            "{script}: expected {error}: {said}"
        );
        Ok(())
    };
    // The open fails: it waits for the end of the change, but only for 100 ms.
    fails(read, "Input/output error")?;
    vmforks::poke(&vm, PAGE + SEQ_COUNT, 2)?;
    expect_counter(&vm, 42)?;

    // A file that was opened before reads an unchanged counter, then a new one.
    let reader = r#"exec 3</dev/vmgenid
        (for n in 1 2; do
            until [ -e /go$n ]; do sleep 0.1; done
            dd bs=4 count=1 <&3 2>/out$n | od -An -tu4 >>/out$n
            mv /out$n /end$n
        done) >/dev/null 2>&1 &"#;
    vm.shell(&format!("{reader} true"))?;
    let read = |n: u32| -> Result<String> {
        vm.shell(&format!("touch /go{n}"))?;
        wait("the end of the read", || {
            let said = vm.shell(&format!("cat /end{n} 2>/dev/null || true"))?;
            Ok((!said.is_empty()).then_some(said))
        })
    };
    vmforks::poke(&vm, PAGE + SEQ_COUNT, 3)?;
    let said = read(1)?;
    ensure!(said.trim().ends_with("42"), "an unchanged counter: {said}");
    vmforks::poke(&vm, PAGE + COUNTER, 43)?;
    let said = read(2)?;
    ensure!(said.contains("Input/output error"), "a new one: {said}");
    // The hypervisor ends its change while an `open` waits.
    let waits = stepper::function(&vm, "kernel::time::delay::fsleep")?;
    let said = thread::scope(|scope| {
        let mut gdb = vm.debug()?;
        gdb.set_breakpoint(waits)?;
        let read = scope.spawn(|| vm.shell("dd if=/dev/vmgenid bs=4 count=1 | od -An -tu4"));
        gdb.run()?;
        vm.qom_set_counter(44)?;
        drop(gdb);
        read.join().expect("a thread that does not panic")
    })?;
    ensure!(said.trim() == "44", "a change that ends: {said}");
    vmforks::poke(&vm, PAGE + COUNTER, 42)?;
    expect_counter(&vm, 42)?;
    no_splat(&vm)
}

/// Expect that while the hypervisor changes the page, a read with O_NONBLOCK of a new counter is
/// EAGAIN and poll(0) reports nothing, and that poll reports the file as readable when the change
/// has ended.
fn calls_that_must_not_sleep_say_so_while_the_page_changes(context: &Context) -> Result<()> {
    let vm = vmforks::boot(context, vmclock(42))?;
    let start = |way: &str| -> Result<Background> {
        let process = Background::start(&vm, &format!("exec contract at-once --way {way}"))?;
        process.await_line(&vm, "waiting at 42")?;
        Ok(process)
    };
    let processes = [
        (start("nonblock")?, "EAGAIN"),
        (start("poll")?, "not-ready"),
    ];
    vmforks::poke(&vm, PAGE + SEQ_COUNT, 1)?;
    vmforks::poke(&vm, PAGE + COUNTER, 43)?;
    for (process, expected) in &processes {
        let (answer, _) = wait("an answer", || Reply::first(&process.says(&vm)?, 43))?;
        ensure!(answer == *expected, "{answer}, expected {expected}");
    }
    vmforks::poke(&vm, PAGE + SEQ_COUNT, 2)?;
    for (process, expected) in &processes {
        // This line comes when the process has read 43.
        wait(expected, || Reply::of(&process.says(&vm)?, 43))?;
    }
    no_splat(&vm)
}

/// A table with VMClock devices whose pages are at these addresses, and the argument for QEMU.
fn table(context: &Context, pages: &[u64]) -> Result<(TempDir, Vec<String>)> {
    let device = |(n, page): (usize, &u64)| {
        format!(
            r#"Device (VC{n:02}) {{
                Name (_HID, "AMZNC10C") Name (_CID, "VMCLOCK") Name (_UID, {n})
                Name (_CRS, ResourceTemplate () {{
                    QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, Cacheable,
                        ReadOnly, 0, {page:#x}, {last:#x}, 0, 0x1000) }})
            }}"#,
            last = page + 0xfff
        )
    };
    let devices: String = pages.iter().enumerate().map(device).collect();
    let folder = tempfile::Builder::new()
        .prefix("vmclock-")
        .tempdir_in(context.top.join("out"))?;
    fs::write(
        folder.path().join("t.asl"),
        format!(
            r#"DefinitionBlock ("", "SSDT", 2, "VMGENT", "CLOCKS", 1) {{ Scope (\_SB) {{ {devices} }} }}"#
        ),
    )?;
    let output = Command::new(context.top.join("scripts/buildroot"))
        .args(["--", "iasl", "-f", "-oa", "t.asl"])
        .current_dir(folder.path())
        .output()
        .context("cannot run iasl")?;
    let aml = folder.path().join("t.aml");
    ensure!(
        aml.exists(),
        "iasl: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    let argument = format!("file={}", aml.display());
    Ok((folder, vec!["-acpitable".into(), argument]))
}

fn boot_with_table(context: &Context, pages: &[u64]) -> Result<Vm> {
    let (_folder, qemu_arg) = table(context, pages)?;
    context.boot(Options {
        no_genctr: true,
        qemu_arg,
        ..Options::default()
    })
}

/// Expect that a page in System RAM, at 16 MiB, is refused: the firmware cannot show memory of the
/// kernel to processes.
fn a_page_in_ram_is_refused(context: &Context) -> Result<()> {
    let vm = boot_with_table(context, &[0x100_0000])?;
    refused(&vm, "is in System RAM")?;
    no_splat(&vm)
}

/// Expect that two VMClocks are refused: the driver cannot know which one has the counter.
fn two_vmclocks_are_refused(context: &Context) -> Result<()> {
    let vm = boot_with_table(context, &[0xf_0000, 0xf_1000])?;
    refused(&vm, "is there more than once")?;
    no_splat(&vm)
}

/// Expect that VMClock without a generation ID device gives no node: nothing would reseed the
/// kernel. One line says so.
fn without_an_id_device_there_is_no_node(context: &Context) -> Result<()> {
    let vm = context.boot(Options {
        no_device: true,
        no_module: true,
        qemu_arg: ["-device", "vmclock,vm-generation-counter=77"]
            .map(String::from)
            .into(),
        ..Options::default()
    })?;
    // Where the module does not load, busybox tries twice.
    let said = vm.shell(
        "insmod /vmgenid.ko 2>/dev/null; dmesg | sed 's/^[^]]*] //' | \
         grep 'this machine has no generation ID device' | uniq",
    )?;
    ensure!(
        said.matches("no generation ID device").count() == 1,
        "the driver says: {said}"
    );
    no_node(&vm)?;
    no_splat(&vm)
}

/// Expect that `ptp_vmclock` binds its device before and after the module was loaded, that its node
/// shows the same counter, and that a change reaches both. Expect that ClockBound's client of
/// `/dev/vmclock0` sees each change, and that `vmgenid get` names that node where its user may not
/// open it.
fn linuxs_driver_is_not_disturbed(context: &Context) -> Result<()> {
    let mut options = vmclock(42);
    let load = context.add_ptp_vmclock(&mut options);
    options.add.push(Add {
        host: context.program("clockbound"),
        guest: "/bin/clockbound".into(),
    });
    let vm = context.boot(options)?;
    // 4 bytes at the counter's offset, by pread(2).
    let peek = "dd if=/dev/vmclock0 bs=4 skip=26 count=1 2>/dev/null | od -An -tu4";
    let same = |vm: &Vm, expected: u32| -> Result<()> {
        let said = vm.shell(peek)?;
        ensure!(said.trim() == expected.to_string(), "/dev/vmclock0: {said}");
        expect_counter(vm, expected)
    };
    vm.shell(&load)?;
    same(&vm, 42)?;
    vm.shell("clockbound >/tmp/markers 2>&1 & echo $! >/tmp/clockbound")?;
    // The marker grows by one with each change.
    let markers = |expected: usize| {
        wait(&format!("{expected} markers"), || {
            let said = vm.shell("cat /tmp/markers")?;
            let markers: Result<Vec<u64>, _> = said.lines().map(str::parse).collect();
            let markers = markers.with_context(|| said.clone())?;
            let in_a_row = markers.windows(2).all(|pair| pair[1] == pair[0] + 1);
            ensure!(in_a_row && markers.len() <= expected, "markers: {said}");
            Ok((markers.len() == expected).then_some(()))
        })
    };
    markers(1)?;
    vm.qom_set_counter(43)?;
    same(&vm, 43)?;
    markers(2)?;
    reload(&vm)?;
    same(&vm, 43)?;
    vm.qom_set_counter(44)?;
    same(&vm, 44)?;
    markers(3)?;
    vm.shell("kill $(cat /tmp/clockbound); while kill -0 $(cat /tmp/clockbound); do sleep 0.1; done 2>&1")?;
    vm.shell("rmmod ptp_vmclock && insmod /ptp_vmclock.ko")?;
    vm.qom_set_counter(45)?;
    same(&vm, 45)?;

    // Without /dev/vmgenid, a user who may not open /dev/vmclock0 gets an error that names that
    // node, unless there is another source.
    let get = "rm -f /dev/vmgenid; su nobody -c 'vmgenid get'";
    let output = vm.exec(["sh", "-c", get])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success() && said.contains("/dev/vmclock0"),
        "as nobody: {said}"
    );
    let again = format!(
        "rmmod {module}; insmod /vmgenid.ko sysgenid=1",
        module = module()
    );
    vm.shell(&format!("{again}; {get}"))?;
    no_splat(&vm)
}
