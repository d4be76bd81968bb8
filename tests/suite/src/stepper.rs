// SPDX-License-Identifier: MIT OR Apache-2.0

//! Snapshots taken at chosen instructions of the guest.
//!
//! QEMU's gdbstub stops the guest at a function's first instruction, and steps the guest from
//! there to the function's return. The test takes a snapshot between two instructions, and
//! restores it in two clones, each with an ID and a counter of its own. In each clone a real-time
//! process preempts the thread that the snapshot interrupted. The process waits for read() to
//! return the new counter, and draws from the kernel's generator. No draw may be the same in both
//! clones.
//!
//! Linux's crng_reseed() extracts a key with interrupts enabled, and installs the key later,
//! without looking whether a newer one is there. A snapshot in between leaves a kernel thread in
//! every clone that will install the same old key. The process sleeps after the first draws (see
//! tests/contract/src/actors/preempt.rs), and the kernel thread continues.
//!
//! With patches/linux the process does not wait for read(), and draws by all consumers
//! (tests/contract/src/actors/consumers.rs). Which one is the first differs from snapshot to snapshot.
//! The vDSO computes in the process. There the test steps through the process's own draw. That draw
//! began before the restore, and is not one of those that are compared.

use crate::{
    context::{Context, await_random, genctr, id_in_memory, parameters, wait},
    draws::{Draws, Same},
    notifications,
    pairs::CONSUMERS,
    tests, vmforks,
};
use anyhow::{Context as _, Result, bail, ensure};
use harness::{
    Name, Options, Vm,
    gdb::{Cpu, Gdb, Place, Registers},
    kernel,
};
use std::{collections::BTreeSet, fmt, ops::Range, thread};

tests! {
    [AnySetup, PlainKernel];
    a_snapshot_in_a_reseed_makes_no_draw_equal_on_1_cpu (30 min)
    a_snapshot_in_a_reseed_makes_no_draw_equal_on_2_cpus (30 min)
    a_snapshot_in_the_builtin_drivers_reseed_makes_no_draw_equal (30 min) [Builtin]
    a_snapshot_in_read_makes_no_draw_equal (30 min)
    a_snapshot_in_the_drivers_reseed_makes_no_draw_equal (30 min)
    the_id_is_mixed_in_before_the_reseed
    the_first_id_is_mixed_in_before_the_reseed
    without_the_barrier_draws_are_equal (30 min) [Mainline]
    a_draw_needs_no_barrier_on_1_cpu (30 min) [Series]
    a_draw_needs_no_barrier_on_2_cpus (30 min) [Series]
    a_draw_needs_no_barrier_in_the_vdso_on_1_cpu (30 min) [Series, NotArm64]
    a_draw_needs_no_barrier_in_the_vdso_on_2_cpus (30 min) [Series, NotArm64]
    a_draw_takes_few_instructions_more_with_the_device [Series, NotArm64]
    each_consumer_repeats_itself_without_the_barrier [Tiny]
    every_instruction_of_a_reseed [Soak]
    every_instruction_of_the_builtin_drivers_reseed [Soak]
    every_instruction_of_read [Soak]
    every_instruction_of_the_drivers_reseed [Soak]
    every_instruction_of_a_draw_without_a_barrier [Soak]
    every_instruction_of_a_draw_of_the_vdso [Soak]
}

/// How many draws the processes of a clone make together.
const DRAWS: usize = 6000;

/// The counters of the two clones: no counter of the original is as high.
const CLONES: [u32; 2] = [100, 101];

/// The kernel's functions that a reseed is stepped through.
const RESEED: [&str; 2] = ["crng_reseed", "extract_entropy"];

/// The function that the first of these calls with patches/linux.
const NEW_KEY: &str = "crng_new_key";

/// The kernel's function that random bytes come from.
const DRAW: &str = "crng_make_state";

/// The vDSO's function, and what else is in the vDSO.
const VDSO: &str = "__vdso_getrandom";
const IN_VDSO: &str = "[vdso]";

/// How many draws of 16 bytes use each part of that function: one of them refills its batch of 96 bytes.
const VDSO_DRAWS: usize = 8;

/// About how many snapshots `make test` takes at instructions of the driver.
const SAMPLE: usize = 10;

/// A part of the name of each function of the driver that the kernel calls for read().
const READ: &str = "::read";

/// A part of the name of the driver's function that reseeds.
const SLOW: &str = "::reseed";

/// Which function of the guest's kernel is stepped through.
#[derive(Clone, Copy, PartialEq)]
enum Path {
    /// The kernel's own periodic reseed, in a kworker.
    Periodic,
    /// The reseed of the kernel's built-in driver after a notification, in a kworker.
    Builtin,
    /// The driver's read().
    Read,
    /// The driver's reseed after a notification.
    Driver,
    /// A process draws from the kernel.
    Draw,
    /// A process draws from the vDSO.
    Vdso,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Path::Periodic => "the periodic reseed",
            Path::Builtin => "the built-in driver's reseed",
            Path::Read => "the driver's read()",
            Path::Driver => "the driver's reseed",
            Path::Draw => "a draw",
            Path::Vdso => "a draw of the vDSO",
        })
    }
}

impl Path {
    /// Whether the path begins with a new generation of the original.
    fn needs_change(self) -> bool {
        matches!(self, Path::Builtin | Path::Driver | Path::Vdso)
    }

