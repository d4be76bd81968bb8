// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guests in which what the driver needs of the kernel is missing, is another thing, or is not ready
//! yet; and changes that come while the device, the module or the machine goes away.

use crate::{
    context::{
        Context, await_random, counter, driver, expect_reseeds, genctr, generation, is_builtin,
        lines, no_node, no_splat, scaled, settled_reseeds, wait,
    },
    notifications, tests,
    vmforks::{self, Background, expect_published, notify, published},
};
use anyhow::{Context as _, Result, ensure};
use harness::{Options, Vm, kernel};
use std::collections::BTreeSet;

tests! {
    vmgenid_falls_back_where_dev_random_is_another_thing [NotBuiltin]
    vmgenctr_refuses_where_dev_random_is_another_thing [Builtin]
    a_generator_that_is_not_ready_yet_gets_the_id
    ten_thousand_changes_are_outlived (20 min)
}

const FIRST: u32 = 42;

/// What to make of a `/dev` of one's own: without a device of that name, and with other things in
/// its place.
const OTHERS: [(&str, &str); 7] = [
    ("no /dev/random", "true"),
    ("a regular file", "echo random >/dev/random"),
    ("a folder", "mkdir /dev/random"),
    ("a FIFO", "mkfifo /dev/random"),
    ("/dev/null", "mknod /dev/random c 1 3"),
    // The same name, with an unused number.
    ("a device that is not there", "mknod /dev/random c 1 250"),
    ("a block device", "mknod /dev/random b 1 8"),
];

/// Loads the module where `/dev` is that one. What insmod says, and the lines that the driver adds
/// to the log.
fn load(vm: &Vm, make: &str) -> Result<(bool, Vec<String>)> {
    let name = kernel::driver(&kernel::default());
    // Not for ever: a driver that opened a FIFO would wait for a writer.
    let script = format!(
        "mount -t tmpfs dev /dev && {make} && dmesg -c >/dev/null; \
         timeout -s KILL 20 insmod /vmgenid.ko; loaded=$?; umount -l /dev; exit $loaded"
    );
    let loaded = vm.exec(["sh", "-c", &script])?;
    let said = lines(
        vm,
        // The first out-of-tree module is told, once. What insmod cannot load it tries to load again,
        // by another system call.
        &format!("dmesg | sed 's/^[^]]*] //' | grep {name} | grep -v taints | uniq"),
    )?;
    Ok((loaded.status.success(), said))
}

fn boot(context: &Context) -> Result<Vm> {
    let options = Options {
        no_module: true,
        smp: Some(2),
        ..genctr(FIRST)
    };
    let vm = context.boot(options)?;
    await_random(&vm)?;
    Ok(vm)
}

/// Expect that `vmgenid`, where `/dev/random` is not the kernel's generator when it is loaded, says
/// so in one line, and reseeds by `add_vmfork_randomness()` within the rule.
fn vmgenid_falls_back_where_dev_random_is_another_thing(context: &Context) -> Result<()> {
    let mut vm = boot(context)?;
    // The message in any case.
    let (loaded, usual) = load(&vm, "mknod /dev/random c 1 8")?;
    ensure!(loaded, "not loaded: {usual:?}");
    vm.shell("rmmod vmgenid")?;
    let mut value = FIRST;
    for (what, make) in OTHERS {
        let (loaded, said) = load(&vm, make)?;
        ensure!(
            loaded && said.len() == usual.len() + 1,
            "{what}: loaded: {loaded}; it says {said:?}, and {usual:?} in any case"
        );
        eprintln!("{what}: {said:?}");
        // By a notification, then by a read alone.
        let before = settled_reseeds(&vm)?;
        value += 1;
        vm.set_genctr(value)?;
        expect_reseeds(&vm, before + 1).context(what)?;
        notifications::hold(&vm)?;
        value += 1;
        vm.set_genctr(value)?;
        let generation_before = generation(&vm)?;
        let said = counter(&vm)?;
        ensure!(
            said == format!("read {value}, mapped {value}"),
            "{what}: {said}"
        );
        ensure!(
            generation(&vm)? > generation_before,
            "{what}: not reseeded by the read"
        );
        notifications::release(&vm)?;
        expect_reseeds(&vm, before + 2).context(what)?;
        vm.shell("rmmod vmgenid")?;
    }
    no_splat(&vm)
}

/// Expect that `vmgenctr`, where `/dev/random` is not the kernel's generator when it is loaded,
/// refuses to be loaded and says why in one line.
fn vmgenctr_refuses_where_dev_random_is_another_thing(context: &Context) -> Result<()> {
    let vm = boot(context)?;
    for (what, make) in OTHERS {
        let (loaded, said) = load(&vm, make)?;
        eprintln!("{what}: {said:?}");
        ensure!(
            !loaded && said.len() == 1,
            "{what}: loaded: {loaded}; it says {said:?}"
        );
        no_node(&vm)?;
    }
    let (loaded, said) = load(&vm, "mknod /dev/random c 1 8")?;
    ensure!(loaded, "not loaded: {said:?}");
    let said = counter(&vm)?;
    ensure!(
        said == format!("read {FIRST}, mapped {FIRST}"),
        "afterwards: {said}"
    );
    no_splat(&vm)
}

