// SPDX-License-Identifier: MIT OR Apache-2.0

//! The machine that a test runs in: the device and its driver, the kernel's log, and the host,
//! which changes the counter on request.

use crate::sys;
use anyhow::{Context, bail, ensure};
use rustix::{
    fs::OFlags,
    io::Errno,
    mm::{MapFlags, ProtFlags},
    rand::GetRandomFlags,
};
use std::{
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write, stdin, stdout},
    os::unix::fs::OpenOptionsExt,
    process::Command,
    sync::{OnceLock, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

/// The module for this kernel.
const MODULE: &str = "/vmgenid.ko";
/// The module's parameters.
const PARAMETERS: &str = "/vmgenid.parameters";
const DEVICES: &str = "/sys/bus/platform/devices";
/// The GPE by which QEMU notifies a PC of a new ID.
const GPE: &str = "/sys/firmware/acpi/interrupts/gpe05";
/// The driver of the Generic Event Device (GED), by which QEMU notifies a microvm of a new ID, and
/// that device.
const GED: &str = "/sys/bus/platform/drivers/acpi-ged";
const GED_DEVICE: &str = "ACPI0013:00";
/// The interrupt controller of QEMU's machine virt (VIRT_GIC_DIST of hw/arm/virt.c), and its
/// registers that enable and disable 32 interrupts each: GICD_ISENABLER and GICD_ICENABLER.
const GIC: u64 = 0x0800_0000;
const ENABLE: usize = 0x100;
const DISABLE: usize = 0x180;
/// The device's own interrupt there, SPI 10 (VIRT_VMGENID).
const INTERRUPT: usize = 32 + 10;
/// The line that the kernel logs when it was reseeded because of a new ID.
const RESEEDED: &str = "crng reseeded due to virtual machine fork";

/// The module's name, from its file: `vmgenctr` where the kernel's own driver is built in.
pub fn name() -> &'static str {
    static NAME: OnceLock<&str> = OnceLock::new();
    NAME.get_or_init(|| {
        let file = fs::read(MODULE).unwrap_or_default();
        let other = b"\0name=vmgenctr\0";
        match file.windows(other.len()).any(|at| at == other) {
            true => "vmgenctr",
            false => "vmgenid",
        }
    })
}

/// The driver's folder in sysfs.
pub fn driver() -> String {
    format!("/sys/bus/platform/drivers/{}", name())
}

/// Has the host change the counter. Returns its new value, which is in memory;
/// the notification is under way.
pub fn change() -> anyhow::Result<u32> {
    let value = ask("change")?;
    value.parse().with_context(|| format!("{value:?}"))
}

/// Has the host press the machine's power button.
pub fn press() -> anyhow::Result<()> {
    ask("press").map(drop)
}

/// Has the host change the counter again and again, until the result is dropped.
pub fn storm() -> anyhow::Result<Storm> {
    ask("storm").map(|_| Storm(()))
}

pub struct Storm(());

impl Drop for Storm {
    fn drop(&mut self) {
        let _ = ask("calm");
    }
}

/// Sends one line to the host, and returns the host's answer.
fn ask(what: &str) -> anyhow::Result<String> {
    println!("{what}");
    stdout().flush()?;
    let mut line = String::new();
    stdin().read_line(&mut line)?;
    ensure!(
        line.ends_with('\n'),
        "no answer: the host has to change the counter, as the suite does"
    );
    Ok(line.trim().into())
}

/// Waits until a condition holds. The bound only ends a wait for an event that will not come: it is
/// not a measurement.
pub fn within_a_minute(what: &str, so: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    within_minutes(1, what, so)
}

