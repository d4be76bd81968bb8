// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::folder;
use crate::folder::Folder;
use crate::interrupt;
use anyhow::Context;
use anyhow::Result;
use anyhow::anyhow;
use anyhow::bail;
use qapi::ExecuteError;
use qapi::Qmp;
use qapi::Stream;
use qapi::qmp;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use std::io::BufRead;
use std::io::BufReader;
use std::io::BufWriter;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::time::Instant;

/// A connection to QEMU's monitor. QEMU serves one at a time.
pub struct Monitor {
    qmp: Qmp<Stream<BufReader<UnixStream>, BufWriter<UnixStream>>>,
    timeout: Duration,
}

impl Monitor {
    /// Waits until QEMU is ready for commands.
    pub fn connect(folder: &Folder, timeout: Duration) -> Result<Self> {
        let stream = folder
            .connect(folder::QMP)
            .context("cannot connect to QEMU")?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let stream = Stream::new(BufReader::new(stream.try_clone()?), BufWriter::new(stream));
        let mut monitor = Self {
            qmp: Qmp::new(stream),
            timeout,
        };
        monitor.wait()?;
        if monitor
            .qmp
            .inner_mut()
            .get_mut_read()
            .fill_buf()?
            .is_empty()
        {
            bail!("QEMU has ended");
        }
        skip_events(monitor.qmp.inner_mut().get_mut_read())?;
        monitor.qmp.handshake().map_err(explain)?;
        Ok(monitor)
    }

    pub fn execute<C: qapi::Command>(&mut self, command: &C) -> Result<C::Ok> {
        self.qmp.write_command(command)?;
        self.wait()?;
        self.qmp.read_response::<C>().map_err(explain)
    }

    /// Executes a command that has to be done, also while we are being ended.
    pub fn settle<C: qapi::Command>(&mut self, command: &C) -> Result<C::Ok> {
        self.qmp.write_command(command)?;
        self.qmp.read_response::<C>().map_err(explain)
    }

    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.execute(&qmp::query_status {})?.running)
    }

    /// What a reboot of the guest does.
    pub fn on_reboot(&mut self, action: qmp::RebootAction) -> Result<()> {
        let (panic, shutdown, watchdog) = (None, None, None);
        let reboot = Some(action);
        self.execute(&qmp::set_action {
            reboot,
            panic,
            shutdown,
            watchdog,
        })
        .map(drop)
    }

    /// Resets the machine; from now on a reboot does that, too.
    pub fn reset(&mut self) -> Result<()> {
        self.on_reboot(qmp::RebootAction::reset)?;
        self.execute(&qmp::system_reset {})?;
        self.await_reset()
    }

    /// Waits until the machine has been reset.
    pub fn await_reset(&mut self) -> Result<()> {
        self.poll("reset", |monitor| {
            monitor.execute(&qmp::query_status {})?;
            let reset = |event| matches!(event, qmp::Event::RESET { .. });
            Ok(monitor.qmp.events().any(reset).then_some(()))
        })
    }

    /// Saves the whole VM as a snapshot on its disk.
    pub fn save_snapshot(&mut self, tag: &str) -> Result<()> {
        let job_id = format!("snapshot-{:016x}", crate::agent::token());
        let disk = || String::from("disk");
        self.execute(&qmp::snapshot_save {
            job_id: job_id.clone(),
            tag: tag.into(),
            vmstate: disk(),
            devices: vec![disk()],
        })?;
        let job = self.poll("taken the snapshot", |monitor| {
            let mut jobs = monitor.execute(&qmp::query_jobs {})?.into_iter();
            let job = jobs
                .find(|job| job.id == job_id)
                .context("QEMU has forgotten the snapshot")?;
            Ok(Some(job).filter(|job| job.status == qmp::JobStatus::concluded))
        })?;
        self.execute(&qmp::job_dismiss { id: job_id })?;
        job.error.map_or(Ok(()), |error| Err(anyhow!(error)))
    }

    /// Writes the migration stream, and waits until it is written.
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        let uri = Some(uri.into());
        self.execute(&qmp::migrate {
            uri,
            channels: None,
            detach: None,
            resume: None,
        })?;
        self.poll("migrated", |monitor| {
            let info = monitor.execute(&qmp::query_migrate {})?;
            if info.status == Some(qmp::MigrationStatus::failed) {
                bail!(
                    "QEMU says: {}",
                    info.error_desc.unwrap_or("migration failed".into())
                );
            }
            Ok((info.status == Some(qmp::MigrationStatus::completed)).then_some(()))
        })
    }

    /// Asks again and again until there is an answer.
    fn poll<T>(
        &mut self,
        what: &str,
        mut ask: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let start = Instant::now();
        while start.elapsed() < self.timeout {
            if let Some(answer) = ask(self)? {
                return Ok(answer);
            }
            interrupt::sleep(Duration::from_millis(10))?;
        }
        bail!("QEMU has not {what} within {} s", self.timeout.as_secs());
    }

    fn wait(&mut self) -> Result<()> {
        let stream = self.qmp.inner().get_ref_read().get_ref();
        if !interrupt::wait(&mut vec![PollFd::new(stream, PollFlags::IN)], self.timeout)? {
            bail!("QEMU has not answered for {} s", self.timeout.as_secs());
        }
        Ok(())
    }
}

/// QEMU's own words.
fn explain(error: ExecuteError) -> anyhow::Error {
    match error {
        ExecuteError::Qapi(error) => anyhow!("QEMU says: {}", error.desc),
        ExecuteError::Io(error) => anyhow!(error).context("the connection to QEMU is lost"),
    }
}

/// Skips the messages for an earlier connection: on a busy host that can come before its greeting.
fn skip_events(reader: &mut impl BufRead) -> Result<()> {
    let mut event = String::new();
    while reader.fill_buf()?.starts_with(b"{\"timestamp\"") {
        event.clear();
        reader.read_line(&mut event)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_before_the_greeting_are_skipped() {
        let event =
            "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\"}\r\n";
        let greeting = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";
        for events in 0..3 {
            let said = event.repeat(events) + greeting;
            let mut reader = said.as_bytes();
            skip_events(&mut reader).unwrap();
            assert_eq!(reader, greeting.as_bytes());
        }
        skip_events(&mut "".as_bytes()).unwrap();
    }
}
