// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guests in which `/dev/random` is missing or is another file, or in which the kernel's generator
//! is not ready yet; and changes that come while the device is unbound, the module is unloaded or
//! the machine is suspended.

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
    vmgenid_falls_back_where_dev_random_is_another_thing [NotBuiltin, Mainline]
    vmgenctr_refuses_where_dev_random_is_another_thing [Builtin]
    a_generator_that_is_not_ready_yet_gets_the_id
    ten_thousand_changes_are_outlived (20 min)
}

const FIRST: u32 = 42;

/// Files in the place of `/dev/random`, in a private `/dev`, and the command that makes each.
const OTHERS: [(&str, &str); 7] = [
    ("no /dev/random", "true"),
    ("a regular file", "echo random >/dev/random"),
    ("a folder", "mkdir /dev/random"),
    ("a FIFO", "mkfifo /dev/random"),
    ("/dev/null", "mknod /dev/random c 1 3"),
    // A character device with an unused number.
    ("a device that is not there", "mknod /dev/random c 1 250"),
    ("a block device", "mknod /dev/random b 1 8"),
];

/// Loads the module with a private `/dev`, in which `make` is executed. Returns whether insmod
/// succeeds, and the lines that the driver adds to the log.
fn load(vm: &Vm, make: &str) -> Result<(bool, Vec<String>)> {
    let name = kernel::driver(&kernel::default());
    // insmod has a time limit: a driver that opened a FIFO would wait for a writer.
    let script = format!(
        "mount -t tmpfs dev /dev && {make} && dmesg -c >/dev/null; \
         timeout -s KILL 20 insmod /vmgenid.ko; loaded=$?; umount -l /dev; exit $loaded"
    );
    let loaded = vm.exec(["sh", "-c", &script])?;
    let said = lines(
        vm,
        // The kernel logs once that an out-of-tree module taints it. If insmod fails, it tries
        // again by another system call, so lines come twice.
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

/// Expect that `vmgenid`, loaded where `/dev/random` is not the kernel's generator, logs one line
/// more than usual, and reseeds once for a notification and once for a read alone.
fn vmgenid_falls_back_where_dev_random_is_another_thing(context: &Context) -> Result<()> {
    let mut vm = boot(context)?;
    // The lines that the driver logs in any case.
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
        // First for a notification, then for a read while notifications are held back.
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

/// Expect that `vmgenctr` is not loaded where `/dev/random` is not the kernel's generator, that it
/// logs one line and makes no node, and that it can be loaded afterwards.
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

/// Expect that before the kernel's generator is ready, a read returns the new counter without
/// waiting, that clones draw different bytes once it is ready, and that a later change reseeds
/// once.
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
        // The test's deadline bounds this: the read must not wait for the generator.
        let said = Background::start(&clone, "exec contract counter")?.end(&clone)?;
        ensure!(
            said == format!("read {value}, mapped {value}"),
            "the clone says: {said}"
        );
        ensure!(
            !is_ready(&clone)?,
            "the generator was ready before the read"
        );
        // The generator becomes ready without the host's seed, which would make the clones differ.
        clone.shell("head -c 1 /dev/random >/dev/null")?;
        draws.insert(clone.shell("head -c 32 /dev/random | od -An -tx1")?);
        // From now on, a change reseeds as usual.
        let before = settled_reseeds(&clone)?;
        let mut clone = clone;
        clone.set_genctr(value + 100)?;
        expect_reseeds(&clone, before + 1)?;
        no_splat(&clone)?;
    }
    ensure!(draws.len() == 4, "{} draws of 4 clones", draws.len());
    Ok(())
}

/// Expect that after each of four times 2,500 changes, during which processes read, the device is
/// rebound, the module is reloaded or the machine is suspended, a read returns the last counter and
/// nothing is left to reseed for.
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
            // Each suspend keeps all processes frozen for five seconds.
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
            // A process that is killed while it is frozen ends when it is thawed.
            vm.shell("sleep 6")?;
        }
        let said = background.kill(&vm)?;
        ensure!(said.is_empty(), "{what}: {said}");
        // The sleep lets operations end that are still under way.
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
