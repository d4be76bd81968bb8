// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the tests share: the paths of files, and functions that examine a guest.

use crate::{
    deadline::Guests,
    reports::{self, Reports},
};
use anyhow::{Context as _, Result, bail, ensure};
use harness::{
    Add, Firmware, Host, Machine, Name, Options, Source, Vm, kernel,
    qapi::qmp::{query_vm_generation_id, stop},
};
use std::{
    fmt,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// The context of a test. Each test has its own.
pub struct Context {
    pub host: Host,
    /// The checkout.
    pub top: PathBuf,
    /// What the kernels of its guests reported.
    pub reports: Reports,
    pub guests: Guests,
}

impl Context {
    pub fn new() -> Result<Self> {
        Self::with(Reports::default(), Guests::default())
    }

    pub fn with(reports: Reports, guests: Guests) -> Result<Self> {
        let top =
            std::env::var_os("VMGENID_TOP").context("use scripts/test, which sets things up")?;
        let mut host = Host::from_env()?;
        host.at_start = Some(guests.at_start());
        host.at_end = Some(Arc::new({
            let (reports, guests) = (reports.clone(), guests.clone());
            move |vm| {
                reports.look_at_end(vm);
                guests.ending(vm);
            }
        }));
        Ok(Self {
            host,
            top: top.into(),
            reports,
            guests,
        })
    }

    /// A copy of this context for guests whose kernels report something on purpose: the reports do
    /// not fail the test.
    pub fn unjudged(&self) -> Self {
        let mut host = self.host.clone();
        let guests = self.guests.clone();
        host.at_end = Some(Arc::new(move |vm| guests.ending(vm)));
        Self {
            host,
            top: self.top.clone(),
            reports: Reports::default(),
            guests: self.guests.clone(),
        }
    }

    /// The path of the cache.
    pub fn cache(&self) -> Result<PathBuf> {
        let cache = std::env::var_os("VMGENID_CACHE");
        Ok(cache.context("VMGENID_CACHE is not set")?.into())
    }

    /// The path of one of the project's programs on the host.
    pub fn program(&self, name: &str) -> PathBuf {
        self.top.join("out/bin").join(name)
    }

    /// The path of one of the project's modules, built for the kernel of the guests.
    pub fn module(&self, name: &str) -> PathBuf {
        self.top.join("out").join(kernel::default()).join(name)
    }

    /// The path of a module that is part of the guests' kernel. `path` is relative to drivers/.
    pub fn module_in_tree(&self, path: &str) -> PathBuf {
        let kernel = self.host.link(&format!("kernel-{}", kernel::default()));
        kernel.join("build/drivers").join(path)
    }

    /// Adds Linux's driver of VMClock to a guest. Returns the command that loads it.
    pub fn add_ptp_vmclock(&self, options: &mut Options) -> String {
        let mut load = String::from("true");
        for module in ["pps/pps_core.ko", "ptp/ptp.ko", "ptp/ptp_vmclock.ko"] {
            let guest = format!("/{}", module.rsplit('/').next().unwrap_or(module));
            load += &format!(" && insmod {guest}");
            let host = self.module_in_tree(module);
            options.add.push(Add { host, guest });
        }
        load
    }

    /// Boots a guest that has the test programs.
    pub fn boot(&self, mut options: Options) -> Result<Vm> {
        if options.parameter.is_empty() {
            options.parameter.extend(parameters());
        }
        if options.counter().is_some() && source() == Source::Vmclock {
            options.source = Source::Vmclock;
        }
        if options.machine == Machine::default() {
            options.machine = machine();
        }
        if options.firmware == Firmware::default() {
            options.firmware = firmware();
        }
        let kernel = options.kernel();
        for name in ["contract", "header", "header32", "vmgenid"] {
            // A cortex-a72 has no 32-bit programs here.
            if name == "header32" && machine() == Machine::Virt {
                continue;
            }
            options.add.push(Add {
                host: self.host.guest_program(&kernel, name)?,
                guest: format!("/bin/{name}"),
            });
        }
        Vm::boot(&self.host, options)
    }
}

/// The module's parameters, from the environment. A test that loads the module by `insmod` uses
/// [`PARAMETERS`].
pub fn parameters() -> Option<String> {
    let parameters = std::env::var("VMGENID_PARAMETERS").ok();
    parameters.filter(|parameters| !parameters.is_empty())
}

/// The machine that the guests have: microvm with VMGENID_MACHINE=microvm in the environment, virt
/// with a kernel for arm64.
pub fn machine() -> Machine {
    match std::env::var("VMGENID_MACHINE").as_deref() {
        _ if kernel::is_arm64(&kernel::default()) => Machine::Virt,
        Ok("microvm") => Machine::Microvm,
        _ => Machine::Pc,
    }
}

/// The guests' firmware: UEFI with VMGENID_FIRMWARE=ovmf in the environment. It gives a guest on virt
/// ACPI instead of the device tree.
pub fn firmware() -> Firmware {
    match std::env::var("VMGENID_FIRMWARE").as_deref() {
        Ok("ovmf") => Firmware::Ovmf,
        _ => Firmware::Seabios,
    }
}

/// Where the guests' generation counter is: in VMClock's page with VMGENID_SOURCE=vmclock in the
/// environment.
pub fn source() -> Source {
    match std::env::var("VMGENID_SOURCE").as_deref() {
        Ok("vmclock") => Source::Vmclock,
        _ => Source::Ctra,
    }
}

/// The module's parameters, as an expression for the guest's shell.
pub const PARAMETERS: &str = "$(cat /vmgenid.parameters 2>/dev/null)";

/// Options with a counter of this value.
pub fn genctr(counter: u32) -> Options {
    Options {
        genctr: Some(counter),
        ..Options::default()
    }
}

/// The driver's folder in sysfs.
pub fn driver() -> String {
    let name = kernel::driver(&kernel::default());
    format!("/sys/bus/platform/drivers/{name}")
}

/// Multiplies a time, which is long enough for the tiny kernel, by the slowness of the kernel in
/// use.
pub fn scaled_time(time: Duration) -> Duration {
    time * kernel::needs(&kernel::default()).slowness
}

/// Divides a number of repetitions, which is right for the tiny kernel, by the slowness of the
/// kernel in use.
pub fn scaled(count: u32) -> u32 {
    count / kernel::needs(&kernel::default()).slowness
}

/// The awaited event did not come in time.
#[derive(Debug)]
pub struct Late {
    what: String,
    bound: Duration,
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: not within {} s", self.what, self.bound.as_secs())
    }
}

