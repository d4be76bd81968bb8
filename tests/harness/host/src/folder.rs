// SPDX-License-Identifier: MIT OR Apache-2.0

//! A VM's folder: everything that there is of a VM, running or not.
//!
//! A folder is made under a hidden name, and renamed once it is complete. Before it is removed, it
//! is renamed to a hidden name. So a folder with a VM's name is whole, whatever was interrupted. A
//! hidden folder without a lock is waste.

use crate::interrupt;
use crate::lineage::Lineage;
use crate::name::Name;
use crate::options::Options;
use crate::qemu::Process;
use anyhow::Context;
use anyhow::Error;
use anyhow::Result;
use anyhow::anyhow;
use anyhow::bail;
use rustix::fs::FlockOperation;
use rustix::fs::RenameFlags;
use rustix::io::Errno;
use serde::Deserialize;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

pub const CONSOLE: &str = "console.log";
pub const DISK: &str = "disk.qcow2";
pub const INITRAMFS: &str = "initramfs";
pub const KERNEL: &str = "kernel";
pub const PID: &str = "pid";
pub const QEMU_LOG: &str = "qemu.log";
pub const QMP: &str = "qmp.sock";
/// Of a VM that becomes older.
pub const STREAM: &str = "stream";
pub const STATE: &str = "vm.json";

/// The stored state of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// As the VM was last started, but with its counter as it is now.
    pub options: Options,
    /// It belongs to the process that started it.
    pub ephemeral: bool,
    pub lineage: Lineage,
    /// Written before a snapshot is taken: only what the disk has, too, is one.
    pub snapshots: BTreeMap<String, Lineage>,
    /// The VM is paused, only for as long as its disk is copied.
    pub copying: bool,
}

pub struct Folder {
    pub name: Name,
    path: PathBuf,
    handle: File,
}

/// A process that changes a VM holds this lock. A locked folder has an owner.
pub struct Lock {
    _handle: File,
}

