// SPDX-License-Identifier: MIT OR Apache-2.0

//! The machine's power button: it raises ACPI's interrupt, and has nothing to do with the device.

use crate::machine;
use anyhow::{Context, ensure};
use rustix::io::Errno;
use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::OpenOptionsExt,
};

/// `struct input_event` of `linux/input.h`: a time, then type, code and value.
const SIZE: usize = size_of::<libc::input_event>();

/// `EV_KEY`, `KEY_POWER`.
const KEY: u16 = 1;
const POWER: u16 = 116;

#[derive(clap::Args)]
pub struct Args {
    /// How often to press the button
    #[arg(long, value_name = "N")]
    presses: u32,
}

/// The kernel's input device for the button.
pub struct Button(File);

impl Button {
    pub fn open() -> anyhow::Result<Self> {
        for entry in fs::read_dir("/sys/class/input").context("no input devices")? {
            let entry = entry?;
            let name = fs::read_to_string(entry.path().join("device/name")).unwrap_or_default();
            if name.trim() == "Power Button" {
                let path = format!("/dev/input/{}", entry.file_name().to_string_lossy());
                let mut options = File::options();
                options.read(true).custom_flags(libc::O_NONBLOCK);
                let file = options.open(&path);
                return Ok(Self(file.with_context(|| format!("open {path}"))?));
            }
        }
        anyhow::bail!("there is no power button")
    }

    /// Has the host press the button, and returns when the kernel has reported the press.
    pub fn press(&mut self) -> anyhow::Result<()> {
        machine::press()?;
        machine::within_a_minute("the button", || {
            let presses = self.presses()?;
            ensure!(
                presses <= 1,
                "pressed once, {presses} presses were reported"
            );
            Ok(presses == 1)
        })
    }

    /// How often the button was pressed and released since the last call. (Before the release, the
    /// kernel takes another press for the same one.)
    fn presses(&mut self) -> anyhow::Result<u32> {
        let mut presses = 0;
        let mut bytes = [0; 64 * SIZE];
        loop {
            match self.0.read(&mut bytes) {
                Ok(len) => {
                    let up = |event: &&[u8]| {
                        let [.., t0, t1, c0, c1, v0, v1, v2, v3] = event[..] else {
                            return false;
                        };
                        u16::from_ne_bytes([t0, t1]) == KEY
                            && u16::from_ne_bytes([c0, c1]) == POWER
                            && i32::from_ne_bytes([v0, v1, v2, v3]) == 0
                    };
                    presses += bytes[..len].chunks_exact(SIZE).filter(up).count() as u32;
                }
                Err(err) if Errno::from_io_error(&err) == Some(Errno::AGAIN) => return Ok(presses),
                Err(err) => return Err(err).context("the power button"),
            }
        }
    }
}

/// Has the host press the button again and again, each time after the kernel has reported the last
/// press. So a lost press is noticed.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut button = Button::open()?;
    for n in 1..=args.presses {
        button.press().with_context(|| format!("press {n}"))?;
    }
    Ok(())
}
