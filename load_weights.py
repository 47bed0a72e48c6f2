"""
Any LLaMA checkpoint on disk -> model.Transformer and its tokenizer.

    python load_weights.py PATH                what is in it
    python load_weights.py PATH --out FOLDER   rewrite it as one safetensors file in Meta's names, which opens uncopied

Three layouts are read: Meta's (params.json, consolidated.*.pth), Hugging Face's (config.json, safetensors or
pytorch_model*.bin) and GGUF. Files are mapped, and a tensor is copied only where it must change (rotary permutation,
another dtype, merging of shards, dequantisation), one tensor after the other.

References:
1) how Meta splits its checkpoints: https://github.com/meta-llama/llama/blob/main/llama/model.py
2) Hugging Face's permutation of wq and wk:
   https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/convert_llama_weights_to_hf.py
3) the GGUF format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file

import common
from common import LoadError
from model import ModelArgs, Transformer
from tokenizer import SentencePieceTokenizer, load_errors, load_tokenizer, open_gguf


def load_model(path, device="cpu", dtype=None):
    """
    The Transformer in a checkpoint, a folder or a file in it: in eval mode, without gradients. dtype, a torch.dtype or
    its name, defaults to the one that the embedding is stored in, and to bfloat16 for GGUF. Raises LoadError.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    args, names, read = read_checkpoint(path)
    model = empty_model(args)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in names:
            raise LoadError(f"{path}: tensor {name} is missing, of shape {shape}")
    for name in sorted(names):
        if name not in expected:
            raise LoadError(f"{path}: tensor {name} belongs to no LLaMA of {args.n_layers} layers")
    weights = {}
    for name, shape in expected.items():
        with load_errors(path):
            tensor = read(name, dtype)
            check_tensor(path, name, tensor, shape)
            dtype = dtype or tensor.dtype  # of the embedding, which comes first
            weights[name] = tensor.to(device, dtype)  # the mapped tensor itself, where nothing about it changes
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def empty_model(args):
    """A Transformer on the meta device. It is not initialised: random numbers there load 70 MB of PyTorch's Python."""
    with torch.device("meta"), patch.object(nn.Linear, "reset_parameters"):
        with patch.object(nn.Embedding, "reset_parameters"):
            return Transformer(args)


def check_tensor(file, name, tensor, shape):
    """Raise LoadError unless the tensor has this shape and is floating point of at least 16 bits."""
    if tensor.shape != shape:
        raise LoadError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise LoadError(f"{file}: tensor {name} is in {tensor.dtype}: quantised weights are not supported")


def read_checkpoint(path):
    """
    (args, names, read) of the checkpoint at path, whatever its layout, without reading a weight. args: its ModelArgs;
    names: Meta's names of its tensors; read(name, dtype): one of the tensors, mapped and in the dtype that it is stored
    in or, where it must be copied anyway, in dtype (None: its own; for GGUF bfloat16). Raises LoadError, as read does.
    """
    path = Path(path)
    if not path.exists():
        raise LoadError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        return read_gguf(path)
    folder = path if path.is_dir() else path.parent
    if (folder / "params.json").exists():
        return read_meta(folder)
    if (folder / "config.json").exists():
        return read_hugging_face(folder)
    for file in sorted(folder.glob("*.gguf")):
        raise LoadError(f"{folder}: give the path of the GGUF file in it, such as {file}")
    expected = "params.json (Meta's layout), config.json (Hugging Face's) or a .gguf file"
    raise LoadError(f"{folder}: no checkpoint: expected {expected}")


