// SPDX-License-Identifier: MIT OR Apache-2.0

//! The host's side of the connection to the agent in the guest.

use crate::folder::Folder;
use crate::interrupt;
use crate::qemu;
use crate::terminal::Terminal;
use crate::vm::Vm;
use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::fs::FlockOperation;
use rustix::fs::MemfdFlags;
use std::fmt;
use std::fs::File;
use std::io;
use std::io::ErrorKind;
use std::io::Read;
use std::io::Seek;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;
use wire::Decoder;
use wire::Exec;
use wire::Status;
use wire::Stream;
use wire::ToGuest;
use wire::ToHost;

/// A command for the guest.
pub struct Command<'a> {
    vm: &'a Vm,
    exec: Exec,
    stdin: Option<File>,
    terminal: Option<&'a Terminal>,
}

/// What a command did.
#[derive(Clone, Debug)]
pub struct Output {
    pub status: Status,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl<'a> Command<'a> {
    pub(crate) fn new(vm: &'a Vm, argv: Vec<String>) -> Self {
        let exec = Exec {
            argv,
            ..Exec::default()
        };
        Self {
            vm,
            exec,
            stdin: None,
            terminal: None,
        }
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.exec.env.push((name.into(), value.into()));
        self
    }

    /// Where its input comes from. Without this it has none.
    pub fn stdin(mut self, file: impl Into<File>) -> Self {
        self.stdin = Some(file.into());
        self
    }

    /// These bytes are its input.
    pub fn input(self, bytes: &[u8]) -> Result<Self> {
        let mut file = File::from(rustix::fs::memfd_create("input", MemfdFlags::CLOEXEC)?);
        file.write_all(bytes)?;
        file.rewind()?;
        Ok(self.stdin(file))
    }

    /// Runs on a terminal in the guest, which behaves as this one.
    pub fn terminal(mut self, terminal: &'a Terminal) -> Self {
        self.exec.terminal = Some(terminal.size());
        self.terminal = Some(terminal);
        self
    }

    /// Runs it and collects its output.
    pub fn output(self) -> Result<Output> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let status = self.stream(|stream, bytes| {
            match stream {
                Stream::Stdout => stdout.extend_from_slice(bytes),
                Stream::Stderr => stderr.extend_from_slice(bytes),
            }
            Ok(())
        })?;
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }

    /// Runs it and passes its output on, as it comes.
    pub fn stream(self, print: impl FnMut(Stream, &[u8]) -> io::Result<()>) -> Result<Status> {
        let vm = self.vm;
        let what = self.exec.argv.join(" ");
        let run = || {
            vm.session()?
                .run(self.exec, self.stdin, self.terminal, print)
        };
        run().map_err(|e| vm.explain(e, &format!("running {what:?}")))
    }
}

/// The guest's agent does not answer.
#[derive(Debug)]
pub enum Lost {
    Down,
    Silent(Duration),
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lost::Down => {
                f.write_str("the guest went down (a panic, a reboot, a power-off or vm stop)")
            }
            Lost::Silent(time) => write!(f, "the guest has not answered for {} s", time.as_secs()),
        }
    }
}

impl std::error::Error for Lost {}

/// How long to wait before saying hello again.
const HELLO: Duration = Duration::from_secs(1);

/// How long to wait before connecting again. The guest's driver loses the report of a connection
/// that begins while the guest resumes from a suspend: `virtcons_restore()` fills the queue for such
/// reports last. The agent can then not answer on it.
const RECONNECT: Duration = Duration::from_secs(20);

/// A connection over one port, with which it is ours alone.
pub struct Session {
    stream: UnixStream,
    decoder: Decoder,
    timeout: Duration,
    /// What the agent says is wrong with the guest.
    pub trouble: Option<String>,
    _port: File,
}

impl Session {
    /// Waits for the agent to answer, which is when the guest has booted.
    pub fn open(folder: &Folder, timeout: Duration) -> Result<Self> {
        let (n, port) = free_port(folder, timeout)?;
        let connect = || -> Result<UnixStream> {
            let stream = folder.connect(&qemu::port_socket(n));
            let stream = stream.map_err(|_| Lost::Down)?;
            stream.set_write_timeout(Some(timeout))?;
            Ok(stream)
        };
        let mut session = Self {
            stream: connect()?,
            decoder: Decoder::default(),
            timeout,
            trouble: None,
            _port: port,
        };
        let start = Instant::now();
        while !session.greet()? {
            if start.elapsed() > timeout {
                bail!(Lost::Silent(timeout));
            }
            session.stream = connect()?;
        }
        Ok(session)
    }

    /// Waits for the agent to answer. Whether it did in time.
    fn greet(&mut self) -> Result<bool> {
        let mine = token();
        let start = Instant::now();
        let mut said = None;
        loop {
            // Again and again: UEFI firmware takes what comes before the guest has
            // booted for the keys of a console.
            if said.is_none_or(|said: Instant| said.elapsed() > HELLO) {
                self.stream.write_all(&[0]).map_err(|_| Lost::Down)?;
                self.send(&ToGuest::Hello { token: mine })?;
                said = Some(Instant::now());
            }
            // Anything else is the rest of an older connection.
            match self.decoder.message() {
                Some(Ok(ToHost::Welcome {
                    token,
                    version,
                    trouble,
                })) if token == mine => {
                    if version != wire::VERSION {
                        bail!(
                            "the agent in the guest is of another version ({version}, not {}): start the VM anew",
                            wire::VERSION
                        );
                    }
                    self.trouble = trouble;
                    return Ok(true);
                }
                Some(_) => {}
                None => {
                    if self.is_ready(&mut Vec::new(), HELLO)? {
                        self.receive()?;
                    } else if start.elapsed() > self.timeout.min(RECONNECT) {
                        return Ok(false);
                    }
                }
            }
        }
    }