    /// The functions that are stepped through. Others are stepped over.
    fn inside(self, symbols: &Symbols) -> Result<Vec<Function>> {
        match self {
            Path::Periodic | Path::Builtin => {
                let reseed = RESEED.iter().map(|name| symbols.function(name));
                // patches/linux makes two functions of the first.
                reseed
                    .chain(symbols.parts(NEW_KEY).into_iter().map(Ok))
                    .collect()
            }
            Path::Read | Path::Driver => symbols.driver(""),
            Path::Draw => Ok(symbols.parts(DRAW)),
            Path::Vdso => Ok([symbols.parts(VDSO), symbols.parts(IN_VDSO)].concat()),
        }
    }

    /// The functions that the path can begin with.
    fn entries(self, symbols: &Symbols) -> Result<Vec<Function>> {
        match self {
            Path::Periodic | Path::Builtin => Ok(vec![symbols.function(RESEED[0])?]),
            Path::Read => symbols.driver(READ),
            Path::Driver => symbols.driver(SLOW),
            Path::Draw => Ok(vec![symbols.function(DRAW)?]),
            Path::Vdso => Ok(vec![symbols.function(VDSO)?]),
        }
    }

    /// Whether the path begins with this call, by `caller`.
    fn begins(self, registers: &Registers, caller: Option<&Function>) -> bool {
        let by = |right: fn(&Function) -> bool| caller.is_some_and(right);
        match self {
            // Only the work queue passes an argument.
            Path::Periodic => registers.arguments[0] != 0,
            Path::Builtin => by(|caller| caller.name == "add_vmfork_randomness"),
            // The kernel calls the driver.
            Path::Read => by(|caller| !caller.driver),
            Path::Driver | Path::Vdso => true,
            Path::Draw => by(|caller| caller.name.starts_with("get_random_bytes_user")),
        }
    }

    /// How many times the path is stepped through, from its beginning to its end.
    fn times(self) -> usize {
        match self {
            Path::Vdso => VDSO_DRAWS,
            _ => 1,
        }
    }
}

/// A function of the guest's kernel, or of a module.
#[derive(Clone)]
struct Function {
    name: String,
    start: u64,
    end: u64,
    driver: bool,
}

impl Function {
    fn has(&self, address: u64) -> bool {
        (self.start..self.end).contains(&address)
    }
}

/// All functions, in the order of their addresses.
struct Symbols(Vec<Function>);

impl Symbols {
    /// The guest itself says where its functions are.
    fn of(vm: &Vm) -> Result<Self> {
        let module = format!("[{}]", kernel::driver(&kernel::default()));
        let mut functions = Vec::new();
        for line in vm.shell("cat /proc/kallsyms")?.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let [address, "t" | "T", name, ref rest @ ..] = words[..] else {
                continue;
            };
            // In a module for arm64, these only tell code from data.
            if name.starts_with('$') {
                continue;
            }
            functions.push(Function {
                name: demangled(name),
                start: u64::from_str_radix(address, 16)?,
                end: u64::MAX,
                driver: rest.first() == Some(&module.as_str()),
            });
        }
        Ok(Self(Self::sorted(functions)?))
    }

    fn sorted(mut functions: Vec<Function>) -> Result<Vec<Function>> {
        functions.sort_by_key(|function| function.start);
        let starts: Vec<_> = functions.iter().map(|function| function.start).collect();
        for function in &mut functions {
            let next = starts.partition_point(|&start| start <= function.start);
            function.end = starts.get(next).copied().unwrap_or(u64::MAX);
        }
        ensure!(
            functions.first().is_some_and(|function| function.start > 0),
            "the guest hides its kernel's addresses"
        );
        Ok(functions)
    }

    /// With the vDSO of a process, which says where its vDSO and the function are.
    fn with_vdso(self, said: &str) -> Result<Self> {
        let range = |name: &str| -> Result<Range<u64>> {
            let (_, range) = said.split_once(name).with_context(|| said.to_string())?;
            let (start, end) = range.split_once("..").with_context(|| said.to_string())?;
            let digits = |from: &str| {
                let digits = from.split(|c: char| !c.is_ascii_hexdigit()).next();
                u64::from_str_radix(digits.unwrap_or_default(), 16)
            };
            Ok(digits(start)?..digits(end)?)
        };
        let (image, function) = (range("vDSO ")?, range("getrandom ")?);
        let starts = [
            (IN_VDSO, image.start),
            (VDSO, function.start),
            (IN_VDSO, function.end),
            ("", image.end),
        ];
        let vdso = starts.map(|(name, start)| Function {
            name: name.into(),
            start,
            end: u64::MAX,
            driver: false,
        });
        Ok(Self(Self::sorted([self.0, vdso.into()].concat())?))
    }

    /// The kernel's function of that name.
    fn function(&self, name: &str) -> Result<Function> {
        let functions = self.0.iter().filter(|function| !function.driver);
        let functions = functions.filter(|function| function.name == name);
        match functions.collect::<Vec<_>>()[..] {
            [function] => Ok(function.clone()),
            ref other => bail!(
                "the guest's kernel has {} functions {name}, not one: the compiler has inlined it, \
                 or made several of it",
                other.len()
            ),
        }
    }

    /// The kernel's functions whose names begin with `name`. The compiler keeps code that is seldom
    /// executed apart, and jumps there (`.cold`).
    fn parts(&self, name: &str) -> Vec<Function> {
        let functions = self.0.iter().filter(|function| !function.driver);
        let functions = functions.filter(|function| function.name.starts_with(name));
        functions.cloned().collect()
    }

    /// The driver's functions whose names contain `part`.
    fn driver(&self, part: &str) -> Result<Vec<Function>> {
        let functions = self.0.iter().filter(|function| function.driver);
        let functions = functions.filter(|function| function.name.contains(part));
        let functions: Vec<_> = functions.cloned().collect();
        ensure!(
            !functions.is_empty(),
            "the driver has no function with {part:?} in its name"
        );
        Ok(functions)
    }

    /// The function that has the instruction at this address.
    fn at(&self, address: u64) -> Option<&Function> {
        let after = self.0.partition_point(|function| function.start <= address);
        after.checked_sub(1).and_then(|n| self.0.get(n))
    }

    fn describe(&self, address: u64) -> String {
        match self.at(address) {
            Some(function) => format!("{}+{:#x}", function.name, address - function.start),
            None => format!("{address:#x}"),
        }
    }
}

