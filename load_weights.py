"""
A LLaMA checkpoint on disk -> model.Transformer and its tokenizer.

    python load_weights.py PATH                what is in it
    python load_weights.py PATH --out FOLDER   rewrite it as one safetensors file in Meta's names, which opens uncopied

Three layouts are read: Meta's (params.json, consolidated*.pth), Hugging Face's (config.json, safetensors or
pytorch_model*.bin) and GGUF, of LLaMA 1 to 3.3 and of Mistral without a sliding window. What stays refused: rope
scaling other than llama3's (linear, dynamic, yarn, longrope), sliding windows, mixture of experts, biases, GPTQ, AWQ,
bitsandbytes and fp8, and split GGUF files, which llama-gguf-split --merge makes one.

Where a folder holds several sets of weights, the first complete one is read, and standard error says which:
model.safetensors, model-*-of-*.safetensors, consolidated*.safetensors, pytorch_model.bin, pytorch_model-*-of-*.bin,
consolidated.*.pth, any other; PATH may also be a file of the set that is meant. Adapters, states of an optimizer and
subfolders are not read. Meta's layout says no context length: "max_seq_len" in params.json does, and without it it is
4096. Its use_scaled_rope has the factor "rope_scaling_factor", and without it 8.

Files are mapped, and a tensor is copied only where it must change (rotary permutation, another dtype, merging of
shards, dequantisation), one tensor after the other.

References:
1) how Meta splits its checkpoints: https://github.com/meta-llama/llama/blob/main/llama/model.py
2) Hugging Face's permutation of wq and wk:
   https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/convert_llama_weights_to_hf.py
3) the GGUF format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
4) the rotary frequencies of Llama-3.1 and later: https://github.com/meta-llama/llama-models, apply_scaling
"""

import functools
import json
import math
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file

from support import common
from fast import parallel
from support.common import LoadError
from fast import accelerate
from support.gguf_file import ADVICE, file_kind, load_errors, locate, read_gguf, weight_files
from model import ModelArgs, Transformer
from support.tokenizer import SentencePieceTokenizer, load_tokenizer, tokenizer_folder


def load_model(path, device="cpu", dtype=None):
    """
    The Transformer in a checkpoint, a folder or a file in it: in eval mode, without gradients. dtype, a torch.dtype or
    its name, defaults to the one that the embedding is stored in, and to bfloat16 for GGUF. Raises LoadError.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    args, names, read = read_checkpoint(path)
    model = parallel.connect(empty_model(parallel.local(args)))
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    weights = {}
    for name, shape in common.progress(expected.items(), "weights"):
        with load_errors(path):
            tensor = read(name, dtype)
            check_tensor(path, name, tensor, shape)
            dtype = dtype or tensor.dtype  # of the embedding, which comes first
            weights[name] = tensor.to(device, dtype)  # the mapped tensor itself, where nothing about it changes
    model.load_state_dict(weights, strict=True, assign=True)
    return accelerate(model.eval().requires_grad_(False))


def load(ckpt, device, dtype):
    """The tokenizer and the model of a checkpoint; with a bar on a terminal, since a GGUF file takes seconds."""
    parts = load_tokenizer, functools.partial(load_model, device=device, dtype=dtype)
    return [load_part(ckpt) for load_part in common.progress(parts, "loading")]


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
    place = locate(path)
    if not place.is_dir():
        return check_names(place, *read_gguf(place))
    sets, errors = weight_sets(place, Path(path)), {}
    for name, files in sets.items():
        try:
            checkpoint = check_names(place, *read_set(place, name, files))
        except LoadError as error:
            errors[name] = error
            continue
        for other, error in errors.items():
            note(f"[{place}: reads {name}, since {other} is of no use: {error}]")
        others = [other for other in sets if other != name and other not in errors]
        if others:
            note(f"[{place}: reads {name}, and not {', '.join(others)}]")
        return checkpoint
    for error in errors.values():
        raise error
    raise LoadError(f"{place}: no weights: expected model*.safetensors, pytorch_model*.bin or consolidated*.pth")


@functools.lru_cache  # once is enough
def note(line):
    print(line, file=sys.stderr)


ORDER = (  # of sets of weights
    r"model\.safetensors", r"model-", r"consolidated.*safetensors", r"pytorch_model\.bin", r"pytorch_model-",
    r"consolidated", "",
)  # fmt: skip


def weight_sets(folder, path):
    """
    {name: files} for every set of weights in a folder, in ORDER; for a path to one of the files only its set. Shards
    are a set, and where there is an index, those that it names, whether they are there or not.
    """
    sets = {}
    for file in weight_files(folder):
        sets.setdefault(set_name(file), []).append(file)
    for index in folder.glob("*.index.json"):
        indexed = sorted({folder / file for file in common.read_json(index).get("weight_map", {}).values()})
        for name in list(sets):
            sets[name] = [file for file in sets[name] if file not in indexed]
        if indexed:
            sets[set_name(indexed[0])] = indexed
    sets = {name: files for name, files in sets.items() if files}
    if path.is_file():
        of_path = {name: files for name, files in sets.items() if folder / path.name in files}
        if of_path or file_kind(path):
            return of_path or {path.name: [path]}
    names = sorted(sets, key=lambda name: [re.match(pattern, name) is None for pattern in ORDER])
    return {name: sets[name] for name in names}


def set_name(file):
    """model-*-of-00003.safetensors, the name of the set that model-00001-of-00003.safetensors is one file of."""
    return re.sub(r"(?<=-)\d+(?=-of-)|(?<=consolidated\.)\d+(?=\.)", "*", file.name)


def read_set(folder, name, files):
    """(args, names, read), as read_checkpoint gives them, of a set of files. The tensors' names tell the layout."""
    for file in files:
        if not file.exists():
            raise LoadError(f"{file}: no such file, and an index names it: the download is not complete")
    count = re.search(r"-of-0*(\d+)", name)
    if count and len(files) < int(count[1]):
        there = f"{len(files)} of {count[1]} files {name} are there"
        raise LoadError(f"{folder}: {there}: the download is not complete")
    shards = [read_tensors(file) for file in files]
    params, config = folder / "params.json", folder / "config.json"
    if any("tok_embeddings.weight" in shard for shard in shards) or not config.exists():
        if not params.exists():
            raise LoadError(f"{files[0]}: tensors with Meta's names, and no params.json beside it")
        return read_meta(params, files, shards)
    return read_hugging_face(config, files, shards)


