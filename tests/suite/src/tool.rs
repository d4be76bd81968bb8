// SPDX-License-Identifier: MIT OR Apache-2.0

//! The VM tool, as its users call it.

use crate::{
    context::{Context, scaled_time},
    tests,
};
use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, Command, Output, Stdio},
    thread,
    time::Duration,
};

tests! {
    [Tiny];
    run_passes_output_and_status_through
    run_passes_input_through
    a_vm_outlives_the_commands_that_use_it
    what_cannot_be_is_one_clear_line
    a_panic_shows_the_console
    a_hang_ends_within_a_bound
    ctrl_c_leaves_nothing_behind
    a_killed_tool_leaves_what_list_shows
    files_and_arguments_reach_the_guest
}

fn vm(context: &Context, args: &[&str]) -> Command {
    let mut vm = Command::new(context.program("vm"));
    vm.args(args).stdin(Stdio::null());
    vm
}

fn output(context: &Context, args: &[&str]) -> Result<Output> {
    vm(context, args).output().context("cannot run the tool")
}

/// Runs the tool, which has to succeed, and returns its output.
fn ok(context: &Context, args: &[&str]) -> Result<String> {
    let output = output(context, args)?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "vm {args:?}: {}: {err}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs the tool, which has to fail with one line that has `words`.
fn refused(context: &Context, args: &[&str], words: &str) -> Result<()> {
    let output = output(context, args)?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "vm {args:?} succeeded");
    ensure!(
        err.contains(words),
        "vm {args:?} does not say {words:?}: {err}"
    );
    ensure!(
        err.trim_end().lines().count() == 1,
        "vm {args:?} says more than a line: {err}"
    );
    Ok(())
}

/// The name of a VM that is deleted when the test ends. The suite's process ID makes it differ from
/// the names of other runs.
struct Named<'a>(&'a Context, String);

impl<'a> Named<'a> {
    fn new(context: &'a Context, what: &str) -> Self {
        Self(context, format!("test-{}-{what}", std::process::id()))
    }
}

impl std::ops::Deref for Named<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.1
    }
}

impl Drop for Named<'_> {
    fn drop(&mut self) {
        let _ = output(self.0, &["delete", &self.1]);
    }
}