impl std::error::Error for Late {}

/// Waits until `done` has a result. The bound only ends a wait for an event that will not come: it
/// is not a measurement.
///
/// # Errors
///
/// [`Late`], or what `done` returns.
pub fn wait<T>(what: &str, mut done: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    let bound = scaled_time(Duration::from_secs(60));
    // A command in the guest takes some 20 ms of the guest's time.
    let mut pause = Duration::from_millis(25);
    loop {
        if let Some(result) = done()? {
            return Ok(result);
        }
        if start.elapsed() > bound {
            let what = what.into();
            bail!(Late { what, bound });
        }
        thread::sleep(pause);
        pause = (pause * 3 / 2).min(Duration::from_millis(200));
    }
}

/// Takes a snapshot, and leaves the guest stopped. Otherwise its processes would use CPU time of
/// the host that the clones need.
pub fn freeze(vm: &mut Vm, snapshot: &Name) -> Result<()> {
    vm.qmp(&stop {})?;
    vm.snapshot(snapshot)
}

/// The line that the kernel logs when `add_vmfork_randomness()` has reseeded it.
pub const RESEEDED: &str = "crng reseeded due to virtual machine fork";

/// How many times the kernel's log has that line. `vmgenid` calls `add_vmfork_randomness()` from a
/// work item, after it has published an ID. Where the module is `vmgenctr`, the kernel's own driver
/// calls it when that driver is notified.
pub fn reseeds(vm: &Vm) -> Result<usize> {
    let count = vm.shell(&format!("dmesg | grep -c '{RESEEDED}' || true"))?;
    Ok(count.trim().parse()?)
}

