// SPDX-License-Identifier: MIT OR Apache-2.0

//! Restores, as observed by processes that were running when the snapshot was taken.

use crate::{
    age::grow_old,
    context::{
        Context, addresses, await_random, counter, expect_counter, freeze, genctr, no_splat,
        parameters, wait,
    },
    draws::{self, Same},
    tests,
    vmforks::{self, Background},
    warm::{self, Broken, Draws, Moment, Warm},
};
use anyhow::{Context as _, Result, bail, ensure};
use harness::{Name, Options, Source, Vm, qapi::qmp::cont};
use std::{
    collections::BTreeSet,
    env, fmt,
    process::Command,
    thread,
    time::{Duration, Instant},
};

tests! {
    [AnySetup];
    no_look_is_stale_and_no_draw_is_twice (20 min)
    a_counter_that_comes_late_is_noticed
    draws_after_the_barrier_differ_in_every_clone (20 min)
    the_counter_is_new_before_the_first_instruction
    the_id_changes_before_the_counter
    a_generator_that_is_not_initialized_is_restored [PlainKernel, NotArm64]
    a_restore_that_fails_says_so [NotArm64]
    a_thousand_restores [Soak]
}

/// How many clones each of the tests makes.
const CLONES: u32 = 8;

/// The counter that the guests begin with.
const FIRST: u32 = 42;

/// One CPU for the process that spins, one for the kernel's own work. There is no RDRAND (qemu64
/// has none): of the inputs of a reseed, only the ID is certain to differ between clones.
pub fn two_cpus() -> Options {
    Options {
        smp: Some(2),
        ..genctr(FIRST)
    }
}

/// Expect that in each clone every process learns of the restore once, without a stale look and
/// after a reseed, that the notifiers are called once, and that all draws of all clones differ.
fn no_look_is_stale_and_no_draw_is_twice(context: &Context) -> Result<()> {
    look_and_draw(context, two_cpus())
}

/// Checks what [`no_look_is_stale_and_no_draw_is_twice`] expects, in a guest with these options.
pub fn look_and_draw(context: &Context, options: Options) -> Result<()> {
    let mut warm = Warm::boot_old(context, options)?;
    let moment = warm.snapshot("old")?;
    let mut draws = Draws::default();
    for value in FIRST + 1..=FIRST + CLONES {
        let clone = warm.vm.clone_from(&"old".parse()?, Some(value), None)?;
        warm::check(&clone, &moment, value, &mut draws)?;
    }
    // Two spinners, a reader, a child and a waiter.
    ensure!(draws.len() == 5 * CLONES as usize, "{} draws", draws.len());
    Ok(())
}

/// Expect that the checks report a stale look where the hypervisor changes the counter of a guest
/// that runs already: a process has then seen the old counter after the restore. This shows that
/// the test above can fail.
fn a_counter_that_comes_late_is_noticed(context: &Context) -> Result<()> {
    let mut warm = Warm::boot(context, two_cpus())?;
    let moment = warm.snapshot("s")?;
    let late = warm
        .vm
        .clone_unchecked(&"s".parse()?, warm.vm.options()?, None)?;
    let mut late = warm.in_another(late);
    late.await_looks(&moment)?;
    late.vm.set_genctr(FIRST + 1)?;
    let result = warm::check(&late.vm, &moment, FIRST + 1, &mut Draws::default());
    let said = result.map_or_else(|err| format!("{err:#}"), |()| "nothing".into());
    ensure!(said.contains("stale looks"), "what is said of it: {said}");
    Ok(())
}

/// Returns what each clone of an old guest draws from the kernel after it has seen the counter
/// change. `how` has arguments for `contract draws`. Its CPU is another one at each call: on the CPU
/// that takes the interrupt, the kernel's thread can reseed before the process draws.
pub fn drawn(vm: &mut Vm, how: &[&str]) -> Result<Vec<draws::Draws>> {
    let pid = draws::start(vm, how)?;
    let n = vm.snapshots()?.len();
    let cpu = n % usize::from(vm.options()?.smp());
    vm.shell(&format!("taskset -p {:x} {pid}", 1 << cpu))?;
    let name: Name = format!("s{n}").parse()?;
    freeze(vm, &name)?;
    let clones: Result<Vec<_>> = (FIRST + 1..=FIRST + CLONES)
        .map(|value| draws::Draws::of(&vm.clone_from(&name, Some(value), None)?))
        .collect();
    vm.qmp(&cont {})?;
    vm.shell("killall -9 contract; rm -f /tmp/draws*")?;
    clones
}

/// Checks that no draw after the barrier is the same in two clones of an old guest. With `control`,
/// also checks that some draws without the barrier are the same, as they are where there is no
/// early look.
pub fn draws_differ(vm: &mut Vm, control: bool) -> Result<()> {
    await_random(vm)?;
    grow_old(vm)?;
    let same = Same::of(&drawn(vm, &["--barrier"])?);
    eprintln!("with the barrier: {same}");
    ensure!(same.most == 0, "after the barrier: {same}");
    for _ in 0..8 {
        let same = Same::of(&drawn(vm, &[])?);
        eprintln!("without the barrier: {same}");
        if !control || same.most > 0 {
            return Ok(());
        }
    }
    bail!("without the barrier no draw is equal either, so the test cannot fail")
}

