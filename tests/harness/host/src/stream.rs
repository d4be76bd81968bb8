// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMU's migration stream, as far as it has the machine's clocks. At its end is a description of
//! all devices' fields, in JSON (docs/devel/migration/main.rst in QEMU).

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use serde::Deserialize;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

// migration/savevm.h
const SECTION_FULL: u8 = 4;
const DESCRIPTION: u8 = 6;
const SECTION_FOOTER: u8 = 0x7e;

/// The section of system/cpu-timers.c, and its members: the CPUs' cycle counter, and the time in
/// nanoseconds, both since the machine was first started.
const TIMER: &str = "timer";
const FIELDS: [&str; 2] = ["cpu_ticks_offset", "cpu_clock_offset"];

#[derive(Deserialize)]
struct Description {
    devices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    name: String,
    instance_id: u32,
    #[serde(default)]
    version: u32,
    #[serde(default)]
    fields: Vec<Field>,
}

#[derive(Deserialize)]
struct Field {
    name: String,
    size: usize,
}

/// Moves the clocks of the machine in this file.
pub fn age(path: &Path, time: Duration) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut stream = vec![0; usize::try_from(file.metadata()?.len())?];
    file.read_exact_at(&mut stream, 0)?;
    for (place, value) in moved(&stream, time)? {
        file.write_all_at(&value.to_be_bytes(), place as u64)?;
    }
    Ok(())
}

/// The place of the clocks in the stream, and their values after this time.
fn moved(stream: &[u8], time: Duration) -> Result<[(usize, i64); 2]> {
    let places = places(stream).context("QEMU's migration stream")?;
    let [ticks, clock] = places.map(|place| {
        let bytes = stream[place..].first_chunk().copied();
        i64::from_be_bytes(bytes.unwrap_or_default())
    });
    ensure!(
        ticks > 0 && clock > 0,
        "the machine has not run yet: {ticks} ticks in {clock} ns"
    );
    // As many ticks a nanosecond as before.
    let time = i64::try_from(time.as_nanos())?;
    let more = i128::from(ticks) * i128::from(time) / i128::from(clock);
    let later = [ticks.checked_add(more.try_into()?), clock.checked_add(time)];
    let [Some(ticks), Some(clock)] = later else {
        anyhow::bail!("no machine is as old as {time} ns more");
    };
    Ok([(places[0], ticks), (places[1], clock)])
}

/// Where the fields are.
fn places(stream: &[u8]) -> Result<[usize; 2]> {
    let description = description(stream)?;
    let timer = description.devices.iter().find(|d| d.name == TIMER);
    let timer = timer.context("it has no timer")?;
    let (id, version) = (timer.instance_id, timer.version);
    let size: usize = timer.fields.iter().map(|field| field.size).sum();
    // A section: its kind and number, its name, the instance, the version; the fields; a footer with
    // the same number.
    let name = [&[TIMER.len() as u8], TIMER.as_bytes(), &id.to_be_bytes()].concat();
    let whole = |place: usize| {
        let number = stream.get(place.checked_sub(4)?..place)?;
        let fields = place + name.len() + 4;
        let start = [&[SECTION_FULL], number, &name, &version.to_be_bytes()].concat();
        let end = [&[SECTION_FOOTER], number].concat();
        let whole = stream.get(place.checked_sub(5)?..)?.starts_with(&start)
            && stream.get(fields + size..)?.starts_with(&end);
        whole.then_some(fields)
    };
    // The last one: the guest's memory comes before, and may have anything in it.
    let mut places = (0..stream.len().saturating_sub(name.len())).rev();
    let place = places.find(|&place| stream[place..].starts_with(&name));
    let fields = place.and_then(whole).with_context(|| {
        format!("it has no section {TIMER} of version {version} with {size} bytes")
    })?;
    let place = |name: &str| {
        let before = timer.fields.iter().take_while(|field| field.name != name);
        let field = timer.fields.iter().find(|field| field.name == name);
        ensure!(
            field.is_some_and(|field| field.size == size_of::<i64>()),
            "its {TIMER} has no {name} of 8 bytes"
        );
        Ok(fields + before.map(|field| field.size).sum::<usize>())
    };
    let [ticks, clock] = FIELDS.map(place);
    Ok([ticks?, clock?])
}

fn description(stream: &[u8]) -> Result<Description> {
    let starts = |place: &usize| {
        let length = (stream.len() - place - 5) as u32;
        stream[*place] == DESCRIPTION && stream[place + 1..place + 5] == length.to_be_bytes()
    };
    let place = (0..stream.len().saturating_sub(5)).rev().find(starts);
    let place = place.context("it ends without a description")?;
    Ok(serde_json::from_slice(&stream[place + 5..])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(number: u32, name: &str, version: u32, fields: &[u8]) -> Vec<u8> {
        let mut section = vec![SECTION_FULL];
        section.extend(number.to_be_bytes());
        section.push(name.len() as u8);
        section.extend(name.as_bytes());
        section.extend(0u32.to_be_bytes());
        section.extend(version.to_be_bytes());
        section.extend(fields);
        section.push(SECTION_FOOTER);
        section.extend(number.to_be_bytes());
        section
    }

    fn clocks(ticks: i64, clock: i64) -> Vec<u8> {
        [ticks, 0, clock].map(i64::to_be_bytes).concat()
    }

    /// Memory that looks like a clock, the clock, and another device.
    fn stream(version: u32, fields: &[u8], described: &str) -> Vec<u8> {
        let description = format!(
            r#"{{"page_size": 4096, "devices": [
                {{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, "fields": [{described}]}},
                {{"name": "old", "instance_id": 0}}]}}"#
        );
        let mut stream = section(0, "timer", 2, &clocks(1, 1));
        stream.extend(section(1, "timer", version, fields));
        stream.extend(section(2, "old", 1, &[0; 30]));
        stream.push(0);
        stream.push(DESCRIPTION);
        stream.extend((description.len() as u32).to_be_bytes());
        stream.extend(description.as_bytes());
        stream
    }

    const DESCRIBED: &str = r#"{"name": "cpu_ticks_offset", "type": "int64", "size": 8},
        {"name": "unused", "type": "unused_buffer", "size": 8},
        {"name": "cpu_clock_offset", "type": "int64", "size": 8}"#;

    fn refused(stream: &[u8]) -> String {
        format!("{:#}", moved(stream, Duration::from_secs(1)).unwrap_err())
    }

    #[test]
    fn the_clocks_go_on_at_the_same_rate() {
        let path = std::env::temp_dir().join(format!("stream-{:x}", crate::agent::token()));
        let before = stream(2, &clocks(5_000_000_000, 2_000_000_000), DESCRIBED);
        std::fs::write(&path, &before).unwrap();
        let aged = age(&path, Duration::from_secs(130));
        let after = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        aged.unwrap();
        let expected = clocks(330_000_000_000, 132_000_000_000);
        assert_eq!(after, stream(2, &expected, DESCRIBED));
    }

    #[test]
    fn what_is_no_clock_is_not_moved() {
        let clock = clocks(5, 2);
        for (stream, expected) in [
            (Vec::new(), "ends without a description"),
            (
                stream(3, &clock, DESCRIBED),
                "no section timer of version 2",
            ),
            (stream(2, &[], DESCRIBED), "no section timer"),
            (stream(2, &clocks(0, 0), DESCRIBED), "has not run yet"),
            (
                stream(2, &clock, r#"{"name": "unused", "size": 24}"#),
                "no cpu_ticks_offset",
            ),
        ] {
            let refused = refused(&stream);
            assert!(refused.contains(expected), "{refused}");
        }
    }
}
