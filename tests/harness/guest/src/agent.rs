// SPDX-License-Identifier: MIT OR Apache-2.0

//! Runs commands for the host: one thread for each virtio-serial port, one job
//! at a time on each.

use crate::job::Job;
use anyhow::Context;
use anyhow::Result;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::event::epoll;
use std::collections::VecDeque;
use std::ffi::CString;
use std::fs;
use std::fs::File;
use std::io;
use std::io::ErrorKind;
use std::io::Read;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use std::time::Instant;
use wire::Decoder;
use wire::Exec;
use wire::Status;
use wire::Stream;
use wire::ToGuest;
use wire::ToHost;

/// Runs commands for the host
#[derive(clap::Args)]
pub struct Args {
    /// Load this module first, and tell the host if that fails
    #[arg(long, value_name = "MODULE")]
    load: Option<String>,
}

impl Args {
    /// The arguments that these came from.
    pub fn to_args(&self) -> Vec<&str> {
        self.load
            .iter()
            .flat_map(|module| ["--load", module])
            .collect()
    }
}

const HEARTBEAT: Duration = Duration::from_secs(1);

/// How long the host has to be disconnected before that ends its job. The port reports a connect or
/// a disconnect on another virtio queue than the data. So the report of the last disconnect can
/// arrive in the middle of the next connection, which must not end.
const AWAY: Duration = Duration::from_secs(2);

/// How many bytes of output may wait for the host. Beyond that, the command has to wait.
const BACKLOG: usize = 256 * 1024;

pub fn run(args: Args) -> Result<()> {
    let trouble = args.load.and_then(|module| {
        load(&module)
            .err()
            .map(|e| format!("the module {module} did not load: {e}"))
    });
    thread::scope(|scope| {
        let ports: Vec<_> = (0..wire::PORTS)
            .map(|n| {
                let trouble = trouble.clone();
                scope.spawn(move || Port::open(&wire::port_name(n), trouble)?.serve())
            })
            .collect();
        ports
            .into_iter()
            .try_for_each(|port| port.join().expect("a port's thread panicked"))
    })
}

fn load(module: &str) -> io::Result<()> {
    let parameters = fs::read(wire::PARAMETERS).unwrap_or_default();
    let parameters = CString::new(parameters)?;
    Ok(rustix::system::finit_module(
        File::open(module)?,
        &parameters,
        0,
    )?)
}

