// SPDX-License-Identifier: MIT OR Apache-2.0

//! Ends a test that has passed its deadline, by ending its guests: each call that waits for a guest
//! or for QEMU then returns an error. What the guests of a failed test and their QEMUs wrote is
//! kept in out/failed/TEST.

use crate::{context::scaled_time, results};
use anyhow::{Result, anyhow, ensure};
use harness::{AtStart, Host, Name, Vm, qapi::qmp};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Duration,
};

/// The signals to the guests' QEMUs and to the test's other programs after the deadline, and how
/// many seconds the test may continue after each. Then the run ends.
const STEPS: [(Signal, u64); 4] = [
    (Signal::TERM, 2),
    (Signal::KILL, 10),
    (Signal::KILL, 60),
    (Signal::KILL, 240),
];

/// For how many ended guests the logs are kept: a test may make thousands of clones.
const KEPT: u32 = 16;

/// How long a guest may take to report its tasks.
const ANSWER: Duration = Duration::from_secs(20);

/// Makes the kernel log the blocked tasks, and what each CPU does.
const TASKS: &str = "for key in w l; do echo $key >/proc/sysrq-trigger; done";

/// The guests of a test, or those that tests share. They are numbered as they are started.
#[derive(Clone, Default)]
pub struct Guests(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Where the logs are kept. Tests that are not of the suite have no such folder.
    folder: Option<PathBuf>,
    running: Vec<(u32, Name)>,
    started: u32,
    /// The deadline has passed.
    over: bool,
}

impl Guests {
    pub fn at_start(&self) -> AtStart {
        let guests = self.clone();
        Arc::new(move |vm| {
            let mut state = guests.lock();
            ensure!(!state.over, "the test's deadline has passed");
            state.started += 1;
            let number = state.started;
            state.running.push((number, vm.name().clone()));
            Ok(())
        })
    }

    /// Keeps the logs of a guest that is about to end.
    pub fn ending(&self, vm: &Vm) {
        let mut state = self.lock();
        let mut running = state.running.iter();
        let Some(n) = running.position(|(_, name)| name == vm.name()) else {
            return;
        };
        let (number, _) = state.running.remove(n);
        if let Some(folder) = &state.folder {
            copy_logs(vm, folder, number);
            for log in ["console.log", "qemu.log"] {
                // The file may not exist.
                let old = number.saturating_sub(KEPT);
                let _ = fs::remove_file(folder.join(format!("{old}.{log}")));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a test that has these guests. An error says where the logs are.
    pub fn watch(
        &self,
        test: &str,
        deadline: Option<Duration>,
        body: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let folder = folder(test);
        {
            let mut state = self.lock();
            state.folder = folder.clone();
            state.over = false;
        }
        let (running, ended) = mpsc::channel();
        let watchdog = deadline.map(|deadline| {
            let watchdog = Watchdog {
                test: test.into(),
                deadline,
                guests: self.clone(),
                thread: fs::read_link("/proc/thread-self").unwrap_or_default(),
                ended,
            };
            thread::spawn(move || watchdog.run())
        });
        let mut result = caught(body);
        drop(running);
        watchdog.map(|watchdog| watchdog.join());
        if self.lock().over {
            let at = result.map_or_else(|err| format!("{err:#}"), |()| "its end".into());
            let at = first_line(&at);
            result = Err(anyhow!("{}; ended at: {at}", late(deadline)));
        }
        let Some(folder) = folder.filter(|folder| folder.exists()) else {
            return result;
        };
        if result.is_ok() {
            let _ = fs::remove_dir_all(folder);
            return result;
        }
        result.map_err(|err| anyhow!("{err:#}\nthe guests' logs are in {}", folder.display()))
    }
}

/// Where the logs of a test's guests are kept if it fails.
pub fn folder(test: &str) -> Option<PathBuf> {
    Some(results::out()?.join("failed").join(test.replace("::", ".")))
}

/// Runs `body`. Turns a panic into an error.
pub fn caught(body: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(anyhow!("panicked: {}", text.unwrap_or("without a text")))
    })
}

/// The first line of an error, which may announce the last lines of a console. The console is kept
/// as a file.
fn first_line(text: &str) -> &str {
    let line = text.lines().next().unwrap_or_default();
    line.trim_end_matches("; the last lines of its console:")
}

fn late(deadline: Option<Duration>) -> String {
    let deadline = deadline.unwrap_or_default().as_secs();
    format!("not done by its deadline, after {deadline} s")
}

fn copy_logs(vm: &Vm, folder: &Path, number: u32) {
    if let Err(err) = vm.copy_logs(folder, &number.to_string()) {
        eprintln!("suite: {err:#}");
    }
}

/// Waits for the end of a test, in a thread of its own.
struct Watchdog {
    test: String,
    deadline: Duration,
    guests: Guests,
    /// The test's thread, below /proc.
    thread: PathBuf,
    ended: mpsc::Receiver<()>,
}

impl Watchdog {
    fn run(self) {
        if self.ends_within(self.deadline) {
            return;
        }
        let late = late(Some(self.deadline));
        eprintln!("suite: {}: {late}: its guests are ended", self.test);
        self.guests.lock().over = true;
        self.each_guest("its tasks are not known", |vm, folder, number| {
            if let Some(folder) = folder {
                // QEMU gives the registers without an answer of the guest.
                fs::create_dir_all(folder)?;
                let registers = vm.qmp(&qmp::human_monitor_command {
                    command_line: "info registers -a".into(),
                    cpu_index: None,
                });
                let registers = registers.unwrap_or_else(|err| format!("{err:#}\n"));
                fs::write(folder.join(format!("{number}.registers")), registers)?;
            }
            vm.shell(TASKS).map(drop)
        });
        for (signal, seconds) in STEPS {
            self.each_guest("cannot end it", |vm, _, _| vm.kill());
            signal_children(&Path::new("/proc").join(&self.thread), signal);
            if self.ends_within(scaled_time(Duration::from_secs(seconds))) {
                return;
            }
        }
        let what = format!("{late}, nor after its guests were ended; this ends the run");
        eprintln!("suite: {}: {what}", self.test);
        self.each_guest("no logs", |vm, folder, number| {
            folder.map_or(Ok(()), |folder| vm.copy_logs(folder, &number.to_string()))
        });
        results::add(&self.test, self.deadline, &Err(anyhow!(what)));
        results::report(&[]);
        end_all_guests();
        std::process::exit(1);
    }

