// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::folder;
use crate::folder::Folder;
use crate::host::Host;
use crate::initramfs;
use crate::kernel;
use crate::name::Name;
use crate::options::Accelerator;
use crate::options::Firmware;
use crate::options::Machine;
use crate::options::Options;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::process::Flock;
use rustix::process::FlockType;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::Signal;
use std::collections::BTreeSet;
use std::fs;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

/// What QEMU begins with.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    Boot,
    Snapshot(&'a Name),
    /// The VM in this file of its folder. It continues with the same ID, if it has one.
    Stream(&'a str, Option<&'a str>),
}

/// The socket of the guest's port `n`.
pub fn port_socket(n: usize) -> String {
    format!("exec{n}.sock")
}

/// Starts QEMU in the VM's folder, where everything has a short name. No signal
/// from a terminal reaches it there.
pub fn spawn(host: &Host, options: &Options, folder: &Folder, start: Start<'_>) -> Result<Child> {
    let qemu = folder_of(host, options)?;
    let log = File::create(folder.file(folder::QEMU_LOG)).context("cannot write QEMU's log")?;
    let program = match options.machine() {
        Machine::Virt => "bin/qemu-system-aarch64",
        _ => "bin/qemu-system-x86_64",
    };
    let mut command = Command::new(qemu.join(program));
    command.arg("-L").arg(qemu.join("share"));
    // SeaBIOS is what QEMU finds there. On virt it finds none, and starts the kernel itself.
    if options.firmware == Firmware::Ovmf {
        command.arg("-bios").arg(host.ovmf(&options.kernel())?);
    }
    command
        .args(arguments(options, &folder.name, start))
        .current_dir(folder.path())
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot run {}", qemu.display()))
}

/// The folder of the QEMU that the options name.
pub fn folder_of(host: &Host, options: &Options) -> Result<PathBuf> {
    match options.machine() {
        Machine::Virt => host.qemu_arm64(),
        _ => host.qemu_folder(options.qemu),
    }
}

fn arguments(options: &Options, name: &str, start: Start<'_>) -> Vec<String> {
    let mut args = Vec::new();
    let mut add = |option: &str, value: String| args.extend([option.into(), value]);

    add("-name", name.into());
    add(
        "-machine",
        match options.machine() {
            Machine::Pc => "pc",
            Machine::Q35 => "q35",
            Machine::Microvm => "microvm,acpi=on,pcie=on,rtc=on",
            Machine::Virt => "virt,gic-version=3",
        }
        .into(),
    );
    add(
        "-accel",
        if options.accel == Accelerator::Kvm {
            "kvm"
        } else {
            "tcg"
        }
        .into(),
    );
    // Neither has an instruction that returns random numbers.
    let cpu = match options.machine() {
        Machine::Virt => "cortex-a72",
        _ => "qemu64",
    };
    add("-cpu", options.cpu.clone().unwrap_or(cpu.into()));
    add("-smp", options.smp().to_string());
    add("-m", options.memory().to_string());
    add("-display", "none".into());
    if options.icount {
        add("-icount", "shift=0,sleep=off".into());
    }

    add("-kernel", folder::KERNEL.into());
    add("-initrd", folder::INITRAMFS.into());
    add("-append", kernel_parameters(options));
    add(
        "-chardev",
        format!("file,id=console,path={},append=on", folder::CONSOLE),
    );
    add("-serial", "chardev:console".into());
    add("-qmp", format!("unix:{},server=on,wait=off", folder::QMP));
    add("-pidfile", folder::PID.into());

    // savevm needs a disk that keeps snapshots.
    let disk = format!(
        "qcow2,node-name=disk,file.driver=file,file.filename={}",
        folder::DISK
    );
    add("-blockdev", format!("driver={disk}"));
    add("-device", "virtio-blk-pci,drive=disk".into());
    // One more port than we use: the first is for a console.
    add(
        "-device",
        format!("virtio-serial-pci,max_ports={}", wire::PORTS + 1),
    );
    for n in 0..wire::PORTS {
        let socket = port_socket(n);
        add(
            "-chardev",
            format!("socket,id=exec{n},path={socket},server=on,wait=off"),
        );
        add(
            "-device",
            format!("virtserialport,chardev=exec{n},name={}", wire::port_name(n)),
        );
    }
    let guid = match start {
        Start::Stream(_, Some(guid)) => guid,
        _ => options.guid.as_deref().unwrap_or("auto"),
    };
    for device in options.devices(guid) {
        add("-device", device);
    }
    match start {
        Start::Boot => {}
        Start::Snapshot(snapshot) => add("-loadvm", snapshot.to_string()),
        Start::Stream(file, _) => add("-incoming", format!("file:{file}")),
    }
    if options.paused {
        args.push("-S".into());
    }
    // A guest that panics or reboots ends. Its connections then end.
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(String::from));
    args.extend(options.qemu_arg.iter().cloned());
    args
}

/// The frequency of the guest's TSC. Without -icount that is the host's.
fn tsc_khz(options: &Options) -> u128 {
    if options.icount {
        return 1_000_000;
    }
    let ticks = 1_000_000_000_000;
    let nanos = quanta::Clock::new().delta_as_nanos(0, ticks);
    u128::from(ticks) * 1_000_000 / u128::from(nanos)
}

