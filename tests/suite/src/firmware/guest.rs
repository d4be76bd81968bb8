// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest with all tables for its machine.

use super::{
    rows::{self, Outcome, Row, SECOND},
    table::{self, BAR, MEMORY, Tables, VIRT_MEMORY},
};
use crate::context::{Context, RESEEDED, await_random, genctr, lines};
use anyhow::{Context as _, Result, ensure};
use harness::{Options, Vm, kernel};
use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet},
};

#[derive(Clone, Copy, PartialEq)]
pub enum Machine {
    /// A PC, for rows about `ADDR`.
    PcAddr,
    /// A PC, for all other rows.
    Pc,
    Q35,
    /// That of arm64, with UEFI.
    Virt,
}

impl Machine {
    pub fn rows(self) -> Vec<Row> {
        match self {
            Self::PcAddr => rows::pc_addr(),
            Self::Pc => rows::pc(),
            Self::Q35 => rows::q35(),
            Self::Virt => rows::virt(),
        }
    }

    /// The options for the machine and its memory map. Kernel parameters change the map that
    /// SeaBIOS reports.
    pub fn options(self) -> Options {
        if self == Self::Virt {
            // The memory is that of QEMU's own device, which no driver binds.
            return Options {
                no_module: true,
                parameter: vec!["early_look=0".into()],
                ..genctr(42)
            };
        }
        let mut options = Options {
            memory: Some(384),
            append: vec![format!("memmap=2M${MEMORY:#x}")],
            no_device: true,
            no_module: true,
            ..Options::default()
        };
        let (machine, append): (_, &[_]) = match self {
            Self::PcAddr | Self::Pc => (
                // 128 MiB are above 4 GiB.
                "pc,max-ram-below-4g=256M",
                &[
                    // In this order: ACPI NVS; ACPI tables; an area that is not whole pages; one
                    // page of two kinds; half a page in a PCI hole; an area above 4 GiB.
                    "memmap=64K%0xa000000-1+4",
                    "memmap=64K#0xa100000",
                    "memmap=4K$0xa200800",
                    "memmap=2K$0xa300000",
                    "memmap=2K%0xa300800-1+4",
                    "memmap=2K$0xc0000000",
                    "memmap=64K$0x102000000",
                ],
            ),
            Self::Q35 => (
                "q35,max-ram-below-4g=256M",
                // The interrupt controllers and the timer. Without nox2apic, the kernel does not
                // access the local interrupt controller through memory.
                &["memmap=4M$0xfec00000", "nox2apic"],
            ),
            Self::Virt => unreachable!("above"),
        };
        options
            .qemu_arg
            .extend(["-machine", machine].map(String::from));
        options
            .append
            .extend(append.iter().map(|&more| more.into()));
        options
    }
}

pub struct Guest {
    pub vm: Vm,
    pub rows: Vec<Row>,
    /// The devices, by their nodes in the namespace.
    devices: BTreeMap<String, String>,
    /// Those of them that a driver could bind.
    present: BTreeSet<String>,
    _tables: Tables,
}

impl Borrow<Vm> for Guest {
    fn borrow(&self) -> &Vm {
        &self.vm
    }
}

impl Guest {
    /// Boots a guest in which no device is bound and the module is not loaded.
    pub fn boot(context: &Context, machine: Machine) -> Result<Self> {
        let guest = Self::start(context, machine, machine.options())?;
        await_random(&guest.vm)?;
        guest
            .vm
            .shell("echo 0 >/sys/bus/platform/drivers_autoprobe")?;
        guest.check_memory(machine)?;
        Ok(guest)
    }

    /// Boots a guest in which the system binds each device that can be bound, QEMU's own device
    /// included.
    pub fn boot_all(context: &Context, machine: Machine) -> Result<Self> {
        let options = Options {
            no_device: false,
            no_module: false,
            genctr: genctr(42).genctr,
            ..machine.options()
        };
        Self::start(context, machine, options)
    }

