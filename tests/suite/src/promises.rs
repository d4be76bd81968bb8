// SPDX-License-Identifier: MIT OR Apache-2.0

//! The promises of the device node, in a guest that they share. The guest
//! programs know them; each becomes a test.

use crate::{
    context::{Context, genctr},
    failed,
};
use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use std::{
    process::Command,
    sync::{Arc, Mutex, PoisonError},
};
use vm::Vm;

/// The guest, and what is needed to boot one.
struct Shared {
    context: Context,
    guest: Mutex<Option<Vm>>,
}

pub fn trials() -> Result<Vec<Trial>> {
    let context = Context::new()?;
    let program = context.program("contract");
    let list = Command::new(&program).arg("list").output();
    let list = list.with_context(|| format!("cannot run {}", program.display()))?;
    let names = String::from_utf8(list.stdout)?;
    ensure!(
        list.status.success() && !names.is_empty(),
        "contract list: {}",
        list.status
    );

    let shared = Arc::new(Shared {
        context,
        guest: Mutex::new(None),
    });
    let trial = |name: &str| {
        let (shared, promise) = (shared.clone(), name.to_string());
        Trial::test(format!("promises::{name}"), move || {
            let result = check(&shared, &promise);
            last(shared, result).map_err(failed)
        })
    };
    Ok(names.lines().map(trial).collect())
}

fn check(shared: &Shared, promise: &str) -> Result<()> {
    // One at a time: some take the module out of use.
    let mut guest = shared.guest.lock().unwrap_or_else(PoisonError::into_inner);
    let result = kept(&shared.context, &mut guest, promise);
    let reports = &shared.context.reports;
    // What is on the console now came with this promise.
    guest.iter().for_each(|vm| reports.look_at_console(vm));
    if result.is_err() || !reports.is_empty() {
        // The next gets a guest of its own.
        *guest = None;
    }
    reports.judge(result)
}

fn kept(context: &Context, guest: &mut Option<Vm>, promise: &str) -> Result<()> {
    let vm = match guest {
        Some(vm) => vm,
        None => guest.insert(context.boot(genctr(42))?),
    };
    let output = vm.exec(["contract", "promise", promise])?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(())
}

/// The guest ends with the last trial, which is the one to tell if it leaked.
fn last(shared: Arc<Shared>, result: Result<()>) -> Result<()> {
    let Some(shared) = Arc::into_inner(shared) else {
        return result;
    };
    drop(shared.guest);
    shared.context.reports.judge(result)
}