impl Folder {
    pub fn open(vms: &Path, name: &Name) -> Result<Self> {
        let path = vms.join(&**name);
        match File::open(&path) {
            Ok(handle) => Ok(Self {
                name: name.clone(),
                path,
                handle,
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                bail!("there is no VM {name}: see vm list")
            }
            Err(e) => Err(e).with_context(|| format!("cannot open {}", path.display())),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// MiB that are free on its disk.
    pub fn space(&self) -> Result<u64> {
        let disk = rustix::fs::fstatvfs(&self.handle)?;
        Ok(disk.f_bavail * disk.f_frsize / (1 << 20))
    }

    /// Connects to a socket, however long the folder's path is.
    pub fn connect(&self, socket: &str) -> io::Result<UnixStream> {
        let folder = self.handle.as_raw_fd();
        UnixStream::connect(format!("/proc/self/fd/{folder}/{socket}"))
    }

    pub fn state(&self) -> Result<State> {
        let path = self.file(STATE);
        let read = || -> Result<State> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
        read().with_context(|| {
            format!(
                "cannot read {}: remove the VM with vm delete {}",
                path.display(),
                self.name
            )
        })
    }

    /// In one step, whatever happens.
    pub fn write_state(&self, state: &State) -> Result<()> {
        write_state(&self.path, state)
    }

    /// Waits for other commands that change this VM to end.
    pub fn lock(&self, timeout: Duration) -> Result<Lock> {
        let start = Instant::now();
        let mut told = false;
        loop {
            let lock = try_lock(&self.path);
            if let Some(lock) = lock.with_context(|| format!("cannot lock {}", self.name))? {
                return Ok(lock);
            }
            if self.state().is_ok_and(|state| state.ephemeral) {
                bail!(
                    "{0} belongs to a command that still runs: end that, and {0} ends",
                    self.name
                );
            }
            if start.elapsed() > timeout {
                bail!("another command is still busy with {}", self.name);
            }
            if !told {
                eprintln!("waiting for another command that changes {}", self.name);
                told = true;
            }
            interrupt::sleep(Duration::from_millis(100))?;
        }
    }

    /// The lock, unless another command has it.
    pub fn try_lock(&self) -> Option<Lock> {
        try_lock(&self.path).ok().flatten()
    }

    /// Removes the folder, of which nothing runs any more.
    pub fn remove(&self) -> Result<()> {
        let waste = hidden(&self.path);
        let remove = || fs::rename(&self.path, &waste).and_then(|()| fs::remove_dir_all(&waste));
        remove().with_context(|| format!("cannot remove {}", self.path.display()))
    }
}

/// A folder that is being made. It goes away unless it is published.
pub struct Draft {
    path: PathBuf,
    lock: Option<Lock>,
}

impl Draft {
    /// For a VM of that name, if it is to have a certain one.
    pub fn new(vms: &Path, name: Option<&Name>) -> Result<Self> {
        if let Some(name) = name.filter(|name| vms.join(&***name).exists()) {
            return Err(taken(name));
        }
        let make = || -> io::Result<Self> {
            fs::create_dir_all(vms)?;
            loop {
                let path = hidden(&vms.join("new"));
                match fs::create_dir(&path) {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                    made => made?,
                }
                // Another command may have taken it for waste.
                if let Some(lock) = try_lock(&path)? {
                    return Ok(Self {
                        path,
                        lock: Some(lock),
                    });
                }
            }
        };
        make().with_context(|| format!("cannot make a folder in {}", vms.display()))
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Gives the folder its name: the given one, or a free one.
    pub fn publish(mut self, state: &State, name: Option<&Name>) -> Result<(Folder, Lock)> {
        write_state(&self.path, state)?;
        let vms = self.path.parent().context("a folder has a parent")?;
        let mut count = 1;
        let name = loop {
            let candidate = match name {
                Some(name) => name.clone(),
                None if count == 1 => format!("run-{}", std::process::id()).parse()?,
                None => format!("run-{}-{count}", std::process::id()).parse()?,
            };
            let path = vms.join(&*candidate);
            let flags = RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(
                rustix::fs::CWD,
                &self.path,
                rustix::fs::CWD,
                &path,
                flags,
            ) {
                Ok(()) => break candidate,
                Err(Errno::EXIST) if name.is_none() => count += 1,
                Err(Errno::EXIST) => return Err(taken(&candidate)),
                Err(e) => return Err(e).with_context(|| format!("cannot make {}", path.display())),
            }
        };
        let folder = Folder::open(vms, &name)?;
        let lock = self.lock.take().context("a draft is locked")?;
        Ok((folder, lock))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.lock.is_some() {
            // What stays is removed as waste, later.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn taken(name: &Name) -> Error {
    anyhow!("there is a VM {name} already: take another name, or remove it with vm delete {name}")
}

/// The VMs there are. Waste goes away.
pub fn all(vms: &Path) -> Result<Vec<Folder>> {
    let mut folders = Vec::new();
    let entries = match fs::read_dir(vms) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(folders),
        entries => entries.with_context(|| format!("cannot read {}", vms.display()))?,
    };
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if name.starts_with('.') {
            if let Ok(Some(_lock)) = try_lock(&path) {
                let _ = fs::remove_dir_all(&path);
            }
            continue;
        }
        // A folder may go away at any time.
        let Some(folder) = name
            .parse()
            .ok()
            .and_then(|name| Folder::open(vms, &name).ok())
        else {
            continue;
        };
        let ephemeral = folder.state().is_ok_and(|state| state.ephemeral);
        if ephemeral && Process::of(&folder)?.is_none() {
            if let Ok(Some(_lock)) = try_lock(&path) {
                let _ = folder.remove();
                continue;
            }
        }
        folders.push(folder);
    }
    folders.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(folders)
}

/// A hidden name next to `path` that no other process takes.
fn hidden(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let token = crate::agent::token();
    path.with_file_name(format!(".{name}-{token:016x}"))
}

/// The lock, unless it is held, or the folder is another one by now.
fn try_lock(path: &Path) -> io::Result<Option<Lock>> {
    let handle = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        handle => handle?,
    };
    match rustix::fs::flock(&handle, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(None),
        locked => locked?,
    }
    let same = match fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        there => there?.ino() == handle.metadata()?.ino(),
    };
    Ok(same.then_some(Lock { _handle: handle }))
}

fn write_state(folder: &Path, state: &State) -> Result<()> {
    let path = folder.join(STATE);
    let new = folder.join(".vm.json");
    let write = || -> Result<()> {
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(state)?)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(folder)?.sync_all()?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
