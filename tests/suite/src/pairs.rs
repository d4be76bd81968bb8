// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pairs of clones, of snapshots at random moments. A process that knows nothing of the device and of
//! restores draws on each CPU, by each consumer of the kernel's generator in turn
//! (tests/contract/src/actors/consumers.rs). It notes the number of each draw before the draw begins.
//! The host finds these numbers, and the draws, in the guest's memory, while the guest stands still. So
//! it is known which draw is the first one that began after the restore.

use crate::{
    clones::random,
    context::{Context, genctr, wait},
    tests, vmforks,
    warm::{Board, MARK},
};
use anyhow::{Context as _, Result, bail, ensure};
use harness::{
    Add, Options, Vm, kernel,
    qapi::qmp::{cont, human_monitor_command, memsave, stop},
};
use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

tests! {
    no_draw_is_equal_at_a_random_moment (30 min) [Series]
    each_consumer_repeats_itself_at_a_random_moment (30 min) [Tiny]
}

/// In the order in which the process draws.
pub const CONSUMERS: [&str; 5] = ["getrandom", "urandom", "vdso", "uuid", "u32"];

/// What reseeds the guest's generator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reseeds {
    /// The kernel's own driver, which is notified.
    Mainline,
    /// This project's module.
    Module,
    /// The generator itself: patches/linux.
    Series,
}

/// How many draws of each thread are compared.
pub const DRAWS: u32 = 1000;

/// How many draws of each thread the process keeps, and how long one is.
const RING: u32 = 1 << 16;
const LEN: usize = 16;

/// Where the first ring is: after a page.
const RINGS: usize = 4096;

/// The counter that the guests begin with.
const FIRST: u32 = 42;

/// A guest in which the process draws.
pub struct Guest {
    pub vm: Vm,
    board: Board,
    cpus: u16,
    counter: u32,
    /// For the guest's memory.
    file: PathBuf,
}

/// Boots a guest for [`Guest::start`], with these kernel parameters.
pub fn boot(context: &Context, reseeds: Reseeds, cpus: u16, append: &[&str]) -> Result<Vm> {
    let tiny = "tiny".to_string();
    let (name, driver) = match reseeds {
        Reseeds::Mainline => {
            let kernel = context.host.link("kernel-tiny");
            (tiny, Some(kernel.join("build/drivers/virt/vmgenid.ko")))
        }
        Reseeds::Module => (tiny, Some(context.top.join("out/tiny/vmgenid.ko"))),
        Reseeds::Series => {
            let default = Some(kernel::default()).filter(|name| kernel::is_series(name));
            (default.unwrap_or(kernel::SERIES.into()), None)
        }
    };
    // As in the matrix: the TSC jumps at a restore, and QEMU can end with a HPET.
    let parameters = ["tsc=unstable", "hpet=disable"].iter().chain(append);
    let driver = driver.map(|host| Add {
        host,
        guest: "/driver.ko".into(),
    });
    let options = Options {
        // What is added is loaded below.
        no_module: driver.is_some(),
        // Snapshots of half the memory take half the time. Kernels with checkers need theirs.
        memory: matches!(name.as_str(), "tiny" | kernel::SERIES).then_some(128),
        kernel: Some(name),
        smp: Some(cpus),
        append: parameters.map(|&more| more.into()).collect(),
        add: driver.into_iter().collect(),
        ..genctr(FIRST)
    };
    let vm = vmforks::boot(context, options)?;
    vm.shell("! [ -e /driver.ko ] || insmod /driver.ko")?;
    Ok(vm)
}

impl Guest {
    /// Starts the process. Afterwards the guest stands still.
    pub fn start(context: &Context, vm: Vm) -> Result<Self> {
        let cpus = vm.options()?.smp();
        let argv = ["contract", "consumers", "--cpus", &cpus.to_string()];
        vm.spawn(argv, "/tmp/consumers")?;
        let board = wait("the process draws", || {
            let said = vm.shell("cat /tmp/consumers")?;
            Ok(said.ends_with('\n').then_some(said))
        })?;
        let file = context.cache()?.join(format!("pairs-{}", vm.name()));
        vm.qmp(&stop {})?;
        Ok(Self {
            vm,
            board: board.trim().parse()?,
            cpus,
            counter: FIRST,
            file,
        })
    }

