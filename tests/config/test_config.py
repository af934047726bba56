import ast
import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest

import torch_int4.config as config_room
from torch_int4 import Int4Config, Int4Error
from torch_int4.config import OF_RUNNING, RunOptions, WeightOptions, weight_options
from torch_int4.config.text import parse_config, pattern_fields
from torch_int4.recipes import available, get


@pytest.mark.parametrize("size", [32, 64, 96, 128, 256, 384, 512, 640, 768, 896, 1024, -1])
def test_accepted_group_sizes(size):
    assert Int4Config(group_size=size).group_size == size


@pytest.mark.parametrize("size", [0, 1, 16, 31, 33, 160, 192, 1152, 2048, -2, -32, 32.0, "32", True, None])
def test_refused_group_sizes(size):
    with pytest.raises(Int4Error, match=r"group_size must be a multiple of 32"):
        Int4Config(group_size=size)


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("recipe", "nonesuch", "'rtn'"),
        ("zeros", "int", "'integer', 'float'"),
        ("compute", "fp16", "'int8', 'int8x2', 'bf16', 'fp32'"),
        ("head", "int2", "'float', 'int4', 'int8'"),
        ("head", None, "'float', 'int4', 'int8'"),
        ("embeddings", "int8", "'float', 'bf16'"),
        ("symmetric", 1, "True or False"),
        ("clip", "yes", "True or False"),
        ("skip", 3, "tuple of name patterns"),
        ("skip", ("a", 3), "tuple of name patterns"),
    ],
)
def test_a_wrong_value_names_the_field_and_what_is_accepted(field, value, accepted):
    with pytest.raises(Int4Error) as caught:
        Int4Config(**{field: value})
    assert f"Int4Config.{field}" in str(caught.value)
    assert accepted in str(caught.value)


def test_it_is_frozen_comparable_and_hashable():
    config = Int4Config(skip=["lm_head"])
    assert config == Int4Config(skip="lm_head") == Int4Config(skip=("lm_head",))
    assert len({config, Int4Config(skip="lm_head")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.group_size = 64


def test_overrides_change_only_what_they_name():
    base = Int4Config(group_size=128, symmetric=False)
    changed = Int4Config.with_overrides(base, zeros="float")
    assert (changed.group_size, changed.symmetric, changed.zeros) == (128, False, "float")
    assert base.zeros == "integer"
    assert Int4Config.with_overrides(None) == Int4Config()


def test_unknown_overrides_list_the_fields():
    with pytest.raises(Int4Error, match=r"groupsize.*group_size") as caught:
        Int4Config.with_overrides(None, groupsize=64)
    assert all(field.name in str(caught.value) for field in dataclasses.fields(Int4Config))


def test_overrides_are_checked_and_the_config_must_be_one():
    with pytest.raises(Int4Error, match="group_size"):
        Int4Config.with_overrides(None, group_size=5)
    with pytest.raises(Int4Error, match="dict"):
        Int4Config.with_overrides({"group_size": 32})


def test_every_recipe_is_found_by_its_file_name():
    assert "rtn" in available()
    for name in available():
        stage = get(name)
        assert any(hasattr(stage, function) for function in ("quantize", "round", "transform", "prepare", "after"))


@pytest.mark.parametrize("name", ["nonesuch", "_grid", "", "os"])
def test_an_unknown_recipe_lists_those_that_exist(name):
    with pytest.raises(Int4Error, match="rtn"):
        get(name)


# WeightOptions and RunOptions


def test_a_config_is_the_options_of_weights_and_of_running_in_the_order_in_which_users_know_them():
    names = [entry.name for entry in dataclasses.fields(Int4Config)]
    parts = [entry.name for part in (WeightOptions, RunOptions) for entry in dataclasses.fields(part)]
    assert names == parts
    assert names[:3] == ["recipe", "group_size", "symmetric"]
    config = Int4Config(recipe="gptq", group_size=64, kv_cache="int8", skip="lm_head")
    assert repr(config).startswith("Int4Config(recipe='gptq', group_size=64, symmetric=True, ")
    assert config.weights == WeightOptions(recipe="gptq", group_size=64)
    assert config.weights == dataclasses.replace(config, kv_cache="auto", head="float").weights
    assert config.weights != dataclasses.replace(config, clip=True).weights


def test_options_of_weights_hold_nothing_else_and_are_checked_alike():
    options = Int4Config(compute="fp32").weights
    assert type(options) is WeightOptions
    assert not hasattr(options, "compute")
    for wrong in ({"group_size": 5}, {"recipe": "nonesuch"}, {"recipe": ["rtn"]}, {"recipe": "hqq"}, {"preset": "no"}):
        with pytest.raises(Int4Error) as caught:
            WeightOptions(**wrong)
        with pytest.raises(Int4Error, match=re.escape(str(caught.value))):
            Int4Config(**wrong)


def test_fields_that_files_decide_cannot_be_chosen_when_they_are_read():
    running = {entry.name for entry in dataclasses.fields(RunOptions)}
    assert set(OF_RUNNING) == running - {"int8"}
    assert not running & {entry.name for entry in dataclasses.fields(WeightOptions)}


def test_copies_and_pickles_are_equal():
    config = Int4Config(recipe="awq+gptq", int8="*.down_proj", kv_cache="int8")
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), Int4Config.from_dict(config.to_dict())):
        assert other == config
        assert hash(other) == hash(config)
    assert json.loads(config.to_json_string()) == config.to_dict()


def test_configs_of_earlier_versions_are_read():
    block = json.loads(
        '{"quant_method": "torch_int4", "recipe": "awq+gptq", "group_size": 128, "symmetric": false, "zeros": "float", '
        '"clip": true, "preset": "best", "compute": "bf16", "head": "int4", "attention": "stock", "kv_cache": "int8", '
        '"embeddings": "bf16", "int8": ["*.o_proj"], "skip": ["lm_head", "*.gate"]}'
    )
    assert Int4Config.from_dict(block).to_dict() == block


def test_no_config_is_made_before_its_recipe_can_be_checked(monkeypatch):
    monkeypatch.setattr(weight_options, "_recipe_checks", [])
    with pytest.raises(Int4Error, match=r"torch_int4\.recipes"):
        Int4Config()


@pytest.mark.parametrize("room", sorted(path.stem for path in Path(config_room.__file__).parent.glob("*.py")))
def test_the_room_imports_nothing_of_the_package_but_errors(room):
    source = (Path(config_room.__file__).parent / f"{room}.py").read_text()
    found = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in found if name and name.startswith("torch_int4")}
    assert all(name.startswith("torch_int4.config") or name == "torch_int4.errors" for name in ours), ours


# As one line of text


def test_text_and_its_fields():
    got = parse_config("recipe=awq+gptq,group_size=128, symmetric=False,skip=*.down_proj;lm_head,int8=a")
    assert got == Int4Config(
        recipe="awq+gptq", group_size=128, symmetric=False, skip=("*.down_proj", "lm_head"), int8=("a",)
    )
    assert pattern_fields() == {"int8", "skip"}
    with pytest.raises(Int4Error, match="given twice"):
        parse_config("clip=True,clip=False")
