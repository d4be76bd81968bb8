// SPDX-License-Identifier: MIT OR Apache-2.0

//! The messages between the VM tool on the host and the agent in the guest, over one virtio-serial
//! port.
//!
//! Each message is one postcard value in one COBS frame that ends with a zero byte. A port outlives
//! connections, jobs and snapshots, so a new connection may find half a frame of an older one in
//! it. Hence both sides send a zero byte first, which ends whatever was there, the host opens with
//! a [`Hello`] that carries a token of its own, and ignores everything until the [`Welcome`] with
//! that token. A [`Hello`] at any time ends what the port was used for before.
//!
//! [`Hello`]: ToGuest::Hello
//! [`Welcome`]: ToHost::Welcome

use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;

/// Must be raised with every change of the messages: an old snapshot has an old agent.
pub const VERSION: u32 = 1;

/// The file in the guest that says what the module is loaded with, if it is there.
pub const PARAMETERS: &str = "/vmgenid.parameters";

/// How many ports the guest has, and so how many commands at a time.
pub const PORTS: usize = 4;

/// Bytes of standard input that the host may send ahead of
/// [`ToHost::StdinTaken`], so that the agent can always read its port.
pub const STDIN_WINDOW: usize = 64 * 1024;

/// Bytes of input or output in one message, at most.
pub const CHUNK: usize = 16 * 1024;

/// The longest frame. Only the arguments of a command come near it.
const FRAME_MAX: usize = 4 * 1024 * 1024;

/// The name of port `n`, as `/sys/class/virtio-ports/*/name` shows it.
pub fn port_name(n: usize) -> String {
    format!("vmgenid.exec.{n}")
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToGuest {
    Hello { token: u64 },
    Exec(Exec),
    Stdin(Vec<u8>),
    StdinEof,
    Resize(Size),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToHost {
    Welcome {
        token: u64,
        version: u32,
        /// Why the guest is not as requested: its module did not load.
        trouble: Option<String>,
    },
    Output(Stream, Vec<u8>),
    /// The command has taken this many bytes of standard input, which leave the window.
    StdinTaken(usize),
    /// Sent every second while a job runs.
    Alive,
    Exit(Status),
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Exec {
    pub argv: Vec<String>,
    /// Added to the agent's own environment.
    pub env: Vec<(String, String)>,
    /// Run it on a terminal of this size.
    pub terminal: Option<Size>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Size {
    pub rows: u16,
    pub columns: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Status {
    Exited(u8),
    Killed(u8),
}

impl Status {
    pub fn success(self) -> bool {
        self == Status::Exited(0)
    }

    /// The exit status as a shell shows it: 128 + n after signal n.
    pub fn code(self) -> u8 {
        match self {
            Status::Exited(code) => code,
            Status::Killed(signal) => signal.saturating_add(128),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Status::Exited(code) => write!(f, "exit status {code}"),
            Status::Killed(signal) => write!(f, "killed by signal {signal}"),
        }
    }
}

/// The message as a frame.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_stdvec_cobs(message).expect("messages have no type that postcard refuses")
}

/// A frame that is not a message.
#[derive(Debug, PartialEq)]
pub struct Garbage;

/// Takes bytes in any portions, and returns messages.
#[derive(Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// How many bytes have been searched. None of them is zero.
    searched: usize,
}

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message, or `None` until there are more bytes.
    pub fn message<T: DeserializeOwned>(&mut self) -> Option<Result<T, Garbage>> {
        loop {
            let Some(rest) = self.bytes[self.searched..].iter().position(|&b| b == 0) else {
                self.searched = self.bytes.len();
                if self.searched <= FRAME_MAX {
                    return None;
                }
                *self = Self::default();
                return Some(Err(Garbage));
            };
            let mut frame: Vec<u8> = self.bytes.drain(..=self.searched + rest).collect();
            self.searched = 0;
            // An empty frame is the first zero byte of a connection.
            if frame.len() > 1 {
                return Some(postcard::from_bytes_cobs(&mut frame).map_err(|_| Garbage));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages() -> Vec<ToHost> {
        vec![
            ToHost::Welcome {
                token: u64::MAX,
                version: VERSION,
                trouble: Some("no".into()),
            },
            ToHost::Output(Stream::Stderr, (0..=255).cycle().take(CHUNK).collect()),
            ToHost::Output(Stream::Stdout, vec![0; 700]),
            ToHost::StdinTaken(STDIN_WINDOW),
            ToHost::Alive,
            ToHost::Exit(Status::Killed(9)),
        ]
    }

    fn decode(decoder: &mut Decoder) -> Vec<Result<ToHost, Garbage>> {
        std::iter::from_fn(|| decoder.message()).collect()
    }

    #[test]
    fn messages_survive_any_split() {
        let bytes: Vec<u8> = messages().iter().flat_map(encode).collect();
        for split in [1, 2, 7, 1000, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            for part in bytes.chunks(split) {
                decoder.push(part);
                got.extend(decode(&mut decoder));
            }
            assert_eq!(got, messages().into_iter().map(Ok).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_zero_byte_ends_half_a_frame() {
        let mut decoder = Decoder::default();
        let half = encode(&ToHost::Output(Stream::Stdout, vec![7; 100]));
        decoder.push(&half[..50]);
        decoder.push(&[0]);
        decoder.push(&encode(&ToHost::Alive));
        assert_eq!(decode(&mut decoder), [Err(Garbage), Ok(ToHost::Alive)]);
    }

    #[test]
    fn noise_without_an_end_is_thrown_away() {
        let mut decoder = Decoder::default();
        decoder.push(&vec![7; FRAME_MAX + 1]);
        assert_eq!(decode(&mut decoder), [Err(Garbage)]);
        assert!(decoder.bytes.is_empty());
        decoder.push(&encode(&ToHost::Alive));
        assert_eq!(decode(&mut decoder), [Ok(ToHost::Alive)]);
    }

    #[test]
    fn a_signal_is_128_and_its_number() {
        assert_eq!(Status::Killed(15).code(), 143);
        assert_eq!(Status::Exited(3).code(), 3);
        assert!(Status::Exited(0).success() && !Status::Killed(0).success());
    }
}
