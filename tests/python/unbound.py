# SPDX-License-Identifier: MIT OR Apache-2.0
"""A device that is unbound and bound again. This runs in the driver's folder in sysfs, and requests
changes of the counter from the suite, as tests/contract does."""

import glob
import logging
import random
import select
import sys
import time

import vmgenid


class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


log = Log()
logging.getLogger("vmgenid").addHandler(log)


def change():
    print("change", flush=True)
    return int(input())


def write(file):
    with open(file, "w") as out:
        out.write(device)


def refused(error, call):
    try:
        result = call()
    except error as refusal:
        return refusal
    raise AssertionError(f"{call} returned {result}")


def within_a_minute(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


[device] = glob.glob("*[:.]*")
counter = vmgenid.Counter()
ours = vmgenid.Random(5, counter=counter)
plain = random.Random(5)
told = []
vmgenid.on_restore(told.append, counter=counter)
since = counter.barrier()
assert counter.get() == since
assert counter.wait(since, timeout=0.05) is None
assert counter.source is vmgenid.Source.VMGENID

# A change, with the device there.
assert ours.random() == plain.random()
since = change()
assert ours.random() != plain.random()
assert counter.get() == since and counter.wait(0, timeout=0) == since
within_a_minute(lambda: told == [since])
ours.seed(6)
plain.seed(6)
assert ours.random() == plain.random()

# No device, and no change: the sequence continues.
write("unbind")
refused(vmgenid.Gone, counter.barrier)
refused(vmgenid.Gone, lambda: counter.wait(since))
refused(vmgenid.NoCounter, vmgenid.Random)
assert ours.random() == plain.random()

# No device, and a change: nothing more is drawn.
changed = change()
assert counter.get() == changed
for draw in (ours.random, lambda: ours.getrandbits(9), lambda: ours.gauss(0, 1), ours.getstate):
    refused(vmgenid.Gone, draw)
refused(vmgenid.Gone, lambda: ours.seed(7))
within_a_minute(lambda: len(log.said) == 1)
assert "unbound" in log.said[0], log.said
assert told == [since]

# The device is back.
write("bind")
assert ours.random() != ours.random()
assert counter.barrier() == changed
within_a_minute(lambda: told == [since, changed])
changed = change()
within_a_minute(lambda: told[2:] == [changed])
assert counter.wait(since) == changed

# A counter that was closed.
ours.random()
counter.close()
refused(ValueError, counter.get)
refused(ValueError, counter.barrier)
assert ours.random() != ours.random()
change()
refused(ValueError, ours.random)

# The other node has no barrier.
other = vmgenid.Counter(vmgenid.Source.SYSGENID)
since = other.barrier()
assert other.get() == since and not other.source.has_barrier
refused(
    vmgenid.NoBarrier,
    lambda: vmgenid.Random(
        counter=other, without_counter=vmgenid.WithoutCounter.REFUSE_WITHOUT_BARRIER
    ),
)
ours = vmgenid.Random(5, counter=other)
change()
assert other.wait(since, timeout=60) == since + 1
assert ours.random() != random.Random(5).random()
