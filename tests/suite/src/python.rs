// SPDX-License-Identifier: MIT OR Apache-2.0

//! The Python package, in guests with Debian's Python and NumPy. `userspace/python/tests` tests
//! what needs no device.

use crate::{
    age::grow_old,
    changes::Guest,
    clones::two_cpus,
    context::{Context, await_random, driver, wait},
    tests,
};
use anyhow::{Context as _, Result, bail, ensure};
use harness::{Add, Options, Vm};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

tests! {
    [Tiny];
    no_two_clones_draw_the_same (20 min)
    events_come_once_per_restore
    a_device_comes_back
    vmclock_is_a_source
    the_samples_of_the_readme_run
}

const CLONES: u32 = 8;

/// The counter of the guest that is cloned.
const FIRST: u32 = 42;

/// Adds Python, the package, and the programs of tests/python.
fn with_python(context: &Context, options: Options) -> Result<Options> {
    let mut options = Options {
        memory: Some(512),
        ..options
    };
    let folders = [
        (context.host.link("python").join("guest"), ""),
        (
            context.top.join("userspace/python/vmgenid"),
            "/usr/lib/python3/dist-packages/vmgenid",
        ),
        (context.top.join("tests/python"), "/python"),
    ];
    for (host, guest) in folders {
        add(&mut options.add, &host, guest)
            .with_context(|| format!("{}: scripts/python makes it", host.display()))?;
    }
    Ok(options)
}

fn add(files: &mut Vec<Add>, host: &Path, guest: &str) -> Result<()> {
    for entry in fs::read_dir(host)? {
        let host = entry?.path();
        let name = host.file_name().and_then(|name| name.to_str());
        let guest = format!("{guest}/{}", name.context("not a name")?);
        match host.is_dir() {
            true => add(files, &host, &guest)?,
            false => files.push(Add { host, guest }),
        }
    }
    Ok(())
}

/// The draws of a process after the restore.
struct Drawn {
    /// The process and the clone, for a message.
    who: String,
    /// The drawn values, by the name of the function that drew them.
    values: BTreeMap<String, BTreeSet<String>>,
}

impl Drawn {
    fn of(vm: &Vm, file: &str, value: u32) -> Result<Self> {
        let who = format!("{file} in clone {value}");
        let stop = file.trim_end_matches(".child");
        vm.shell(&format!("touch {stop}.stop"))?;
        wait("what Python has drawn", || {
            let there = vm.exec(["test", "-e", file])?.status.success();
            Ok(there.then_some(()))
        })?;
        let mut values = BTreeMap::<_, BTreeSet<_>>::new();
        for line in vm.shell(&format!("cat {file}"))?.lines() {
            let words: Vec<_> = line.split(' ').collect();
            let [name, before, after, ref drawn @ ..] = words[..] else {
                bail!("{who}: not a draw: {line}");
            };
            ensure!(after == value.to_string(), "{who}: {line}");
            // Such a draw may have ended before the restore. Those called "cut" have not.
            if before != after && name != "cut" {
                continue;
            }
            // Each number counts alone: one that is equal is a repetition.
            let values = values.entry(name.to_owned()).or_default();
            values.extend(drawn.iter().map(|&word| word.to_owned()));
        }
        Ok(Self { who, values })
    }
}

/// Starts a program of tests/python, and waits until `count` lines of its output are `line`. Only
/// the test's deadline bounds this: on a busy machine, the import of NumPy takes a minute.
fn start(vm: &Vm, argv: &[&str], log: &str, line: &str, count: usize) -> Result<()> {
    let pid = vm.spawn(["python3"].iter().chain(argv).copied(), log)?;
    let script = format!(
        "while [ $(grep -cx '{line}' {log}) -lt {count} ]; do \
         kill -0 {pid} || {{ cat {log} >&2; exit 1; }}; sleep 0.2; done"
    );
    vm.shell(&script).map(drop)
}

/// Expect that no draw after the restore is in two clones, or in a process and its child. Expect
/// that without the package each function repeats draws, which shows that the test can fail.
fn no_two_clones_draw_the_same(context: &Context) -> Result<()> {
    let mut vm = context.boot(with_python(context, two_cpus())?)?;
    await_random(&vm)?;
    grow_old(&mut vm)?;
    let program = "/python/draws.py";
    let guarded = [program, "/tmp/guarded"];
    start(&vm, &guarded, "/tmp/guarded.log", "drawing", 2)?;
    let plain = [program, "--plain", "/tmp/plain"];
    start(&vm, &plain, "/tmp/plain.log", "drawing", 1)?;
    vm.snapshot(&"s".parse()?)?;

    let (mut guarded, mut plain) = (Vec::new(), Vec::new());
    for value in FIRST + 1..=FIRST + CLONES {
        let clone = vm.clone_from(&"s".parse()?, Some(value), None)?;
        clone.shell("sleep 1")?;
        for file in ["/tmp/guarded", "/tmp/guarded.child"] {
            guarded.push(Drawn::of(&clone, file, value)?);
        }
        plain.push(Drawn::of(&clone, "/tmp/plain", value)?);
    }

    let names: BTreeSet<_> = guarded[0].values.keys().cloned().collect();
    ensure!(names.len() == 14, "what draws: {names:?}");
    let (mut owners, mut draws) = (BTreeMap::new(), 0);
    for drawn in &guarded {
        ensure!(drawn.values.keys().eq(&names), "{} lacks some", drawn.who);
        for (name, values) in &drawn.values {
            draws += values.len();
            for value in values {
                if let Some(other) = owners.insert((name, value), &drawn.who) {
                    bail!("{} has {value} of {name} that {other} has", drawn.who);
                }
            }
        }
    }
    eprintln!("{draws} draws in {CLONES} clones, none twice");

    let [one, others @ ..] = &plain[..] else {
        bail!("no clones");
    };
    for name in names {
        let Some(values) = one.values.get(&name) else {
            continue;
        };
        for other in others {
            let common = values.intersection(&other.values[&name]).count();
            ensure!(
                common > 0,
                "{name} differs without the package in {}",
                other.who
            );
        }
    }
    ensure!(one.values.len() == 12, "plain: {:?}", one.values.keys());
    Ok(())
}

