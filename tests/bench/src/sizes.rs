// SPDX-License-Identifier: MIT OR Apache-2.0

//! How large a module is, from its file.

use anyhow::{Context, Result};
use object::{Object, ObjectSection, SectionFlags, elf};
use std::{fs, path::Path};

/// In bytes: the machine code that stays when it is loaded; what `size` calls text
/// (with constants and the tables of the stack unwinder) and data.
pub fn of(module: &Path) -> Result<[(&'static str, u64); 3]> {
    let file = fs::read(module).with_context(|| format!("read {}", module.display()))?;
    let file = object::File::parse(&*file)?;
    let (mut code, mut text, mut data) = (0, 0, 0);
    for section in file.sections() {
        let SectionFlags::Elf { sh_flags } = section.flags() else {
            continue;
        };
        let has = |flag: u32| sh_flags & u64::from(flag) != 0;
        if !has(elf::SHF_ALLOC) {
            continue;
        }
        let name = section.name()?;
        if has(elf::SHF_EXECINSTR) && !name.starts_with(".init") {
            code += section.size();
        }
        if has(elf::SHF_WRITE) {
            data += section.size();
        } else {
            text += section.size();
        }
    }
    Ok([
        ("module code, bytes", code),
        ("module text, bytes", text),
        ("module data, bytes", data),
    ])
}
