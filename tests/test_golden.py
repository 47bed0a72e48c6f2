"""The same logits as another implementation: golden/make_golden.py had `transformers` compute logits.safetensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from load_weights import load_model
from model import KVCache

GOLDEN = Path(__file__).parent / "golden"
LOGITS = load_file(GOLDEN / "logits.safetensors")
LAYOUTS = {  # folder or file -> whose logits it must give
    "hf-gqa": "gqa", "hf-mha": "mha", "hf-mqa": "mqa", "hf-tied": "tied", "hf-theta": "theta",
    "meta-gqa": "gqa", "meta-mha": "mha", "gqa-f16.gguf": "gqa", "gqa-q8_0.gguf": "gqa-q8_0", "hf-llama3": "llama3",
    "llama3-f16.gguf": "llama3",
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(layout):
    """Every layout, with grouped, multi-head and multi-query attention: to 1e-5 of the largest logit, in float32."""
    if layout.endswith(".gguf"):
        pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
    model = load_model(GOLDEN / layout, dtype=torch.float32)
    expected, n = LOGITS[LAYOUTS[layout]], LOGITS[LAYOUTS[layout]].size(1)  # of the last n tokens
    tokens = LOGITS.get(f"{LAYOUTS[layout]}_tokens", LOGITS["tokens"])
    assert (model(tokens)[:, -n:] - expected).abs().max() <= 1e-5 * expected.abs().max()
    cache = KVCache(model.args, *tokens.shape)
    one_by_one = torch.cat([model(column, cache) for column in tokens.split(1, dim=1)], dim=1)
    assert (one_by_one[:, -n:] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_runs_in_the_dtype_it_is_stored_in(layout):
    """A GGUF file in bfloat16, whatever its tensors are quantised to."""
    if layout.endswith(".gguf"):
        pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
    model = load_model(GOLDEN / layout)
    assert model.tok_embeddings.weight.dtype in (torch.bfloat16, torch.float16)
    assert model(LOGITS["tokens"]).dtype == torch.float32


def test_meta_and_hugging_face_layouts_hold_the_same_weights():
    """The rotary permutation, for n_kv_heads != n_heads too, and the merging of two shards: bit for bit."""
    for variant in "gqa", "mha":
        meta, hf = (load_model(GOLDEN / f"{layout}-{variant}").state_dict() for layout in ("meta", "hf"))
        assert meta.keys() == hf.keys() and all(torch.equal(meta[name], hf[name]) for name in meta)