def read_meta(folder):
    """Meta's layout, and our own: params.json with consolidated.*.pth, or with safetensors in Meta's names."""
    config = folder / "params.json"
    params = common.read_json(config)
    if params.get("use_scaled_rope"):
        raise LoadError(f"{config}: use_scaled_rope is not supported: plain rotary embeddings are")
    if params.get("moe") or "quantization_args" in params:
        raise LoadError(f"{config}: mixture of experts and quantised weights are not supported")
    sizes = {key: params[key] for key in ModelArgs.__dataclass_fields__ if params.get(key) is not None}
    with load_errors(config):
        args = ModelArgs(**sizes)
    files = sorted(folder.glob("consolidated.*.pth")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise LoadError(f"{folder}: no weights: expected consolidated.*.pth or model.safetensors beside params.json")
    shards = [read_tensors(file) for file in files]
    wq = shards[0].get("layers.0.attention.wq.weight")
    if wq is not None and wq.dim() == 2 and wq.size(0) * len(files) < args.n_heads * args.head_dim:
        n_files = args.n_heads * args.head_dim // wq.size(0)
        there = f"{len(files)} of {n_files} files consolidated.*.pth are there"
        raise LoadError(f"{folder}: {there}: the download is not complete")
    embedding = "tok_embeddings.weight"
    if sizes.get("vocab_size", -1) < 1 and embedding in shards[0]:  # -1 in LLaMA-2's: as many as the tokenizer has
        args.vocab_size = shards[0][embedding].size(0)
        if split_dim(embedding, shards[0], args) == 0:
            args.vocab_size *= len(shards)

    def read(name, dtype):
        for file, shard in zip(files, shards):
            if name not in shard:
                raise LoadError(f"{file}: tensor {name} is missing, and a file beside it has it")
        parts = [shard[name] for shard in shards]
        if len(parts) == 1 or parts[0].dim() == 1:  # each shard has all of a norm
            return parts[0]
        return torch.cat(parts, split_dim(name, shards[0], args))  # 2 x (4096, 5504) -> (4096, 11008)

    return args, set().union(*shards), read


def split_dim(name, shard, args):
    """The dimension in which Meta's model-parallel shards split a matrix; shard: {name: tensor} of one of them."""
    if name == "tok_embeddings.weight" and shard[name].size(1) < args.dim:
        return 1  # LLaMA-2 splits the embedding, (32000, 4096) -> (32000, 2048); LLaMA-3 splits the vocabulary
    return 1 if name.endswith(("wo.weight", "w2.weight")) else 0


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
    args = hugging_face_args(folder / "config.json")
    heads = {"attention.wq.weight": args.n_heads, "attention.wk.weight": args.n_kv_heads}
    tensors = {}
    for file in hugging_face_files(folder):
        for name, tensor in read_tensors(file).items():
            layer, rest = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*)", name).groups(default="")
            if rest not in HUGGING_FACE:
                raise LoadError(f"{file}: tensor {name} belongs to no LLaMA")
            rest = HUGGING_FACE[rest]
            if layer + rest in tensors:
                raise LoadError(f"{file}: tensor {name} is in another file beside it too: leave only one of the two")
            if rest in heads:
                check_tensor(file, name, tensor, (heads[rest] * args.head_dim, args.dim))
            tensors[layer + rest] = tensor
    if args.tie_word_embeddings:
        tensors.pop("output.weight", None)  # some files hold the one matrix twice

    def read(name, dtype):
        n_heads = heads.get(re.sub(r"layers\.\d+\.", "", name))
        if n_heads is None:
            return tensors[name]
        view = interleave(tensors[name], n_heads)
        copy = torch.empty(view.shape, dtype=dtype or view.dtype).copy_(view)  # permuted and converted at once
        return copy.flatten(0, 2)  # (9, 32, 2, 576) -> (576, 576)

    return args, tensors.keys(), read


def interleave(weight, n_heads):
    """
    wq or wk, (n_heads * head_dim, dim), from Hugging Face's order of rows within a head, (x0 x2 x4 ... x1 x3 x5 ...),
    to Meta's, (x0 x1 x2 ...), in which a rotary pair are neighbours; as a view (n_heads, head_dim / 2, 2, dim).
    """
    weight = weight.view(n_heads, 2, -1, weight.size(1))  # (576, 576) -> (9, 2, 32, 576)
    return weight.transpose(1, 2)  # (9, 32, 2, 576)


