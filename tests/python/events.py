# SPDX-License-Identifier: MIT OR Apache-2.0
"""Prints each restore that a callback and an asyncio iterator report, also in a child."""

import asyncio
import os

import vmgenid


async def watch(who):
    restores = vmgenid.restores()
    print(who, "waits", flush=True)
    async for generation in restores:
        print(who, "iterator", generation, flush=True)


def fail(generation):
    raise RuntimeError("fails")


# A callback that fails does not affect the others, nor does one that was cancelled.
vmgenid.on_restore(fail)
vmgenid.on_restore(print)()
vmgenid.on_restore(lambda generation: print(os.getpid() == parent, "callback", generation, flush=True))
parent = os.getpid()
os.fork()
asyncio.run(watch(os.getpid() == parent))
