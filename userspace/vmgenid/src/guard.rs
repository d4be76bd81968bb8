// SPDX-License-Identifier: MIT OR Apache-2.0

use crate::{
    Counter, Error, Source,
    system::{Page, Word},
};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicU64,
            Ordering::{Relaxed, SeqCst},
            compiler_fence,
        },
    },
    time::{Duration, Instant},
};

/// What to do where the machine has no counter. There is no default: each is wrong for somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WithoutCounter {
    /// Refuse to work: [`Error::NoCounter`].
    Refuse,

    /// Refuse to work, also with a counter that [has no barrier](Source::has_barrier):
    /// [`Error::NoBarrier`].
    RefuseWithoutBarrier,

    /// Make everything anew each time it is used. Slow, and as good as the kernel: a clone gets what
    /// others get until the kernel has been reseeded, if it ever is.
    CacheNothing,

    /// Take it that this machine is never restored; a `fork` is noticed all the same.
    NoticeForksOnly,
}

/// What is looked at before anything cached is used: the generation, and whether this process was
/// forked.
///
/// To have one for all of a process, clone it: they share the open device.
#[derive(Clone, Debug)]
pub struct Guard {
    word: Word,
    counter: Option<Arc<Counter>>,
    cache: bool,
    /// Of a vmclock: the last stamp, and when it was first seen.
    first_seen: Arc<Mutex<Option<(Stamp, Instant)>>>,
}

/// What a [`Guard`] saw.
///
/// It is the sum of a generation and of what stands for the process, so that one comparison is
/// enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp(u64);

impl Stamp {
    /// No guard ever sees this. (A sum of two numbers of which one is below 2^32, and the other
    /// one is a multiple of 2^32. That of [`Source::Vmclock`] is 64 bits wide; it can be, once.)
    ///
    /// [`Source::Vmclock`]: crate::Source::Vmclock
    pub(crate) const NEVER: Self = Self(u64::MAX);
}

impl Guard {
    /// How long after a change of [`Source::Vmclock`] nothing is kept: it comes before the kernel's
    /// reseed, and there is no barrier. What was made between the two could be in every clone, and
    /// would stay there. A hundred times as long as the reseed takes.
    ///
    /// [`Source::Vmclock`]: crate::Source::Vmclock
    pub const SETTLES: Duration = Duration::from_secs(1);

    /// Looks at this counter.
    pub fn new(counter: Arc<Counter>) -> Self {
        Self {
            word: counter.word().clone(),
            counter: Some(counter),
            cache: true,
            first_seen: Arc::default(),
        }
    }

    /// Looks at the best counter that this machine has; if there is none, does as it is told.
    ///
    /// # Errors
    ///
    /// Those of [`Counter::open`]. Except for there being no counter, none of them is taken for
    /// permission to do without.
    pub fn open(without: WithoutCounter) -> Result<Self, Error> {
        match (Counter::open(), without) {
            (Ok(counter), WithoutCounter::RefuseWithoutBarrier)
                if !counter.source().has_barrier() =>
            {
                Err(Error::NoBarrier {
                    source: counter.source(),
                })
            }
            (Ok(counter), _) => Ok(Self::new(Arc::new(counter))),
            (Err(Error::NoCounter), WithoutCounter::CacheNothing) => Self::without(false),
            (Err(Error::NoCounter), WithoutCounter::NoticeForksOnly) => Self::without(true),
            (Err(err), _) => Err(err),
        }
    }

    fn without(cache: bool) -> Result<Self, Error> {
        let page = Page::map(None, 0).map_err(Error::system("mmap"))?;
        Ok(Self {
            word: Word::new(page, 0),
            counter: None,
            cache,
            first_seen: Arc::default(),
        })
    }

    /// Returns the counter that is looked at, if there is one.
    #[must_use]
    pub fn counter(&self) -> Option<&Arc<Counter>> {
        self.counter.as_ref()
    }

    /// Returns whether the machine was not restored, and the process not forked, since this was
    /// what [`barrier`](Self::barrier) returned.
    ///
    /// What was computed before this is called was computed before the look.
    #[inline(always)]
    #[must_use]
    pub fn is_unchanged_since(&self, stamp: &Stamp) -> bool {
        // The CPU executes in order, as far as a restore can tell: it comes between two instructions.
        // The compiler is told here.
        compiler_fence(SeqCst);
        let process = self.word.process().load(Relaxed);
        process.wrapping_add(self.word.load()) == stamp.0
    }

    /// What is drawn from the kernel after this, no other clone has, if the source
    /// [has a barrier](crate::Source::has_barrier). Make then what is to be used, and look with
    /// [`is_unchanged_since`](Self::is_unchanged_since) before it is. It may be kept if
    /// [`may_keep`](Self::may_keep) says so.
    ///
    /// # Errors
    ///
    /// Those of [`Counter::barrier`].
    pub fn barrier(&self) -> Result<Stamp, Error> {
        let process = self.process();
        let generation = match &self.counter {
            Some(counter) => counter.barrier()?.number(),
            None => 0,
        };
        Ok(Stamp(process.wrapping_add(generation)))
    }

    /// Returns whether what was made after the barrier that returned this may be used more than once.
    /// Not if the caller asked for [`WithoutCounter::CacheNothing`], and there is no counter; nor for a
    /// [while](Self::SETTLES), where a change comes before the kernel's reseed, and there is no barrier.
    #[must_use]
    pub fn may_keep(&self, stamp: &Stamp) -> bool {
        match &self.counter {
            None => self.cache,
            Some(counter) if counter.source() != Source::Vmclock => true,
            Some(_) => {
                let first_seen = self.first_seen.lock();
                let mut first_seen = first_seen.unwrap_or_else(PoisonError::into_inner);
                match &*first_seen {
                    Some((seen, when)) if seen == stamp => when.elapsed() > Self::SETTLES,
                    _ => {
                        *first_seen = Some((*stamp, Instant::now()));
                        false
                    }
                }
            }
        }
    }

    /// What stands for this process: never zero, and not what its parent has.
    fn process(&self) -> u64 {
        /// How many were made in this process and its ancestors.
        static FORKS: AtomicU64 = AtomicU64::new(0);
        let process = self.word.process();
        match process.load(SeqCst) {
            0 => {
                let new = (FORKS.fetch_add(1, SeqCst) + 1) << 32;
                // Another thread may have been faster.
                let result = process.compare_exchange(0, new, SeqCst, SeqCst);
                result.err().unwrap_or(new)
            }
            old => old,
        }
    }
}
