// SPDX-License-Identifier: MIT OR Apache-2.0

//! `vmgenid`, the command: its output, and its exit status.

use crate::{
    context::{Context, driver, genctr, wait},
    tests,
};
use anyhow::{Result, ensure};
use harness::{Options, Source, Vm};

tests! {
    get_prints_the_generation
    what_is_wrong_is_said
    wait_ends_only_with_what_was_asked_for
    wait_refuses_what_a_source_cannot_promise
    status_says_why_not
    watch_tells_of_each_restore
    watch_runs_a_command
    a_lesser_source_is_said
}

/// Runs a script, and returns its exit status, its output and its error output.
pub fn run(vm: &Vm, script: &str) -> Result<(u8, String, String)> {
    let output = vm.exec(["sh", "-c", script])?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Ok((
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    ))
}

pub fn expect(vm: &Vm, script: &str, status: u8, stdout: &str, stderr: &str) -> Result<()> {
    let got = run(vm, script)?;
    ensure!(
        got.0 == status && got.1 == stdout && got.2.contains(stderr),
        "{script}: expected {status}, {stdout:?}, and {stderr:?} on standard error: {got:?}"
    );
    // Without an error, nothing is on standard error.
    ensure!(!stderr.is_empty() || got.2.is_empty(), "{script}: {got:?}");
    Ok(())
}

/// Expect that `vmgenid get` prints the generation, also as JSON, for an ordinary user and by a
/// node elsewhere, and that it exits with 3 where there is no counter.
fn get_prints_the_generation(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    expect(&vm, "vmgenid get", 0, "42", "")?;
    let json = r#"{"source":"vmgenid","generation":"42"}"#;
    expect(&vm, "vmgenid get --json", 0, json, "")?;
    expect(&vm, "su nobody -c 'vmgenid get'", 0, "42", "")?;
    vm.set_genctr(u32::MAX)?;
    expect(&vm, "vmgenid get", 0, "4294967295", "")?;
    let elsewhere = "mv /dev/vmgenid /tmp/node && vmgenid get --source vmgenid --device /tmp/node";
    expect(&vm, elsewhere, 0, "4294967295", "")?;
    expect(
        &vm,
        "vmgenid get",
        3,
        "",
        "this machine has no generation counter",
    )
}

/// Expect that each error has its exit status, no output, and a message that names it.
fn what_is_wrong_is_said(context: &Context) -> Result<()> {
    let vm = context.boot(genctr(42))?;
    for (script, status, said) in [
        ("vmgenid", 2, "Usage"),
        ("vmgenid get --device /dev/vmgenid", 2, "--source"),
        ("vmgenid get --source urandom", 2, "urandom"),
        ("vmgenid watch --timeout -1s", 2, "-1"),
        ("vmgenid watch --timeout=-1s", 2, "--timeout"),
        ("vmgenid watch --timeout 5", 2, "time unit needed"),
        ("vmgenid wait", 2, "<--since <N>|--reseeded>"),
        ("vmgenid wait --since x", 2, "--since"),
        (
            "vmgenid wait --reseeded >/dev/full",
            1,
            "cannot write to standard output",
        ),
        (
            "vmgenid get --source vmgenid --device /nonexistent",
            1,
            "cannot open /nonexistent: No such file",
        ),
        (
            "vmgenid get --source sysgenid",
            1,
            "cannot open /dev/sysgenid: No such file",
        ),
        (
            "vmgenid get --source vmgenid --device /dev/zero",
            1,
            "not a usable vmgenid: not a misc device",
        ),
        (
            "chmod 0 /dev/vmgenid; su nobody -c 'vmgenid get'",
            1,
            "cannot open /dev/vmgenid: Permission denied",
        ),
        (
            "vmgenid get >/dev/full",
            1,
            "cannot write to standard output: No space left",
        ),
        (
            &format!("cd {}; echo *[:.]* >unbind; vmgenid watch", driver()),
            3,
            "no /dev/vmgenid, no /dev/vmclock0, no /dev/sysgenid",
        ),
    ] {
        expect(&vm, script, status, "", said)?;
    }
    Ok(())
}

/// Waits until `file` in the guest contains `what`, and returns its content.
pub fn says(vm: &Vm, file: &str, what: &str) -> Result<String> {
    wait(what, || {
        let said = vm.shell(&format!("cat {file} 2>/dev/null || true"))?;
        Ok(said.contains(what).then_some(said))
    })
}