    fn run(
        &mut self,
        exec: Exec,
        mut stdin: Option<File>,
        terminal: Option<&Terminal>,
        mut print: impl FnMut(Stream, &[u8]) -> io::Result<()>,
    ) -> Result<Status> {
        self.send(&ToGuest::Exec(exec))?;
        if stdin.is_none() {
            self.send(&ToGuest::StdinEof)?;
        }
        let mut window = wire::STDIN_WINDOW;
        let mut heard = Instant::now();
        loop {
            while let Some(message) = self.decoder.message() {
                match message.ok().context("the guest sends garbage")? {
                    ToHost::Output(stream, bytes) => print(stream, &bytes)?,
                    ToHost::StdinTaken(taken) => window += taken,
                    ToHost::Exit(status) => return Ok(status),
                    ToHost::Alive | ToHost::Welcome { .. } => {}
                }
            }

            let resized = terminal.map(|terminal| &terminal.resized);
            let open = stdin.as_ref().filter(|_| window > 0);
            let mut others = Vec::new();
            others.extend(open.map(|file| PollFd::new(file, PollFlags::IN)));
            others.extend(resized.map(|file| PollFd::new(file, PollFlags::IN)));
            let from_guest = self.wait(&mut others)?;
            let mut others = others.iter().map(|fd| !fd.revents().is_empty());
            let from_stdin = open.is_some() && others.next() == Some(true);
            let from_terminal = others.next() == Some(true);

            if from_guest {
                self.receive()?;
                heard = Instant::now();
            } else if heard.elapsed() > self.timeout {
                bail!(Lost::Silent(self.timeout));
            }
            if from_stdin {
                let mut bytes = [0; wire::CHUNK];
                let room = window.min(bytes.len());
                match stdin
                    .as_mut()
                    .map_or(Ok(0), |file| file.read(&mut bytes[..room]))
                {
                    Ok(0) => {
                        stdin = None;
                        self.send(&ToGuest::StdinEof)?;
                    }
                    Ok(n) => {
                        window -= n;
                        self.send(&ToGuest::Stdin(bytes[..n].into()))?;
                    }
                    Err(e)
                        if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&e.kind()) => {}
                    Err(e) => return Err(e).context("cannot read standard input"),
                }
            }
            if let (true, Some(terminal)) = (from_terminal, terminal) {
                let _ = (&terminal.resized).read(&mut [0; 64]);
                self.send(&ToGuest::Resize(terminal.size()))?;
            }
        }
    }

    /// Waits for the guest, or for one of the others. Whether it was the guest.
    fn wait<'b>(&'b self, others: &mut Vec<PollFd<'b>>) -> Result<bool> {
        let guest = self.is_ready(others, self.timeout)?;
        if !guest && others.iter().all(|fd| fd.revents().is_empty()) {
            bail!(Lost::Silent(self.timeout));
        }
        Ok(guest)
    }

    /// Whether the guest says something in that time, or until one of the others
    /// is ready.
    fn is_ready<'b>(&'b self, others: &mut Vec<PollFd<'b>>, time: Duration) -> Result<bool> {
        others.push(PollFd::new(&self.stream, PollFlags::IN));
        interrupt::wait(others, time)?;
        Ok(others.pop().is_some_and(|fd| !fd.revents().is_empty()))
    }

    fn receive(&mut self) -> Result<()> {
        let mut bytes = [0; 4 * wire::CHUNK];
        match self.stream.read(&mut bytes) {
            Ok(0) => bail!(Lost::Down),
            Ok(n) => self.decoder.push(&bytes[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => bail!(Lost::Down),
            Err(e) => return Err(e).context("the connection to the guest is lost"),
        }
        Ok(())
    }

    fn send(&mut self, message: &ToGuest) -> Result<()> {
        match self.stream.write_all(&wire::encode(message)) {
            Err(e) if e.kind() == ErrorKind::WouldBlock => bail!(Lost::Silent(self.timeout)),
            Err(_) => bail!(Lost::Down),
            Ok(()) => Ok(()),
        }
    }
}

/// The number of an unused port, and its lock.
fn free_port(folder: &Folder, timeout: Duration) -> Result<(usize, File)> {
    let start = Instant::now();
    let mut told = false;
    loop {
        for n in 0..wire::PORTS {
            let lock = File::create(folder.file(&format!("exec{n}.lock")))?;
            if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                return Ok((n, lock));
            }
        }
        if start.elapsed() > timeout {
            bail!(
                "all {} connections to {} are still in use",
                wire::PORTS,
                folder.name
            );
        }
        if !told {
            eprintln!(
                "all {} connections to {} are in use: waiting",
                wire::PORTS,
                folder.name
            );
            told = true;
        }
        interrupt::sleep(Duration::from_millis(50))?;
    }
}

/// A unique number.
pub fn token() -> u64 {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .expect("the kernel has random numbers");
    u64::from_ne_bytes(bytes)
}
