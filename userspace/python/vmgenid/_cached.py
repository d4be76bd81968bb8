# SPDX-License-Identifier: MIT OR Apache-2.0
"""Data that is made anew after a restore and after a fork, before it is used again."""

from __future__ import annotations

import enum
import os
import time
from typing import Any, Callable, Generic, Optional, Sequence, Tuple, TypeVar

from ._counter import Counter, NoBarrier, NoCounter, Source, shared

T = TypeVar("T")
R = TypeVar("R")

# Which process this is: how many forks there were. A list, so that other modules can compare it.
process = [0]


def _forked() -> None:
    process[0] += 1


os.register_at_fork(after_in_child=_forked)

# How long after a change of VMClock nothing is kept, in seconds: a hundred times as long as the
# kernel's reseed takes.
_SETTLES = 1.0


class WithoutCounter(enum.Enum):
    """What to do on a machine without a counter."""

    REFUSE = "refuse"
    """Raise NoCounter."""

    REFUSE_WITHOUT_BARRIER = "refuse-without-barrier"
    """Also raise NoBarrier if the best source has no barrier."""

    CACHE_NOTHING = "cache-nothing"
    """Make everything anew each time it is used, also what was seeded by the caller. This is slow, and
    as good as the kernel: clones draw the same until the kernel has been reseeded, if it ever is."""

    NOTICE_FORKS_ONLY = "notice-forks-only"
    """Assume that this machine is never restored."""


def choose(counter: Optional[Counter], without_counter: WithoutCounter) -> Optional[Counter]:
    """The counter to use, or None if the caller does without one."""
    if counter is None:
        try:
            counter = shared()
        except NoCounter:
            if without_counter in (WithoutCounter.REFUSE, WithoutCounter.REFUSE_WITHOUT_BARRIER):
                raise
            return None
    if without_counter is WithoutCounter.REFUSE_WITHOUT_BARRIER and not counter.source.has_barrier:
        raise NoBarrier(f"no barrier: this machine has only {counter.source.value}")
    return counter


# A value; the word to compare; what that word, and `process`, have to be for the value to be used
# again. With None it is never used again. One tuple, so that threads see all of it or nothing.
Kept = Tuple[T, Sequence[int], Optional[int], int]


class Cached(Generic[T]):
    """Data that must not outlive a restore or a fork: a generator's state, a batch of UUIDs, nonces.

    `make` makes it, at first and after each restore and each fork, always after the barrier.
    """

    def __init__(
        self,
        make: Callable[[], T],
        *,
        counter: Optional[Counter] = None,
        without_counter: WithoutCounter = WithoutCounter.REFUSE,
    ) -> None:
        self._make = make
        # None is the counter that the process shares.
        self.given = counter
        self._counter = choose(counter, without_counter)
        self.without_counter = without_counter
        # Of a vmclock: the last generation, and when it was first seen.
        self._first_seen: Tuple[Optional[int], float] = (None, 0.0)
        self._kept: Kept[T]
        self.renew()

    def use(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Returns `function(value, *args, **kwargs)`.

        The check comes after the call. If the machine was restored, or the process forked, before the
        call had ended, its result is thrown away, a new value is made, and `function` is called again:
        it must do nothing but change the value and compute its result.
        """
        value, word, generation, here = self._kept
        result = function(value, *args, **kwargs)
        if word[0] == generation and process[0] == here:
            return result
        return self.use_new(function, *args, **kwargs)

    def use_new(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """The same, with a new value."""
        while True:
            value, word, generation, here = self.renew()
            result = function(value, *args, **kwargs)
            if word[0] == generation and process[0] == here:
                return result

    def renew(self, make: Optional[Callable[[], T]] = None) -> Kept[T]:
        """Makes a new value, after the barrier: by `make`, if the caller chooses the value.

        If this raises, the next use tries again.
        """
        here = process[0]
        word: Sequence[int] = (0,)
        generation = 0
        if self._counter is not None:
            device, generation = self._counter._barrier()
            word = device.word
        chosen = make is not None
        value = make() if make is not None else self._make()
        keep = self._may_keep(generation, chosen)
        # The value and its generation are set together: a thread that made its value earlier, and sets
        # it later, sets an older generation with it, which the next check notices.
        self._kept = (value, word, generation if keep else None, here)
        return value, word, generation, here

    def _may_keep(self, generation: int, chosen: bool) -> bool:
        if self._counter is None:
            return self.without_counter is WithoutCounter.NOTICE_FORKS_ONLY
        if self._counter.source is not Source.VMCLOCK or chosen:
            return True
        seen, when = self._first_seen
        if seen != generation:
            self._first_seen = (generation, time.monotonic())
            return False
        return time.monotonic() - when > _SETTLES
