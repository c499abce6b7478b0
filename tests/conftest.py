"""What holds for all tests."""

from __future__ import annotations

import re
import zlib
from collections import Counter

import pytest

LARGE, LARGE_OF_RANKS = 5, 2  # cases; those with processes of their own cost more
CHEAP = re.compile(r"bad|refus|wrong|argument|error|named|says|misfit")  # each has a line of its own to show


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a large table run a quarter by default, chosen by name, so that a run stays short: the rest is marked slow."""
    tables = [item.nodeid.partition("[")[0] for item in items]
    cases = Counter(tables)
    for item, table in zip(items, tables, strict=True):
        large = LARGE_OF_RANKS if re.search(r"test_(ranks|sharded)", table) else LARGE
        if cases[table] > large and not CHEAP.search(table.rpartition("::")[2]) and zlib.crc32(item.nodeid.encode()) % 4:
            item.add_marker(pytest.mark.slow)
