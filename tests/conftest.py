"""What holds for all tests."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict

import pytest

LARGE, LARGE_OF_RANKS, MOST = 3, 2, 8  # cases; those with processes of their own cost more
CHEAP, MANY = re.compile(r"bad|refus|wrong|argument|error|named|says|misfit"), 16  # each has a line of its own to show
# Lines that others run too, again and again, as a table's later cases do: on Python 3.11 to trace them doubles their time.
UNCOUNTED = re.compile(r"test_(faults_\w+|kill|examples|noise_scale|laws_slow|checkpoint)\.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a large table run a quarter by default, chosen by name, so that a run stays short: the rest is marked slow."""
    tables = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("slow") is None:
            tables[item.nodeid.partition("[")[0]].append(item)
    for table, cases in tables.items():
        large, share, most = LARGE_OF_RANKS if re.search(r"test_(ranks|sharded)", table) else LARGE, 4, MOST
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        if CHEAP.search(table.rpartition("::")[2]):
            large, share, most = MANY, 2, MANY
        else:
            for item in cases[0 if UNCOUNTED.search(table) else 1 :]:
                item.add_marker(pytest.mark.no_cover)
        if len(cases) > large:
            for item in cases[min(-(-len(cases) // share), most) :]:
                item.add_marker(pytest.mark.slow)
