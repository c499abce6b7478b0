"""Batches of any structure: row DL7 of the fault table, by functions and through a Loop."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import FORMS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from hookloop.loop import Callback, Loop
from hookloop.loop.batch import cut, equal_cuts, in_doubt, join, move, size

META = torch.device("meta")


class Pair(NamedTuple):
    x: Any
    y: Any


Old = collections.namedtuple("Old", ["x", "y"])


@dataclasses.dataclass
class Example:
    x: Any
    y: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    y: Any = None


class ReadOnly(Mapping[str, Any]):
    """A mapping that nothing can be put into."""

    def __init__(self, held: dict[str, Any]) -> None:
        self.held = held

    def __getitem__(self, key: str) -> Any:
        return self.held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


class Keywords(ReadOnly):
    """One that no dict makes."""

    def __init__(self, **held: Any) -> None:
        super().__init__(held)


class Other(ReadOnly):
    """One that makes something else of a dict."""

    def __init__(self, held: dict[str, Any]) -> None:
        super().__init__({"held": held})

    @classmethod
    def of(cls, **held: Any) -> Other:
        found = cls({})
        found.held = held
        return found


class Bag:
    """A user's own batch, which nothing can be known about."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


def same(a: Any, b: Any) -> bool:
    """Compare two batches without any help of the code under test."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        a, b = (t if t.layout == torch.strided else t.to_dense() for t in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and (a == b).all())
    if isinstance(a, dict | collections.UserDict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


def tensor(n: int, *shape: int) -> Tensor:
    return torch.arange(float(n * int(np.prod(shape)))).view(n, *shape)


def trees(n: int) -> st.SearchStrategy[Any]:
    """Batches of `n` samples; each container holds at least one tensor with a batch dimension."""
    per_sample = st.one_of(
        st.tuples(st.sampled_from([(), (3,), (2, 2), (0,)]),
                  st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])).map(
            lambda s: torch.arange(n * int(np.prod(s[0]))).view(n, *s[0]).to(s[1])),
        st.just([f"text {i}" for i in range(n)]),
        st.just(tuple(str(i) for i in range(n))),
        st.just(list(range(n))),
    )  # fmt: skip
    whole = st.sampled_from([None, "a string", b"bytes", 3, 2.5, True, 1 + 2j, torch.tensor(4.0), torch.tensor(7)])

    def containers(kids: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        x = st.just(tensor(n, 2))
        return st.one_of(
            st.tuples(x, kids, kids),
            st.lists(kids, max_size=3).map(lambda k: [tensor(n, 2), *k]),
            st.dictionaries(st.sampled_from("abc"), kids).map(lambda k: {"x": tensor(n), **k}),
            st.dictionaries(st.sampled_from("abc"), kids).map(lambda k: OrderedDict(x=tensor(n), **k)),
            *(st.builds(kind, x, kids) for kind in (Pair, Old, Example, Frozen, Slotted)),
        )

    return containers(st.recursive(per_sample | whole, containers, max_leaves=8))


sized_trees = st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), trees(n)))


@given(sized_trees, st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_dl7_cut_and_join_are_a_round_trip(sized: Any, limit: int) -> None:
    n, batch = sized
    assert size(batch) == n
    cuts = equal_cuts(n, limit)
    parts = [cut(batch, start, stop, n) for start, stop in cuts]
    assert [size(part) for part in parts] == [stop - start for start, stop in cuts]
    assert same(join(parts), batch)


@given(sized_trees)
@settings(max_examples=40, deadline=None)
def test_dl7_moved_to_a_device_with_the_structure_kept(sized: Any) -> None:
    _, batch = sized

    def check(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert b.device == META
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                check(a[key], b[key])
        elif dataclasses.is_dataclass(a):
            for f in dataclasses.fields(a):
                check(getattr(a, f.name), getattr(b, f.name))
        elif isinstance(a, list | tuple):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                check(x, y)
        else:
            assert a is b

    check(batch, move(batch, META))


def test_dl7_the_users_batch_is_left_as_it_was() -> None:
    x = tensor(4)
    for batch in ({"x": x}, OrderedDict(x=x), Example(x, [1, 2, 3, 4]), [x, "name"], Pair(x, None)):
        before = repr(batch)
        move(batch, META)
        cut(batch, 1, 3, 4)
        join([batch, batch])
        assert repr(batch) == before


@given(st.integers(1, 300), st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_equal_cuts(total: int, limit: int) -> None:
    cuts = equal_cuts(total, limit)
    sizes = [stop - start for start, stop in cuts]
    assert cuts[0][0] == 0
    assert cuts[-1][1] == total
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
    assert len(sizes) == -(-total // limit)
    assert max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("total", "limit", "sizes"),
    [(33, 32, [17, 16]), (8, 8, [8]), (8, None, [8]), (3, 8, [3]), (7, 3, [3, 2, 2]), (1, 1, [1])],
)
def test_equal_cuts_table(total: int, limit: int | None, sizes: list[int]) -> None:
    assert [b - a for a, b in equal_cuts(total, limit)] == sizes


# Leaves that are not plain tensors


def test_dl7_numpy_arrays_are_cut_and_pass_the_device_by() -> None:
    batch = {"x": tensor(5), "name": np.array(["a", "b", "c", "d", "e"]), "scalar": np.float64(3.0)}
    part = cut(batch, 1, 4, 5)
    assert part["name"].tolist() == ["b", "c", "d"]
    assert part["scalar"] == 3.0
    assert size({"only": np.zeros((6, 2))}) == 6
    assert move(batch, META)["name"] is batch["name"]


@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
@pytest.mark.filterwarnings("ignore:Sparse CS:UserWarning")
def test_dl7_sparse_tensors(layout: str) -> None:
    dense = torch.tensor([[0.0, 1, 0], [2, 0, 0], [0, 0, 0], [0, 3, 4], [5, 0, 6]])
    x = {"coo": dense.to_sparse(), "csr": dense.to_sparse_csr(), "csc": dense.to_sparse_csc()}[layout]
    batch = {"x": x, "y": tensor(5)}
    assert size(batch) == 5
    parts = [cut(batch, a, b, 5) for a, b in equal_cuts(5, 2)]
    assert all(part["x"].layout == x.layout for part in parts)
    assert torch.equal(torch.cat([part["x"].to_dense() for part in parts]), dense)
    moved = move(batch, META)["x"]
    assert moved.is_meta
    assert moved.layout == x.layout


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_dl7_nested_tensors(layout: torch.layout) -> None:
    rows = [torch.arange(float(2 * k)).view(k, 2) for k in (3, 1, 4, 2, 2)]
    batch = (torch.nested.nested_tensor(rows, layout=layout), tensor(5))
    assert size(batch) == 5
    parts = [cut(batch, a, b, 5) for a, b in equal_cuts(5, 2)]
    assert all(part[0].is_nested and part[0].layout == layout for part in parts)
    found = [row for part in parts for row in part[0].unbind()]
    assert all(torch.equal(a, b) for a, b in zip(found, rows, strict=True))
    assert join(parts) is None  # its parts stay micro-batches of their own


def test_dl7_packed_sequences_move_whole_and_refuse_to_be_cut() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    batch = {"words": packed, "y": tensor(2)}
    assert size(batch) == 2
    moved = move(batch, META)
    assert isinstance(moved["words"], PackedSequence)
    assert moved["words"].data.device == META
    assert cut(batch, 0, 2, 2)["words"] is packed
    with pytest.raises(TypeError, match=r"batch\['words'\].*PackedSequence.*cut="):
        cut(batch, 0, 1, 2)


def test_dl7_transformers_batch_encoding() -> None:
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": tensor(5, 4), "mask": tensor(5, 4), "text": list("abcde")})
    assert size(batch) == 5
    parts = [cut(batch, a, b, 5) for a, b in equal_cuts(5, 2)]
    assert [type(part) for part in parts] == [transformers.BatchEncoding] * 3
    assert parts[1].input_ids.tolist() == batch["input_ids"][2:4].tolist()
    assert same(join(parts), batch)
    moved = move(batch, META)
    assert isinstance(moved, transformers.BatchEncoding)
    assert moved["input_ids"].device == META
    assert moved["text"] == list("abcde")
    assert batch["input_ids"].device.type == "cpu"


def test_dl7_transformers_model_output() -> None:
    pytest.importorskip("transformers")
    from transformers.modeling_outputs import BaseModelOutput

    batch = BaseModelOutput(last_hidden_state=tensor(5, 3), hidden_states=(tensor(5, 2), tensor(5, 2)))
    assert size(batch) == 5
    parts = [cut(batch, a, b, 5) for a, b in equal_cuts(5, 2)]
    assert all(type(part) is BaseModelOutput for part in parts)
    assert parts[0].last_hidden_state.shape == (2, 3)
    assert parts[0].last_hidden_state is parts[0]["last_hidden_state"]
    joined = join(parts)
    assert torch.equal(joined.last_hidden_state, batch.last_hidden_state)
    assert torch.equal(joined.hidden_states[1], batch.hidden_states[1])
    assert move(batch, META).hidden_states[0].device == META


def test_dl7_default_dict() -> None:
    batch = defaultdict(list, x=tensor(4), y=[1, 2, 3, 4])
    parts = [cut(batch, 0, 3, 4), cut(batch, 3, 4, 4)]
    assert type(parts[0]) is defaultdict
    assert parts[0].default_factory is list
    assert same(join(parts), batch)


READ_ONLY = {"mapping": lambda **held: ReadOnly(held), "proxy": lambda **held: MappingProxyType(held), "keywords": Keywords,
             "other": Other.of}  # fmt: skip


@pytest.mark.parametrize("kind", READ_ONLY)
def test_dl7_mappings_that_nothing_can_be_put_into(kind: str) -> None:
    make: Any = READ_ONLY[kind]
    batch = make(x=tensor(5, 3), y=make(z=tensor(5)), names=list("abcde"), more={"w": (tensor(5), [tensor(5)])})
    first = type(batch) if kind in ("mapping", "proxy") else dict  # of one that changed
    assert move(batch, torch.device("cpu")) is batch
    assert cut(batch, 0, 5, 5) is batch
    parts = [cut(batch, a, b, 5) for a, b in equal_cuts(5, 2)]
    assert [type(part) for part in parts] == [type(part["y"]) for part in parts] == [first] * 3
    joined = join(parts)
    assert type(joined) is first
    assert torch.equal(joined["x"], batch["x"])
    assert torch.equal(joined["y"]["z"], batch["y"]["z"])
    assert joined["names"] == batch["names"]
    assert torch.equal(joined["more"]["w"][1][0], batch["more"]["w"][1][0])
    moved = move(batch, META)
    assert (moved["x"].device, moved["y"]["z"].device, type(moved)) == (META, META, first)
    assert batch["x"].device.type == "cpu"


class Columns(list[Any]):
    def __init__(self, x: Any, y: Any, name: str = "") -> None:
        super().__init__([x, y])
        self.name = name


class Two(tuple[Any, ...]):
    def __new__(cls, x: Any, y: Any, name: str = "") -> Two:
        new = super().__new__(cls, (x, y))
        new.name = name
        return new

    name: str


class Items(list[Any]):
    def __init__(self, items: Any = (), name: str = "") -> None:
        super().__init__(items)
        self.name = name


class Fixed(tuple[Any, ...]):
    def __new__(cls, items: Any = (), name: str = "") -> Fixed:
        new = super().__new__(cls, items)
        new.name = name
        return new

    name: str


class Views(list[Any]):
    """Its constructor computes of its parts, and has something of the program's own beside."""

    def __init__(self, items: Any) -> None:
        super().__init__(items)
        self.n, self.means, self.fold = len(self[0]), self[0].mean(1), 0