pub fn within_minutes(
    minutes: u64,
    what: &str,
    mut so: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let start = Instant::now();
    while !so()? {
        ensure!(
            start.elapsed() < Duration::from_secs(60 * minutes),
            "{what}: not within {minutes} min"
        );
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Calls `act`, and checks that the kernel's generator has been reseeded when it returns.
///
/// A periodic reseed of the kernel at that moment would hide a missing one. A young kernel reseeds
/// every few seconds, an older one every minute.
pub fn reseeded_by<T>(what: &str, act: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let before = sys::reseeds()?;
    let result = act().with_context(|| what.to_string())?;
    ensure!(sys::reseeds()? != before, "{what}: no reseed by then");
    Ok(result)
}

/// For how many of these IDs `add_vmfork_randomness()` is called, where notifications were held
/// back while the driver published each. `vmgenid` calls it for each. The kernel's own driver is
/// notified later, and sees only the last ID.
pub fn told_of(ids: usize) -> usize {
    if name() == "vmgenctr" { 1 } else { ids }
}

/// Waits long enough for a notification to arrive, or for another event that must not happen. If
/// this is too short, no test fails for that reason.
pub fn a_while() {
    thread::sleep(Duration::from_millis(300));
}

/// While this exists, notifications are held back.
pub struct Masked(());

impl Masked {
    pub fn new() -> anyhow::Result<Self> {
        if fs::exists(GPE)? {
            fs::write(GPE, "mask\n").context("mask")?;
        } else if cfg!(target_arch = "aarch64") {
            enable_interrupt(false).context("disable the device's interrupt")?;
        } else {
            fs::write(format!("{GED}/unbind"), GED_DEVICE).context("unbind the GED")?;
        }
        Ok(Self(()))
    }
}

/// Enables or disables the device's own interrupt in arm64's interrupt controller (GICv3), which
/// keeps an interrupt that comes meanwhile.
pub fn enable_interrupt(enable: bool) -> anyhow::Result<()> {
    let register = if enable { ENABLE } else { DISABLE };
    let memory = sys::open_as("/dev/mem", OFlags::RDWR | OFlags::SYNC)?;
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    let registers = sys::Map::of(&memory, sys::page(), prot, flags, GIC)?;
    let word = registers.word(register / 4 + INTERRUPT / 32);
    word.store(1 << (INTERRUPT % 32), Ordering::SeqCst);
    Ok(())
}

impl Drop for Masked {
    fn drop(&mut self) {
        if fs::exists(GPE).unwrap_or(false) {
            let _ = fs::write(GPE, "unmask\n");
        } else if cfg!(target_arch = "aarch64") {
            let _ = enable_interrupt(true);
        } else {
            let _ = fs::write(format!("{GED}/bind"), GED_DEVICE);
            // Interrupts that came while the GED's driver was unbound are lost. At the next
            // interrupt, the driver handles all events that are pending.
            let _ = press();
        }
    }
}

/// The kernel's log, from the creation of this value on.
pub struct Log(File);

impl Log {
    /// Waits until the kernel's generator is initialized: before that, the kernel does not log
    /// reseeds.
    pub fn from_now_on() -> anyhow::Result<Self> {
        rustix::rand::getrandom(&mut [0], GetRandomFlags::empty()).context("getrandom")?;
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let mut log = Self(options.open("/dev/kmsg").context("open /dev/kmsg")?);
        log.skip()?;
        Ok(log)
    }

    /// Skips all lines up to now.
    pub fn skip(&mut self) -> anyhow::Result<()> {
        self.0.seek(SeekFrom::End(0)).context("/dev/kmsg")?;
        Ok(())
    }

    /// The lines since the last call. An error if the kernel has overwritten some of them.
    pub fn lines(&mut self) -> anyhow::Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(len) => {
                    // Numbers, a semicolon, the text; then what the kernel adds
                    // for programs.
                    let record = String::from_utf8_lossy(&record[..len]);
                    let line = record.lines().next().unwrap_or_default();
                    lines.extend(line.split_once(';').map(|(_, text)| text.into()));
                }
                Err(err) => match Errno::from_io_error(&err) {
                    Some(Errno::AGAIN) => return Ok(lines),
                    Some(Errno::PIPE) => bail!("lines of /dev/kmsg were overwritten, unseen"),
                    _ => return Err(err).context("read /dev/kmsg"),
                },
            }
        }
    }

    /// How many times the kernel has logged a reseed since the last call.
    pub fn reseeds(&mut self) -> anyhow::Result<usize> {
        let lines = self.lines()?;
        Ok(lines.iter().filter(|line| line.contains(RESEEDED)).count())
    }

    /// Waits until the kernel has logged a reseed, which the notification causes.
    pub fn await_reseed(&mut self) -> anyhow::Result<()> {
        within_a_minute("a reseed", || Ok(self.reseeds()? > 0))
    }

    /// Waits until the kernel has logged `expected` reseeds, and a while longer: it must not log
    /// one more. `add_vmfork_randomness()` logs them. `vmgenid` calls it from a work item after it
    /// has published an ID, the kernel's own driver when it is notified.
    pub fn expect_reseeds(&mut self, expected: usize) -> anyhow::Result<()> {
        let mut count = 0;
        within_a_minute("the reseeds in the log", || {
            count += self.reseeds()?;
            Ok(count >= expected)
        })?;
        a_while();
        count += self.reseeds()?;
        ensure!(
            count == expected,
            "{count} reseeds in the log, not {expected}"
        );
        Ok(())
    }
}

