// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where a test runs. Each test has its conditions beside its name, in its table. A test whose
//! conditions are not met is shown as ignored. A test without conditions runs with each kernel of
//! tests/kernel/, with the module loaded without parameters, with the counter of `CTRA`, on a PC.

use crate::context;
use anyhow::{Result, bail};
use harness::{Firmware, Machine, Source, kernel};
use std::str::FromStr;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum On {
    /// Also with VMGENID_PARAMETERS, VMGENID_SOURCE and VMGENID_MACHINE: tests of promises that
    /// depend neither on the parameters nor on the source of the counter.
    AnySetup,
    /// Only with the kernel `tiny`: tests that do not depend on the kernel (of QEMU and of the VM
    /// tool, for example), and tests that count the guest's instructions.
    Tiny,
    /// Only with a kernel that has its own driver built in.
    Builtin,
    /// Not with a kernel that has its own driver built in. `vmgenctr` keeps the promises of
    /// `vmgenid`, so each such test needs a reason.
    NotBuiltin,
    /// Only with a kernel that compares the ID itself (patches/linux): `series`, `debug-series`, ...
    Series,
    /// Not with such a kernel.
    Mainline,
    /// Only with a kernel that has fault injection.
    Debug,
    /// Only with a kernel that has checkers (KASAN, lockdep, kmemleak; KCSAN).
    Checkers,
    /// Not with a kernel that has checkers, or with arm64-64k, which has one of them: they change the
    /// code that is stepped through.
    PlainKernel,
    /// Not with KCSAN, under which Linux does not survive a resume from S3 (7.3.4, also without the
    /// module).
    NotKcsan,
    /// Only on a PC: tests that need ACPI's interrupt (SCI).
    Pc,
    /// Only with a kernel for arm64, in guests with a device tree.
    Arm64,
    /// Only with a kernel for arm64, in guests with UEFI and ACPI.
    Arm64Acpi,
    /// Also with a kernel for arm64, in both.
    AlsoArm64,
    /// Not with such a kernel: what needs ACPI, a 32-bit program, or another machine.
    NotArm64,
    /// Not on arm64 with UEFI and ACPI, where the test module cannot send a notification.
    NotArm64Acpi,
    /// Only with a whole Debian guest, with its kernel.
    Debian,
    /// Not in `make test`: takes an hour, or as long as the environment says. Has no deadline.
    Soak,
}

impl FromStr for On {
    type Err = anyhow::Error;

    /// Parses the word that a guest program prints after a promise's name.
    fn from_str(word: &str) -> Result<Self> {
        Ok(match word {
            "not-builtin" => Self::NotBuiltin,
            "mainline" => Self::Mainline,
            "pc" => Self::Pc,
            _ => bail!("no such place for a test: {word:?}"),
        })
    }
}

/// Whether a test with these conditions does not belong to the present run.
pub fn is_ignored(on: &[On]) -> bool {
    let is = |place| on.contains(&place);
    let kernel = kernel::default();
    let debian = kernel == kernel::DEBIAN;
    if debian || is(On::Debian) {
        return debian != is(On::Debian);
    }
    let is_arm64 = kernel::is_arm64(&kernel);
    let other_setup = context::parameters().is_some()
        || context::source() == Source::Vmclock
        || context::machine() != Machine::Pc;
    let plain = is_arm64 || matches!(kernel.as_str(), "tiny" | "builtin" | kernel::SERIES);
    is(On::Soak)
        || other_setup
            && !is(On::AnySetup)
            && !(is_arm64 && (is(On::Arm64) || is(On::Arm64Acpi) || is(On::AlsoArm64)))
        || is(On::Arm64) && !(is_arm64 && context::firmware() == Firmware::Seabios)
        || is(On::Arm64Acpi) && !(is_arm64 && context::firmware() == Firmware::Ovmf)
        || is_arm64 && is(On::NotArm64)
        || is(On::NotArm64Acpi) && is_arm64 && context::firmware() == Firmware::Ovmf
        || context::machine() != Machine::Pc && is(On::Pc)
        || kernel != "tiny" && is(On::Tiny)
        || kernel::is_builtin(&kernel) && is(On::NotBuiltin)
        || !kernel::is_builtin(&kernel) && is(On::Builtin)
        || kernel::is_series(&kernel) && is(On::Mainline)
        || !kernel::is_series(&kernel) && is(On::Series)
        || !kernel.starts_with("debug") && is(On::Debug)
        || plain && is(On::Checkers)
        || kernel.starts_with("kcsan") && is(On::NotKcsan)
        || (!plain || kernel == "arm64-64k") && is(On::PlainKernel)
}