class Bare(tuple[Any, ...]):
    __slots__ = ()

    def __new__(cls, x: Any, y: Any, name: str = "") -> Bare:
        return super().__new__(cls, (x, y))


def test_dl7_what_a_constructor_computes_of_its_parts_is_that_of_a_cut() -> None:
    batch = Views([tensor(5, 3), tensor(5)])
    batch.fold, batch.name = 7, "it"  # type: ignore[attr-defined]
    for a, b in equal_cuts(5, 2):
        part = cut(batch, a, b, 5)
        assert (type(part), part.n, part.fold, part.name) == (Views, b - a, 7, "it")
        assert torch.equal(part.means, batch[0][a:b].mean(1))


class Source:
    def __init__(self, name: str, rows: Tensor) -> None:
        self.name, self.rows, self.me = name, rows, self


class Padded(list[Any]):
    """Its constructor keeps what it computes in all kinds of things, and takes some of the program's own."""

    def __init__(self, items: Any, source: Any = None, scale: Any = abs, weights: Any = (1.0, 1.0), ids: Any = (0,)) -> None:
        super().__init__(items)
        x = self[0]
        self.lengths = (x > 4).sum(1).numpy() if x.device.type == "cpu" else None
        self.sums, self.rows, self.roots = [x.sum(1), x.mean(1)], {"first": x[:, 0]}, (x - 4).sqrt().sum(1)
        self.first, self.of = Source("first", x[:, 0]), lambda i: x[i]
        self.source, self.scale = source or Source("none", torch.zeros(2)), scale
        self.weights, self.ids = np.array(weights), [torch.tensor(ids)]