/// The device node of a port, once the kernel has it.
fn find_port(name: &str) -> PathBuf {
    loop {
        for port in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let found = fs::read_to_string(port.path().join("name"));
            if found.is_ok_and(|found| found.trim_end() == name) {
                return PathBuf::from("/dev").join(port.file_name());
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}

struct Port {
    file: File,
    /// Readable when something happened to the port. While the host is not
    /// connected, poll() on the port itself would return at once, for ever: this
    /// epoll is edge triggered.
    edges: OwnedFd,
    trouble: Option<String>,
    decoder: Decoder,
    /// Frames on their way to the host.
    out: VecDeque<u8>,
    /// Since when the port says that the host is not connected.
    away: Option<Instant>,
    job: Option<Job>,
    heartbeat: Instant,
}

impl Port {
    fn open(name: &str, trouble: Option<String>) -> Result<Self> {
        let path = find_port(name);
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let edges = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let events = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&edges, &file, epoll::EventData::new_u64(0), events)?;
        Ok(Self {
            file,
            edges,
            trouble,
            decoder: Decoder::default(),
            out: VecDeque::new(),
            away: None,
            job: None,
            heartbeat: Instant::now(),
        })
    }

    fn serve(&mut self) -> Result<()> {
        loop {
            self.wait()?;
            self.receive().context("cannot read from the host")?;
            self.attend()?;
            self.flush().context("cannot write to the host")?;
        }
    }

    /// Waits until there is something to do, or until a timeout has passed.
    fn wait(&mut self) -> Result<()> {
        let mut fds = vec![PollFd::new(&self.edges, PollFlags::IN)];
        let mut timeout = None;
        if let Some(job) = &self.job {
            fds.extend(job.poll_fds(self.out.len() < BACKLOG));
            timeout = Some(HEARTBEAT.saturating_sub(self.heartbeat.elapsed()));
        }
        if let Some(away) = self.away {
            let left = AWAY.saturating_sub(away.elapsed());
            timeout = Some(timeout.map_or(left, |timeout| timeout.min(left)));
        }
        let timeout = timeout.map(Timespec::try_from).transpose()?;
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).context("cannot wait"),
        }
        // This consumes the edge. receive() and flush() continue until they would block.
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }];
        epoll::wait(&self.edges, &mut events, Some(&Timespec::default()))?;
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        let mut bytes = [0; wire::CHUNK];
        loop {
            match self.file.read(&mut bytes) {
                // There is no connection.
                Ok(0) => {
                    if self.job.is_none() {
                        self.away = None;
                    } else if self.away.get_or_insert_with(Instant::now).elapsed() >= AWAY {
                        self.reset();
                    }
                    return Ok(());
                }
                Ok(n) => {
                    self.decoder.push(&bytes[..n]);
                    // Bytes that are no message are the rest of an old connection.
                    while let Some(message) = self.decoder.message() {
                        if let Ok(message) = message {
                            self.handle(message);
                        }
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.away = None;
                    return Ok(());
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn handle(&mut self, message: ToGuest) {
        match (message, &mut self.job) {
            (ToGuest::Hello { token }, _) => {
                self.reset();
                self.out.push_back(0);
                let trouble = self.trouble.clone();
                self.send(&ToHost::Welcome {
                    token,
                    version: wire::VERSION,
                    trouble,
                });
            }
            (ToGuest::Exec(exec), None) => self.start(&exec),
            (ToGuest::Stdin(bytes), Some(job)) => job.input(&bytes),
            (ToGuest::StdinEof, Some(job)) => job.end_input(),
            (ToGuest::Resize(size), Some(job)) => job.resize(size),
            // The message is for a job that has ended.
            _ => {}
        }
    }

    /// Closes the connection, and ends its job.
    fn reset(&mut self) {
        self.away = None;
        self.out.clear();
        if let Some(job) = self.job.take() {
            job.hang_up();
        }
    }

    fn start(&mut self, exec: &Exec) {
        self.heartbeat = Instant::now();
        match Job::spawn(exec) {
            Ok(job) => self.job = Some(job),
            Err(e) => {
                let program = exec.argv.first().map_or("", String::as_str);
                let line = format!("{program}: {e}\n").into_bytes();
                self.send(&ToHost::Output(Stream::Stderr, line));
                let status = if e.kind() == ErrorKind::NotFound {
                    127
                } else {
                    126
                };
                self.send(&ToHost::Exit(Status::Exited(status)));
            }
        }
    }

    fn attend(&mut self) -> Result<()> {
        let Some(mut job) = self.job.take() else {
            return Ok(());
        };
        let taken = job.feed();
        if taken > 0 {
            self.send(&ToHost::StdinTaken(taken));
        }
        if self.out.len() < BACKLOG {
            job.read(|stream, bytes| self.send(&ToHost::Output(stream, bytes.to_vec())));
        }
        let ended =
            job.finish(|stream, bytes| self.send(&ToHost::Output(stream, bytes.to_vec())))?;
        if let Some(status) = ended {
            self.send(&ToHost::Exit(status));
            return Ok(());
        }
        if self.heartbeat.elapsed() >= HEARTBEAT {
            self.heartbeat = Instant::now();
            self.send(&ToHost::Alive);
        }
        self.job = Some(job);
        Ok(())
    }

    fn send(&mut self, message: &ToHost) {
        self.out.extend(wire::encode(message));
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match self.file.write(self.out.as_slices().0) {
                Ok(n) => drop(self.out.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
