// SPDX-License-Identifier: MIT OR Apache-2.0

//! The C header, tested by a program that includes it; the output of the crate's generators in
//! clones of a snapshot that was taken in the middle of a draw; the crate's examples.

use crate::{
    On, Trial,
    age::grow_old,
    changes::Guest,
    clones::two_cpus,
    context::{Context, await_random, driver, freeze, wait},
    promises,
    shared::Shared,
    tests,
};
use anyhow::{Context as _, Result, bail, ensure};
use harness::{Add, Options, Vm};
use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
};

tests! {
    no_clone_continues_the_stream_of_another (20 min)
    without_the_device_clones_repeat_themselves
    no_clone_continues_an_example_as_another
}

/// The header's tests, in processes of 64 and of 32 bits, share a guest.
pub fn trials() -> Result<Vec<Trial>> {
    let shared = Shared::new();
    let names = promises::list(&Context::new()?, "header", &[])?;
    let trial = |program: &str, name: &str, on| {
        let boot = |context: &Context| Guest::boot(context, Options::default());
        // The environment has the files that the program needs to unbind the device.
        let script = format!(
            "cd {} && DEVICE=$(basename *[:.]*) BIND=$PWD/bind UNBIND=$PWD/unbind exec {program} {name}",
            driver()
        );
        let name = format!("library::{program}::{name}");
        shared.trial(name, on, boot, move |guest| {
            guest.check(&["sh", "-c", &script])
        })
    };
    let mut trials = Vec::new();
    for program in ["header", "header32"] {
        // The machines of arm64 kernels have no 32-bit programs.
        let more: &[On] = match program {
            "header32" => &[On::NotArm64],
            _ => &[],
        };
        trials.extend(
            names
                .iter()
                .map(|(name, on)| trial(program, name, [on, more].concat())),
        );
    }
    Ok(trials)
}

const CLONES: u32 = 8;

/// The counter of the guest that is cloned.
const FIRST: u32 = 42;

/// One draw of `contract stream`.
struct Draw {
    thread: u32,
    number: u32,
    /// The generation that was seen before it, and after.
    before: u32,
    after: u32,
    /// Its first and its last bytes.
    ends: [String; 2],
}

impl FromStr for Draw {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let words: Vec<_> = line.split(' ').collect();
        let [thread, number, before, after, first, last] = words[..] else {
            bail!("not a draw: {line}");
        };
        ensure!(
            first.len() == 32 && last.len() == 32,
            "not 16 bytes: {line}"
        );
        Ok(Self {
            thread: thread.parse()?,
            number: number.parse()?,
            before: before.parse()?,
            after: after.parse()?,
            ends: [first.into(), last.into()],
        })
    }
}

/// A process that draws, by its output file.
struct Stream {
    out: String,
    threads: u32,
}

impl Stream {
    fn start(vm: &Vm, threads: u32, more: &[&str]) -> Result<Self> {
        let out = format!("/tmp/stream-{threads}");
        let log = format!("{out}.err");
        let count = threads.to_string();
        let argv = ["contract", "stream", "--out", &out, "--threads", &count];
        vm.spawn(argv.iter().chain(more).copied(), &log)?;
        wait("the threads draw", || {
            let said = vm.shell(&format!("cat {log}"))?;
            match said.trim() {
                "" => Ok(None),
                "drawing" => Ok(Some(())),
                other => bail!("the threads say: {other}"),
            }
        })?;
        Ok(Self { out, threads })
    }

    /// Stops the process, and returns all its draws.
    fn end(&self, vm: &Vm) -> Result<Vec<Draw>> {
        let Self { out, .. } = self;
        vm.shell(&format!("touch {out}.stop"))?;
        wait("the draws", || {
            let there = vm.exec(["test", "-e", out])?.status.success();
            let said = vm.shell(&format!("cat {out}.err"))?;
            ensure!(said.trim() == "drawing", "the threads say: {said}");
            Ok(there.then_some(()))
        })?;
        let draws: Result<Vec<Draw>> = vm
            .shell(&format!("cat {out}"))?
            .lines()
            .map(str::parse)
            .collect();
        let draws = draws?;
        let threads: BTreeSet<_> = draws.iter().map(|draw| draw.thread).collect();
        ensure!(
            threads.len() == self.threads as usize,
            "threads: {threads:?}"
        );
        Ok(draws)
    }
}

/// Expect that draws which ended after the restore have neither their first nor their last bytes in
/// common, in all threads of all clones. Each draw is so long that the snapshot comes in the middle
/// of a draw of each thread that runs.
fn no_clone_continues_the_stream_of_another(context: &Context) -> Result<()> {
    let mut vm = context.boot(two_cpus())?;
    await_random(&vm)?;
    grow_old(&mut vm)?;
    let streams = [Stream::start(&vm, 1, &[])?, Stream::start(&vm, 4, &[])?];
    freeze(&mut vm, &"s".parse()?)?;

    let mut seen = BTreeMap::new();
    let (mut across, mut later) = (0, 0);
    for value in FIRST + 1..=FIRST + CLONES {
        let clone = vm.clone_from(&"s".parse()?, Some(value), None)?;
        clone.shell("sleep 1")?;
        for stream in &streams {
            let draws = stream.end(&clone)?;
            for thread in 0..stream.threads {
                let mut own = draws.iter().filter(|draw| draw.thread == thread);
                ensure!(
                    own.any(|draw| draw.after == value),
                    "thread {thread} of {} drew nothing in clone {value}",
                    stream.out
                );
            }
            for draw in draws.iter().filter(|draw| draw.after != FIRST) {
                let (thread, number) = (draw.thread, draw.number);
                let who = format!(
                    "draw {number} of thread {thread} of {} in clone {value}",
                    stream.out
                );
                ensure!(draw.after == value, "{who} saw {}", draw.after);
                match draw.before {
                    FIRST => across += 1,
                    _ => later += 1,
                }
                for end in &draw.ends {
                    if let Some(other) = seen.insert(end.clone(), who.clone()) {
                        bail!("{who} has bytes of {other}");
                    }
                }
            }
        }
    }
    eprintln!("{across} draws across the restore, {later} after it, in {CLONES} clones");
    // A thread that was not between two draws was in the middle of one.
    ensure!(across > 0, "no draw was cut by the snapshot");
    Ok(())
}

