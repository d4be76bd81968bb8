// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guests under stock QEMU, guests without a counter or without a device, and guests with the other
//! module.

use crate::{
    context::{
        Context, addresses, await_random, counter, driver, expect_counter, expect_reseeds, genctr,
        id_in_memory, lines, no_node, no_splat, settled_reseeds, wait,
    },
    promises, tests,
};
use anyhow::{Result, ensure};
use harness::{Add, Flavour, Options, Vm, kernel, qapi::qmp::query_vm_generation_id};

tests! {
    under_stock_qemu_the_driver_reseeds_and_has_no_node
    without_a_counter_the_driver_reseeds_and_has_no_node
    without_the_device_the_module_loads_and_waits [NotBuiltin]
    the_counter_needs_no_second_look
    beside_vmgenctr_the_other_module_is_refused [Builtin]
    the_promises_run_as_a_kernel_selftest [Mainline]
    debians_kernel_for_arm64_keeps_the_promises [Arm64Acpi, NotBuiltin]
    the_id_is_nowhere_to_be_seen
    the_pages_are_cached [Tiny]
}

fn reseeds_without_a_node(context: &Context, options: Options) -> Result<()> {
    let mut vm = context.boot(options)?;
    await_random(&vm)?;
    let bound = vm.shell(&format!("ls -d {}/*[:.]*", driver()))?;
    ensure!(bound.lines().count() == 1, "bound devices: {bound}");
    no_node(&vm)?;
    // The driver logs nothing about an absent CTRA.
    let said = vm.shell("dmesg | grep -i 'vmgen.*CTRA' || true")?;
    ensure!(said.is_empty(), "the driver says: {said}");

    let (snapshot, before) = ("s".parse()?, settled_reseeds(&vm)?);
    vm.snapshot(&snapshot)?;
    let clone = vm.clone_from(&snapshot, None, None)?;
    expect_reseeds(&clone, before + 1)?;
    expect_reseeds(&vm, before)?;
    no_node(&clone)?;
    no_splat(&clone)
}

/// Expect that under stock QEMU the driver binds the device, makes no node and logs nothing about
/// CTRA, and that it reseeds once in a clone.
fn under_stock_qemu_the_driver_reseeds_and_has_no_node(context: &Context) -> Result<()> {
    reseeds_without_a_node(
        context,
        Options {
            qemu: Flavour::Stock,
            ..Options::default()
        },
    )
}

/// Expect the same under the patched QEMU without `genctr`.
fn without_a_counter_the_driver_reseeds_and_has_no_node(context: &Context) -> Result<()> {
    reseeds_without_a_node(
        context,
        Options {
            no_genctr: true,
            ..Options::default()
        },
    )
}

/// Expect that without a device the module is loaded and makes no node, and that it can be loaded
/// again.
fn without_the_device_the_module_loads_and_waits(context: &Context) -> Result<()> {
    let vm = context.boot(Options {
        no_device: true,
        ..Options::default()
    })?;
    let modules = vm.shell("cat /proc/modules")?;
    ensure!(modules.starts_with("vmgenid "), "modules: {modules}");
    let bound = vm.shell("ls -d /sys/bus/platform/drivers/vmgenid; ls /dev/vmgenid || true")?;
    ensure!(
        bound.trim() == "/sys/bus/platform/drivers/vmgenid",
        "there is: {bound}"
    );
    vm.shell("rmmod vmgenid && insmod /vmgenid.ko")?;
    no_splat(&vm)
}

/// Expect that 0 and the largest number are counters like any other, in a read and in the mapping.
fn the_counter_needs_no_second_look(context: &Context) -> Result<()> {
    // Both ends of the range are valid counters.
    for value in [0, u32::MAX] {
        let vm: Vm = context.boot(genctr(value))?;
        let said = vm.shell("contract counter")?;
        ensure!(
            said.trim() == format!("read {value}, mapped {value}"),
            "{value}: {said}"
        );
    }
    Ok(())
}

/// Expect that `contract run` prints KTAP and exits with 0 where all promises are kept, with 1 and
/// "not ok" for most promises where the node is another device, and with 4 and a skip where there
/// is no node.
fn the_promises_run_as_a_kernel_selftest(context: &Context) -> Result<()> {
    let vm = context.boot(genctr(42))?;
    let run = |script: &str| -> Result<(u8, Vec<String>)> {
        let output = vm.exec(["sh", "-c", script])?;
        let said = String::from_utf8(output.stdout)?;
        let lines = said.lines().filter(|line| !line.starts_with('#'));
        Ok((output.status.code(), lines.map(String::from).collect()))
    };
    let promises = promises::list(context, "contract", &["list"])?;
    let (status, lines) = run("contract run")?;
    let mut expected = vec!["KTAP version 1".into(), format!("1..{}", promises.len())];
    let numbered = (1..).zip(&promises);
    expected.extend(numbered.map(|(number, (name, _))| format!("ok {number} {name}")));
    ensure!(status == 0 && lines == expected, "{status}: {lines:#?}");
    no_splat(&vm)?;

    let (status, lines) = run("mv /dev/vmgenid /dev/real; mknod /dev/vmgenid c 1 3; contract run")?;
    let broken = lines.iter().filter(|line| line.starts_with("not ok "));
    let broken = broken.count();
    ensure!(
        status == 1 && lines.len() == expected.len() && broken > promises.len() / 2,
        "/dev/null in its place: {status}: {lines:#?}"
    );
    let (status, lines) = run("rm /dev/vmgenid; contract run")?;
    ensure!(
        status == 4 && lines == ["KTAP version 1", "1..0 # SKIP no /dev/vmgenid"],
        "without the node: {status}: {lines:#?}"
    );
    Ok(())
}

