import pytest
import torch
from oracle import random_weight

from torch_int4 import Int4Error, formats
from torch_int4.formats import Settings

FORM = formats.get("compressed_tensors")


def config(bits=4, group=32, symmetric=True, **fields):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group}
    weights |= fields.pop("weights", {})
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **fields,
    }


def words(values, bits):
    """Row by row, value by value: value i takes bits i*bits and up of the row's words."""
    out = []
    for row in values.tolist():
        total = sum(int(value) << (bits * i) for i, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        unsigned = [total >> (32 * w) & 0xFFFFFFFF for w in range(count)]
        out.append([word - (1 << 32) if word >> 31 else word for word in unsigned])
    return torch.tensor(out, dtype=torch.int32)


def encode(weight):
    """The tensors of a linear, built from the documentation."""
    tensors = {
        "weight_packed": words(weight.codes, weight.bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = words(weight.zeros.t(), weight.bits).t().contiguous()
    return tensors


def read(tensors, settings=None, shape=(21, 72), name="model.layers.3.q_proj"):
    return FORM.read(tensors, settings or FORM.settings(config()), shape=shape, name=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "integer"])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 32), (21, 72), (8, 64), (5, 7)])
def test_reads_what_the_documentation_describes(rows, inputs, kind, bits, dtype):
    weight = random_weight(rows, inputs, 32, kind, bits=bits, scale_dtype=dtype)
    settings = FORM.settings(config(bits, symmetric=kind == "symmetric"))
    got = read(encode(weight), settings, (rows, inputs))
    assert torch.equal(got.codes, weight.codes)
    assert torch.equal(got.dequantize(), weight.dequantize())


def test_per_channel_per_tensor_and_old_zero_points():
    weight = random_weight(6, 40, -1, "integer")
    tensors = encode(weight)
    channel = {"strategy": "channel", "group_size": None, "symmetric": False}
    settings = FORM.settings(config(weights=channel))
    want = weight.dequantize()
    assert torch.equal(read(tensors, settings, (6, 40)).dequantize(), want)
    tensors["weight_zero_point"] = (weight.zeros.int() - 8).to(torch.int8)
    assert torch.equal(read(tensors, settings, (6, 40)).dequantize(), want)

    weight = random_weight(6, 40, -1)
    weight.scales[:] = weight.scales[0]
    tensors = encode(weight) | {"weight_scale": weight.scales[0]}
    settings = FORM.settings(config(weights={"strategy": "tensor", "group_size": None}))
    assert torch.equal(read(tensors, settings, (6, 40)).dequantize(), weight.dequantize())


