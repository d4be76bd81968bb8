// SPDX-License-Identifier: MIT OR Apache-2.0

//! Takes the Rust program out of the README.

use std::{env, error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let readme = "../../README.md";
    println!("cargo::rerun-if-changed={readme}");
    let text = fs::read_to_string(readme)?;
    let (_, rest) = text.split_once("\n```rust\n").ok_or("no Rust program")?;
    let (program, rest) = rest.split_once("\n```\n").ok_or("no end")?;
    if rest.contains("\n```rust\n") {
        return Err("more than one Rust program: only the first one would be tested".into());
    }
    let out = env::var("OUT_DIR")?;
    fs::write(Path::new(&out).join("readme.rs"), program)?;
    Ok(())
}
