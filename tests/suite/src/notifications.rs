// SPDX-License-Identifier: MIT OR Apache-2.0

//! Holding the notifications of a new ID back, in a guest. A PC has a GPE for them, which can be
//! masked. microvm has the Generic Event Device (GED), whose driver can be unbound.

use anyhow::{Context as _, Result};
use harness::{Vm, qapi::qmp::system_powerdown};

/// The GPE that QEMU raises for a new ID.
pub const GPE: &str = "/sys/firmware/acpi/interrupts/gpe05";
const GED: &str = "/sys/bus/platform/drivers/acpi-ged";

fn by_machine(pc: &str, microvm: &str) -> String {
    format!("if [ -e {GPE} ]; then {pc}; else {microvm}; fi")
}

/// Holds them back.
pub fn hold(vm: &Vm) -> Result<()> {
    let pc = format!("echo mask >{GPE}");
    let microvm = format!("echo ACPI0013:00 >{GED}/unbind");
    vm.shell(&by_machine(&pc, &microvm)).map(drop)
}

/// Lets them come, the one that is due first.
pub fn release(vm: &Vm) -> Result<()> {
    let pc = format!("echo unmask >{GPE}");
    let microvm = format!("echo ACPI0013:00 >{GED}/bind; echo microvm");
    if !vm.shell(&by_machine(&pc, &microvm))?.is_empty() {
        // The interrupts that came meanwhile are lost. At the next one, the GED tells all that it
        // was to tell.
        vm.qmp(&system_powerdown {})?;
    }
    Ok(())
}

/// How many interrupts have come for them.
pub fn count(vm: &Vm) -> Result<u32> {
    let pc = format!("awk '{{ print $1 }}' {GPE}");
    // While its driver is unbound there is no line.
    let microvm = "awk '/ACPI:Ged/ { for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i } END { print n + 0 }' \
                   /proc/interrupts";
    let said = vm.shell(&by_machine(&pc, microvm))?;
    said.trim().parse().with_context(|| said.clone())
}