    fn start(context: &Context, machine: Machine, mut options: Options) -> Result<Self> {
        let rows = machine.rows();
        let tables = Tables::compile(context, &rows)?;
        tables.give_to(&mut options);
        let vm = context.boot(options)?;
        let paths = vm.shell(
            "cd /sys/bus/acpi/devices && for each in *; do echo $each $(cat $each/path); done",
        )?;
        let devices = paths
            .lines()
            .filter_map(|line| {
                let (device, path) = line.split_once(' ')?;
                let (_, node) = path.rsplit_once('.')?;
                Some((node.into(), device.into()))
            })
            .collect();
        let present = lines(&vm, "ls /sys/bus/platform/devices")?;
        let guest = Self {
            present: present.into_iter().collect(),
            vm,
            rows,
            devices,
            _tables: tables,
        };
        for n in 0..guest.rows.len() {
            let node = table::node(n);
            let there = guest.devices.contains_key(&node);
            ensure!(there, "the guest has no {node}: {}", guest.rows[n].name);
        }
        Ok(guest)
    }

    /// Checks what the rows assume of the memory map: where the kernel is, where a PCI device is,
    /// and so on.
    fn check_memory(&self, machine: Machine) -> Result<()> {
        let map = self.vm.shell("cat /proc/iomem")?;
        let holds = |what: &str, address: u64| {
            let found = map.lines().any(|line| {
                let Some((range, name)) = line.trim().split_once(" : ") else {
                    return false;
                };
                let mut ends = range
                    .split('-')
                    .filter_map(|end| u64::from_str_radix(end, 16).ok());
                let (Some(first), Some(last)) = (ends.next(), ends.next()) else {
                    return false;
                };
                name.starts_with(what) && (first..=last).contains(&address)
            });
            ensure!(found, "{what} is not at {address:#x}:\n{map}");
            Ok(())
        };
        if machine == Machine::Virt {
            holds("System RAM", rows::VIRT_RAM)?;
            return holds("QEMUVGID:00", VIRT_MEMORY);
        }
        holds("Reserved", MEMORY)?;
        if machine == Machine::Q35 {
            holds("PCI ECAM", 0xB000_0000)?;
            holds("Reserved", 0xFED0_0000)?;
            return holds("HPET", 0xFED0_0000);
        }
        holds("Kernel code", 0x0100_0000)?;
        holds("System RAM", 0x1_0100_0000)?;
        holds("0000:00:02.0", BAR)?;
        holds("ACPI Non-volatile Storage", 0x0A00_0000)?;
        holds("ACPI Tables", 0x0A10_0000)?;
        holds("System RAM", 0x0A20_07FF)?;
        holds("Reserved", 0x0A20_0800)?;
        holds("System RAM", 0x0A20_1800)?;
        holds("Reserved", 0x0A30_0000)?;
        holds("ACPI Non-volatile Storage", 0x0A30_0800)?;
        holds("Reserved", 0xC000_07FF)?;
        holds("Reserved", 0x1_0200_0000)
    }

    pub fn load(&self) -> Result<()> {
        self.take(&[Step::Load]).map(drop)
    }

    pub fn unload(&self) -> Result<()> {
        self.take(&[Step::Unload]).map(drop)
    }

