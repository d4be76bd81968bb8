// SPDX-License-Identifier: MIT OR Apache-2.0

use anyhow::Error;
use anyhow::Result;
use anyhow::ensure;
use serde::Deserialize;
use serde::Serialize;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

/// The name of a VM or of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Name(String);

impl FromStr for Name {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        ensure!(
            (1..=64).contains(&name.len()) && name.chars().all(known),
            "a name has 1 to 64 letters, digits, dots, underscores and hyphens"
        );
        ensure!(
            !name.starts_with(['.', '-']),
            "a name starts with no dot and no hyphen"
        );
        ensure!(
            name.chars().any(|c| !c.is_ascii_digit()),
            "a name of nothing but digits could be mistaken for the number that QEMU gives a snapshot"
        );
        Ok(Self(name.into()))
    }
}

impl Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_their_folder() {
        for good in ["a", "web-1", "A.b_c", "0x"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            ".x",
            "-x",
            "a/b",
            "a b",
            "ä",
            "1",
            "42",
            &"x".repeat(65),
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }
}
