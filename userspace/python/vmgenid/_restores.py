# SPDX-License-Identifier: MIT OR Apache-2.0
"""Restores as events: for a callback, and for asyncio."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from typing import AsyncIterator, Callable, Dict, List, Optional

from ._counter import Counter, Error, Gone, shared

_log = logging.getLogger("vmgenid")

# How often to look whether an unbound device is back, in seconds.
_AGAIN = 1.0


class _Callback:
    def __init__(self, function: Callable[[int], object], since: int) -> None:
        self.function, self.since = function, since


# By the thread that calls them: one for each counter.
_callbacks: Dict[Counter, List[_Callback]] = {}
_lock = threading.Lock()


def on_restore(
    callback: Callable[[int], object], *, counter: Optional[Counter] = None
) -> Callable[[], None]:
    """Has `callback(generation)` called after each restore, after the barrier, in a thread.

    The notification comes some milliseconds after the restore, and the program runs in the meantime: this
    is for what may come late (connections, leases, a log line). Randomness needs `Random` or `Cached`.

    Restores that follow each other while callbacks run are one call. An exception of a callback is
    logged, by the logger `vmgenid`. A child calls the callbacks, too, after a fork.

    Returns a function that ends this.
    """
    counter = counter or shared()
    registered = _Callback(callback, counter.barrier())
    # If it cannot wait, that is said here and not in the thread.
    counter.wait(registered.since, timeout=0)
    with _lock:
        callbacks = _callbacks.get(counter)
        if callbacks is None:
            callbacks = [registered]
            _start(counter, callbacks, registered.since)
            _callbacks[counter] = callbacks
        else:
            callbacks.append(registered)

    def cancel() -> None:
        if registered in callbacks:
            callbacks.remove(registered)

    return cancel


def _start(counter: Counter, callbacks: List[_Callback], since: int) -> None:
    watch = threading.Thread(
        target=_watch, args=(counter, callbacks, since), name="vmgenid", daemon=True
    )
    watch.start()


def _watch(counter: Counter, callbacks: List[_Callback], since: int) -> None:
    gone = False
    while True:
        try:
            generation = counter.wait(since)
        except (Error, OSError) as error:
            if not gone:
                _log.warning("cannot wait for a restore, will try again: %s", error)
            gone = True
            time.sleep(_AGAIN)
            continue
        except ValueError:
            # The counter was closed.
            return
        gone = False
        if generation is None or generation == since:
            continue
        since = generation
        for callback in list(callbacks):
            # It may be newer than the restore.
            if callback.since == generation:
                continue
            callback.since = generation
            try:
                callback.function(generation)
            except Exception:
                _log.exception("a callback for restores has failed")


def _forked() -> None:
    """The child has no threads but this one."""
    global _lock
    _lock = threading.Lock()
    for counter, callbacks in _callbacks.items():
        if callbacks:
            _start(counter, callbacks, callbacks[0].since)


os.register_at_fork(after_in_child=_forked)


def restores(counter: Optional[Counter] = None) -> AsyncIterator[int]:
    """Yields the new generation after each restore, after the barrier: `async for g in restores()`.

    It counts from this call on. Restores that follow each other before the next one is asked for are
    one. If the device is unbound, this waits until it is back.
    """
    counter = counter or shared()
    return _restores(counter, counter.barrier())


async def _restores(counter: Counter, since: int) -> AsyncIterator[int]:
    while True:
        try:
            device = counter._opened()
            with device.notifications() as fd:
                if device.word[0] == since:
                    await _readable(fd)
                    device.poll(fd, 0)
            if device.word[0] == since:
                continue
            # It may sleep until the kernel has been reseeded.
            generation = await asyncio.to_thread(counter.barrier)
        except Gone:
            try:
                counter._open_anew()
            except Gone:
                await asyncio.sleep(_AGAIN)
            continue
        if generation != since:
            since = generation
            yield generation


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    # The selector may report it once more before the reader is removed.
    loop.add_reader(fd, lambda: None if readable.done() else readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(fd)
