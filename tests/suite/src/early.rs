// SPDX-License-Identifier: MIT OR Apache-2.0

//! The early look: the driver compares the ID in ACPI's interrupt, which it shares with other
//! devices.

use crate::{
    changes::Guest,
    context::{
        Context, await_random, driver, genctr, generation, lines, no_splat, scaled, settle, wait,
    },
    notifications, tests,
    vmforks::{self, Background, count, expect_count, expect_published, notify, published},
};
use anyhow::{Context as _, Result, ensure};
use harness::{
    Add, Options, Vm, kernel,
    qapi::qmp::{cont, human_monitor_command, stop},
};
use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

tests! {
    any_interrupt_of_acpi_will_do
    a_notification_without_an_interrupt_reseeds
    without_it_an_interrupt_for_others_does_nothing
    it_is_there_while_the_device_is_bound
    cpus_that_come_and_go_do_not_matter
    a_cpu_in_other_hands_holds_up_nobody
    ten_thousand_other_interrupts_do_nothing (20 min)
    rtnl_in_other_hands_holds_up_no_interrupt
    it_claims_no_interrupt
    unbinding_in_the_middle_of_interrupts_loses_nothing
    hardware_reduced_acpi_has_no_early_look
    an_interrupt_for_others_costs_little [Tiny]
}

/// The GPE of CPU hotplug.
const CPUS_GPE: &str = "/sys/firmware/acpi/interrupts/gpe02";

/// The parameter that turns the early look off.
const OFF: &str = "early_look=0";

fn options() -> Options {
    Options {
        smp: Some(2),
        ..genctr(42)
    }
}

/// A guest that counts the IDs that are published, and the calls of the notifiers.
fn boot(context: &Context, options: Options) -> Result<Guest> {
    let mut options = options;
    options.parameter.push("sysgenid=1".into());
    vmforks::boot(context, options).map(Guest::new)
}

/// The process IDs of the driver's threads, which have the module's name.
fn threads(vm: &Vm) -> Result<Vec<String>> {
    let name = kernel::driver(&kernel::default());
    lines(
        vm,
        &format!("ps -o pid,comm | awk '$2 == \"{name}\" {{ print $1 }}'"),
    )
}

/// The handlers that share ACPI's interrupt.
fn sharers(vm: &Vm) -> Result<String> {
    Ok(vm
        .shell("awk '/ acpi/ { sub(/.*fasteoi */, \"\"); print }' /proc/interrupts")?
        .trim()
        .into())
}

/// The number of ACPI's interrupt.
fn irq(vm: &Vm) -> Result<u32> {
    let irq = vm.shell("awk -F: '/ acpi/ { print $1 }' /proc/interrupts")?;
    Ok(irq.trim().parse()?)
}

/// Changes the counter while notifications are held back, then has the power button pressed, which
/// raises ACPI's interrupt. Returns how many IDs had been published before the change.
fn change_then_press(guest: &Guest) -> Result<u32> {
    notifications::hold(&guest.vm)?;
    let before = published(&guest.vm)?;
    guest.change()?;
    expect_published(&guest.vm, before)?;
    guest.check(&["contract", "button", "--presses", "1"])?;
    Ok(before)
}

/// Expect that an interrupt of ACPI's that is for another device makes the driver reseed, and that
/// neither more interrupts nor the late notification make it reseed again.
fn any_interrupt_of_acpi_will_do(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    let before = change_then_press(&guest)?;
    expect_published(&guest.vm, before + 1)?;
    guest.check(&["contract", "button", "--presses", "10"])?;
    notifications::release(&guest.vm)?;
    notify(&guest.vm, 1)?;
    expect_published(&guest.vm, before + 1)?;
    expect_count(&guest.vm, 1)?;
    no_splat(&guest.vm)
}

/// Expect that a notification reseeds once for each new ID, without an interrupt.
fn a_notification_without_an_interrupt_reseeds(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    notifications::hold(&guest.vm)?;
    let before = published(&guest.vm)?;
    for n in 1..=5 {
        guest.change()?;
        expect_published(&guest.vm, before + n - 1)?;
        expect_count(&guest.vm, n - 1)?;
        notify(&guest.vm, 1)?;
        expect_published(&guest.vm, before + n)?;
        expect_count(&guest.vm, n)?;
    }
    no_splat(&guest.vm)
}

