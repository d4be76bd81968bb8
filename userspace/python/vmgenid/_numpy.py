# SPDX-License-Identifier: MIT OR Apache-2.0
"""NumPy's generators, guarded as `Random` is. Imports NumPy."""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, List, Optional

import numpy
import numpy.random
from numpy.random import mtrand

from ._cached import Cached
from ._random import guard

# How `install` was called.
_how: Dict[str, Any] = {}

_default_rng = numpy.random.default_rng


def _state(seed: Any = None) -> numpy.random.RandomState:
    if seed is None:
        seed = numpy.frombuffer(os.urandom(624 * 4), dtype=numpy.uint32)
    return numpy.random.RandomState(seed)


class RandomState(numpy.random.RandomState):
    """Each method draws from a RandomState that is made anew after a restore, and after a fork."""

    def __init__(self) -> None:
        super().__init__(0)
        self._cached = Cached(_state, **_how)

    def seed(self, seed: Any = None) -> None:
        self._cached.renew(None if seed is None else lambda: _state(seed))

    def set_state(self, state: Any) -> None:
        def chosen() -> numpy.random.RandomState:
            new = _state(0)
            new.set_state(state)
            return new

        self._cached.renew(chosen)

    def __reduce__(self) -> Any:
        # A copy is a plain RandomState.
        return self._cached.use(lambda state: state.__reduce__())


guard(RandomState, numpy.random.RandomState)


class Generator(numpy.random.Generator):
    """The same of a Generator."""

    def __init__(self) -> None:
        super().__init__(numpy.random.PCG64(0))
        self._cached = Cached(
            lambda: _default_rng(int.from_bytes(os.urandom(32), "little")), **_how
        )

    @property
    def bit_generator(self) -> numpy.random.BitGenerator:
        bit_generator: numpy.random.BitGenerator
        bit_generator = self._cached.use(lambda generator: generator.bit_generator)
        return bit_generator

    def spawn(self, n_children: int) -> List[numpy.random.Generator]:
        return [Generator() for _ in range(n_children)]

    def __reduce__(self) -> Any:
        # A copy has a state of its own.
        return Generator, ()


guard(Generator, numpy.random.Generator)


def default_rng(seed: Any = None) -> numpy.random.Generator:
    return Generator() if seed is None else _default_rng(seed)


default_rng.__doc__ = _default_rng.__doc__


def install(how: Dict[str, Any], rebind: Callable[[Any], None]) -> None:
    from ._install import bound

    _how.update(how)
    old = getattr(mtrand, "_rand")
    new = RandomState()
    rebind({id(old): (old, new), **bound(mtrand, old, new)})
    rebind({id(_default_rng): (_default_rng, default_rng)})
