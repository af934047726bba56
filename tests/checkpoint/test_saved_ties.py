"""Weights that models share between modules, besides the head: they are saved once, and are one again when loaded."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from torch_int4 import patch

IDS = torch.arange(3, 12)[None]
SIZES = {
    "vocab_size": 99,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}


@pytest.mark.oldest
@pytest.mark.parametrize("head", ["int8", "float"])
@pytest.mark.parametrize("model_type", ["bart", "marian", "mbart"])
def test_embeddings_of_encoder_and_decoder_stay_one(model_type, head, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, **SIZES)).eval()
    patched = patch(model, head=head)
    patched.save_pretrained(tmp_path)
    loaded = type(patched).from_pretrained(tmp_path).eval()
    tables = [loaded.model.shared, loaded.model.encoder.embed_tokens, loaded.model.decoder.embed_tokens]
    assert len({table.weight.data_ptr() for table in tables}) == 1
    with torch.no_grad():
        want = patched(input_ids=IDS, decoder_input_ids=IDS).logits
        assert torch.equal(loaded(input_ids=IDS, decoder_input_ids=IDS).logits, want)
    loaded.tie_weights()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS, decoder_input_ids=IDS).logits, want)