/// Expect that with early_look=0 the driver does not share ACPI's interrupt, that an interrupt for
/// another device does not reseed, and that the notification does.
fn without_it_an_interrupt_for_others_does_nothing(context: &Context) -> Result<()> {
    let options = Options {
        parameter: vec![OFF.into()],
        ..options()
    };
    let guest = boot(context, options)?;
    let sharers = sharers(&guest.vm)?;
    ensure!(sharers == "acpi", "the interrupt is for: {sharers}");
    let before = change_then_press(&guest)?;
    expect_published(&guest.vm, before)?;
    expect_count(&guest.vm, 0)?;
    notify(&guest.vm, 1)?;
    expect_published(&guest.vm, before + 1)?;
    expect_count(&guest.vm, 1)
}

/// Expect that the driver shares ACPI's interrupt while the device is bound, and not otherwise; and
/// that it has one thread, a real-time one, as long as the module is loaded.
fn it_is_there_while_the_device_is_bound(context: &Context) -> Result<()> {
    let vm = context.boot(options())?;
    let (driver, name) = (driver(), kernel::driver(&kernel::default()));
    let device = vm.shell(&format!("basename {driver}/*[:.]*"))?;
    let device = device.trim();
    for _ in 0..50 {
        let said = (sharers(&vm)?, threads(&vm)?.len());
        ensure!(said == (format!("acpi, {name}"), 1), "bound: {said:?}");
        vm.shell(&format!("echo {device} >{driver}/unbind"))?;
        let said = (sharers(&vm)?, threads(&vm)?.len());
        ensure!(said == ("acpi".into(), 1), "unbound: {said:?}");
        vm.shell(&format!("echo {device} >{driver}/bind"))?;
    }
    for thread in threads(&vm)? {
        let stat = vm.shell(&format!("cat /proc/{thread}/stat"))?;
        // SCHED_FIFO.
        let policy = stat.split_whitespace().nth(40);
        ensure!(policy == Some("1"), "its stat: {stat}");
    }
    vm.shell(&format!("rmmod {name}"))?;
    let said = (sharers(&vm)?, threads(&vm)?.len());
    ensure!(said == ("acpi".into(), 0), "unloaded: {said:?}");
    no_splat(&vm)
}

/// Expect that each change is published once, and that the driver has one thread, whichever CPUs
/// are online.
fn cpus_that_come_and_go_do_not_matter(context: &Context) -> Result<()> {
    let options = Options {
        smp: Some(3),
        append: vec!["maxcpus=2".into()],
        ..genctr(42)
    };
    let guest = boot(context, options)?;
    let vm = &guest.vm;
    let before = published(vm)?;
    for (n, (cpu, on)) in [(2, 1), (1, 0), (2, 0), (1, 1), (2, 1)].iter().enumerate() {
        vm.shell(&format!(
            "echo {on} >/sys/devices/system/cpu/cpu{cpu}/online"
        ))?;
        guest.change()?;
        expect_published(vm, before + n as u32 + 1)?;
        let threads = threads(vm)?;
        ensure!(threads.len() == 1, "the threads: {threads:?}");
    }
    no_splat(vm)
}

/// Expect that a real-time process that occupies a CPU delays neither a reseed nor an unbind.
fn a_cpu_in_other_hands_holds_up_nobody(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    let vm = &guest.vm;
    // While ACPI's own thread is starved, no process can unbind ACPI's devices. So the interrupt,
    // and with it that thread, is moved to the other CPU. It moves at the next interrupt.
    vm.shell(&format!("echo 1 >/proc/irq/{}/smp_affinity", irq(vm)?))?;
    let before = published(vm)?;
    let reseeds = |expected| {
        guest.change()?;
        expect_count(vm, expected)
    };
    reseeds(1)?;
    let urgent = Background::start(vm, "exec taskset 2 contract held --ms 3600000 --fifo 99")?;
    urgent.await_line(vm, "computing")?;
    reseeds(2)?;
    expect_published(vm, before + 2)?;

    let driver = driver();
    let rebinding = Background::start(
        vm,
        &format!(
            "device=$(basename {driver}/*[:.]*); \
             echo $device >{driver}/unbind && echo $device >{driver}/bind && echo done"
        ),
    )?;
    rebinding.await_line(vm, "done")?;
    reseeds(3)?;
    urgent.kill(vm)?;
    guest.check(&["contract", "counter"])?;
    expect_count(vm, 3)?;
    no_splat(vm)
}