/// The address of a function of the guest's kernel, for a breakpoint.
pub fn function(vm: &Vm, name: &str) -> Result<u64> {
    Ok(Symbols::of(vm)?.function(name)?.start)
}

/// A function's name, without what the compiler added: the types that it was made for, and the
/// suffix of a function one of whose arguments is always the same.
fn demangled(name: &str) -> String {
    let before = |name: &str, end| name.split(end).next().unwrap_or_default().to_string();
    let name = format!(
        "{:#}",
        rustc_demangle::demangle(&before(name, ".constprop."))
    );
    before(&name, "::<")
}

/// A place between two instructions.
#[derive(Clone, Debug)]
struct Boundary {
    address: u64,
    /// The function that has returned here.
    after: Option<String>,
}

/// One pass through a path.
struct Walk<'a> {
    gdb: &'a mut Gdb,
    symbols: &'a Symbols,
    inside: Vec<Function>,
    /// The CPU that the path's thread is on.
    cpu: Cpu,
    /// Where the path's first function returns to.
    end: Place,
    at: Boundary,
}

impl<'a> Walk<'a> {
    /// Lets the guest run until the path begins.
    fn start(gdb: &'a mut Gdb, symbols: &'a Symbols, path: Path) -> Result<Self> {
        let entries = path.entries(symbols)?;
        let starts: Vec<_> = entries.iter().map(|function| function.start).collect();
        let (cpu, registers) = run_to(gdb, &starts, |gdb, cpu, registers| {
            let caller = symbols.at(gdb.end(cpu, registers)?.pc);
            Ok(path.begins(registers, caller))
        })
        .with_context(|| format!("waiting for {path}"))?;
        Ok(Self {
            end: gdb.end(cpu, &registers)?,
            gdb,
            symbols,
            inside: path.inside(symbols)?,
            cpu,
            at: Boundary {
                address: registers.at.pc,
                after: None,
            },
        })
    }

    /// Continues to the next boundary. `false`: the path's first function has returned.
    fn step(&mut self) -> Result<bool> {
        let before = function_at(&self.inside, self.at.address).cloned();
        self.gdb.step(self.cpu)?;
        let mut registers = self.gdb.registers(self.cpu)?;
        let mut after = None;
        while registers.at != self.end && function_at(&self.inside, registers.at.pc).is_none() {
            let called = registers.at.pc;
            let end = match is_kernel(called) && !is_kernel(self.at.address) {
                true => Place {
                    pc: self.at.address + SYSCALL,
                    sp: registers.at.sp,
                },
                // This is after a call, or after a jump to another function.
                false => self.gdb.end(self.cpu, &registers)?,
            };
            // Another thread, on another stack, can come by.
            (self.cpu, registers) = run_to(self.gdb, &[end.pc], |_, _, registers| {
                Ok(registers.at == end)
            })
            .with_context(|| format!("stepping over {}", self.symbols.describe(called)))?;
            after = self.symbols.at(called).map(|called| called.name.clone());
        }
        if registers.at == self.end {
            return Ok(false);
        }
        // A function that was stepped through has returned.
        let address = registers.at.pc;
        if let Some(before) = before.filter(|before| !before.has(address)) {
            let now = function_at(&self.inside, address);
            if now.is_some_and(|now| now.start != address) && after.is_none() {
                after = Some(before.name);
            }
        }
        self.at = Boundary { address, after };
        Ok(true)
    }
}

/// The length of the instruction that makes a system call. It leaves the stack pointer as it is.
const SYSCALL: u64 = 2;

fn is_kernel(address: u64) -> bool {
    address >> 63 == 1
}

fn function_at(functions: &[Function], address: u64) -> Option<&Function> {
    functions.iter().find(|function| function.has(address))
}

/// Lets the guest run until a CPU is at one of the addresses, with registers that are `right`.
fn run_to(
    gdb: &mut Gdb,
    addresses: &[u64],
    mut right: impl FnMut(&mut Gdb, Cpu, &Registers) -> Result<bool>,
) -> Result<(Cpu, Registers)> {
    loop {
        for &address in addresses {
            gdb.set_breakpoint(address)?;
        }
        let cpu = gdb.run()?;
        for &address in addresses {
            gdb.clear_breakpoint(address)?;
        }
        let registers = gdb.registers(cpu)?;
        if right(gdb, cpu, &registers)? {
            return Ok((cpu, registers));
        }
        // The breakpoint would stop the CPU again at once.
        gdb.step(cpu)?;
    }
}

/// The guest that the snapshots are taken of.
struct Original {
    /// Dropped first, so that the guest runs again when the suite asks for its kernel's reports.
    gdb: Gdb,
    vm: Vm,
    symbols: Symbols,
    cpus: usize,
    counter: u32,
}

/// How the processes wait for the new counter.
#[derive(Clone, Copy, PartialEq)]
enum Look {
    /// By the mapped page. Then they read().
    Mapped,
    /// By read().
    Read,
    /// By the mapped page. They do not read(), and draw by all consumers.
    WithoutBarrier,
}

impl Original {
    fn boot(context: &Context, options: Options, look: Look) -> Result<Self> {
        Self::boot_beside(context, options, look, "exit")
    }

