// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guests in which processes observe the counter in every way at once, and the checks of what each
//! of them observed after a restore. tests/contract/src/actors/warm.rs has these processes.

use crate::{
    age::grow_old,
    context::{Context, Late, generation, no_splat, settle, wait},
    vmforks,
};
use anyhow::{Context as _, Error, Result, bail, ensure};
use harness::{
    Options, Vm,
    qapi::qmp::{cont, human_monitor_command, stop},
};
use std::{collections::BTreeMap, fmt, str::FromStr};

const LOG: &str = "/tmp/warm";

/// The number of words before the counts of looks, as in the guest's program.
pub const MARK: usize = 8;

/// A guest and its lookers: the processes that observe the counter.
pub struct Warm {
    pub vm: Vm,
    cpus: usize,
    board: Board,
}

/// The page on which the lookers count their looks.
pub struct Board {
    /// Its virtual address, which is the same in all lookers.
    pub address: u64,
    pub mark: Vec<u32>,
    /// Its guest physical address, once that is known.
    physical: Option<u64>,
}

impl FromStr for Board {
    type Err = Error;

    /// "board 0xADDRESS WORD ..."
    fn from_str(line: &str) -> Result<Self> {
        let hex = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16);
        let words: Vec<_> = line.split_whitespace().collect();
        let ["board", address, mark @ ..] = &words[..] else {
            bail!("the lookers say: {line}");
        };
        let mark: Result<Vec<_>, _> = mark.iter().map(|word| hex(word)).collect();
        Ok(Self {
            address: hex(address)?,
            mark: mark?.into_iter().map(|word| word as u32).collect(),
            physical: None,
        })
    }
}

/// The state of a guest at the moment when it was saved.
pub struct Moment {
    counter: u32,
    /// How often the kernel had been reseeded.
    reseeds: u64,
    /// How often the vmfork notifiers had been called.
    notified: u32,
    /// How many looks each looker had counted.
    looks: Vec<u32>,
}

impl Moment {
    /// The names of the lookers, in the order of `looks`. The last one sleeps, and has no count
    /// there.
    fn lookers(&self) -> Vec<String> {
        let spinners = 0..self.looks.len().saturating_sub(2);
        let spinners = spinners.map(|cpu| format!("spinner-{cpu}"));
        let others = ["reader", "child", "waiter"].map(String::from);
        spinners.chain(others).collect()
    }
}

/// What one looker wrote down when it learned of a change.
#[derive(Clone, Debug)]
struct Seen {
    who: String,
    from: u32,
    seen: u32,
    read: u32,
    reseeds: u64,
    look: u32,
    random: String,
}

impl FromStr for Seen {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self> {
        let words: Vec<_> = line.split(' ').collect();
        let [who, from, seen, read, reseeds, look, random] = words[..] else {
            bail!("a looker says: {line}");
        };
        Ok(Self {
            who: who.into(),
            from: from.parse()?,
            seen: seen.parse()?,
            read: read.parse()?,
            reseeds: reseeds.parse()?,
            look: look.parse()?,
            random: random.into(),
        })
    }
}

/// All draws of all clones, in hexadecimal, and which process made each.
#[derive(Default)]
pub struct Draws(BTreeMap<String, String>);

impl Draws {
    fn insert(&mut self, random: &str, who: String) -> Result<()> {
        ensure!(
            random.len() == 64,
            "{who} drew {random:?}, which is not 32 bytes"
        );
        match self.0.get(random) {
            Some(other) => bail!("{who} and {other} drew the same 32 bytes, {random}"),
            None => {
                self.0.insert(random.into(), who);
                Ok(())
            }
        }
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// A promise that does not hold, as opposed to a restore that failed.
#[derive(Debug)]
pub struct Broken(pub Error);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "THE PROPERTY DOES NOT HOLD: {:#}", self.0)
    }
}

impl std::error::Error for Broken {}

impl Warm {
    /// Boots a guest, and starts the lookers.
    pub fn boot(context: &Context, options: Options) -> Result<Self> {
        Self::start(vmforks::boot(context, options)?)
    }