def check_names(path, args, names, read):
    """The three, if the names are those of a LLaMA with these args. Raises LoadError."""
    expected = empty_model(args).state_dict()
    for name, weight in expected.items():
        if name not in names:
            tied = ' (if the head is the embedding, config.json must say "tie_word_embeddings": true)'
            why = f"of shape {tuple(weight.shape)}{tied * (name == 'output.weight')}"
            raise LoadError(f"{path}: tensor {name} is missing, {why}")
    for name in sorted(names):
        if name not in expected:
            raise LoadError(f"{path}: tensor {name} belongs to no LLaMA of {args.n_layers} layers")
    if args.freq_factors is not None and len(args.freq_factors) != args.head_dim // 2:
        raise LoadError(f"{path}: {len(args.freq_factors)} rotary factors, expected {args.head_dim // 2}")
    return args, names, read


def tie(tensors, tied):
    """
    Whether the output head is the embedding, of which {name: tensor} then keeps one. tied: what the configuration says;
    None: nothing, and then it is where only one of the two is stored. Two that differ are two, as in transformers.
    """
    embedding, output = "tok_embeddings.weight", "output.weight"
    if embedding in tensors and output in tensors:
        if not tied or not torch.equal(tensors[embedding], tensors[output]):
            return False
        del tensors[output]
    if tied is False:
        return False
    if output in tensors:
        tensors[embedding] = tensors.pop(output)
    return True


