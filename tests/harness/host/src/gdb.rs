// SPDX-License-Identifier: MIT OR Apache-2.0

//! A client of QEMU's gdbstub: it stops a guest at an instruction, and steps the guest from one
//! instruction to the next. While a [`Gdb`] exists, the guest runs only inside [`Gdb::run`] and
//! [`Gdb::step`]. Between those calls a snapshot can be taken.
//!
//! The protocol is GDB's remote serial protocol ("Remote Protocol" in GDB's manual). QEMU takes
//! the next packet for an acknowledgement of its last answer. No answer that this client asks for
//! is escaped or run-length encoded.

use crate::folder::Folder;
use crate::interrupt;
use crate::options::Machine;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;

/// The socket in the VM's folder.
pub const SOCKET: &str = "gdb.sock";

/// A virtual CPU, as QEMU's gdbstub numbers them: from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cpu(u32);

/// The registers that tell a call from a return.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Registers {
    pub at: Place,
    /// The first two arguments of a function that was just called.
    pub arguments: [u64; 2],
    /// The return address of such a function. On x86-64 it is on the stack.
    link: Option<u64>,
}

/// A place that a thread comes by: no other thread has that stack.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    pub pc: u64,
    pub sp: u64,
}

/// Where the registers are in QEMU's answer, as numbers of 64-bit words.
struct Layout {
    pc: usize,
    sp: usize,
    arguments: [usize; 2],
    link: Option<usize>,
}

/// rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8 to r15, rip, ...
const X86_64: Layout = Layout {
    pc: 16,
    sp: 7,
    arguments: [5, 4],
    link: None,
};

/// x0 to x30, sp, pc, ...
const ARM64: Layout = Layout {
    pc: 32,
    sp: 31,
    arguments: [0, 1],
    link: Some(30),
};

pub struct Gdb {
    stream: UnixStream,
    /// Received, and not taken as a packet yet.
    bytes: Vec<u8>,
    timeout: Duration,
    layout: &'static Layout,
}

impl Gdb {
    /// Connects, which stops the VM.
    pub(crate) fn connect(folder: &Folder, timeout: Duration, machine: Machine) -> Result<Self> {
        let stream = folder
            .connect(SOCKET)
            .context("cannot connect to QEMU's gdbstub")?;
        stream.set_write_timeout(Some(timeout))?;
        let mut gdb = Self {
            stream,
            bytes: Vec::new(),
            timeout,
            layout: match machine {
                Machine::Virt => &ARM64,
                _ => &X86_64,
            },
        };
        gdb.ask("qSupported")?;
        Ok(gdb)
    }

    /// Has every CPU stop before it executes the instruction at `address`.
    pub fn set_breakpoint(&mut self, address: u64) -> Result<()> {
        self.command(&format!("Z0,{address:x},1"))
    }

    pub fn clear_breakpoint(&mut self, address: u64) -> Result<()> {
        self.command(&format!("z0,{address:x},1"))
    }

    /// Lets all CPUs run until one of them stops.
    pub fn run(&mut self) -> Result<Cpu> {
        self.send("vCont;c")?;
        self.stopped()
    }

    /// Has one CPU execute one instruction. The CPU takes no interrupt, and the others stand still.
    pub fn step(&mut self, cpu: Cpu) -> Result<()> {
        self.send(&format!("vCont;s:{:x}", cpu.0))?;
        let stopped = self.stopped()?;
        ensure!(
            stopped == cpu,
            "{stopped:?} stopped, where {cpu:?} was stepped"
        );
        Ok(())
    }

