// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::agent::Command;
use crate::agent::Lost;
use crate::agent::Output;
use crate::agent::Session;
use crate::folder;
use crate::folder::Draft;
use crate::folder::Folder;
use crate::folder::Lock;
use crate::folder::State;
use crate::gdb;
use crate::gdb::Gdb;
use crate::host::Host;
use crate::initramfs;
use crate::interrupt;
use crate::interrupt::Interrupted;
use crate::lineage::Lineage;
use crate::name::Name;
use crate::options::Options;
use crate::qemu;
use crate::qemu::Process;
use crate::qemu::Start;
use crate::qmp::Monitor;
use crate::stream;
use anyhow::Context;
use anyhow::Error;
use anyhow::Result;
use anyhow::anyhow;
use anyhow::bail;
use anyhow::ensure;
use qapi::qmp;
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::process::test_kill_process;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Duration;
use std::time::Instant;

/// How many lines of the console an error shows.
const LAST_LINES: usize = 15;

/// The time in which QEMU has to end after a request.
const QUIT: Duration = Duration::from_secs(5);

/// A virtual machine. One without a name of its own ends when this is dropped.
pub struct Vm {
    host: Host,
    folder: Folder,
    /// Held while the VM belongs to this process.
    owned: Option<Lock>,
    qemu: Option<Child>,
}

/// A line of the list of VMs.
pub struct Summary {
    pub name: Name,
    /// QEMU's process, if the VM runs.
    pub pid: Option<i32>,
    pub counter: Option<u32>,
    pub snapshots: Vec<String>,
}

impl Vm {
    /// Boots a VM that ends when the result is dropped.
    pub fn boot(host: &Host, options: Options) -> Result<Self> {
        Self::create(host, None, options)
    }

    /// Boots a VM that stays.
    pub fn start(host: &Host, name: &Name, options: Options) -> Result<Self> {
        Self::create(host, Some(name), options)
    }

    /// A VM that was started with a name.
    pub fn open(host: &Host, name: &Name) -> Result<Self> {
        let folder = Folder::open(&host.vms(), name)?;
        let vm = Self {
            host: host.clone(),
            folder,
            owned: None,
            qemu: None,
        };
        vm.finish_interrupted_copy()?;
        Ok(vm)
    }

    pub fn list(host: &Host) -> Result<Vec<Summary>> {
        let folders = folder::all(&host.vms())?.into_iter();
        let vms = folders.map(|folder| Self {
            host: host.clone(),
            folder,
            owned: None,
            qemu: None,
        });
        // One that goes away meanwhile is none.
        vms.filter_map(|vm| match vm.summary() {
            Err(_) if !vm.folder.file(folder::STATE).exists() => None,
            summary => Some(summary),
        })
        .collect()
    }

    /// Deletes the VMs of processes that are gone: of a suite, or a `vm run`, that was killed. Returns
    /// how many there were.
    pub fn delete_abandoned(host: &Host) -> Result<usize> {
        let mut count = 0;
        for vm in Self::list(host)? {
            // See Draft::publish.
            let rest = vm.name.strip_prefix("run-").unwrap_or_default();
            let number = rest.split('-').next().and_then(|pid| pid.parse().ok());
            let Some(pid) = number.and_then(Pid::from_raw) else {
                continue;
            };
            if test_kill_process(pid) == Err(Errno::SRCH) {
                Self::open(host, &vm.name)?.delete()?;
                count += 1;
            }
        }
        Ok(count)
    }

    fn create(host: &Host, name: Option<&Name>, options: Options) -> Result<Self> {
        options.check()?;
        let options = options.decided();
        check_name(name)?;
        folder::all(&host.vms())?;
        let draft = Draft::new(&host.vms(), name)?;
        link(
            &host.kernel(&options.kernel())?,
            &draft.file(folder::KERNEL),
        )?;
        initramfs::write(host, &options, &draft.file(folder::INITRAMFS))?;
        qemu::create_disk(host, &options, &draft.file(folder::DISK))?;
        let state = State {
            lineage: Lineage::new(options.counter()),
            options,
            ephemeral: name.is_none(),
            snapshots: BTreeMap::new(),
            copying: false,
        };
        Self::run(host, draft, &state, name, Start::Boot)
    }

