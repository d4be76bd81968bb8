// SPDX-License-Identifier: MIT OR Apache-2.0

//! A command that the agent runs for the host.

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::process::Pid;
use rustix::process::PidfdFlags;
use rustix::process::Signal;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::io::ErrorKind;
use std::io::Read;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::thread;
use wire::Exec;
use wire::Size;
use wire::Status;
use wire::Stream;

/// How long a command may take to end when it is told to.
const GRACE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 500_000_000,
};

pub struct Job {
    child: Child,
    pid: Pid,
    /// Readable once the child has ended.
    ended: OwnedFd,
    terminal: Option<File>,
    /// Gone once it is closed, by us or by the command.
    stdin: Option<File>,
    /// Input that the command has not taken yet.
    input: VecDeque<u8>,
    input_ends: bool,
    outputs: Vec<(Stream, File)>,
}

impl Job {
    pub fn spawn(exec: &Exec) -> io::Result<Self> {
        let (program, args) = exec.argv.split_first().ok_or(ErrorKind::InvalidInput)?;
        let mut command;
        let terminal = exec.terminal.map(open_terminal).transpose()?;
        if let Some((_, slave)) = &terminal {
            // A session of its own, with the terminal as its controlling one.
            command = Command::new("/bin/busybox");
            command.args(["setsid", "-c", program]).args(args);
            command
                .stdin(slave.try_clone()?)
                .stdout(slave.try_clone()?)
                .stderr(slave.try_clone()?);
        } else {
            command = Command::new(program);
            command.args(args).process_group(0);
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
        }
        let mut child = command.envs(exec.env.iter().cloned()).spawn()?;

        let pid = Pid::from_child(&child);
        let terminal = terminal.map(|(master, _)| master);
        let mut outputs = Vec::new();
        let stdin;
        if let Some(master) = &terminal {
            stdin = Some(master.try_clone()?);
            outputs.push((Stream::Stdout, master.try_clone()?));
        } else {
            stdin = child.stdin.take().map(|pipe| OwnedFd::from(pipe).into());
            let stdout = child.stdout.take().map(OwnedFd::from);
            let stderr = child.stderr.take().map(OwnedFd::from);
            outputs.extend(stdout.map(|pipe| (Stream::Stdout, pipe.into())));
            outputs.extend(stderr.map(|pipe| (Stream::Stderr, pipe.into())));
        }
        for file in outputs.iter().map(|(_, file)| file).chain(&stdin) {
            rustix::io::ioctl_fionbio(file, true)?;
        }
        let ended = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Self {
            child,
            pid,
            ended,
            terminal,
            stdin,
            input: VecDeque::new(),
            input_ends: false,
            outputs,
        })
    }

    /// The files to wait for until the job needs attention: without its outputs where there is no
    /// `room` for output.
    pub fn poll_fds(&self, room: bool) -> Vec<PollFd<'_>> {
        let mut fds = vec![PollFd::new(&self.ended, PollFlags::IN)];
        if room {
            fds.extend(
                self.outputs
                    .iter()
                    .map(|(_, file)| PollFd::new(file, PollFlags::IN)),
            );
        }
        if !self.input.is_empty() {
            fds.extend(
                self.stdin
                    .iter()
                    .map(|file| PollFd::new(file, PollFlags::OUT)),
            );
        }
        fds
    }

    pub fn resize(&self, size: Size) {
        if let Some(terminal) = &self.terminal {
            // The terminal may be closed by now.
            let _ = rustix::termios::tcsetwinsize(terminal, winsize(size));
        }
    }

    pub fn input(&mut self, bytes: &[u8]) {
        self.input.extend(bytes);
    }

    pub fn end_input(&mut self) {
        self.input_ends = true;
    }

    /// Writes as much input to the command as it takes. Returns how much that was.
    pub fn feed(&mut self) -> usize {
        let mut taken = 0;
        while let (Some(stdin), false) = (&mut self.stdin, self.input.is_empty()) {
            match stdin.write(self.input.as_slices().0) {
                Ok(n) => {
                    self.input.drain(..n);
                    taken += n;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // The command does not want more.
                Err(_) => {
                    self.stdin = None;
                    self.input.clear();
                }
            }
        }
        // A terminal stays open until its session ends.
        if self.input_ends && self.input.is_empty() && self.terminal.is_none() {
            self.stdin = None;
        }
        taken
    }

    /// One read from each output that has something. Returns how much there was.
    pub fn read(&mut self, mut output: impl FnMut(Stream, &[u8])) -> usize {
        let mut got = 0;
        self.outputs.retain_mut(|(stream, file)| {
            let mut bytes = [0; wire::CHUNK];
            match file.read(&mut bytes) {
                Ok(0) => false,
                Ok(n) => {
                    output(*stream, &bytes[..n]);
                    got += n;
                    true
                }
                Err(e) => matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
            }
        });
        got
    }

    /// How the command ended, once it has, and the rest of its output. Processes that it left in
    /// the background continue, and their later output is lost.
    pub fn finish(&mut self, mut output: impl FnMut(Stream, &[u8])) -> io::Result<Option<Status>> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(None);
        };
        // Two pipes hold so much at most: `PIPE_DEF_BUFFERS` pages each.
        let left_over = 2 * 16 * rustix::param::page_size();
        let mut rest = 0;
        while rest < left_over {
            match self.read(&mut output) {
                0 => break,
                n => rest += n,
            }
        }
        if self.terminal.is_none() {
            for (_, mut file) in self.outputs.drain(..) {
                rustix::io::ioctl_fionbio(&file, false)?;
                thread::spawn(move || io::copy(&mut file, &mut io::sink()));
            }
        }
        Ok(Some(match (status.code(), status.signal()) {
            (Some(code), _) => Status::Exited(code as u8),
            (None, signal) => Status::Killed(signal.unwrap_or(0) as u8),
        }))
    }

    /// Ends the command and its process group, as a closed terminal would, but does not wait for
    /// that without a bound.
    pub fn hang_up(mut self) {
        self.signal(Signal::HUP);
        let mut fds = [PollFd::new(&self.ended, PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, Some(&GRACE));
        if let Ok(None) = self.child.try_wait() {
            self.signal(Signal::KILL);
            let _ = self.child.wait();
        }
    }

    fn signal(&self, signal: Signal) {
        // It may have ended just now, and may not have made its group yet.
        let _ = rustix::process::kill_process_group(self.pid, signal);
        let _ = rustix::process::kill_process(self.pid, signal);
    }
}

fn open_terminal(size: Size) -> io::Result<(File, File)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::termios::tcsetwinsize(&master, winsize(size))?;
    Ok((master.into(), slave.into()))
}

fn winsize(size: Size) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
