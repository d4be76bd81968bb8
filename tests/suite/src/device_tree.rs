// SPDX-License-Identifier: MIT OR Apache-2.0

//! The device in a device tree: its interrupt, and nodes that are malformed.
//!
//! No guest has both ACPI and a device tree: Linux on arm64 unflattens the device tree only where it
//! does not use ACPI (`setup_arch()`), and other kernels of the suite have no `CONFIG_OF`.

use crate::{
    context::{Context, addresses, counter, driver, genctr, no_splat, wait},
    notifications::expect_notified,
    reports, tests,
    vmforks::{self, Background, expect_count},
};
use anyhow::{Context as _, Result, ensure};
use harness::{Add, Options, Vm, kernel};
use std::{collections::BTreeMap, fs, path::Path, process::Command, thread::sleep, time::Duration};

tests! {
    [Arm64];
    the_devices_own_interrupt_notifies
    a_notifier_may_sleep [NotBuiltin]
    the_kernels_own_driver_sleeps_in_its_interrupt [NotBuiltin]
    each_malformed_node_has_one_line [NotBuiltin]
    the_counter_is_vmclocks_where_the_node_has_none [NotBuiltin]
    a_read_waits_for_a_reseed_in_the_interrupt [Builtin]
    two_vmclocks_are_refused [NotBuiltin]
}

/// Expect that the interrupt, without a process that uses the device, has the kernel reseeded once for
/// each change, and wakes a poller.
fn the_devices_own_interrupt_notifies(context: &Context) -> Result<()> {
    let vm = context.boot(genctr(42))?;
    let handlers = vm.shell("grep -c 'vmgen' /proc/interrupts || true")?;
    ensure!(handlers.trim() == "1", "{handlers} interrupts");
    expect_notified(vm)
}

/// Expect that a read that finds a new ID waits while the kernel's own driver handles it, in the
/// device's interrupt on another CPU: until the handler returns, it may install an older key.
fn a_read_waits_for_a_reseed_in_the_interrupt(context: &Context) -> Result<()> {
    let options = Options {
        smp: Some(2),
        ..genctr(42)
    };
    let mut vm = vmforks::boot(context, options)?;
    // The notifier of the test module keeps the interrupt's CPU, the first one, busy. It is counted
    // when it returns. The driver's thread could not run there, so it has the other CPU.
    let script = "cd /sys/kernel/debug/vmforks; at=$(cat at); echo ready; \
        while [ \"$(cat at)\" = \"$at\" ]; do :; done; contract counter; cat count";
    vm.shell("taskset -p 2 $(pgrep -x vmgenctr); echo 500 >/sys/kernel/debug/vmforks/spin")?;
    // Several times: the rule also waits if a work queue thread happens to be runnable on that CPU.
    for (count, value) in (1..).zip(43..53) {
        let reader = Background::start(&vm, &format!("exec taskset 2 sh -c '{script}'"))?;
        reader.await_line(&vm, "ready")?;
        // The work of the call above ends.
        sleep(Duration::from_millis(200));
        vm.set_genctr(value)?;
        let said = reader.end(&vm)?;
        let expected = format!("ready\nread {value}, mapped {value}\n{count}");
        ensure!(said == expected, "{said:?}, expected {expected:?}");
    }
    no_splat(&vm)
}

/// Expect no report of the kernel where a vmfork notifier sleeps.
fn a_notifier_may_sleep(context: &Context) -> Result<()> {
    let mut vm = vmforks::boot(context, genctr(42))?;
    vmforks::sleep(&vm, 100)?;
    vm.set_genctr(43)?;
    expect_count(&vm, 1)?;
    no_splat(&vm)
}

/// Expect that the kernel's own driver calls such a notifier in the handler of its interrupt, which
/// the kernel reports. This shows that the test above can fail.
fn the_kernels_own_driver_sleeps_in_its_interrupt(context: &Context) -> Result<()> {
    let options = Options {
        no_module: true,
        add: vec![Add {
            host: context.module_in_tree("virt/vmgenid.ko"),
            guest: "/mainline.ko".into(),
        }],
        ..genctr(42)
    };
    // The report of this guest's kernel is expected, so it does not fail the test.
    let mut vm = vmforks::boot(&context.unjudged(), options)?;
    vm.shell("insmod /mainline.ko")?;
    vmforks::sleep(&vm, 100)?;
    vm.set_genctr(43)?;
    // The guest itself is not asked: it has slept with its interrupts off.
    let mut said = None;
    wait("the report", || {
        said = reports::first(&String::from_utf8_lossy(&vm.console()?));
        let report = said.as_deref().unwrap_or_default();
        // The first is that of CONFIG_DEBUG_ATOMIC_SLEEP.
        let sleeps = [
            "BUG: sleeping function called from invalid context",
            "BUG: scheduling while atomic",
        ];
        let sleeps = sleeps.iter().any(|words| report.contains(words));
        Ok((sleeps && report.contains("vmgenid_of_irq_handler")).then_some(()))
    })
    .with_context(|| format!("the kernel reports: {said:?}"))
}