    /// Lets the guest run, which stands still otherwise.
    pub fn resume(&self) -> Result<()> {
        self.vm.qmp(&cont {}).map(drop)
    }

    /// Takes a snapshot at a random moment, and restores it twice.
    pub fn pair(&mut self) -> Result<Pair> {
        self.resume()?;
        thread::sleep(random(Duration::from_millis(100))?);
        let begun = loop {
            if let Some(memory) = self.memory(RINGS)? {
                break self.begun(&memory)?;
            }
            // The guest's own programs run on all CPUs.
            self.resume()?;
            thread::sleep(Duration::from_millis(1));
        };
        let snapshot = "pair".parse()?;
        self.vm.snapshot(&snapshot)?;
        let clones = [self.clone_draws(&begun)?, self.clone_draws(&begun)?];
        self.vm.delete_snapshot(&snapshot)?;
        Ok(Pair::of(&clones, &begun))
    }

    /// Restores the snapshot in the same QEMU, as a new clone: with a new ID, a new counter, and the
    /// notification, before the first instruction. Returns the draws of each thread that began after
    /// that.
    fn clone_draws(&mut self, begun: &[u32]) -> Result<Vec<Vec<Draw>>> {
        self.counter += 1;
        // QEMU keeps the values, and gives them to the machine that it loads.
        self.vm.qom_set_counter(self.counter)?;
        let said = self.vm.qmp(&human_monitor_command {
            command_line: "loadvm pair".into(),
            cpu_index: None,
        })?;
        ensure!(said.is_empty(), "loadvm: {said}");
        // On a busy host, a guest that runs for a short time only handles its timer interrupts. With four
        // CPUs, this can last for minutes.
        let mut pause = Duration::from_millis(20);
        let start = Instant::now();
        let memory = loop {
            let time = start.elapsed();
            ensure!(
                time < Duration::from_secs(600),
                "a clone draws nothing for {time:?}"
            );
            self.resume()?;
            thread::sleep(pause);
            pause = (pause * 3 / 2).min(Duration::from_millis(400));
            let Some(memory) = self.memory(RINGS)? else {
                continue;
            };
            // The draw that was begun last is not complete.
            let enough = |(now, then): (u32, &u32)| now.wrapping_sub(*then) > DRAWS;
            if self.begun(&memory)?.into_iter().zip(begun).all(enough) {
                let rings = usize::from(self.cpus) * RING as usize * LEN;
                break self.memory(RINGS + rings)?.context("the memory is gone")?;
            }
        };
        let threads = self.begun(&memory)?.into_iter().zip(begun).enumerate();
        let draws = threads.map(|(cpu, (now, then))| {
            ensure!(
                now.wrapping_sub(*then) < RING,
                "the host was so slow that the first draws of a clone are gone"
            );
            let ring = &memory[RINGS + cpu * RING as usize * LEN..];
            let draw = |n: u32| {
                let at = (n % RING) as usize * LEN;
                ring[at..at + LEN].try_into().context("a short ring")
            };
            (*then..*then + DRAWS).map(draw).collect()
        });
        draws.collect()
    }

    /// Stops the guest, and returns the beginning of the process's memory. `None`: no CPU has it mapped
    /// at present.
    fn memory(&self, size: usize) -> Result<Option<Vec<u8>>> {
        self.vm.qmp(&stop {})?;
        let mark = self.board.mark.iter().flat_map(|word| word.to_le_bytes());
        let mark: Vec<u8> = mark.collect();
        for cpu in 0..self.cpus {
            // An address that is not mapped is an error.
            let saved = self.vm.qmp(&memsave {
                val: self.board.address,
                size: size as u64,
                filename: self.file.display().to_string(),
                cpu_index: Some(cpu.into()),
            });
            let memory = fs::read(&self.file);
            let _ = fs::remove_file(&self.file);
            if saved.is_ok() {
                let memory = memory.context("the guest's memory")?;
                if memory.starts_with(&mark) {
                    return Ok(Some(memory));
                }
            }
        }
        Ok(None)
    }