    fn ends_within(&self, time: Duration) -> bool {
        self.ended.recv_timeout(time) != Err(mpsc::RecvTimeoutError::Timeout)
    }

    /// Calls `act` for each guest. The lock is held, so the test cannot end a guest meanwhile, and
    /// no other machine gets the name of one.
    fn each_guest(&self, failed: &str, act: impl Fn(&mut Vm, Option<&Path>, u32) -> Result<()>) {
        let state = self.guests.lock();
        for (number, name) in &state.running {
            let act = || act(&mut open(name)?, state.folder.as_deref(), *number);
            if let Err(err) = act() {
                let err = format!("{err:#}");
                let why = first_line(&err);
                eprintln!("suite: {}, guest {number}: {failed}: {why}", self.test);
            }
        }
    }
}

/// A VM that belongs to another thread.
fn open(name: &Name) -> Result<Vm> {
    let mut host = Host::from_env()?;
    host.timeout = scaled_time(ANSWER);
    Vm::open(&host, name)
}

/// Ends the guests of all tests, which would outlive this process.
fn end_all_guests() {
    let ours = std::process::id().to_string();
    let all = Host::from_env().and_then(|host| Vm::list(&host));
    for vm in all.unwrap_or_default() {
        if vm.name.split('-').any(|part| part == ours) {
            let _ = open(&vm.name).and_then(|mut vm| vm.kill());
        }
    }
}

/// Sends a signal to all programs that a thread has started, and to those that these have started.
fn signal_children(thread: &Path, signal: Signal) {
    let children = fs::read_to_string(thread.join("children")).unwrap_or_default();
    for child in children.split_whitespace().flat_map(str::parse) {
        signal_children(
            &PathBuf::from(format!("/proc/{child}/task/{child}")),
            signal,
        );
        let _ = Pid::from_raw(child).map(|child| kill_process(child, signal));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const SHORT: Option<Duration> = Some(Duration::from_millis(1));

    /// Expect that a test whose program does not end fails after its deadline, with one line, and
    /// that the program and its child are ended.
    #[test]
    fn a_program_that_does_not_end_is_ended() {
        let result = Guests::default().watch("test", SHORT, || {
            // The shell has a child, which holds the pipe.
            let output = Command::new("sh")
                .args(["-c", "sleep 1000; true"])
                .output()?;
            Err(anyhow!("{}\nmore", output.status))
        });
        let said = result.unwrap_err().to_string();
        assert!(said.starts_with("not done by its deadline"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }

    /// Expect that a result before the deadline, or without one, is the result of the test.
    #[test]
    fn a_result_that_comes_in_time_is_the_result() {
        let guests = Guests::default();
        for deadline in [None, Some(Duration::from_secs(1000))] {
            guests.watch("test", deadline, || Ok(())).unwrap();
            let failed = guests.watch("test", deadline, || Err(anyhow!("failed")));
            assert_eq!(failed.unwrap_err().to_string(), "failed");
        }
    }

    /// Expect that a panic is an error with the panic's message.
    #[test]
    fn a_panic_is_an_error() {
        let result = Guests::default().watch("test", None, || panic!("at {}", 1));
        assert_eq!(result.unwrap_err().to_string(), "panicked: at 1");
    }
}