/// A range in `reg`.
#[derive(Clone, Copy)]
enum Reg {
    /// So many bytes at this offset in the memory of QEMU's own ID.
    Id(u64, u64),
    /// In that of its counter.
    Page(u64, u64),
    Ram(u64),
    Beyond(u64),
}

/// A node, and the outcome when the driver binds it.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    compatible: &'static str,
    reg: &'static [Reg],
    /// A shared peripheral interrupt and its type: 1 is edge-triggered.
    interrupt: Option<(u32, u32)>,
    /// If it is not absent.
    status: Option<&'static str>,
    /// The error of the bind.
    answer: &'static str,
    /// The driver's line.
    line: Option<&'static str>,
    /// Whether there is a node.
    node: bool,
}

/// A node without an error.
const SOUND: Row = Row {
    name: "sound",
    compatible: "microsoft,vmgenid",
    reg: &[ID, PAGE],
    interrupt: Some((90, 1)),
    status: None,
    answer: "none",
    line: None,
    node: true,
};

/// A node that is not bound.
const REFUSED: Row = Row {
    answer: "EINVAL",
    node: false,
    ..SOUND
};

/// A node that is no device.
const DISABLED: &str = "disabled";

const HOLDS_ID: &str = "reg[1] holds a generation ID: no generation counter, reseeding only";

const ID: Reg = Reg::Id(0x100, 16);
const PAGE: Reg = Reg::Page(0, 0x1_0000);
const VMCLOCK: Row = Row {
    name: "vmclock",
    compatible: "amazon,vmclock",
    reg: &[PAGE],
    interrupt: None,
    ..SOUND
};
const NO_COUNTER: Row = Row {
    name: "no-counter",
    reg: &[ID],
    ..SOUND
};

const ROWS: &[Row] = &[
    SOUND,
    Row {
        node: false,
        ..NO_COUNTER
    },
    Row {
        name: DISABLED,
        status: Some(DISABLED),
        ..SOUND
    },
    Row {
        name: "no-reg",
        reg: &[],
        answer: "ENODEV",
        line: Some("reg[0] is missing: no generation ID"),
        ..REFUSED
    },
    Row {
        name: "short-id",
        reg: &[Reg::Id(0x100, 8), PAGE],
        line: Some("reg[0] is shorter than 16 bytes: no generation ID"),
        ..REFUSED
    },
    Row {
        name: "unaligned-id",
        reg: &[Reg::Id(0x104, 16), PAGE],
        line: Some("reg[0] is not 8-byte aligned: no generation ID"),
        ..REFUSED
    },
    Row {
        name: "id-in-ram",
        reg: &[Reg::Ram(16), PAGE],
        line: Some("reg[0] is in System RAM: no generation ID"),
        ..REFUSED
    },
    Row {
        name: "id-nowhere",
        reg: &[Reg::Beyond(16), PAGE],
        line: Some("reg[0] is beyond the physical address width: no generation ID"),
        ..REFUSED
    },
    Row {
        name: "short-page",
        reg: &[ID, Reg::Page(0, 0x800)],
        line: Some("reg[1] is shorter than a page: no generation counter, reseeding only"),
        node: false,
        ..SOUND
    },
    Row {
        name: "unaligned-page",
        reg: &[ID, Reg::Page(8, 0x1_0000)],
        line: Some("reg[1] is not page aligned: no generation counter, reseeding only"),
        node: false,
        ..SOUND
    },
    Row {
        name: "page-in-ram",
        reg: &[ID, Reg::Ram(0x1_0000)],
        line: Some("reg[1] is in System RAM: no generation counter, reseeding only"),
        node: false,
        ..SOUND
    },
    Row {
        name: "page-with-the-id",
        reg: &[ID, Reg::Id(0, 0x1_0000)],
        line: Some(HOLDS_ID),
        node: false,
        ..SOUND
    },
    Row {
        name: "id-in-the-page",
        reg: &[Reg::Page(0x100, 16), PAGE],
        line: Some(HOLDS_ID),
        node: false,
        ..SOUND
    },
    Row {
        name: "no-interrupt",
        interrupt: None,
        line: Some(
            "interrupts[0] is missing or cannot be mapped: no notification, only reads and polls of \
             /dev/vmgenid reseed",
        ),
        ..SOUND
    },
    Row {
        // The serial port has it, with another type.
        name: "interrupt-of-another",
        interrupt: Some((1, 1)),
        line: Some(
            "interrupts[0] is missing or cannot be mapped: no notification, only reads and polls of \
             /dev/vmgenid reseed",
        ),
        ..SOUND
    },
];