    /// The same, in a guest that is old when the lookers start.
    pub fn boot_old(context: &Context, options: Options) -> Result<Self> {
        let mut vm = vmforks::boot(context, options)?;
        grow_old(&mut vm)?;
        Self::start(vm)
    }

    fn start(vm: Vm) -> Result<Self> {
        let cpus = usize::from(vm.options()?.smp());
        // In Debian, udev loads the module, some time after the boot.
        wait("/dev/vmgenid", || {
            let node = vm.shell("ls /dev/vmgenid 2>/dev/null || true")?;
            Ok((!node.is_empty()).then_some(()))
        })?;
        let count = cpus.to_string();
        let argv = ["contract", "warm", "--out", LOG, "--cpus", &count];
        vm.spawn(argv, "/tmp/warm.err")?;
        let board = wait("the lookers look", || {
            let said = vm.shell("cat /tmp/warm.err")?;
            Ok(said.ends_with('\n').then_some(said))
        })?;
        Ok(Self {
            vm,
            cpus,
            board: board.trim().parse()?,
        })
    }

    /// The same lookers in another guest, which has the state of this one.
    pub fn in_another(&self, vm: Vm) -> Self {
        Self {
            vm,
            cpus: self.cpus,
            board: Board {
                mark: self.board.mark.clone(),
                ..self.board
            },
        }
    }

    /// Stops the guest, and returns how many observations each process has counted. The guest is
    /// stopped when this returns.
    pub fn stop(&mut self) -> Result<Moment> {
        let notified = vmforks::count(&self.vm)?;
        let reseeds = generation(&self.vm)?;
        let physical = match self.board.physical {
            Some(physical) => physical,
            None => wait("a spinner on a CPU", || self.find_board())?,
        };
        self.board.physical = Some(physical);
        self.vm.qmp(&stop {})?;
        // The spinners, the reader, the child.
        let words = words(&self.vm, physical, MARK + self.cpus + 2)?;
        let words = words.context("the board is not in the guest's memory")?;
        let (mark, looks) = words.split_at(MARK);
        ensure!(
            mark == self.board.mark,
            "the board has another mark: {mark:x?}"
        );
        Ok(Moment {
            counter: self.vm.options()?.counter().context("no counter")?,
            reseeds,
            notified,
            looks: looks.to_vec(),
        })
    }

    /// Translates the board's address with the page tables of the first CPU. `None`: that CPU runs
    /// none of the lookers at present.
    fn find_board(&self) -> Result<Option<u64>> {
        self.vm.qmp(&stop {})?;
        let said = self.vm.qmp(&human_monitor_command {
            command_line: format!("gva2gpa {:#x}", self.board.address),
            cpu_index: None,
        })?;
        let mut found = None;
        if let Some(physical) = said.trim().strip_prefix("gpa: 0x") {
            let physical = u64::from_str_radix(physical, 16)?;
            let mark = words(&self.vm, physical, MARK)?;
            found = (mark.as_ref() == Some(&self.board.mark)).then_some(physical);
        }
        self.vm.qmp(&cont {})?;
        Ok(found)
    }

    /// Waits until every process that does not sleep has made another observation since then.
    pub fn await_looks(&mut self, since: &Moment) -> Result<()> {
        wait("all processes observe again", || {
            let now = self.stop()?;
            self.vm.qmp(&cont {})?;
            let mut looks = now.looks.iter().zip(&since.looks);
            // A look is counted before it is made, so a look was certainly made only when the next
            // one has been counted.
            Ok(looks
                .all(|(now, then)| now.wrapping_sub(*then) > 1)
                .then_some(()))
        })
    }

    /// The state of a guest that continues. The numbers of looks are not known.
    pub fn moment(&self, counter: u32) -> Result<Moment> {
        Ok(Moment {
            counter,
            reseeds: generation(&self.vm)?,
            notified: vmforks::count(&self.vm)?,
            looks: Vec::new(),
        })
    }

    /// Takes a snapshot. The guest is stopped when this returns, as after [`Self::stop`].
    pub fn snapshot(&mut self, name: &str) -> Result<Moment> {
        let moment = self.stop()?;
        self.vm.snapshot(&name.parse()?)?;
        Ok(moment)
    }
}

