// SPDX-License-Identifier: MIT OR Apache-2.0

//! After each restore, `vmgenid watch --state` runs its command, and `vmgenid renew` runs the
//! hooks, until they have succeeded once, also where a program is stopped, fails or is cloned
//! meanwhile.

use crate::{
    command::{expect, run, says},
    context::{Context, driver, genctr, lines, wait},
    tests,
};
use anyhow::{Result, ensure};
use harness::Vm;

tests! {
    a_restore_without_a_watcher_is_found
    a_command_that_fails_is_run_again
    a_state_file_that_cannot_be_right_is_no_reason_to_do_nothing
    the_device_goes_and_comes_back
    hooks_run_once_and_until_they_succeed
    a_clone_of_a_running_hook_runs_all_hooks
    hooks_run_even_if_that_cannot_be_recorded
}

const STATE: &str = "/tmp/state";

/// One pass of a watcher: it ends when there is nothing to do.
const WATCH: &str = "vmgenid watch --state /tmp/state --timeout 100ms";

/// Checks for which generations a command ran, in this order.
fn ran(vm: &Vm, expected: &[&str]) -> Result<()> {
    let ran = lines(vm, "cat /tmp/ran 2>/dev/null || true")?;
    ensure!(ran == expected, "expected {expected:?}, ran for {ran:?}");
    Ok(())
}

/// Runs a script, which has to succeed. Returns its output and its error output.
fn passes(vm: &Vm, script: &str) -> Result<String> {
    let got = run(vm, script)?;
    ensure!(got.0 == 0, "{script}: {got:?}");
    Ok(got.1 + &got.2)
}

/// Expect that a restore that came while no watcher ran is found when one starts, once, in each clone.
fn a_restore_without_a_watcher_is_found(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    let watch = format!("{WATCH} --exec 'echo $VMGENID_FROM $VMGENID_TO >>/tmp/ran'");
    passes(&vm, &watch)?;
    ran(&vm, &[])?;
    vm.snapshot(&"s".parse()?)?;
    for value in ["50", "51"] {
        let clone = vm.clone_from(&"s".parse()?, Some(value.parse()?), None)?;
        let said = passes(&clone, &watch)?;
        ensure!(
            said.contains(&format!("restored: generation 42 -> {value}")),
            "the watcher says {said}"
        );
        passes(&clone, &watch)?;
        ran(&clone, &[&format!("42 {value}")])?;
    }
    passes(&vm, &watch)?;
    ran(&vm, &[])
}

