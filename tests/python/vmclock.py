# SPDX-License-Identifier: MIT OR Apache-2.0
"""A machine whose only counter is VMClock's. Requests changes of the counter from the suite."""

import random
import time

import vmgenid


def change():
    print("change", flush=True)
    return int(input())


counter = vmgenid.Counter()
assert counter.source is vmgenid.Source.VMCLOCK
since = counter.barrier()
assert counter.get() == since
made = []
cached = vmgenid.Cached(lambda: made.append(0), counter=counter)


def made_by_ten_uses():
    before = len(made)
    for _ in range(10):
        cached.use(lambda value: None)
    return len(made) - before


# The last change may have been less than a second ago.
assert made_by_ten_uses() >= 10
time.sleep(1.1)
made_by_ten_uses()
assert made_by_ten_uses() == 0

ours, plain = vmgenid.Random(5), random.Random(5)
assert [ours.random() for _ in range(9)] == [plain.random() for _ in range(9)]
changed = change()
assert counter.get() == changed != since
assert counter.wait(since, timeout=60) == changed
assert ours.random() != plain.random()
assert made_by_ten_uses() >= 10
time.sleep(1.1)
made_by_ten_uses()
assert made_by_ten_uses() == 0
