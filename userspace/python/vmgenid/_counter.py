# SPDX-License-Identifier: MIT OR Apache-2.0
"""The generation counter: the devices that it comes from, to load, read and wait for."""

from __future__ import annotations

import contextlib
import enum
import errno
import math
import mmap
import os
import select
import stat
import sys
import time
from types import TracebackType
from typing import Callable, Iterator, Optional, Type


class Error(Exception):
    """There is no answer. A device that cannot be opened is an OSError."""


class NoCounter(Error):
    """This machine has none of the devices: the hypervisor has no counter, or no driver is loaded."""


class NoBarrier(Error):
    """The caller demands a barrier, and the best source of this machine has none."""


class NotTheDevice(Error):
    """The file is another device, or a device without a counter."""


class Gone(Error):
    """The device was unbound from its driver, so there is no barrier."""


class Busy(Error):
    """The hypervisor has begun to change VMClock's page, and has not ended for 100 ms."""


class CannotWait(Error):
    """This source does not notify."""


class Source(enum.Enum):
    """The device that the counter comes from. The value is the path of its node."""

    VMGENID = "/dev/vmgenid"
    """Changes before the first instruction after the restore, and has a barrier."""

    VMCLOCK = "/dev/vmclock0"
    """Changes as early, but has no barrier: in the first milliseconds the kernel's random bytes can be
    the same in other clones. So nothing that was made within a second of a change is used twice."""

    SYSGENID = "/dev/sysgenid"
    """Changes milliseconds later, after the kernel's reseed. Until then clones continue with the data
    that they have cached."""

    @property
    def has_barrier(self) -> bool:
        """Whether `Counter.barrier` returns after the kernel's reseed."""
        return self is Source.VMGENID

    @property
    def is_immediate(self) -> bool:
        """Whether the change is there before the first instruction after a restore."""
        return self is not Source.SYSGENID


# MISC_MAJOR of linux/major.h.
_MISC = 10

# The open(2) has failed because there is no such device.
_MISSING = (errno.ENOENT, errno.ENXIO, errno.ENODEV)

# struct vmclock_abi of linux/vmclock-abi.h, by numbers of u32: magic, size, seq_count, flags,
# vm_generation_counter. All is little-endian.
_MAGIC, _SIZE, _SEQUENCE, _FLAGS, _COUNTER = 0, 1, 3, 6, 26
_VCLK = 0x4B4C4356
_COUNTER_PRESENT = 1 << 8