    /// Takes the steps, one after the other, in one run of a program.
    fn take(&self, steps: &[Step]) -> Result<Vec<Seen>> {
        let names: Vec<_> = steps.iter().map(|step| self.step(*step)).collect();
        let argv = ["contract", "steps"].into_iter();
        let output = self.vm.exec(argv.chain(names.iter().map(String::as_str)))?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "{}: {said}", output.status);
        let seen = Seen::parse(&said)?;
        ensure!(seen.len() == steps.len(), "{names:?}: {said}");
        for (seen, step) in seen.iter().zip(steps) {
            let wrong = match step {
                Step::Bind(_) => None,
                _ if seen.answer != "none" => Some(&seen.answer),
                // The node disappears with the last device.
                Step::Unload if seen.node != "none" => Some(&seen.node),
                _ => None,
            };
            ensure!(wrong.is_none(), "{}: {said}", self.step(*step));
        }
        Ok(seen)
    }

    fn step(&self, step: Step) -> String {
        match step {
            Step::Load => "load".into(),
            Step::Unload => "unload".into(),
            Step::Bind(n) => format!("bind={}", self.device(n)),
            Step::Unbind(n) => format!("unbind={}", self.device(n)),
        }
    }

    /// The row with this name.
    pub fn find(&self, name: &str) -> Result<usize> {
        let place = self.rows.iter().position(|row| row.name == name);
        place.with_context(|| format!("no row {name}"))
    }

    pub fn device(&self, n: usize) -> &str {
        &self.devices[&table::node(n)]
    }

    /// The counter that a row's firmware has put where its `CTRA` says.
    pub fn counter(&self, n: usize) -> u32 {
        self.rows[n].counter.unwrap_or(table::counter(n))
    }

    /// Expect that the device of a row has its outcome, alone and beside a sound device.
    pub fn check(&self, n: usize) -> Result<()> {
        let row = &self.rows[n];
        let sound = 0;
        let first = [
            Step::Load,
            Step::Bind(n),
            Step::Unbind(n),
            // An unload makes the module forget the ID.
            Step::Unload,
        ];
        let then = [
            Step::Load,
            Step::Bind(sound),
            Step::Bind(n),
            Step::Unbind(n),
            Step::Unbind(sound),
            Step::Unload,
        ];
        let beside = if n == sound { &[][..] } else { &then };
        let seen = self.take(&[&first, beside].concat())?;
        // The first bind of an ID after a load reseeds. No ID changes, so there are three reseeds
        // at most.
        let log = seen.iter().flat_map(|seen| &seen.log);
        let reseeds = log.filter(|line| line.contains(RESEEDED)).count();
        ensure!(reseeds <= 3, "the kernel was reseeded too often: {seen:?}");
        let mut seen = seen.into_iter();
        let mut next = || seen.next().context("a step");

        next()?;
        let alone = (row.outcome == Outcome::Node).then_some(n);
        self.judge(&next()?, n, &row.outcome)
            .and_then(|bound| bound.expect_node(self, alone))
            .context("alone")?;
        next()?.expect_node(self, None)?;
        next()?;
        if n == sound {
            return Ok(());
        }

        next()?;
        self.judge(&next()?, sound, &Outcome::Node)
            .and_then(|bound| bound.expect_node(self, Some(sound)))
            .context("the sound device")?;
        let second = Outcome::Reseeds(Some(SECOND.into()));
        let outcome = match &row.beside {
            Some(outcome) => outcome,
            None if row.outcome == Outcome::Node => &second,
            None => &row.outcome,
        };
        self.judge(&next()?, n, outcome)
            .and_then(|bound| bound.expect_node(self, Some(sound)))
            .context("beside a sound device")?;
        next()?.expect_node(self, Some(sound))?;
        next()?.expect_node(self, None)
    }

    /// Binds a device, and checks that it has this outcome.
    pub fn expect(&self, n: usize, outcome: &Outcome) -> Result<()> {
        let seen = self.take(&[Step::Bind(n)])?;
        let bound = self.judge(&seen[0], n, outcome)?;
        let node = *outcome == Outcome::Node;
        ensure!(node == (bound.node != "none"), "the node: {}", bound.node);
        Ok(())
    }

    /// Checks the observations at a bind against the outcome.
    fn judge<'a>(&self, seen: &'a Seen, n: usize, outcome: &Outcome) -> Result<&'a Seen> {
        let answer = match outcome {
            Outcome::Nothing | Outcome::Missing => "ENODEV",
            Outcome::Refused(_) => "EINVAL",
            _ => "none",
        };
        ensure!(seen.answer == answer, "not {answer}: {seen:?}");
        // A line about another device, or a complaint of the kernel about a request of the driver.
        let other = seen.log.iter().find(|line| {
            let driver = kernel::driver(&kernel::default());
            let ours = line.starts_with(&format!("{driver} {}: ", self.device(n)));
            let strange = [
                "vmgenid ",
                "vmgenctr ",
                "ioremap",
                "sanity check",
                "x86/PAT",
            ];
            !ours && strange.iter().any(|strange| line.contains(strange))
        });
        ensure!(
            other.is_none(),
            "the kernel says: {}",
            other.map_or("", |other| other)
        );
        self.expect_lines(n, outcome, &seen.log)?;
        self.expect_driver(n, outcome, &seen.bound)?;
        Ok(seen)
    }

    /// Checks that the log has the driver's messages about a device, and no others about it.
    pub fn expect_lines(&self, n: usize, outcome: &Outcome, log: &[String]) -> Result<()> {
        let device = self.device(n);
        let driver = kernel::driver(&kernel::default());
        let prefix = format!("{driver} {device}: ");
        let lines: Vec<_> = log
            .iter()
            .filter_map(|line| line.strip_prefix(&prefix))
            .collect();
        let failed = format!("probe with driver {driver} failed with error -22");
        let expected = match outcome {
            Outcome::Missing => vec!["ADDR is missing: no generation ID"],
            Outcome::Refused(line) => {
                // The second line is the driver core's.
                vec![line.as_str(), &failed]
            }
            Outcome::Reseeds(Some(line)) => vec![line.as_str()],
            _ => vec![],
        };
        ensure!(
            lines == expected,
            "{device}: expected {expected:?}, the driver says {lines:?}"
        );
        Ok(())
    }

    /// Checks whether the system sees the device, and whether the device is in `bound`.
    pub fn expect_driver(&self, n: usize, outcome: &Outcome, bound: &[String]) -> Result<()> {
        let device = self.device(n);
        let state = (
            self.present.contains(device),
            bound.iter().any(|bound| bound == device),
        );
        let expected = match outcome {
            Outcome::Nothing => (false, false),
            Outcome::Missing | Outcome::Refused(_) => (true, false),
            _ => (true, true),
        };
        ensure!(state == expected, "{device}: present, bound: {state:?}");
        Ok(())
    }

    /// Unbinds a device, if it is bound.
    pub fn unbind(&self, n: usize) -> Result<()> {
        self.take(&[Step::Unbind(n)]).map(drop)
    }
}