/// Waits until the log has that line `expected` times and the guest has settled. Fails if the line
/// is there once more.
pub fn expect_reseeds(vm: &Vm, expected: usize) -> Result<()> {
    wait(&format!("{expected} reseeds in the log"), || {
        Ok((reseeds(vm)? >= expected).then_some(()))
    })?;
    settle(vm)?;
    let count = reseeds(vm)?;
    ensure!(
        count == expected,
        "expected {expected} reseeds, the kernel's log has {count}"
    );
    Ok(())
}

/// Waits until the guest has handled all interrupts, notifications and calls of notifiers that were
/// due. A test calls this before it checks that an event has not happened. In a guest without the
/// test module (`vmforks`) this waits 0.3 s instead. A test that delays a notifier or starves a
/// worker must not call it: it would wait for that notifier or worker.
pub fn settle(vm: &Vm) -> Result<()> {
    vm.shell("cat /sys/kernel/debug/vmforks/settle 2>/dev/null || sleep 0.3")
        .map(drop)
}

/// The generation ID, as it is in the guest's memory.
pub fn id_in_memory(vm: &Vm) -> Result<[u8; 16]> {
    let guid = vm.qmp(&query_vm_generation_id {})?.guid.replace('-', "");
    let mut id = u128::from_str_radix(&guid, 16)?.to_be_bytes();
    // The first three fields are little-endian in memory.
    for field in [0..4, 4..6, 6..8] {
        id[field].reverse();
    }
    Ok(id)
}

/// The guest physical addresses of the ID and of the counter, from VGIA in the device's ACPI table or,
/// on virt, from `reg` in the device tree or from the DSDT. VGIA has the address of the device's pages. The ID is 40 bytes after
/// that (VMGENID_GUID_OFFSET of QEMU's hw/acpi/vmgenid.h), the counter's page 4096 bytes.
pub fn addresses(vm: &Vm) -> Result<[u32; 2]> {
    if machine() == Machine::Virt && firmware() == Firmware::Ovmf {
        let dsdt = vm.exec(["cat", "/sys/firmware/acpi/tables/DSDT"])?.stdout;
        let low = |name: &str| -> Result<u32> {
            // A name, and a package of two elements, the first of which is a dword.
            let start = [name.as_bytes(), &[0x12, 8, 2, 0x0c]].concat();
            let at = dsdt.windows(12).find(|at| at.starts_with(&start));
            let at = at.with_context(|| format!("the DSDT has no {name}"))?;
            Ok(u32::from_le_bytes(at[8..].try_into()?))
        };
        return Ok([low("ADDR")?, low("CTRA")?]);
    }
    if machine() == Machine::Virt {
        let node = "for n in /proc/device-tree/*; do
            grep -qs microsoft,vmgenid $n/compatible && cat $n/reg; done; true";
        let reg = vm.exec(["sh", "-c", node])?.stdout;
        ensure!(reg.len() == 32, "reg: {reg:x?}");
        let low =
            |at: usize| -> Result<u32> { Ok(u32::from_be_bytes(reg[at..at + 4].try_into()?)) };
        return Ok([low(4)?, low(20)?]);
    }
    let table = "cat /sys/firmware/acpi/tables/SSDT* | tr -d '\\n' | grep -ao 'VGIA.....'";
    let bytes = vm.exec(["sh", "-c", table])?.stdout;
    ensure!(
        bytes.len() >= 9 && bytes[4] == 0x0c,
        "VGIA is not a dword: {bytes:x?}"
    );
    let pages = u32::from_le_bytes(bytes[5..9].try_into()?);
    Ok([pages + 40, pages + 4096])
}

