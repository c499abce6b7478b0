"""What holds for all tests."""

from __future__ import annotations

import gc
import os
import re
import zlib
from collections import defaultdict
from typing import Any

import pytest

LARGE, MOST = 3, 8  # cases
COSTLY = re.compile(
    r"test_(ranks|sharded|search)|killed|resumed|test_(rs|sg|ck|tb|oo)\d"
)  # processes of their own, or many runs
LARGE_AND_COSTLY, MOST_AND_COSTLY = 1, 2
CHEAP, MANY = re.compile(r"bad|refus|wrong|argument|error|named|says|misfit"), 16  # each has a line of its own to show
# Lines that others run too, again and again, as a table's later cases do: on Python 3.11 to trace them doubles their time.
UNCOUNTED = re.compile(
    r"test_(faults_\w+|kill|examples|noise_scale|laws\w*|checkpoint|compile|precision|goal|benchmarks)\.py|::test_killed"
)
# Files whose tests one process runs: of ranks only one test at a time, since each takes all cores; of the others what all
# of a file's tests compare with is made once.
TOGETHER = re.compile(r"test_(ranks|examples|kill)")


def pytest_configure() -> None:
    """Of several test processes let ranks go first: each waits for others thousands of times, and soon lasts four times as long."""
    if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "fork"):
        import many

        many.serve()  # what it starts keeps the priority of before
        os.nice(19)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Run one test more at a time than there are cores: a third of the time tests wait, for processes that they started."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By name and not by `xdist_group`, which pytest-xdist 3.8 writes where pytest 9.2 no longer reads it, in silence."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            group = TOGETHER.search(nodeid)
            return group[1] if group else nodeid

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Leave what the tests import, half a million objects, out of each garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a large table run a quarter by default, chosen by name, so that a run stays short: the rest is marked slow."""
    tables = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("slow") is None:
            tables[item.nodeid.partition("[")[0]].append(item)
    for table, cases in tables.items():
        large, share, most = (LARGE_AND_COSTLY, 4, MOST_AND_COSTLY) if COSTLY.search(table) else (LARGE, 4, MOST)
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        if CHEAP.search(table.rpartition("::")[2]) and not COSTLY.search(table):
            large, share, most = MANY, 2, MANY
        else:
            for item in cases[0 if UNCOUNTED.search(table) else 1 :]:
                item.add_marker(pytest.mark.no_cover)
        if len(cases) > large:
            for item in cases[min(-(-len(cases) // share), most) :]:
                item.add_marker(pytest.mark.slow)
