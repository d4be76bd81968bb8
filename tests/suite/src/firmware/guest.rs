// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest with all tables for its machine.

use super::{
    rows::{self, Outcome, Row, SECOND},
    table::{self, BAR, MEMORY, Tables},
};
use crate::context::{Context, await_random, counter, genctr, no_node, reseeds};
use anyhow::{Context as _, Result, bail, ensure};
use std::{borrow::Borrow, collections::BTreeMap};
use vm::{Options, Vm};

const DRIVER: &str = "/sys/bus/platform/drivers/vmgenid";

#[derive(Clone, Copy, PartialEq)]
pub enum Machine {
    /// For what is said of `ADDR`.
    PcAddr,
    /// For all else.
    Pc,
    Q35,
}

impl Machine {
    pub fn rows(self) -> Vec<Row> {
        match self {
            Self::PcAddr => rows::pc_addr(),
            Self::Pc => rows::pc(),
            Self::Q35 => rows::q35(),
        }
    }

    /// The machine, and what its firmware's memory map says: by the kernel's
    /// parameters, which are laid over what SeaBIOS has to say.
    pub fn options(self) -> Options {
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
                    // ACPI NVS, ACPI tables; not whole pages; one page of two
                    // kinds; half a page in a PCI hole; above 4 GiB.
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
                // The interrupt controllers and the timer; else the local one
                // is not used through memory.
                &["memmap=4M$0xfec00000", "nox2apic"],
            ),
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
    _tables: Tables,
}

impl Borrow<Vm> for Guest {
    fn borrow(&self) -> &Vm {
        &self.vm
    }
}

impl Guest {
    /// Boots a guest in which nothing is bound, and the module not loaded.
    pub fn boot(context: &Context, machine: Machine) -> Result<Self> {
        let guest = Self::start(context, machine, machine.options())?;
        await_random(&guest.vm)?;
        guest
            .vm
            .shell("echo 0 >/sys/bus/platform/drivers_autoprobe")?;
        guest.check_memory(machine)?;
        Ok(guest)
    }

    /// Boots a guest in which everything is bound that can be, QEMU's own
    /// device, too.
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
        options.qemu_arg.extend(tables.arguments());
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
        let guest = Self {
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

    /// The rows say where the kernel and a PCI device are, and so on.
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
        self.vm.shell("insmod /vmgenid.ko").map(drop)
    }

    pub fn unload(&self) -> Result<()> {
        no_node(&self.vm)?;
        self.vm.shell("rmmod vmgenid").map(drop)
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

    /// The test of a row: alone, and beside a sound device.
    pub fn check(&self, n: usize) -> Result<()> {
        let row = &self.rows[n];
        let before = reseeds(&self.vm)?;
        self.expect(n, &row.outcome).context("alone")?;
        if row.outcome == Outcome::Node {
            self.expect_counter(n)?;
        } else {
            no_node(&self.vm)?;
        }
        self.unbind(n)?;
        no_node(&self.vm)?;

        let sound = 0;
        if n != sound {
            // Forgets the ID.
            self.unload()?;
            self.load()?;
            self.expect(sound, &Outcome::Node)
                .context("the sound device")?;
            self.expect_counter(sound)?;
            let second = Outcome::Reseeds(Some(SECOND.into()));
            let outcome = match &row.beside {
                Some(outcome) => outcome,
                None if row.outcome == Outcome::Node => &second,
                None => &row.outcome,
            };
            self.expect(n, outcome).context("beside a sound device")?;
            self.expect_counter(sound)?;
            self.unbind(n)?;
            self.expect_counter(sound)?;
            self.unbind(sound)?;
        }
        // Nobody has changed an ID.
        ensure!(reseeds(&self.vm)? == before, "the kernel was reseeded");
        Ok(())
    }

    /// Binds a device, and expects this.
    pub fn expect(&self, n: usize, outcome: &Outcome) -> Result<()> {
        let mark = format!("firmware: bind {}", self.rows[n].name);
        let said = self.vm.shell(&format!(
            "echo '{mark}' >/dev/kmsg; echo {} 2>&1 >{DRIVER}/bind || true",
            self.device(n)
        ))?;
        let log = self.vm.shell("dmesg")?;
        let (_, log) = log.rsplit_once(&mark).context("the log has no mark")?;

        let errno = match outcome {
            Outcome::Nothing | Outcome::Missing => "No such device",
            Outcome::Refused(_) => "Invalid argument",
            _ => "",
        };
        let right = match errno {
            "" => said.is_empty(),
            errno => said.contains(errno),
        };
        ensure!(right, "expected {errno:?}, bind says {said:?}");
        // Of another device, or of what the driver asked the kernel for.
        let other = log.lines().find(|line| {
            let ours = line.contains(&format!("] vmgenid {}: ", self.device(n)));
            let strange = ["] vmgenid ", "ioremap", "sanity check", "x86/PAT"];
            !ours && strange.iter().any(|strange| line.contains(strange))
        });
        ensure!(other.is_none(), "the kernel says: {}", other.unwrap_or(""));
        self.expect_lines(n, outcome, log)?;
        self.expect_driver(n, outcome)
    }

    /// Expects of the driver what it has to say about a device, and no more.
    pub fn expect_lines(&self, n: usize, outcome: &Outcome, log: &str) -> Result<()> {
        let device = self.device(n);
        let prefix = format!("] vmgenid {device}: ");
        let lines: Vec<_> = log
            .lines()
            .filter_map(|line| Some(line.split_once(&prefix)?.1))
            .collect();
        let expected = match outcome {
            Outcome::Missing => vec!["ADDR is missing: no generation ID"],
            Outcome::Refused(line) => {
                // The second is the driver core's.
                vec![line, "probe with driver vmgenid failed with error -22"]
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

    /// Expects a driver, or none.
    pub fn expect_driver(&self, n: usize, outcome: &Outcome) -> Result<()> {
        let device = format!("/sys/bus/platform/devices/{}", self.device(n));
        let state = self.vm.shell(&format!(
            "[ -e {device} ] || echo nothing; basename $(readlink {device}/driver) 2>/dev/null || true"
        ))?;
        let expected = match outcome {
            Outcome::Nothing => "nothing",
            Outcome::Missing | Outcome::Refused(_) => "",
            Outcome::Reseeds(_) | Outcome::Node => "vmgenid",
            Outcome::Various => bail!("nothing is to be expected of it"),
        };
        ensure!(state.trim() == expected, "driver: {state}");
        Ok(())
    }

    fn expect_counter(&self, n: usize) -> Result<()> {
        let (said, value) = (counter(&self.vm)?, self.counter(n));
        ensure!(
            said == format!("read {value}, mapped {value}"),
            "expected {value}: {said}"
        );
        Ok(())
    }

    /// Unbinds a device, if it is bound.
    pub fn unbind(&self, n: usize) -> Result<()> {
        let device = self.device(n);
        let unbind =
            format!("if [ -e {DRIVER}/{device} ]; then echo {device} >{DRIVER}/unbind; fi");
        self.vm.shell(&unbind).map(drop)
    }
}
