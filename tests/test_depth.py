"""What a layer is, and which comes first: by registration, and as a model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hookloop.loop.depth import arguments, as_run, depths, layers
from hookloop.loop.groups import fold


def named(model: nn.Module, found: Any) -> list[str]:
    names = {p: n for n, p in model.named_parameters()}
    assert sorted(names.values()) == sorted(names[p] for layer in found for p in layer)  # each once
    return [fold([names[p] for p in layer]) for layer in found]


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def linear() -> nn.Linear:
    return nn.Linear(4, 4, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(4, bias=False), linear(), linear()

    def forward(self, x: Any) -> Any:
        return x + self.b(self.a(self.norm(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x * self.scale


class Late(nn.Module):
    """Everything is registered in the wrong order."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.never, self.stack, self.embed = linear(), linear(), Stack(), nn.Embedding(5, 4)
        self.place, self.rnn, self.attend = nn.Embedding(9, 4), nn.LSTM(4, 4, 2), nn.MultiheadAttention(4, 2)
        self.shift = torch.zeros(4)  # neither a parameter nor a buffer
        self.register_buffer("one", torch.ones(4))

    def forward(self, x: Any, scale: float = 1.0) -> Any:
        h = self.stack((self.embed(x) + self.shift + self.place(x)) * self.one * scale)
        h, _ = self.rnn(h)
        return self.head(self.attend(h, h, h)[0])


def test_leaves_in_order_with_their_norms() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(4), linear(), nn.BatchNorm1d(4), nn.ReLU(), nn.Sequential(linear(), nn.Tanh()), linear()
    )
    found = layers(model)
    assert [len(layer) for layer in found] == [5, 1, 1]  # a norm before the first layer belongs to it
    assert named(model, found)[1:] == ["4.0.weight", "5.weight"]
    assert len(layers(linear())) == 1


def test_blocks_are_one_layer_each_and_a_stack_of_them_is_none() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Stack(), Stack()  # as T5 has them: of one class, side by side
            self.one, self.two = Block(), Block()
            self.head = linear()

    model = Both()
    found = [[n.rpartition(".")[0] for n, p in model.named_parameters() if p in set(layer)] for layer in layers(model)]
    assert [set(part) for part in found] == [
        {"encoder", "encoder.blocks.0.norm", "encoder.blocks.0.a", "encoder.blocks.0.b"},
        {"encoder.blocks.1.norm", "encoder.blocks.1.a", "encoder.blocks.1.b"},
        {"decoder", "decoder.blocks.0.norm", "decoder.blocks.0.a", "decoder.blocks.0.b"},
        {"decoder.blocks.1.norm", "decoder.blocks.1.a", "decoder.blocks.1.b"},
        {"one.norm", "one.a", "one.b"}, {"two.norm", "two.a", "two.b"}, {"head"}]  # fmt: skip


def test_a_backbone_beside_its_head_is_no_layer() -> None:
    model = nn.Sequential(nn.Sequential(Stack()), linear())
    assert len(layers(model)) == 3
    alone = nn.Sequential(Block(), linear())  # of a class that is there once: a module like any other
    assert named(alone, layers(alone)) == ["0.norm.weight, 0.a.weight", "0.b.weight", "1.weight"]


def test_embeddings_are_the_first_whenever_they_were_registered() -> None:
    model = Late()
    found = named(model, layers(model))
    assert found[0] == "embed.weight, place.weight"
    assert found[1] == "head.weight"
    assert len(found) == 7


def test_a_tied_head_is_no_layer_and_shared_ones_count_once() -> None:
    embed, block = nn.Embedding(5, 4), Block()
    model = nn.Sequential(embed, block, block, Block(), head := nn.Linear(4, 5, bias=False))
    head.weight = embed.weight
    assert len(layers(model)) == 3


def test_depth_runs_from_0_to_1() -> None:
    model = nn.Sequential(linear(), linear(), linear())
    assert list(depths(model).values()) == [0.0, 0.5, 1.0]
    assert list(depths(linear()).values()) == [1.0]


def test_wrappers_change_nothing() -> None:
    model = Stack()
    for wrapped in (compiled(model), nn.DataParallel(model), compiled(nn.DataParallel(model))):
        assert [[id(p) for p in layer] for layer in layers(wrapped)] == [[id(p) for p in layer] for layer in layers(model)]
        assert len(as_run(wrapped, layers(wrapped), torch.zeros(2, 4))) == 2


def test_as_run_follows_the_forward_and_touches_nothing() -> None:
    model = Late()
    before, state = torch.get_rng_state(), {n: x.clone() for n, x in model.state_dict().items()}
    model.train()
    found = named(model, as_run(model, layers(model), torch.zeros(3, 2, dtype=torch.int64)))
    assert [part.split(".")[0] for part in found] == ["embed", "stack", "stack", "rnn", "attend", "head"]
    assert found[-1] == "head.weight, never.weight"  # what never runs goes with the last
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(x, state[n]) and not x.is_meta for n, x in model.state_dict().items())
    assert not model.shift.is_meta


def test_arguments_are_what_the_forward_takes() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    assert arguments(Stack(), (x, y)) == ([x], {})
    assert arguments(Stack(), x) == ([x], {})
    assert arguments(Late(), {"x": x, "labels": y}) == ([], {"x": x})
    assert arguments(nn.DataParallel(Stack()), [x, y]) == ([x, y], {})
    assert arguments(nn.DataParallel(Stack()), {"z": y}) == ([], {"z": y})


def test_a_forward_that_asks_for_values_is_an_error_with_the_remedy() -> None:
    class Asks(Stack):
        def forward(self, x: Any) -> Any:
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"does not run on example without values.*RuntimeError.*give what its forward takes"):
        as_run(Asks(), layers(Asks()), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="used none of its parameters on example"):
        as_run(nn.Sequential(nn.Identity()), [], torch.zeros(2, 4))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_models_of_hugging_face(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_layer=3, n_head=2, n_embd=8, vocab_size=11, n_positions=16, bos_token_id=0, eos_token_id=0
        )
        model, expected = transformers.GPT2LMHeadModel(config), ["wte", *"012"]
    else:
        config = transformers.BertConfig(
            num_hidden_layers=3, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=11
        )
        model, expected = transformers.BertForSequenceClassification(config), ["word_", *"012", "pooler", "classifier"]
    found = layers(model)
    for text, part in zip(expected, named(model, found), strict=True):
        assert text in part.split(",")[0]
    ran = as_run(model, found, {"input_ids": torch.zeros(2, 5, dtype=torch.int64), "more": 0})
    assert named(model, ran) == named(model, found)
