"""What `python load_weights.py PATH` prints of a checkpoint, and what it writes with --out."""

import json
import shutil
from dataclasses import asdict
from functools import partial

from safetensors.torch import save_file

from support.common import LoadError, nbytes, weight_bytes, write_whole
from support.tokenizer import SentencePieceTokenizer, tokenizer_folder
from support.weight_files import COLUMNS, locate

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip


def describe(model, tokenizer):
    """Lines for people: sizes, and parameters per part, as in Table 1 of the paper."""
    args, dtype = model.args, model.tok_embeddings.weight.dtype
    total, sizes = nbytes(model), weight_bytes(model)

    def line(name, n_bytes, note=""):
        return f"  {name:24}{n_bytes / dtype.itemsize / 1e6:10.2f} M{note}"

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
    if model.output is None:
        yield line("tok_embeddings.weight", nbytes(model.tok_embeddings), ", also the output head")
    else:
        yield line("tok_embeddings.weight", nbytes(model.tok_embeddings))
        yield line("output.weight", sizes["head"])
    template = "none"
    if tokenizer.template:
        template = "its own"
    elif isinstance(tokenizer, SentencePieceTokenizer):
        template = "LLaMA-2's"
    ends = ", ".join(map(str, sorted(tokenizer.eos_ids)))
    ids = f"bos {tokenizer.bos_id}, end of text {ends}"
    yield f"tokenizer: {tokenizer.vocab_size} tokens, {ids}, chat template: {template}"


def save(model, tokenizer, path, folder, columns=False):
    """
    Write the model, opened from path, into a new folder: model.safetensors, params.json, the tokenizer's files. With
    columns, the layers' matrices are written as their transposes, under names that say so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.safetensors").exists():
        raise LoadError(f"{folder / 'model.safetensors'}: exists already, and is not overwritten")
    write_json(folder / "params.json", asdict(model.args))
    # config.json, which may name other ends of text, is not copied
    write_json(folder / "generation_config.json", dict(eos_token_id=sorted(tokenizer.eos_ids)))
    source = locate(path)
    if source.is_dir():
        source = tokenizer_folder(source)
        for name in TOKENIZER_FILES:
            for file in source.glob(name):
                (folder / name).parent.mkdir(exist_ok=True)
                write_whole(folder / file.relative_to(source), partial(shutil.copyfile, file))
        config = {}  # its presence says that special tokens are found in a text
    elif isinstance(tokenizer, SentencePieceTokenizer):
        write_whole(folder / "tokenizer.model", lambda path: path.write_bytes(tokenizer.proto))
        config = dict(tokenizer.special, add_bos_token=bool(tokenizer.add_bos), chat_template=tokenizer.template)
        config["added_tokens_decoder"] = tokenizer.stated
    else:
        write_whole(folder / "tokenizer.json", tokenizer.tokenizer.to_str(pretty=True))
        config = dict(tokenizer.special, chat_template=tokenizer.template)
    if getattr(tokenizer, "match", True) and not (folder / "tokenizer_config.json").exists():
        write_json(folder / "tokenizer_config.json", config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if columns and name.startswith("layers.") and tensor.dim() == 2:
            tensors[name + COLUMNS] = tensor.t().contiguous()
        else:
            tensors[name] = tensor.contiguous()
    write_whole(folder / "model.safetensors", partial(save_file, tensors))  # last: where it is, all is


def write_json(file, value):
    write_whole(file, json.dumps(value, indent=2) + "\n")