    /// The same, where a script runs beside the processes.
    fn boot_beside(context: &Context, options: Options, look: Look, script: &str) -> Result<Self> {
        let counter = 42;
        let mut options = Options {
            genctr: Some(counter),
            ..options
        };
        // While a CPU is stepped, the others stand still, and the clock runs. This is no stall.
        let no_stall = "rcupdate.rcu_cpu_stall_suppress=1";
        options.append.push(no_stall.into());
        let cpus = usize::from(options.smp());
        let vm = vmforks::boot(context, options)?;
        let rdrand = vm.shell("grep -cw rdrand /proc/cpuinfo || true")?;
        ensure!(rdrand.trim() == "0", "the guest has RDRAND");
        let count = (DRAWS / cpus).to_string();
        vm.spawn(["sh", "-c", script], "/tmp/beside")?;
        let mut symbols = Symbols::of(&vm)?;
        for cpu in 0..cpus {
            let (out, said) = (format!("/tmp/draws-{cpu}"), format!("/tmp/said-{cpu}"));
            let (cpu, until) = (cpu.to_string(), CLONES[0].to_string());
            let mut argv = vec!["contract", "preempt", "--out", &out, "--cpu", &cpu];
            argv.extend(["--count", &count, "--until", &until]);
            match look {
                Look::Mapped => {}
                Look::Read => argv.push("--by-read"),
                Look::WithoutBarrier => argv.push("--no-barrier"),
            }
            vm.spawn(argv, &said)?;
            let said = wait("a process that naps", || {
                let said = vm.shell(&format!("cat {said}"))?;
                ensure!(said.is_empty() || is_waiting(&said), "{said}");
                Ok(said.ends_with('\n').then_some(said))
            })?;
            if look == Look::WithoutBarrier && cpu == "0" {
                symbols = symbols.with_vdso(&said)?;
            }
        }
        Ok(Self {
            symbols,
            gdb: vm.debug()?,
            vm,
            cpus,
            counter,
        })
    }

    /// Steps through a path once. At each boundary the guest stands still, and `visit` is called.
    fn walk(
        &mut self,
        path: Path,
        mut visit: impl FnMut(&mut Vm, &Symbols, &Boundary) -> Result<()>,
    ) -> Result<()> {
        if path.needs_change() {
            self.counter += 1;
            self.vm.set_genctr(self.counter)?;
        }
        let mut seen = BTreeSet::new();
        for _ in 0..path.times() {
            let mut walk = Walk::start(&mut self.gdb, &self.symbols, path)?;
            loop {
                // A loop passes the same boundary more than once.
                if seen.insert(walk.at.address) {
                    visit(&mut self.vm, &self.symbols, &walk.at)?;
                }
                if !walk.step()? {
                    break;
                }
            }
        }
        Ok(())
    }

    /// A path's boundaries.
    fn boundaries(&mut self, path: Path) -> Result<Vec<Boundary>> {
        let mut all = Vec::new();
        self.walk(path, |_, _, at| {
            all.push(at.clone());
            Ok(())
        })?;
        Ok(all)
    }

    /// Takes a snapshot at each boundary of the sample.
    fn rows_of(&mut self, path: Path, sample: &[Boundary]) -> Result<Vec<Row>> {
        let wanted = |at: &Boundary| sample.iter().any(|wanted| wanted.address == at.address);
        let rows = self.equal_draws(path, wanted, |_| {})?;
        ensure!(
            rows.len() == sample.len(),
            "{path} went another way the second time: {} instructions of {}",
            rows.len(),
            sample.len()
        );
        Ok(rows)
    }

    /// Steps through a path, and takes a snapshot at each boundary that is `wanted`. `tell` is
    /// called with each row.
    fn equal_draws(
        &mut self,
        path: Path,
        mut wanted: impl FnMut(&Boundary) -> bool,
        tell: impl Fn(&Row),
    ) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let cpus = self.cpus;
        self.walk(path, |vm, symbols, at| {
            if !wanted(at) {
                return Ok(());
            }
            let place = symbols.describe(at.address);
            let first = rows.len() % CONSUMERS.len();
            let (equal, last_equal) =
                two_clones(vm, cpus, first).with_context(|| format!("a snapshot at {place}"))?;
            let after = at.after.clone();
            let row = Row {
                place,
                after,
                equal,
                last_equal,
            };
            tell(&row);
            rows.push(row);
            Ok(())
        })?;
        Ok(rows)
    }
}

/// The result of a snapshot.
struct Row {
    place: String,
    after: Option<String>,
    /// How many draws were the same in both clones.
    equal: usize,
    /// Whether the draws of the vDSO that began last before the restore were the same.
    last_equal: bool,
}

impl Row {
    fn instruction(&self) -> String {
        match &self.after {
            Some(after) => format!("{} ({after} has returned)", self.place),
            None => self.place.clone(),
        }
    }
}

fn is_waiting(said: &str) -> bool {
    let mut lines = said.lines();
    lines.next().is_none_or(|line| line.starts_with("waiting"))
        && lines.all(|line| line.starts_with("last "))
}

/// Takes a snapshot, restores it twice, and counts the draws that are the same in both clones, by the
/// consumer of this number first. Returns also whether the draws that began before the restore are the same.
fn two_clones(vm: &mut Vm, cpus: usize, first: usize) -> Result<(usize, bool)> {
    let snapshot: Name = "step".parse()?;
    vm.snapshot(&snapshot)?;
    let drawn: Result<Vec<_>> = thread::scope(|scope| {
        let vm = &*vm;
        let clones = CLONES.map(|counter| {
            let (snapshot, counter) = (&snapshot, counter + 2 * first as u32);
            scope.spawn(move || draws_of(&vm.clone_from(snapshot, Some(counter), None)?, cpus))
        });
        let draws = clones.into_iter();
        draws.map(|clone| clone.join().expect("panicked")).collect()
    });
    vm.delete_snapshot(&snapshot)?;
    let (draws, last): (Vec<_>, Vec<_>) = drawn?.into_iter().unzip();
    let words = Same::words(&draws[0], &draws[1]);
    Ok((Same::of(&draws).most.max(words), last[0] == last[1]))
}

