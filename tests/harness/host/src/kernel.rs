// SPDX-License-Identifier: MIT OR Apache-2.0

//! The guest kernels, by the names of their configurations, and what each needs.

use std::env;

/// What a guest needs to work as one with the tiny kernel does.
pub struct Needs {
    /// In MiB.
    pub memory: u32,
    pub smp: u16,
    /// How many times as long as in the tiny kernel a thing may take before it counts as hung. It
    /// is long, because a guest that reaches it has failed.
    pub slowness: u32,
}

/// The driver's name: where the kernel's own is built in, it is another one.
pub fn driver(name: &str) -> &'static str {
    match is_builtin(name) || name.split('-').any(|part| [DEBIAN, STOCK].contains(&part)) {
        true => "vmgenctr",
        false => "vmgenid",
    }
}

/// Whether mainline's driver is built in: builtin, or another configuration with that over it.
pub fn is_builtin(name: &str) -> bool {
    name.split('-').any(|part| part == "builtin")
}

/// Whether the kernel has patches/linux: series, or another configuration with that over it.
pub fn is_series(name: &str) -> bool {
    name.split('-').any(|part| part == SERIES)
}

/// Whether a guest loads the driver as a module: not where that of patches/linux is built in.
pub fn loads_module(name: &str) -> bool {
    !is_series(name) || name.split('-').any(|part| part == "module")
}

/// Whether the kernel is one for arm64: its guests have QEMU's machine `virt`, with a device tree.
pub fn is_arm64(name: &str) -> bool {
    name.split('-').next() == Some("arm64")
}

/// Linux with patches/linux.
pub const SERIES: &str = "series";

/// The default kernel: VMGENID_KERNEL, or tiny, or on a host of arm64 arm64.
pub fn default() -> String {
    let named = env::var("VMGENID_KERNEL").ok();
    named
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| if ON_ARM64 { "arm64" } else { "tiny" }.into())
}

/// The kernel of a whole Debian guest, with its disk: see scripts/debian-image.
pub const DEBIAN: &str = "debian";

/// The same kernel with the small initramfs of the other guests; arm64-stock is that for arm64: see
/// scripts/debian-kernel.
pub const STOCK: &str = "stock";

/// Whether this machine is one of arm64.
pub const ON_ARM64: bool = cfg!(target_arch = "aarch64");

/// What the kernel of that name needs.
pub fn needs(name: &str) -> Needs {
    match name.split('-').next().unwrap_or(name) {
        // KASAN's shadow takes an eighth of the memory, and freed memory stays in quarantine.
        "debug" => Needs {
            memory: 512,
            smp: 1,
            slowness: 5,
        },
        // A race takes two.
        "kcsan" => Needs {
            memory: 256,
            smp: 2,
            slowness: 5,
        },
        // Compilers run there.
        DEBIAN => Needs {
            memory: 1024,
            smp: 2,
            slowness: 2,
        },
        // QEMU emulates an arm64 CPU some two times slower. A small file takes a whole page.
        "arm64" => Needs {
            memory: if name == "arm64-64k" { 512 } else { 256 },
            smp: 1,
            slowness: 2,
        },
        _ => Needs {
            memory: 256,
            smp: 1,
            slowness: 1,
        },
    }
}