fn kernel_parameters(options: &Options) -> String {
    // On a busy host the timer may well come late: the kernel would panic.
    // And CPU 0 would wait for another CPU, to compare their TSCs, while that one waits for CPU 0 in
    // `stop_machine()` (`kernel/time/clocksource.c`).
    let mut parameters = String::from(match options.machine() {
        Machine::Virt => "console=ttyAMA0 panic=-1",
        _ => "console=ttyS0 panic=-1 no_timer_check tsc=nowatchdog",
    });
    if options.machine == Machine::Microvm {
        // It has no clock to measure the TSC by. A hypervisor such as Firecracker tells the guest.
        parameters += &format!(" tsc_early_khz={}", tsc_khz(options));
    }
    if options.kernel().starts_with("debug") {
        // The pointers that the slab allocator keeps for reuse (sheaves, mm/slub.c) are references to
        // kmemleak, which then sees no leak. Caches that are checked have no sheaves.
        parameters += " slab_debug=F";
    }
    if options.kernel().starts_with("kcsan") {
        // It is off after the boot otherwise.
        parameters += " kcsan.early_enable=1";
    }
    for more in &options.append {
        parameters += &format!(" {more}");
    }
    if kernel::is_series(&options.kernel()) {
        // There is no early look in that driver.
        let known = |parameter: &&String| !parameter.starts_with("early_look=");
        for parameter in options.parameter.iter().filter(known) {
            parameters += &format!(" vmgenid.{parameter}");
        }
    }
    // Debian's own first process starts the agent.
    if options.kernel() == kernel::DEBIAN {
        return parameters + " root=/dev/vda rw";
    }
    parameters += &format!(" rdinit={} -- init", initramfs::GUEST);
    if !options.no_module && kernel::loads_module(&options.kernel()) {
        parameters += &format!(" --load {}", initramfs::MODULE);
    }
    parameters
}

/// What QEMU had to say, in one line; empty if nothing.
pub fn messages(folder: &Folder) -> String {
    let log = fs::read(folder.file(folder::QEMU_LOG)).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines = log.lines().filter(|line| !line.is_empty());
    let lines: Vec<_> = lines
        .map(|line| {
            line.split_once("qemu-system-")
                .and_then(|(_, rest)| rest.split_once(": "))
                .map_or(line, |(_, message)| message)
        })
        .collect();
    lines.join("; ")
}

/// A QEMU that runs in a VM's folder, also one that another process started. QEMU holds a lock on
/// its pid file for as long as it lives, so a pid that is used again by another process cannot be
/// mistaken for it.
pub struct Process {
    pub pid: Pid,
    handle: OwnedFd,
}

impl Process {
    pub fn of(folder: &Folder) -> Result<Option<Self>> {
        let file = match File::open(folder.file(folder::PID)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.context("cannot open QEMU's pid file")?,
        };
        let Some(pid) = holder(&file)? else {
            return Ok(None);
        };
        let Ok(handle) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
            return Ok(None);
        };
        // Still the same one: the handle is QEMU's.
        Ok((holder(&file)? == Some(pid)).then_some(Self { pid, handle }))
    }

    /// Whether it ended in that time. Nothing interrupts this.
    pub fn ends_within(&self, time: Duration) -> bool {
        let mut fds = [PollFd::new(&self.handle, PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: time.as_secs() as i64,
            tv_nsec: time.subsec_nanos().into(),
        };
        loop {
            match rustix::event::poll(&mut fds, Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => {}
                ready => return ready.is_ok_and(|ready| ready > 0),
            }
        }
    }

    pub fn kill(&self) -> Result<()> {
        match rustix::process::pidfd_send_signal(&self.handle, Signal::KILL) {
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            sent => sent.with_context(|| format!("cannot kill QEMU, process {}", self.pid))?,
        }
        if !self.ends_within(Duration::from_secs(10)) {
            bail!("QEMU, process {}, does not end", self.pid);
        }
        Ok(())
    }
}

fn holder(file: &File) -> Result<Option<Pid>> {
    let lock = rustix::process::fcntl_getlk(file, &Flock::from(FlockType::WriteLock))?;
    Ok(lock.and_then(|lock| lock.pid))
}

/// Makes a disk: empty, or on top of another one.
pub fn create_disk(host: &Host, options: &Options, path: &Path) -> Result<()> {
    let below = match &options.disk {
        Some(disk) => Some(disk.clone()),
        None if options.kernel() == kernel::DEBIAN => Some(host.debian("disk.qcow2")?),
        None => None,
    };
    let mut before = vec!["create", "-q", "-f", "qcow2"];
    let Some(below) = below else {
        return qemu_img(host, options, &before, path, &["1G"]).map(drop);
    };
    let below = std::path::absolute(below)?;
    let below = below.to_str().context("a path that is not UTF-8")?;
    before.extend(["-F", "qcow2", "-b", below]);
    qemu_img(host, options, &before, path, &[]).map(drop)
}

/// The names of the snapshots that a disk has, also while QEMU uses it.
pub fn disk_snapshots(host: &Host, options: &Options, path: &Path) -> Result<BTreeSet<String>> {
    let info = qemu_img(host, options, &["info", "-U", "--output=json"], path, &[])?;
    let info: serde_json::Value = serde_json::from_slice(&info)?;
    let snapshots = info["snapshots"].as_array().into_iter().flatten();
    Ok(snapshots
        .filter_map(|snapshot| Some(snapshot["name"].as_str()?.into()))
        .collect())
}

fn qemu_img(
    host: &Host,
    options: &Options,
    before: &[&str],
    path: &Path,
    after: &[&str],
) -> Result<Vec<u8>> {
    let mut command = Command::new(folder_of(host, options)?.join("bin/qemu-img"));
    let output = command
        .args(before)
        .arg(path)
        .args(after)
        .stdin(Stdio::null())
        .output();
    let output = output.context("cannot run qemu-img")?;
    if !output.status.success() {
        bail!(
            "{}",
            String::from_utf8_lossy(&output.stderr)
                .trim_end()
                .replace('\n', "; ")
        );
    }
    Ok(output.stdout)
}