/// Waits for the draws of the processes of a clone. Returns also the draw of the process on the first
/// CPU that began before the restore.
fn draws_of(vm: &Vm, cpus: usize) -> Result<(Draws, String)> {
    let files = |name: &str| {
        let files = (0..cpus).map(|cpu| format!("/tmp/{name}-{cpu}"));
        files.collect::<Vec<_>>().join(" ")
    };
    let look = format!("cat {} 2>/dev/null", files("draws"));
    let said = wait("the draws", || {
        let output = vm.exec(["sh", "-c", &look])?;
        if output.status.success() {
            return Ok(Some(String::from_utf8(output.stdout)?));
        }
        for cpu in 0..cpus {
            let said = vm.shell(&format!("cat /tmp/said-{cpu}"))?;
            ensure!(is_waiting(&said), "{said}");
        }
        Ok(None)
    })?;
    let draws: Draws = said.parse()?;
    let count = draws.all().count();
    ensure!(count == DRAWS, "{count} draws");
    Ok((draws, vm.shell("grep ^last /tmp/said-0")?))
}

/// The boundaries of a reseed at which a key is in danger. From the return of blake2s_final() on, an
/// ID that is mixed in comes too late for the key. The unlock of base_crng.lock is when the key is
/// installed.
fn window_of_reseed(all: &[Boundary]) -> Result<Window> {
    let returned = |from: usize, name: &str| -> Result<usize> {
        let after = |at: &Boundary| at.after.as_deref().is_some_and(|a| a.starts_with(name));
        let n = all.iter().skip(from).position(after);
        let n = n.with_context(|| format!("in a reseed, {name} never returns (inlined?)"))?;
        Ok(from + n)
    };
    let hashed = returned(0, "blake2s_final")?;
    let extracted = returned(hashed, "extract_entropy")?;
    let locked = returned(extracted, "_raw_spin_lock")?;
    Ok(Window {
        hashed,
        extracted,
        locked,
        unlocked: returned(locked, "_raw_spin_unlock")?,
    })
}

/// The boundaries of a reseed, by number, at which these functions have returned.
struct Window {
    hashed: usize,
    extracted: usize,
    locked: usize,
    unlocked: usize,
}

impl Window {
    /// Six of its boundaries.
    fn sample(&self) -> [usize; 6] {
        let middle = (self.hashed + self.extracted) / 2;
        [
            self.hashed,
            middle,
            self.extracted,
            self.locked - 1,
            self.locked,
            self.unlocked - 1,
        ]
    }
}

fn sample_of_reseed(all: &[Boundary]) -> Result<Vec<Boundary>> {
    let sample = window_of_reseed(all)?.sample();
    Ok(sample.map(|n| all[n].clone()).into())
}

fn cpus(smp: u16) -> Options {
    Options {
        smp: Some(smp),
        ..genctr(1)
    }
}

/// How the processes of a path's clones look at the counter.
fn look(path: Path) -> Look {
    match path {
        Path::Read => Look::Read,
        _ => Look::Mapped,
    }
}

/// Takes snapshots at some of a path's instructions, and checks that no draw is equal in two
/// clones.
fn expect_no_equal_draw(context: &Context, path: Path, options: Options) -> Result<()> {
    let mut original = Original::boot(context, options, look(path))?;
    let all = original.boundaries(path)?;
    let rows = match path {
        Path::Periodic | Path::Builtin => original.rows_of(path, &sample_of_reseed(&all)?)?,
        Path::Read | Path::Driver => {
            // The driver may take another path the second time.
            let candidate = |at: &Boundary| path == Path::Read || at.after.is_some();
            let count = all.iter().filter(|at| candidate(at)).count();
            let every = count.div_ceil(SAMPLE).max(1);
            let mut n = 0;
            let wanted = |at: &Boundary| {
                n += usize::from(candidate(at));
                candidate(at) && (n - 1) % every == 0
            };
            original.equal_draws(path, wanted, |_| {})?
        }
        Path::Draw | Path::Vdso => bail!("there is no barrier in {path}"),
    };
    judge(path, &rows)
}

fn judge(path: Path, rows: &[Row]) -> Result<()> {
    ensure!(!rows.is_empty(), "no snapshot was taken in {path}");
    let bad = rows.iter().filter(|row| row.equal > 0);
    let bad: Vec<_> = bad
        .map(|row| format!("{:5} at {}", row.equal, row.instruction()))
        .collect();
    ensure!(
        bad.is_empty(),
        "two clones of a snapshot in {path} draw the same after the barrier; of {DRAWS} draws:\n{}",
        bad.join("\n")
    );
    Ok(())
}

/// Expect that no draw after the barrier is the same in two clones of a snapshot that was taken in
/// a reseed of the kernel's own, at six instructions at which a key is in danger.
fn a_snapshot_in_a_reseed_makes_no_draw_equal_on_1_cpu(context: &Context) -> Result<()> {
    expect_no_equal_draw(context, Path::Periodic, cpus(1))
}

/// Expect the same where the interrupted reseed and the driver's can run on two CPUs.
fn a_snapshot_in_a_reseed_makes_no_draw_equal_on_2_cpus(context: &Context) -> Result<()> {
    expect_no_equal_draw(context, Path::Periodic, cpus(2))
}