/// Expect that 10,000 interrupts of the power button, and those of CPU hotplug meanwhile, publish
/// no ID and lead to no call of the notifiers, and that all observers see the next change.
fn ten_thousand_other_interrupts_do_nothing(context: &Context) -> Result<()> {
    let cpus = 8;
    let options = Options {
        qemu_arg: vec!["-smp".into(), format!("maxcpus={}", 2 + cpus)],
        ..options()
    };
    let guest = boot(context, options)?;
    let others = Background::start(
        &guest.vm,
        "exec contract contend --steps --readers 8 --pollers 8",
    )?;
    others.await_line(&guest.vm, "all at 42")?;
    let known = published(&guest.vm)?;

    let presses = scaled(10_000).to_string();
    let came = |vm: &Vm| -> Result<u16> {
        let came = vm.shell(&format!("awk '{{ print $1 }}' {CPUS_GPE}"))?;
        Ok(came.trim().parse()?)
    };
    let before = came(&guest.vm)?;
    let pressed = AtomicBool::new(false);
    thread::scope(|scope| {
        let button = scope.spawn(|| {
            let pressing = guest.check(&["contract", "button", "--presses", &presses]);
            pressed.store(true, Relaxed);
            pressing
        });
        // CPUs are added meanwhile.
        for n in 1..=cpus {
            let said = guest.vm.qmp(&human_monitor_command {
                command_line: format!(
                    "device_add qemu64-x86_64-cpu,socket-id=0,core-id={},thread-id=0",
                    1 + n
                ),
                cpu_index: None,
            })?;
            ensure!(said.is_empty(), "a CPU: {said}");
            wait("a CPU", || {
                Ok((came(&guest.vm)? >= before + n).then_some(()))
            })?;
        }
        ensure!(
            !pressed.load(Relaxed),
            "the button was faster than the CPUs"
        );
        button.join().expect("panicked")
    })?;
    expect_count(&guest.vm, 0)?;
    expect_published(&guest.vm, known)?;

    // All observers still run, and see the next change.
    guest.change()?;
    others.await_line(&guest.vm, "all at 43")?;
    expect_published(&guest.vm, known + 1)?;
    others.kill(&guest.vm)?;
    no_splat(&guest.vm)
}

/// Expect that while the vmfork notifiers wait for `rtnl_lock`, the driver publishes new IDs and
/// other handlers of ACPI's interrupt are called, and that the notifiers are called once for each
/// ID when the lock is released.
fn rtnl_in_other_hands_holds_up_no_interrupt(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    let vm = &guest.vm;
    let holder = Background::rtnl_holder(vm)?;
    let before = published(vm)?;
    for n in 1..=3 {
        // The counter changes while no CPU runs, as at a restore.
        vm.qmp(&stop {})?;
        guest.change()?;
        vm.qmp(&cont {})?;
        // `settle` would wait for that lock, so the number is checked directly.
        wait("an ID is published", || {
            Ok((published(vm)? == before + n).then_some(()))
        })?;
        guest.check(&["contract", "button", "--presses", "30"])?;
        ensure!(published(vm)? == before + n, "more IDs were published");
        ensure!(count(vm)? == 0, "the notifiers were called");
    }
    for thread in threads(vm)? {
        let state = vm.shell(&format!("awk '{{ print $3 }}' /proc/{thread}/stat"))?;
        ensure!(state.trim() == "S", "the thread's state: {state}");
    }
    holder.kill(vm)?;
    expect_count(vm, 3)?;
    notify(vm, 1)?;
    expect_published(vm, before + 3)?;
    expect_count(vm, 3)?;
    no_splat(vm)
}

/// Expect that the driver claims no interrupt, not even one at which it sees a new ID. The kernel
/// counts interrupts that no handler claims, and disables a line that has too many.
fn it_claims_no_interrupt(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    let vm = &guest.vm;
    let irq = irq(vm)?;
    // The time of the last interrupt that no handler claimed.
    let unclaimed = || vm.shell(&format!("grep last /proc/irq/{irq}/spurious"));

    let first = unclaimed()?;
    vmforks::interrupt(vm, 10)?;
    let second = unclaimed()?;
    ensure!(
        second != first,
        "the driver claims an interrupt for another device: {first}"
    );

    notifications::hold(vm)?;
    vm.shell("sleep 1")?;
    let before = published(vm)?;
    guest.change()?;
    vmforks::interrupt(vm, 1)?;
    let third = unclaimed()?;
    ensure!(
        third != second,
        "the driver claims the interrupt at which it sees a new ID: {second}"
    );
    expect_published(vm, before + 1)
}