/// Expect for each malformed node what the contract says: the error, one line in the kernel's log,
/// and the node or none; and that a sound node works after each. None of them is `dma-coherent`, and
/// the driver maps the memory cached.
fn each_malformed_node_has_one_line(context: &Context) -> Result<()> {
    let mut rows = ROWS.to_vec();
    // Only the first page of reg[1] is the counter's.
    let holds_id = kernel::default() == "arm64-64k";
    rows.push(Row {
        name: "id-behind-4-kib",
        reg: &[Reg::Page(0x1000, 16), PAGE],
        line: holds_id.then_some(HOLDS_ID),
        node: !holds_id,
        ..SOUND
    });
    let (vm, _) = boot(context, &rows)?;
    let devices = devices(&vm)?;
    for row in &rows {
        if row.status.is_some() {
            ensure!(!devices.contains_key(row.name), "{} is a device", row.name);
            continue;
        }
        check(&vm, row, &devices[row.name])
            .and_then(|()| check(&vm, &SOUND, &devices[SOUND.name]))
            .with_context(|| row.name)?;
    }
    no_splat(&vm)
}

/// Boots a guest whose device tree has these nodes beside QEMU's own. No driver binds them. Also
/// returns the addresses of QEMU's own.
fn boot(context: &Context, rows: &[Row]) -> Result<(Vm, [u64; 2])> {
    let plain = context.boot(genctr(42))?;
    let tree = tempfile::tempdir()?;
    let tree = tree.path().join("rows.dtb");
    let own = addresses(&plain)?.map(u64::from);
    fs::write(&tree, plain.exec(["cat", "/sys/firmware/fdt"])?.stdout)?;
    drop(plain);
    // The root's property is that of all nodes that have none.
    fdtput(context, &tree, &["-d"], ["/", "dma-coherent"], &[])?;
    for row in rows {
        add(context, &tree, row, &own)?;
    }
    let vm = context.boot(Options {
        no_module: true,
        qemu_arg: vec!["-dtb".into(), tree.display().to_string()],
        ..genctr(42)
    })?;
    vm.shell("echo 0 >/sys/bus/platform/drivers_autoprobe")?;
    Ok((vm, own))
}

/// Expect that the driver takes the counter of a node `amazon,vmclock`, where its own node has none.
/// The guest itself writes VMClock's page: QEMU has none on this machine.
fn the_counter_is_vmclocks_where_the_node_has_none(context: &Context) -> Result<()> {
    let vm = boot_vmclock(context, &[VMCLOCK, NO_COUNTER])?;
    check(&vm, &NO_COUNTER, &devices(&vm)?[NO_COUNTER.name])?;
    no_splat(&vm)
}

/// Expect that of two such nodes the driver takes neither, and says so.
fn two_vmclocks_are_refused(context: &Context) -> Result<()> {
    let second = Row {
        name: "vmclock-2",
        ..VMCLOCK
    };
    let refused = Row {
        line: Some("VMClock is there more than once: no generation counter, reseeding only"),
        node: false,
        ..NO_COUNTER
    };
    let vm = boot_vmclock(context, &[VMCLOCK, second, refused])?;
    check(&vm, &refused, &devices(&vm)?[refused.name])?;
    no_splat(&vm)
}