/// Expect that no draw after the barrier is the same in two clones and, with early_look=0, that
/// some draws without the barrier are.
fn draws_after_the_barrier_differ_in_every_clone(context: &Context) -> Result<()> {
    let control = parameters().is_some_and(|said| said.contains("early_look=0"));
    draws_differ(&mut context.boot(two_cpus())?, control)
}

/// Where the counter is in the guest's memory.
fn counter_address(vm: &Vm) -> Result<u32> {
    Ok(match vm.options()?.source {
        Source::Ctra => addresses(vm)?[1],
        // VMCLOCK_ADDR of QEMU's hw/acpi/vmclock.h, and the field's offset.
        Source::Vmclock => 0xfeff_b000 + 104,
    })
}

/// Expect that the new counter is in the guest's memory, with zeros after it, while the restored
/// machine is still paused, and that the guest reads it and sees it in the mapping once it runs.
fn the_counter_is_new_before_the_first_instruction(context: &Context) -> Result<()> {
    let mut vm = context.boot(genctr(42))?;
    let address = counter_address(&vm)?;
    let snapshot = "s".parse()?;
    vm.snapshot(&snapshot)?;

    let paused = Options {
        paused: true,
        ..vm.options()?
    };
    let clone = vm.clone_unchecked(
        &snapshot,
        Options {
            genctr: Some(77),
            ..paused
        },
        None,
    )?;
    let status = clone.qmp(&harness::qapi::qmp::query_status {})?;
    ensure!(!status.running, "the clone runs already");
    let words = clone.qmp(&harness::qapi::qmp::human_monitor_command {
        command_line: format!("xp /2wx {address:#x}"),
        cpu_index: None,
    })?;
    let expected = "0x0000004d 0x00000000";
    ensure!(
        words.trim().ends_with(expected),
        "in the guest's memory: {words}"
    );

    clone.qmp(&harness::qapi::qmp::cont {})?;
    let said = counter(&clone)?;
    ensure!(said == "read 77, mapped 77", "the clone says: {said}");
    Ok(())
}

/// Expect that the guest no longer sees the old ID when it sees a new counter: read() loads the
/// counter first, and reseeds with the ID that it finds then.
fn the_id_changes_before_the_counter(context: &Context) -> Result<()> {
    const CHANGES: u32 = 60;
    let mut vm = vmforks::boot(context, two_cpus())?;
    let (id, counter) = (addresses(&vm)?[0], counter_address(&vm)?);
    let watch = "/sys/kernel/debug/vmforks/watch";
    let looks = format!("exec taskset 2 sh -c 'echo {id} {counter} {CHANGES} >{watch}'");
    let looks = Background::start(&vm, &looks)?;
    // How many changes of the counter the guest has seen, and at how many of them the ID was still
    // the old one.
    let said = |vm: &Vm| -> Result<[u32; 2]> {
        let said = vm.shell(&format!("cat {watch}"))?;
        let (seen, early) = said.trim().split_once(' ').context("no result")?;
        Ok([seen.parse()?, early.parse()?])
    };
    for n in 0..=CHANGES {
        if n > 0 {
            vm.set_genctr(FIRST + n)?;
        }
        wait("the change is seen", || {
            Ok((said(&vm)?[0] == n).then_some(()))
        })?;
    }
    looks.end(&vm)?;
    let [_, early] = said(&vm)?;
    ensure!(early == 0, "the counter changed first {early} times");
    let value = FIRST + CHANGES;
    expect_counter(&vm, value)
}

/// Expect that clones of a guest whose generator has never been initialized read the new counter,
/// and that no draw is in two of them. (On arm64 the device tree has a seed for the generator.)
fn a_generator_that_is_not_initialized_is_restored(context: &Context) -> Result<()> {
    let mut vm = context.boot(two_cpus())?;
    vm.snapshot(&"s".parse()?)?;
    let said = vm.shell("dmesg | grep 'crng init done' || true")?;
    ensure!(said.is_empty(), "the generator is initialized: {said}");
    let mut drawn = BTreeSet::new();
    for value in FIRST + 1..=FIRST + 4 {
        let clone = vm.clone_from(&"s".parse()?, Some(value), None)?;
        expect_counter(&clone, value)?;
        let draws = clone.shell("head -c 1600 /dev/random | od -An -v -tx1")?;
        for draw in draws.lines() {
            ensure!(
                drawn.insert(draw.to_owned()),
                "clone {value} repeats {draw}"
            );
        }
        expect_counter(&clone, value)?;
        no_splat(&clone)?;
    }
    ensure!(drawn.len() == 400, "{} draws", drawn.len());
    Ok(())
}