/// Expect that a command that fails is run again, also by the next watcher, and not after it has
/// succeeded.
fn a_command_that_fails_is_run_again(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    let watch = "vmgenid watch --state /tmp/state --exec \
        'echo tried; test -e /tmp/ok && echo $VMGENID_FROM $VMGENID_TO >>/tmp/ran'";
    let start = format!("({watch}) >>/tmp/log 2>&1 & echo $! >/tmp/pid");
    vm.spawn(["sh", "-c", &start], "/dev/null")?;
    says(&vm, "/tmp/log", "watching")?;
    vm.set_genctr(43)?;
    says(&vm, "/tmp/log", "tried")?;
    let said = says(&vm, "/tmp/log", "tried\nvmgenid: echo tried;")?;
    ensure!(said.contains("exit status: 1"), "it says {said}");
    wait("the second try", || {
        let tries = vm.shell("grep -c '^tried' /tmp/log")?;
        Ok((tries.trim().parse::<u32>()? > 1).then_some(()))
    })?;
    let due = vm.shell(&format!("cat {STATE}"))?;
    ensure!(due.contains(r#""due":true"#), "the state is {due}");
    vm.shell("killall -9 vmgenid && touch /tmp/ok")?;
    ran(&vm, &[])?;

    vm.spawn(["sh", "-c", &start], "/dev/null")?;
    says(&vm, "/tmp/ran", "42 43")?;
    vm.set_genctr(44)?;
    says(&vm, "/tmp/ran", "43 44")?;
    ran(&vm, &["42 43", "43 44"])
}

/// Expect that a damaged state counts as a restore, that a state of another boot or source runs the
/// command only where a restore or a due command says so, that a file which is no state stays as it
/// is, and that a state that cannot be written is an error at the start.
fn a_state_file_that_cannot_be_right_is_no_reason_to_do_nothing(context: &Context) -> Result<()> {
    let vm = context.boot(genctr(42))?;
    let watch = format!("{WATCH} --exec 'echo \"$VMGENID_FROM\" $VMGENID_TO >>/tmp/ran'");
    let clean = |vm: &Vm| vm.shell("rm -f /tmp/ran");
    passes(&vm, &watch)?;
    vm.shell(&format!("cp {STATE} /tmp/good"))?;
    for damage in [
        "true",
        "head -c 40 /tmp/good",
        "head -c 100 /dev/zero",
        "sed s/42/x/ /tmp/good | head -c 90",
        r#"sed 's/"vmgenid":1/"vmgenid":2/' /tmp/good"#,
    ] {
        let said = passes(&vm, &format!("{damage} >{STATE}; {watch}"))?;
        ensure!(
            said.contains("the state file is damaged") && said.contains("generation unknown -> 42"),
            "{damage}: it says {said}"
        );
        passes(&vm, &watch)?;
        ran(&vm, &[" 42"])?;
        clean(&vm)?;
    }

    // The state of an earlier boot: a hypervisor's counter keeps its value, and a command that was
    // due is still due.
    let boot = r#"sed 's/"boot":"[^"]*"/"boot":"another"/'"#;
    for (script, expected) in [
        (format!("{boot} /tmp/good"), vec![]),
        (
            format!("{boot} /tmp/good | sed 's/\"due\":false/\"due\":true/'"),
            vec!["42 42"],
        ),
        (format!("{boot} /tmp/good | sed s/42/41/g"), vec!["41 42"]),
        (
            "sed 's/\"source\":\"vmgenid\"/\"source\":\"vmclock\"/' /tmp/good".into(),
            vec!["42 42"],
        ),
    ] {
        passes(&vm, &format!("{script} >{STATE}; {watch}; {watch}"))?;
        ran(&vm, &expected)?;
        clean(&vm)?;
    }

    vm.shell("cp /etc/passwd /tmp/foreign; mkdir /tmp/ro; mount -t tmpfs -o ro ro /tmp/ro")?;
    for (file, why) in [
        (
            "/tmp/foreign",
            "/tmp/foreign is not a state file of vmgenid",
        ),
        ("/tmp", "cannot read /tmp: Is a directory"),
        ("/tmp/ro/state", "cannot write /tmp/ro/state"),
        ("/tmp/none/state", "cannot write /tmp/none/state"),
    ] {
        let script = format!("vmgenid watch --state {file} --timeout 100ms");
        expect(&vm, &script, 1, "", why)?;
    }
    passes(&vm, "cmp /etc/passwd /tmp/foreign").map(drop)
}

/// Expect that a watcher ends when the device does, and that the next one finds the restore that came
/// in between.
fn the_device_goes_and_comes_back(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    let watch = "while :; do vmgenid watch --state /tmp/state \
        --exec 'echo $VMGENID_FROM $VMGENID_TO >>/tmp/ran'; sleep 0.2; done";
    vm.spawn(["sh", "-c", watch], "/tmp/log")?;
    says(&vm, "/tmp/log", "watching")?;
    let device = vm.shell(&format!("cd {}; echo *[:.]*", driver()))?;
    let device = device.trim();
    vm.shell(&format!("cd {}; echo {device} >unbind", driver()))?;
    says(&vm, "/tmp/log", "was unbound")?;
    says(&vm, "/tmp/log", "no generation counter")?;
    vm.set_genctr(43)?;
    ran(&vm, &[])?;
    vm.shell(&format!("cd {}; echo {device} >bind", driver()))?;
    says(&vm, "/tmp/ran", "42 43")?;
    // Without a restore in between, nothing happens.
    vm.shell(&format!(
        "cd {0}; echo {device} >unbind; sleep 1; echo {device} >bind",
        driver()
    ))?;
    vm.set_genctr(44)?;
    says(&vm, "/tmp/ran", "43 44")?;
    ran(&vm, &["42 43", "43 44"])
}

/// Makes hooks in the guest, each with a name and a script. A hook writes its name down before it
/// runs the script.
fn hooks(vm: &Vm, dir: &str, hooks: &[(&str, &str)]) -> Result<()> {
    vm.shell(&format!("mkdir -p {dir}"))?;
    for (name, script) in hooks {
        let script =
            format!("#!/bin/sh\necho {name} $VMGENID_FROM $VMGENID_TO >>/tmp/ran\n{script}\n");
        let output = vm
            .command([
                "sh",
                "-c",
                &format!("cat >'{dir}/{name}'; chmod +x '{dir}/{name}'"),
            ])
            .input(script.as_bytes())?
            .output()?;
        ensure!(output.status.success(), "cannot make the hook {name}");
    }
    Ok(())
}

/// Expect that the hooks run in order, each until it has succeeded once, that a hook that hangs is
/// killed with its children, and that a file which is no hook is named and does not run.
fn hooks_run_once_and_until_they_succeed(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    hooks(
        &vm,
        "/tmp/etc",
        &[
            ("50-last", ""),
            ("10-first", ""),
            ("20-fails", "test -e /tmp/ok || exit 7"),
            (
                "30-hangs",
                "test -e /tmp/ok && exit; trap '' TERM; sleep 7777 & sleep 8888",
            ),
            ("35-dies", "test -e /tmp/ok || kill -9 $$"),
            ("40-writes", "head -c 3000000 /dev/zero | tr '\\0' x"),
            ("60-old~", ""),
            ("60-old.dpkg-old", ""),
            (".60-old.swp", ""),
            ("70-plain", ""),
            ("80-hidden", ""),
        ],
    )?;
    hooks(&vm, "/tmp/usr", &[("80-hidden", ""), ("45-usr", "")])?;
    vm.shell(
        "cd /tmp/etc; chmod -x 70-plain; ln -sf /dev/null 80-hidden; mkdir 81-folder; \
         ln -s /nowhere 82-link; printf 'no interpreter' >83-text; chmod +x 83-text; \
         printf '#!/nowhere\\n' >84-text; chmod +x 84-text",
    )?;
    let renew = "vmgenid renew --state /tmp/state --hook-timeout 3s --tries 2 \
        /tmp/etc /tmp/usr /tmp/none 2>/tmp/log >/tmp/out";
    passes(&vm, renew)?;
    ran(&vm, &[])?;

    vm.set_genctr(43)?;
    let got = run(&vm, renew)?;
    let log = vm.shell("cat /tmp/log")?;
    ensure!(got.0 == 1, "{got:?}, {log}");
    for line in [
        "20-fails: exit status: 7",
        "30-hangs: killed after 3s",
        "35-dies: signal: 9",
        "60-old~: not run: its name",
        "60-old.dpkg-old: not run: its name",
        ".60-old.swp: not run: its name",
        "70-plain: not run: not executable",
        "80-hidden: not run: not a file",
        "81-folder: not run: not a file",
        "82-link: not run: a link that leads nowhere",
        "83-text: cannot run it: Exec format error",
        "84-text: cannot run it: No such file",
        "failed 2 times: 20-fails, 30-hangs, 35-dies, 83-text, 84-text",
    ] {
        ensure!(log.contains(line), "no {line:?} in {log}");
    }
    let left = vm.shell("ps | grep -c '[7]777\\|[8]888' || true")?;
    ensure!(left.trim() == "0", "{left} children of a hook are left");
    let out = vm.shell("stat -c %s /tmp/out")?;
    ensure!(out.trim() == "3000000", "the output has {out} bytes");
    let twice = ["20-fails", "30-hangs", "35-dies"].map(|name| format!("{name} 42 43"));
    let once = ["40-writes", "45-usr", "50-last"].map(|name| format!("{name} 42 43"));
    let mut all = vec!["10-first 42 43"];
    all.extend(twice.iter().map(String::as_str));
    all.extend(once.iter().map(String::as_str));
    all.extend(twice.iter().map(String::as_str));
    ran(&vm, &all)?;
    let status = run(&vm, "vmgenid status --state /tmp/state")?;
    ensure!(
        status.0 == 4
            && status.1.contains("renewed: no, generation 43")
            && status.1.contains("10-first: done")
            && status.1.contains("20-fails: exit status: 7"),
        "the status is {status:?}"
    );

    vm.shell("touch /tmp/ok; rm /tmp/etc/8?-text")?;
    passes(&vm, renew)?;
    all.extend(twice.iter().map(String::as_str));
    ran(&vm, &all)?;
    passes(&vm, renew)?;
    ran(&vm, &all)?;
    let status = run(&vm, "vmgenid status --state /tmp/state")?;
    ensure!(
        status.0 == 0 && status.1.contains("renewed: yes, generation 43"),
        "the status is {status:?}"
    );
    vm.set_genctr(44)?;
    let status = run(&vm, "vmgenid status --state /tmp/state")?;
    ensure!(
        status.0 == 4,
        "nothing has run since the restore: {status:?}"
    );
    Ok(())
}

/// Expect that a clone of a machine in which a hook is running, or has failed and is to run again, runs
/// all hooks for its own generation.
fn a_clone_of_a_running_hook_runs_all_hooks(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    let slow = "i=0; while [ $i -lt 30 ]; do sleep 0.1; i=$((i + 1)); done";
    hooks(
        &vm,
        "/tmp/etc",
        &[("10-first", ""), ("20-slow", slow), ("30-last", "")],
    )?;
    hooks(
        &vm,
        "/tmp/fails",
        &[("10-first", ""), ("20-fails", "test $VMGENID_TO != 43")],
    )?;
    let renew = "vmgenid renew --state /tmp/state /tmp/etc";
    let fails = "vmgenid renew --state /tmp/state-fails --tries 100 /tmp/fails";
    passes(&vm, &format!("{renew} && {fails}"))?;
    vm.set_genctr(43)?;
    vm.spawn(["sh", "-c", fails], "/tmp/log-fails")?;
    says(&vm, "/tmp/log-fails", "again in 8 s")?;
    vm.shell("rm /tmp/ran")?;
    vm.spawn(["sh", "-c", renew], "/tmp/log")?;
    says(&vm, "/tmp/ran", "20-slow 42 43")?;
    vm.snapshot(&"s".parse()?)?;
    for value in ["50", "51"] {
        let clone = vm.clone_from(&"s".parse()?, Some(value.parse()?), None)?;
        says(
            &clone,
            "/tmp/log",
            &format!("renewed in generation {value}"),
        )?;
        says(
            &clone,
            "/tmp/log-fails",
            &format!("renewed in generation {value}"),
        )?;
        let ran = lines(&clone, "cat /tmp/ran")?;
        for hook in ["10-first", "20-slow", "30-last"] {
            let line = format!("{hook} 42 {value}");
            ensure!(ran.contains(&line), "no {line:?} among {ran:?}");
            let count = ran
                .iter()
                .filter(|ran| ran.starts_with(&format!("{hook} 42 {value}")))
                .count();
            ensure!(
                hook == "10-first" || count == 1,
                "{line:?} is there {count} times: {ran:?}"
            );
        }
        ensure!(
            ran.iter().filter(|ran| ran.starts_with("10-first")).count() == 3
                && !ran.contains(&"30-last 42 43".into()),
            "in the clone ran {ran:?}"
        );
    }
    says(&vm, "/tmp/log", "renewed in generation 43")?;
    Ok(())
}

/// Expect that hooks run where their success cannot be recorded, and that this is an error.
fn hooks_run_even_if_that_cannot_be_recorded(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    hooks(&vm, "/tmp/etc", &[("10-first", "")])?;
    vm.shell("mkdir /tmp/dir; mount -t tmpfs dir /tmp/dir")?;
    let renew = "vmgenid renew --state /tmp/dir/state /tmp/etc";
    passes(&vm, renew)?;
    vm.set_genctr(43)?;
    vm.shell("mount -o remount,ro /tmp/dir")?;
    expect(
        &vm,
        renew,
        1,
        "",
        "cannot write /tmp/dir/state: Read-only file system",
    )?;
    ran(&vm, &["10-first 42 43"])?;
    vm.shell("mount -o remount,rw /tmp/dir")?;
    passes(&vm, renew)?;
    passes(&vm, renew)?;
    ran(&vm, &["10-first 42 43", "10-first 42 43"])
}