/// Expect that a callback and an asyncio iterator, in a process and in its child, report each
/// restore once: restores of one snapshot, and restores that follow each other.
fn events_come_once_per_restore(context: &Context) -> Result<()> {
    let mut vm = context.boot(with_python(context, two_cpus())?)?;
    let log = "/tmp/events.log";
    start(&vm, &["/python/events.py"], log, ".* waits", 2)?;
    let told = |vm: &Vm, count: usize| -> Result<BTreeSet<String>> {
        let said = |vm: &Vm| vm.shell(&format!("grep -E '^(True|False) ' {log} || true"));
        let lines = wait("the events", || {
            let said = said(vm)?;
            Ok((said.lines().count() >= count).then_some(said))
        })?;
        // No further event comes.
        vm.shell("sleep 1")?;
        let all = said(vm)?;
        ensure!(lines == all, "after {lines} came more: {all}");
        let lines: BTreeSet<_> = lines.lines().map(String::from).collect();
        ensure!(lines.len() == count, "twice the same, or too many: {all}");
        Ok(lines)
    };
    let expected = |values: &[u32]| {
        let mut lines = BTreeSet::new();
        for who in ["True", "False"] {
            lines.insert(format!("{who} waits"));
            for value in values {
                lines.insert(format!("{who} callback {value}"));
                lines.insert(format!("{who} iterator {value}"));
            }
        }
        lines
    };
    let check = |vm: &Vm, values: &[u32]| -> Result<()> {
        let expected = expected(values);
        let lines = told(vm, expected.len())?;
        ensure!(lines == expected, "{lines:?} instead of {expected:?}");
        Ok(())
    };
    check(&vm, &[])?;
    vm.snapshot(&"s".parse()?)?;
    for value in FIRST + 1..=FIRST + CLONES {
        let mut clone = vm.clone_from(&"s".parse()?, Some(value), None)?;
        check(&clone, &[value])?;
        if value == FIRST + 1 {
            clone.snapshot(&"t".parse()?)?;
            let second = clone.clone_from(&"t".parse()?, Some(value + 100), None)?;
            check(&second, &[value, value + 100])?;
            let failures = second.shell(&format!("grep -c '^RuntimeError: fails' {log}"))?;
            ensure!(
                failures.trim() == "4",
                "failures that are logged: {failures}"
            );
        }
    }
    Ok(())
}

/// Expect that a generator draws nothing after a change while the device is unbound, that it
/// continues when the device is bound again, and that a callback is called then. Expect that
/// `/dev/sysgenid` is also a source.
fn a_device_comes_back(context: &Context) -> Result<()> {
    let mut options = with_python(context, Options::default())?;
    options.parameter = vec!["sysgenid=1".into()];
    let guest = Guest::boot(context, options)?;
    let script = format!("cd {} && exec python3 /python/unbound.py", driver());
    guest.check(&["sh", "-c", &script])
}

/// Expect that `/dev/vmclock0` alone is a source: a sequence ends with a change, and a cached value
/// that was made within a second after the change is not used twice.
fn vmclock_is_a_source(context: &Context) -> Result<()> {
    let mut options = with_python(context, crate::microvm::firecracker(Options::default()))?;
    options.no_module = true;
    let load = context.add_ptp_vmclock(&mut options);
    let guest = Guest::boot(context, options)?;
    await_random(&guest.vm)?;
    guest.vm.shell(&load)?;
    guest.check(&["python3", "/python/vmclock.py"])
}

/// Expect that the samples of the package's README run, and that the project's README has the first
/// of them, unchanged.
fn the_samples_of_the_readme_run(context: &Context) -> Result<()> {
    let package = context.top.join("userspace/python/README.md");
    let text = fs::read_to_string(&package)?;
    let is_code = |line: &&str| line.starts_with("    ");
    let lines = text.lines().skip_while(|line| !is_code(line));
    let sample: Vec<_> = lines
        .take_while(|line| line.is_empty() || is_code(line))
        .collect();
    let readme = fs::read_to_string(context.top.join("README.md"))?;
    ensure!(
        sample.len() > 4 && readme.contains(&sample.join("\n")),
        "README.md has another Python program than {}",
        package.display()
    );

    let mut options = with_python(context, two_cpus())?;
    options.add.push(Add {
        host: package,
        guest: "/python/README.md".into(),
    });
    let vm = context.boot(options)?;
    vm.shell("python3 /python/readme.py /python/README.md")
        .map(drop)
}
