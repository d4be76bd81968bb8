// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guests with the test module `vmforks`, through which tests observe and change the kernel.
//! tests/module/vmforks.rs lists its files.

use crate::context::{Context, await_random, settle, wait};
use anyhow::{Context as _, Result, ensure};
use harness::{Add, Options, Vm};
use std::{thread, time::Duration};

const FOLDER: &str = "/sys/kernel/debug/vmforks";

/// Boots a guest that has the test module, loaded.
pub fn boot(context: &Context, mut options: Options) -> Result<Vm> {
    let built = context.top.join("out").join(options.kernel());
    options.add.push(Add {
        host: built.join("vmforks.ko"),
        guest: "/vmforks.ko".into(),
    });
    // Tests with many threads need more memory, above all with checkers.
    options.memory = options.memory.or(Some(512));
    let vm = context.boot(options)?;
    await_random(&vm)?;
    vm.shell(
        "grep -q ' /sys/kernel/debug ' /proc/mounts || mount -t debugfs debugfs /sys/kernel/debug; \
         insmod /vmforks.ko",
    )?;
    Ok(vm)
}

/// How many times the vmfork notifiers were called since the module was loaded.
pub fn count(vm: &Vm) -> Result<u32> {
    Ok(vm.shell(&format!("cat {FOLDER}/count"))?.trim().parse()?)
}

/// Waits until the notifiers were called `expected` times and the guest has settled (a work item
/// calls them, after an ID is published). Fails if they were called once more.
pub fn expect_count(vm: &Vm, expected: u32) -> Result<()> {
    wait(&format!("{expected} calls of the notifiers"), || {
        Ok((count(vm)? >= expected).then_some(()))
    })?;
    settle(vm)?;
    let count = count(vm)?;
    ensure!(
        count == expected,
        "expected {expected} calls of the notifiers, there were {count}"
    );
    Ok(())
}

/// How many IDs the driver has published, as `/dev/sysgenid` counts them. The module has to be
/// loaded with `sysgenid=1`. This loads the count from the mapped page, which reseeds nothing.
pub fn published(vm: &Vm) -> Result<u32> {
    let said = vm.shell("contract peek --node /dev/sysgenid")?;
    let count = said.trim().strip_prefix("mapped ");
    Ok(count.with_context(|| said.clone())?.parse()?)
}

/// Waits until the driver has published `expected` IDs and the guest has settled. Fails if it has
/// published one more.
pub fn expect_published(vm: &Vm, expected: u32) -> Result<()> {
    wait(&format!("{expected} IDs published"), || {
        Ok((published(vm)? == expected).then_some(()))
    })?;
    settle(vm)?;
    let published = published(vm)?;
    ensure!(
        published == expected,
        "expected {expected} IDs published, there were {published}"
    );
    Ok(())
}

/// Makes the notifier of the test module sleep for this long.
pub fn sleep(vm: &Vm, milliseconds: u64) -> Result<()> {
    vm.shell(&format!("echo {milliseconds} >{FOLDER}/sleep"))
        .map(drop)
}

/// Sends notifications without a change, and waits until they were handled.
pub fn notify(vm: &Vm, times: u32) -> Result<()> {
    vm.shell(&format!("echo {times} >{FOLDER}/notify"))
        .map(drop)
}

/// Calls the handlers of ACPI's interrupt this many times, without an event for any of them.
/// Returns the shortest time of a call, in nanoseconds.
pub fn interrupt(vm: &Vm, times: u32) -> Result<u32> {
    let took = vm.shell(&format!(
        "echo {times} >{FOLDER}/interrupt; cat {FOLDER}/interrupt"
    ))?;
    Ok(took.trim().parse()?)
}

/// A program that continues in the guest, and its output.
#[derive(Clone)]
pub struct Background {
    pid: u32,
    log: String,
}

impl Background {
    pub fn start(vm: &Vm, script: &str) -> Result<Self> {
        // Each program has a log of its own.
        let log = vm.shell("mktemp /tmp/log.XXXXXX")?.trim().to_string();
        let pid = vm.spawn(["sh", "-c", script], &log)?;
        Ok(Self { pid, log })
    }

    /// A process that holds `rtnl_lock` until it is killed.
    pub fn rtnl_holder(vm: &Vm) -> Result<Self> {
        let holder = Self::start(vm, &format!("echo 3600000 >{FOLDER}/hold_rtnl"))?;
        wait("rtnl_lock", || {
            let held = vm.shell(&format!("cat {FOLDER}/hold_rtnl"))?;
            Ok((held.trim() == "true").then_some(()))
        })?;
        Ok(holder)
    }

    pub fn says(&self, vm: &Vm) -> Result<String> {
        vm.shell(&format!("cat {}", self.log))
    }

    /// Waits until the program has printed this line.
    pub fn await_line(&self, vm: &Vm, line: &str) -> Result<()> {
        let look = format!(
            "test -e /proc/{} || echo 'it has ended:'; cat {}",
            self.pid, self.log
        );
        wait(&format!("{line:?}"), || {
            let says = vm.shell(&look)?;
            if says.lines().any(|said| said == line) {
                return Ok(Some(()));
            }
            ensure!(!says.starts_with("it has ended"), "{line:?}: {says}");
            Ok(None)
        })
    }

    fn state(&self, vm: &Vm) -> Result<String> {
        vm.shell(&format!(
            "awk '{{ print $3 }}' /proc/{}/stat 2>/dev/null || true",
            self.pid
        ))
    }

    /// Waits until the program is in uninterruptible sleep.
    pub fn await_blocked(&self, vm: &Vm) -> Result<()> {
        wait("a program that waits", || {
            let state = self.state(vm)?;
            ensure!(
                !state.is_empty(),
                "it did not wait, but says: {}",
                self.says(vm)?
            );
            Ok((state.trim() == "D").then_some(()))
        })
    }

    pub fn is_blocked(&self, vm: &Vm) -> Result<bool> {
        Ok(self.state(vm)?.trim() == "D")
    }

    /// Waits until the program has ended, and returns its output. The test's deadline bounds this.
    pub fn end(self, vm: &Vm) -> Result<String> {
        while !self.state(vm)?.is_empty() {
            thread::sleep(Duration::from_millis(100));
        }
        Ok(self.says(vm)?.trim().into())
    }

    pub fn kill(self, vm: &Vm) -> Result<String> {
        vm.shell(&format!("kill -9 {}", self.pid))?;
        self.end(vm)
    }
}

/// Writes a word to a physical address that is not RAM.
pub fn poke(vm: &Vm, address: u64, value: u32) -> Result<()> {
    vm.shell(&format!("echo {address} {value} >{FOLDER}/poke"))
        .map(drop)
}
