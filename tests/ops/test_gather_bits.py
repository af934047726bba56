"""Codes out of the blocks of files, against the same bit by bit in Python; runs that leave their block are refused."""

import pytest
import torch

OPERATOR = torch.ops.torch_int4.gather_bits


def gathered(blocks, runs, codes):
    result = torch.zeros(*blocks.shape[:2], codes, dtype=torch.uint8)
    for first, number, byte, shift, width, left in runs:
        bits = (blocks[..., byte : byte + number] >> shift) & ((1 << width) - 1)
        result[..., first : first + number] |= bits << left
    return result.flatten(1)


@pytest.mark.parametrize("rows", [1, 3, 700])
@pytest.mark.parametrize("number", [1, 7, 8, 9, 16, 31])
def test_bits_are_those_of_the_runs(rows, number):
    generator = torch.Generator().manual_seed(number)
    blocks = torch.randint(0, 256, (rows, 3, 41), dtype=torch.uint8, generator=generator)
    runs = [(0, number, 41 - number, 0, 4, 0), (0, number, 0, 7, 1, 4), (33 - number, number, 5, 3, 2, 6)]
    got = OPERATOR(blocks, [field for run in runs for field in run], 33)
    assert torch.equal(got, gathered(blocks, runs, 33))


def test_whole_bytes_are_copied():
    blocks = torch.full((2, 2, 9), 255, dtype=torch.uint8)
    assert torch.equal(OPERATOR(blocks, [0, 9, 0, 0, 8, 0], 9), blocks.flatten(1))
    assert torch.equal(OPERATOR(blocks, [], 4), torch.zeros(2, 8, dtype=torch.uint8))


BIG = 1 << 62
WRONG = {
    "before": (-1, 8, 0, 0, 4, 0),
    "behind": (1, 8, 0, 0, 4, 0),
    "none": (0, 0, 0, 0, 4, 0),
    "bytes": (0, 8, 3, 0, 4, 0),
    "before the bytes": (0, 8, -1, 0, 4, 0),
    "wraps": (BIG, BIG, 0, 0, 4, 0),
    "wraps in bytes": (0, BIG, BIG, 0, 4, 0),
    "shift": (0, 8, 0, 8, 1, 0),
    "width": (0, 8, 0, 5, 4, 0),
    "no width": (0, 8, 0, 0, 0, 0),
    "left": (0, 8, 0, 0, 4, 5),
    "negative": (0, 8, 0, -1, 4, 0),
}


@pytest.mark.parametrize("run", WRONG.values(), ids=WRONG)
def test_runs_outside_of_a_block_are_refused(run):
    with pytest.raises(RuntimeError, match=r"does not lie in blocks of 10 bytes and 8 codes"):
        OPERATOR(torch.zeros(1, 1, 10, dtype=torch.uint8), list(run), 8)


@pytest.mark.parametrize(
    ("blocks", "runs", "codes", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.uint8), [], 8, "blocks must be"),
        (torch.zeros(1, 2, 8, dtype=torch.int8), [], 8, "must be uint8"),
        (torch.zeros(1, 8, 2, dtype=torch.uint8).mT, [], 8, "must be contiguous"),
        (torch.zeros(1, 2, 8, dtype=torch.uint8), [0, 8], 8, "6 numbers"),
        (torch.zeros(1, 2, 8, dtype=torch.uint8), [], 0, "at least one code"),
        (torch.zeros(1, 2, 8, dtype=torch.uint8), [], BIG, "too large"),
    ],
)
def test_bad_arguments_are_named(blocks, runs, codes, message):
    with pytest.raises(RuntimeError, match=message):
        OPERATOR(blocks, runs, codes)


def test_pytorch_sees_a_well_formed_operator():
    torch.library.opcheck(OPERATOR.default, (torch.ones(2, 3, 4, dtype=torch.uint8), [0, 4, 0, 0, 4, 0], 4))
