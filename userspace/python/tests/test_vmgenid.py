# SPDX-License-Identifier: MIT OR Apache-2.0
"""What needs no device. tests/suite/src/python.rs has the tests with a device, in guests."""

import asyncio
import copy
import importlib.util
import os
import pickle
import random
import subprocess
import sys
import threading
import unittest
from typing import Callable, List

import vmgenid
from vmgenid import Cached, Counter, NoCounter, NotTheDevice, Random, Source, WithoutCounter

FORKS_ONLY = WithoutCounter.NOTICE_FORKS_ONLY
NO_DEVICE = not any(os.path.exists(source.value) for source in Source)
NUMPY = importlib.util.find_spec("numpy") is not None

# A call of each method of random.Random that draws.
DRAWS = [
    ("random", ()),
    ("getrandbits", (200,)),
    ("randbytes", (20,)),
    ("randrange", (1000,)),
    ("randint", (1, 1 << 80)),
    ("choice", ("abcdefgh",)),
    ("choices", (range(1000),)),
    ("sample", (range(1000), 10)),
    ("uniform", (1, 2)),
    ("triangular", (1, 2)),
    ("betavariate", (1, 2)),
    ("expovariate", (1,)),
    ("gammavariate", (1, 2)),
    ("gauss", (0, 1)),
    ("gauss", (0, 1)),
    ("lognormvariate", (0, 1)),
    ("normalvariate", (0, 1)),
    ("vonmisesvariate", (1, 2)),
    ("paretovariate", (1,)),
    ("weibullvariate", (1, 2)),
    ("binomialvariate", (100, 0.5)),
]


def draws(generator: random.Random) -> List[object]:
    numbers = [getattr(generator, name)(*of) for name, of in DRAWS if hasattr(generator, name)]
    shuffled = list(range(100))
    generator.shuffle(shuffled)
    return [*numbers, shuffled, generator._randbelow(1 << 70)]  # type: ignore[attr-defined]


