// SPDX-License-Identifier: MIT OR Apache-2.0

//! The promises for which the counter changes. The guest program `contract` lists them, and
//! requests each change. This file makes the changes.

use crate::{
    Trial,
    context::{Context, PARAMETERS},
    promises,
    shared::Shared,
};
use anyhow::{Result, ensure};
use harness::{Options, Status, Stream, Vm, qapi::qmp};
use std::{
    borrow::Borrow,
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    thread,
    time::Duration,
};

/// The counter of a guest when it boots.
const FIRST: u32 = 42;

/// A guest whose counter grows when one of its programs asks for it.
pub struct Guest {
    pub vm: Vm,
    counter: AtomicU32,
}

impl Guest {
    pub fn boot(context: &Context, options: Options) -> Result<Self> {
        let options = Options {
            smp: Some(2),
            genctr: Some(FIRST),
            ..options
        };
        Ok(Self::new(context.boot(options)?))
    }

    /// A guest whose counter is still [`FIRST`].
    pub fn new(vm: Vm) -> Self {
        Self {
            vm,
            counter: AtomicU32::new(FIRST),
        }
    }

    /// Changes the counter, as a hypervisor does: a new ID, the counter, the
    /// notification.
    pub fn change(&self) -> Result<u32> {
        let counter = self.counter.fetch_add(1, Relaxed) + 1;
        self.vm.qom_set_counter(counter)?;
        Ok(counter)
    }

    /// Runs a program, and makes the changes that it requests. Passes each other line of its output
    /// to `hear`.
    pub fn run(&self, argv: &[&str], mut hear: impl FnMut(&str)) -> Result<Status> {
        let (stdin, mut answers) = UnixStream::pair()?;
        let (storming, mut line) = (AtomicBool::new(false), Vec::new());
        thread::scope(|scope| {
            let mut storm = None;
            let mut act = |line: &str| -> Result<()> {
                let answer = match line {
                    "change" => self.change()?,
                    "press" => self.press()?,
                    "storm" => {
                        storming.store(true, Relaxed);
                        storm = Some(scope.spawn(|| self.storm(&storming)));
                        0
                    }
                    "calm" => {
                        storming.store(false, Relaxed);
                        storm
                            .take()
                            .map_or(Ok(0), |storm| storm.join().expect("panicked"))?
                    }
                    other => {
                        hear(other);
                        return Ok(());
                    }
                };
                Ok(writeln!(answers, "{answer}")?)
            };
            let command = self.vm.command(argv.iter().copied());
            let status = command
                .stdin(File::from(OwnedFd::from(stdin)))
                .stream(|stream, bytes| {
                    if stream == Stream::Stderr {
                        return io::stderr().write_all(bytes);
                    }
                    for &byte in bytes {
                        if byte != b'\n' {
                            line.push(byte);
                            continue;
                        }
                        act(&String::from_utf8_lossy(&line)).map_err(io::Error::other)?;
                        line.clear();
                    }
                    Ok(())
                });
            storming.store(false, Relaxed);
            status
        })
    }

    /// Presses the power button, which raises ACPI's interrupt.
    fn press(&self) -> Result<u32> {
        self.vm.qmp(&qmp::system_powerdown {})?;
        Ok(0)
    }

    /// Changes the counter again and again. Returns how often.
    fn storm(&self, on: &AtomicBool) -> Result<u32> {
        let mut changes = 0;
        while on.load(Relaxed) {
            self.change()?;
            changes += 1;
            // The guest needs more time for a change than the host does.
            thread::sleep(Duration::from_millis(2));
        }
        Ok(changes)
    }

    /// Runs a program, and checks that it succeeds: it does if its promises hold.
    pub fn check(&self, argv: &[&str]) -> Result<()> {
        let mut said = String::new();
        let status = self.run(argv, |line| said += &format!("{line}\n"))?;
        ensure!(status.success(), "{argv:?}: {status}: {said}");
        Ok(())
    }
}

impl Borrow<Vm> for Guest {
    fn borrow(&self) -> &Vm {
        &self.vm
    }
}

/// The same options for a guest that has the module and does not load it.
fn without_module(options: Options) -> Options {
    Options {
        no_module: true,
        ..options
    }
}

/// The tests of one subject share a guest.
pub(crate) fn trials() -> Result<Vec<Trial>> {
    // The module of this guest is loaded with sysgenid=1.
    let with_sysgenid = Shared::new();
    let mut guests = BTreeMap::<String, Shared<Guest>>::new();
    let mut trials = Vec::new();
    for (name, on) in promises::list(&Context::new()?, "contract", &["list", "--changes"])? {
        let subject = name.split("::").next().unwrap_or_default();
        let shared = guests.entry(subject.into()).or_insert_with(Shared::new);
        let boot = |context: &Context| Guest::boot(context, Options::default());
        trials.push(shared.trial(format!("changes::{name}"), on, boot, promise(name)));
    }
    for (name, on) in promises::list(&Context::new()?, "contract", &["list", "--sysgenid"])? {
        let boot = |context: &Context| {
            let guest = Guest::boot(context, without_module(Options::default()))?;
            let load = format!("insmod /vmgenid.ko {PARAMETERS} sysgenid=1");
            guest.vm.shell(&load)?;
            Ok(guest)
        };
        trials.push(with_sysgenid.trial(format!("changes::{name}"), on, boot, promise(name)));
    }
    Ok(trials)
}

fn promise(name: String) -> impl FnOnce(&Guest) -> Result<()> {
    move |guest| guest.check(&["contract", "promise", &name])
}
