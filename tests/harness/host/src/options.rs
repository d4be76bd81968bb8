// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::kernel;
use anyhow::Context;
use anyhow::Error;
use anyhow::Result;
use anyhow::ensure;
use clap::ValueEnum;
use serde::Deserialize;
use serde::Serialize;
use std::path::Path;
use std::path::PathBuf;
use std::str::FromStr;

/// What a VM is made of. The defaults are those of the command line.
#[derive(Clone, Debug, Default, clap::Args, Serialize, Deserialize)]
pub struct Options {
    /// The generation counter's first value [default: 1]
    #[arg(long, value_name = "N", conflicts_with_all = ["no_genctr", "no_device"])]
    pub genctr: Option<u32>,
    /// Where the generation counter is
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub source: Source,
    /// A vmgenid device without a generation counter
    #[arg(long)]
    pub no_genctr: bool,
    /// No vmgenid device at all
    #[arg(long)]
    pub no_device: bool,
    /// Do not load the module (it is in the guest, as /vmgenid.ko)
    #[arg(long)]
    pub no_module: bool,
    /// Load the module with this parameter
    #[arg(long, value_name = "NAME=VALUE", conflicts_with = "no_module")]
    #[serde(default)]
    pub parameter: Vec<String>,
    /// The guest kernel, by the name of its configuration [default: tiny, or
    /// VMGENID_KERNEL of the environment]
    #[arg(long, value_name = "NAME")]
    pub kernel: Option<String>,
    /// More kernel parameters
    #[arg(long, value_name = "PARAMETERS", allow_hyphen_values = true)]
    pub append: Vec<String>,
    /// Put a file into the guest, at /BASENAME if no path is given
    #[arg(long, value_name = "HOSTFILE[:GUESTPATH]")]
    pub add: Vec<Add>,
    /// The machine that QEMU is
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub machine: Machine,
    /// Its firmware
    #[arg(long, value_enum, default_value_t)]
    #[serde(default)]
    pub firmware: Firmware,
    /// How many CPUs [default: 1; with the kernel kcsan 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=255))]
    pub smp: Option<u16>,
    /// The CPU model [default: qemu64]
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,
    /// Memory in MiB [default: 256; with the kernel debug 512]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(64..))]
    pub memory: Option<u32>,
    /// Guest time counts instructions: one nanosecond each, on one CPU
    #[arg(long)]
    pub icount: bool,
    /// What runs the guest's CPUs
    #[arg(long, value_enum, default_value_t)]
    pub accel: Accelerator,
    /// Ours with the generation counter, or as the distribution has it
    #[arg(long, value_enum, default_value_t)]
    pub qemu: Flavour,
    /// A disk to begin with, instead of an empty one, or of Debian's: a qcow2 file, which
    /// is not written to (for tests)
    #[arg(skip)]
    #[serde(default)]
    pub disk: Option<PathBuf>,
    /// The generation ID, instead of a new one (for tests)
    #[arg(skip)]
    #[serde(skip)]
    pub guid: Option<String>,
    /// Start with the guest standing still, and do not wait for it (for tests)
    #[arg(skip)]
    #[serde(skip)]
    pub paused: bool,
    /// One more argument for QEMU
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    pub qemu_arg: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, ValueEnum, Serialize, Deserialize)]
pub enum Source {
    /// In a page of the vmgenid device (CTRA)
    #[default]
    Ctra,
    /// In VMClock's page
    Vmclock,
}

impl Source {
    /// The device's path in QEMU's object model, and the property that is the counter.
    pub fn property(self) -> (&'static str, &'static str) {
        match self {
            Self::Ctra => ("/machine/peripheral/vmgenid", "genctr"),
            Self::Vmclock => ("/machine/peripheral/vmclock", "vm-generation-counter"),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, ValueEnum, Serialize, Deserialize)]
pub enum Machine {
    #[default]
    Pc,
    Q35,
    /// Like Firecracker's: hardware-reduced ACPI, which notifies by a Generic Event Device
    Microvm,
    /// That of kernels for arm64: a device tree, or with --firmware ovmf ACPI
    Virt,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, ValueEnum, Serialize, Deserialize)]
pub enum Firmware {
    #[default]
    Seabios,
    Ovmf,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, ValueEnum, Serialize, Deserialize)]
pub enum Accelerator {
    #[default]
    Tcg,
    Kvm,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, ValueEnum, Serialize, Deserialize)]
pub enum Flavour {
    #[default]
    Genctr,
    Stock,
}