/// Expect that the last ID has been reseeded for, and that the notifiers were called at most once
/// for each ID (and 5 %), after interrupts and changes at any moment while the device was rebound.
fn unbinding_in_the_middle_of_interrupts_loses_nothing(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    let driver = driver();
    let device = guest.vm.shell(&format!("basename {driver}/*[:.]*"))?;
    let device = device.trim();
    let rounds = scaled(300);
    let rebinding = Background::start(
        &guest.vm,
        &format!(
            "for n in $(seq {rounds}); do \
                echo {device} >{driver}/unbind && echo {device} >{driver}/bind || exit; \
            done; echo done"
        ),
    )?;
    let mut changes = 0;
    wait("rebinding", || {
        guest.check(&["contract", "button", "--presses", "5"])?;
        guest.change()?;
        changes += 1;
        let says = rebinding.says(&guest.vm)?;
        ensure!(says.is_empty() || says == "done\n", "rebinding: {says}");
        Ok((!says.is_empty()).then_some(()))
    })?;
    guest.check(&["contract", "counter"])?;
    settle(&guest.vm)?;
    let reseeds = count(&guest.vm)?;
    // An ID that is seen half written causes one more call, rarely. A driver that was unbound
    // during two changes has seen only the second.
    ensure!(
        (1..=changes + changes / 20 + 1).contains(&reseeds),
        "{reseeds} calls of the notifiers for {changes} new IDs"
    );
    // The present ID was seen, and nothing is left to do.
    guest.check(&["contract", "button", "--presses", "10"])?;
    notify(&guest.vm, 1)?;
    expect_count(&guest.vm, reseeds)?;
    no_splat(&guest.vm)
}

/// Expect that on a machine whose FADT says that it has no SCI, the driver logs one line about the
/// missing early look, and a read is still a barrier.
fn hardware_reduced_acpi_has_no_early_look(context: &Context) -> Result<()> {
    const REVISION: usize = 24;
    const CHECKSUM: usize = 9;
    const FLAGS: usize = 112;
    let vm = context.boot(options())?;
    let mut fadt = vm.exec(["cat", "/sys/firmware/acpi/tables/FACP"])?.stdout;
    ensure!(fadt.len() >= FLAGS + 4, "a FADT of {} bytes", fadt.len());
    drop(vm);
    // HW_REDUCED_ACPI is bit 20 of the flags. The kernel replaces a table only by one with a higher
    // OEM revision.
    fadt[FLAGS + 2] |= 1 << 4;
    fadt[REVISION] += 1;
    let sum = fadt.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    fadt[CHECKSUM] = fadt[CHECKSUM].wrapping_sub(sum);
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), &fadt).context("the FADT")?;

    let mut vm = context.boot(Options {
        add: vec![Add {
            host: file.path().into(),
            guest: "/kernel/firmware/acpi/facp.aml".into(),
        }],
        ..options()
    })?;
    let log = vm.shell("dmesg")?;
    let told = log.matches("no early look").count();
    ensure!(
        told == 1 && log.contains("hardware-reduced ACPI has no SCI"),
        "the kernel's log: {log}"
    );
    // Without the SCI, there is no notification either. The barrier still holds.
    await_random(&vm)?;
    vm.set_genctr(43)?;
    let before = generation(&vm)?;
    let said = crate::context::counter(&vm)?;
    ensure!(said == "read 43, mapped 43", "{said}");
    ensure!(generation(&vm)? > before, "it was not reseeded");
    Ok(())
}

/// Expect that the early look adds between 1 and 40 guest instructions to an interrupt for another
/// device.
fn an_interrupt_for_others_costs_little(context: &Context) -> Result<()> {
    let cost = |parameter: &str| -> Result<u32> {
        let options = Options {
            icount: true,
            smp: Some(1),
            parameter: vec![parameter.into()],
            append: vec!["quiet norandmaps".into()],
            ..genctr(42)
        };
        let vm = vmforks::boot(context, options)?;
        let cost = vmforks::interrupt(&vm, 200)?;
        expect_count(&vm, 0)?;
        no_splat(&vm)?;
        Ok(cost)
    };
    let (with, without) = (cost("early_look=1")?, cost(OFF)?);
    let more = with.saturating_sub(without);
    eprintln!(
        "an interrupt for others: {with} guest instructions, {more} of them for the early look"
    );
    ensure!(
        (1..=40).contains(&more),
        "an interrupt for others costs {with} guest instructions, {without} without"
    );
    Ok(())
}
