# SPDX-License-Identifier: MIT OR Apache-2.0
"""random.Random that is reseeded after a restore, before the next number."""

from __future__ import annotations

import functools
import os
import random
from typing import Any, Callable, Optional, Tuple

from ._cached import Cached, WithoutCounter, process
from ._counter import Counter


def seed() -> int:
    """As many bits as the state of MT19937. os.urandom waits until the kernel's generator is
    initialized; random.Random does not."""
    return int.from_bytes(os.urandom(624 * 4), "little")


def guard(cls: type, base: type, names: Tuple[str, ...] = ()) -> None:
    """Has each public method of `base` drawn from the value that `cls` has cached, except `names`, and
    what `cls` itself defines."""

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def draw(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Cached.use(), without one more call.
            value, word, generation, here = self._cached._kept
            result = method(value, *args, **kwargs)
            if word[0] == generation and process[0] == here:
                return result
            return self._cached.use_new(method, *args, **kwargs)

        return draw

    for name in dir(base):
        method = getattr(base, name)
        if not name.startswith("_") and callable(method) and name not in (*names, *vars(cls)):
            setattr(cls, name, guarded(method))


class Random(random.Random):
    """A random.Random that no two clones, and no two processes, continue from the same state.

    It is seeded from the kernel, and again after each restore and each fork, after the barrier. That
    also holds if the caller has chosen the state, by `seed(x)` or `setstate`: a restore ends that
    sequence. Each method checks after its output, which is made anew if there was a restore: no number
    of an old state is returned, and no list is chosen half from one.

    As random.Random, this is not for secrets: see the module `secrets`.

    A method raises `Gone` after a restore if the device was unbound. Methods of the base class that
    are called as functions, `random.Random.random(r)`, do not use this generator's state. A subclass that
    overrides `random` or `getrandbits` does not change what the other methods return.
    """

    def __init__(
        self,
        x: Any = None,
        *,
        counter: Optional[Counter] = None,
        without_counter: WithoutCounter = WithoutCounter.REFUSE,
    ) -> None:
        self._cached = cache(counter, without_counter)
        if x is not None:
            self.seed(x)

    def random(self) -> float:
        value, word, generation, here = self._cached._kept
        number = value.random()
        if word[0] == generation and process[0] == here:
            return number
        return self._cached.use_new(random.Random.random)

    def getrandbits(self, k: int, /) -> int:
        value, word, generation, here = self._cached._kept
        number = value.getrandbits(k)
        if word[0] == generation and process[0] == here:
            return number
        return self._cached.use_new(random.Random.getrandbits, k)

    def seed(self, a: Any = None, version: int = 2) -> None:
        """Without an argument, seeds from the kernel. Otherwise the sequence is that of
        random.Random, until the next restore or fork."""

        def chosen() -> random.Random:
            new = random.Random(0)
            new.seed(a, version)
            return new

        self._cached.renew(None if a is None else chosen)

    def setstate(self, state: Tuple[Any, ...]) -> None:
        """Continues a sequence, until the next restore or fork. Clones that set a state from before the
        restore continue the same sequence."""

        def chosen() -> random.Random:
            new = random.Random(0)
            new.setstate(state)
            return new

        self._cached.renew(chosen)

    # The base class keeps the second number of a pair here, beside the state.
    gauss_next = property(lambda self: None, lambda self, value: None)

    def __reduce__(self) -> Any:
        new = functools.partial(
            type(self),
            counter=self._cached.given,
            without_counter=self._cached.without_counter,
        )
        return new, (), self.getstate()


guard(Random, random.Random)


def cache(
    counter: Optional[Counter], without_counter: WithoutCounter
) -> Cached[random.Random]:
    return Cached(
        lambda: random.Random(seed()), counter=counter, without_counter=without_counter
    )
