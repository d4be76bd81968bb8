// SPDX-License-Identifier: MIT OR Apache-2.0

//! Ctrl-C ends waiting, with an error, and the error's way out cleans up.

use anyhow::Result;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use signal_hook::consts::SIGHUP;
use signal_hook::consts::SIGINT;
use signal_hook::consts::SIGTERM;
use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::Duration;

static SIGNALS: OnceLock<UnixStream> = OnceLock::new();

/// A signal asked to end.
#[derive(Debug)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// From now on SIGINT, SIGTERM and SIGHUP make each [`wait`] fail.
pub fn catch() -> io::Result<()> {
    let (reader, writer) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    SIGNALS.get_or_init(|| reader);
    Ok(())
}

/// Waits for one of `fds`, which then tell what happened to them. Whether there
/// was one before the time was over.
pub fn wait(fds: &mut Vec<PollFd<'_>>, timeout: Duration) -> Result<bool> {
    let timeout = Timespec::try_from(timeout)?;
    fds.extend(
        SIGNALS
            .get()
            .map(|signals| PollFd::new(signals, PollFlags::IN)),
    );
    let ready = loop {
        match rustix::event::poll(fds, Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            ready => break ready?,
        }
    };
    if SIGNALS.get().is_some() && fds.pop().is_some_and(|fd| !fd.revents().is_empty()) {
        return Err(Interrupted.into());
    }
    Ok(ready > 0)
}

/// Lets some time go by.
pub fn sleep(time: Duration) -> Result<()> {
    wait(&mut Vec::new(), time).map(drop)
}