def in_child(function: Callable[[], object]) -> str:
    """What the function returns in a child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, repr(function()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        result = said.read()
    os.waitpid(pid, 0)
    return result


def python(script: str) -> str:
    """What a script prints in a process of its own."""
    command = [sys.executable, "-u", "-W", "error", "-c", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise AssertionError(done.stdout)
    return done.stdout


@unittest.skipUnless(NO_DEVICE, "this machine has a counter")
class WithoutDevice(unittest.TestCase):
    # Expect that all that needs a counter raises NoCounter, unless the caller has chosen otherwise.
    def test_refuses(self) -> None:
        calls: List[Callable[[], object]] = [
            Counter,
            Random,
            lambda: Random(5),
            lambda: Random(without_counter=WithoutCounter.REFUSE_WITHOUT_BARRIER),
            lambda: Cached(list),
            lambda: vmgenid.on_restore(print),
            vmgenid.restores,
            vmgenid.install,
        ]
        for call in calls:
            with self.assertRaisesRegex(NoCounter, "no /dev/vmgenid, no /dev/vmclock0"):
                call()

    # Expect that an install() that is refused has changed nothing.
    def test_install_that_is_refused(self) -> None:
        said = python(
            "import random, os, uuid, vmgenid\n"
            "before = random.random, random.randint, random._inst, os.urandom, uuid.uuid1\n"
            "try: vmgenid.install()\n"
            "except vmgenid.NoCounter: print('refused')\n"
            "after = random.random, random.randint, random._inst, os.urandom, uuid.uuid1\n"
            "print(before == after, type(random._inst) is random.Random)"
        )
        self.assertEqual(said, "refused\nTrue True\n")

    # Expect that nothing is kept with CACHE_NOTHING, not even a state that the caller has chosen.
    def test_caches_nothing(self) -> None:
        made = Cached(lambda: [0], without_counter=WithoutCounter.CACHE_NOTHING)
        for _ in range(3):
            self.assertIsNone(made.use(lambda value: value.append(1)))
            self.assertEqual(made.use(len), 1)
        numbers = set()
        for _ in range(10):
            generator = Random(5, without_counter=WithoutCounter.CACHE_NOTHING)
            numbers |= {generator.random(), generator.random()}
        self.assertEqual(len(numbers), 20)


class Devices(unittest.TestCase):
    # Expect that another file than the device is refused, and that a missing one is an OSError.
    def test_other_files(self) -> None:
        for source in Source:
            for path in ("/dev/zero", "/dev/null", __file__):
                with self.assertRaises(NotTheDevice, msg=(source, path)):
                    Counter(source, path)
            with self.assertRaises(FileNotFoundError):
                Counter(source, "/nonexistent")
        with self.assertRaises(TypeError):
            Counter(path="/dev/vmgenid")

    # Expect that a device that is refused is closed.
    def test_no_descriptor_is_left(self) -> None:
        before = os.listdir("/proc/self/fd")
        for _ in range(5):
            with self.assertRaises(NotTheDevice):
                Counter(Source.VMGENID, "/dev/zero")
        self.assertEqual(os.listdir("/proc/self/fd"), before)


class Sequences(unittest.TestCase):
    # Expect that each method returns what random.Random returns from the same seed.
    def test_same_as_random(self) -> None:
        for seed in (0, 5, "seed", b"seed", 1.5):
            ours = Random(seed, without_counter=FORKS_ONLY)
            self.assertEqual(draws(ours), draws(random.Random(seed)))
            ours.seed(7)
            self.assertEqual(draws(ours), draws(random.Random(7)))

    # Expect that DRAWS has each method that draws.
    def test_all_methods(self) -> None:
        methods = {name for name in dir(random.Random) if not name.startswith("_")}
        others = {"VERSION", "seed", "getstate", "setstate", "shuffle"}
        self.assertLessEqual(methods - others, {name for name, _ in DRAWS})

    # Expect that a state can be set again, also that of random.Random, and with the second number of
    # gauss().
    def test_states(self) -> None:
        ours = Random(without_counter=FORKS_ONLY)
        ours.gauss(0, 1)
        state = ours.getstate()
        plain = random.Random()
        plain.setstate(state)
        first = draws(ours)
        self.assertEqual(draws(plain), first)
        ours.setstate(state)
        self.assertEqual(draws(ours), first)
        with self.assertRaises((TypeError, ValueError)):
            ours.setstate((3, (1, 2), None))

    # Expect that a copy continues the sequence, and makes the same choice where there is no counter.
    def test_copies(self) -> None:
        ours = Random(without_counter=FORKS_ONLY)
        for new in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            self.assertIs(type(new), Random)
            ours.setstate(new.getstate())
            self.assertEqual(draws(new), draws(ours))

    # Expect that the seeds are from the kernel, and that seed() without an argument makes a new one.
    def test_seeds(self) -> None:
        numbers = {Random(without_counter=FORKS_ONLY).random() for _ in range(10)}
        self.assertEqual(len(numbers), 10)
        ours = Random(5, without_counter=FORKS_ONLY)
        ours.seed()
        self.assertNotEqual(ours.random(), random.Random(5).random())

    # Expect that an error of a method is the caller's, and that the generator continues.
    def test_errors(self) -> None:
        ours = Random(5, without_counter=FORKS_ONLY)
        for call in (lambda: ours.getrandbits(-1), lambda: ours.choice([])):
            with self.assertRaises((ValueError, IndexError)):
                call()
        self.assertEqual(ours.random(), random.Random(5).random())


class Forks(unittest.TestCase):
    # Expect that no child continues the sequence of its parent, nor that of another child.
    def test_children_differ(self) -> None:
        ours = Random(5, without_counter=FORKS_ONLY)
        seen = {in_child(lambda: [draws(ours), draws(ours)]) for _ in range(5)}
        self.assertEqual(len(seen), 5)
        self.assertEqual(draws(ours), draws(random.Random(5)))
        grandchildren = {in_child(lambda: in_child(ours.random)) for _ in range(5)}
        self.assertEqual(len(grandchildren), 5)

    # Expect that a fork in the middle of a call has the child make its output anew.
    def test_fork_within_a_call(self) -> None:
        made = Cached(lambda: os.urandom(8), without_counter=FORKS_ONLY)
        reader, writer = os.pipe()
        pids: List[int] = []

        def fork(value: bytes) -> bytes:
            if not pids:
                pids.append(os.fork())
            return value

        value = made.use(fork)
        if pids[0] == 0:
            os.write(writer, value)
            os._exit(0)
        os.waitpid(pids[0], 0)
        child = os.read(reader, 8)
        os.close(reader)
        os.close(writer)
        self.assertEqual((len(child), value), (8, made.use(bytes)))
        self.assertNotEqual(child, value)


class Threads(unittest.TestCase):
    # Expect that threads that share a generator get no number twice, while another thread has it
    # seeded again and again.
    def test_shared(self) -> None:
        ours = Random(without_counter=FORKS_ONLY)
        numbers: List[List[int]] = [[] for _ in range(4)]
        failed = threading.Event()

        def draw(own: List[int]) -> None:
            try:
                for _ in range(3000):
                    own.append(ours.getrandbits(64))
                    own.extend(ours.choices(range(1 << 60), k=2))
            except BaseException:
                failed.set()
                raise

        threads = [threading.Thread(target=draw, args=(own,)) for own in numbers]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            ours.seed()
        self.assertFalse(failed.is_set())
        drawn = [number for own in numbers for number in own]
        self.assertEqual((len(drawn), len(set(drawn))), (36000, 36000))


class Install(unittest.TestCase):
    HEAD = (
        "import sys, random, os, uuid\n"
        "from random import random as by_name, getrandbits, gauss\n"
        "held = [random.randint]\n"
        "import vmgenid\n"
        "def install(): vmgenid.install(without_counter=vmgenid.WithoutCounter.NOTICE_FORKS_ONLY)\n"
    )

    # Expect that a seeded sequence is that of `random`, by whatever way a function was imported.
    def test_random(self) -> None:
        said = python(
            self.HEAD + "plain = random.Random(5)\n"
            "expected = [plain.random(), plain.getrandbits(9), plain.gauss(0, 1), plain.randint(1, 999)]\n"
            "install()\n"
            "install()\n"
            "random.seed(5)\n"
            "print([by_name(), getrandbits(9), gauss(0, 1), held[0](1, 999)] == expected)\n"
            "print(all(type(f.__self__) is vmgenid.Random for f in (by_name, random.random, random.gauss)))\n"
            "print(len({str(uuid.uuid1()) for _ in range(99)}), len({uuid.uuid1().node for _ in range(9)}))\n"
            "print(uuid.uuid1(7, 9).node, uuid.uuid1().node >> 40 & 1, uuid.uuid1().version)\n"
            "print(len(os.urandom(5)), len(random.SystemRandom().randbytes(6)), uuid.uuid4().version)"
        )
        self.assertEqual(said, "True\nTrue\n99 1\n7 1 1\n5 6 4\n")

    # Expect that a child has numbers and a node of its own, also where the caller has chosen a seed.
    def test_children(self) -> None:
        for what in ("by_name()", "held[0](1, 1 << 60)", "uuid.uuid1().node", "random._inst.gauss()"):
            if "gauss" in what and sys.version_info < (3, 11):
                what = "random._inst.gauss(0, 1)"
            said = python(
                self.HEAD + "install()\n"
                "random.seed(5)\n"
                "for _ in range(2):\n"
                "    if os.fork() == 0:\n"
                f"        print({what}, flush=True)\n"
                "        os._exit(0)\n"
                "    os.wait()\n"
                f"print({what})"
            )
            self.assertEqual(len(set(said.split())), 3, what)

    # Expect that NumPy's shared generator, and those without a seed, are guarded; that seeded sequences
    # are NumPy's; and that a child has numbers of its own.
    @unittest.skipUnless(NUMPY, "NumPy is not installed")
    def test_numpy(self) -> None:
        said = python(
            self.HEAD + "import numpy\n"
            "from numpy.random import rand, default_rng\n"
            "install()\n"
            "from numpy.random import mtrand, RandomState\n"
            "same = lambda a, b: bool((a == b).all())\n"
            "numpy.random.seed(5)\n"
            "plain = RandomState(5)\n"
            "print(same(rand(9), plain.rand(9)), same(numpy.random.normal(size=9), plain.normal(size=9)))\n"
            "print(same(numpy.random.sample(9), plain.random_sample(9)))\n"
            "state = numpy.random.get_state()\n"
            "first = mtrand._rand.rand(9)\n"
            "numpy.random.set_state(state)\n"
            "print(same(first, rand(9)), isinstance(mtrand._rand, RandomState))\n"
            "print(same(default_rng(5).random(9), numpy.random.Generator(numpy.random.PCG64(5)).random(9)))\n"
            "generator = default_rng()\n"
            "spawned = generator.spawn(1)[0]\n"
            "if os.fork() == 0:\n"
            "    print(rand(), generator.random(), spawned.random(), flush=True)\n"
            "    os._exit(0)\n"
            "os.wait()\n"
            "print(rand(), generator.random(), spawned.random())"
        ).splitlines()
        self.assertEqual(said[:4], ["True True", "True", "True True", "True"])
        self.assertEqual(len(set(" ".join(said[4:]).split())), 6, said)


class Subinterpreters(unittest.TestCase):
    # Expect that the package works in a subinterpreter, and that install() there leaves the others as
    # they are.
    def test_subinterpreter(self) -> None:
        said = python(
            "import sys, random\n"
            "import warnings; warnings.simplefilter('ignore')\n"
            "try: import _interpreters as interpreters\n"
            "except ImportError: import _xxsubinterpreters as interpreters\n"
            "import os, vmgenid\n"
            "ours = vmgenid.Random(5, without_counter=vmgenid.WithoutCounter.NOTICE_FORKS_ONLY)\n"
            "def run(script):\n"
            "    failure = interpreters.run_string(interpreters.create(), script)\n"
            "    if failure is not None: sys.exit(str(failure))\n"
            "script = '''if True:\n"
            f"    import sys; sys.path[:] = {sys.path!r}\n"
            "    import random, uuid, vmgenid\n"
            "    how = vmgenid.WithoutCounter.NOTICE_FORKS_ONLY\n"
            "    try: vmgenid.Random()\n"
            "    except vmgenid.NoCounter: pass\n"
            "    ours = vmgenid.Random(5, without_counter=how)\n"
            "    assert ours.random() == random.Random(5).random()\n"
            "    vmgenid.install(without_counter=how, numpy=False)\n"
            "    random.seed(5)\n"
            "    assert random.random() == random.Random(5).random()\n"
            "    assert type(random._inst) is vmgenid.Random\n"
            "    print(uuid.uuid1().node, flush=True)\n"
            "'''\n"
            "run(script)\n"
            "run(script)\n"
            "print(type(random._inst) is random.Random, ours.random() == random.Random(5).random())"
        ).splitlines()
        self.assertEqual(said[2], "True True")
        self.assertNotEqual(said[0], said[1])


class Asyncio(unittest.TestCase):
    # Expect that the iterator is refused where it is asked for, not at its first step.
    @unittest.skipUnless(NO_DEVICE, "this machine has a counter")
    def test_refused(self) -> None:
        async def run() -> None:
            with self.assertRaises(NoCounter):
                vmgenid.restores()

        asyncio.run(run())


if __name__ == "__main__":
    unittest.main()