/// The device under test, bound or not.
pub struct Device(String);

/// The name that ACPI has given the companion of a platform device. `vmgenctr` makes platform
/// devices of its own, which have names of their own.
fn acpi_name(platform: &str) -> Option<String> {
    let companion = fs::read_link(format!("{DEVICES}/{platform}/firmware_node")).ok()?;
    Some(companion.file_name()?.to_str()?.into())
}

impl Device {
    /// The driver's platform device for the device to which ACPI has given this name.
    pub fn named(acpi: &str) -> Self {
        let platform = fs::read_dir(DEVICES)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|platform| platform.starts_with("vmgenctr."))
            .find(|platform| acpi_name(platform).as_deref() == Some(acpi));
        Self(platform.unwrap_or_else(|| acpi.into()))
    }

    /// The platform device of this name.
    pub fn of_platform(name: String) -> Self {
        Self(name)
    }

    /// The name that ACPI has given it.
    pub fn acpi_name(&self) -> String {
        acpi_name(&self.0).unwrap_or_else(|| self.0.clone())
    }

    /// The names of the devices that are bound to the driver: none if there is no driver.
    pub fn all_bound() -> Vec<String> {
        fs::read_dir(driver())
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.contains([':', '.']))
            .collect()
    }

    /// The device that is bound to the driver.
    pub fn bound() -> anyhow::Result<Self> {
        let name = Self::all_bound().into_iter().next();
        name.map(Self).context("no device is bound")
    }

    pub fn name(&self) -> &str {
        &self.0
    }

    pub fn is_bound(&self) -> bool {
        fs::exists(format!("{}/{}", driver(), self.0)).unwrap_or(false)
    }

    pub fn unbind(&self) -> anyhow::Result<()> {
        fs::write(format!("{}/unbind", driver()), &self.0).context("unbind")?;
        ensure!(!self.is_bound(), "it is bound after an unbind");
        Ok(())
    }

    /// Binds it. The error is the kernel's own.
    pub fn try_bind(&self) -> std::io::Result<()> {
        fs::write(format!("{}/bind", driver()), &self.0)
    }

    pub fn bind(&self) -> anyhow::Result<()> {
        self.try_bind().context("bind")?;
        ensure!(self.is_bound(), "it is not bound after a bind");
        Ok(())
    }

    /// Says which driver may bind it; an empty name means any.
    pub fn set_override(&self, driver: &str) -> anyhow::Result<()> {
        let path = format!("{DEVICES}/{}/driver_override", self.0);
        fs::write(path, format!("{driver}\n")).context("driver_override")
    }
}

/// Unloads the module, without waiting for its users.
pub fn unload() -> rustix::io::Result<()> {
    let name = CString::new(name()).unwrap_or_default();
    rustix::system::delete_module(&name, libc::O_NONBLOCK)
}

/// Loads the module.
pub fn load() -> anyhow::Result<()> {
    let file = File::open(MODULE).with_context(|| format!("open {MODULE}"))?;
    let parameters = CString::new(fs::read(PARAMETERS).unwrap_or_default())?;
    rustix::system::finit_module(file, &parameters, 0).context("insmod")
}

/// Makes another node for the same device. It stays when the device goes.
pub fn private_node(path: &str, number: u64) -> anyhow::Result<()> {
    let [major, minor] =
        [rustix::fs::major(number), rustix::fs::minor(number)].map(|n| n.to_string());
    let _ = fs::remove_file(path);
    let status = Command::new("mknod")
        .args([path, "c", &major, &minor])
        .status();
    match status.context("mknod")? {
        status if status.success() => Ok(()),
        status => bail!("mknod: {status}"),
    }
}
