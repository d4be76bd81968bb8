# SPDX-License-Identifier: MIT OR Apache-2.0
"""Draws by all functions of Python's, without a pause, so that a snapshot comes in the middle.

    draws.py FILE            guarded: several threads, a child, and threads of that
    draws.py --plain FILE    Python as it is

When FILE.stop is there, this writes the draws after the restore to FILE, and the child writes its own
to FILE.child. A line has the name of the function, the generation before and after the draw, and the
values. (A draw that ended before the restore can be seen to end after it: such a draw may be in all
clones.)
"""

import os
import random
import sys
import threading
import time
import uuid
from random import getrandbits

import numpy

import vmgenid

# A function that a program may have stored before it calls install().
held = random.randint

plain = sys.argv[1] == "--plain"
file = sys.argv[-1]
counter = vmgenid.Counter()
first = counter.barrier()
if not plain:
    vmgenid.install()
own = random.Random(5) if plain else vmgenid.Random(5)
random.seed(5)
numpy.random.seed(5)
generator = numpy.random.default_rng(5 if plain else None)


class UntilRestored:
    """The numbers below 2^60. A caller that takes one of them waits until the machine is restored."""

    def __len__(self):
        return 1 << 60

    def __getitem__(self, number):
        while counter.get() == first:
            time.sleep(0.01)
        return number


def cut(drawn):
    """A draw that began before the restore, and ends after it for certain."""
    # In plain Python, a second thread that draws from a generator makes its sequence depend on timing.
    generator = random.Random(6) if plain else own
    numbers = generator.choices(UntilRestored(), k=2)
    drawn.append(f"cut {first} {counter.get()} {numbers[0]} {numbers[1]}\n")


DRAWS = {
    "Random.random": own.random,
    "Random.getrandbits": lambda: own.getrandbits(64),
    "Random.choices": lambda: "{} {}".format(*own.choices(range(1 << 60), k=2)),
    "Random.gauss": lambda: own.gauss(0, 1),
    "random.random": lambda: random.random(),
    "random.getrandbits": lambda: getrandbits(64),
    "random.randint": lambda: held(1, 1 << 60),
    "numpy.random.rand": lambda: numpy.random.rand(),
    "numpy.random.mtrand._rand": lambda: numpy.random.mtrand._rand.standard_normal(),
    "numpy.random.default_rng": lambda: generator.random(),
    "uuid.uuid1": lambda: uuid.uuid1().node,
}
if not plain:
    # Without the barrier, it depends on timing whether these are the same in clones.
    DRAWS["os.urandom"] = lambda: os.urandom(16).hex()
    DRAWS["uuid.uuid4"] = lambda: uuid.uuid4().hex


def draw(drawn):
    while not os.path.exists(file + ".stop"):
        for name, function in DRAWS.items():
            before = counter.get()
            value = function()
            after = counter.get()
            if after != first:
                drawn.append(f"{name} {before} {after} {value}\n")


def run(path):
    targets = [draw, cut] if plain else [draw, draw, cut]
    drawn = [[] for _ in targets]
    threads = [threading.Thread(target=target, args=(own,)) for target, own in zip(targets, drawn)]
    for thread in threads:
        thread.start()
    print("drawing", flush=True)
    for thread in threads:
        thread.join()
    with open(path + ".new", "w") as out:
        out.writelines(line for own in drawn for line in own)
    os.rename(path + ".new", path)


if not plain and os.fork() == 0:
    run(file + ".child")
else:
    run(file)
