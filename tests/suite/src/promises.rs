// SPDX-License-Identifier: MIT OR Apache-2.0

//! The promises of the device node. The guest program `contract` lists them. Each becomes a test,
//! and all of them share one guest.

use crate::{
    On, Trial,
    context::{Context, genctr},
    shared::Shared,
};
use anyhow::{Context as _, Result, ensure};
use harness::Vm;
use std::process::Command;

/// The promises that a test program lists: their names, and where each is tested.
pub fn list(context: &Context, program: &str, args: &[&str]) -> Result<Vec<(String, Vec<On>)>> {
    let program = context.program(program);
    let list = Command::new(&program).args(args).output();
    let list = list.with_context(|| format!("cannot run {}", program.display()))?;
    let names = String::from_utf8(list.stdout)?;
    ensure!(
        list.status.success() && !names.is_empty(),
        "{} {args:?}: {}",
        program.display(),
        list.status
    );
    names
        .lines()
        .map(|line| {
            let mut words = line.split(' ');
            let name = words.next().unwrap_or_default().into();
            let on: Result<Vec<_>> = words.map(str::parse).collect();
            Ok((name, [vec![On::AnySetup], on?].concat()))
        })
        .collect()
}

pub fn trials() -> Result<Vec<Trial>> {
    let names = list(&Context::new()?, "contract", &["list"])?;
    let shared = Shared::new();
    let trial = |(promise, on): (String, _)| {
        let boot = |context: &Context| context.boot(genctr(42));
        let name = format!("promises::{promise}");
        shared.trial(name, on, boot, move |vm| check(vm, &promise))
    };
    Ok(names.into_iter().map(trial).collect())
}

fn check(vm: &Vm, promise: &str) -> Result<()> {
    let output = vm.exec(["contract", "promise", promise])?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(())
}
