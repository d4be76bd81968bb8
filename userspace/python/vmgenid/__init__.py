# SPDX-License-Identifier: MIT OR Apache-2.0
"""Notices that the virtual machine was restored from a snapshot.

A virtual machine that is restored twice is two machines with one memory. Both continue with the same
cached randomness: the state of a random number generator, a batch of UUIDs, the next nonce. The
hypervisor changes the generation counter with each restore. This package compares the counter, by
one load from mapped memory, before cached data is used.
"""

from ._cached import Cached, WithoutCounter
from ._counter import (
    Busy,
    CannotWait,
    Counter,
    Error,
    Gone,
    NoBarrier,
    NoCounter,
    NotTheDevice,
    Source,
)
from ._install import install
from ._random import Random
from ._restores import on_restore, restores

__all__ = [
    "Busy",
    "Cached",
    "CannotWait",
    "Counter",
    "Error",
    "Gone",
    "NoBarrier",
    "NoCounter",
    "NotTheDevice",
    "Random",
    "Source",
    "WithoutCounter",
    "install",
    "on_restore",
    "restores",
]