    pub fn registers(&mut self, cpu: Cpu) -> Result<Registers> {
        self.select(cpu)?;
        let registers = bytes(&self.ask("g")?)?;
        let register = |n: usize| -> Result<u64> {
            let bytes = registers.get(8 * n..8 * n + 8);
            let bytes = bytes.context("QEMU's gdbstub knows fewer registers than the CPU has")?;
            Ok(u64::from_le_bytes(bytes.try_into()?))
        };
        let [first, second] = self.layout.arguments;
        Ok(Registers {
            at: Place {
                pc: register(self.layout.pc)?,
                sp: register(self.layout.sp)?,
            },
            arguments: [register(first)?, register(second)?],
            link: self.layout.link.map(register).transpose()?,
        })
    }

    /// The place where a function returns to, before it has executed its first instruction.
    pub fn end(&mut self, cpu: Cpu, registers: &Registers) -> Result<Place> {
        let sp = registers.at.sp;
        Ok(match registers.link {
            Some(pc) => Place { pc, sp },
            None => Place {
                pc: self.read_u64(cpu, sp)?,
                sp: sp + 8,
            },
        })
    }

    /// Reads memory at a virtual address, as `cpu` sees it.
    pub fn read(&mut self, cpu: Cpu, address: u64, len: usize) -> Result<Vec<u8>> {
        self.select(cpu)?;
        let answer = self.ask(&format!("m{address:x},{len:x}"))?;
        let read = bytes(&answer).with_context(|| format!("cannot read {address:#x}"))?;
        ensure!(
            read.len() == len,
            "read {} of {len} bytes at {address:#x}",
            read.len()
        );
        Ok(read)
    }

    fn read_u64(&mut self, cpu: Cpu, address: u64) -> Result<u64> {
        let read = self.read(cpu, address, 8)?;
        Ok(u64::from_le_bytes(read.as_slice().try_into()?))
    }

    fn select(&mut self, cpu: Cpu) -> Result<()> {
        self.command(&format!("Hg{:x}", cpu.0))
    }

    /// Sends a packet whose only answer is that it was done.
    fn command(&mut self, payload: &str) -> Result<()> {
        let answer = self.ask(payload)?;
        ensure!(
            answer == "OK",
            "QEMU's gdbstub answers {payload} with {answer:?}"
        );
        Ok(())
    }

    fn ask(&mut self, payload: &str) -> Result<String> {
        self.send(payload)?;
        loop {
            let answer = self.receive()?;
            // QEMU reports each stop, that by `connect` included.
            if !is_stop(&answer) {
                return Ok(answer);
            }
        }
    }

    /// Waits until a CPU has stopped.
    fn stopped(&mut self) -> Result<Cpu> {
        let answer = self.receive().context("no CPU has stopped")?;
        stopped_cpu(&answer)
            .with_context(|| format!("QEMU's gdbstub says {answer:?}, which is no stop of a CPU"))
    }

    fn send(&mut self, payload: &str) -> Result<()> {
        self.stream
            .write_all(&packet(payload))
            .context("the connection to QEMU's gdbstub is lost")
    }