def test_dl7_what_a_constructor_computes_is_that_of_a_cut_whatever_it_is_kept_in() -> None:
    """Arrays, and containers or objects that hold tensors, have no truth of a comparison; NaN is equal to nothing."""
    own = {"source": Source("file", torch.ones(2)), "scale": round, "weights": (1.0, 2.0), "ids": (5, 6)}
    for batch in (Padded([tensor(5, 3), tensor(5)]), Padded([tensor(5, 3), tensor(5)], **own)):
        assert batch.roots.isnan().any()
        for a, b in equal_cuts(5, 2):
            x, part = batch[0][a:b], cut(batch, a, b, 5)
            assert type(part) is Padded
            assert part.lengths.tolist() == (x > 4).sum(1).tolist()
            assert torch.equal(torch.stack(part.sums), torch.stack([x.sum(1), x.mean(1)]))
            assert torch.equal(part.rows["first"], x[:, 0])
            assert torch.allclose(part.roots, (x - 4).sqrt().sum(1), 0, 0, equal_nan=True)
            assert torch.equal(part.first.rows, x[:, 0])
            assert torch.equal(part.of(0), x[0])
            assert (part.source.name, part.source.rows.tolist()) == (batch.source.name, batch.source.rows.tolist())
            assert part.scale is batch.scale
            assert part.weights.tolist() == batch.weights.tolist()
            assert part.ids[0].tolist() == batch.ids[0].tolist()
        moved = move(batch, META)
        assert (moved.sums[0].device, moved.rows["first"].device, moved.source.name) == (META, META, batch.source.name)


