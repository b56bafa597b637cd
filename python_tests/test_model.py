"""Whole models: which layers are matched, what is refused, freezing, merging."""

from __future__ import annotations

import copy
import re

import helpers
import pytest
import torch
from torch import nn

import qrlora_kernels as qk


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.query(x) + self.key(x)


class Net(nn.Module):
    """Two blocks, an embedding tied to the head, and a classifier."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.classifier = nn.Linear(16, 3)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x), self.classifier(x)

    def get_output_embeddings(self):
        return self.head


def net():
    torch.manual_seed(0)
    return Net()


def adapt(model, targets, adapter="qr", **options):
    return qk.adapt(model, targets, adapter, progress=False, **{"rank": 4, **options})


def names(model):
    return list(qk.adapted_layers(model))


ALL = [f"blocks.{i}.{n}" for i in range(2) for n in ("query", "key")]


# --- matching


@pytest.mark.parametrize(
    ("targets", "want"),
    [
        ("query", ALL[::2]),
        ("blocks.1.query", ALL[2:3]),
        ("1.query", ALL[2:3]),
        (["query", "classifier"], [*ALL[::2], "classifier"]),
        (["classifier", "query"], [*ALL[::2], "classifier"]),
        ({"key"}, ALL[1::2]),
        (r"blocks\.\d+\.(query|key)", ALL),
        (r".*y", ALL),
        (re.compile(r"blocks\.0\..*"), ALL[:2]),
        ("all-linear", [*ALL, "classifier"]),
    ],
)
def test_targets(targets, want):
    assert names(adapt(net(), targets, rank=2)) == want


def test_all_linear_leaves_what_is_trained_in_full():
    model = adapt(net(), "all-linear", trainable=["classifier"])
    assert names(model) == ALL
    assert adapt(model, "classifier", rank=2).classifier.rank == 2, "a second call adapts more"
    assert names(model) == [*ALL, "classifier"]


def test_suffixes_match_whole_names_only():
    model = net()
    model.subquery = nn.Linear(16, 16)
    assert names(adapt(model, "query")) == ALL[::2]


# --- freezing, counting, taking off


@pytest.mark.parametrize("adapter", ["qr", "lora_xs", "ohora"])
def test_everything_else_is_frozen(adapter):
    model = adapt(net(), ["query", "key"], adapter, trainable=["classifier"])
    layers = qk.adapted_layers(model)
    own = {f"{n}.{key}" for n, m in layers.items() for key in m.trainables}
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert training == own | {"classifier.weight", "classifier.bias"}
    counts = qk.count_parameters(model)
    assert counts["adapter"] == sum(m.trained_parameters() for m in layers.values())
    assert counts["other"] == 16 * 3 + 3
    assert counts["frozen"] == sum(p.numel() for p in net().parameters()) - counts["other"]


def test_trainable_takes_one_name_and_the_bias_of_an_adapted_layer():
    model = adapt(net(), "query", trainable="classifier")
    assert model.classifier.weight.requires_grad
    model = adapt(net(), "query", trainable=["0.query.bias"])
    assert model.blocks[0].query.bias.requires_grad
    assert not model.blocks[0].query.weight.requires_grad


def test_summary_prints_a_row_a_layer(capsys):
    model = adapt(net(), "query", trainable="classifier")
    result = qk.summary(model)
    text = capsys.readouterr().out
    for word in ("blocks.0.query", "blocks.1.query", "16x16", "composed", "elsewhere 51"):
        assert word in text
    assert "trained by the adapter 8" in text
    row = result.layers[0]
    assert (row.adapter, row.shape, row.rank, row.trained) == ("qr", (16, 16), 4, 4)
    kept = model.blocks[0].query
    share = (kept.q @ kept.r).norm() ** 2 / kept.weight.norm() ** 2
    assert row.energy == pytest.approx(float(share), rel=1e-5)
    assert row.reason
    qk.summary(model, show=False)
    assert not capsys.readouterr().out


def test_progress_bar_can_be_shown(capsys):
    qk.adapt(net(), "query", rank=2)
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize("merged_first", [False, True])
def test_unload(merged_first):
    base = net()
    before = base(torch.arange(5))
    model = adapt(copy.deepcopy(base), ["query", "key"])
    for layer in qk.adapted_layers(model).values():
        layer.lam.data.normal_()
    want = model.eval()(torch.arange(5))
    plain = copy.deepcopy(model)
    if merged_first:
        qk.merge(plain)
    qk.unload(plain)
    assert not names(plain)
    torch.testing.assert_close(plain(torch.arange(5)), want)
    qk.unload(model, merge=False)
    assert all(map(helpers.same_bits, model(torch.arange(5)), before))


@pytest.mark.parametrize("taking_in", [qk.merge, qk.unload])
def test_a_tied_head_is_adapted_and_not_merged(taking_in):
    """Merged it would be untied, and whoever loads the written model ties it again."""
    model = net()
    bits = model.embed.weight.clone()
    adapt(model, "head")
    model.head.lam.data.fill_(1.0)
    with pytest.raises(ValueError, match=r"head\.weight must belong .* tied to embed\.weight"):
        taking_in(model)
    assert model.head.weight is model.embed.weight
    assert isinstance(model.head, qk.QRLinear)
    assert helpers.same_bits(model.embed.weight, bits)


def test_one_module_under_two_names_is_adapted_under_both():
    model = net()
    _shared_module(model)
    adapt(model, "query")
    assert names(model) == ["blocks.0.query"]
    assert model.blocks[1].query is model.blocks[0].query
    assert isinstance(model.blocks[1].query, qk.QRLinear)
    qk.unload(model)
    assert type(model.blocks[1].query) is nn.Linear


# --- refusals


def _tied_linears(model):
    model.blocks[0].key.weight = model.blocks[0].query.weight


def _shared_module(model):
    model.blocks[1].query = model.blocks[0].query


def _int8(model):
    model.blocks[1].key.weight = nn.Parameter(torch.ones(16, 16).to(torch.int8), False)


class Linear4bit(nn.Linear):
    """As bitsandbytes: packed weight, a forward of its own."""

    def forward(self, x):
        return x


def _quantised(model):
    model.blocks[1].key = Linear4bit(16, 16)


def _attention(model):
    model.blocks[1].key = nn.MultiheadAttention(16, 2)


def _nothing(model):
    pass


BOTH = ["query", "key"]


@pytest.mark.parametrize(
    ("prepare", "targets", "options", "message"),
    [
        (_nothing, "nosuch", {}, r"matches no module; linear layers here: query \(2\), key \(2\)"),
        (_nothing, ["query", "nosuch"], {}, r"\['nosuch'\] matches no module"),
        (_nothing, [], {}, "matches no module"),
        (_nothing, "(", {}, "no regular expression"),
        (_nothing, re.compile("nosuch"), {}, "matches no module"),
        (_nothing, "blocks", {}, "blocks must be an nn.Linear or a transformers Conv1D"),
        (_nothing, "embed", {}, "embed must be an nn.Linear"),
        (_nothing, 3, {}, "target_modules must be a string.* got int"),
        (_nothing, ["query", 3], {}, "target_modules must hold strings, got int"),
        (_tied_linears, BOTH, {}, "blocks.0.key and blocks.0.query share one weight"),
        (_int8, BOTH, {}, "blocks.1.key.weight must be float16.* got torch.int8"),
        (
            _quantised,
            BOTH,
            {},
            "blocks.1.key must compute a plain linear product, got test_model.Linear4bit",
        ),
        (lambda m: m.blocks[1].key.to("meta"), BOTH, {}, "blocks.1.key.weight must hold data"),
        (_attention, ["query", "out_proj"], {}, "reads its weight and never calls it"),
        (lambda m: m.blocks[1].key.weight.data.fill_(float("nan")), BOTH, {}, "1.key.weight must"),
        (lambda m: adapt(m, "blocks.1.key"), BOTH, {}, "blocks.1.key is adapted already"),
        (_nothing, ["query", "classifier"], {"rank": 5}, "classifier.weight .* got 5"),
        (_nothing, BOTH, {"ranks": 5}, "takes the options .* got ranks"),
        (_nothing, BOTH, {"adapter": "lora"}, "adapter must be one of .* got 'lora'"),
        (_nothing, BOTH, {"adapter": "ohora", "rank": 3}, "rank must divide N and K"),
        (_nothing, BOTH, {"trainable": ["nosuch"]}, "trainable names 'nosuch'"),
        (_nothing, BOTH, {"trainable": "blocks.0"}, "trainable must not reach the weight of an"),
        (_nothing, "head", {"trainable": "embed"}, "got embed.weight, which is the weight of head"),
    ],
)
def test_refusals_are_clear_and_leave_the_model_alone(prepare, targets, options, message):
    model = net()
    prepare(model)
    modules = list(model.named_modules())
    training = [(n, p.requires_grad) for n, p in model.named_parameters()]
    versions = [p._version for p in model.parameters()]
    with pytest.raises((TypeError, ValueError), match=message):
        adapt(model, targets, **options)
    assert list(model.named_modules()) == modules
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == training
    assert [p._version for p in model.parameters()] == versions


def test_bare_layer_and_unadapted_model_are_refused():
    with pytest.raises(ValueError, match="matches no module"):
        adapt(nn.Linear(16, 16), "all-linear")
    for function in (qk.merge, qk.unmerge, qk.unload, qk.summary):
        with pytest.raises(ValueError, match="must hold adapted layers, got none"):
            function(net())