/// Expect that `wait` succeeds in another generation than that of `--since`, with `--reseeded` only
/// from a source that promises a reseed, and that it otherwise ends with a timeout or at an unbind.
fn wait_ends_only_with_what_was_asked_for(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    expect(&vm, "vmgenid wait --reseeded", 0, "42", "")?;
    expect(&vm, "vmgenid wait --since 41", 0, "42", "")?;
    let json = r#"{"source":"vmgenid","generation":"42","reseeded":true}"#;
    expect(&vm, "vmgenid wait --reseeded --json --since 7", 0, json, "")?;
    let late = "vmgenid wait --reseeded --since 42 --timeout 200ms";
    expect(&vm, late, 4, "", "no restore in 200ms")?;

    let wait = r#"vmgenid wait --reseeded --since 42 --json; echo "status $?""#;
    vm.spawn(["sh", "-c", wait], "/tmp/wait")?;
    vm.spawn(["sh", "-c", wait], "/tmp/gone")?;
    vm.shell("sleep 1")?;
    vm.snapshot(&"s".parse()?)?;
    let clone = vm.clone_from(&"s".parse()?, Some(43), None)?;
    let said = says(&clone, "/tmp/wait", "status 0")?;
    let json = r#"{"source":"vmgenid","generation":"43","reseeded":true}"#;
    ensure!(said.contains(json), "it says {said}");
    let before = vm.shell("cat /tmp/wait")?;
    ensure!(before.is_empty(), "without a restore it says {before}");

    vm.shell(&format!("cd {}; echo *[:.]* >unbind", driver()))?;
    let said = says(&vm, "/tmp/gone", "status 1")?;
    ensure!(said.contains("was unbound"), "it says {said}");
    expect(
        &vm,
        "vmgenid wait --reseeded",
        3,
        "",
        "no generation counter",
    )
}

/// Expect that `wait --reseeded` refuses a source that cannot promise a reseed, unless the source
/// has changed after the reseed, and that `wait` warns of a source that is late.
fn wait_refuses_what_a_source_cannot_promise(context: &Context) -> Result<()> {
    let mut options = Options {
        source: Source::Vmclock,
        no_module: true,
        ..genctr(42)
    };
    let load = context.add_ptp_vmclock(&mut options);
    let vm = context.boot(options)?;
    vm.shell(&load)?;
    let refused = "the source is vmclock0: it cannot promise that the kernel was reseeded";
    expect(&vm, "vmgenid wait --reseeded --since 41", 5, "", refused)?;
    let soon = "the kernel may be reseeded some milliseconds after";
    expect(&vm, "vmgenid wait --since 41", 0, "42", soon)?;
    let json = r#"{"source":"vmclock0","generation":"42","reseeded":false}"#;
    expect(&vm, "vmgenid wait --since 41 --json", 0, json, soon)?;

    vm.shell("insmod /vmgenid.ko sysgenid=1")?;
    let source = "vmgenid wait --source sysgenid --reseeded";
    let refused = "the source is sysgenid: it cannot promise";
    expect(&vm, source, 5, "", refused)?;
    // /dev/sysgenid changes after the reseed, so its change is the promise.
    let late = "a restore is seen some milliseconds late";
    expect(&vm, &format!("{source} --since 0"), 0, "1", late)
}

/// Expect that `status` names the cause, and that its exit status tells whether there is a source.
fn status_says_why_not(context: &Context) -> Result<()> {
    let status = |vm: &Vm, script: &str, code: u8, lines: &[&str]| -> Result<()> {
        let got = run(vm, script)?;
        let all = lines
            .iter()
            .all(|line| got.1.lines().any(|got| got.contains(line)));
        ensure!(
            got.0 == code && all,
            "{script}: expected {code}, {lines:?}: {got:?}"
        );
        Ok(())
    };
    let vm = context.boot(genctr(42))?;
    let name = harness::kernel::driver(&harness::kernel::default());
    let fine = [
        &format!("module: {name}"),
        "/dev/vmgenid (mode 0444): generation 42, a read is a barrier",
        "/dev/vmclock0: No such file",
        "used: vmgenid",
        "renewed: unknown: there is no /var/lib/vmgenid/renewed",
    ];
    status(&vm, "vmgenid status", 0, &fine)?;
    let json = r#""source":"vmgenid","sources":[{"source":"vmgenid","path":"/dev/vmgenid","mode":"0444","generation":"42","barrier":true"#;
    status(&vm, "vmgenid status --json", 0, &[json])?;
    status(
        &vm,
        "chmod 0 /dev/vmgenid; su nobody -c 'vmgenid status'",
        3,
        &["/dev/vmgenid (mode 0000): Permission denied", "used: none"],
    )?;
    status(
        &vm,
        &format!("rmmod {name}; vmgenid status"),
        3,
        &["module: not loaded: modprobe", "/dev/vmgenid: No such file"],
    )?;
    let vm = context.boot(Options {
        no_device: true,
        no_module: true,
        genctr: None,
        ..Options::default()
    })?;
    let none = "module: not loaded: the hypervisor gives this machine no generation ID";
    status(&vm, "vmgenid status", 3, &[none])
}

