// SPDX-License-Identifier: MIT OR Apache-2.0

//! The guest's first process: makes an initramfs a place to work in, starts the agent, and from
//! then on only collects orphans. The agent is a process of its own: it can wait for its children,
//! and does not collect the orphans.

use crate::agent;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use rustix::mount::MountFlags;
use rustix::process::Resource;
use rustix::process::Rlimit;
use rustix::process::WaitOptions;
use std::fs;
use std::process::Command;
use std::process::Stdio;

/// Sets up the guest and starts the agent (process 1)
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    agent: agent::Args,
    /// What the firmware adds to the kernel's command line (OVMF: initrd=initrd)
    #[arg(hide = true)]
    _firmware: Vec<String>,
}

const MOUNTS: [(&str, &str); 7] = [
    ("devtmpfs", "/dev"),
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
];

/// Root, and `nobody` for tests that have to pass without root.
const ACCOUNTS: [(&str, &str); 2] = [
    (
        "/etc/passwd",
        "root::0:0:root:/root:/bin/sh\nnobody::65534:65534:nobody:/tmp:/bin/sh\n",
    ),
    ("/etc/group", "root::0:\nnogroup::65534:\n"),
];

pub fn run(args: Args) -> Result<()> {
    for (kind, folder) in MOUNTS {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {folder}"))?;
        rustix::mount::mount(kind, folder, kind, MountFlags::empty(), None)
            .with_context(|| format!("cannot mount {folder}"))?;
    }
    for (file, line) in ACCOUNTS {
        fs::write(file, line).with_context(|| format!("cannot write {file}"))?;
    }
    rustix::system::sethostname(b"guest").context("cannot set the host name")?;
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    rustix::process::setrlimit(Resource::Core, unlimited).context("cannot allow core dumps")?;

    let installed = Command::new("/bin/busybox")
        .args(["--install", "-s"])
        .output();
    installed.context("cannot run /bin/busybox")?;

    let agent = Command::new(std::env::current_exe()?)
        .arg("agent")
        .args(args.agent.to_args())
        .env_clear()
        .envs([("HOME", "/root"), ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")])
        .current_dir("/root")
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start the agent")?;

    loop {
        let ended = rustix::process::wait(WaitOptions::empty()).context("cannot wait")?;
        if let Some((pid, status)) = ended {
            if pid.as_raw_pid() as u32 == agent.id() {
                // The kernel panics when its first process ends. The host sees the panic.
                bail!("the agent ended: {status:?}");
            }
        }
    }
}
