// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::host::Host;
use crate::kernel;
use crate::options::Options;
use anyhow::Context;
use anyhow::Result;
use anyhow::anyhow;
use cpio::newc::Builder;
use cpio::newc::ModeFileType;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::io::BufWriter;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Where the guest's program is, which is its first process too.
pub const GUEST: &str = "/bin/guest";

/// Where the module is.
pub const MODULE: &str = "/vmgenid.ko";

/// Folders that busybox puts its links into, that of the accounts, and root's.
const FOLDERS: [&str; 6] = ["/bin", "/etc", "/root", "/sbin", "/usr/bin", "/usr/sbin"];

/// Where Debian's initramfs takes from what is added to its root: see
/// tests/debian/init-bottom.
const ADDED: &str = "/added";

/// Writes the whole file system of a guest as a cpio archive. It is not
/// compressed: that would only cost time, on both sides.
pub fn write(host: &Host, options: &Options, path: &Path) -> Result<()> {
    let kernel = options.kernel();
    if kernel == kernel::DEBIAN {
        return write_debian(host, options, path);
    }
    let mut archive = Archive {
        out: BufWriter::new(File::create(path)?),
        folders: BTreeSet::new(),
    };
    for folder in FOLDERS {
        archive.folder(folder)?;
    }
    archive.file("/bin/busybox", &host.busybox(&kernel)?, Some(0o755))?;
    archive.file(GUEST, &host.guest_program(&kernel, "guest")?, Some(0o755))?;
    match host.module(&kernel) {
        Ok(module) => archive.file(MODULE, &module, Some(0o644))?,
        Err(_) if options.no_module || !kernel::loads_module(&kernel) => {}
        Err(e) => return Err(anyhow!("{e}, or do without it: --no-module")),
    }
    if !options.parameter.is_empty() {
        archive.text(wire::PARAMETERS, &options.parameter.join(" "))?;
    }
    for add in &options.add {
        archive.file(&add.guest, &add.host, None)?;
    }
    cpio::newc::trailer(archive.out)?.flush()?;
    Ok(())
}

/// Debian's own, and before it what is added.
fn write_debian(host: &Host, options: &Options, path: &Path) -> Result<()> {
    let mut archive = Archive {
        out: BufWriter::new(File::create(path)?),
        folders: BTreeSet::new(),
    };
    archive.file(
        &format!("{ADDED}{GUEST}"),
        &host.guest_program(kernel::DEBIAN, "guest")?,
        Some(0o755),
    )?;
    for add in &options.add {
        archive.file(&format!("{ADDED}{}", add.guest), &add.host, None)?;
    }
    let mut out = cpio::newc::trailer(archive.out)?;
    io::copy(&mut File::open(host.debian("initrd")?)?, &mut out)?;
    out.flush()?;
    Ok(())
}

struct Archive {
    out: BufWriter<File>,
    folders: BTreeSet<String>,
}

impl Archive {
    /// A folder, and those above it, unless they are there.
    fn folder(&mut self, path: &str) -> io::Result<()> {
        if path.is_empty() || !self.folders.insert(path.into()) {
            return Ok(());
        }
        self.folder(parent(path))?;
        let entry = Builder::new(path.trim_start_matches('/'))
            .mode(0o755)
            .nlink(2);
        entry
            .set_mode_file_type(ModeFileType::Directory)
            .write(&mut self.out, 0)
            .finish()?;
        Ok(())
    }

    /// A file that holds this.
    fn text(&mut self, path: &str, text: &str) -> Result<()> {
        self.folder(parent(path))?;
        let entry = Builder::new(path.trim_start_matches('/')).mode(0o644);
        let entry = entry.set_mode_file_type(ModeFileType::Regular);
        let mut entry = entry.write(&mut self.out, text.len().try_into()?);
        entry.write_all(text.as_bytes())?;
        entry.finish()?;
        Ok(())
    }

    /// A file of the host, with its own mode or another.
    fn file(&mut self, path: &str, source: &Path, mode: Option<u32>) -> Result<()> {
        let context = || format!("cannot put {} into the guest", source.display());
        let mut copy = || -> Result<()> {
            let mut file = File::open(source)?;
            let metadata = file.metadata()?;
            let size = metadata.len().try_into().context("it is too large")?;
            let mode = mode.unwrap_or(metadata.permissions().mode() & 0o7777);
            self.folder(parent(path))?;
            let entry = Builder::new(path.trim_start_matches('/')).mode(mode);
            let entry = entry.set_mode_file_type(ModeFileType::Regular);
            let mut entry = entry.write(&mut self.out, size);
            io::copy(&mut file, &mut entry)?;
            entry.finish()?;
            Ok(())
        };
        copy().with_context(context)
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}
