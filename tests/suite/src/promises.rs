// SPDX-License-Identifier: MIT OR Apache-2.0

//! The promises of the device node, in a guest that they share. The guest
//! programs know them; each becomes a test.

use crate::context::{Context, genctr, no_splat};
use anyhow::{Context as _, Result, ensure};
use libtest_mimic::{Failed, Trial};
use std::{
    process::Command,
    sync::{Arc, Mutex},
};
use vm::Vm;

pub fn trials(context: &Arc<Context>) -> Result<Vec<Trial>> {
    let program = context.program("contract");
    let list = Command::new(&program).arg("list").output();
    let list = list.with_context(|| format!("cannot run {}", program.display()))?;
    let names = String::from_utf8(list.stdout)?;
    ensure!(
        list.status.success() && !names.is_empty(),
        "contract list: {}",
        list.status
    );

    // Dropped with the last trial.
    let guest = Arc::new(Mutex::new(None));
    let trial = |name: &str| {
        let (context, guest, promise) = (context.clone(), guest.clone(), name.to_string());
        Trial::test(format!("promises::{name}"), move || {
            check(&context, &guest, &promise)
        })
    };
    Ok(names.lines().map(trial).collect())
}

fn check(context: &Context, guest: &Mutex<Option<Vm>>, promise: &str) -> Result<(), Failed> {
    // One at a time: some take the module out of use.
    let mut guest = guest.lock().map_err(|_| "another promise panicked")?;
    let vm = match guest.take() {
        Some(vm) => vm,
        None => context.boot(genctr(42))?,
    };
    let output = vm.exec(["contract", "promise", promise])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        // The next gets a guest of its own.
        return Err(format!("{}: {said}", output.status).into());
    }
    no_splat(&vm)?;
    *guest = Some(vm);
    Ok(())
}
