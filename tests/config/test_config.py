import dataclasses

import pytest

from torch_int4 import Int4Config, Int4Error
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
        assert any(hasattr(stage, function) for function in ("quantize", "quantize_block", "transform"))


@pytest.mark.parametrize("name", ["nonesuch", "_grid", "", "os"])
def test_an_unknown_recipe_lists_those_that_exist(name):
    with pytest.raises(Int4Error, match="rtn"):
        get(name)