/// Expect the same, on one CPU, of the reseed of the kernel's own driver.
fn a_snapshot_in_the_builtin_drivers_reseed_makes_no_draw_equal(context: &Context) -> Result<()> {
    expect_no_equal_draw(context, Path::Builtin, cpus(1))
}

/// Expect that no draw after a read() of the new counter is the same in two clones of a snapshot
/// that was taken in a read(), at about ten instructions: the interrupted read() returns the old
/// counter, or comes after a reseed with the new ID.
fn a_snapshot_in_read_makes_no_draw_equal(context: &Context) -> Result<()> {
    expect_no_equal_draw(context, Path::Read, cpus(1))
}

/// Expect that no draw after the barrier is the same in two clones of a snapshot that was taken in
/// a reseed of the driver's, at about ten instructions: the interrupted reseed is not taken for one
/// with the new ID.
fn a_snapshot_in_the_drivers_reseed_makes_no_draw_equal(context: &Context) -> Result<()> {
    expect_no_equal_draw(context, Path::Driver, cpus(1))
}

/// Expect that the driver mixes the ID in, all of it, before it has the kernel reseeded. (Clones whose
/// CPUs' clocks differ draw differently without that.)
fn the_id_is_mixed_in_before_the_reseed(context: &Context) -> Result<()> {
    let mut original = Original::boot(context, cpus(1), Look::Mapped)?;
    let Original {
        gdb, vm, symbols, ..
    } = &mut original;
    vm.set_genctr(CLONES[0])?;
    let mix = symbols.function("add_device_randomness")?.start;
    let reseed = symbols.function("random_ioctl")?.start;
    let (cpu, registers) = run_to(gdb, &[mix, reseed], |gdb, cpu, registers| {
        let caller = symbols.at(gdb.end(cpu, registers)?.pc);
        Ok(caller.is_some_and(|caller| caller.driver))
    })?;
    ensure!(registers.at.pc == mix, "the driver reseeds first");
    let mixed = gdb.read(cpu, registers.arguments[0], 16)?;
    let id = id_in_memory(vm)?;
    ensure!(
        mixed == id,
        "the driver mixes in {mixed:x?}, the ID is {id:x?}"
    );
    Ok(())
}

/// Expect the same of the first ID, when the module is loaded.
fn the_first_id_is_mixed_in_before_the_reseed(context: &Context) -> Result<()> {
    let vm = context.boot(Options {
        no_module: true,
        ..cpus(1)
    })?;
    await_random(&vm)?;
    let mix = function(&vm, "add_device_randomness")?;
    let reseed = function(&vm, "random_ioctl")?;
    let id = id_in_memory(&vm)?;
    // The guest is stopped while the debugger is attached, until the debugger lets it run.
    vm.spawn(["sh", "-c", "sleep 1; insmod /vmgenid.ko"], "/tmp/insmod")?;
    let mut gdb = vm.debug()?;
    let mut mixed = false;
    run_to(&mut gdb, &[mix, reseed], |gdb, cpu, registers| {
        if registers.at.pc == reseed {
            return Ok(true);
        }
        let [data, len] = registers.arguments;
        mixed |= len == 16 && gdb.read(cpu, data, 16)? == id;
        Ok(false)
    })?;
    ensure!(mixed, "the driver reseeds first");
    Ok(())
}

/// Expect equal draws without the notification and without read(): the clones draw from the key that
/// is in the snapshot. So the other tests can fail.
fn without_the_barrier_draws_are_equal(context: &Context) -> Result<()> {
    let hold = notifications::to_hold();
    let mut original = Original::boot_beside(context, cpus(1), Look::WithoutBarrier, &hold)?;
    let all = original.boundaries(Path::Periodic)?;
    let extracted = sample_of_reseed(&all)?.swap_remove(2);
    let rows = original.rows_of(Path::Periodic, &[extracted])?;
    ensure!(
        rows.iter().all(|row| row.equal > 0),
        "without the barrier no draw is equal, so no test here can fail"
    );
    Ok(())
}

/// Expect that with patches/linux no draw is equal where the kernel's own reseed, or a draw of
/// another process, was interrupted by the snapshot: without the early look, and without read().
fn a_draw_needs_no_barrier_on_1_cpu(context: &Context) -> Result<()> {
    expect_no_barrier_needed(context, 1)
}

/// Expect the same on two CPUs.
fn a_draw_needs_no_barrier_on_2_cpus(context: &Context) -> Result<()> {
    expect_no_barrier_needed(context, 2)
}

/// Expect the same where the snapshot interrupted the process itself in the vDSO, which computes random
/// bytes in the process: in a draw after a change of the counter, with a new key, from its batch, and
/// with a new batch. The draw that was interrupted began before the restore, and is not counted.
fn a_draw_needs_no_barrier_in_the_vdso_on_1_cpu(context: &Context) -> Result<()> {
    expect_none_equal(context, 1, Path::Vdso)
}

/// Expect the same on two CPUs.
fn a_draw_needs_no_barrier_in_the_vdso_on_2_cpus(context: &Context) -> Result<()> {
    expect_none_equal(context, 2, Path::Vdso)
}

