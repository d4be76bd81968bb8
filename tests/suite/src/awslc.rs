// SPDX-License-Identifier: MIT OR Apache-2.0

//! Unchanged AWS-LC, and rustls with it, in clones. AWS-LC uses `/dev/sysgenid`. For comparison, a
//! second process uses the hypervisor's own page, which AWS-LC should not be pointed to.

use crate::{
    age::grow_old,
    clones::two_cpus,
    context::{Context, await_random, freeze, wait},
    microvm::firecracker,
    tests, vmforks,
};
use anyhow::{Context as _, Result, bail, ensure};
use harness::{Add, Options, Source, Vm, kernel};
use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
};

tests! {
    no_two_clones_draw_the_same_on_dev_sysgenid (20 min) [AlsoArm64, Mainline]
    no_two_clones_of_a_microvm_draw_the_same (20 min) [Mainline]
    without_a_device_clones_repeat_themselves (20 min) [AlsoArm64]
}

const CLONES: u32 = 8;
const FIRST: u32 = 42;

fn options(context: &Context) -> Result<Options> {
    Ok(Options {
        no_module: true,
        add: vec![Add {
            host: context.host.guest_program(&kernel::default(), "awslc")?,
            guest: "/bin/awslc".into(),
        }],
        ..two_cpus()
    })
}

/// Starts the program, and waits until it is idle.
fn start(vm: &Vm, out: &str, more: &[&str], expected: &str) -> Result<()> {
    let log = format!("{out}.err");
    let argv = ["awslc", "--out", out];
    vm.spawn(argv.iter().chain(more).copied(), &log)?;
    let said = wait("AWS-LC is idle", || {
        let said = vm.shell(&format!("cat {log}"))?;
        Ok(said.ends_with('\n').then_some(said))
    })?;
    ensure!(said.trim() == expected, "awslc says: {said}");
    Ok(())
}

/// What the program wrote down in one clone.
struct Seen {
    generation: [u32; 2],
    draws: Vec<String>,
    hellos: Vec<String>,
}

impl FromStr for Seen {
    type Err = anyhow::Error;

    fn from_str(said: &str) -> Result<Self> {
        let of = |what: &'static str| {
            let lines = said.lines().filter_map(|line| line.split_once(' '));
            lines
                .filter(move |(name, _)| *name == what)
                .map(|(_, rest)| rest.to_owned())
        };
        let generation = of("generation").next().context("no generation")?;
        let (old, new) = generation.split_once(' ').context("one generation")?;
        Ok(Self {
            generation: [old.parse()?, new.parse()?],
            draws: of("draw").collect(),
            hellos: of("hello").collect(),
        })
    }
}

impl Seen {
    /// Waits until the program has written it.
    fn of(vm: &Vm, out: &str) -> Result<Self> {
        let said = wait("what AWS-LC gives", || {
            let said = vm.shell(&format!("cat {out} 2>/dev/null || cat {out}.err"))?;
            match said.lines().count() {
                1 => Ok(None),
                0 => bail!("awslc says nothing"),
                _ => Ok(Some(said)),
            }
        })?;
        said.parse().with_context(|| said)
    }
}

/// For each clone, how many of its draws another clone also has.
fn in_common(clones: &[Seen]) -> Vec<usize> {
    let mut owners = BTreeMap::<&str, BTreeSet<usize>>::new();
    for (n, clone) in clones.iter().enumerate() {
        for draw in &clone.draws {
            owners.entry(draw).or_default().insert(n);
        }
    }
    let common = |clone: &Seen| {
        clone
            .draws
            .iter()
            .filter(|draw| owners[&***draw].len() > 1)
            .count()
    };
    clones.iter().map(common).collect()
}

/// Expect that clones have no draw and no TLS hello in common, and that AWS-LC sees one change in
/// each.
fn no_two_clones_draw_the_same_on_dev_sysgenid(context: &Context) -> Result<()> {
    warm_in_clones(context, options(context)?)
}

