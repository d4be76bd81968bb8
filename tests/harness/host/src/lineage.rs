// SPDX-License-Identifier: MIT OR Apache-2.0

use anyhow::Result;
use anyhow::bail;
use serde::Deserialize;
use serde::Serialize;
use std::collections::BTreeSet;

/// Every value that the counter of a VM, or of a snapshot, has had since the
/// first boot. A process in the guest may have cached any of them, so a clone
/// needs a value that is not among them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lineage(BTreeSet<u32>);

impl Lineage {
    pub fn new(counter: Option<u32>) -> Self {
        Self(counter.into_iter().collect())
    }

    /// This lineage, gone on with a new value.
    pub fn with(&self, counter: u32) -> Result<Self> {
        let mut values = self.0.clone();
        if !values.insert(counter) {
            bail!(
                "the counter has been {counter} before: take a value that it has not had, for example --genctr {}",
                self.next()
            );
        }
        Ok(Self(values))
    }

    /// The value after the highest, or the lowest that is free.
    pub fn next(&self) -> u32 {
        let highest = self.0.last().copied();
        highest
            .map_or(Some(1), |highest| highest.checked_add(1))
            .unwrap_or_else(|| {
                (0..=u32::MAX)
                    .find(|value| !self.0.contains(value))
                    .unwrap_or_default()
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_of_the_past_is_refused_and_the_next_is_proposed() {
        let lineage = Lineage::new(Some(42)).with(50).unwrap();
        assert!(lineage.with(43).is_ok());
        for past in [42, 50] {
            let error = lineage.with(past).unwrap_err().to_string();
            assert!(
                error.contains(&past.to_string()) && error.contains("--genctr 51"),
                "{error}"
            );
        }
    }

    #[test]
    fn there_is_a_next_value_after_the_last() {
        let lineage = Lineage::new(Some(u32::MAX)).with(0).unwrap();
        assert_eq!(lineage.next(), 1);
        assert_eq!(Lineage::default().next(), 1);
    }
}
