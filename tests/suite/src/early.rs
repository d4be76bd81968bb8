// SPDX-License-Identifier: MIT OR Apache-2.0

//! The early look: the ID is compared in ACPI's interrupt, which others have, too.

use crate::{
    changes::Guest,
    context::{Context, await_random, driver, genctr, lines, no_splat, scaled, wait},
    tests,
    vmforks::{self, Background, count, expect_count, notify},
};
use anyhow::{Context as _, Result, ensure};
use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};
use vm::{
    Add, Options, Vm,
    qapi::qmp::{cont, human_monitor_command, stop},
};

tests! {
    any_interrupt_of_acpi_will_do
    a_notification_without_an_interrupt_reseeds
    without_it_an_interrupt_for_others_does_nothing
    it_is_there_while_the_device_is_bound
    what_runs_on_any_cpu_is_held_until_the_reseed
    a_cpu_that_comes_and_goes_has_its_thread
    a_cpu_in_other_hands_holds_up_nobody
    ten_thousand_other_interrupts_do_nothing
    rtnl_in_other_hands_holds_up_no_interrupt
    it_claims_only_what_is_its_own
    unbinding_in_the_middle_of_interrupts_loses_nothing
    hardware_reduced_acpi_has_no_early_look
    an_interrupt_for_others_costs_little
}

/// The GPE of the device, and that of CPUs that come and go.
const GPE: &str = "/sys/firmware/acpi/interrupts/gpe05";
const CPUS_GPE: &str = "/sys/firmware/acpi/interrupts/gpe02";

/// The processes of that name: the threads that reseed, one on each CPU.
const THREADS: &str = "ps -o pid,comm | awk '$2 ~ /^vmgenid\\// { print $1 }'";

/// The parameter that turns it off.
const OFF: &str = "early_look=0";

fn options() -> Options {
    Options {
        smp: Some(2),
        ..genctr(42)
    }
}

/// A guest that counts reseeds.
fn boot(context: &Context, options: Options) -> Result<Guest> {
    vmforks::boot(context, options).map(Guest::new)
}

/// Who shares ACPI's interrupt.
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

/// A change that no interrupt tells of; then one that is for the power button.
fn change_then_press(guest: &Guest) -> Result<()> {
    guest.vm.shell(&format!("echo mask >{GPE}"))?;
    guest.change()?;
    expect_count(&guest.vm, 0)?;
    guest.check(&["contract", "button", "--presses", "1"])
}

fn any_interrupt_of_acpi_will_do(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    change_then_press(&guest)?;
    wait("a reseed", || Ok((count(&guest.vm)? > 0).then_some(())))?;
    // Nothing is left to do, neither for the next one nor for the notification.
    guest.check(&["contract", "button", "--presses", "10"])?;
    guest.vm.shell(&format!("echo unmask >{GPE}"))?;
    notify(&guest.vm, 1)?;
    expect_count(&guest.vm, 1)?;
    no_splat(&guest.vm)
}

fn a_notification_without_an_interrupt_reseeds(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    guest.vm.shell(&format!("echo mask >{GPE}"))?;
    for n in 1..=5 {
        guest.change()?;
        expect_count(&guest.vm, n - 1)?;
        notify(&guest.vm, 1)?;
        expect_count(&guest.vm, n)?;
    }
    no_splat(&guest.vm)
}

fn without_it_an_interrupt_for_others_does_nothing(context: &Context) -> Result<()> {
    let options = Options {
        parameter: vec![OFF.into()],
        ..options()
    };
    let guest = boot(context, options)?;
    let sharers = sharers(&guest.vm)?;
    ensure!(sharers == "acpi", "the interrupt is for: {sharers}");
    change_then_press(&guest)?;
    guest.vm.shell("sleep 1")?;
    expect_count(&guest.vm, 0)?;
    notify(&guest.vm, 1)?;
    expect_count(&guest.vm, 1)
}

fn it_is_there_while_the_device_is_bound(context: &Context) -> Result<()> {
    let vm = context.boot(options())?;
    let (driver, threads) = (driver(), format!("{THREADS} | wc -l"));
    let device = vm.shell(&format!("basename {driver}/*:*"))?;
    let device = device.trim();
    for _ in 0..20 {
        let said = (sharers(&vm)?, lines(&vm, &threads)?);
        ensure!(
            said == ("acpi, vmgenid".into(), vec!["2".into()]),
            "bound: {said:?}"
        );
        vm.shell(&format!("echo {device} >{driver}/unbind"))?;
        let said = (sharers(&vm)?, lines(&vm, &threads)?);
        ensure!(
            said == ("acpi".into(), vec!["0".into()]),
            "unbound: {said:?}"
        );
        vm.shell(&format!("echo {device} >{driver}/bind"))?;
    }
    let threads = threads_of(&vm)?;
    ensure!(threads == ["0 on 0", "1 on 1"], "the threads: {threads:?}");
    // As urgent as threads of interrupts are: SCHED_FIFO, 50.
    let stats = format!("for p in $({THREADS}); do cat /proc/$p/stat; done");
    for stat in lines(&vm, &stats)? {
        let stat: Vec<_> = stat.split_whitespace().collect();
        let [priority, policy] = [39, 40].map(|n| stat.get(n).copied().unwrap_or_default());
        ensure!((priority, policy) == ("50", "1"), "its stat: {stat:?}");
    }
    no_splat(&vm)
}