/// Expect the same on a machine like Firecracker's.
fn no_two_clones_of_a_microvm_draw_the_same(context: &Context) -> Result<()> {
    warm_in_clones(context, firecracker(options(context)?))
}

/// Restores a machine in which AWS-LC is warm, and compares what the clones draw.
fn warm_in_clones(context: &Context, options: Options) -> Result<()> {
    let mut vm = vmforks::boot(context, options)?;
    // VMClock's page is at an offset that AWS-LC does not map: AWS-LC would report a failure.
    let page = vm.options()?.source == Source::Ctra;
    grow_old(&mut vm)?;
    // With the early look, the kernel is reseeded so early that the error of the second process
    // would hardly be seen.
    vm.shell("insmod /vmgenid.ko sysgenid=1 early_look=0")?;
    let first = vmforks::published(&vm)?;
    let idle = format!("idle, at {first}, with a device: true");
    start(&vm, "/tmp/sysgenid", &[], &idle)?;
    if page {
        // A second process, which finds the hypervisor's page under the name of /dev/sysgenid.
        vm.shell(
            "mv /dev/sysgenid /dev/real && \
             mknod /dev/sysgenid c 10 $(awk '$2 == \"vmgenid\" { print $1 }' /proc/misc)",
        )?;
        start(&vm, "/tmp/vmgenid", &[], "idle, at 42, with a device: true")?;
    }
    freeze(&mut vm, &"s".parse()?)?;

    let (mut right, mut wrong) = (Vec::new(), Vec::new());
    for value in FIRST + 1..=FIRST + CLONES {
        let clone = vm.clone_from(&"s".parse()?, Some(value), None)?;
        let seen = Seen::of(&clone, "/tmp/sysgenid")?;
        let after = [first, first + 1];
        ensure!(
            seen.generation == after,
            "clone {value}: {:?}",
            seen.generation
        );
        right.push(seen);
        if page {
            wrong.push(Seen::of(&clone, "/tmp/vmgenid")?);
        }
    }
    if page {
        // Nothing is asserted about the second process: the kernel's reseed may come before its
        // draws.
        let common = in_common(&wrong);
        eprintln!(
            "AWS-LC on the hypervisor's page: {common:?} draws in common, of {}",
            wrong[0].draws.len()
        );
    }

    let common = in_common(&right);
    eprintln!("AWS-LC on /dev/sysgenid: {common:?}");
    ensure!(
        common.iter().all(|&draws| draws == 0),
        "draws in common: {common:?}"
    );
    let mut hellos = BTreeSet::new();
    for hello in right.iter().flat_map(|seen| &seen.hellos) {
        ensure!(hello.len() == 64, "not a random: {hello}");
        ensure!(hellos.insert(hello), "two clients said {hello}");
    }
    ensure!(
        hellos.len() == 3 * CLONES as usize,
        "{} hellos",
        hellos.len()
    );
    Ok(())
}

/// Expect that without a device, clones have draws in common. This shows that the tests above can
/// fail. The guest has no RDRAND.
fn without_a_device_clones_repeat_themselves(context: &Context) -> Result<()> {
    let options = Options {
        no_device: true,
        genctr: None,
        ..options(context)?
    };
    let mut vm = context.boot(options)?;
    await_random(&vm)?;
    grow_old(&mut vm)?;
    let go = ["--until", "/tmp/go"];
    start(&vm, "/tmp/none", &go, "idle, at 0, with a device: false")?;
    freeze(&mut vm, &"s".parse()?)?;
    let clones: Result<Vec<_>> = (0..4)
        .map(|_| {
            let clone = vm.clone_unchecked(&"s".parse()?, vm.options()?, None)?;
            clone.shell("touch /tmp/go")?;
            Seen::of(&clone, "/tmp/none")
        })
        .collect();
    let common = in_common(&clones?);
    eprintln!("AWS-LC without a device: {common:?} draws in common");
    ensure!(
        common.iter().any(|&draws| draws > 0),
        "they differ without the device"
    );
    Ok(())
}