/// Expect that an impossible restore fails with one line that has the message of the program that
/// could not do it, that it is not taken for a broken promise, and that a restore on a full disk
/// leaves the machines that run as they are.
fn a_restore_that_fails_says_so(context: &Context) -> Result<()> {
    let mut vm = context.boot(two_cpus())?;
    let snapshot: Name = "s".parse()?;
    vm.snapshot(&snapshot)?;
    let expect = |clone: Result<Vm>, expected: &str| -> Result<()> {
        let Err(err) = clone else {
            bail!("it was restored, where it should fail with {expected:?}");
        };
        ensure!(
            !err.is::<Broken>(),
            "it is taken for a broken promise: {err:#}"
        );
        let said = format!("{err:#}");
        ensure!(
            said.contains(expected) && said.lines().count() == 1,
            "expected {expected:?}: {said}"
        );
        Ok(())
    };
    let other: Name = "t".parse()?;
    expect(
        vm.clone_from(&other, Some(43), None),
        "has no snapshot t; it has: s",
    )?;
    let options = vm.options()?;
    expect(
        vm.clone_unchecked(&other, options.clone(), None),
        "Snapshot 't' does not exist",
    )?;
    let smaller = Options {
        genctr: Some(43),
        memory: Some(128),
        ..options.clone()
    };
    expect(vm.clone_unchecked(&snapshot, smaller, None), "QEMU ended")?;
    let another = Options {
        genctr: Some(43),
        machine: harness::Machine::Q35,
        ..options
    };
    expect(vm.clone_unchecked(&snapshot, another, None), "QEMU ended")?;

    // The machines are in a small file system, which the script fills: the last restore meets a
    // full disk.
    let vms = context.cache()?.join("vm");
    let script = r#"
        "$0" start a --memory 64 --genctr 1 && "$0" snapshot a s && "$0" restore a s --genctr 2 --as b &&
            head -c 200M /dev/zero >"$1/full"; "$0" restore a s --genctr 3 --as c; "$0" list; "$0" delete b; "$0" delete a"#;
    let output = Command::new("bwrap")
        .args(["--dev-bind", "/", "/", "--size", "150000000", "--tmpfs"])
        .arg(&vms)
        .args(["--", "sh", "-c", script])
        .args([context.program("vm"), vms])
        .output()
        .context("bwrap")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let complaints: Vec<_> = said
        .lines()
        .filter(|line| line.starts_with("vm: "))
        .collect();
    ensure!(
        matches!(complaints[..], [one] if one.starts_with("vm: cannot ")
            && one.contains("No space left on device")),
        "on a full disk: {said}"
    );
    let list: Vec<_> = said
        .lines()
        .filter(|line| line.contains(" running "))
        .collect();
    ensure!(
        matches!(list[..], [a, b] if a.starts_with("a ") && b.starts_with("b ")),
        "on a full disk: {said}"
    );
    Ok(())
}

/// The results of a soak so far.
struct Tally {
    start: Instant,
    restores: u32,
    snapshots: u32,
    draws: Draws,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} restores of {} snapshots in {} s: {} draws of 32 bytes, none twice; no look stale; \
             each waiter woken once, one reseed each",
            self.restores,
            self.snapshots,
            self.start.elapsed().as_secs(),
            self.draws.len(),
        )
    }
}

/// Expect that each of RESTORES restores (1000), of snapshots taken at random moments, passes
/// [`warm::check`]. `make soak` runs this.
fn a_thousand_restores(context: &Context) -> Result<()> {
    let restores = env::var("RESTORES").unwrap_or("1000".into());
    let restores = restores.parse().context("RESTORES")?;
    let mut tally = Tally {
        start: Instant::now(),
        restores: 0,
        snapshots: 0,
        draws: Draws::default(),
    };
    let result = soak(context, restores, &mut tally);
    // A soak that was stopped also prints its results.
    eprintln!("{tally}");
    result
}

fn soak(context: &Context, restores: u32, tally: &mut Tally) -> Result<()> {
    let mut warm = Warm::boot_old(context, two_cpus())?;
    while tally.restores < restores {
        let name = format!("s{}", tally.snapshots);
        thread::sleep(random(Duration::from_secs(2))?);
        let moment = warm.snapshot(&name)?;
        tally.snapshots += 1;
        for _ in 0..10.min(restores - tally.restores) {
            restore(&warm, &name, &moment, tally)?;
        }
        eprintln!("{tally}");
        warm.vm.qmp(&cont {})?;
        // The disk is copied for each clone, so old snapshots are deleted to keep it small.
        warm.vm.delete_snapshot(&name.parse()?)?;
    }
    Ok(())
}

fn restore(warm: &Warm, name: &str, moment: &Moment, tally: &mut Tally) -> Result<()> {
    let value = FIRST + 1 + tally.restores;
    let clone = warm.vm.clone_from(&name.parse()?, Some(value), None);
    let clone = clone.context("the restore failed, so no promise was checked")?;
    warm::check(&clone, moment, value, &mut tally.draws)?;
    tally.restores += 1;
    Ok(())
}

/// A random time that is not longer than `limit`.
pub fn random(limit: Duration) -> Result<Duration> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(limit.mul_f64(f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX)))
}