/// Boots a guest with these nodes, and writes VMClock's page.
fn boot_vmclock(context: &Context, rows: &[Row]) -> Result<Vm> {
    let (vm, [_, page]) = boot(context, rows)?;
    // The words of struct vmclock_abi: magic, size, version, flags, vm_generation_counter.
    for (offset, value) in [
        (0, 0x4b4c_4356),
        (4, 0x1000),
        (8, 1),
        (24, 0x100),
        (104, 42),
    ] {
        vm.shell(&format!(
            "busybox devmem {:#x} 32 {value:#x}",
            page + offset
        ))?;
    }
    Ok(vm)
}

/// The platform devices, by the names of their nodes.
fn devices(vm: &Vm) -> Result<BTreeMap<String, String>> {
    let said = vm.shell(
        "cd /sys/bus/platform/devices
        for each in *; do [ ! -e $each/of_node ] || echo $(basename $(readlink $each/of_node)) $each; done",
    )?;
    let pairs = said.lines().filter_map(|line| line.split_once(' '));
    Ok(pairs
        .map(|(node, device)| (node.into(), device.into()))
        .collect())
}

/// Loads the module, binds the device, and unloads the module again.
fn check(vm: &Vm, row: &Row, device: &str) -> Result<()> {
    let said = vm.shell(&format!(
        "contract steps load bind={device} | sed -n '/^step bind/,$p'"
    ))?;
    let all = |key: &str| -> Vec<&str> {
        let lines = said.lines().filter_map(|line| line.split_once(' '));
        lines
            .filter(|(its, _)| *its == key)
            .map(|(_, value)| value)
            .collect()
    };
    let prefix = format!("{} {device}: ", kernel::driver(&kernel::default()));
    let lines: Vec<_> = all("log")
        .into_iter()
        .filter_map(|line| line.strip_prefix(&prefix))
        // The driver core's own.
        .filter(|line| !line.starts_with("probe with driver"))
        .collect();
    let node = if row.node { "42" } else { "none" };
    ensure!(
        all("answer") == [row.answer]
            && all("node") == [node]
            && lines == row.line.into_iter().collect::<Vec<_>>(),
        "expected {}, node {node}, {:?}: {said}",
        row.answer,
        row.line
    );
    if row.node {
        let said = counter(vm)?;
        ensure!(said == "read 42, mapped 42", "{said}");
    }
    let bound = vm.shell(&format!("ls {}", driver()))?;
    ensure!(
        bound.lines().any(|line| line == device) == (row.answer == "none"),
        "bound devices: {bound}"
    );
    vm.shell("contract steps unload").map(drop)
}

/// Changes a property of a node of the tree.
fn fdtput(
    context: &Context,
    tree: &Path,
    options: &[&str],
    [node, property]: [&str; 2],
    values: &[String],
) -> Result<()> {
    // The root is a Debian of its own, so its program runs with its libraries.
    let root = context.host.link("arm64-tools").join("root/usr");
    let mut command = Command::new(root.join("lib64/ld-linux-x86-64.so.2"));
    command
        .arg("--library-path")
        .arg(root.join("lib/x86_64-linux-gnu"))
        .arg(root.join("bin/fdtput"))
        .args(options)
        .arg(tree);
    let output = command.args([node, property]).args(values).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "fdtput {node} {property} {values:?}: {said}"
    );
    Ok(())
}

/// Adds a row's node to the tree.
fn add(context: &Context, tree: &Path, row: &Row, own: &[u64; 2]) -> Result<()> {
    let node = format!("/{}", row.name);
    let put = |kind: &str, property: &str, values: &[String]| {
        let options = ["-p", "-t", kind];
        fdtput(context, tree, &options, [&*node, property], values)
    };
    put("s", "compatible", &[row.compatible.into()])?;
    let ranges = row.reg.iter().flat_map(|reg| {
        let (address, size) = match *reg {
            Reg::Id(offset, size) => (own[0] + offset, size),
            Reg::Page(offset, size) => (own[1] + offset, size),
            Reg::Ram(size) => (0x4800_0000, size),
            Reg::Beyond(size) => (1 << 60, size),
        };
        [address >> 32, address & 0xffff_ffff, 0, size].map(|cell| format!("{cell:x}"))
    });
    let ranges: Vec<_> = ranges.collect();
    if !ranges.is_empty() {
        put("x", "reg", &ranges)?;
    }
    if let Some(status) = row.status {
        put("s", "status", &[status.into()])?;
    }
    if let Some((number, kind)) = row.interrupt {
        let cells = [0, number, kind].map(|cell| format!("{cell:x}"));
        put("x", "interrupts", &cells)?;
    }
    Ok(())
}