    fn receive(&mut self) -> Result<String> {
        let start = Instant::now();
        loop {
            if let Some(payload) = take_packet(&mut self.bytes)? {
                return Ok(payload);
            }
            let left = self.timeout.saturating_sub(start.elapsed());
            if !interrupt::wait(&mut vec![PollFd::new(&self.stream, PollFlags::IN)], left)? {
                bail!(
                    "QEMU's gdbstub has said nothing for {} s",
                    self.timeout.as_secs()
                );
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => bail!("QEMU has ended"),
                Ok(n) => self.bytes.extend_from_slice(&bytes[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("the connection to QEMU's gdbstub is lost"),
            }
        }
    }
}

impl Drop for Gdb {
    /// Detaches: QEMU removes all breakpoints, and the VM runs. Where QEMU has ended there is
    /// nothing to do.
    fn drop(&mut self) {
        let _ = self.command("D");
    }
}

/// A packet with its checksum.
fn packet(payload: &str) -> Vec<u8> {
    format!("${payload}#{:02x}", checksum(payload.as_bytes())).into()
}

fn checksum(payload: &[u8]) -> u8 {
    payload.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Takes the first packet out of the received bytes, if it is complete.
fn take_packet(bytes: &mut Vec<u8>) -> Result<Option<String>> {
    let at = |byte| bytes.iter().position(|b| *b == byte);
    let (Some(start), Some(end)) = (at(b'$'), at(b'#')) else {
        return Ok(None);
    };
    let Some(sum) = bytes.get(end + 1..end + 3) else {
        return Ok(None);
    };
    ensure!(start < end, "QEMU's gdbstub sends garbage");
    let payload = &bytes[start + 1..end];
    let sum = u8::from_str_radix(std::str::from_utf8(sum)?, 16);
    ensure!(
        sum == Ok(checksum(payload)),
        "a packet of QEMU's gdbstub has a wrong checksum"
    );
    let payload = std::str::from_utf8(payload)?.into();
    bytes.drain(..end + 3);
    Ok(Some(payload))
}

fn is_stop(answer: &str) -> bool {
    answer.starts_with('T')
}

/// The CPU of "T05thread:01;", which reports a breakpoint or the end of a step.
fn stopped_cpu(answer: &str) -> Option<Cpu> {
    let (_, thread) = answer.strip_prefix("T05")?.split_once("thread:")?;
    let (thread, _) = thread.split_once(';')?;
    u32::from_str_radix(thread, 16).ok().map(Cpu)
}

/// Hexadecimal digits as bytes. QEMU's errors are "E" and two digits, which is an odd number.
fn bytes(hex: &str) -> Result<Vec<u8>> {
    let digits = hex.as_bytes().chunks(2);
    let byte = |pair: &[u8]| {
        let pair = std::str::from_utf8(pair)
            .ok()
            .filter(|pair| pair.len() == 2)?;
        u8::from_str_radix(pair, 16).ok()
    };
    let bytes: Option<_> = digits.map(byte).collect();
    bytes.with_context(|| format!("QEMU's gdbstub answers {hex:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_has_its_checksum() {
        assert_eq!(packet("g"), b"$g#67");
        assert_eq!(packet(""), b"$#00");
        assert_eq!(packet("vCont;c"), b"$vCont;c#a8");
    }

    #[test]
    fn packets_are_taken_one_by_one_however_they_come() {
        let sent = b"+$OK#9a+$T05thread:01;#07";
        let mut bytes = Vec::new();
        let mut taken = Vec::new();
        for byte in sent {
            bytes.push(*byte);
            taken.extend(take_packet(&mut bytes).unwrap());
        }
        assert_eq!(taken, ["OK", "T05thread:01;"]);
        assert!(bytes.is_empty());

        let mut bytes = sent.to_vec();
        assert_eq!(take_packet(&mut bytes).unwrap().unwrap(), "OK");
        assert_eq!(take_packet(&mut bytes).unwrap().unwrap(), "T05thread:01;");
        assert_eq!(take_packet(&mut bytes).unwrap(), None);
    }

    #[test]
    fn a_damaged_packet_is_an_error() {
        for bad in [&b"$OK#9b"[..], b"$OK#zz", b"#00$", b"$\xff#ff"] {
            assert!(take_packet(&mut bad.to_vec()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_a_trap_is_a_stop_of_a_cpu() {
        assert_eq!(stopped_cpu("T05thread:01;"), Some(Cpu(1)));
        assert_eq!(stopped_cpu("T05swbreak:;thread:0a;"), Some(Cpu(10)));
        for other in ["T02thread:01;", "T05", "T05thread:01", "OK", "W00", ""] {
            assert_eq!(stopped_cpu(other), None, "{other}");
        }
        assert!(is_stop("T02thread:01;"));
        assert!(!is_stop("OK"));
    }

    #[test]
    fn an_error_is_not_taken_for_bytes() {
        assert_eq!(bytes("00ff7f").unwrap(), [0, 255, 127]);
        assert!(bytes("").unwrap().is_empty());
        for bad in ["E14", "0", "zz", "OK"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
