// SPDX-License-Identifier: GPL-2.0

//! The two guest physical addresses, from ACPI.
//!
//! `ADDR` and `CTRA` each evaluate to a package of two integers, the low and the high 32 bits of
//! an address. Source: Microsoft's "Virtual Machine Generation ID" specification for `ADDR`;
//! QEMU's `docs/specs/vmgenid.rst`, with this project's series applied, for `CTRA`.

use crate::driver::kernel::acpi;
use kernel::prelude::*;

/// Evaluates the object `name` to a physical address. Returns `None` if there is no such object.
/// An error completes "ADDR ..." in the log.
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

#[cfg(CONFIG_VMGENID_KUNIT_TEST)]
#[kunit_tests(vmgenid_firmware)]
mod tests {
    use super::*;
    use acpi::testing::{
        buffer,
        integer,
        package,
        reference,
        string, //
    };

    /// Parses a package of these integers.
    fn of_integers(values: &[u64]) -> Result<u64, &'static str> {
        match values {
            [] => package(&mut [], parse),
            [a] => package(&mut [integer(*a)], parse),
            [a, b] => package(&mut [integer(*a), integer(*b)], parse),
            [a, b, c, ..] => package(&mut [integer(*a), integer(*b), integer(*c)], parse),
        }
    }

    #[test]
    fn two_halves_are_an_address() {
        assert_eq!(of_integers(&[0x1234_5678, 0]), Ok(0x1234_5678));
        assert_eq!(of_integers(&[0x28, 0x1]), Ok(0x1_0000_0028));
        assert_eq!(of_integers(&[0, 0x1]), Ok(0x1_0000_0000));
        assert_eq!(of_integers(&[0xffff_ffff, 0xffff_ffff]), Ok(u64::MAX));
    }

    #[test]
    fn zero_is_no_address() {
        assert_eq!(of_integers(&[0, 0]), Err("is zero"));
    }

    #[test]
    fn a_half_has_32_bits() {
        let wide = Err("has a half that is wider than 32 bits");
        assert_eq!(of_integers(&[1 << 32, 0]), wide);
        assert_eq!(of_integers(&[0, 1 << 32]), wide);
        assert_eq!(of_integers(&[u64::MAX, u64::MAX]), wide);
        assert_eq!(of_integers(&[0x28, 1 << 63]), wide);
    }

    #[test]
    fn a_package_has_two_elements() {
        let other = Err("is not a package of two elements");
        assert_eq!(of_integers(&[]), other);
        assert_eq!(of_integers(&[0x28]), other);
        assert_eq!(of_integers(&[0x28, 0, 0]), other);
    }

    #[test]
    fn elements_are_integers() {
        let other = Err("has an element that is not an integer");
        assert_eq!(package(&mut [string(), integer(0)], parse), other);
        assert_eq!(package(&mut [integer(0x28), string()], parse), other);
        assert_eq!(package(&mut [buffer(), buffer()], parse), other);
        assert_eq!(package(&mut [reference(), integer(0)], parse), other);
        // The type of the second element is checked first.
        assert_eq!(package(&mut [integer(1 << 32), string()], parse), other);
    }

    #[test]
    fn a_package_in_a_package_is_no_integer() {
        let result = package(&mut [integer(0x28), integer(0)], |inner| {
            // The first word of a package is its type, as in any object.
            inner.integer()
        });
        assert_eq!(result, None);
    }

    #[test]
    fn nothing_else_is_a_package() {
        for object in [integer(0x28), string(), buffer(), reference()] {
            assert_eq!(parse(&object), Err("is not a package"));
        }
    }
}
