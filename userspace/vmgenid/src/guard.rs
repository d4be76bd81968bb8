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

/// The behaviour on a machine without a counter. There is no default, because none fits all
/// callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WithoutCounter {
    /// Refuse to work: [`Error::NoCounter`].
    Refuse,

    /// Refuse to work, also with a counter that [has no barrier](Source::has_barrier):
    /// [`Error::NoBarrier`].
    RefuseWithoutBarrier,

    /// Use cached data once, then make it anew. This is slow. Until the kernel has been reseeded, a
    /// clone draws the same as other clones.
    CacheNothing,

    /// Detect forks only. The caller knows that this machine is never restored.
    NoticeForksOnly,
}

/// Detects restores and forks. A caller checks it before each use of cached data.
///
/// Clones of a guard share the open device.
#[derive(Clone, Debug)]
pub struct Guard {
    word: Word,
    counter: Option<Arc<Counter>>,
    cache: bool,
    /// With [`Source::Vmclock`]: the last stamp, and the time when it was first seen.
    first_seen: Arc<Mutex<Option<(Stamp, Instant)>>>,
}

/// The state of a [`Guard`] at one moment.
///
/// It is the sum of the generation and of a number for the process, so that one comparison is
/// enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp(u64);

impl Stamp {
    /// No guard has this stamp: a stamp is the sum of a generation below 2^32 and of a multiple of
    /// 2^32. (A generation of [`Source::Vmclock`] has 64 bits. With it, one sum can be equal to
    /// this.)
    ///
    /// [`Source::Vmclock`]: crate::Source::Vmclock
    pub(crate) const NEVER: Self = Self(u64::MAX);
}

impl Guard {
    /// The time after a change of [`Source::Vmclock`] in which nothing is kept. This source changes
    /// before the kernel's reseed, and has no barrier. Data that is made between the change and the
    /// reseed can be equal in every clone. The time is a hundred times as long as the reseed takes.
    ///
    /// [`Source::Vmclock`]: crate::Source::Vmclock
    pub const SETTLES: Duration = Duration::from_secs(1);

    /// Uses this counter.
    pub fn new(counter: Arc<Counter>) -> Self {
        Self {
            word: counter.word().clone(),
            counter: Some(counter),
            cache: true,
            first_seen: Arc::default(),
        }
    }

    /// Uses the best counter of this machine. If there is none, `without` decides.
    ///
    /// # Errors
    ///
    /// Those of [`Counter::open`]. Only [`Error::NoCounter`] makes this continue without a counter.
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

    /// Returns the counter, if there is one.
    #[must_use]
    pub fn counter(&self) -> Option<&Arc<Counter>> {
        self.counter.as_ref()
    }

    /// Returns whether the machine was not restored, and the process not forked, since
    /// [`barrier`](Self::barrier) returned this stamp.
    ///
    /// The compiler does not move earlier computations behind this comparison.
    #[inline(always)]
    #[must_use]
    pub fn is_unchanged_since(&self, stamp: &Stamp) -> bool {
        // A restore comes between two instructions, so the order of the instructions is enough. The
        // fence is for the compiler.
        compiler_fence(SeqCst);
        let process = self.word.process().load(Relaxed);
        process.wrapping_add(self.word.load()) == stamp.0
    }

    /// Later draws from the kernel differ from those of all other clones, if the source [has a
    /// barrier](crate::Source::has_barrier). The caller makes its data after this, and calls
    /// [`is_unchanged_since`](Self::is_unchanged_since) before each use. The caller may use the
    /// data more than once if [`may_keep`](Self::may_keep) returns true.
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

    /// Returns whether data that was made after the barrier that returned this stamp may be used
    /// more than once. This is false without a counter and with [`WithoutCounter::CacheNothing`].
    /// With [`Source::Vmclock`] it is false for [some time](Self::SETTLES) after each change.
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

    /// The number of this process: never zero, and another one than that of its parent.
    fn process(&self) -> u64 {
        /// The count of numbers that this process and its ancestors have made.
        static FORKS: AtomicU64 = AtomicU64::new(0);
        let process = self.word.process();
        match process.load(SeqCst) {
            0 => {
                let new = (FORKS.fetch_add(1, SeqCst) + 1) << 32;
                // Another thread may have stored its number first.
                let result = process.compare_exchange(0, new, SeqCst, SeqCst);
                result.err().unwrap_or(new)
            }
            old => old,
        }
    }
}
