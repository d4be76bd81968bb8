// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where a test runs. Each test says so beside its name, in its table; the rest is shown as ignored.
//! A test without a word of this runs with each kernel of `kernels/`, loaded without parameters,
//! with the counter of `CTRA`, on a PC.

use crate::context;
use anyhow::{Result, bail};
use harness::{Machine, Source, kernel};
use std::str::FromStr;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum On {
    /// Also with VMGENID_PARAMETERS, VMGENID_SOURCE and VMGENID_MACHINE: what the driver promises
    /// whatever it is loaded with, and wherever the counter is.
    AnySetup,
    /// Only with the kernel `tiny`: tests that do not depend on the kernel, of QEMU and the tool
    /// for example, and what counts a guest's instructions.
    Tiny,
    /// Only with a kernel that has its own driver built in.
    Builtin,
    /// Not with such a kernel. `vmgenctr` keeps the promises of `vmgenid`, so each has a reason.
    NotBuiltin,
    /// Only with the kernel `series`, which looks at the ID itself: patches/linux.
    Series,
    /// Not with that kernel.
    Mainline,
    /// Only with a kernel in which things can be made to fail.
    Debug,
    /// Only with a kernel that has checkers (KASAN, lockdep, kmemleak; KCSAN).
    Checkers,
    /// Not with a kernel that has checkers: they add calls to the code that is stepped through.
    PlainKernel,
    /// Only on a PC: what needs ACPI's interrupt (SCI).
    Pc,
    /// Only with a kernel for arm64, whose guests have a device tree.
    Arm64,
    /// Also with such a kernel.
    AlsoArm64,
    /// Only with a whole Debian guest, with its kernel.
    Debian,
    /// Not in `make test`: takes an hour, or as long as the environment says. Has no deadline.
    Soak,
}

impl FromStr for On {
    type Err = anyhow::Error;

    /// The word that a guest program prints after a promise's name.
    fn from_str(word: &str) -> Result<Self> {
        Ok(match word {
            "not-builtin" => Self::NotBuiltin,
            "pc" => Self::Pc,
            _ => bail!("no such place for a test: {word:?}"),
        })
    }
}

/// Whether a test that runs `on` these is not for the run at hand.
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
    let plain = matches!(kernel.as_str(), "tiny" | "builtin" | kernel::SERIES);
    is(On::Soak)
        || other_setup && !is(On::AnySetup) && !(is_arm64 && (is(On::Arm64) || is(On::AlsoArm64)))
        || !is_arm64 && is(On::Arm64)
        || context::machine() != Machine::Pc && is(On::Pc)
        || kernel != "tiny" && is(On::Tiny)
        || kernel::is_builtin(&kernel) && is(On::NotBuiltin)
        || !kernel::is_builtin(&kernel) && is(On::Builtin)
        || kernel != kernel::SERIES && is(On::Series)
        || kernel == kernel::SERIES && is(On::Mainline)
        || !kernel.starts_with("debug") && is(On::Debug)
        || plain && is(On::Checkers)
        || !plain && is(On::PlainKernel)
}