    /// The number of draws that each thread has begun.
    fn begun(&self, memory: &[u8]) -> Result<Vec<u32>> {
        let words = memory[4 * MARK..].chunks_exact(4);
        let words = words.take(self.cpus.into());
        let begun = words.map(|word| Ok(u32::from_le_bytes(word.try_into()?)));
        begun.collect()
    }
}

type Draw = [u8; LEN];

/// For each consumer, how many draws of two clones were equal.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pair {
    pub alike: [u32; CONSUMERS.len()],
}

impl Pair {
    /// `begun`: the number of the first draw of each thread.
    fn of([one, other]: &[Vec<Vec<Draw>>; 2], begun: &[u32]) -> Self {
        let others: BTreeSet<_> = other.iter().flatten().collect();
        let mut pair = Self::default();
        for ((one, other), begun) in one.iter().zip(other).zip(begun) {
            for (n, (draw, same)) in (*begun as usize..).zip(one.iter().zip(other)) {
                let consumer = n % CONSUMERS.len();
                // Of four numbers of the kernel's own, one can be equal.
                let mut words = draw.chunks(4).zip(same.chunks(4));
                let word = CONSUMERS[consumer] == "u32" && words.any(|(a, b)| a == b);
                pair.alike[consumer] += u32::from(word || others.contains(draw));
            }
        }
        pair
    }
}

/// Expect that no draw of these pairs was alike.
pub fn none_alike(guest: &mut Guest, pairs: u32) -> Result<()> {
    for _ in 0..pairs {
        let alike = guest.pair()?.alike;
        ensure!(
            alike == [0; CONSUMERS.len()],
            "equal draws by {CONSUMERS:?}: {alike:?}"
        );
    }
    Ok(())
}

/// Expect that with patches/linux no draw by any consumer is equal in two clones, of those that began
/// after the restore, for a process that knows nothing of the device.
fn no_draw_is_equal_at_a_random_moment(context: &Context) -> Result<()> {
    for cpus in [1, 2] {
        let vm = boot(context, Reseeds::Series, cpus, &[])?;
        none_alike(&mut Guest::start(context, vm)?, 5)?;
    }
    Ok(())
}

/// Expect that with the kernel's own driver each consumer draws the same in some pairs, on two CPUs: on
/// one, the kernel handles the notification first. So the test before this can fail.
fn each_consumer_repeats_itself_at_a_random_moment(context: &Context) -> Result<()> {
    let vm = boot(context, Reseeds::Mainline, 2, &[])?;
    let mut guest = Guest::start(context, vm)?;
    let mut alike = [0; CONSUMERS.len()];
    for _ in 0..20 {
        let pair = guest.pair()?;
        alike = std::array::from_fn(|n| alike[n] + pair.alike[n]);
        if alike.iter().all(|&draws| draws > 0) {
            return Ok(());
        }
    }
    bail!("equal draws by {CONSUMERS:?}: {alike:?}, so the test with the patches cannot fail")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expect that a draw is counted for the consumer that made it, wherever the other clone made the
    /// same, and that one equal number of the kernel's own is enough.
    #[test]
    fn equal_draws_are_counted_by_consumer() {
        let draw = |n: u8| [n; LEN];
        // Draw 7 is by the vDSO, draw 9 by get_random_u32().
        let mut mixed = draw(6);
        mixed[4..8].fill(3);
        let one = vec![vec![draw(1), draw(2), draw(3)]];
        let other = vec![vec![draw(4), draw(1), mixed]];
        let pair = Pair::of(&[one, other], &[7]);
        assert_eq!(pair.alike, [0, 0, 1, 0, 1]);
    }
}
