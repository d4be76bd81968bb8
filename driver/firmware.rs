// SPDX-License-Identifier: GPL-2.0

//! What the firmware says: the two guest physical addresses.
//!
//! `ADDR` and `CTRA` each evaluate to a package of two integers, the low and the high 32 bits of
//! an address. Source: Microsoft's "Virtual Machine Generation ID" specification for `ADDR`;
//! QEMU's `docs/specs/vmgenid.rst`, with this project's series applied, for `CTRA`.

use super::kernel::acpi;
use kernel::prelude::*;

/// Evaluates the object `name` to a physical address. `None`: there is no such object.
///
/// # Errors
///
/// What is wrong with it, in words that complete "ADDR ...".
pub(crate) fn address(device: &acpi::Device, name: &CStr) -> Result<Option<u64>, &'static str> {
    match device.evaluate(name) {
        Ok(object) => parse(&object).map(Some),
        Err(err) if err == ENOENT => Ok(None),
        Err(err) if err == ENODATA => Err("returns nothing"),
        Err(_) => Err("cannot be evaluated"),
    }
}

fn parse(object: &acpi::Object) -> Result<u64, &'static str> {
    let [low, high] = object.package().ok_or("is not a package")? else {
        return Err("is not a package of two elements");
    };
    let half = |element: &acpi::Object| {
        let value = element
            .integer()
            .ok_or("has an element that is not an integer")?;
        u32::try_from(value).map_err(|_| "has a half that is wider than 32 bits")
    };

    match u64::from(half(high)?) << 32 | u64::from(half(low)?) {
        0 => Err("is zero"),
        address => Ok(address),
    }
}
