"""The same as another implementation: golden/make_golden.py had `transformers` make logits and transformers.json."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from load_weights import hugging_face_args, load_model
from model import KVCache
from support.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
LOGITS = load_file(GOLDEN / "logits.safetensors")
TRANSFORMERS = json.loads((GOLDEN / "transformers.json").read_text(encoding="utf-8"))
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


@pytest.mark.parametrize("changes, expected", TRANSFORMERS["ropes"])
def test_rotary_frequencies_are_those_of_transformers(changes, expected, tmp_path):
    """Of the two spellings one counts, whole; the original context at the top level counts before the inner one."""
    config = json.loads((GOLDEN / "hf-llama3" / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = hugging_face_args(tmp_path / "config.json")
    factors = args.freq_factors or [1.0] * 4
    found = [args.rope_theta ** (-i / 4) / factor for i, factor in enumerate(factors)]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("own, generation, expected", TRANSFORMERS["ends"])
def test_ends_of_text_are_those_of_transformers(own, generation, expected, tmp_path):
    """generation_config.json counts before config.json; the tokenizer's own end of text, 2, counts in addition."""
    folder = shutil.copytree(GOLDEN / "hf-gqa", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | dict(eos_token_id=own)
    (folder / "config.json").write_text(json.dumps(config))
    if generation != "none":
        (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=generation)))
    assert load_tokenizer(folder).eos_ids == {*expected, 2}


@pytest.mark.parametrize("spaces, config, expected", TRANSFORMERS["ids"])
def test_a_folder_with_both_tokenizers_gives_the_ids_of_transformers(spaces, config, expected, tmp_path, monkeypatch):
    """
    Whatever tokenizer.json says of spaces; for LlamaTokenizer, whose ids are tokenizer.model's, without the package
    tokenizers too. But transformers 5 loses a space at the beginning of a text, which sentencepiece does not.
    """
    folder, is_llama = tmp_path / "m", "Llama" in config.get("tokenizer_class", "")
    shutil.copytree(GOLDEN / "hf-gqa", folder)
    parts = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(parts | spaces))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if is_llama:
        monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    else:
        pytest.importorskip("tokenizers", reason="tokenizer.json needs the package tokenizers")
    tokenizer = load_tokenizer(folder)
    for text, ids in zip(TRANSFORMERS["texts"], expected):
        assert tokenizer.encode(text) == ids or is_llama and text.startswith(" ")