/// Expect that `watch` prints each restore with the generations before and after it, as text and as
/// JSON, and that it says when the device was unbound.
fn watch_tells_of_each_restore(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    vm.spawn(["vmgenid", "watch"], "/tmp/plain")?;
    vm.spawn(["vmgenid", "watch", "--json"], "/tmp/json")?;
    let timeout = "vmgenid watch --timeout 200ms";
    expect(&vm, timeout, 0, "", "watching vmgenid, generation 42")?;
    for file in ["/tmp/plain", "/tmp/json"] {
        says(&vm, file, "watching vmgenid, generation 42")?;
    }

    // Restores of one snapshot, and one of another one. Each clone prints the change that it saw.
    vm.snapshot(&"first".parse()?)?;
    let mut clone = vm.clone_from(&"first".parse()?, Some(50), None)?;
    let lines = ["restored: generation 42 -> 50", r#""from":"42","to":"50"}"#];
    says(&clone, "/tmp/plain", lines[0])?;
    says(&clone, "/tmp/json", lines[1])?;
    clone.snapshot(&"second".parse()?)?;
    let second = clone.clone_from(&"second".parse()?, Some(60), None)?;
    let said = says(&second, "/tmp/plain", "restored: generation 50 -> 60")?;
    ensure!(said.lines().count() == 3, "it says {said}");
    let said = says(&second, "/tmp/json", r#""from":"50","to":"60"}"#)?;
    for line in said.lines().skip(1) {
        ensure!(
            line.starts_with(r#"{"source":"vmgenid","time":"#) && line.ends_with('}'),
            "not JSON: {line}"
        );
    }

    // The device is unbound.
    vm.shell(&format!("cd {}; echo *[:.]* >unbind", driver()))?;
    says(
        &vm,
        "/tmp/plain",
        "vmgenid: the device of the generation counter was unbound",
    )?;
    Ok(())
}

/// Expect that `watch` runs a command at a change, with both generations in its environment, that
/// it reports a command that fails, also where its own output cannot be written, and that it runs
/// the command once more for changes that came meanwhile.
fn watch_runs_a_command(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    let command = "echo ran $VMGENID_SOURCE $VMGENID_FROM $VMGENID_TO; sleep 1; false";
    vm.spawn(["vmgenid", "watch", "--exec", command], "/tmp/exec")?;
    let once =
        r#"vmgenid watch --once --exec 'exit 7' >/tmp/once 2>&1; echo "status $?" >>/tmp/once"#;
    vm.spawn(["sh", "-c", once], "/dev/null")?;
    let killed = r#"vmgenid watch --once --exec 'kill -9 $$'; echo "status $?""#;
    vm.spawn(["sh", "-c", killed], "/tmp/killed")?;
    // The output cannot be written. The command is run nevertheless.
    let full = "vmgenid watch --timeout 1000years --exec 'echo ran >/tmp/full.ran' >/dev/full";
    vm.spawn(["sh", "-c", full], "/tmp/full")?;
    for file in ["/tmp/exec", "/tmp/once", "/tmp/killed", "/tmp/full"] {
        says(&vm, file, "watching vmgenid, generation 42")?;
    }
    vm.set_genctr(43)?;
    says(&vm, "/tmp/exec", "ran vmgenid 42 43")?;
    says(&vm, "/tmp/once", "status 7")?;
    says(&vm, "/tmp/killed", "status 137")?;
    says(&vm, "/tmp/full", "cannot write to standard output")?;
    says(&vm, "/tmp/full.ran", "ran")?;
    // These changes come while the command runs: it is run once more, for the last of them.
    vm.set_genctr(44)?;
    vm.set_genctr(45)?;
    let said = says(&vm, "/tmp/exec", "45")?;
    ensure!(
        said.contains("exit status: 1"),
        "a failure is not said: {said}"
    );
    says(&vm, "/tmp/exec", "-> 45\nran vmgenid")?;
    Ok(())
}

/// Expect that `get` and `watch` use `/dev/sysgenid` where the hypervisor gives no counter, and
/// that a message says that it is late.
fn a_lesser_source_is_said(context: &Context) -> Result<()> {
    let options = Options {
        no_module: true,
        no_genctr: true,
        ..Options::default()
    };
    let mut vm = context.boot(options)?;
    vm.shell("insmod /vmgenid.ko sysgenid=1")?;
    let late = "the source is sysgenid: a restore is seen some milliseconds late";
    // The driver has counted the first ID.
    expect(&vm, "vmgenid get", 0, "1", late)?;
    let json = r#"{"source":"sysgenid","generation":"1"}"#;
    expect(&vm, "vmgenid get --json", 0, json, late)?;

    // This source needs no counter of the hypervisor's.
    vm.spawn(["vmgenid", "watch"], "/tmp/watch")?;
    says(&vm, "/tmp/watch", "watching sysgenid, generation 1")?;
    vm.snapshot(&"s".parse()?)?;
    let clone = vm.clone_from(&"s".parse()?, None, None)?;
    says(&clone, "/tmp/watch", "restored: generation 1 -> 2")?;
    expect(&clone, "vmgenid get", 0, "2", late)?;
    expect(&vm, "vmgenid get", 0, "1", late)
}