def test_dl7_lists_and_tuples_with_a_constructor_of_their_own() -> None:
    kinds: list[Any] = [
        Columns, Two, Bare, lambda x, y, name: Columns(x, Two(y, y, name), name),
        *(lambda x, y, name, of=of: of([x, y], name) for of in (Items, Fixed)),  # which take their parts without the name too
    ]  # fmt: skip
    for kind in kinds:
        batch = kind(tensor(5, 3), tensor(5), "it")
        parts = [cut(batch, a, b, 5) for a, b in equal_cuts(5, 2)]
        joined, moved = join(parts), move(batch, META)
        for each in (*parts, joined, moved):
            assert type(each) is type(batch)
            assert len(each) == 2
            assert getattr(each, "name", None) == getattr(batch, "name", None)
        assert same(list(joined), list(batch))
        assert torch.equal(parts[1][0], batch[0][2:4])
        assert moved[0].device == META
        assert batch[0].device.type == "cpu"


def test_dl7_what_torch_returns_as_tuples_of_names_keeps_its_kind() -> None:
    batch = torch.max(tensor(5, 3), dim=1)
    part = cut(batch, 1, 3, 5)
    assert type(part) is type(batch)
    assert torch.equal(part.indices, batch.indices[1:3])


def test_dl7_a_list_of_fields_is_no_list_of_samples() -> None:
    """A list is cut along only if none of its elements is a tensor or a container (DESIGN.md, Data)."""
    batch = [("one", "two", "three"), ("eins", "zwei", "drei")]  # what default_collate makes of pairs of strings
    assert size(batch) == 3
    assert cut(batch, 0, 2, 3) == [("one", "two"), ("eins", "zwei")]
    assert join([cut(batch, 0, 2, 3), cut(batch, 2, 3, 3)]) == batch


@pytest.mark.parametrize("labels", [[[1, 2, 3], [4], [5, 6]], [[1, 2, 3], [], [5, 6]], [[1, 2, 3], [4], []]])
def test_dl7_ragged_lists_are_cut_by_sample_or_refused(labels: list[list[int]]) -> None:
    """Never is a sample's own list cut: not even one as long as the batch."""
    batch = {"x": tensor(3), "labels": labels}
    try:
        found = cut(batch, 0, 2, 3)["labels"]
    except ValueError as error:
        assert "batch['labels']" in str(error)  # noqa: PT017
        assert "cut=" in str(error)  # noqa: PT017
    else:
        assert found == labels[:2]


# What can't be cut


class Opaque:
    pass