/// How many times the kernel's log has [`RESEEDED`], once the number no longer grows.
pub fn settled_reseeds(vm: &Vm) -> Result<usize> {
    let mut last = None;
    wait("the reseeds in the log come to an end", || {
        let before = last.replace(reseeds(vm)?);
        vm.shell("sleep 0.5")?;
        Ok(last.filter(|_| before == last))
    })
}

/// How many times the kernel's generator has been reseeded, for any reason. A kernel that has been
/// up for less than two minutes reseeds every few seconds.
pub fn generation(vm: &Vm) -> Result<u64> {
    Ok(vm.shell("contract reseeds")?.trim().parse()?)
}

/// What `contract at-once` reports about one change.
#[derive(Debug)]
pub struct Reply {
    /// The first call's answer.
    pub answer: String,
    /// How long that call took.
    pub first: Duration,
    /// How long it took until the counter had been read and the bytes drawn.
    pub then: Duration,
    /// The bytes that were drawn after the read, in hexadecimal.
    pub drawn: String,
}

impl Reply {
    /// The answer of the first call after the change to this counter, and how long it took.
    pub fn first(says: &str, value: u32) -> Result<Option<(String, Duration)>> {
        let start = format!("first {value} ");
        let Some(first) = says.lines().find_map(|line| line.strip_prefix(&start)) else {
            return Ok(None);
        };
        let (answer, micros) = first.split_once(' ').context("no time")?;
        let took = Duration::from_micros(micros.parse()?);
        Ok(Some((answer.into(), took)))
    }

    /// The whole reply, once both of its lines are there.
    pub fn of(says: &str, value: u32) -> Result<Option<Self>> {
        let start = format!("then {value} ");
        let then = says.lines().find_map(|line| line.strip_prefix(&start));
        let (Some((answer, first)), Some(then)) = (Self::first(says, value)?, then) else {
            return Ok(None);
        };
        let (micros, drawn) = then.split_once(' ').context("no draw")?;
        Ok(Some(Self {
            answer,
            first,
            then: Duration::from_micros(micros.parse()?),
            drawn: drawn.into(),
        }))
    }
}

/// Whether the kernel's own driver is built in, beside this one.
pub fn is_builtin() -> bool {
    kernel::is_builtin(&kernel::default())
}

/// Initializes the kernel's generator: until it is initialized, the kernel logs no reseeds. The
/// guest has no source of entropy, and would need about a second to collect some.
pub fn await_random(vm: &Vm) -> Result<()> {
    let mut seed = [0; 32];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
    let output = vm.command(["contract", "seed"]).input(&seed)?.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "contract seed: {said}");
    Ok(())
}

/// The output of `contract counter`: "read N, mapped N".
pub fn counter(vm: &Vm) -> Result<String> {
    Ok(vm.shell("contract counter")?.trim().into())
}

/// Expect that a read and the mapped page give this counter.
pub fn expect_counter(vm: &Vm, expected: u32) -> Result<()> {
    let said = counter(vm)?;
    ensure!(
        said == format!("read {expected}, mapped {expected}"),
        "expected {expected}: {said}"
    );
    Ok(())
}

/// The lines that a script of the guest's shell prints.
pub fn lines(vm: &Vm, script: &str) -> Result<Vec<String>> {
    Ok(vm.shell(script)?.lines().map(String::from).collect())
}

/// Checks that there is no `/dev/vmgenid`.
pub fn no_node(vm: &Vm) -> Result<()> {
    let there = vm.shell("ls -l /dev/vmgenid 2>/dev/null || true")?;
    ensure!(there.is_empty(), "there is a node: {there}");
    Ok(())
}

/// Checks that the kernel's log has no report of a bug. The suite checks each guest when it ends;
/// this function is for a guest that continues.
pub fn no_splat(vm: &Vm) -> Result<()> {
    match reports::first(&vm.shell("dmesg")?) {
        Some(report) => bail!("the kernel's log has: {report}"),
        None => Ok(()),
    }
}
