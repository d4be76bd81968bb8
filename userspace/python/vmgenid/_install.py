# SPDX-License-Identifier: MIT OR Apache-2.0
"""For programs that use `random`, `uuid` and NumPy as they are."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import uuid
from types import ModuleType
from typing import Any, Callable, Dict, Optional

from ._cached import Cached, WithoutCounter
from ._counter import Counter
from ._random import Random, cache


def install(
    *,
    counter: Optional[Counter] = None,
    without_counter: WithoutCounter = WithoutCounter.REFUSE,
    numpy: bool = True,
) -> None:
    """Guards the generators that modules share. Call this early, once: it raises before it changes
    anything if there is no counter and `without_counter` does not allow that.

    - `random`: its functions draw from a `vmgenid.Random`.
    - `os.urandom`, and with it `secrets`, `random.SystemRandom`, `uuid.uuid4`: after a restore they draw
      after the barrier. (They cache nothing, but the kernel returns the same bytes in all clones until
      it has been reseeded.)
    - `uuid.uuid1`: the clock sequence and the node are random, and new after a restore and in a child.
      (Otherwise libuuid caches both.)
    - NumPy, if it is installed, which this imports: `numpy.random`'s functions, its shared RandomState,
      and each `numpy.random.default_rng()` without a seed that is made from now on. `numpy=False`
      leaves NumPy alone.

    Modules that have imported a function by name get the new one. Other references that were taken
    before this call are not found: in closures, default arguments, classes, objects and extension
    modules. `random.Random()`, `RandomState()` and `Generator()` that the program makes stay as they
    are.
    """
    old = getattr(random, "_inst")
    if isinstance(old, Random):
        return
    how: Dict[str, Any] = {"counter": counter, "without_counter": without_counter}
    kernel = Cached(lambda: None, **how)
    node = Cached(_node, **how)
    cached = cache(counter, without_counter)
    if numpy and importlib.util.find_spec("numpy") is not None:
        from . import _numpy

        _numpy.install(how, rebind)

    # Functions that are bound to the instance, wherever they are, call the new class's methods. But
    # `random` and `getrandbits` are bound to the base class's.
    vars(old)["_cached"] = cached
    old.__class__ = Random
    rebind(bound(random, old, old))
    rebind(
        {
            id(function): (function, _after_barrier(kernel, function))
            for function in (os.urandom, os.getrandom)
        }
    )
    rebind({id(uuid.uuid1): (uuid.uuid1, _uuid1(node, uuid.uuid1))})


# What to replace, by its id, and with what. The first of the pair is kept: an id is that of an object
# that exists.
Replaced = Dict[int, "tuple[Any, Any]"]


def bound(module: ModuleType, old: object, new: object) -> Replaced:
    """The functions of `module` that are methods of `old`, and those of `new`."""
    return {
        id(value): (value, getattr(new, value.__name__))
        for value in vars(module).values()
        if callable(value) and getattr(value, "__self__", None) is old
    }


def rebind(replaced: Replaced) -> None:
    """Replaces objects in all modules that are imported."""
    for module in list(sys.modules.values()):
        # A lazy module would be imported by a plain look.
        try:
            names = ModuleType.__getattribute__(module, "__dict__")
        except TypeError:
            continue
        if ModuleType.__getattribute__(module, "__name__").startswith("vmgenid."):
            continue
        for name, value in list(names.items()):
            if id(value) in replaced:
                names[name] = replaced[id(value)][1]


def _after_barrier(kernel: Cached[None], function: Any) -> Any:
    def draw(*args: Any, **kwargs: Any) -> Any:
        return kernel.use(lambda _: function(*args, **kwargs))

    draw.__name__ = draw.__qualname__ = function.__name__
    draw.__doc__ = function.__doc__
    return draw


def _node() -> int:
    """A random node, with the bit that says that it is no hardware address (RFC 9562, 6.10)."""
    return int.from_bytes(os.urandom(6), "big") | 1 << 40


def _uuid1(cached: Cached[int], original: Callable[[int, int], uuid.UUID]) -> Any:
    def uuid1(node: Optional[int] = None, clock_seq: Optional[int] = None) -> uuid.UUID:
        def make(own: int) -> uuid.UUID:
            # With both given, `uuid` does not ask libuuid.
            return original(
                own if node is None else node,
                random.getrandbits(14) if clock_seq is None else clock_seq,
            )

        return cached.use(make)

    uuid1.__doc__ = original.__doc__
    return uuid1