@pytest.mark.parametrize(
    ("batch", "path", "kind"),
    [
        ((tensor(4), Opaque()), r"batch\[1\]", "Opaque"),
        ({"x": tensor(4), "more": {"bag": Opaque()}}, r"batch\['more'\]\['bag'\]", "Opaque"),
        ({"x": tensor(4), "ids": {1, 2, 3, 4}}, r"batch\['ids'\]", "set"),
        (Pair(tensor(4), Opaque()), r"batch\[1\]|batch\.y", "Opaque"),
        (Example(tensor(4), Opaque()), r"batch\['y'\]|batch\.y", "Opaque"),
        ([tensor(4), (tensor(4), Opaque())], r"batch\[1\]\[1\]", "Opaque"),
    ],
)
def test_dl7_a_leaf_that_cannot_be_cut_is_named(batch: Any, path: str, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"{path} is a {kind}.*cut="):
        cut(batch, 0, 2, 4)
    assert cut(batch, 0, 4, 4) is batch


@pytest.mark.parametrize(
    ("other", "count"),
    [(torch.zeros(3), 3), (torch.zeros(9, 2), 9), (["a", "b"], 2), ([1], 1), (np.zeros(5), 5), (("x",) * 7, 7)],
)
def test_dl7_another_first_dimension_names_both_sizes(other: Any, count: int) -> None:
    with pytest.raises(ValueError, match=rf"batch\['w'\] holds {count} .* 8 samples.*cut="):
        cut({"x": tensor(8, 2), "w": other}, 0, 4, 8)


def test_dl7_no_size() -> None:
    for batch in (None, 3, "text", {}, [], {"a": torch.tensor(1.0)}, Opaque(), {"a": None, "b": "c"}):
        assert size(batch) is None


def test_dl7_size_prefers_tensors() -> None:
    assert size({"names": ["a", "b", "c"], "x": torch.zeros(7, 3)}) == 7
    assert size((np.zeros(4), torch.zeros(6))) == 6
    assert size({"scale": torch.tensor(2.0), "x": torch.zeros(5)}) == 5
    assert size({"names": ["a", "b"], "n": 3}) == 2


# What can't be joined


@pytest.mark.parametrize(
    "parts",
    [
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), torch.zeros(2, 1)),
        ({"x": torch.zeros(2)}, {"y": torch.zeros(2)}),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2), "y": torch.zeros(2)}),
        ((torch.zeros(2),), [torch.zeros(2)]),
        ((torch.zeros(2), "a"), (torch.zeros(2), "b")),
        ((torch.zeros(2), 1), (torch.zeros(2), 2)),
        ((torch.zeros(2), None), (torch.zeros(2), torch.zeros(2))),
        ((torch.zeros(2), torch.zeros(2)), (torch.zeros(2), None)),
        ((torch.zeros(2), torch.tensor(1.0)), (torch.zeros(2), torch.tensor(2.0))),
        ((torch.zeros(2), Opaque()), (torch.zeros(2), Opaque())),
        (Example(torch.zeros(2)), Frozen(torch.zeros(2))),
        (torch.zeros(2), torch.zeros(2, device=META)),
        (torch.eye(3).to_sparse(), torch.eye(3).to_sparse()),
    ],
)
def test_dl7_what_differs_is_not_joined(parts: tuple[Any, Any]) -> None:
    assert join(parts) is None
    assert join(parts[:1]) is parts[0]


# Through a Loop


class Cuts(Callback):
    """Sets sizes, and keeps what went through."""

    owns = ("batch_size", "micro_batch_size")

    def __init__(self, micro: int | None = None, batch: int | None = None) -> None:
        self.micro, self.size, self.seen = micro, batch, list[Any]()

    def on_step_start(self, state: Any) -> None:
        state.micro_batch_size, state.batch_size = self.micro, self.size

    def on_micro_end(self, state: Any) -> None:
        self.seen.append((state.micro.size, state.micro.weight, state.micro.batch))


def regression(model: nn.Module, batch: Any) -> Tensor:
    x, y = (batch["x"], batch["y"]) if isinstance(batch, Mapping) else (batch.x, batch.y)
    return (model(x).squeeze(1) - y).square().mean()


def trained(form: Any, batches: list[Any], cuts: Cuts, **kwargs: Any) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    form(Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), [cuts], **kwargs), regression, batches, epochs=2)
    return model.weight.detach()


data = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
KINDS = {
    "dict": lambda x: {"x": x, "y": x.sum(1), "names": ["n"] * len(x), "none": None},
    "namedtuple": lambda x: Pair(x, x.sum(1)),
    "dataclass": lambda x: Example(x, x.sum(1)),
    "frozen": lambda x: Frozen(x, x.sum(1)),
    "mapping": lambda x: ReadOnly({"x": x, "y": x.sum(1)}),
    "proxy": lambda x: MappingProxyType({"x": x, "y": x.sum(1)}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_dl7_structures_train_the_same_cut_and_joined(form: Any, kind: str) -> None:
    make = KINDS[kind]
    whole = trained(form, [make(data[:10]), make(data[10:])], Cuts())
    cuts = Cuts(micro=4, batch=10)
    found = trained(form, [make(part) for part in data.split(3)], cuts)
    assert torch.allclose(found, whole, rtol=1e-12, atol=0)
    assert [s for s, _, _ in cuts.seen] == [4, 3, 3] * 4


@pytest.mark.parametrize("form", FORMS)
def test_dl7_users_objects_by_cut_and_weigh(form: Any) -> None:
    def make(x: Tensor) -> Bag:
        return Bag(x, x.sum(1))

    def cut_bag(bag: Bag, start: int, stop: int) -> Bag:
        return Bag(bag.x[start:stop], bag.y[start:stop])

    whole = trained(form, [KINDS["dict"](data[:10]), KINDS["dict"](data[10:])], Cuts())
    cuts = Cuts(micro=4)
    found = trained(form, [make(data[:10]), make(data[10:])], cuts, cut=cut_bag, weigh=lambda bag: len(bag.x))
    assert torch.allclose(found, whole, rtol=1e-12, atol=0)
    assert [(s, w) for s, w, _ in cuts.seen] == [(4, 4.0), (3, 3.0), (3, 3.0)] * 4
    carried = Cuts(batch=10)  # batches that can't be joined stay micro-batches of their own
    found = trained(form, [make(p) for p in data.split(4)], carried, cut=cut_bag, weigh=lambda bag: len(bag.x))
    assert torch.allclose(found, whole, rtol=1e-12, atol=0)
    assert [s for s, _, _ in carried.seen] == [4, 4, 2, 2, 4, 4] * 2


@pytest.mark.parametrize("form", FORMS)
def test_dl7_users_objects_weighed_by_tokens(form: Any) -> None:
    """`weigh` says what the mean is a mean over; `cut` gets positions of samples all the same."""

    class Text(dict[str, Any]):
        pass

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        error = (model(batch["x"]).squeeze(1) - batch["y"]).square()
        return (error * batch["w"]).sum() / batch["w"].sum()

    torch.manual_seed(0)
    asked = []
    tokens = torch.arange(1.0, 11.0, dtype=torch.float64)

    def cut_text(batch: Any, start: int, stop: int) -> Any:
        asked.append((start, stop))
        return Text({k: v[start:stop] for k, v in batch.items()})

    results = []
    for micro in (None, 4):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), [Cuts(micro)], cut=cut_text,
                    weigh=lambda b: b["w"].sum())  # fmt: skip
        form(loop, weighted, [Text(x=data[:10], y=data[:10].sum(1), w=tokens)], epochs=1)
        results.append(model.weight.detach())
    assert torch.allclose(*results, rtol=1e-12, atol=0)
    assert asked == [(0, 4), (4, 7), (7, 10)]


@pytest.mark.parametrize("form", FORMS)
def test_dl7_users_objects_pass_whole_where_nothing_cuts(form: Any) -> None:
    """How a batch is measured and cut is asked only when something cuts or carries."""
    seen = []

    class Look(Callback):
        def on_micro_end(self, state: Any) -> None:
            seen.append(state.micro.batch)

    bags = [Bag(data[:10], data[:10].sum(1)), Bag(data[10:], data[10:].sum(1))]
    model = nn.Linear(3, 1).double()
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), [Look()], weigh=lambda bag: 1)
    assert form(loop, regression, bags, epochs=1).step == 2
    assert seen == bags


