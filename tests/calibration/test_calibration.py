import warnings

import pytest
import torch
from decoders import decoder

from torch_int4 import Int4Error
from torch_int4.calibration.data import Calibration


class Words:
    """A tokenizer: one id per word, its length."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [min(len(word), 90) for word in text.split()]}


class Rows:
    """What a datasets `Dataset` looks like."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


TEXTS = [" ".join("x" * (1 + (i * j) % 17) for j in range(30)) for i in range(20)]
IDS = torch.arange(600).remainder(90)
LOADER = torch.utils.data.DataLoader(
    [{"input_ids": IDS[i : i + 20], "attention_mask": (torch.arange(20) < 15).long()} for i in range(0, 600, 20)],
    batch_size=4,
)
FORMS = {
    "texts": TEXTS,
    "text": " ".join(TEXTS),
    "dataset of texts": Rows([{"text": text, "label": 1} for text in TEXTS]),
    "dataset of ids": Rows([{"input_ids": IDS[i : i + 50].tolist()} for i in range(0, 600, 50)]),
    "generator": (text for text in TEXTS),
    "tokens": IDS,
    "rows of tokens": IDS.view(20, 30),
    "int32": IDS.int(),
    "list of tokens": IDS.tolist(),
    "list of lists": IDS.view(20, 30).tolist(),
    "loader": LOADER,
    "loader of tensors": torch.utils.data.DataLoader(IDS.view(20, 30), batch_size=3),
    "batch": {"input_ids": IDS.view(20, 30)},
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_become_windows_of_ids(form):
    windows = Calibration(FORMS[form], Words(), samples=4, length=32).windows(decoder("llama"))
    assert windows.shape == (4, 32)
    assert windows.dtype == torch.int64
    assert windows.min() >= 0
    assert windows.max() < 99


def test_padding_is_left_out():
    windows = Calibration(LOADER, samples=100, length=15).windows()
    assert torch.equal(windows, IDS.view(-1, 20)[:, :15])


def test_the_seed_chooses_and_repeats():
    def get(seed):
        return Calibration(TEXTS, Words(), samples=3, length=16, seed=seed).windows()

    assert torch.equal(get(1), get(1))
    assert not torch.equal(get(1), get(2))


def test_windows_come_from_all_over_the_data():
    starts = Calibration(torch.arange(100_000), samples=8, length=16).windows()[:, 0]
    assert starts.max() - starts.min() > 30_000
    assert (starts.diff() > 0).all()
    assert (starts % 16 == 0).all()


def test_a_long_text_is_not_tokenized_whole():
    class Counting(Words):
        seen = 0

        def __call__(self, text, verbose=True):
            Counting.seen += len(text)
            return super().__call__(text)

    text = "ab cd " * 200_000
    Calibration(text, Counting(), samples=2, length=8).windows()
    assert Counting.seen < len(text) / 10


def test_little_data_gives_fewer_or_shorter_windows():
    assert Calibration(IDS[:70], samples=8, length=32).windows().shape == (2, 32)
    assert Calibration(IDS[:9], samples=8, length=32).windows().shape == (1, 9)


def test_windows_fit_the_models_context():
    model = decoder("llama")
    assert Calibration(IDS, samples=1, length=4096).windows(model).shape == (1, 512)


def test_without_data_a_built_in_text_is_used_and_said_so():
    with pytest.warns(UserWarning, match="built-in text"):
        windows = Calibration(None, Words(), samples=16, length=128).windows()
    assert windows.shape == (16, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Calibration(TEXTS, Words(), samples=2, length=8).windows()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TEXTS, "need a tokenizer"),
        ([], "fewer than two tokens"),
        ("", "fewer than two tokens"),
        (torch.zeros(3, 4), "whole numbers"),
        (torch.ones(3, dtype=torch.bool), "whole numbers"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"got torch\.int64 \[2, 3, 4\]"),
        (Rows([{"label": 3}]), "rows have columns label"),
        (17, "cannot read a int"),
        ([17.5], "cannot read a row of type float"),
        (torch.tensor([5, 700]), "token ids reach from 5 to 700, the model knows 0 to 98"),
        (torch.tensor([5, -1]), "from -1 to 5"),
    ],
)
def test_what_cannot_be_used_is_refused(data, words):
    with pytest.raises(Int4Error, match=words):
        Calibration(data).windows(decoder("llama"))


@pytest.mark.parametrize("field", ["samples", "length", "batch"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
def test_sizes_are_checked(field, value):
    with pytest.raises(Int4Error, match=f"Calibration.{field} must be"):
        Calibration(IDS, **{field: value})


def test_a_tokenizer_given_to_patch_is_filled_in():
    tokenizer = Words()
    assert Calibration.of(Calibration(TEXTS, seed=5), tokenizer).tokenizer is tokenizer
    assert Calibration.of(Calibration(TEXTS, seed=5), tokenizer).seed == 5
    assert Calibration.of(TEXTS, tokenizer).data is TEXTS
