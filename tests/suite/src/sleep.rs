// SPDX-License-Identifier: MIT OR Apache-2.0

//! Machines that are restored while they are suspended, and a hibernated one that is resumed in two
//! machines. The notification of the new ID may be lost by then.

use crate::{
    age::grow_old,
    clones::two_cpus,
    context::{Context, await_random, genctr, generation, is_builtin, no_splat, wait},
    draws::{self, Draws, Same},
    notifications, tests,
    vmforks::{self, Background, expect_count, expect_published, published},
};
use anyhow::{Context as _, Result, ensure};
use harness::{
    Firmware, Options, Vm,
    qapi::qmp::{cont, query_status, system_powerdown, system_wakeup},
};
use std::{collections::BTreeSet, path::Path, process::Command, thread, time::Duration};

tests! {
    a_restore_while_suspended_to_idle_is_caught [Mainline]
    a_restore_while_suspended_to_ram_is_caught [Mainline, NotKcsan]
    a_restore_while_frozen_is_caught [Mainline]
    a_hibernated_machine_differs_in_two (20 min)
    a_hibernated_machine_differs_in_two_with_its_id_in_nvs (20 min)
}

const FIRST: u32 = 42;

/// Boots a guest in which only the end of a suspend can make the driver look at the ID:
/// notifications are held back, there is no early look, and no process sleeps in `poll`, which the
/// kernel would call again when it thaws the process. Also returns how many IDs were published.
fn deaf(context: &Context) -> Result<(Vm, u32)> {
    let options = Options {
        smp: Some(2),
        parameter: vec!["early_look=0 sysgenid=1".into()],
        append: vec!["no_console_suspend".into()],
        ..genctr(FIRST)
    };
    let vm = vmforks::boot(context, options)?;
    notifications::hold(&vm)?;
    let published = published(&vm)?;
    Ok((vm, published))
}

/// Waits until the console has this.
fn said(vm: &Vm, words: &str) -> Result<()> {
    wait(&format!("{words:?}"), || {
        let console = vm.console()?;
        let said = String::from_utf8_lossy(&console);
        Ok(said.contains(words).then_some(()))
    })
}

/// Starts a suspend, and waits until the machine sleeps.
fn suspend(vm: &Vm, script: &str) -> Result<()> {
    Background::start(vm, &format!("sleep 1; {script}"))?;
    said(vm, "PM: suspend entry")?;
    thread::sleep(Duration::from_secs(3));
    Ok(())
}

/// Clones the sleeping machine, then wakes the clone and the original.
fn woken_clone(vm: &mut Vm, wake: impl Fn(&Vm) -> Result<()>) -> Result<Vm> {
    let snapshot = "asleep".parse()?;
    vm.snapshot(&snapshot)?;
    let options = Options {
        genctr: Some(FIRST + 1),
        // The sleeping clone does not answer the harness.
        paused: true,
        ..vm.options()?
    };
    let clone = vm.clone_unchecked(&snapshot, options, None)?;
    clone.qmp(&cont {})?;
    thread::sleep(Duration::from_secs(1));
    // The original is also woken: the suite asks it for its kernel's reports when it ends. The
    // agent takes 20 s to answer a connection that begins before its device has resumed, so this
    // waits for the end of the suspend.
    for vm in [&clone, vm] {
        wake(vm)?;
        said(vm, "PM: suspend exit")?;
    }
    Ok(clone)
}

/// Checks that the rule was applied at the end of the suspend, before any process reads the device.
fn expect_caught(clone: &Vm, before: u32) -> Result<()> {
    expect_published(clone, before + 1)
        .with_context(|| clone.shell("dmesg | tail -n 20").unwrap_or_default())?;
    if !is_builtin() {
        expect_count(clone, 1)?;
    }
    let said = crate::context::counter(clone)?;
    let expected = FIRST + 1;
    ensure!(
        said == format!("read {expected}, mapped {expected}"),
        "afterwards: {said}"
    );
    no_splat(clone)
}

/// Expect that a machine that is restored while it is suspended to idle applies the rule when it is
/// woken, though the notification is held back.
fn a_restore_while_suspended_to_idle_is_caught(context: &Context) -> Result<()> {
    let (mut vm, before) = deaf(context)?;
    suspend(&vm, "echo freeze >/sys/power/state")?;
    let clone = woken_clone(&mut vm, |clone| {
        clone.qmp(&system_powerdown {})?;
        Ok(())
    })?;
    expect_caught(&clone, before)
}

/// Expect the same of a machine that is suspended to RAM.
fn a_restore_while_suspended_to_ram_is_caught(context: &Context) -> Result<()> {
    let (mut vm, before) = deaf(context)?;
    suspend(
        &vm,
        "echo deep >/sys/power/mem_sleep && echo mem >/sys/power/state",
    )?;
    let status = vm.qmp(&query_status {})?;
    ensure!(!status.running, "it runs: {status:?}");
    let clone = woken_clone(&mut vm, |clone| {
        clone.qmp(&system_wakeup {})?;
        Ok(())
    })?;
    expect_caught(&clone, before)
}

/// Expect the same of a machine that is restored while its processes are frozen: `pm_test` keeps
/// them frozen for five seconds, and then ends the suspend.
fn a_restore_while_frozen_is_caught(context: &Context) -> Result<()> {
    let (mut vm, before) = deaf(context)?;
    suspend(
        &vm,
        "echo freezer >/sys/power/pm_test && echo freeze >/sys/power/state",
    )?;
    let clone = woken_clone(&mut vm, |_| Ok(()))?;
    expect_caught(&clone, before)
}

