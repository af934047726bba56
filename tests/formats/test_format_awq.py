import pytest
import torch
from oracle import random_weight

from torch_int4 import Int4Error, formats
from torch_int4.formats import Settings

FORM = formats.get("awq")
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def config(**fields):
    return {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", **fields}


def pack(values):
    """[R, N] to int32 [R, N/8], nibble i of a word is the value of output ORDER[i]."""
    words = []
    for row in values.tolist():
        line = []
        for start in range(0, len(row), 8):
            word = sum(row[start + source] << (4 * place) for place, source in enumerate(ORDER))
            line.append(word - (1 << 32) if word >> 31 else word)
        words.append(line)
    return torch.tensor(words, dtype=torch.int32)


def encode(weight):
    zeros = weight.zeros if weight.zeros is not None else torch.full(weight.scales.shape, 8)
    return {"qweight": pack(weight.codes.t()), "qzeros": pack(zeros.t()), "scales": weight.scales.t().contiguous()}


def read(tensors, settings=None, shape=(24, 96)):
    return FORM.read(tensors, settings or FORM.settings(config()), shape=shape, name="m.q")


@pytest.mark.parametrize("kind", ["symmetric", "integer"])
@pytest.mark.parametrize(("rows", "inputs", "group"), [(24, 96, 32), (8, 64, -1), (40, 256, 128)])
def test_reads_what_the_documentation_describes(rows, inputs, group, kind):
    weight = random_weight(rows, inputs, group, kind)
    got = read(encode(weight), FORM.settings(config(group_size=group)), (rows, inputs))
    assert torch.equal(got.codes, weight.codes)
    assert torch.equal(got.dequantize(), weight.dequantize())
    written = FORM.write(weight, FORM.settings_for(weight), name="m")
    assert all(torch.equal(written[key], value) for key, value in encode(weight).items())


def test_old_names_of_settings():
    settings = FORM.settings({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"})
    assert (settings.group_size, settings.symmetric) == (64, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, "bits: 3"),
        ({"version": "gemv"}, "version: 'gemv'"),
        ({"version": "exllama"}, "version: 'exllama'"),
        ({"version": 3}, "version: 3"),
        ({"group_size": "all"}, "group_size: 'all'"),
        ({"modules_to_not_convert": "x"}, "modules_to_not_convert"),
    ],
)
def test_settings_that_cannot_be_served(fields, message):
    with pytest.raises(Int4Error, match=rf"quantization_config\.{message}"):
        FORM.settings(config(**fields))


def broken():
    good = encode(random_weight(24, 96, 32, "integer"))
    return {
        "m.q.qweight: must have shape [96, 3], got [3, 96]": {"qweight": good["qweight"].t().contiguous()},
        "m.q.qweight: must be int32": {"qweight": good["qweight"].long()},
        "m.q.qzeros: must have shape [3, 3]": {"qzeros": good["qzeros"][1:]},
        "m.q.qzeros: is missing": {"qzeros": None},
        "m.q.scales: holds NaN": {"scales": good["scales"] * float("nan")},
        "m.q.scales: has 1 groups": {"scales": good["scales"][:1]},
        "m.q.scales: must have shape": {"scales": good["scales"][0]},
    }


@pytest.mark.parametrize("message", broken())
def test_broken_tensors(message):
    tensors = encode(random_weight(24, 96, 32, "integer")) | broken()[message]
    with pytest.raises(Int4Error) as caught:
        read({key: value for key, value in tensors.items() if value is not None})
    assert str(caught.value).startswith(message)
    with pytest.raises(Int4Error, match=r"m\.q: has 20 outputs"):
        read(tensors, shape=(20, 96))


def test_what_is_not_written():
    ordered = random_weight(8, 64, 32)
    ordered.perm = torch.randperm(64)
    for weight, reason in (
        (ordered, "permutation"),
        (random_weight(8, 64, 32, bits=8), "8 bits"),
        (random_weight(12, 64, 32), "multiples of 8 outputs"),
        (random_weight(8, 72, 32), "of 32 inputs"),
    ):
        with pytest.raises(Int4Error, match=f"m: .*{reason}"):
            FORM.write(weight, Settings(), name="m")
    with pytest.raises(Int4Error, match="one group size"):
        FORM.describe({"a": Settings(4, 32), "b": Settings(4, 64)}, [])