def hugging_face_args(file):
    """The ModelArgs that a config.json means. Raises LoadError for what is no LLaMA-2."""
    config = common.read_json(file)
    unsupported = []
    if config.get("model_type") != "llama":
        unsupported.append(f"model_type {config.get('model_type')!r}")
    for option in "attention_bias", "mlp_bias", "sliding_window", "quantization_config", "num_local_experts":
        if config.get(option):
            unsupported.append(option)
    if config.get("hidden_act", "silu") != "silu":
        unsupported.append(f"hidden_act {config['hidden_act']!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        unsupported.append(f"rope scaling {rope}")
    if unsupported:
        raise LoadError(f"{file}: {unsupported[0]} is not supported: this is a LLaMA-2 implementation")
    with load_errors(file):
        return ModelArgs(
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


def hugging_face_files(folder):
    """The weight files of a folder; where it has an index, those that the index names, each of which must be there."""
    for name, pattern in ("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin"):
        files, index = sorted(folder.glob(pattern)), folder / f"{name}.index.json"
        if index.exists():
            files = sorted({folder / file for file in common.read_json(index).get("weight_map", {}).values()})
        for file in files:
            if not file.exists():
                raise LoadError(f"{file}: no such file, and {index.name} names it: the download is not complete")
        if files:
            return files
    raise LoadError(f"{folder}: no weights: expected model*.safetensors or pytorch_model*.bin beside config.json")


def read_tensors(file):
    """{name: tensor mapped from the file} of a .safetensors, .pth or .bin file. Raises LoadError."""
    with load_errors(file, "cannot be read, it may be cut short or of another kind"):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        else:
            check_zip(file)
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensors, dict) or not all(torch.is_tensor(tensor) for tensor in tensors.values()):
        raise LoadError(f"{file}: not a dictionary of tensors")
    rotary = ("rope.freqs", "rotary_emb.inv_freq")  # tables that real files carry, and that model.py computes
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(rotary)}


def check_zip(file):
    """Raise LoadError unless it is a zip archive, as torch.save writes it, which is what torch.load can map."""
    with file.open("rb") as opened:
        head = opened.read(2)
    if head[:1] == b"\x80":  # a bare pickle
        raise LoadError(f"{file}: written in PyTorch's format of before 1.6, which cannot be mapped: rewrite it with "
                        "torch.save(torch.load(path, weights_only=True), path)")
    if head != b"PK":
        raise LoadError(f"{file}: not a PyTorch file (is it a download that failed, or a Git LFS pointer?)")


GGUF = {
    "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output",
    "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
}  # fmt: skip