/// Reads `count` words of the guest's memory. `None`: there is no memory at that address.
fn words(vm: &Vm, physical: u64, count: usize) -> Result<Option<Vec<u32>>> {
    let said = vm.qmp(&human_monitor_command {
        command_line: format!("xp /{count}wx {physical:#x}"),
        cpu_index: None,
    })?;
    // "0000000000001000: 0x12345678 0x12345678 ..."
    let words = said
        .lines()
        .filter_map(|line| line.split_once(':'))
        .flat_map(|(_, words)| words.split_whitespace());
    let words: Result<Vec<_>, _> = words
        .map(|word| u32::from_str_radix(word.trim_start_matches("0x"), 16))
        .collect();
    match words {
        Ok(words) if words.len() == count => Ok(Some(words)),
        _ => Ok(None),
    }
}

/// The lines that all processes have written about a change from this counter.
fn seen(vm: &Vm, from: u32) -> Result<Vec<Seen>> {
    let said = vm.shell(&format!("cat /tmp/warm.err; cat {LOG}"))?;
    let mut lines = said.lines();
    let first = lines.next().unwrap_or_default();
    ensure!(first.starts_with("board "), "a looker says: {first}");
    // Other lines are error messages of an observer.
    let seen: Result<Vec<Seen>> = lines.map(str::parse).collect();
    Ok(seen?.into_iter().filter(|seen| seen.from == from).collect())
}

/// Checks all that is promised of a guest that was restored from `moment`, with this counter. Its
/// draws are added to `draws`.
///
/// # Errors
///
/// [`Broken`] if a promise does not hold. Any other error comes from the machine.
pub fn check(vm: &Vm, moment: &Moment, counter: u32, draws: &mut Draws) -> Result<()> {
    let all_lookers = moment.lookers().len();
    let all = wait("all processes see the change", || {
        let all = seen(vm, moment.counter)?;
        Ok((all.len() >= all_lookers).then_some(()))
    });
    match all {
        // `judge` names the process that has not seen the change.
        Err(err) if err.is::<Late>() => {}
        all => all?,
    }
    // The notifiers are called after the reseed.
    let notified = wait("the notifiers", || {
        let notified = vmforks::count(vm)?;
        Ok((notified > moment.notified).then_some(()))
    });
    match notified {
        Err(err) if err.is::<Late>() => {}
        notified => notified?,
    }
    // Whatever was still due has happened when this returns.
    settle(vm)?;
    let all = seen(vm, moment.counter)?;
    let notified = vmforks::count(vm)?;
    judge(&all, notified, moment, counter, draws).map_err(Broken)?;
    no_splat(vm)
}

/// Checks that all observations are as promised, and that the notifiers were called once.
fn judge(
    all: &[Seen],
    notified: u32,
    moment: &Moment,
    counter: u32,
    draws: &mut Draws,
) -> Result<()> {
    for (place, name) in moment.lookers().iter().enumerate() {
        let mut own = all.iter().filter(|seen| seen.who == *name);
        let (Some(seen), None) = (own.next(), own.next()) else {
            bail!("{name} has to learn of a restore, and once: {all:?}");
        };
        // The look that was counted last may have been made before the snapshot. Then the next look
        // is the first one after the restore. A process that sleeps makes no looks.
        if let Some(&looks) = moment.looks.get(place) {
            let after = seen.look.wrapping_sub(looks);
            ensure!(
                after <= 1,
                "{name} made {} stale looks after the restore, which came in look {looks}: {seen:?}",
                after - 1
            );
        }
        ensure!(
            (seen.seen, seen.read) == (counter, counter),
            "the counter is {counter}: {seen:?}"
        );
        ensure!(
            seen.reseeds > moment.reseeds,
            "the kernel has to be reseeded when {name} knows of the change; before it were {}: {seen:?}",
            moment.reseeds
        );
        draws.insert(&seen.random, format!("{name} of clone {counter}"))?;
    }
    ensure!(
        notified == moment.notified + 1,
        "the notifiers were called {} times for one restore",
        notified - moment.notified
    );
    Ok(())
}