/// The threads, and which CPUs each may run on.
fn threads_of(vm: &Vm) -> Result<Vec<String>> {
    let script = format!(
        "for p in $({THREADS}); do \
            awk '/^Name:/ {{ sub(\".*/\", \"\"); name = $0 }} \
                /^Cpus_allowed_list:/ {{ print name, \"on\", $2 }}' /proc/$p/status; \
        done | sort"
    );
    lines(vm, &script)
}

/// Whoever computes there, while another CPU reseeds, is there again only after that.
fn what_runs_on_any_cpu_is_held_until_the_reseed(context: &Context) -> Result<()> {
    const MS: u64 = 1_000_000;
    // Less than the kernel lets real-time threads have at a stretch.
    let (spin, least) = (800, 400);
    let guest = boot(context, options())?;
    let vm = &guest.vm;
    vmforks::spin(vm, spin)?;
    let mut computing = Vec::new();
    for mask in [1, 2] {
        let held = format!("exec taskset {mask} contract held --ms {least}");
        computing.push(Background::start(vm, &held)?);
    }
    for computing in &computing {
        computing.await_line(vm, "computing")?;
    }
    guest.change()?;
    wait("a reseed", || Ok((count(vm)? == 1).then_some(())))?;

    let began = vmforks::at(vm)?;
    let ended = began + spin * MS;
    for computing in computing {
        wait("who is held", || {
            let says = computing.says(vm)?;
            Ok(says.contains("held from").then_some(()))
        })?;
        let said = computing.kill(vm)?;
        let held = |line: &str| -> Option<u64> {
            let (from, to) = line.strip_prefix("held from ")?.split_once(" to ")?;
            let (from, to): (u64, u64) = (from.parse().ok()?, to.parse().ok()?);
            Some(to.min(ended).saturating_sub(from.max(began)))
        };
        let held = said.lines().filter_map(held).max().unwrap_or_default();
        ensure!(
            held >= least * MS,
            "held for {held} ns of the reseed, which began at {began}: {said}"
        );
    }
    no_splat(vm)
}

/// One that comes online after the driver, one that was offline, and who is left meanwhile.
fn a_cpu_that_comes_and_goes_has_its_thread(context: &Context) -> Result<()> {
    let options = Options {
        smp: Some(3),
        append: vec!["maxcpus=2".into()],
        ..genctr(42)
    };
    let guest = boot(context, options)?;
    let vm = &guest.vm;
    let turn = |cpu: u32, on: u32| {
        vm.shell(&format!(
            "echo {on} >/sys/devices/system/cpu/cpu{cpu}/online"
        ))
    };
    let expect = |expected: &[&str]| {
        let threads = threads_of(vm)?;
        ensure!(threads == expected, "the threads: {threads:?}");
        Ok(())
    };
    expect(&["0 on 0", "1 on 1"])?;
    turn(2, 1)?;
    let all = ["0 on 0", "1 on 1", "2 on 2"];
    expect(&all)?;

    for n in 1..=5 {
        turn(1, 0)?;
        guest.change()?;
        wait("a reseed", || Ok((count(vm)? == 2 * n - 1).then_some(())))?;
        turn(1, 1)?;
        expect(&all)?;
        guest.change()?;
        wait("a reseed", || Ok((count(vm)? == 2 * n).then_some(())))?;
    }
    no_splat(vm)
}