/// Expect that a restore is a change like any other before the kernel's generator is ready: a read
/// returns the new counter, and draws after the generator is ready depend on the ID.
fn a_generator_that_is_not_ready_yet_gets_the_id(context: &Context) -> Result<()> {
    let options = Options {
        smp: Some(2),
        append: vec!["random.trust_cpu=off random.trust_bootloader=off".into()],
        ..genctr(FIRST)
    };
    let mut vm = context.boot(options)?;
    let is_ready = |vm: &Vm| -> Result<bool> {
        let said = vm.shell("dmesg | grep -c 'crng init done' || true")?;
        Ok(said.trim() != "0")
    };
    ensure!(!is_ready(&vm)?, "the generator was ready at once");
    let snapshot = "young".parse()?;
    vm.snapshot(&snapshot)?;
    let mut draws = BTreeSet::new();
    for value in FIRST + 1..=FIRST + 4 {
        let clone = vm.clone_from(&snapshot, Some(value), None)?;
        // Bounded: none of these waits for the generator.
        let said = Background::start(&clone, "exec contract counter")?.end(&clone)?;
        ensure!(
            said == format!("read {value}, mapped {value}"),
            "the clone says: {said}"
        );
        ensure!(
            !is_ready(&clone)?,
            "the generator was ready before the read"
        );
        // Without help: a seed of the host's would make the difference.
        clone.shell("head -c 1 /dev/random >/dev/null")?;
        draws.insert(clone.shell("head -c 32 /dev/random | od -An -tx1")?);
        // From now on it reseeds as ever.
        let before = settled_reseeds(&clone)?;
        let mut clone = clone;
        clone.set_genctr(value + 100)?;
        expect_reseeds(&clone, before + 1)?;
        no_splat(&clone)?;
    }
    ensure!(draws.len() == 4, "{} draws of 4 clones", draws.len());
    Ok(())
}

/// Expect that ten thousand changes, in the middle of which the device is unbound, the module is
/// unloaded and the machine is suspended, end with the last one reseeded for.
fn ten_thousand_changes_are_outlived(context: &Context) -> Result<()> {
    let options = Options {
        smp: Some(2),
        ..genctr(FIRST)
    };
    let mut vm = vmforks::boot(context, options)?;
    let (driver, name) = (driver(), kernel::driver(&kernel::default()));
    let interruptions = [
        ("readers", "exec contract readers --threads 8".to_string()),
        (
            "rebinds",
            format!(
                "while true; do device=$(basename {driver}/*[:.]*); \
                 echo $device >{driver}/unbind; echo $device >{driver}/bind; done 2>&1"
            ),
        ),
        (
            "reloads",
            format!("while true; do rmmod {name} && insmod /vmgenid.ko sysgenid=1; done 2>&1"),
        ),
        (
            "suspends",
            // Five seconds in which no process runs.
            "echo freezer >/sys/power/pm_test; while true; do echo freeze >/sys/power/state; done 2>&1"
                .into(),
        ),
    ];
    let changes = scaled(2_500);
    let mut value = FIRST;
    for (what, script) in interruptions {
        let background = Background::start(&vm, &script)?;
        let values: Vec<_> = (value + 1..=value + changes).collect();
        for some in values.chunks(50) {
            vm.set_genctr_each(some)?;
        }
        value += changes;
        if what == "suspends" {
            // Killed while it is frozen, it ends when it is thawed.
            vm.shell("sleep 6")?;
        }
        let said = background.kill(&vm)?;
        ensure!(said.is_empty(), "{what}: {said}");
        // All earlier operations have ended.
        vm.shell(&format!(
            "sleep 1; rmmod {name} 2>/dev/null; insmod /vmgenid.ko sysgenid=1"
        ))?;
        notify(&vm, 1)?;
        let said = counter(&vm)?;
        ensure!(
            said == format!("read {value}, mapped {value}"),
            "{what}: {said}"
        );
        // Nothing is left to do.
        let known = published(&vm)?;
        notify(&vm, 1)?;
        expect_published(&vm, known)?;
        no_splat(&vm).context(what)?;
    }
    if !is_builtin() {
        let before = vmforks::count(&vm)?;
        vm.set_genctr(value + 1)?;
        wait("a notifier", || {
            Ok((vmforks::count(&vm)? > before).then_some(()))
        })?;
    }
    Ok(())
}