class _Device:
    """An open device and its page. This never changes: a process may use it in many threads."""

    def __init__(self, source: Source, path: str) -> None:
        self.fd = -1
        self.source = source
        if sys.byteorder != "little":
            raise NotTheDevice("the page is little-endian, and this machine is not")
        flags = os.O_RDONLY | os.O_CLOEXEC
        if source is Source.SYSGENID:
            # A process that may write can acknowledge changes.
            try:
                self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError:
                flags |= os.O_NONBLOCK
        if self.fd < 0:
            self.fd = os.open(path, flags)

        status = os.fstat(self.fd)
        if not stat.S_ISCHR(status.st_mode) or os.major(status.st_rdev) != _MISC:
            raise NotTheDevice(f"{path} is not a misc device")
        if source is not Source.VMCLOCK:
            # Neither device accepts a read of another size.
            try:
                os.read(self.fd, 5 if source is Source.VMGENID else 3)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    raise Gone(f"{path} was unbound") from error
                if error.errno != errno.EINVAL:
                    raise NotTheDevice(f"{path}: {error.strerror}") from error
            else:
                raise NotTheDevice(f"{path} gives more or less than a counter")

        # Whether the page is VMClock's.
        self.vmclock = source is Source.VMCLOCK
        try:
            page = self._map(0)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            if source is not Source.VMGENID:
                raise NotTheDevice(f"{path} cannot be mapped") from error
            # The counter is VMClock's, and so is the page, which is the second one.
            self.vmclock = True
            try:
                page = self._map(mmap.PAGESIZE)
            except OSError:
                self._read()
                raise
        # The mapping ends when the last of these is dropped.
        self.u32 = page.cast("I")
        if self.vmclock:
            if (
                self.u32[_MAGIC] != _VCLK
                or self.u32[_SIZE] < 4 * _COUNTER + 8
                or not self.u32[_FLAGS] & _COUNTER_PRESENT
            ):
                raise NotTheDevice(f"{path}: the page has no generation counter")
            page = page[4 * _COUNTER :]
        # A u32, and zeros after it: as a u64 it is the same number. VMClock has a u64. CPython loads it
        # with one instruction.
        self.word = page[:8].cast("Q")
        self.barrier()
        if not self.vmclock and self.word[0] >> 32:
            raise NotTheDevice(f"{path}: the page has more than a counter")

    def _map(self, offset: int) -> memoryview:
        return memoryview(mmap.mmap(self.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            close(self.fd)

    def _read(self) -> int:
        try:
            number = os.read(self.fd, 4)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise Gone("the device of the generation counter was unbound") from error
            raise
        if len(number) != 4:
            raise NotTheDevice("a read of 4 bytes gives less")
        return int.from_bytes(number, sys.byteorder)

    def _vmclock(self) -> int:
        """VMClock's counter, under the sequence count."""
        end = time.monotonic() + 0.1
        while True:
            before = self.u32[_SEQUENCE]
            generation = self.u32[_COUNTER + 1] << 32 | self.u32[_COUNTER]
            if before % 2 == 0 and before == self.u32[_SEQUENCE]:
                return generation
            if time.monotonic() > end:
                raise Busy("the hypervisor does not end changing VMClock's page")
            time.sleep(0)

    def barrier(self) -> int:
        if self.source is Source.VMCLOCK:
            return self._vmclock()
        if self.source is Source.SYSGENID:
            # The driver starts a reseed that is due.
            self.poll(self.fd, 0)
            number = self.u32[0]
            # For processes that poll this file. A file opened for reading cannot.
            with contextlib.suppress(OSError):
                os.write(self.fd, number.to_bytes(4, sys.byteorder))
            return number
        while True:
            # The page has all 64 bits, maybe of an earlier generation.
            generation = self._vmclock() if self.vmclock else None
            number = self._read()
            if generation is None:
                return number
            if generation & 0xFFFFFFFF == number:
                return generation

    @contextlib.contextmanager
    def notifications(self) -> Iterator[int]:
        """A file that is readable when the counter differs from its value now.

        Other callers read `self.fd`, so this opens a file of its own.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", flags)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ENXIO):
                raise Gone("the device of the generation counter was unbound") from error
            if error.errno == errno.ENOENT:
                raise CannotWait("/proc is not mounted") from error
            raise
        try:
            # A vmclock reports other changes, too, and those before its first read.
            if self.source is Source.VMCLOCK and len(os.pread(fd, 8, 4 * _COUNTER)) != 8:
                raise NotTheDevice("the page cannot be read")
            yield fd
        finally:
            os.close(fd)

    def poll(self, fd: int, timeout: Optional[float]) -> bool:
        """Returns whether there is something to look at."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        events = poll.poll(None if timeout is None else math.ceil(timeout * 1000))
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in events):
            if self.source is Source.VMCLOCK:
                raise CannotWait("this hypervisor's vmclock sends no notifications")
            raise Gone("the device of the generation counter was unbound")
        return bool(events)


class Counter:
    """The generation counter.

    Without arguments this opens the best source of this machine. It does not fall back to a source
    with fewer guarantees because a better one cannot be opened, except from a vmclock that the caller
    may not open: Linux gives it to root only.

    Threads can share a counter, and a child can use it after a fork. When the device was unbound and
    is bound again, the next `barrier` opens it anew.
    """

    def __init__(self, source: Optional[Source] = None, path: Optional[str] = None) -> None:
        if source is None:
            if path is not None:
                raise TypeError("a path needs a source")
            self._open_best()
        else:
            self._open(source, path or source.value)

    def _open(self, source: Source, path: str) -> None:
        self._device: Optional[_Device] = _Device(source, path)
        self._source, self._path = source, path

    def _open_best(self) -> None:
        missing: Exception = NoCounter(
            "this machine has no generation counter: "
            + ", ".join(f"no {source.value}" for source in Source)
        )
        for source in Source:
            try:
                return self._open(source, source.value)
            except NotTheDevice:
                # Most vmclocks have no counter.
                if source is not Source.VMCLOCK:
                    raise
            except PermissionError as error:
                if source is not Source.VMCLOCK:
                    raise
                missing = error
            except OSError as error:
                if error.errno not in _MISSING:
                    raise
        raise missing

    def _opened(self) -> _Device:
        if self._device is None:
            raise ValueError("the counter is closed")
        return self._device

    def _open_anew(self) -> None:
        """Opens the device once more, after it was unbound."""
        self._opened()
        try:
            self._device = _Device(self._source, self._path)
        except OSError as error:
            if error.errno not in _MISSING:
                raise
            raise Gone(f"{self._path} was unbound") from error

    @property
    def source(self) -> Source:
        """Which source this is."""
        return self._source

    def get(self) -> int:
        """Returns the generation: one load, no barrier.

        Compare it, for being equal and nothing else, with what `barrier` returned. If it differs, call
        that.
        """
        return self._opened().word[0]

    def barrier(self) -> int:
        """Returns the generation, after the kernel's reseed.

        When this returns, the kernel's random number generator has been reseeded since the restore
        that began this generation, if the source has a barrier: later draws from the kernel differ from
        those of all other clones. After a restore this may sleep until the kernel has been reseeded.
        """
        return self._barrier()[1]

    def _barrier(self) -> tuple[_Device, int]:
        device = self._opened()
        try:
            return device, device.barrier()
        except Gone:
            self._open_anew()
        device = self._opened()
        return device, device.barrier()

    def wait(self, since: int, timeout: Optional[float] = None) -> Optional[int]:
        """Waits until the generation differs from `since`, and returns it, after the barrier.

        Returns None if it is the same after `timeout` seconds. Many threads can wait.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                device = self._opened()
                with device.notifications() as fd:
                    if device.word[0] != since:
                        return self.barrier()
                    left = None if end is None else max(0.0, end - time.monotonic())
                    if not device.poll(fd, left):
                        return None
            except Gone:
                self._open_anew()

    def close(self) -> None:
        """Closes the device. What uses this counter fails at the next restore."""
        self._device = None

    def __enter__(self) -> Counter:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        self.close()


_shared: Optional[Counter] = None


def shared() -> Counter:
    """The counter of this process, for all callers that have none of their own."""
    global _shared
    if _shared is None:
        _shared = Counter()
    return _shared