/// Expect that the module which was built with Debian's headers loads into Debian's kernel for arm64,
/// and that the promises are kept there.
fn debians_kernel_for_arm64_keeps_the_promises(context: &Context) -> Result<()> {
    let vm = context.boot(Options {
        kernel: Some(format!("arm64-{}", kernel::STOCK)),
        memory: Some(512),
        ..genctr(42)
    })?;
    let release = vm.shell("uname -r")?;
    ensure!(release.ends_with("-cloud-arm64\n"), "{release}");
    // The disk's driver is a module there, which is not in the initramfs. A promise wants any device.
    vm.shell("mknod /dev/vda c 1 5")?;
    let output = vm.exec(["contract", "run"])?;
    let said = String::from_utf8_lossy(&output.stdout);
    let promises = promises::list(context, "contract", &["list"])?.len();
    let kept = said.lines().filter(|line| line.starts_with("ok ")).count();
    ensure!(
        output.status.success() && kept == promises,
        "{}: {kept} of {promises}: {said}",
        output.status
    );
    no_splat(&vm)
}

/// Expect that vmgenid.ko is not loaded, because of a missing symbol, on a kernel that has its own
/// driver built in, and that `vmgenctr` still works.
fn beside_vmgenctr_the_other_module_is_refused(context: &Context) -> Result<()> {
    let other = context.top.join("out/tiny/vmgenid.ko");
    let vm = context.boot(Options {
        add: vec![Add {
            host: other,
            guest: "/other.ko".into(),
        }],
        ..genctr(42)
    })?;
    let load = vm.exec(["sh", "-c", "dmesg -c >/dev/null; insmod /other.ko"])?;
    ensure!(!load.status.success(), "vmgenid.ko was loaded");
    // Other parts of the kernel may print lines at the same time.
    let said = vm.shell("dmesg | sed 's/^[^]]*] //' | grep ^vmgen | uniq")?;
    ensure!(
        said.trim() == "vmgenid: Unknown symbol add_vmfork_randomness (err -2)",
        "the kernel says: {said}"
    );
    let modules = vm.shell("cat /proc/modules")?;
    ensure!(modules.starts_with("vmgenctr "), "modules: {modules}");
    let said = counter(&vm)?;
    ensure!(said == "read 42, mapped 42", "{said}");
    no_splat(&vm)
}

/// Expect that no file of sysfs, debugfs, /proc or the kernel's log has the generation ID or a half of
/// it, as bytes or as hexadecimal digits. It is a secret: the kernel's generator is reseeded with it.
/// (QEMU itself gives it to root, by fw_cfg.)
fn the_id_is_nowhere_to_be_seen(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    vm.set_genctr(43)?;
    expect_counter(&vm, 43)?;
    let output = vm.exec([
        "sh",
        "-c",
        "mount -t debugfs debugfs /sys/kernel/debug
        dmesg
        find /sys/firmware/qemu_fw_cfg -name raw -perm -004
        find /sys /proc/self /proc/sys /proc/driver -path /sys/firmware/qemu_fw_cfg -prune -o \
            -type f -print0 | xargs -0 -n 50 sh -c '
                # A file whose read blocks ends the batch: then each file on its own.
                timeout 5 cat \"$@\"
                [ $? -lt 124 ] || for file do timeout 1 cat \"$file\"; done' sh 2>/dev/null
        for file in iomem ioports interrupts devices modules kallsyms; do cat /proc/$file; done",
    ])?;
    let seen = output.stdout;
    let has = |what: &[u8]| {
        seen.windows(what.len())
            .any(|at| at.eq_ignore_ascii_case(what))
    };
    // A control finds existing bytes: the device's ID in its ACPI table, and text.
    ensure!(
        has(b"VM_Gen_Counter") && has(b"Linux version"),
        "nothing was read"
    );

    ensure!(!has(b"/raw\n"), "all users can read QEMU's fw_cfg");

    let id = id_in_memory(&vm)?;
    for half in id.chunks(8) {
        ensure!(!has(half), "the bytes {half:x?} of the ID are there");
        let half = half.try_into()?;
        for number in [u64::from_be_bytes(half), u64::from_le_bytes(half)] {
            let digits = format!("{number:016x}");
            ensure!(!has(digits.as_bytes()), "{digits} of the ID is there");
        }
    }
    let guid = vm.qmp(&query_vm_generation_id {})?.guid;
    ensure!(!has(guid.as_bytes()), "the ID is there, as text");
    no_splat(&vm)
}

/// Expect that the kernel, and a process, have the device's pages mapped write-back, as Microsoft's
/// specification says.
fn the_pages_are_cached(context: &Context) -> Result<()> {
    let vm = context.boot(genctr(42))?;
    await_random(&vm)?;
    vm.spawn(["contract", "spin", "--out", "/tmp/spin"], "/tmp/said")?;
    wait("a process that has the page mapped", || {
        let said = vm.shell("cat /tmp/spin 2>/dev/null || true")?;
        Ok(said.contains("spinning").then_some(()))
    })?;
    let [id, counter] = addresses(&vm)?.map(|address| u64::from(address) & !4095);
    vm.shell("mount -t debugfs debugfs /sys/kernel/debug")?;
    let list = lines(&vm, "cat /sys/kernel/debug/x86/pat_memtype_list")?;
    // Only the kernel maps the ID's page. The kernel and the process map the counter's page.
    for (page, times) in [(id, 1), (counter, 2)] {
        let range = format!("{page:#018x}-{:#018x}]", page + 4096);
        let types: Vec<_> = list.iter().filter(|line| line.contains(&range)).collect();
        ensure!(
            types.len() == times && types.iter().all(|line| line.ends_with(" write-back")),
            "{range}: {list:#?}"
        );
    }
    Ok(())
}
