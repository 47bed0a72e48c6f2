"""
A LLaMA checkpoint on disk -> model.Transformer and its tokenizer.

    python load_weights.py PATH                what is in it
    python load_weights.py PATH --out FOLDER   rewrite it as one safetensors file in Meta's names, which opens uncopied

Three layouts are read: Meta's (params.json, consolidated*.pth), Hugging Face's (config.json, safetensors or
pytorch_model*.bin) and GGUF, of LLaMA 1 to 3.3 and of Mistral without a sliding window. Refused are RoPE scaling other
than llama3's (linear, dynamic, yarn, longrope), sliding windows, mixture of experts, biases, GPTQ, AWQ, bitsandbytes
and fp8, and split GGUF files, which llama-gguf-split --merge makes one. Where a folder holds several sets of weights,
the first complete one is read, and standard error says which. PATH may also be a file of the set that is meant.

Meta's params.json may name a context length, "max_seq_len" (default 4096), and with use_scaled_rope its factor,
"rope_scaling_factor" (default 8).

Files are mapped, and a tensor is copied only where it must change (rotary permutation, another dtype, merging of
shards, dequantisation, and on some CPUs small matrices by columns: fast/one_row.py), one tensor after the other.

References:
1) how Meta splits its checkpoints: https://github.com/meta-llama/llama/blob/main/llama/model.py
2) Hugging Face's permutation of wq and wk:
   https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/convert_llama_weights_to_hf.py
3) the rotary frequencies of Llama-3.1 and later: https://github.com/meta-llama/llama-models, apply_scaling
"""

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)
import functools
import math
import re
from pathlib import Path
from unittest.mock import patch

import torch

from fast import accelerate, compare, one_row, parallel
from model import ModelArgs, Transformer
from support import common
from support.checkpoint_report import describe, save
from support.common import LoadError, note
from support.gguf_file import ADVICE, read_gguf
from support.tokenizer import load_tokenizer
from support.weight_files import (
    MERGE,
    check_layers,
    check_number,
    check_tensor,
    load_errors,
    locate,
    model_args,
    read_shards,
    weight_sets,
)


def load_model(path, device="cpu", dtype=None):
    """
    The Transformer in a checkpoint, a folder or a file in it: in eval mode, without gradients. dtype, a torch.dtype or
    its name, defaults to the one that the embedding is stored in, and to bfloat16 for GGUF. Raises LoadError.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    args, names, read = read_checkpoint(path)
    model = parallel.connect(empty_model(parallel.local(args)))
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    weights, kinds, asked = {}, set(), dtype
    for name, shape in common.progress(expected.items(), "weights"):
        with load_errors(path):
            tensor = read(name, dtype)
            check_tensor(path, name, tensor, shape)
            kinds.add(str(tensor.dtype).removeprefix("torch."))
            dtype = dtype or tensor.dtype  # of the embedding, which comes first
            weights[name] = one_row.stored(name, tensor, device, dtype)  # the mapped one, where nothing changes
    if asked is None and len(kinds) > 1:
        kinds, own = " and ".join(sorted(kinds)), str(dtype).removeprefix("torch.")
        note(f"[{path}: holds tensors in {kinds}: all are read in {own}, the embedding's; --dtype chooses another]")
    model.load_state_dict(weights, strict=True, assign=True)
    return accelerate(model.eval().requires_grad_(False))


def load(ckpt, device, dtype):
    """The tokenizer and the model of a checkpoint; with a bar on a terminal, since a GGUF file takes seconds."""
    loaders = load_tokenizer, functools.partial(load_model, device=device, dtype=dtype)
    tokenizer, model = [loader(ckpt) for loader in common.progress(loaders, "loading")]
    return tokenizer, compare(model)


def empty_model(args):
    """A Transformer on the meta device. It is not initialised: random numbers there load 70 MB of PyTorch's Python."""
    with torch.device("meta"), patch("torch.nn.init.kaiming_uniform_"), patch("torch.nn.init.normal_"):
        return Transformer(args)


