// SPDX-License-Identifier: MIT OR Apache-2.0

//! A notification that comes when the device is unbound: what the kernel's own
//! driver does then, and what ours does.

use crate::{
    changes::Guest,
    context::{Context, wait},
    reports, tests,
};
use anyhow::{Result, ensure};
use std::path::PathBuf;
use vm::{Add, Options, kernel};

tests! {
    a_notification_after_the_unbind_does_nothing
    the_kernels_own_driver_oopses_after_the_unbind
}

/// Unbinds the device, and changes the counter. Returns what the kernel reports.
fn notify_after_unbind(guest: &Guest) -> Result<Option<String>> {
    let driver = "/sys/bus/platform/drivers/vmgenid";
    let gpes = "cat /sys/firmware/acpi/interrupts/gpe05";
    let device = guest.vm.shell(&format!("basename {driver}/*:*"))?;
    guest
        .vm
        .shell(&format!("echo {} >{driver}/unbind", device.trim()))?;
    for _ in 0..3 {
        let before = guest.vm.shell(gpes)?;
        guest.change()?;
        wait("the notification", || {
            Ok((guest.vm.shell(gpes)? != before).then_some(()))
        })?;
    }
    guest.vm.shell("sleep 1")?;
    Ok(reports::first(&String::from_utf8_lossy(
        &guest.vm.console()?,
    )))
}

fn a_notification_after_the_unbind_does_nothing(context: &Context) -> Result<()> {
    let guest = Guest::boot(context, Options::default())?;
    let report = notify_after_unbind(&guest)?;
    ensure!(report.is_none(), "the kernel reports: {report:?}");
    Ok(())
}

/// The test above can fail.
fn the_kernels_own_driver_oopses_after_the_unbind(context: &Context) -> Result<()> {
    let Some(cache) = std::env::var_os("VMGENID_CACHE").map(PathBuf::from) else {
        anyhow::bail!("VMGENID_CACHE is not set");
    };
    let build = cache.join(format!("kernel-{}/build", kernel::default()));
    let options = Options {
        no_module: true,
        add: vec![Add {
            host: build.join("drivers/virt/vmgenid.ko"),
            guest: "/mainline.ko".into(),
        }],
        ..Options::default()
    };
    // What its kernel reports is what we want.
    let guest = Guest::boot(&context.unjudged(), options)?;
    guest.vm.shell("insmod /mainline.ko")?;
    let report = notify_after_unbind(&guest)?.unwrap_or_default();
    // The one calls the other, if the compiler leaves it that.
    let theirs = ["vmgenid_acpi_handler", "vmgenid_notify"];
    ensure!(
        theirs.iter().any(|function| report.contains(function)),
        "the kernel reports: {report:?}"
    );
    Ok(())
}
