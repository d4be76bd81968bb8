// SPDX-License-Identifier: MIT OR Apache-2.0

//! Prints the public interface of a crate, from what rustdoc says of it in JSON.

use anyhow::{Context as _, Result};
use std::env;

fn main() -> Result<()> {
    let json = env::args_os().nth(1).context("usage: api JSON")?;
    let api = public_api::Builder::from_rustdoc_json(json)
        .omit_blanket_impls(true)
        .build()?;
    print!("# SPDX-License-Identifier: MIT OR Apache-2.0\n{api}");
    Ok(())
}