def read_gguf(path):
    """A GGUF file, whose wq and wk are in Meta's order already."""
    reader, value = open_gguf(path)
    gguf = common.import_optional("gguf", path)
    args = gguf_args(path, value, {tensor.name: tensor.shape for tensor in reader.tensors})
    tensors = {}
    for tensor in reader.tensors:
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*)", tensor.name.removesuffix(".weight")).groups()
        if name == "rope_freqs":
            raise LoadError(f"{path}: tensor {tensor.name} scales the rotary embeddings, which is not supported")
        if name not in GGUF:
            raise LoadError(f"{path}: tensor {tensor.name} belongs to no LLaMA")
        prefix = f"layers.{layer}." if layer else ""
        tensors[f"{prefix}{GGUF[name]}.weight"] = tensor

    def read(name, dtype):
        """Dequantised by blocks of rows, so that little of it is in float32 at a time."""
        tensor = tensors[name]
        out = torch.empty(tensor.shape.tolist()[::-1], dtype=dtype or torch.bfloat16)  # GGUF names the last size first
        rows = out.view(-1, out.size(-1))  # a norm: (576,) -> (1, 576)
        stored = tensor.data.reshape(len(rows), -1)  # in Q4_1 (576, 360) bytes are a matrix (576, 576)
        n = max(1, 2**22 // out.size(-1))  # rows that are 16 MB in float32
        for start in range(0, len(rows), n):
            block = gguf.quants.dequantize(stored[start : start + n], tensor.tensor_type)
            rows[start : start + n] = torch.from_numpy(block)
        return out

    return args, tensors.keys(), read


def gguf_args(path, value, shapes):
    """The ModelArgs that a GGUF file's metadata and tensors' shapes mean. Raises LoadError for what is no LLaMA-2."""
    if value("general.architecture") != "llama":
        raise LoadError(f"{path}: architecture {value('general.architecture')!r} is not supported, only 'llama' is")
    for key, fine in ("llama.rope.scaling.type", "none"), ("llama.expert_count", 0), ("split.count", 1):
        if value(key, fine) not in (fine, 0):
            raise LoadError(f"{path}: {key} = {value(key)!r} is not supported")
    rotary = value("llama.rope.dimension_count")
    head_dim = value("llama.attention.key_length", rotary)
    if rotary not in (None, head_dim) or value("llama.attention.value_length", head_dim) != head_dim:
        raise LoadError(f"{path}: rotary embeddings over part of a head, or values of another size, are not supported")
    with load_errors(path, "its metadata makes no LLaMA"):
        return ModelArgs(
            dim=value("llama.embedding_length"),
            n_layers=value("llama.block_count"),
            n_heads=value("llama.attention.head_count"),
            n_kv_heads=value("llama.attention.head_count_kv"),
            vocab_size=value("llama.vocab_size") or int(shapes["token_embd.weight"][1]),
            hidden_dim=value("llama.feed_forward_length"),
            head_dim=head_dim,
            norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=value("llama.rope.freq_base", 10000.0),
            max_seq_len=value("llama.context_length"),
            tie_word_embeddings="output.weight" not in shapes,
        )


def describe(model, tokenizer):
    """Lines for people: sizes, and parameters per part, as in Table 1 of the paper."""
    args, dtype = model.args, model.tok_embeddings.weight.dtype
    total, sizes = common.nbytes(model), common.weight_bytes(model)

    def line(name, nbytes, note=""):
        return f"  {name:24}{nbytes / dtype.itemsize / 1e6:10.2f} M{note}"

    yield "  ".join(f"{key} {value}" for key, value in asdict(args).items())
    yield f"{total // dtype.itemsize:,} parameters in {str(dtype).removeprefix('torch.')}, {total / 1e9:.2f} GB"
    for name, weight in model.layers[0].named_parameters():
        if weight.dim() == 2:
            yield line(name, weight.nbytes, f" in each of {args.n_layers} layers")
    yield line("all attention", sizes["attention"])
    share = sizes["feed_forward"] / total
    yield line("all feed_forward", sizes["feed_forward"], f", {share:.0%} of all: what can be skipped")
    note = ", also the output head" if model.output is None else ""
    yield line("tok_embeddings.weight", common.nbytes(model.tok_embeddings), note)
    if model.output is not None:
        yield line("output.weight", sizes["head"])
    default = "LLaMA-2's" if isinstance(tokenizer, SentencePieceTokenizer) else "none"
    chat = "its own" if tokenizer.template else default
    ends = ", ".join(map(str, sorted(tokenizer.eos_ids)))
    yield f"tokenizer: {tokenizer.vocab_size} tokens, bos {tokenizer.bos_id}, end of text {ends}, chat template: {chat}"


def save(model, tokenizer, path, folder):
    """Write the model, opened from path, into a new folder: model.safetensors, params.json, the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.safetensors").exists():
        raise LoadError(f"{folder / 'model.safetensors'}: exists already, and is not overwritten")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")

    def write_json(name, value):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")

    write_json("params.json", asdict(model.args))
    # config.json, which may name more ends of text, is not copied
    write_json("generation_config.json", dict(eos_token_id=sorted(tokenizer.eos_ids)))
    if path.suffix != ".gguf":
        source = path if path.is_dir() else path.parent
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
    write_json("tokenizer_config.json", config)


def parse_args(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("path", nargs="?", help="a folder, or a .gguf file; default: the demo model")
    add("--out", metavar="FOLDER", help="write it there as one safetensors file in Meta's names")
    add("--dtype", choices=common.DTYPES, help="default: the checkpoint's; bfloat16 for GGUF")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_args(argv)
    path = Path(options.path) if options.path else common.demo_path()
    model, tokenizer = load_model(path, dtype=options.dtype), load_tokenizer(path)
    print(path, *describe(model, tokenizer), sep="\n")
    if options.out:
        save(model, tokenizer, path, Path(options.out))
        print(f"written to {options.out}")


if __name__ == "__main__":
    common.run_command(main)