/// A disk for swap, which also holds the hibernation image.
fn swap(path: &Path) -> Vec<String> {
    vec![
        "-blockdev".into(),
        format!(
            "driver=raw,node-name=swap,file.driver=file,file.filename={}",
            path.display()
        ),
        "-device".into(),
        "virtio-blk-pci,drive=swap".into(),
    ]
}

/// Draws 100 times without the barrier, on the machine's first CPU.
fn drawn(vm: &Vm) -> Result<BTreeSet<String>> {
    let draw = "exec taskset 1 sh -c 'for n in $(seq 100); do \
        head -c 16 /dev/urandom | od -An -tx1 | tr -d \" \"; done'";
    let said = Background::start(vm, draw)?.end(vm)?;
    let drawn: BTreeSet<_> = said.lines().map(String::from).collect();
    ensure!(drawn.len() == 100, "{} draws: {said}", drawn.len());
    Ok(drawn)
}

fn hibernate(context: &Context, firmware: Firmware, how: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let disk = |name: &str| folder.path().join(name);
    std::fs::File::create(disk("swap"))?.set_len(1 << 30)?;
    let options = |disk: &Path| Options {
        firmware,
        qemu_arg: swap(disk),
        append: vec!["no_console_suspend".into()],
        memory: Some(512),
        ..two_cpus()
    };
    let mut vm = vmforks::boot(context, options(&disk("swap")))?;
    await_random(&vm)?;
    grow_old(&mut vm)?;
    draws::start(&vm, &["--barrier"])?;
    // The process is stopped, so it reads the device only when it is continued. Until then, only
    // the end of the hibernation can reseed the kernel.
    vm.shell("killall -STOP contract")?;
    let before = generation(&vm)?;
    let swap = vm.shell("cd /sys/block; grep -lx 2097152 */size | cut -d/ -f1 | tail -n 1")?;
    let swap = format!("/dev/{}", swap.trim());
    // The sleep lets the host learn that the program has begun before the guest hibernates.
    let script = format!(
        "sleep 1; mkswap {swap} && swapon {swap} && sync && \
         echo {how} >/sys/power/disk && echo disk >/sys/power/state"
    );
    let hibernating = Background::start(&vm, &script)?;
    let mut says = String::new();
    wait("the machine is off", || {
        if vm.pid()?.is_none() {
            return Ok(Some(()));
        }
        // A machine that is off does not answer: the last output is kept.
        says = hibernating.says(&vm).unwrap_or(says.clone());
        Ok(None)
    })
    .with_context(|| says.clone())?;

    let (mut with, mut without) = (Vec::new(), Vec::new());
    for value in [FIRST + 1, FIRST + 2] {
        let copy = disk(&format!("swap-{value}"));
        let status = Command::new("cp")
            .args([
                "--sparse=always".as_ref(),
                disk("swap").as_os_str(),
                copy.as_os_str(),
            ])
            .status()?;
        ensure!(status.success(), "cp: {status}");
        let mut options = options(&copy);
        options.append.push(format!("resume={swap}"));
        options.genctr = Some(value);
        // A connection to the agent that begins before its device has resumed takes 20 s.
        options.paused = true;
        let resumed = context.boot(options)?;
        resumed.qmp(&cont {})?;
        said(&resumed, "PM: hibernation: hibernation exit")?;
        // No process has read the device yet.
        without.push(drawn(&resumed)?);
        ensure!(
            generation(&resumed)? > before,
            "the kernel was not reseeded after the resume"
        );
        // With the pages in NVS, the counter is also the old one: the process sees no change.
        let in_nvs = firmware == Firmware::Ovmf;
        let value = if in_nvs { FIRST } else { value };
        if !in_nvs {
            resumed.shell("killall -CONT contract")?;
            with.push(Draws::of(&resumed)?);
        }
        let said = crate::context::counter(&resumed)?;
        ensure!(said == format!("read {value}, mapped {value}"), "{said}");
        if !is_builtin() {
            expect_count(&resumed, u32::from(!in_nvs))?;
        }
        no_splat(&resumed)?;
    }
    if !with.is_empty() {
        let same = Same::of(&with);
        eprintln!("with the barrier: {same}");
        ensure!(same.most == 0, "after the barrier: {same}");
    }
    let common = without[0].intersection(&without[1]).count();
    ensure!(
        common == 0,
        "{common} of 100 draws after the resume are the same in both machines"
    );
    vm.stop().map(drop)
}

/// Expect that a machine that is hibernated once and resumed in two machines is reseeded by each
/// resume, and that no draw is the same in both, without the barrier and with it. The ID is in
/// reserved memory, which the resume does not restore.
fn a_hibernated_machine_differs_in_two(context: &Context) -> Result<()> {
    hibernate(context, Firmware::Seabios, "shutdown")
}

/// Expect the same of draws without the barrier where the ID and the counter are in ACPI NVS, which
/// the resume restores. The old ID and the old counter are then in memory: the driver reseeds
/// anyway, but a process that compares the counter sees no change.
fn a_hibernated_machine_differs_in_two_with_its_id_in_nvs(context: &Context) -> Result<()> {
    hibernate(context, Firmware::Ovmf, "platform")
}