/// A step of the guest's program. A number is that of a row, for the row's device.
#[derive(Clone, Copy)]
enum Step {
    Load,
    Unload,
    Bind(usize),
    Unbind(usize),
}

/// The observations of the guest's program after a step.
#[derive(Debug, Default)]
struct Seen {
    /// The kernel's error, or "none".
    answer: String,
    bound: Vec<String>,
    /// The counter, or "none".
    node: String,
    log: Vec<String>,
}

impl Seen {
    fn parse(said: &str) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        for line in said.lines() {
            let (key, value) = line.split_once(' ').context("no value")?;
            if key == "step" {
                all.push(Self::default());
            }
            let seen = all.last_mut().with_context(|| line.to_string())?;
            match key {
                "answer" => seen.answer = value.into(),
                "bound" => seen.bound = value.split_whitespace().map(String::from).collect(),
                "node" => seen.node = value.into(),
                "log" => seen.log.push(value.into()),
                _ => {}
            }
        }
        Ok(all)
    }

    /// Checks that the node is that of a row's device, or that there is none.
    fn expect_node(&self, guest: &Guest, of: Option<usize>) -> Result<()> {
        let expected = of.map_or("none".into(), |n| guest.counter(n).to_string());
        ensure!(self.node == expected, "the node: not {expected}: {self:?}");
        Ok(())
    }
}
