// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::kernel;
use crate::options::Flavour;
use crate::vm::Vm;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use std::env;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Where things are on this machine.
#[derive(Clone)]
pub struct Host {
    cache: PathBuf,
    checkout: PathBuf,
    /// How long the guest may say nothing before it counts as hung.
    pub timeout: Duration,
    /// Called with each VM whose QEMU was just started; an error ends that QEMU.
    pub at_start: Option<AtStart>,
    /// Called with each VM that is about to end, or to be replaced by a restore:
    /// the last chance to look into it. Its guest may have gone down.
    pub at_end: Option<AtEnd>,
}

pub type AtStart = Arc<dyn Fn(&Vm) -> Result<()> + Send + Sync>;
pub type AtEnd = Arc<dyn Fn(&Vm) + Send + Sync>;

impl Host {
    /// From VMGENID_CACHE, VMGENID_TOP (both as scripts/vm sets them) and
    /// VMGENID_TIMEOUT, in seconds.
    pub fn from_env() -> Result<Self> {
        let home = |rest: &str| env::var_os("HOME").map(|home| PathBuf::from(home).join(rest));
        let cache = match env::var_os("VMGENID_CACHE") {
            Some(cache) => PathBuf::from(cache),
            None => env::var_os("XDG_CACHE_HOME")
                .map(PathBuf::from)
                .or_else(|| home(".cache"))
                .context("neither XDG_CACHE_HOME nor HOME is set")?
                .join("vmgenid"),
        };
        let checkout = env::var_os("VMGENID_TOP").map(PathBuf::from);
        let timeout = match env::var("VMGENID_TIMEOUT") {
            Ok(seconds) => seconds
                .parse()
                .ok()
                .filter(|&seconds| seconds > 0)
                .with_context(|| {
                    format!("VMGENID_TIMEOUT is {seconds:?}: it has to be a number of seconds")
                })?,
            Err(_) => 120 * u64::from(kernel::needs(&kernel::default()).slowness),
        };
        let host = Self {
            cache: std::path::absolute(cache)?,
            checkout: checkout.context("VMGENID_TOP is not set: use scripts/vm, which sets it")?,
            timeout: Duration::from_secs(timeout),
            at_start: None,
            at_end: None,
        };
        ensure!(
            host.checkout.is_absolute(),
            "VMGENID_TOP has to be an absolute path"
        );
        Ok(host)
    }

    /// The folder of the VMs' folders.
    pub(crate) fn vms(&self) -> PathBuf {
        self.cache.join("vm")
    }

    /// What the scripts have built and this checkout uses, by its name.
    pub fn link(&self, name: &str) -> PathBuf {
        self.checkout.join("out/links").join(name)
    }

    pub(crate) fn kernel(&self, name: &str) -> Result<PathBuf> {
        if name == kernel::DEBIAN {
            return self.debian("vmlinuz");
        }
        let dir = self.link(&format!("kernel-{name}"));
        let file = match kernel::is_arm64(name) {
            true => "Image",
            false => "bzImage",
        };
        built(dir.join(file), &format!("guest kernel {name}"))
    }

    /// A file of the Debian guest: vmlinuz, initrd or disk.qcow2.
    pub(crate) fn debian(&self, file: &str) -> Result<PathBuf> {
        let path = self.link("debian-image").join(file);
        ensure!(
            path.exists(),
            "there is no Debian guest at {}: make it with scripts/debian-image",
            path.display()
        );
        Ok(path.canonicalize()?)
    }

    /// The module for that kernel.
    pub(crate) fn module(&self, kernel: &str) -> Result<PathBuf> {
        let module = format!("{}.ko", crate::kernel::driver(kernel));
        let path = self.checkout.join("out").join(kernel).join(module);
        built(path, &format!("module for the guest kernel {kernel}"))
    }

    /// A program for guests with that kernel.
    pub fn guest_program(&self, kernel: &str, name: &str) -> Result<PathBuf> {
        let folder = match kernel::is_arm64(kernel) {
            true => "out/bin-arm64",
            false => "out/bin",
        };
        built(self.checkout.join(folder).join(name), "guest program")
    }

    pub(crate) fn busybox(&self, kernel: &str) -> Result<PathBuf> {
        let root = match kernel::is_arm64(kernel) && !kernel::ON_ARM64 {
            true => "arm64-tools",
            false => "buildroot",
        };
        built(self.link(root).join("root/usr/bin/busybox"), "busybox")
    }

    pub(crate) fn ovmf(&self, kernel: &str) -> Result<PathBuf> {
        let (name, arch) = match kernel::is_arm64(kernel) {
            true => ("ovmf-arm64", "VMGENID_ARCH=arm64 "),
            false => ("ovmf", ""),
        };
        let path = self.link(name).join("OVMF.fd");
        ensure!(
            path.exists(),
            "there is no OVMF at {}: fetch it with {arch}scripts/ovmf",
            path.display()
        );
        Ok(path)
    }

    /// The folder of the QEMU for arm64, likewise.
    pub(crate) fn qemu_arm64(&self) -> Result<PathBuf> {
        built(self.link("qemu-arm64"), "QEMU for arm64")
    }

    /// A QEMU's folder: its programs are in bin/, its firmware is in share/.
    pub fn qemu_folder(&self, flavour: Flavour) -> Result<PathBuf> {
        let (folder, what) = match flavour {
            Flavour::Genctr => ("qemu", "QEMU"),
            Flavour::Stock => ("qemu-stock", "stock QEMU"),
        };
        built(self.link(folder), what)
    }
}

/// The path, if it is there.
fn built(path: PathBuf, what: &str) -> Result<PathBuf> {
    if !path.exists() {
        bail!(
            "there is no {what} at {}: build it with make",
            path.display()
        );
    }
    Ok(path)
}
