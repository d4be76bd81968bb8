// SPDX-License-Identifier: MIT OR Apache-2.0

//! ACPI tables with one device each, from ASL to the AML that QEMU passes to the guest.

use super::rows::Row;
use crate::context::{Context, scaled};
use anyhow::{Context as _, Result, ensure};
use harness::{Add, Options, kernel};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// The address of the tables' own memory, and the size of each table's share: a page with the ID at
/// QEMU's offset, and the counter's page. On virt this is in the memory of QEMU's own device, between
/// its ID and its counter, and behind that.
pub const MEMORY: u64 = 0x0900_0000;
pub const VIRT_MEMORY: u64 = 0x0b00_2000;
pub const SHARE: u64 = 0x2000;
const ID_OFFSET: u64 = 40;

/// The interrupt table of the machine's first virtio device.
pub const BAR: u64 = 0xFEBF_E000;

/// The name of row `n`'s device in the namespace.
pub fn node(n: usize) -> String {
    format!("R{n:03}")
}

/// The counter that row `n`'s firmware writes when the guest boots.
pub fn counter(n: usize) -> u32 {
    1000 + n as u32
}

fn base(n: usize) -> u64 {
    let memory = match kernel::is_arm64(&kernel::default()) {
        true => VIRT_MEMORY,
        false => MEMORY,
    };
    memory + n as u64 * SHARE
}

/// The address of row `n`'s ID, where that is sound.
pub fn id(n: usize) -> u64 {
    base(n) + ID_OFFSET
}

/// The table of row `n`. In a row's ASL, `<id>` and `<page>` are the addresses of its own memory,
/// which the device fills in before the system evaluates the objects. `<rounds>` is 10,000 in the
/// tiny kernel, and 400 in slow ones: each evaluation of an object executes all of them.
fn asl(n: usize, row: &Row) -> String {
    let text = format!(
        r#"DefinitionBlock ("", "SSDT", 2, "VMGENT", "{node}", 1)
{{
    {outside}
    Scope (\_SB)
    {{
        Device ({node})
        {{
            {names}
            Name (_UID, {n})
            OperationRegion (MEM, SystemMemory, {memory:#x}, {SHARE:#x})
            Field (MEM, DWordAcc, NoLock, Preserve)
            {{
                Offset ({ID_OFFSET}), ID0, 32, ID1, 32, ID2, 32, ID3, 32,
                Offset (0x1000), CNT, 32
            }}
            Method (_INI)
            {{
                ID0 = {n} + 1
                ID3 = 0x01234567
                CNT = {counter}
            }}
            {inside}
        }}
    }}
}}
"#,
        node = node(n),
        outside = row.outside,
        names = row.names,
        memory = base(n),
        counter = counter(n),
        inside = row.asl,
    );
    fill_in(&text, n)
}

/// Replaces the names of addresses in the text, which may have an offset: `<page+8>`.
fn fill_in(text: &str, n: usize) -> String {
    let mut pieces = text.split('<');
    let mut filled = String::from(pieces.next().unwrap_or_default());
    for piece in pieces {
        // A "<" may also be ASL's "less than".
        match piece
            .split_once('>')
            .and_then(|(token, rest)| Some((value(token, n)?, rest)))
        {
            Some((value, rest)) => filled.extend([&value, rest]),
            None => filled.extend(["<", piece]),
        }
    }
    filled
}

fn value(token: &str, n: usize) -> Option<String> {
    let at = token.find(['+', '-']).unwrap_or(token.len());
    let (name, offset) = token.split_at(at);
    let address = match name {
        "self" => return Some(node(n)),
        "counter" => return Some(counter(n).to_string()),
        "rounds" => return Some(scaled(scaled(10_000)).to_string()),
        "sound id" => base(0) + ID_OFFSET,
        "sound page" => base(0) + 0x1000,
        "id" => id(n),
        "page" => base(n) + 0x1000,
        "base" => base(n),
        "bar" => BAR,
        _ => return None,
    };
    let offset = match offset.split_at_checked(1) {
        None => 0,
        Some((sign, digits)) => {
            let offset = digits.strip_prefix("0x").map_or_else(
                || digits.parse().ok(),
                |digits| i64::from_str_radix(digits, 16).ok(),
            )?;
            if sign == "-" { -offset } else { offset }
        }
    };
    Some(format!("{:#x}", address.wrapping_add_signed(offset)))
}

/// Compiled tables, in a folder that is removed when this is dropped.
pub struct Tables {
    folder: TempDir,
    count: usize,
}

impl Tables {
    /// Compiles a table for each row, in one run of iasl.
    pub fn compile(context: &Context, rows: &[Row]) -> Result<Self> {
        // The build root sees the checkout, and not the host's /tmp.
        let folder = tempfile::Builder::new()
            .prefix("firmware-")
            .tempdir_in(context.top.join("out"))?;
        let tables = Self {
            folder,
            count: rows.len(),
        };
        for (n, row) in rows.iter().enumerate() {
            fs::write(tables.file(n, "asl"), asl(n, row))?;
        }

        // iasl reports most of the malformations as errors. -f makes it continue.
        let output = Command::new(context.top.join("scripts/buildroot"))
            .args(["--", "iasl", "-f", "-oa", "-vs", "-vi"])
            .args((0..rows.len()).map(|n| tables.file(n, "asl")))
            .current_dir(tables.folder.path())
            .output()
            .context("cannot run iasl")?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(!said.contains("syntax error"), "iasl: {said}");
        for (n, row) in rows.iter().enumerate() {
            let aml = tables.file(n, "aml");
            ensure!(
                aml.exists(),
                "iasl makes no table of {}: {}{}",
                row.name,
                said,
                String::from_utf8_lossy(&output.stderr)
            );
            patch(&aml, row)?;
        }
        Ok(tables)
    }

    fn file(&self, n: usize, extension: &str) -> PathBuf {
        self.folder.path().join(format!("{}.{extension}", node(n)))
    }

    /// Gives these tables to the guest: as firmware, or on virt, where QEMU has no such option, in the
    /// initramfs.
    pub fn give_to(&self, options: &mut Options) {
        for n in 0..self.count {
            let host = self.file(n, "aml");
            if kernel::is_arm64(&options.kernel()) {
                let guest = format!("/kernel/firmware/acpi/{}.aml", node(n));
                options.add.push(Add { host, guest });
            } else {
                let file = format!("file={}", host.display());
                options.qemu_arg.extend(["-acpitable".into(), file]);
            }
        }
    }
}

/// Patches the AML into a table that no compiler makes. QEMU corrects the checksum.
fn patch(aml: &Path, row: &Row) -> Result<()> {
    let Some((from, to)) = row.patch else {
        return Ok(());
    };
    ensure!(from.len() == to.len(), "{}: the length differs", row.name);
    let mut bytes = fs::read(aml)?;
    let places: Vec<_> = (0..bytes.len())
        .filter(|&at| bytes[at..].starts_with(from))
        .collect();
    ensure!(places.len() == 1, "{}: patched at {places:?}", row.name);
    bytes[places[0]..][..to.len()].copy_from_slice(to);
    Ok(fs::write(aml, bytes)?)
}