def llama3_factors(args, factor, low_freq_factor, high_freq_factor, original_context):
    """
    What divides the rotary frequencies in Llama-3.1 and later: `factor` for waves that are long in its original
    context, 1 for short ones, and between the two the divisor of a weighted mean.
    """
    factors = []
    for i in range(0, args.head_dim, 2):
        wavelength = 2 * math.pi * args.rope_theta ** (i / args.head_dim)
        waves = original_context / wavelength  # in the original context
        smooth = (waves - low_freq_factor) / (high_freq_factor - low_freq_factor)
        smooth = min(max(smooth, 0), 1)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def read_meta(config, files, shards):
    """Meta's layout, and our own: params.json with consolidated.*.pth, or with safetensors in Meta's names."""
    params = common.read_json(config)
    if params.get("moe") or "quantization_args" in params:
        raise LoadError(f"{config}: mixture of experts and quantised weights are not supported: {ADVICE}")
    sizes = {key: params[key] for key in ModelArgs.__dataclass_fields__ if params.get(key) is not None}
    with load_errors(config):
        if "hidden_dim" not in sizes:
            # two thirds of 4 * dim, since SwiGLU has three matrices and not two; rounded up: 11008 for LLaMA-2-7B
            hidden_dim = int((params.get("ffn_dim_multiplier") or 1) * int(2 * (4 * sizes.get("dim", 4096)) / 3))
            multiple = params.get("multiple_of") or 256
            sizes["hidden_dim"] = (hidden_dim + multiple - 1) // multiple * multiple
        args = ModelArgs(**sizes)
        if params.get("use_scaled_rope") and args.freq_factors is None:
            factor = params.get("rope_scaling_factor")
            if factor is None:
                note(f"[{config}: use_scaled_rope says no factor: 8, as in Llama-3.1; Llama-3.2 has 32, which "
                     'params.json says with "rope_scaling_factor": 32]')
            args.freq_factors = llama3_factors(args, factor or 8, 1, 4, 8192)
    embedding, wq = "tok_embeddings.weight", shards[0].get("layers.0.attention.wq.weight")
    for shard in shards:
        args.tie_word_embeddings = tie(shard, params.get("tie_word_embeddings"))
    if args.tie_word_embeddings and "tie_word_embeddings" not in params:
        note(f"[{config.parent}: one matrix is both the embedding and the output head]")
    if wq is not None and wq.dim() == 2 and wq.size(0) * len(files) < args.n_heads * args.head_dim:
        n_files = args.n_heads * args.head_dim // wq.size(0)
        there = f"{len(files)} of {n_files} files consolidated.*.pth are there"
        raise LoadError(f"{config.parent}: {there}: the download is not complete")
    if sizes.get("vocab_size", -1) < 1 and embedding in shards[0]:  # -1 in LLaMA-2's: as many as the tokenizer has
        args.vocab_size = shards[0][embedding].size(0)
        if split_dim(embedding, shards[0], args) == 0:
            args.vocab_size *= len(shards)

    def read(name, dtype):
        for file, shard in zip(files, shards):
            if name not in shard:
                raise LoadError(f"{file}: tensor {name} is missing, and a file beside it has it")
        parts = [shard[name] for shard in shards]
        parts = parts[:1] if parts[0].dim() == 1 else parts  # each shard has all of a norm
        return parallel.read_share(name, parts, split_dim(name, shards[0], args))  # 2 x (4096, 5504) -> (4096, 11008)

    return args, set().union(*shards), read


def split_dim(name, shard, args):
    """The dimension in which Meta's model-parallel shards split a matrix; shard: {name: tensor} of one of them."""
    if name == "tok_embeddings.weight" and shard[name].size(1) < args.dim:
        return 1  # LLaMA-2 splits the embedding, (32000, 4096) -> (32000, 2048); LLaMA-3 splits the vocabulary
    return parallel.split_dim(name) or 0


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


def read_hugging_face(config, files, shards):
    """Hugging Face's layout: config.json with safetensors or pytorch_model*.bin, in one file or in shards."""
    args = hugging_face_args(config)
    heads = {"attention.wq.weight": args.n_heads, "attention.wk.weight": args.n_kv_heads}
    tensors = {}
    for file, shard in zip(files, shards):
        for name, tensor in shard.items():
            layer, rest = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*)", name).groups(default="")
            if rest not in HUGGING_FACE:
                raise LoadError(f"{file}: tensor {name} belongs to no LLaMA: {ADVICE}")
            rest = HUGGING_FACE[rest]
            if layer + rest in tensors:
                raise LoadError(f"{file}: tensor {name} is in another file beside it too: leave only one of the two")
            if rest in heads:
                check_tensor(file, name, tensor, (heads[rest] * args.head_dim, args.dim))
            tensors[layer + rest] = tensor
    args.tie_word_embeddings = tie(tensors, args.tie_word_embeddings)

    def read(name, dtype):
        n_heads = heads.get(re.sub(r"layers\.\d+\.", "", name))
        tensor = parallel.read_share(name, [tensors[name]], parallel.split_dim(name))
        if n_heads is None:
            return tensor
        view = interleave(tensor, n_heads // parallel.size)
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


UNSUPPORTED = {  # what a config.json asks for -> what to do
    "quantization_config": "take the checkpoint that it was made from, or a GGUF file",
    "sliding_window": "with null for it, and with its value for max_position_embeddings, the model is the same",
    "num_local_experts": ADVICE, "num_experts": ADVICE, "attention_bias": ADVICE, "mlp_bias": ADVICE,
}  # fmt: skip
DEFAULTS = {  # model_type -> what transformers takes where config.json does not say it
    "llama": dict(max_position_embeddings=2048),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131072),
}


