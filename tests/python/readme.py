# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs the samples of the package's README, and uses what they define."""

import re
import sys
import textwrap

text = open(sys.argv[1]).read()
start, pool = re.findall(r"(?:^ {4,}.*\n|^\n(?= {4}))+", text, re.MULTILINE)
names = {}
for sample in (start, pool):
    exec(textwrap.dedent(sample), names)
ids = [names["new_id"]() for _ in range(2500)]
assert len(set(ids)) == 2500 and type(ids[0]) is names["uuid"].UUID
assert type(names["random"]._inst) is names["vmgenid"].Random