/// Expect that a look at the ID adds at most 8 instructions to a draw by a system call, and one at the
/// counter at most 4 to what a draw by the vDSO takes without the patches. That draw makes no system
/// call, which takes about five times as many. Also after a change of the counter. The guest's time
/// counts its instructions.
fn a_draw_takes_few_instructions_more_with_the_device(context: &Context) -> Result<()> {
    let with_device = Options {
        icount: true,
        no_module: true,
        append: vec!["quiet norandmaps".into()],
        ..genctr(42)
    };
    let without = Options {
        no_device: true,
        genctr: None,
        ..with_device.clone()
    };
    let cost = |vm: &Vm| -> Result<[f64; 2]> {
        let said = vm.shell("contract vdso")?;
        let costs = said.split_whitespace().map(str::parse);
        let costs = costs.collect::<Result<Vec<f64>, _>>()?;
        costs
            .try_into()
            .map_err(|_| anyhow::anyhow!("the guest says: {said}"))
    };

    let mainline = Options {
        kernel: Some("tiny".into()),
        ..without.clone()
    };
    let vm = context.boot(mainline)?;
    await_random(&vm)?;
    let [vdso_mainline, _] = cost(&vm)?;
    drop(vm);
    let vm = context.boot(without)?;
    await_random(&vm)?;
    let [vdso_without, call_without] = cost(&vm)?;
    drop(vm);
    let mut vm = context.boot(with_device)?;
    await_random(&vm)?;
    for change in [false, true] {
        if change {
            vm.set_genctr(43)?;
            // The driver is notified, or this call reseeds.
            vm.shell("head -c 16 /dev/urandom >/dev/null")?;
        }
        let [vdso, call] = cost(&vm)?;
        let said = format!(
            "changed {change}: {vdso} instructions by the vDSO, {call} by system calls; without the device {vdso_without} and {call_without}; without the patches {vdso_mainline} by the vDSO"
        );
        eprintln!("{said}");
        ensure!(
            vdso * 2.0 < call
                && vdso.max(vdso_without) <= vdso_mainline + 4.0
                && call <= call_without + 8.0,
            "{said}"
        );
    }
    Ok(())
}

/// Expect equal draws by each consumer without those patches, where that consumer is the first one after
/// the restore: each draws from a key that is in the snapshot. So the tests with the patches can fail.
fn each_consumer_repeats_itself_without_the_barrier(context: &Context) -> Result<()> {
    let mut original = without_barrier(context, 1)?;
    let mut n = 0;
    let first = |_: &Boundary| {
        n += 1;
        n <= CONSUMERS.len()
    };
    let rows = original.equal_draws(Path::Vdso, first, |row| eprintln!("{}", row.equal))?;
    ensure!(rows.len() == CONSUMERS.len(), "{} snapshots", rows.len());
    ensure!(
        rows.iter().all(|row| row.equal > 0),
        "a consumer draws nothing equal, so the tests with the patches cannot fail"
    );
    Ok(())
}

fn expect_no_barrier_needed(context: &Context, smp: u16) -> Result<()> {
    for path in [Path::Periodic, Path::Draw] {
        expect_none_equal(context, smp, path)?;
    }
    Ok(())
}

/// Takes snapshots at some of a path's instructions, and checks that no draw is equal in two
/// clones.
fn expect_none_equal(context: &Context, smp: u16, path: Path) -> Result<()> {
    let mut original = without_barrier(context, smp)?;
    let all = original.boundaries(path)?;
    let symbols = &original.symbols;
    let is_in = |name: &str| {
        let mut places = all.iter().map(|at| symbols.describe(at.address));
        places.any(|place| place.starts_with(name))
    };
    // Parts of the path that it must not go around.
    let parts: &[&str] = match path {
        Path::Periodic => &RESEED[1..],
        Path::Vdso => &[VDSO, IN_VDSO],
        _ => &[],
    };
    for part in parts {
        ensure!(is_in(part), "{part} is not in {path}");
    }
    let calls = all.iter().filter(|at| at.after.is_some()).count();
    ensure!(
        path != Path::Vdso || calls > 0,
        "{path} makes no system call, where the generation is new"
    );
    let count = all.len();
    let mut n = 0;
    let wanted = |_: &Boundary| {
        n += 1;
        n % count.div_ceil(SAMPLE) == 0
    };
    judge(path, &original.equal_draws(path, wanted, |_| {})?)
}

/// A guest in which another process draws all the time.
fn without_barrier(context: &Context, smp: u16) -> Result<Original> {
    let options = Options {
        parameter: vec!["early_look=0".into()],
        ..cpus(smp)
    };
    let draws = "while :; do head -c 16 /dev/urandom >/dev/null; done";
    Original::boot_beside(context, options, Look::WithoutBarrier, draws)
}

/// Expect no equal draw after the barrier, for a snapshot at any instruction of a reseed of the
/// kernel's own.
fn every_instruction_of_a_reseed(context: &Context) -> Result<()> {
    every_instruction(context, Path::Periodic)
}

/// Expect the same of every instruction of the reseed of the kernel's own driver.
fn every_instruction_of_the_builtin_drivers_reseed(context: &Context) -> Result<()> {
    every_instruction(context, Path::Builtin)
}

/// Expect the same of every instruction of read().
fn every_instruction_of_read(context: &Context) -> Result<()> {
    every_instruction(context, Path::Read)
}

/// Expect the same of every instruction of the driver's reseed.
fn every_instruction_of_the_drivers_reseed(context: &Context) -> Result<()> {
    every_instruction(context, Path::Driver)
}

/// Expect no equal draw with patches/linux, without read(), for a snapshot at any instruction of a
/// draw or of a reseed of the kernel's own.
fn every_instruction_of_a_draw_without_a_barrier(context: &Context) -> Result<()> {
    every_instruction_without_a_barrier(context, &[Path::Draw, Path::Periodic])
}

/// Expect the same of every instruction of the vDSO's function.
fn every_instruction_of_a_draw_of_the_vdso(context: &Context) -> Result<()> {
    every_instruction_without_a_barrier(context, &[Path::Vdso])
}