def read_checkpoint(path):
    """
    (args, names, read) of the checkpoint at path, whatever its layout, without reading a weight. args: its ModelArgs;
    names: Meta's names of its tensors; read(name, dtype): one of the tensors, mapped and in the dtype that it is stored
    in or, where it must be copied anyway, in dtype (None: its own; for GGUF bfloat16). Raises LoadError, as read does.
    """
    source = locate(path)
    if not source.is_dir():
        return check_names(source, *read_gguf(source))
    sets, errors = weight_sets(source, Path(path)), {}
    for name, files in sets.items():
        try:
            checkpoint = check_names(source, *read_set(source, name, files))
        except LoadError as error:
            errors[name] = error
            continue
        for other, error in errors.items():
            note(f"[{source}: reads {name}, since {other} is of no use: {error}]")
        others = [other for other in sets if other != name and other not in errors]
        if others:
            note(f"[{source}: reads {name}, and not {', '.join(others)}]")
        if (source / "adapter_config.json").exists():
            note(f"[{source}: reads {name}, and not the adapter beside it]")
        return checkpoint
    for error in errors.values():
        raise error
    raise LoadError(f"{source}: no weights: expected model*.safetensors, pytorch_model*.bin or consolidated*.pth")


def read_set(folder, name, files):
    """(args, names, read), as read_checkpoint gives them, of a set of files. The tensors' names tell the layout."""
    shards = read_shards(folder, name, files)
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
    args = meta_args(config, params)
    embedding, wq = "tok_embeddings.weight", shards[0].get("layers.0.attention.wq.weight")
    for shard in shards:
        args.tie_word_embeddings = tie(shard, params.get("tie_word_embeddings"))
    if args.tie_word_embeddings and "tie_word_embeddings" not in params:
        note(f"[{config.parent}: one matrix is both the embedding and the output head]")
    if wq is not None and wq.dim() == 2 and wq.size(0) * len(files) < args.n_heads * args.head_dim:
        n_files = args.n_heads * args.head_dim // wq.size(0)
        there = f"{len(files)} of {n_files} files consolidated.*.pth are there"
        raise LoadError(f"{config.parent}: {there}: the download is not complete")
    check_layers(config, "n_layers", args.n_layers, set().union(*shards))
    if params.get("vocab_size", -1) == -1 and embedding in shards[0]:  # in LLaMA-2's: as many as the tokenizer has
        args.vocab_size = shards[0][embedding].size(0)
        if split_dim(embedding, shards[0], args) == 0:
            args.vocab_size *= len(shards)

    def read(name, dtype):
        for file, shard in zip(files, shards):
            if name not in shard:
                raise LoadError(f"{file}: tensor {name} is missing, and a file beside it has it")
        tensors = [shard[name] for shard in shards]
        if tensors[0].dim() == 1:  # each shard has all of a norm
            tensors = tensors[:1]
        dim = split_dim(name, shards[0], args)
        return parallel.read_share(name, tensors, dim)  # 2 x (4096, 5504) -> (4096, 11008)

    return args, set().union(*shards), read