/// Waits until a process sees that the counter of a running guest is this one.
pub fn check_running(vm: &Vm, moment: &Moment, counter: u32) -> Result<()> {
    let seen = wait("a process sees the change", || {
        let seen = seen(vm, moment.counter)?.into_iter().next();
        Ok(seen)
    })?;
    ensure!(seen.seen == counter, "the counter is {counter}: {seen:?}");
    Ok(())
}

/// Checks that nothing at all has happened since `moment`.
pub fn check_nothing(vm: &Vm, moment: &Moment) -> Result<()> {
    vm.shell("sleep 1")?;
    let seen = seen(vm, moment.counter)?;
    ensure!(seen.is_empty(), "a process saw a change: {seen:?}");
    vmforks::expect_count(vm, moment.notified)?;
    no_splat(vm)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The looks of a guest with one CPU: of the spinner, the reader and the child.
    const MOMENT: [u32; 3] = [100, u32::MAX, 7];

    /// A guest that was saved at 42, when it had been reseeded twice.
    fn moment() -> Moment {
        Moment {
            counter: 42,
            reseeds: 2,
            notified: 2,
            looks: MOMENT.into(),
        }
    }

    /// The observations that are right where the new counter is 43.
    fn right() -> Vec<Seen> {
        let looks = [101, 0, 7, 0];
        let lookers = moment().lookers().into_iter().zip(looks).enumerate();
        let line = |(n, (who, look))| format!("{who} 42 43 43 3 {look} {n:064x}");
        lookers.map(|seen| line(seen).parse().unwrap()).collect()
    }

    fn judged(all: &[Seen], notified: u32) -> String {
        let result = judge(all, notified, &moment(), 43, &mut Draws::default());
        result.err().map_or("right".into(), |err| err.to_string())
    }

    /// The result of `judge` if one value of one observation differs.
    fn if_only(who: usize, change: fn(&mut Seen)) -> String {
        let mut all = right();
        change(&mut all[who]);
        judged(&all, 3)
    }

    /// Expect no error for observations that are as promised.
    #[test]
    fn what_is_right_is_right() {
        assert_eq!(judged(&right(), 3), "right");
    }

    /// Expect an error that names the cause for each value that is wrong: an old counter, no
    /// reseed, a short draw, a stale look, a second call of the notifiers.
    #[test]
    fn each_promise_is_looked_at() {
        for who in 0..4 {
            assert!(if_only(who, |seen| seen.seen = 42).contains("the counter is 43"));
            assert!(if_only(who, |seen| seen.read = 42).contains("the counter is 43"));
            assert!(if_only(who, |seen| seen.reseeds = 2).contains("has to be reseeded"));
            assert!(if_only(who, |seen| seen.random.truncate(62)).contains("not 32 bytes"));
        }
        assert!(if_only(0, |seen| seen.look = 102).contains("spinner-0 made 1 stale looks"));
        assert!(if_only(1, |seen| seen.look = 9).contains("reader made 9 stale looks"));
        assert!(if_only(2, |seen| seen.look = 7 + 500).contains("child made 499 stale looks"));
        assert!(judged(&right(), 4).contains("called 2 times"));
    }

    /// Expect an error if a process has seen no change, or two.
    #[test]
    fn each_learns_once() {
        for who in 0..4 {
            let mut all = right();
            let seen = all.remove(who);
            assert!(judged(&all, 3).contains(&format!("{} has to learn", seen.who)));
            all.extend([seen.clone(), seen]);
            assert!(judged(&all, 3).contains("has to learn"));
        }
    }

    /// Expect an error if two clones drew the same bytes.
    #[test]
    fn the_same_bytes_in_two_clones_are_noticed() {
        let mut draws = Draws::default();
        judge(&right(), 3, &moment(), 43, &mut draws).unwrap();
        let err = judge(&right(), 3, &moment(), 43, &mut draws).unwrap_err();
        assert!(err.to_string().contains("drew the same 32 bytes"), "{err}");
    }
}