/// Whose thread never comes to run there, because of what is more urgent.
fn a_cpu_in_other_hands_holds_up_nobody(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    let vm = &guest.vm;
    // Where ACPI's own thread would be starved, nobody can unbind anything of it. The
    // interrupt moves with the next one.
    vm.shell(&format!("echo 1 >/proc/irq/{}/smp_affinity", irq(vm)?))?;
    let reseeds = |expected| {
        guest.change()?;
        wait("a reseed", || Ok((count(vm)? == expected).then_some(())))
    };
    reseeds(1)?;
    let urgent = Background::start(vm, "exec taskset 2 contract held --ms 3600000 --fifo 99")?;
    urgent.await_line(vm, "computing")?;
    reseeds(2)?;

    let driver = driver();
    let rebinding = Background::start(
        vm,
        &format!(
            "device=$(basename {driver}/*:*); \
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
    others.await_line(&guest.vm, "all at 42: 0 reseeds")?;

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
        // CPUs come meanwhile.
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

    // All are there yet, and so is the next change.
    guest.change()?;
    others.await_line(&guest.vm, "all at 43: 1 reseeds")?;
    others.kill(&guest.vm)?;
    no_splat(&guest.vm)
}

/// Who reseeds waits for `rtnl_lock`; an interrupt that is masked meanwhile would be
/// nobody's power button.
fn rtnl_in_other_hands_holds_up_no_interrupt(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    let holder = Background::rtnl_holder(&guest.vm)?;
    // As at a restore.
    guest.vm.qmp(&stop {})?;
    guest.change()?;
    guest.vm.qmp(&cont {})?;
    let states = format!("for p in $({THREADS}); do awk '{{ print $3 }}' /proc/$p/stat; done");
    let waiting = || Ok(lines(&guest.vm, &states)? == ["D", "D"]);
    wait("the threads wait", || {
        waiting().map(|waiting| waiting.then_some(()))
    })?;
    guest.check(&["contract", "button", "--presses", "100"])?;
    expect_count(&guest.vm, 0)?;
    ensure!(waiting()?, "they did not wait");

    holder.kill(&guest.vm)?;
    wait("a reseed", || Ok((count(&guest.vm)? > 0).then_some(())))?;
    notify(&guest.vm, 1)?;
    expect_count(&guest.vm, 1)?;
    no_splat(&guest.vm)
}

/// The kernel counts interrupts that nobody claims, and shuts a line that has too many.
fn it_claims_only_what_is_its_own(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    let vm = &guest.vm;
    let irq = irq(vm)?;
    // When the last one was that nobody claimed.
    let unclaimed = || vm.shell(&format!("grep last /proc/irq/{irq}/spurious"));

    let before = unclaimed()?;
    vmforks::interrupt(vm, 10)?;
    let nothing_new = unclaimed()?;
    ensure!(
        nothing_new != before,
        "it claims what is for nobody: {before}"
    );

    vm.shell(&format!("echo mask >{GPE}; sleep 1"))?;
    guest.change()?;
    vmforks::interrupt(vm, 1)?;
    let new = unclaimed()?;
    ensure!(
        new == nothing_new,
        "it does not claim what it reseeds for: {new}"
    );
    wait("a reseed", || Ok((count(vm)? > 0).then_some(())))?;
    expect_count(vm, 1)
}

/// Buttons and changes at any moment, while the device comes and goes.
fn unbinding_in_the_middle_of_interrupts_loses_nothing(context: &Context) -> Result<()> {
    let guest = boot(context, options())?;
    let driver = driver();
    let device = guest.vm.shell(&format!("basename {driver}/*:*"))?;
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
    let reseeds = count(&guest.vm)?;
    // An ID that is seen half written costs one more, rarely; who was unbound for two of
    // them has missed one.
    ensure!(
        (1..=changes + changes / 20 + 1).contains(&reseeds),
        "{reseeds} reseeds for {changes} new IDs"
    );
    // What is there now was seen, and nothing is left to do.
    guest.check(&["contract", "button", "--presses", "10"])?;
    notify(&guest.vm, 1)?;
    expect_count(&guest.vm, reseeds)?;
    no_splat(&guest.vm)
}

/// A machine like this one, but its FADT has the flag that says that there is no SCI.
fn hardware_reduced_acpi_has_no_early_look(context: &Context) -> Result<()> {
    const REVISION: usize = 24;
    const CHECKSUM: usize = 9;
    const FLAGS: usize = 112;
    let vm = context.boot(options())?;
    let mut fadt = vm.exec(["cat", "/sys/firmware/acpi/tables/FACP"])?.stdout;
    ensure!(fadt.len() >= FLAGS + 4, "a FADT of {} bytes", fadt.len());
    drop(vm);
    // HW_REDUCED_ACPI is bit 20. The kernel takes a newer one only.
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
        told == 1 && log.contains("hardware-reduced ACPI has no interrupt for it"),
        "the kernel's log: {log}"
    );
    // There is no notification either; the barrier holds.
    await_random(&vm)?;
    vm.set_genctr(43)?;
    let said = crate::context::counter(&vm)?;
    ensure!(said == "read 43, mapped 43", "{said}");
    let count = crate::context::reseeds(&vm)?;
    ensure!(count == 1, "{count} reseeds");
    Ok(())
}

/// In guest instructions.
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
