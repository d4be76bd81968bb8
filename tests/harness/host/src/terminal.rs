// SPDX-License-Identifier: MIT OR Apache-2.0

use rustix::termios::OptionalActions;
use rustix::termios::Termios;
use std::io;
use std::io::IsTerminal;
use std::io::Stdin;
use std::os::unix::net::UnixStream;
use wire::Size;

/// The user's terminal, handed to the guest: every key goes there. It is itself
/// again when this is dropped.
pub struct Terminal {
    stdin: Stdin,
    before: Termios,
    /// Readable once the size has changed.
    pub(crate) resized: UnixStream,
}

impl Terminal {
    /// Standard input, if it is a terminal.
    pub fn take() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let (resized, writer) = UnixStream::pair()?;
        resized.set_nonblocking(true)?;
        signal_hook::low_level::pipe::register(signal_hook::consts::SIGWINCH, writer)?;
        let before = rustix::termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(&stdin, OptionalActions::Drain, &raw)?;
        Ok(Some(Self {
            stdin,
            before,
            resized,
        }))
    }

    pub fn size(&self) -> Size {
        let size = rustix::termios::tcgetwinsize(&self.stdin);
        let (rows, columns) = size.map_or((0, 0), |size| (size.ws_row, size.ws_col));
        Size { rows, columns }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode.
        let _ = rustix::termios::tcsetattr(&self.stdin, OptionalActions::Drain, &self.before);
    }
}
