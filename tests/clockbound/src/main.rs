// SPDX-License-Identifier: MIT OR Apache-2.0

//! A client of ClockBound's library for VMClock, which is unchanged. Prints the disruption marker
//! of `/dev/vmclock0` whenever it has changed, until killed.

use anyhow::anyhow;
use clock_bound_vmclock::{shm::VMCLOCK_SHM_DEFAULT_PATH, shm_reader::VMClockShmReader};
use std::{thread, time::Duration};

fn main() -> anyhow::Result<()> {
    let failed = |err| anyhow!("{VMCLOCK_SHM_DEFAULT_PATH}: {err:?}");
    let mut reader = VMClockShmReader::new(VMCLOCK_SHM_DEFAULT_PATH).map_err(failed)?;
    let mut last = None;
    loop {
        let marker = reader.snapshot().map_err(failed)?.disruption_marker;
        if last != Some(marker) {
            println!("{marker}");
            last = Some(marker);
        }
        thread::sleep(Duration::from_millis(10));
    }
}