def test_the_order_of_old_files_becomes_a_permutation():
    weight = random_weight(4, 96, 32)
    index = torch.randperm(96) // 32
    perm = index.argsort(stable=True)
    got = read(encode(weight) | {"weight_g_idx": index.int()}, shape=(4, 96))
    want = weight.codes.double() - 8
    want *= weight.scales.double()[:, index]
    assert torch.equal(got.dequantize().double(), want)
    assert torch.equal(got.perm, perm)
    unordered = read(encode(weight) | {"weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}, shape=(4, 96))
    assert unordered.perm is None


def test_mixed_bits_are_read_off_the_shapes():
    eight = {"targets": ["lm_head"], "weights": config(8, 128)["config_groups"]["group_0"]["weights"]}
    mixed = config()
    mixed["config_groups"]["group_1"] = eight
    settings = FORM.settings(mixed)
    assert (settings.bits, settings.group_size, settings.mixed, settings.skip) == (4, 32, True, ("lm_head",))
    for bits, group, kind in ((4, 32, "symmetric"), (8, 128, "symmetric"), (8, -1, "integer")):
        weight = random_weight(16, 256, group, kind, bits=bits)
        got = read(encode(weight), settings, (16, 256))
        assert (got.bits, got.group_size) == (bits, group)
        assert torch.equal(got.dequantize(), weight.dequantize())


def test_describe_lists_the_exceptions_by_name():
    written = {"a": Settings(4, 32), "b": Settings(4, 32), "lm_head": Settings(8, -1)}
    described = FORM.describe(written, ["c"])
    groups = described["config_groups"]
    assert [g["targets"] for g in groups.values()] == [["Linear"], ["lm_head"]]
    assert [g["weights"]["num_bits"] for g in groups.values()] == [4, 8]
    assert described["ignore"] == ["c"]
    assert FORM.settings(described).mixed


REFUSED = {
    "num_bits: 3": config(3),
    "num_bits: True": config(True),
    "num_bits: 4.0": config(4.0),
    "type: 'float'": config(weights={"type": "float"}),
    "strategy: 'block'": config(weights={"strategy": "block"}),
    "group_size: 0": config(group=0),
    "group_size: None": config(group=None),
    "group_size: '32'": config(group="32"),
    "symmetric: 'yes'": config(symmetric="yes"),
    "dynamic: True": config(weights={"dynamic": True}),
    "config_groups: must be": config(config_groups={}),
    "config_groups.x.weights: must be": config(config_groups={"x": {"targets": ["Linear"]}}),
    "format: 'marlin-24'": config(format="marlin-24"),
    "kv_cache_scheme": config(kv_cache_scheme={"num_bits": 8}),
    "sparsity_config": config(sparsity_config={"format": "sparse-24-bitmask"}),
    "transform_config": config(transform_config={"config_groups": {"R1": {}}}),
    "ignore: must be a list": config(ignore=[3]),
}


@pytest.mark.parametrize("field", REFUSED)
def test_settings_that_cannot_be_served_name_the_field(field):
    with pytest.raises(Int4Error, match="quantization_config") as caught:
        FORM.settings(REFUSED[field])
    assert field in str(caught.value)


def test_quantized_activations_are_refused():
    bad = config()
    bad["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(Int4Error, match=r"config_groups\.group_0\.input_activations"):
        FORM.settings(bad)


def broken():
    """{message: changes to the tensors of a good 21 x 72 linear}."""
    good = encode(random_weight(21, 72, 32, "integer"))
    scale = good["weight_scale"]
    nan = scale.clone()
    nan[20, 2] = float("nan")
    return {
        "weight_packed: is missing": {"weight_packed": None},
        "weight_packed: must be int32, got int64": {"weight_packed": good["weight_packed"].long()},
        "weight_packed: must have shape [21, 9], got [21, 8]": {"weight_packed": good["weight_packed"][:, :-1]},
        "weight_packed: must have shape [21, 9], got [20, 9]": {"weight_packed": good["weight_packed"][1:]},
        "weight_packed: has no values": {"weight_packed": good["weight_packed"].to("meta")},
        "weight_shape: says [72, 21]": {"weight_shape": torch.tensor([72, 21])},
        "weight_shape: must have shape [2]": {"weight_shape": torch.tensor([21, 72, 1])},
        "weight_scale: holds NaN": {"weight_scale": nan},
        "weight_scale: must be float16 or bfloat16 or float32": {"weight_scale": scale.double()},
        "has 2 groups of scales, but 72 inputs in groups of 32 make 3": {"weight_scale": scale[:, 1:]},
        "weight_scale: must have shape [21, groups]": {"weight_scale": scale[1:]},
        "weight_zero_point: is missing": {"weight_zero_point": None},
        "weight_zero_point: must have shape [3, 3]": {"weight_zero_point": good["weight_zero_point"][1:]},
        "weight_zero_point: must be int32 or int8": {"weight_zero_point": good["weight_zero_point"].float()},
        "weight_zero_point: holds values outside": {"weight_zero_point": torch.full((21, 3), 8, dtype=torch.int8)},
        "group index holds 3, and there are 3": {"weight_g_idx": torch.full((72,), 3, dtype=torch.int32)},
        "group index holds -2": {"weight_g_idx": torch.arange(72, dtype=torch.int32) // 32 - 2},
        "does not hold 32 inputs per group": {"weight_g_idx": torch.zeros(72, dtype=torch.int32)},
        "group index must have shape [72]": {"weight_g_idx": torch.zeros(71, dtype=torch.int32)},
    }


@pytest.mark.parametrize("message", broken())
def test_broken_tensors_are_named(message):
    tensors = encode(random_weight(21, 72, 32, "integer")) | broken()[message]
    tensors = {suffix: tensor for suffix, tensor in tensors.items() if tensor is not None}
    with pytest.raises(Int4Error) as caught:
        read(tensors, FORM.settings(config(symmetric=False)))
    assert str(caught.value).startswith("model.layers.3.q_proj")
    assert message in str(caught.value)


def test_missing_tensors_are_found_in_the_list_of_keys():
    settings = FORM.settings(config(symmetric=False))
    keys = ["a.q.weight_packed", "a.q.weight_scale", "a.q.weight_shape", "a.norm.weight"]
    with pytest.raises(Int4Error, match=r"a\.q\.weight_zero_point: is missing in the checkpoint"):
        FORM.linears(keys, settings)
    with pytest.raises(Int4Error, match=r"a\.q\.weight_packed: is missing in the checkpoint"):
        FORM.linears(keys[1:], settings)
    assert FORM.linears(keys[3:], settings) == {}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"kind": "float"}, "float offsets"), ({"codebook": "fp4"}, "code book"), ({}, "full groups")],
)
def test_refusals_to_write_give_the_reason(fields, reason):
    with pytest.raises(Int4Error, match=f"m: .*{reason}"):
        FORM.write(random_weight(4, 72, 32, **fields), Settings(), name="m")


def test_a_permutation_is_not_written():
    weight = random_weight(4, 64, 32)
    weight.perm = torch.randperm(64)
    with pytest.raises(Int4Error, match="permutation"):
        FORM.write(weight, Settings(), name="m")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_the_library_and_we_agree_both_ways(bits, symmetric, group):
    """Theirs compresses, we read; we write, theirs decompresses; and their live module converts."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, group_size=group, strategy="group" if group else "channel"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(24, 96, generator=generator)
    groups = 96 // group if group else 1
    scale = torch.rand(24, groups, generator=generator) * 0.1 + 0.1
    zero = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, groups), generator=generator).to(torch.int8)
    state = {"weight": dense, "weight_scale": scale} | ({} if symmetric else {"weight_zero_point": zero})
    theirs = compressor.compress(dict(state), scheme)
    settings = FORM.settings(config(weights=args.model_dump(mode="json")))
    weight = read(theirs, settings, (24, 96))
    want = compressor.decompress(dict(theirs), scheme)["weight"]
    assert torch.equal(weight.dequantize(), want)
    ours = FORM.write(weight, settings, name="m")
    assert {key: value.dtype for key, value in ours.items()} == {key: theirs[key].dtype for key in ours}
    assert torch.equal(compressor.decompress(dict(ours), scheme)["weight"], want)

    module = torch.nn.Linear(96, 24)
    del module.weight
    for key, value in theirs.items():
        module.register_parameter(key, torch.nn.Parameter(value, requires_grad=False))
    module.quantization_scheme = scheme
    converted = formats.convert_module(module, name="m")
    assert torch.equal(converted.dequantize(), want)
