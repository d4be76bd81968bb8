// SPDX-License-Identifier: MIT OR Apache-2.0

//! A program that uses unchanged AWS-LC, and rustls with it. AWS-LC has been used when the machine
//! is saved. The program then waits for AWS-LC's own generation to change, and writes down the
//! output of AWS-LC from then on.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::{
    fs::{self, File},
    hint::spin_loop,
    io::Write,
    path::PathBuf,
    sync::Arc,
    time::Instant,
};
use vmgenid::{Counter, Source};

/// AWS-LC's view of the machine. All `unsafe` of this program is here.
#[expect(unsafe_code, reason = "functions of C that the bindings leave out")]
mod ube {
    unsafe extern "C" {
        #[link_name = "aws_lc_0_47_0_CRYPTO_get_vm_ube_generation"]
        fn get_vm_ube_generation(generation: *mut u32) -> i32;
        #[link_name = "aws_lc_0_47_0_CRYPTO_get_vm_ube_active"]
        fn get_vm_ube_active() -> i32;
    }

    /// Whether AWS-LC has found its device.
    pub fn active() -> bool {
        // SAFETY: To be called from anywhere.
        unsafe { get_vm_ube_active() == 1 }
    }

    /// The generation that AWS-LC compares; 0 without a device.
    pub fn generation() -> u32 {
        let mut generation = 0;
        // SAFETY: The pointer is to a u32.
        let ok = unsafe { get_vm_ube_generation(&mut generation) };
        assert_eq!(ok, 1, "AWS-LC has no generation");
        generation
    }
}

/// Wait until AWS-LC sees another generation, and write down its output then
#[derive(Parser)]
struct Args {
    /// Where: a line "generation OLD NEW", then lines "draw HEX" and "hello HEX"
    #[arg(long)]
    out: PathBuf,
    /// How many times 16 bytes to draw
    #[arg(long, default_value_t = 5000)]
    draws: usize,
    /// How many TLS clients to begin
    #[arg(long, default_value_t = 3)]
    hellos: usize,
    /// Do not wait for AWS-LC, but for this file to be there
    #[arg(long)]
    until: Option<PathBuf>,
    /// Do not wait for AWS-LC, but for the hypervisor's counter to change, and then
    /// write down each draw at once, after the nanoseconds since the change was seen:
    /// AWS-LC ends a process in which its own generation changes while it is at work
    #[arg(long, conflicts_with = "until")]
    counter: bool,
}

fn draw() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    let drawn = aws_lc_rs::rand::fill(&mut bytes);
    drawn.ok().context("AWS-LC gives nothing")?;
    Ok(bytes)
}

/// The random of a ClientHello.
fn hello(config: &Arc<ClientConfig>) -> Result<[u8; 32]> {
    let mut client = ClientConnection::new(config.clone(), "example.com".try_into()?)?;
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes)?;
    // A record (type, version, length) with a handshake message (type, length, version): 22, 1.
    ensure!(
        bytes.len() > 43 && bytes[0] == 22 && bytes[5] == 1,
        "not a ClientHello: {bytes:x?}"
    );
    Ok(bytes[11..43].try_into()?)
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

/// Draws as soon as the counter changes, whether AWS-LC has noticed the change or not.
fn draw_at_once(args: &Args) -> Result<()> {
    let counter = Counter::open_path(Source::Vmgenid, Source::Vmgenid.path())?;
    let mut out = File::create(&args.out).with_context(|| format!("create {:?}", args.out))?;
    ensure!(ube::active(), "AWS-LC has no device");
    let last = counter.get();
    println!("spinning");
    while counter.get() == last {
        spin_loop();
    }
    let start = Instant::now();
    for _ in 0..args.draws {
        let bytes = draw()?;
        let line = format!("{} {}\n", start.elapsed().as_nanos(), hex(&bytes));
        out.write_all(line.as_bytes())?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let config = ClientConfig::builder()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let config = Arc::new(config);
    let part = args.out.with_extension("part");
    let mut out = File::create(&part).with_context(|| format!("create {part:?}"))?;
    // After this, AWS-LC has been seeded, and has counted some calls.
    for _ in 0..10 {
        draw()?;
    }
    hello(&config)?;
    if args.counter {
        return draw_at_once(&args);
    }
    let mut draws = vec![[0; 16]; args.draws];
    let last = ube::generation();
    println!("idle, at {last}, with a device: {}", ube::active());

    match &args.until {
        Some(file) => {
            while !fs::exists(file)? {
                spin_loop();
            }
        }
        None => {
            while ube::generation() == last {
                spin_loop();
            }
        }
    }
    for bytes in &mut draws {
        *bytes = draw()?;
    }
    writeln!(out, "generation {last} {}", ube::generation())?;
    for bytes in draws {
        writeln!(out, "draw {}", hex(&bytes))?;
    }
    for _ in 0..args.hellos {
        writeln!(out, "hello {}", hex(&hello(&config)?))?;
    }
    // The file is whole once it has its name.
    fs::rename(&part, &args.out).context("rename")
}
