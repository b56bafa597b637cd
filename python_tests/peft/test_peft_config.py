"""Configs: PEFT's names, refusals when they are made, and what stands in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

import qrlora_kernels.peft as qkp

KINDS = (qkp.QRLoraConfig, qkp.LoraXSConfig, qkp.OHoraConfig)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_config_back_and_names_its_format(kind: Any, tmp_path: Path) -> None:
    made = kind(target_modules=["query"], r=4, alpha=2.0, cache=str(tmp_path), bias="all")
    made.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert text["file_format"] == 1
    assert text["peft_type"] == made.kind.value
    assert not {"cache", "progress", "distributed"} & set(text)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is kind
    assert (again.r, again.alpha, again.target_modules, again.bias) == (4, 2.0, {"query"}, "all")


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_format_is_refused(kind: Any, tmp_path: Path) -> None:
    kind().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"file_format": 2}))
    with pytest.raises(ValueError, match=r"file format 2.*reads up to 1: install a newer release"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (qkp.QRLoraConfig, {"r": 4, "tau": 0.5}, "r and tau exclude each other"),
        (
            qkp.QRLoraConfig,
            {"tau": 0.5, "rank_pattern": {"x": 0}},
            "x'] must be a positive integer",
        ),
        (qkp.QRLoraConfig, {"rank_rule": "best"}, "rank_rule must be one of"),
        (qkp.LoraXSConfig, {"r": 0}, "r must be a positive integer, got 0"),
        (qkp.LoraXSConfig, {"basis": "pca"}, "basis must be one of"),
        (qkp.LoraXSConfig, {"init_std": -1.0}, "init_std must be at least 0"),
        (qkp.OHoraConfig, {"columns": "all"}, "columns must be one of"),
        (qkp.OHoraConfig, {"product": "lora", "start": "kaiming"}, "product='lora' needs start"),
        (qkp.OHoraConfig, {"alpha": 0.0}, "alpha must not be 0"),
        (qkp.OHoraConfig, {"alpha_pattern": {"x": float("inf")}}, "x'] must be finite"),
        (qkp.OHoraConfig, {"rank_pattern": {"(": 4}}, "rank_pattern must have regular expressions"),
        (qkp.QRLoraConfig, {"dropout": 1.0}, "dropout must be in"),
        (qkp.QRLoraConfig, {"bias": "some"}, "bias must be 'none', 'all' or '…_only'"),
        (
            qkp.QRLoraConfig,
            {"target_modules": "q", "layers_to_transform": 1},
            "`layers_to_transform` cannot be used when `target_modules` is a str",
        ),
        (
            qkp.QRLoraConfig,
            {"target_modules": ["q"], "layers_pattern": "h"},
            "`layers_to_transform` must also be specified",
        ),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_when_it_is_given(kind: Any, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": "8"}, "r must be an int"),
        ({"save_factors": 1}, "save_factors must be a bool"),
        ({"rank_pattern": ["q"]}, "rank_pattern must be a dict"),
        ({"alpha_pattern": 8.0}, "alpha_pattern must be a dict"),
        ({"rank_pattern": {"q": "8"}}, r"rank_pattern\['q'\] must be an int, got str"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused(options: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        qkp.LoraXSConfig(**options)


def test_types_are_entered_once_and_a_foreign_entry_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        assert PEFT_TYPE_TO_CONFIG_MAPPING[kind.kind.value] is kind
    qkp._register()  # a second import
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "QK_QRLORA", peft.LoraConfig)
    with pytest.raises(ImportError, match="QK_QRLORA is taken"):
        qkp._register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["QK_QRLORA"] is peft.LoraConfig


def test_prefixes_hold_no_name_that_one_gives_an_adapter() -> None:
    likely = ("default", "qr", "lora", "xs", "ohora", "adapter", "base", "task", "train", "one")
    for kind in KINDS:
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[kind.kind]
        assert not [name for name in likely if name in prefix]