def meta_args(config, params):
    """The ModelArgs that params.json means. Raises LoadError for what model.py does not compute."""
    if params.get("moe") or "quantization_args" in params:
        raise LoadError(f"{config}: mixture of experts and quantised weights are not supported: {ADVICE}")
    sizes = dict.fromkeys(["dim", "n_layers", "n_heads"])  # whatever else is not said has a default, as in Meta's code
    for key in ModelArgs.__dataclass_fields__:
        if params.get(key) is not None and (key, params[key]) != ("vocab_size", -1):
            sizes[key] = params[key]
    with load_errors(config):
        if "hidden_dim" not in sizes:
            # two thirds of 4 * dim, since SwiGLU has three matrices and not two; rounded up: 11008 for LLaMA-2-7B
            multiplier = check_number("ffn_dim_multiplier", params.get("ffn_dim_multiplier") or 1, 2**10)
            multiple = check_number("multiple_of", params.get("multiple_of") or 256, 2**20, whole=True)
            hidden_dim = int(multiplier * int(2 * (4 * check_number("dim", sizes["dim"], 2**20, whole=True)) / 3))
            sizes["hidden_dim"] = (hidden_dim + multiple - 1) // multiple * multiple
        for factor in sizes.get("freq_factors", ()):
            check_number("freq_factors", factor)
        args = model_args(**sizes)
        if params.get("use_scaled_rope") and args.freq_factors is None:
            factor = params.get("rope_scaling_factor")
            if factor is None:
                note(f"[{config}: use_scaled_rope says no factor: 8, as in Llama-3.1; Llama-3.2 has 32, which "
                     'params.json says with "rope_scaling_factor": 32]')
            args.freq_factors = llama3_factors(args, check_number("rope_scaling_factor", factor or 8), 1, 4, 8192)
    return args


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
    tensors, others = {}, []
    for file, shard in zip(files, shards):
        for name, tensor in shard.items():
            layer, rest = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*)", name).groups(default="")
            if not name.startswith(("model.", "lm_head.", "base_model.")):  # a head that a trainer has added
                others.append(name)
                continue
            if "lora_" in name:
                raise LoadError(f"{file}: tensor {name} is an adapter's: {MERGE} its model")
            if rest not in HUGGING_FACE:
                raise LoadError(f"{file}: tensor {name} belongs to no LLaMA: {ADVICE}")
            rest = HUGGING_FACE[rest]
            if layer + rest in tensors:
                raise LoadError(f"{file}: tensor {name} is in another file beside it too: remove one of the two")
            if rest in heads:
                check_tensor(file, name, tensor, (heads[rest] * args.head_dim, args.dim))
            tensors[layer + rest] = tensor
    if others:
        note(f"[{config.parent}: beside the model, and not read: {', '.join(others[:3])}{', ...' * (len(others) > 3)}]")
    check_layers(config, "num_hidden_layers", args.n_layers, tensors)
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
SIZES = {  # of ModelArgs -> the same in a config.json
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "vocab_size": "vocab_size", "hidden_dim": "intermediate_size",
    "head_dim": "head_dim", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
    "max_seq_len": "max_position_embeddings",
}  # fmt: skip
DEFAULTS = {  # model_type -> what transformers takes where config.json does not say it
    "llama": dict(max_position_embeddings=2048),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096, max_position_embeddings=131072),
}


def hugging_face_args(file):
    """The ModelArgs that a config.json means. Raises LoadError for what model.py does not compute."""
    config = common.read_json(file)
    if str(config.get("model_type")) not in DEFAULTS:
        known = " and ".join(DEFAULTS)
        raise LoadError(f"{file}: model_type {config.get('model_type')!r} is not supported, only {known}: {ADVICE}")
    config = dict(rms_norm_eps=1e-6, rope_theta=10000.0) | DEFAULTS[config["model_type"]] | config
    for option, advice in UNSUPPORTED.items():
        if config.get(option):
            raise LoadError(f"{file}: {option} is not supported: {advice}")
    with load_errors(file):
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # one of the two, as in transformers
        if not isinstance(rope, dict) or any(isinstance(part, dict) for part in rope.values()):
            raise ValueError(f"rope_scaling or rope_parameters is {rope!r:.40}, expected one object for all layers")
        config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind in ("linear", "dynamic") and rope.get("factor") == 1:  # which changes nothing
            kind = "default"
        if kind not in ("default", "llama3"):
            raise LoadError(f"{file}: rope scaling {kind!r} is not supported, only 'llama3': {ADVICE}")
        for option, fine in ("hidden_act", "silu"), ("partial_rotary_factor", 1):
            if config.get(option, fine) != fine:
                raise LoadError(f"{file}: {option} {config[option]!r} is not supported, only {fine!r}: {ADVICE}")
        sizes = {size: config.get(key) for size, key in SIZES.items()}
        args = model_args(SIZES, tie_word_embeddings=bool(config.get("tie_word_embeddings")), **sizes)
        if kind == "llama3":
            original = "original_max_position_embeddings"  # which counts before the same beside the factor
            rope = {original: args.max_seq_len} | rope
            rope[original] = config.get(original, rope[original])
            keys = "factor", "low_freq_factor", "high_freq_factor", original
            args.freq_factors = llama3_factors(args, *(check_number(key, rope.get(key)) for key in keys))
    return args


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