def hugging_face_args(file):
    """The ModelArgs that a config.json means. Raises LoadError for what model.py does not compute."""
    config = common.read_json(file)
    if config.get("model_type") not in DEFAULTS:
        known = " and ".join(DEFAULTS)
        raise LoadError(f"{file}: model_type {config.get('model_type')!r} is not supported, only {known}: {ADVICE}")
    config = DEFAULTS[config["model_type"]] | config
    for option, advice in UNSUPPORTED.items():
        if config.get(option):
            raise LoadError(f"{file}: {option} is not supported: {advice}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise LoadError(f"{file}: rope scaling {kind!r} is not supported, only 'llama3': {ADVICE}")
    for option, fine in ("hidden_act", "silu"), ("partial_rotary_factor", 1):
        if (config | rope).get(option, fine) != fine:
            raise LoadError(f"{file}: {option} {(config | rope)[option]!r} is not supported, only {fine!r}: {ADVICE}")
    with load_errors(file):
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
            max_seq_len=config["max_position_embeddings"],
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )
        if kind == "llama3":
            original = rope.get("original_max_position_embeddings", args.max_seq_len)
            numbers = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original
            args.freq_factors = llama3_factors(args, *numbers)
    return args


# tables and masks that real files carry, and that model.py computes
BUFFERS = r"rope\.freqs|inv_freq|freqs_(cis|cos|sin)|(cos|sin)_cached|position_ids|(^|[._])mask|masked_bias"


def read_tensors(file):
    """{name: tensor mapped from the file}, safetensors or PyTorch's, which its first bytes tell. Raises LoadError."""
    kind = file_kind(file)
    if kind == "pickle":
        raise LoadError(f"{file}: written in PyTorch's format of before 1.6, which cannot be mapped: rewrite it with "
                        "torch.save(torch.load(path, weights_only=True), path)")
    with load_errors(file, "cannot be read, it may be cut short or of another kind"):
        if kind == "zip":
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        elif kind or file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        else:
            raise ValueError("not a PyTorch file")
    if not isinstance(tensors, dict) or not all(torch.is_tensor(tensor) for tensor in tensors.values()):
        raise LoadError(f"{file}: not a dictionary of tensors")
    return {name: tensor for name, tensor in tensors.items() if not re.search(f"({BUFFERS})$", name)}


def describe(model, tokenizer):
    """Lines for people: sizes, and parameters per part, as in Table 1 of the paper."""
    args, dtype = model.args, model.tok_embeddings.weight.dtype
    total, sizes = common.nbytes(model), common.weight_bytes(model)

    def line(name, nbytes, note=""):
        return f"  {name:24}{nbytes / dtype.itemsize / 1e6:10.2f} M{note}"

    shown = asdict(args)
    if args.freq_factors:
        shown["freq_factors"] = f"{min(args.freq_factors):g} to {max(args.freq_factors):g}"
    yield "  ".join(f"{key} {value}" for key, value in shown.items())
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


TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip


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
    source = locate(path)
    if source.is_dir():
        source = tokenizer_folder(source)
        for name in TOKENIZER_FILES:
            for file in source.glob(name):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(file, folder / file.relative_to(source))
        config = {}  # its presence says that special tokens are found in a text
    elif isinstance(tokenizer, SentencePieceTokenizer):
        (folder / "tokenizer.model").write_bytes(tokenizer.proto)
        config = dict(tokenizer.special, add_bos_token=bool(tokenizer.add_bos), chat_template=tokenizer.template)
    else:
        tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
        config = dict(tokenizer.special, chat_template=tokenizer.template)
    if getattr(tokenizer, "match", True) and not (folder / "tokenizer_config.json").exists():
        write_json("tokenizer_config.json", config)


def parse_args(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("path", nargs="?", help="a folder, or a file in it; default: the demo model")
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
