// SPDX-License-Identifier: MIT OR Apache-2.0

//! A notification that comes when the device is unbound, with this driver and with the kernel's
//! own.

use crate::{
    changes::Guest,
    context::{Context, driver, wait},
    notifications, reports, tests,
};
use anyhow::{Context as _, Result, ensure};
use harness::{Add, Options};

tests! {
    [AnySetup];
    a_notification_after_the_unbind_does_nothing [NotArm64]
    the_kernels_own_driver_oopses_after_the_unbind [NotBuiltin, NotArm64, Mainline]
}

/// Unbinds the device.
fn unbind(guest: &Guest) -> Result<()> {
    let script = format!("cd {} && echo *[:.]* >unbind", driver());
    guest.vm.shell(&script).map(drop)
}

/// The first report of the kernel on the console, if there is one.
fn report(guest: &Guest) -> Result<Option<String>> {
    let console = guest.vm.console()?;
    Ok(reports::first(&String::from_utf8_lossy(&console)))
}

/// Expect that notifications after the unbind of the device lead to no report of the kernel.
fn a_notification_after_the_unbind_does_nothing(context: &Context) -> Result<()> {
    let guest = Guest::boot(context, Options::default())?;
    unbind(&guest)?;
    for _ in 0..3 {
        let before = notifications::count(&guest.vm)?;
        guest.change()?;
        wait("the notification", || {
            Ok((notifications::count(&guest.vm)? > before).then_some(()))
        })?;
    }
    guest.vm.shell("sleep 1")?;
    let report = report(&guest)?;
    ensure!(report.is_none(), "the kernel reports: {report:?}");
    Ok(())
}

/// Expect that the kernel's own driver oopses at a notification after the unbind. This shows that
/// the test above can fail.
fn the_kernels_own_driver_oopses_after_the_unbind(context: &Context) -> Result<()> {
    let options = Options {
        no_module: true,
        add: vec![Add {
            host: context.module_in_tree("virt/vmgenid.ko"),
            guest: "/mainline.ko".into(),
        }],
        ..Options::default()
    };
    // The report of this guest's kernel is expected, so it does not fail the test.
    let guest = Guest::boot(&context.unjudged(), options)?;
    guest.vm.shell("insmod /mainline.ko")?;
    unbind(&guest)?;
    // The first function calls the second one, unless the compiler has inlined it.
    let theirs = ["vmgenid_acpi_handler", "vmgenid_notify"];
    // The guest itself is not asked: it may have oopsed with its interrupts off.
    let mut said = None;
    wait("an oops in the driver", || {
        let changed = guest.change();
        said = report(&guest)?;
        let oops = said.as_deref().unwrap_or_default();
        if theirs.iter().any(|function| oops.contains(function)) {
            return Ok(Some(()));
        }
        changed.map(|_| None)
    })
    .with_context(|| format!("the kernel reports: {said:?}"))
}
