"""Heads that a task adds stay out of "all-linear" and are named; so are weights passed over."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import qrlora_kernels as qk

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 11, "intermediate_size": 32, "pad_token_id": 0, **SMALL}
SPEECH = {
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    **SMALL,
}
IMAGE = {"intermediate_size": 32, "image_size": 8, "patch_size": 4, **SMALL}

# The class, its configuration, and its head.
FAMILIES = {
    "BertForSequenceClassification": ("BertConfig", TEXT, ["classifier"]),
    "BertForTokenClassification": ("BertConfig", TEXT, ["classifier"]),
    "BertForQuestionAnswering": ("BertConfig", TEXT, ["qa_outputs"]),
    "BertForMultipleChoice": ("BertConfig", TEXT, ["classifier"]),
    "RobertaForSequenceClassification": ("RobertaConfig", TEXT, ["classifier"]),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": 11, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
        ["pre_classifier", "classifier"],
    ),
    "ElectraForSequenceClassification": (
        "ElectraConfig",
        {"embedding_size": 16, **TEXT},
        ["classifier"],
    ),
    "LlamaForSequenceClassification": ("LlamaConfig", TEXT, ["score"]),
    "GPT2ForSequenceClassification": (
        "GPT2Config",
        {"vocab_size": 11, "n_embd": 16, "n_layer": 1, "n_head": 2},
        ["score"],
    ),
    "T5ForSequenceClassification": (
        "T5Config",
        {"vocab_size": 11, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        ["classification_head"],
    ),
    "ViTForImageClassification": ("ViTConfig", IMAGE, ["classifier"]),
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2Config", SPEECH, ["projector", "classifier"]),
    "Wav2Vec2ForCTC": ("Wav2Vec2Config", {"vocab_size": 11, **SPEECH}, ["lm_head"]),
    "CLIPForImageClassification": (
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": IMAGE},
        ["classifier"],
    ),
}


def made(name):
    torch.manual_seed(0)
    config, options, _ = FAMILIES[name]
    return getattr(transformers, name)(getattr(transformers, config)(**options))


def heard(work, what):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(one.message) for one in caught if what in str(one.message)]


def adapt(model, targets="all-linear", **options):
    return lambda: qk.adapt(model, targets, **{"rank": 1, "progress": False, **options})


def outside(model, head):
    return [n for n in qk.adapted_layers(model) if n.split(".")[0] in head]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_head_stays_out_and_is_named(name):
    """A random head was adapted and frozen, or the call refused for its shape."""
    model, head = made(name), FAMILIES[name][2]
    (said,) = heard(adapt(model), "head for its task")
    assert f"trainable={head}" in said
    assert qk.adapted_layers(model)
    assert not outside(model, head)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_head_that_trains_is_not_mentioned(name):
    model, head = made(name), FAMILIES[name][2]
    assert heard(adapt(model, trainable=head), "head for its task") == []
    assert not outside(model, head)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained >= {n for n, _ in model.named_parameters() if n.split(".")[0] in head}


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "classifier"]])
def test_other_targets_leave_it_frozen_too(targets):
    model = made("BertForSequenceClassification")
    said = heard(adapt(model, targets), "head for its task")
    assert len(said) == 1
    assert heard(adapt(model, ["key"]), "head for its task") == []


def test_half_a_head():
    model = made("RobertaForSequenceClassification")
    assert len(heard(adapt(model, trainable=["out_proj"]), "head for its task")) == 1


def test_who_leaves_it_out_knows_of_it():
    model = made("BertForSequenceClassification")
    assert heard(adapt(model, skip=["classifier"]), "head for its task") == []
    model = made("BertForSequenceClassification")
    assert heard(adapt(model.bert), "head for its task") == []


def test_a_pretrained_head_of_the_model_itself_is_adapted():
    config = transformers.BertConfig(**TEXT)
    model = transformers.BertForMaskedLM(config)
    assert heard(adapt(model), "head for its task") == []
    assert "cls.predictions.transform.dense" in qk.adapted_layers(model)


class Classifier(nn.Module):
    """A user's own head on a pretrained model."""

    def __init__(self):
        super().__init__()
        self.body = transformers.BertModel(transformers.BertConfig(**TEXT))
        self.norm, self.classifier = nn.LayerNorm(16), nn.Linear(16, 2)


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = made("BertForSequenceClassification")


@pytest.mark.parametrize(
    ("make", "head"), [(Classifier, "classifier"), (Siamese, "tower.classifier")]
)
def test_a_head_in_a_model_of_ones_own(make, head):
    model = make()
    (said,) = heard(adapt(model), "head for its task")
    assert f"trainable=['{head}']" in said
    assert head not in qk.adapted_layers(model)
    assert len(qk.adapted_layers(model)) > 5


# --- weights passed over


def moe(kind):
    config = getattr(transformers, f"{kind}Config")(
        num_local_experts=4, num_key_value_heads=1, head_dim=8, **TEXT
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_that_are_no_linear_layers_are_named(kind):
    """Of a Mixtral 82 % were passed over without a word."""
    (said,) = heard(adapt(moe(kind)), "passed over")
    assert f"{kind}Experts (model.layers.0.mlp.experts)" in said
    share = float(said.split("over ")[1].split("%")[0]) / 100
    model = moe(kind)
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "emb" not in n}
    sizes.pop("lm_head.weight")
    experts = sum(size for n, size in sizes.items() if "proj" not in n or "experts" in n)
    assert share == pytest.approx(experts / sum(sizes.values()), abs=0.01)


def test_attention_that_reads_its_weights_is_named():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2), "b": nn.Linear(16, 16)})
    (said,) = heard(adapt(model), "passed over")
    assert "80%" in said
    assert "MultiheadAttention (a)" in said


@pytest.mark.parametrize("make", [lambda: moe("Mixtral"), Classifier])
def test_nothing_is_said_where_the_user_chose(make):
    model = make()
    targets = ["q_proj"] if hasattr(model, "lm_head") else ["query"]
    assert heard(adapt(model, targets), "passed over") == []


def test_ordinary_models_have_nothing_passed_over():
    for name in ("BertForSequenceClassification", "LlamaForSequenceClassification"):
        assert heard(adapt(made(name)), "passed over") == []