/// Expect that `vm run` passes on the output, the error output and the exit status of the command.
fn run_passes_output_and_status_through(context: &Context) -> Result<()> {
    let script = "echo out; echo err >&2; exit 7";
    let output = output(context, &["run", "--genctr", "9", "--", "sh", "-c", script])?;
    ensure!(output.status.code() == Some(7), "status: {}", output.status);
    ensure!(
        output.stdout == b"out\n",
        "stdout: {:?}",
        String::from_utf8_lossy(&output.stdout)
    );
    ensure!(
        output.stderr == b"err\n",
        "stderr: {:?}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Expect that `vm run` passes its input on unchanged, to the command or, without a command, to a
/// shell.
fn run_passes_input_through(context: &Context) -> Result<()> {
    // More bytes than any buffer on the way holds, with all values.
    let bytes: Vec<u8> = (0..1 << 20)
        .map(|n: u32| (n.wrapping_mul(2654435761) >> 13) as u8)
        .collect();
    let mut child = vm(context, &["run", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let sent = bytes.clone();
    let writer = thread::spawn(move || stdin.write_all(&sent));
    let output = child.wait_with_output()?;
    writer.join().expect("the writer panicked")?;
    ensure!(output.status.success(), "status: {}", output.status);
    ensure!(
        output.stdout == bytes,
        "{} bytes came back",
        output.stdout.len()
    );

    // Without a command, a shell reads its commands from the input.
    let mut shell = vm(context, &["run", "--genctr", "77"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    shell
        .stdin
        .take()
        .context("no stdin")?
        .write_all(b"od -An -tu4 -N4 /dev/vmgenid\nexit 3\n")?;
    let output = shell.wait_with_output()?;
    ensure!(output.status.code() == Some(3), "status: {}", output.status);
    ensure!(
        String::from_utf8_lossy(&output.stdout).trim() == "77",
        "{:?}",
        output.stdout
    );
    Ok(())
}

/// Expect that a VM stays until it is stopped, with its files and processes in a snapshot and in a
/// clone, that each VM has its own counter, and that a refused command changes nothing.
fn a_vm_outlives_the_commands_that_use_it(context: &Context) -> Result<()> {
    let names = [
        Named::new(context, "original"),
        Named::new(context, "clone"),
    ];
    let [original, clone] = [&*names[0], &*names[1]];
    let read = ["--", "od", "-An", "-tu4", "-N4", "/dev/vmgenid"];
    let expect = |name: &str, expected: &str, when: &str| -> Result<()> {
        let said = ok(context, &[&["exec", name][..], &read].concat())?;
        ensure!(
            said.trim() == expected,
            "{when}: {}, not {expected}",
            said.trim()
        );
        Ok(())
    };

    ok(context, &["start", original, "--genctr", "42"])?;
    expect(original, "42", "started")?;
    let script = "echo kept >/tmp/file; sleep 1000 &";
    ok(context, &["exec", original, "--", "sh", "-c", script])?;
    ok(context, &["snapshot", original, "first"])?;
    ok(context, &["set", original, "--genctr", "50"])?;
    expect(original, "50", "set")?;
    ok(
        context,
        &[
            "restore", original, "first", "--genctr", "43", "--as", clone,
        ],
    )?;
    expect(clone, "43", "the clone")?;
    expect(original, "50", "beside the clone")?;
    let kept = ok(
        context,
        &[
            "exec",
            clone,
            "--",
            "sh",
            "-c",
            "cat /tmp/file; pidof sleep",
        ],
    )?;
    ensure!(
        kept.starts_with("kept\n") && kept.lines().count() == 2,
        "in the clone: {kept}"
    );
    for name in [original, clone] {
        ensure!(
            listed(context, name)?.is_some(),
            "{name} is not in the list"
        );
    }
    ensure!(
        ok(context, &["log", original])?.contains("Linux version"),
        "no console in the log"
    );

    // A name that is or was in use is refused, and nothing changes.
    refused(
        context,
        &["restore", original, "first", "--genctr", "42"],
        "42",
    )?;
    refused(
        context,
        &["restore", original, "none", "--genctr", "60"],
        "first",
    )?;
    refused(context, &["snapshot", original, "first"], "already")?;
    refused(context, &["set", original, "--genctr", "42"], "42")?;
    refused(context, &["start", original], original)?;
    expect(original, "50", "after refusals")?;

    // A VM is restored in place also where it does not run: its snapshots stay.
    ok(context, &["stop", original])?;
    refused(context, &["exec", original, "--", "true"], "does not run")?;
    ok(context, &["restore", original, "first", "--genctr", "60"])?;
    expect(original, "60", "restored in place")?;
    ok(context, &["stop", clone])?;
    // The clone also has the snapshot, on its own disk.
    let line = listed(context, clone)?.unwrap_or_default();
    ensure!(
        line.contains("stopped") && line.contains("first"),
        "the list says: {line}"
    );
    Ok(())
}

/// Expect that each impossible command fails with one line that names the cause.
fn what_cannot_be_is_one_clear_line(context: &Context) -> Result<()> {
    refused(context, &["exec", "nobody", "--", "true"], "nobody")?;
    refused(context, &["stop", "nobody"], "nobody")?;
    refused(
        context,
        &["restore", "nobody", "s", "--genctr", "2"],
        "nobody",
    )?;
    refused(context, &["run", "--kernel", "none", "--", "true"], "none")?;
    refused(
        context,
        &["run", "--add", "/does/not/exist", "--", "true"],
        "/does/not/exist",
    )?;
    refused(
        context,
        &["run", "--icount", "--smp", "2", "--", "true"],
        "--icount",
    )?;
    refused(
        context,
        &["run", "--qemu-arg", "-nonsense", "--", "true"],
        "-nonsense",
    )?;
    refused(
        context,
        &["run", "--cpu", "nonsense", "--", "true"],
        "nonsense",
    )?;
    // Errors in the arguments are also one line, with exit status 2.
    for args in [
        &["run", "--smp", "many"][..],
        &["frobnicate"],
        &["start"],
        &["start", "../up"],
        &["set", "x"],
        &["restore", "x", "y", "--genctr", "-1"],
    ] {
        refused(context, args, "--help")?;
        ensure!(
            output(context, args)?.status.code() == Some(2),
            "vm {args:?}: not 2"
        );
    }
    Ok(())
}

/// Expect that `vm run` fails and shows the console when the guest's kernel panics.
fn a_panic_shows_the_console(context: &Context) -> Result<()> {
    let output = output(
        context,
        &["run", "--", "sh", "-c", "echo c >/proc/sysrq-trigger"],
    )?;
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "it succeeded");
    ensure!(
        err.contains("Kernel panic - not syncing"),
        "it does not show the panic: {err}"
    );
    Ok(())
}

/// Expect that a command in a guest that hangs fails after the timeout, and shows the console.
fn a_hang_ends_within_a_bound(context: &Context) -> Result<()> {
    let name = Named::new(context, "hang");
    ok(context, &["start", &name])?;
    let qemu = qemu_pid(context, &name)?;
    let seconds = scaled_time(Duration::from_secs(5)).as_secs().to_string();
    let mut exec = running(context, &["--timeout", &seconds, "exec", &name])?;
    // No vCPU runs any more, so the guest does not answer.
    kill_process(qemu, Signal::STOP)?;
    let status = exec.wait()?;
    kill_process(qemu, Signal::CONT)?;
    let mut err = String::new();
    exec.stderr
        .take()
        .context("no stderr")?
        .read_to_string(&mut err)?;
    let bound = format!("for {seconds} s");
    ensure!(!status.success() && err.contains(&bound), "{status}: {err}");
    ensure!(
        err.contains("Run /bin/guest as init"),
        "it does not show the console: {err}"
    );
    Ok(())
}

/// Runs the tool with a command that does not end, and waits until the command runs.
fn running(context: &Context, args: &[&str]) -> Result<Child> {
    let script = ["--", "sh", "-c", "echo ready; sleep 1000"];
    let mut child = vm(context, &[args, &script].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().context("no stdout")?).read_line(&mut line)?;
    ensure!(line.trim() == "ready", "the guest says: {line}");
    Ok(child)
}

/// The line of `vm list` about a VM.
fn listed(context: &Context, name: &str) -> Result<Option<String>> {
    let list = ok(context, &["list"])?;
    let line = list
        .lines()
        .find(|line| line.split_whitespace().next() == Some(name));
    Ok(line.map(String::from))
}

/// The process ID of QEMU, from `vm list`.
fn qemu_pid(context: &Context, name: &str) -> Result<Pid> {
    let line = listed(context, name)?.with_context(|| format!("{name} is not in the list"))?;
    let pid = line
        .split_whitespace()
        .nth(3)
        .and_then(|pid| pid.parse().ok());
    pid.and_then(Pid::from_raw)
        .with_context(|| format!("no pid in: {line}"))
}

/// Whether a process runs. A zombie does not.
fn exists(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid()));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// Expect that SIGINT and SIGTERM end the tool, its VM and its QEMU while a command runs, and that
/// SIGINT before that leaves no VM in the list.
fn ctrl_c_leaves_nothing_behind(context: &Context) -> Result<()> {
    for signal in [Signal::INT, Signal::TERM] {
        let mut child = running(context, &["run"])?;
        let name = format!("run-{}", child.id());
        let qemu = qemu_pid(context, &name)?;
        kill_process(Pid::from_child(&child), signal)?;
        let status = child.wait()?;
        ensure!(!status.success(), "{signal:?}: {status}");
        ensure!(
            listed(context, &name)?.is_none(),
            "{signal:?}: it is still in the list"
        );
        ensure!(!exists(qemu), "{signal:?}: QEMU still runs, as {qemu:?}");
    }

    // Also at moments before the command runs.
    for milliseconds in [10, 50, 200, 500, 1000] {
        let mut child = vm(context, &["run", "--", "sleep", "1000"])
            .stderr(Stdio::null())
            .spawn()?;
        thread::sleep(Duration::from_millis(milliseconds));
        kill_process(Pid::from_child(&child), Signal::INT)?;
        let status = child.wait()?;
        let name = format!("run-{}", child.id());
        ensure!(!status.success(), "after {milliseconds} ms: {status}");
        ensure!(
            listed(context, &name)?.is_none(),
            "after {milliseconds} ms: still in the list"
        );
    }
    Ok(())
}

/// Expect that the VM of a tool that was killed is in the list and can be deleted, or that its QEMU
/// has ended.
fn a_killed_tool_leaves_what_list_shows(context: &Context) -> Result<()> {
    let mut child = running(context, &["run"])?;
    let name = format!("run-{}", child.id());
    let qemu = qemu_pid(context, &name)?;
    child.kill()?;
    child.wait()?;
    // The VM may also be gone, if its QEMU is.
    let Some(line) = listed(context, &name)? else {
        ensure!(!exists(qemu), "QEMU runs, and list does not show it");
        return Ok(());
    };
    ensure!(line.contains("running"), "the list says: {line}");
    ok(context, &["delete", &name])?;
    ensure!(
        listed(context, &name)?.is_none(),
        "deleted, and still in the list"
    );
    ensure!(!exists(qemu), "deleted, and QEMU still runs");
    Ok(())
}

/// Expect that added files, kernel parameters, the number of CPUs and arguments of QEMU's reach the
/// guest, and that the module is not loaded with --no-module.
fn files_and_arguments_reach_the_guest(context: &Context) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("file");
    fs::write(&file, "from the host")?;
    let add = format!("{}:/etc/there", file.display());
    let said = ok(
        context,
        &[
            "run",
            "--no-module",
            "--add",
            &add,
            "--append",
            "loglevel=3",
            "--smp",
            "2",
            "--qemu-arg",
            "-device",
            "--qemu-arg",
            "virtio-balloon-pci",
            "--",
            "sh",
            "-c",
            "cat /etc/there; echo; nproc; wc -l </proc/modules; grep -o loglevel=3 /proc/cmdline; \
             cat /sys/bus/virtio/devices/*/device | sort -u | tail -n 1",
        ],
    )?;
    let expected = ["from the host", "2", "0", "loglevel=3", "0x0005"];
    ensure!(said.lines().eq(expected), "the guest says: {said}");
    Ok(())
}
