"""Model classes that initialise what a checkpoint lacks, some of them by the shape of a weight."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    Wav2Vec2Config,
    Wav2Vec2ForPreTraining,
)

from torch_int4 import Int4Config, patch


def siglip():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8))


def wav2vec2():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    convolutions = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    codes = {"codevector_dim": 32, "proj_codevector_dim": 32, "num_codevectors_per_group": 4}
    return Wav2Vec2ForPreTraining(Wav2Vec2Config(**sizes, **convolutions, **codes, num_conv_pos_embeddings=16))


def inputs(model):
    shape = (1, 3, 32, 32) if isinstance(model, SiglipVisionModel) else (1, 400)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [siglip, wav2vec2])
def test_loading_equals_patching(make, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "float")
    patched = patch(copy.deepcopy(model))
    patched.save_pretrained(tmp_path / "int4")
    x = inputs(model)
    with torch.no_grad():
        want = patched(x)[0]
        for folder, options in (("int4", {}), ("float", {"quantization_config": Int4Config()})):
            loaded = type(model).from_pretrained(tmp_path / folder, **options).eval()
            assert torch.equal(loaded(x)[0], want), folder


def test_auto_classes_load_them_too(tmp_path):
    patch(siglip()).save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), SiglipVisionModel)