/// Expect that without the device two clones draw the same, and that a program which demands a
/// counter is refused. This shows that the test above can fail.
fn without_the_device_clones_repeat_themselves(context: &Context) -> Result<()> {
    let options = Options {
        no_device: true,
        // `vmgenctr` does not load where there is no device.
        no_module: true,
        genctr: None,
        ..two_cpus()
    };
    let mut vm = context.boot(options)?;
    await_random(&vm)?;
    let stream = Stream::start(&vm, 1, &["--forks-only"])?;
    vm.snapshot(&"s".parse()?)?;
    let clones: Result<Vec<_>> = (0..2)
        .map(|_| {
            let clone = vm.clone_unchecked(&"s".parse()?, vm.options()?, None)?;
            clone.shell("sleep 1")?;
            stream.end(&clone)
        })
        .collect();
    let clones = clones?;
    // The draws before the snapshot are the same in any case. The last draw that both clones have
    // was made after it.
    let last = clones.iter().map(Vec::len).min().context("no clones")?;
    ensure!(last > 1, "nothing was drawn");
    let [one, other] = [0, 1].map(|n| &clones[n][last - 1].ends);
    ensure!(
        one == other,
        "they differ without the device: {one:?}, {other:?}"
    );
    let refused = vm.exec(["contract", "stream", "--out", "/tmp/refused"])?;
    let said = String::from_utf8_lossy(&refused.stdout).into_owned();
    ensure!(
        !refused.status.success() && said.contains("no generation counter"),
        "a program that demands a counter: {said}"
    );
    Ok(())
}

/// A generator that does not detect restores.
const UNGUARDED: &str =
    "exec awk 'BEGIN { srand(1); for (;;) { print rand(); fflush(); system(\"sleep 1\") } }'";

/// Expect that examples of the crate print different lines in each clone, that an unguarded generator
/// prints the same ones, and that the example for tokio prints the new generation.
fn no_clone_continues_an_example_as_another(context: &Context) -> Result<()> {
    let add = |name| Add {
        host: context.program(&format!("examples/{name}")),
        guest: format!("/bin/example-{name}"),
    };
    let options = Options {
        add: ["rand", "uuid_pool", "tokio"].map(add).into(),
        ..two_cpus()
    };
    let mut vm = context.boot(options)?;
    await_random(&vm)?;
    vm.spawn(["example-tokio"], "/tmp/tokio")?;
    let programs = [
        ("/tmp/rand", "exec example-rand"),
        ("/tmp/uuid_pool", "exec example-uuid_pool"),
        ("/tmp/unguarded", UNGUARDED),
    ];
    let printed = |vm: &Vm, log: &str, at_least| {
        wait(log, || {
            let lines = vm.shell(&format!("cat {log}"))?;
            let lines: Vec<_> = lines.lines().map(str::to_owned).collect();
            Ok((lines.len() >= at_least).then_some(lines))
        })
    };
    let mut stopped = Vec::new();
    for (log, program) in programs {
        let pid = vm.spawn(["sh", "-c", program], log)?;
        printed(&vm, log, 2)?;
        // The program is stopped, so that it is known which lines come after the restore.
        vm.shell(&format!("kill -STOP {pid}"))?;
        stopped.push((log, pid, printed(&vm, log, 2)?.len()));
    }
    let first = printed(&vm, "/tmp/tokio", 1)?;
    ensure!(
        first == [format!("generation {FIRST}")],
        "tokio says {first:?}"
    );
    vm.snapshot(&"s".parse()?)?;

    let mut clones = Vec::new();
    for value in [FIRST + 1, FIRST + 2] {
        let clone = vm.clone_from(&"s".parse()?, Some(value), None)?;
        let second = printed(&clone, "/tmp/tokio", 2)?;
        ensure!(
            second[1..] == [format!("restored: generation {value}")],
            "tokio says {second:?} in clone {value}"
        );
        let mut after = BTreeMap::new();
        for (log, pid, before) in &stopped {
            clone.shell(&format!("kill -CONT {pid}"))?;
            let lines = printed(&clone, log, before + 3)?;
            after.insert(*log, lines[*before..before + 3].to_vec());
        }
        clones.push(after);
    }
    for (log, _) in programs {
        let [one, other] = [0, 1].map(|n| &clones[n][log]);
        let common = one.iter().filter(|line| other.contains(line)).count();
        let expected = if log == "/tmp/unguarded" { 3 } else { 0 };
        ensure!(
            common == expected,
            "{log}: {common} lines of {one:?} are in {other:?}, not {expected}"
        );
    }
    Ok(())
}