@pytest.mark.parametrize("form", FORMS)
def test_dl7_errors_reach_the_user_with_the_remedy(form: Any) -> None:
    bag = Bag(data, data.sum(1))
    with pytest.raises(TypeError, match=r"Bag.*size=fn\(batch\)\), .*cut=fn\(batch, start, stop\)$"):
        trained(form, [bag], Cuts())
    with pytest.raises(TypeError, match=r"batch is a Bag.*cut="):
        trained(form, [bag], Cuts(micro=4), weigh=lambda b: len(b.x))
    with pytest.raises(ValueError, match=r"batch\['w'\] holds 3 .* 20 samples.*cut="):
        trained(form, [{"x": data, "y": data.sum(1), "w": torch.zeros(3)}], Cuts(micro=4))
    assert trained(form, [{"x": data, "y": data.sum(1), "w": torch.zeros(3)}], Cuts()).shape == (1, 3)
    found = trained(form, [{"x": data, "y": data.sum(1), "w": torch.zeros(3)}], Cuts(micro=10),
                    cut=lambda b, i, j: {"x": b["x"][i:j], "y": b["y"][i:j], "w": b["w"]})  # fmt: skip
    assert torch.allclose(found, trained(form, [KINDS["dict"](data)], Cuts()), rtol=1e-12, atol=0)


def pictures(part: Tensor) -> Any:
    """As a detection collate gives them: pictures of three rows each, and a list of what stands in each."""
    return tuple(x.expand(3, 3) for x in part), [{"sum": x.sum()} for x in part]


def in_time(part: Tensor) -> Any:
    """Two moments of each sample, time before samples."""
    return torch.stack([part, part]), torch.stack([part.sum(1)] * 2)


ELSEWHERE: dict[str, Any] = {
    "pictures": (pictures, lambda b, i, j: (b[0][i:j], b[1][i:j]), lambda b: len(b[0])),
    "time": (in_time, lambda b, i, j: (b[0][:, i:j], b[1][:, i:j]), lambda b: b[0].size(1)),
}


def elsewhere(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch[1], list):
        return torch.stack([(model(x) - y["sum"]).square().mean() for x, y in zip(*batch, strict=True)]).mean()
    return (model(batch[0]).squeeze(2) - batch[1]).square().mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_samples_that_lie_elsewhere(form: Any, kind: str) -> None:
    """By `size` and `cut` each is trained on once, in any cuts and batches; by `cut` alone samples would be lost, in silence."""
    make, by, size = ELSEWHERE[kind]

    def run(parts: list[Tensor], cuts: Cuts, **kwargs: Any) -> tuple[Tensor, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.05), [cuts], **kwargs)
        state = form(loop, elsewhere, [make(part) for part in parts], epochs=2)
        return model.weight.detach(), state

    whole, _ = run([data[:10], data[10:]], Cuts())
    for parts, cuts, sizes in (
        ([data[:10], data[10:]], Cuts(micro=4), [4, 3, 3] * 4),
        ([*data.split(4)], Cuts(batch=10), [4, 4, 2, 2, 4, 4] * 2),  # never joined: along what `cut` cuts nobody else knows
        ([*data.split(4)], Cuts(batch=10, micro=3), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2] * 2),
    ):
        found, state = run(parts, cuts, cut=by, size=size)
        assert torch.allclose(found, whole, rtol=1e-12, atol=0)
        assert [s for s, _, _ in cuts.seen] == sizes
        assert (state.samples, state.total_steps, state.epoch_samples) == (40, 4, 20)
    with pytest.raises(ValueError, match=r"cut\(batch, 0, 1\) gave a batch of \d samples, not of 1:.*size=fn"):
        run([data[:10]], Cuts(micro=1), cut=by)
    with pytest.raises(ValueError, match=r"holds .* samples: give Loop\(\.\.\., cut=fn.*size=fn"):
        run([data[:10]], Cuts(micro=4), size=size)
    carried = Cuts(batch=10)  # and without a cut such parts are not joined along anything else
    assert torch.allclose(run([data[:4], data[4:10], data[10:14], data[14:]], carried, size=size)[0], whole, rtol=1e-12, atol=0)
    assert [s for s, _, _ in carried.seen] == [4, 6] * 4


IMAGES = [torch.zeros(3, 4 + i, 5) for i in range(4)]  # of other sizes, so that no tensor holds all
BOXES = [{"boxes": torch.zeros(1 + i, 4)} for i in range(4)]


