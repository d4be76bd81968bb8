// SPDX-License-Identifier: MIT OR Apache-2.0

//! Holds back the notifications of a new ID, in a guest. A PC has a GPE for them, which can be
//! masked. microvm has the Generic Event Device (GED), whose driver can be unbound. virt has an
//! interrupt for them alone, which can be disabled in the interrupt controller.

use crate::context::{
    await_random, expect_counter, expect_reseeds, machine, no_splat, settled_reseeds, wait,
};
use anyhow::{Context as _, Result};
use harness::{Machine, Vm, qapi::qmp::system_powerdown};

/// The GPE that QEMU raises for a new ID.
pub const GPE: &str = "/sys/firmware/acpi/interrupts/gpe05";
const GED: &str = "/sys/bus/platform/drivers/acpi-ged";

fn by_machine(pc: &str, microvm: &str, virt: &str) -> String {
    match machine() {
        Machine::Virt => virt.into(),
        _ => format!("if [ -e {GPE} ]; then {pc}; else {microvm}; fi"),
    }
}

/// The command of the guest's shell that holds the notifications back.
pub fn to_hold() -> String {
    let pc = format!("echo mask >{GPE}");
    let microvm = format!("echo ACPI0013:00 >{GED}/unbind");
    by_machine(&pc, &microvm, "contract interrupt off")
}

/// Holds the notifications back.
pub fn hold(vm: &Vm) -> Result<()> {
    vm.shell(&to_hold()).map(drop)
}

/// Stops holding the notifications back. One that is due comes now.
pub fn release(vm: &Vm) -> Result<()> {
    let pc = format!("echo unmask >{GPE}");
    let microvm = format!("echo ACPI0013:00 >{GED}/bind; echo microvm");
    let release = by_machine(&pc, &microvm, "contract interrupt on");
    if !vm.shell(&release)?.is_empty() {
        // Interrupts that came while the GED's driver was unbound are lost. At the next interrupt,
        // the driver handles all events that are pending.
        vm.qmp(&system_powerdown {})?;
    }
    Ok(())
}

/// Expect of a guest with the counter 42 that the notification alone has the kernel reseeded once, and
/// that it wakes a poller.
pub fn expect_notified(mut vm: Vm) -> Result<()> {
    await_random(&vm)?;
    // No process uses the device yet.
    let before = settled_reseeds(&vm)?;
    vm.set_genctr(43)?;
    expect_reseeds(&vm, before + 1)?;
    vm.shell("vmgenid watch >/tmp/watch 2>&1 & sleep 0.5")?;
    vm.set_genctr(44)?;
    wait("the notification", || {
        let said = vm.shell("cat /tmp/watch")?;
        Ok(said.contains("44").then_some(()))
    })?;
    expect_counter(&vm, 44)?;
    no_splat(&vm)
}

/// How many interrupts have come for the notifications.
pub fn count(vm: &Vm) -> Result<u32> {
    let pc = format!("awk '{{ print $1 }}' {GPE}");
    // While the GED's driver is unbound, /proc/interrupts has no line for it.
    let microvm = "awk '/ACPI:Ged/ { for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i } END { print n + 0 }' \
                   /proc/interrupts";
    // SPI 10: the device's own, in a device tree and in ACPI.
    let virt = microvm.replace("ACPI:Ged", "GICv3 +42 ");
    let said = vm.shell(&by_machine(&pc, microvm, &virt))?;
    said.trim().parse().with_context(|| said.clone())
}