impl Options {
    /// What does not fit together.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.qemu != Flavour::Stock || self.genctr.is_none(),
            "--qemu stock has no generation counter: leave out --genctr"
        );
        ensure!(
            self.source == Source::Ctra || self.counter().is_some(),
            "--source vmclock is for a generation counter, which this machine does not have"
        );
        ensure!(
            !self.icount || self.smp() == 1,
            "--icount works with one CPU only: leave out --smp"
        );
        ensure!(
            !self.icount || self.accel == Accelerator::Tcg,
            "--icount works with --accel tcg only"
        );
        ensure!(
            self.machine != Machine::Virt || kernel::is_arm64(&self.kernel()),
            "--machine virt is for kernels of arm64: give --kernel arm64"
        );
        ensure!(
            self.machine() != Machine::Virt || self.qemu == Flavour::Genctr,
            "a kernel for arm64 has this project's QEMU: leave out --qemu"
        );
        ensure!(
            self.machine != Machine::Microvm || self.qemu != Flavour::Stock || self.no_device,
            "--machine microvm has the devices only with this project's QEMU: leave out --qemu stock"
        );
        ensure!(
            self.machine != Machine::Microvm || self.firmware == Firmware::Seabios,
            "--machine microvm has a firmware of its own: leave out --firmware"
        );
        self.add.iter().try_for_each(Add::check)
    }

    /// The generation counter's value, if there is a counter.
    pub fn counter(&self) -> Option<u32> {
        let without = self.no_device || self.no_genctr || self.qemu == Flavour::Stock;
        (!without).then(|| self.genctr.unwrap_or(1))
    }

    /// The arguments of QEMU's -device, one for each device.
    pub fn devices(&self, guid: &str) -> Vec<String> {
        let vmgenid = format!("vmgenid,id=vmgenid,guid={guid}");
        let property = self.source.property().1;
        match (self.counter(), self.source) {
            _ if self.no_device => vec![],
            (None, _) => vec![vmgenid],
            (Some(counter), Source::Ctra) => vec![format!("{vmgenid},{property}={counter}")],
            (Some(counter), Source::Vmclock) => {
                vec![vmgenid, format!("vmclock,id=vmclock,{property}={counter}")]
            }
        }
    }

    /// In MiB.
    pub fn memory(&self) -> u32 {
        self.memory.unwrap_or(kernel::needs(&self.kernel()).memory)
    }

    pub fn smp(&self) -> u16 {
        match self.smp {
            Some(smp) => smp,
            None if self.icount => 1,
            None => kernel::needs(&self.kernel()).smp,
        }
    }

    pub fn kernel(&self) -> String {
        self.kernel.clone().unwrap_or_else(kernel::default)
    }

    /// The machine that the kernel fits.
    pub fn machine(&self) -> Machine {
        if kernel::is_arm64(&self.kernel()) {
            Machine::Virt
        } else {
            self.machine
        }
    }

    /// The same, with everything said that the environment decides: a snapshot
    /// can be restored only into the same machine.
    pub fn decided(self) -> Self {
        Self {
            memory: Some(self.memory()),
            smp: Some(self.smp()),
            kernel: Some(self.kernel()),
            machine: self.machine(),
            ..self
        }
    }
}

/// A file of the host to put into the guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Add {
    pub host: PathBuf,
    pub guest: String,
}

impl Add {
    fn check(&self) -> Result<()> {
        let host = self.host.display();
        let metadata = self
            .host
            .metadata()
            .with_context(|| format!("cannot add {host}"))?;
        ensure!(metadata.is_file(), "cannot add {host}: it is not a file");
        Ok(())
    }
}

impl FromStr for Add {
    type Err = Error;

    fn from_str(spec: &str) -> Result<Self> {
        let (host, guest) = spec.rsplit_once(':').unwrap_or((spec, ""));
        let base = Path::new(host).file_name().and_then(|base| base.to_str());
        let base = base.context("it names no file")?;
        let guest = match guest {
            "" => format!("/{base}"),
            folder if folder.ends_with('/') => format!("{folder}{base}"),
            path => path.into(),
        };
        ensure!(
            guest.starts_with('/') && !guest.split('/').any(|part| part == ".."),
            "the path in the guest starts with / and has no .. in it: HOSTFILE:/PATH"
        );
        Ok(Self {
            host: host.into(),
            guest,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(spec: &str) -> Option<(String, String)> {
        let add: Add = spec.parse().ok()?;
        Some((add.host.to_str()?.into(), add.guest))
    }

    fn pair(host: &str, guest: &str) -> Option<(String, String)> {
        Some((host.into(), guest.into()))
    }

    #[test]
    fn a_file_goes_where_it_is_told() {
        assert_eq!(add("a/b.ko"), pair("a/b.ko", "/b.ko"));
        assert_eq!(add("a/b:/bin/c"), pair("a/b", "/bin/c"));
        assert_eq!(add("a:b:/c"), pair("a:b", "/c"));
        assert_eq!(add("a/b:/bin/"), pair("a/b", "/bin/b"));
        assert_eq!(add("a:"), pair("a", "/a"));
        for bad in ["", "/", "a:b", "a:/../b", ":/b"] {
            assert_eq!(add(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_device_is_what_was_asked_for() {
        let devices = |options: Options| options.devices("auto");
        let options = Options::default();
        assert_eq!(
            devices(options.clone()),
            ["vmgenid,id=vmgenid,guid=auto,genctr=1"]
        );
        let stock = Options {
            qemu: Flavour::Stock,
            ..options.clone()
        };
        assert_eq!(devices(stock), ["vmgenid,id=vmgenid,guid=auto"]);
        let vmclock = Options {
            source: Source::Vmclock,
            ..options.clone()
        };
        assert_eq!(
            devices(vmclock),
            [
                "vmgenid,id=vmgenid,guid=auto",
                "vmclock,id=vmclock,vm-generation-counter=1"
            ]
        );
        let none = Options {
            no_device: true,
            ..options
        };
        assert!(devices(none).is_empty());
    }

    #[test]
    fn what_is_not_said_is_what_the_kernel_needs() {
        let options = |kernel: &str| Options {
            kernel: Some(kernel.into()),
            ..Options::default()
        };
        let machine = |options: Options| (options.memory(), options.smp());
        assert_eq!(machine(options("tiny")), (256, 1));
        assert_eq!(machine(options("debug")), (512, 1));
        assert_eq!(machine(options("kcsan")), (256, 2));
        let icount = Options {
            icount: true,
            ..options("kcsan")
        };
        assert!(icount.check().is_ok());
        assert_eq!(machine(icount), (256, 1));
        let said = Options {
            smp: Some(4),
            memory: Some(100),
            ..options("debug")
        };
        assert_eq!(machine(said), (100, 4));
    }
}