    /// Starts the VM in the draft.
    fn run(
        host: &Host,
        draft: Draft,
        state: &State,
        name: Option<&Name>,
        start: Start<'_>,
    ) -> Result<Self> {
        let (folder, lock) = draft.publish(state, name)?;
        let mut vm = Self {
            host: host.clone(),
            folder,
            owned: Some(lock),
            qemu: None,
        };
        vm.launch(&state.options, start)?;
        if name.is_some() {
            vm.owned = None;
        }
        Ok(vm)
    }

    /// Starts QEMU, and waits for the guest. On an error nothing runs.
    fn launch(&mut self, options: &Options, start: Start<'_>) -> Result<()> {
        self.qemu = Some(qemu::spawn(&self.host, options, &self.folder, start)?);
        let at_start = self.host.at_start.clone();
        let started = at_start.map_or(Ok(()), |at_start| at_start(self));
        let up = started.and_then(|()| self.await_qemu()).and_then(|()| {
            if options.paused {
                Ok(())
            } else {
                self.await_guest()
            }
        });
        if up.is_err() {
            self.kill()?;
        }
        up
    }

    fn await_qemu(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            if let Some(qemu) = &mut self.qemu {
                if let Some(status) = qemu.try_wait()? {
                    bail!("QEMU ended ({status}); it says: {}", self.messages());
                }
            }
            match self.monitor() {
                Ok(_) => return Ok(()),
                Err(e) if e.is::<Interrupted>() || start.elapsed() > self.host.timeout => {
                    return Err(e);
                }
                Err(_) => interrupt::sleep(Duration::from_millis(10))?,
            }
        }
    }

    fn await_guest(&self) -> Result<()> {
        let doing = format!("waiting for the guest of {}", self.folder.name);
        let session = Session::open(&self.folder, self.host.timeout);
        match session.map_err(|e| self.explain(e, &doing))?.trouble {
            Some(trouble) => bail!("{trouble}; {}", self.last_lines()),
            None => Ok(()),
        }
    }

    pub fn name(&self) -> &Name {
        &self.folder.name
    }

    /// QEMU's process, if the VM runs.
    pub fn pid(&self) -> Result<Option<i32>> {
        Ok(Process::of(&self.folder)?.map(|process| process.pid.as_raw_pid()))
    }

    /// What the VM is made of, with the counter as it is now.
    pub fn options(&self) -> Result<Options> {
        Ok(self.folder.state()?.options)
    }

    /// What QEMU had to say since it was last started, in one line.
    pub fn messages(&self) -> String {
        qemu::messages(&self.folder)
    }

    /// All that the guest wrote to its console, since the first start of this VM:
    /// a restore adds to it. A clone has one of its own.
    pub fn console(&self) -> Result<Vec<u8>> {
        fs::read(self.folder.file(folder::CONSOLE)).context("cannot read the console's log")
    }

    /// Copies what the guest wrote to its console, and what QEMU wrote, to PREFIX.console.log
    /// and PREFIX.qemu.log in a folder. A log that is empty is left out.
    pub fn copy_logs(&self, to: &Path, prefix: &str) -> Result<()> {
        for log in [folder::CONSOLE, folder::QEMU_LOG] {
            let from = self.folder.file(log);
            if fs::metadata(&from).is_ok_and(|file| file.len() > 0) {
                fs::create_dir_all(to)
                    .and_then(|()| fs::copy(&from, to.join(format!("{prefix}.{log}"))))
                    .with_context(|| {
                        format!("cannot copy {} to {}", from.display(), to.display())
                    })?;
            }
        }
        Ok(())
    }

    /// A command for the guest.
    pub fn command<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> Command<'_> {
        Command::new(self, argv.into_iter().map(Into::into).collect())
    }

    /// Runs a command in the guest, without input.
    pub fn exec<S: Into<String>>(&self, argv: impl IntoIterator<Item = S>) -> Result<Output> {
        self.command(argv).output()
    }

    /// What a script of the guest's shell prints. It has to succeed.
    pub fn shell(&self, script: &str) -> Result<String> {
        let output = self.exec(["sh", "-c", script])?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{script:?} in the guest: {}: {stderr}",
            output.status
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts a command that continues in the guest, also in clones. Its output goes to a file of
    /// the guest. Returns its pid there.
    pub fn spawn<S: Into<String>>(
        &self,
        argv: impl IntoIterator<Item = S>,
        log: &str,
    ) -> Result<u32> {
        // The log is there when this returns.
        let script = r#"{ "$@" & } >"$0" 2>&1 </dev/null; echo $!"#;
        let shell = ["sh", "-c", script, log].map(String::from).into_iter();
        let output = self.exec(shell.chain(argv.into_iter().map(Into::into)))?;
        let pid = String::from_utf8_lossy(&output.stdout);
        pid.trim()
            .parse()
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Has QEMU's monitor execute a command.
    pub fn qmp<C: qapi::Command>(&self, command: &C) -> Result<C::Ok> {
        self.check_running()?;
        self.monitor()?.execute(command)
    }

    /// Gives the generation counter another value, which the guest may have had before. Keeps no
    /// account of it (for tests that restore nothing).
    pub fn qom_set_counter(&self, counter: u32) -> Result<()> {
        let (path, property) = self.folder.state()?.options.source.property();
        self.qmp(&qmp::qom_set {
            path: path.into(),
            property: property.into(),
            value: counter.into(),
        })
        .map(drop)
    }

    /// Stops the VM, and connects to QEMU's gdbstub.
    pub fn debug(&self) -> Result<Gdb> {
        self.qmp(&qmp::human_monitor_command {
            command_line: format!("gdbserver unix:{},server=on,wait=off", gdb::SOCKET),
            cpu_index: None,
        })?;
        Gdb::connect(&self.folder, self.host.timeout, self.options()?.machine())
    }

    /// Removes a snapshot, so that the disk stays small.
    pub fn delete_snapshot(&self, snapshot: &Name) -> Result<()> {
        let said = self.qmp(&qmp::human_monitor_command {
            command_line: format!("delvm {snapshot}"),
            cpu_index: None,
        })?;
        ensure!(
            said.is_empty(),
            "cannot remove the snapshot {snapshot}: {said}"
        );
        Ok(())
    }

    /// Writes the VM's migration stream into a file.
    pub fn migrate_to_file(&self, path: &Path) -> Result<()> {
        let path = std::path::absolute(path)?;
        self.migrate(&format!("file:{}", path.display()))
    }

    /// Sends the VM's migration stream to where QEMU says with `uri`. When this
    /// returns the VM stands still.
    pub fn migrate(&self, uri: &str) -> Result<()> {
        let _lock = self.lock()?;
        self.check_running()?;
        self.monitor()?.migrate(uri)
    }

    /// Advances the guest's clocks by this at once. The guest continues in another QEMU, as the
    /// same VM with the same ID. On an error nothing may run.
    pub fn age(&mut self, time: Duration) -> Result<()> {
        let uptime = |vm: &Self| -> Result<f64> {
            let said = vm.shell("cut -d' ' -f1 /proc/uptime")?;
            Ok(said.trim().parse()?)
        };
        let before = uptime(self)?;
        let options = self.folder.state()?.options;
        let guid = match options.no_device {
            true => None,
            false => Some(self.qmp(&qmp::query_vm_generation_id {})?.guid),
        };
        let _lock = self.lock()?;
        let file = self.folder.file(folder::STREAM);
        // QEMU runs in the folder.
        let uri = format!("file:{}", folder::STREAM);
        self.monitor()?.migrate(&uri)?;
        self.quit()?;
        stream::age(&file, time)?;
        self.launch(&options, Start::Stream(folder::STREAM, guid.as_deref()))?;
        fs::remove_file(&file)?;
        let older = uptime(self)? - before;
        // The kernel measures how fast its TSC is, and not to the last digit.
        ensure!(
            older > 0.95 * time.as_secs_f64(),
            "the guest was to be {} s older, but its uptime is only {older:.1} s more. A clock that \
             wraps, such as ACPI's or the HPET, loses what does not fit into it, and -icount has its \
             own; the guest's is: {}",
            time.as_secs(),
            self.shell("cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?
                .trim()
        );
        Ok(())
    }

    /// Gives the generation counter of the running VM another value.
    pub fn set_genctr(&mut self, counter: u32) -> Result<()> {
        self.set_genctr_each(&[counter])
    }

    /// Gives it one value after the other, as fast as QEMU takes them.
    pub fn set_genctr_each(&mut self, counters: &[u32]) -> Result<()> {
        let _lock = self.lock()?;
        self.check_running()?;
        let before = self.folder.state()?;
        ensure!(
            before.options.counter().is_some(),
            "{} has no generation counter",
            self.name()
        );
        // First the note, then the deed: the lineage may hold more than the
        // guest has seen, but never less.
        let mut after = before.clone();
        for &counter in counters {
            after.lineage = after.lineage.with(counter)?;
            after.options.genctr = Some(counter);
        }
        self.folder.write_state(&after)?;
        let mut monitor = self.monitor()?;
        let mut last = before.options.genctr;
        let (path, property) = before.options.source.property();
        for &counter in counters {
            let set = monitor.settle(&qmp::qom_set {
                path: path.into(),
                property: property.into(),
                value: counter.into(),
            });
            if set.is_err() {
                // What the guest may have seen stays in the lineage.
                after.options.genctr = last;
                self.folder.write_state(&after)?;
                return set.map(drop);
            }
            last = Some(counter);
        }
        Ok(())
    }

    /// The snapshots that can be restored.
    pub fn snapshots(&self) -> Result<Vec<String>> {
        Ok(self
            .known_snapshots(&self.folder.state()?)?
            .into_keys()
            .collect())
    }

    /// Saves the running VM: memory, devices and disk.
    pub fn snapshot(&mut self, snapshot: &Name) -> Result<()> {
        let _lock = self.lock()?;
        self.check_running()?;
        let mut state = self.folder.state()?;
        if self.known_snapshots(&state)?.contains_key(&**snapshot) {
            bail!(
                "{} has a snapshot {snapshot} already: take another name",
                self.name()
            );
        }
        // QEMU would find out half way.
        let (needs, has) = (state.options.memory(), self.folder.space()?);
        ensure!(
            has >= needs.into(),
            "a snapshot of {} takes up to {needs} MiB, and {} has {has} MiB: make room there",
            self.name(),
            self.folder.path().display()
        );
        // First the note, then the deed: a note without a snapshot on the disk
        // counts for nothing.
        state
            .snapshots
            .insert(snapshot.to_string(), state.lineage.clone());
        self.folder.write_state(&state)?;
        let saved = self.monitor()?.save_snapshot(snapshot);
        saved.with_context(|| format!("cannot take the snapshot {snapshot} of {}", self.name()))
    }

    /// Goes back to a snapshot, with a new generation.
    pub fn restore(&mut self, snapshot: &Name, counter: Option<u32>) -> Result<()> {
        let _lock = self.lock()?;
        let state = self.restored(snapshot, counter)?;
        self.replace(snapshot, &state)
    }

    /// [`Self::restore`] with other options, and no questions asked.
    pub fn restore_unchecked(&mut self, snapshot: &Name, options: Options) -> Result<()> {
        let _lock = self.lock()?;
        let state = State {
            options,
            ..self.folder.state()?
        };
        self.replace(snapshot, &state)
    }

    /// Another VM, from a snapshot of this one, with a new generation and a disk
    /// of its own. Without a name, it ends when the result is dropped.
    pub fn clone_from(
        &self,
        snapshot: &Name,
        counter: Option<u32>,
        name: Option<&Name>,
    ) -> Result<Self> {
        let _lock = self.lock()?;
        self.duplicate(snapshot, self.restored(snapshot, counter)?, name)
    }

    /// [`Self::clone_from`] with other options, and no questions asked.
    pub fn clone_unchecked(
        &self,
        snapshot: &Name,
        options: Options,
        name: Option<&Name>,
    ) -> Result<Self> {
        let _lock = self.lock()?;
        self.duplicate(
            snapshot,
            State {
                options,
                ..self.folder.state()?
            },
            name,
        )
    }

    /// Resets the machine, and waits until the guest has booted again.
    pub fn reset(&mut self) -> Result<()> {
        let _lock = self.lock()?;
        self.check_running()?;
        self.monitor()?.reset()?;
        self.await_guest()?;
        // Not before: the firmware resets the machine once more.
        self.monitor()?.on_reboot(qmp::RebootAction::shutdown)
    }

    /// Has the guest's kernel reboot, and waits until the guest is up again.
    pub fn reboot(&mut self, script: &str) -> Result<()> {
        let _lock = self.lock()?;
        self.check_running()?;
        let mut monitor = self.monitor()?;
        monitor.on_reboot(qmp::RebootAction::reset)?;
        // The guest may be gone before it says what became of this.
        let _ = self.exec(["sh", "-c", script]);
        monitor.await_reset()?;
        drop(monitor);
        self.await_guest()?;
        // Not before: the firmware resets the machine once more.
        self.monitor()?.on_reboot(qmp::RebootAction::shutdown)
    }

    /// Ends the VM. What is left of it goes, unless it has snapshots: whether it
    /// has.
    pub fn stop(&mut self) -> Result<bool> {
        let _lock = self.lock()?;
        let keep = !self.folder.state()?.ephemeral && !self.snapshots()?.is_empty();
        self.at_end();
        if Process::of(&self.folder)?.is_some() {
            self.quit()?;
        } else if keep {
            bail!(
                "{0} does not run; vm delete {0} removes it, with its snapshots",
                self.name()
            );
        }
        if !keep {
            self.folder.remove()?;
            self.owned = None;
        }
        Ok(keep)
    }

    /// Ends the VM and removes it, with its snapshots.
    pub fn delete(&mut self) -> Result<()> {
        let _lock = self.lock()?;
        self.at_end();
        self.kill()?;
        self.folder.remove()?;
        self.owned = None;
        Ok(())
    }

    fn summary(&self) -> Result<Summary> {
        Ok(Summary {
            name: self.name().clone(),
            pid: self.pid()?,
            counter: self.options()?.counter(),
            snapshots: self.snapshots()?,
        })
    }

    /// The state that follows from restoring a snapshot, if it can be restored.
    fn restored(&self, snapshot: &Name, counter: Option<u32>) -> Result<State> {
        let name = self.name();
        let state = self.folder.state()?;
        let snapshots = self.known_snapshots(&state)?;
        let Some(lineage) = snapshots.get(&**snapshot) else {
            let known: Vec<_> = snapshots.into_keys().collect();
            let known = if known.is_empty() {
                "none".into()
            } else {
                known.join(", ")
            };
            bail!("{name} has no snapshot {snapshot}; it has: {known}");
        };
        let lineage = match (state.options.counter(), counter) {
            (Some(_), Some(counter)) => lineage
                .with(counter)
                .with_context(|| format!("cannot restore {snapshot} of {name}"))?,
            (Some(_), None) => bail!(
                "{name} has a generation counter: give it a new value, for example --genctr {}",
                lineage.next()
            ),
            (None, Some(_)) => bail!("{name} has no generation counter: leave out --genctr"),
            (None, None) => lineage.clone(),
        };
        let options = Options {
            genctr: counter,
            ..state.options.clone()
        };
        Ok(State {
            options,
            lineage,
            ..state
        })
    }

    /// Those of the snapshots noted in the state that are on the disk.
    fn known_snapshots(&self, state: &State) -> Result<BTreeMap<String, Lineage>> {
        if state.snapshots.is_empty() {
            return Ok(BTreeMap::new());
        }
        let disk = self.folder.file(folder::DISK);
        let on_disk = qemu::disk_snapshots(&self.host, &state.options, &disk)?;
        let noted = state.snapshots.clone().into_iter();
        Ok(noted.filter(|(name, _)| on_disk.contains(name)).collect())
    }

    fn replace(&mut self, snapshot: &Name, state: &State) -> Result<()> {
        let before = self.folder.state()?;
        qemu::folder_of(&self.host, &state.options)?;
        self.at_end();
        self.quit()?;
        self.folder.write_state(state)?;
        let launched = self.launch(&state.options, Start::Snapshot(snapshot));
        if launched.is_err() {
            self.folder.write_state(&before)?;
        }
        launched
    }

    fn duplicate(&self, snapshot: &Name, state: State, name: Option<&Name>) -> Result<Self> {
        check_name(name)?;
        let draft = Draft::new(&self.host.vms(), name)?;
        for file in [folder::KERNEL, folder::INITRAMFS] {
            link(&self.folder.file(file), &draft.file(file))?;
        }
        self.copy_disk(&draft.file(folder::DISK))?;
        let state = State {
            ephemeral: name.is_none(),
            copying: false,
            ..state
        };
        Self::run(&self.host, draft, &state, name, Start::Snapshot(snapshot))
    }

    /// Copies the disk. QEMU writes nothing to it while the VM is paused.
    pub fn copy_disk(&self, to: &Path) -> Result<()> {
        let copy = || {
            let copied = fs::copy(self.folder.file(folder::DISK), to);
            copied
                .map(drop)
                .with_context(|| format!("cannot copy the disk of {}", self.name()))
        };
        if Process::of(&self.folder)?.is_none() {
            return copy();
        }
        let mut monitor = self.monitor()?;
        if !monitor.is_running()? {
            return copy();
        }
        let state = self.folder.state()?;
        self.folder.write_state(&State {
            copying: true,
            ..state.clone()
        })?;
        let copied = monitor.execute(&qmp::stop {}).and_then(|_| copy());
        monitor.settle(&qmp::cont {})?;
        self.folder.write_state(&state)?;
        copied
    }

    /// Resumes a VM that a killed command had paused.
    fn finish_interrupted_copy(&self) -> Result<()> {
        let paused = || self.folder.state().is_ok_and(|state| state.copying);
        if !paused() {
            return Ok(());
        }
        let Some(_lock) = self.folder.try_lock().filter(|_| paused()) else {
            return Ok(());
        };
        if Process::of(&self.folder)?.is_some() {
            self.monitor()?.execute(&qmp::cont {})?;
        }
        self.folder.write_state(&State {
            copying: false,
            ..self.folder.state()?
        })
    }

    /// Held while the VM is changed; one of our own is ours all the time.
    fn lock(&self) -> Result<Option<Lock>> {
        match self.owned {
            Some(_) => Ok(None),
            None => self.folder.lock(self.host.timeout).map(Some),
        }
    }

    fn check_running(&self) -> Result<()> {
        let name = self.name();
        let running = Process::of(&self.folder)?.is_some();
        ensure!(
            running,
            "{name} does not run; vm log {name} shows its last words"
        );
        Ok(())
    }

    fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.folder, self.host.timeout)
    }

    pub(crate) fn session(&self) -> Result<Session> {
        self.check_running()?;
        Session::open(&self.folder, self.host.timeout)
    }

    /// An error, with the console's last lines if the guest was lost.
    pub(crate) fn explain(&self, error: Error, doing: &str) -> Error {
        if !error.is::<Lost>() {
            return error;
        }
        let messages = match self.messages() {
            messages if messages.is_empty() => messages,
            messages => format!("; QEMU says: {messages}"),
        };
        let cpus = self
            .cpus()
            .map_or(String::new(), |cpus| format!("; its CPUs are at {cpus}"));
        anyhow!("{doing}: {error}{messages}{cpus}; {}", self.last_lines())
    }

    /// Each CPU's program counter and, on x86, whether it is halted.
    fn cpus(&self) -> Result<String> {
        let registers = self.qmp(&qmp::human_monitor_command {
            command_line: "info registers -a".into(),
            cpu_index: None,
        })?;
        let words = registers.split_whitespace();
        let cpus: Vec<_> = words
            .filter(|word| {
                ["RIP=", "PC=", "HLT="]
                    .iter()
                    .any(|name| word.starts_with(name))
            })
            .collect();
        Ok(cpus.join(" "))
    }

    fn last_lines(&self) -> String {
        let console = self.console().unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let lines: Vec<_> = console.lines().collect();
        if lines.is_empty() {
            return "its console says nothing".into();
        }
        let (before, last) = lines.split_at(lines.len().saturating_sub(LAST_LINES));
        // A panic is said first, and then explained at length.
        let panic = before.iter().rfind(|line| line.contains("Kernel panic"));
        let shown: Vec<_> = panic.into_iter().chain(last).copied().collect();
        format!("the last lines of its console:\n{}", shown.join("\n"))
    }

    fn at_end(&self) {
        if let Some(at_end) = &self.host.at_end {
            at_end(self);
        }
    }

    /// Ends QEMU so that it writes all it has to the disk.
    fn quit(&mut self) -> Result<()> {
        if let Some(process) = Process::of(&self.folder)? {
            let asked = Monitor::connect(&self.folder, QUIT);
            if asked
                .and_then(|mut monitor| monitor.execute(&qmp::quit {}))
                .is_ok()
            {
                process.ends_within(QUIT);
            }
        }
        self.kill()
    }

    /// Ends QEMU at once, if it runs, also that of a VM that belongs to another thread: each call
    /// of that thread that waits for QEMU or for the guest fails.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(process) = Process::of(&self.folder)? {
            process.kill()?;
        }
        if let Some(mut qemu) = self.qemu.take() {
            qemu.kill()?;
            qemu.wait()?;
        }
        Ok(())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.owned.is_some() {
            self.at_end();
            if let Err(e) = self.kill().and_then(|()| self.folder.remove()) {
                eprintln!("{e:#}");
            }
        }
    }
}

/// Names of our own do not meet others.
fn check_name(name: Option<&Name>) -> Result<()> {
    if let Some(name) = name.filter(|name| name.starts_with("run-")) {
        bail!("the name {name} could be that of a VM of vm run: take one without run-");
    }
    Ok(())
}

/// The same file in a VM's folder: nothing writes to it.
fn link(from: &Path, to: &Path) -> Result<()> {
    let from = from.canonicalize()?;
    if fs::hard_link(&from, to).is_err() {
        fs::copy(&from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}
