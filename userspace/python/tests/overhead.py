# SPDX-License-Identifier: MIT OR Apache-2.0
"""How much longer calls take than those of random.Random, as ratios of one run: the calls of both take
turns, and the median of the ratios is printed."""

import random
import statistics
import timeit

import vmgenid

CALLS = ["random()", "getrandbits(64)", "randint(1, 6)", "gauss(0, 1)", "choices(range(99), k=100)"]


def main() -> None:
    plain = random.Random()
    # The same work on each machine: the comparison is made without a counter, too.
    ours = vmgenid.Random(without_counter=vmgenid.WithoutCounter.NOTICE_FORKS_ONLY)
    for call in CALLS:
        number = 100 if "choices" in call else 5000
        timers = [timeit.Timer(f"of.{call}", globals={"of": of}) for of in (plain, ours)]
        ratios = []
        for _ in range(101):
            took = [timer.timeit(number) for timer in timers]
            ratios.append(took[1] / took[0])
        print(f"{call:28} {statistics.median(ratios):.2f} times as long")


if __name__ == "__main__":
    main()