@pytest.mark.parametrize("batch", [
    (tuple(IMAGES), tuple(BOXES)), [IMAGES, BOXES], (IMAGES, [0, 1, 2, 1]), (IMAGES, tensor(4)), (IMAGES, list("abcd")),
    {"id": 7, "images": IMAGES, "targets": BOXES}, Example(IMAGES, BOXES), Pair([{"image": x} for x in IMAGES], BOXES),
    (IMAGES, np.zeros(4)), ([tensor(3, 5, 5)] * 4, BOXES), ([tensor(3, 5, 5)] * 4, [{"label": i} for i in range(4)]),
    (IMAGES, BOXES, [{"masks": torch.zeros(1 + i, 5, 5)} for i in range(4)]),
])  # fmt: skip
def test_samples_in_a_list_of_tensors_are_in_doubt(batch: Any) -> None:
    text = in_doubt(batch, size)
    assert text is not None
    assert re.search(
        r"counts as 3 samples.* lies in batch\[(0|'images'|'x')\], which holds 4, as batch\[(1|'targets'|'y')\]", text
    )
    assert "size=fn(batch)" in text
    assert "cut=fn(batch, start, stop)" in text
    assert in_doubt(batch, lambda batch: 4) is None


@pytest.mark.parametrize("batch", [
    tensor(5, 3), (tensor(5, 3), tensor(5)), [tensor(2, 3), tensor(2)], {"x": tensor(5), "n": [1, 2]}, "text", [], None,
    [[tensor(5, 3), tensor(5, 2)], [tensor(5), tensor(5)]],  # what default_collate makes of pairs of pairs
    [[tensor(5, 3), tensor(5, 2)], [("a",) * 5, ("b",) * 5]], [[tensor(8, 3), tensor(8, 2)], tensor(8)],
    ([tensor(5, 3)] * 8, tensor(5)), (Pair(tensor(5), tensor(5)), [1, 2]), (IMAGES[:3], BOXES[:3]), IMAGES,
    (tensor(4, 3), BOXES), (pack_sequence([tensor(3), tensor(2)]), tensor(2)),
])  # fmt: skip
def test_other_batches_are_in_no_doubt(batch: Any) -> None:
    assert in_doubt(batch, lambda batch: size(batch) or 0) is None


def test_views_of_the_same_samples_are_in_no_doubt() -> None:
    """Each holds all samples, as labels beside them do, whatever else holds as much as there are views."""
    views, y = [torch.zeros(8, 3, 5), torch.zeros(8, 4)], tensor(8)
    for batch in (
        {"views": views, "names": ["left", "right"], "y": y}, [views, [0.5, 0.5], list("abcdefgh")], [views, [y, None]],
        [views[:1], ["of one set"], {"y": y}], (views, tensor(2), [y, y]),
    ):  # fmt: skip
        assert in_doubt(batch, lambda batch: size(batch) or 0) is None


@pytest.mark.parametrize("form", FORMS)
def test_samples_in_doubt_are_warned_of_once(form: Any, caplog: pytest.LogCaptureFixture) -> None:
    def loss(model: Any, batch: Any) -> Any:
        return torch.stack([model(x.mean((1, 2))).sum() for x in batch[0]]).mean()

    data = [(tuple(IMAGES), tuple(BOXES))] * 3
    for more, count in (({}, 1), ({"size": lambda batch: len(batch[0])}, 0)):
        caplog.clear()
        model = nn.Linear(3, 2)
        form(Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), **more), loss, data, epochs=2)
        assert caplog.text.count("a batch counts as 3 samples") == count


@pytest.mark.parametrize("answer", [None, 2.0, -1, True, "8"])
def test_a_size_is_a_whole_number(answer: Any) -> None:
    with pytest.raises(ValueError, match=r"size must return how many samples.* a whole number, at least 0, not"):
        trained(FORMS[1], [KINDS["dict"](data)], Cuts(micro=4), size=lambda batch: answer)
    with pytest.raises(TypeError, match="size must be a function, not 8"):
        trained(FORMS[1], [KINDS["dict"](data)], Cuts(), size=8)


def test_what_goes_by_no_sample_is_not_joined() -> None:
    """Lists that hold a list or mapping for each sample, and tensors without a batch dimension: parts stay their own."""
    x = torch.zeros(2, 1)
    assert join([{"x": x, "words": [["a"], ["b"]]}, {"x": x, "words": [["c"], ["d"]]}]) is None
    boxes = [{"boxes": torch.zeros(3, 4)}, {"boxes": torch.zeros(1, 4)}]
    assert join([(x, boxes), (x, boxes[::-1])]) is None
    assert join([{"x": x, "weights": torch.ones(3)}, {"x": x, "weights": torch.zeros(3)}]) is None
    weights = torch.ones(3)
    joined = join([{"x": x, "weights": weights}, {"x": x, "weights": weights}])
    assert joined is not None
    assert joined["weights"] is weights
    assert len(joined["x"]) == 4
    assert join([[x, x], [x, x]]) is not None  # the very same batch, twice