fn every_instruction_without_a_barrier(context: &Context, paths: &[Path]) -> Result<()> {
    let mut failures = Vec::new();
    for &path in paths {
        let mut table = Table::default();
        for smp in [1, 2] {
            let column = format!("{smp} CPU");
            let mut original = without_barrier(context, smp)?;
            let tell = |row: &Row| {
                // What was computed before the snapshot is in both clones.
                let last = if row.last_equal {
                    "the draw in progress too"
                } else {
                    ""
                };
                eprintln!("{column}: {:5} {} {last}", row.equal, row.instruction());
            };
            let rows = original.equal_draws(path, |_| true, tell)?;
            let last = rows.iter().filter(|row| row.last_equal).count();
            println!(
                "{path}, {column}: {} snapshots; at {last} of them the last draw that began before \
                 the restore is the same in both clones",
                rows.len()
            );
            failures.extend(judge(path, &rows).err());
            table.add(column, &rows);
        }
        println!("a snapshot in {path}: equal draws of {DRAWS}\n\n{table}");
    }
    failures.into_iter().next().map_or(Ok(()), Err)
}

/// For `make stepper`: takes a snapshot at every instruction of a path, and prints a table. With
/// VMGENID_WINDOW in the environment, of the kernel's reseed only those at which a key is in danger.
/// With VMGENID_PARAMETERS=early_look=0, only without the early look.
fn every_instruction(context: &Context, path: Path) -> Result<()> {
    let window_only = std::env::var_os("VMGENID_WINDOW").is_some();
    let mut table = Table::default();
    let mut failures = Vec::new();
    let without = parameters().as_deref() == Some("early_look=0");
    let looks: &[u8] = if without { &[0] } else { &[1, 0] };
    for early_look in looks {
        for smp in [1, 2] {
            let column = format!("{smp} CPU, early_look={early_look}");
            let options = Options {
                parameter: vec![format!("early_look={early_look}")],
                ..cpus(smp)
            };
            let mut original = Original::boot(context, options, look(path))?;
            let tell = |row: &Row| eprintln!("{column}: {:5} {}", row.equal, row.instruction());
            let window = match path {
                Path::Periodic | Path::Builtin if window_only => {
                    let all = original.boundaries(path)?;
                    let window = window_of_reseed(&all)?;
                    Some(all[window.hashed..window.unlocked].to_vec())
                }
                _ => None,
            };
            let wanted = |at: &Boundary| match &window {
                Some(window) => window.iter().any(|wanted| wanted.address == at.address),
                None => true,
            };
            let rows = original.equal_draws(path, wanted, tell)?;
            failures.extend(judge(path, &rows).err());
            table.add(column, &rows);
        }
    }
    let driver = kernel::driver(&kernel::default());
    println!("{driver}, a snapshot in {path}: equal draws of {DRAWS}\n\n{table}");
    failures.into_iter().next().map_or(Ok(()), Err)
}

/// Instructions, and how many draws were equal in each configuration.
#[derive(Default)]
struct Table {
    columns: Vec<String>,
    rows: Vec<(String, Vec<Option<usize>>)>,
}

impl Table {
    fn add(&mut self, column: String, rows: &[Row]) {
        for row in rows {
            let instruction = row.instruction();
            let known = self
                .rows
                .iter()
                .position(|(known, _)| *known == instruction);
            let n = known.unwrap_or_else(|| {
                self.rows.push((instruction, Vec::new()));
                self.rows.len() - 1
            });
            self.rows[n].1.resize(self.columns.len(), None);
            self.rows[n].1.push(Some(row.equal));
        }
        self.columns.push(column);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| {} | instruction |", self.columns.join(" | "))?;
        writeln!(f, "|{}", " ---: |".repeat(self.columns.len()) + " --- |")?;
        for (instruction, equal) in &self.rows {
            for (n, column) in self.columns.iter().enumerate() {
                let width = column.len();
                match equal.get(n).copied().flatten() {
                    Some(equal) => write!(f, "| {equal:width$} ")?,
                    // This configuration went another way.
                    None => write!(f, "| {:>width$} ", "-")?,
                }
            }
            writeln!(f, "| {instruction} |")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expect that a name has no types and no suffix of the compiler's, except .cold.
    #[test]
    fn a_name_is_without_what_the_compiler_added() {
        let apply = "_RINvMs_NtNtCs9XfaWdM7c5b_7vmgenid6driver4ruleNtB5_4Rule5applyNCNvB5_1f0EB9_";
        for (name, expected) in [
            ("crng_reseed", "crng_reseed"),
            ("extract_entropy.constprop.0", "extract_entropy"),
            ("crng_reseed.cold", "crng_reseed.cold"),
            (apply, "<vmgenid::driver::rule::Rule>::apply"),
        ] {
            assert_eq!(demangled(name), expected);
        }
    }

    /// Expect that the sample is where a key is in danger, and an error where a function is
    /// missing.
    #[test]
    fn the_sample_of_a_reseed_is_where_the_key_is_in_danger() {
        let calls = [
            "_raw_spin_lock_irqsave",
            "blake2s_final",
            "blake2s",
            "",
            "extract_entropy",
            "",
            "_raw_spin_lock_irqsave",
            "",
            "_raw_spin_unlock_irqrestore",
        ];
        let boundary = |(n, call): (usize, &&str)| Boundary {
            address: n as u64,
            after: (!call.is_empty()).then(|| call.to_string()),
        };
        let all: Vec<_> = calls.iter().enumerate().map(boundary).collect();
        let sample = sample_of_reseed(&all).unwrap();
        let sample: Vec<_> = sample.iter().map(|at| at.address).collect();
        assert_eq!(sample, [1, 2, 4, 5, 6, 7]);
        let said = sample_of_reseed(&all[2..]).unwrap_err().to_string();
        assert!(said.contains("blake2s_final"), "{said}");
    }
}
