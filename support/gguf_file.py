"""
The files of a checkpoint, whose kinds their first bytes tell, and the errors of whatever reads them. GGUF files: their
weights, and the tokenizers that are built from the vocabulary in one.
"""

import contextlib
import functools
import re
import struct
from pathlib import Path

import torch

from support.common import LoadError, first_line, import_optional, is_gguf
from model import ModelArgs
from fast.parallel import share

ADVICE = "transformers or llama.cpp may run it"  # what model.py does not compute
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # kinds of token, alike in sentencepiece and GGUF
LLAMA_3 = (  # its pre-tokenizer: contractions, words with one sign before them, up to three digits, signs, white space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FOREIGN = {  # the first bytes of what often lies in the place of a file -> what it is
    b"version https://git-lfs": "a Git LFS pointer and not the file itself: git lfs pull fetches it",
    b"<": "a web page and not the file itself: download it again",
}


def first_bytes(file):
    """The beginning of a file, which tells its kind whatever its name; b"" if there is none."""
    try:
        with open(file, "rb") as opened:
            return opened.read(64)
    except OSError:
        return b""


def file_kind(file):
    """gguf, zip (PyTorch's), pickle (PyTorch's of before 1.6) or safetensors; None for any other file."""
    head = first_bytes(file)
    for begin, kind in (b"GGUF", "gguf"), (b"PK", "zip"), (b"\x80", "pickle"):
        if head.startswith(begin):
            return kind
    return "safetensors" if head[6:9] == b"\0\0{" else None  # the length of a header in JSON, and it


def weight_files(folder):
    """The files of a folder whose names say that weights of a model are in them."""
    files = []
    for file in sorted(folder.iterdir()):
        other = re.match("adapter|optim|sched|training_args|rng_state|random_states|pytorch_lora", file.name)
        if file.suffix in (".safetensors", ".bin", ".pth") and not other:
            files.append(file)
    return files


def locate(path):
    """
    The GGUF file or the folder that a path means. GGUF is told by its first bytes. A folder with params.json or
    config.json and weights is itself; else the only GGUF file in it is meant. Raises LoadError.
    """
    path = Path(path)
    if not path.exists():
        raise LoadError(f"{path}: no such file or folder")
    if path.suffix == ".gguf" or is_gguf(path):
        return path
    folder = path if path.is_dir() else path.parent
    config = (folder / "params.json").exists() or (folder / "config.json").exists()
    if config and weight_files(folder):
        return folder
    files = sorted(file for file in folder.iterdir() if is_gguf(file))
    if len(files) == 1 or (files and "-00001-of-" in files[0].name):  # of a split one, which is refused, the first
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise LoadError(f"{folder}: there are several GGUF files: give the path of one: {names}")
    if not config:
        expected = "params.json (Meta's layout), config.json (Hugging Face's) or a GGUF file"
        raise LoadError(f"{folder}: no checkpoint: expected {expected}")
    return folder


@contextlib.contextmanager
def load_errors(*where):
    """Turn whatever a library raises inside into a LoadError; where: the file, and what is wrong with it."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:  # the packages tokenizers and gguf raise anything
        for begin, kind in FOREIGN.items():
            if first_bytes(where[0]).startswith(begin):
                why = kind
                break
        else:
            why = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise LoadError(": ".join([*map(str, where), why])) from error


@functools.lru_cache(maxsize=1)  # reading the vocabulary takes seconds, and load_model opens the same file
def open_gguf(path):
    """(reader, value): the package gguf's reader of a file, and value(key, default=None) for its metadata."""
    gguf = import_optional("gguf", path)
    with load_errors(path, "not a GGUF file, or cut short"):  # it checks nothing, and fails anywhere in a cut file
        reader = gguf.GGUFReader(path, "c")  # "c": mapped, and what is written stays in memory

    def value(key, default=None):
        field = reader.get_field(key)
        return default if field is None else field.contents()

    return reader, value


GGUF = {
    "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output",
    "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
}  # fmt: skip
GGUF_FINE = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1, "llama.rope.scale_linear": 1,
             "llama.expert_count": 0, "llama.attention.sliding_window": 0}  # fmt: skip


def read_gguf(path):
    """A GGUF file, whose wq and wk are in Meta's order already."""
    reader, value = open_gguf(path)
    gguf = import_optional("gguf", path)
    args = gguf_args(path, value, {tensor.name: tensor.shape for tensor in reader.tensors})
    tensors = {}
    for tensor in reader.tensors:
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*)", tensor.name.removesuffix(".weight")).groups()
        if name == "rope_freqs":
            args.freq_factors = gguf.quants.dequantize(tensor.data, tensor.tensor_type).flatten().tolist()
        elif name in GGUF:
            prefix = f"layers.{layer}." if layer else ""
            tensors[f"{prefix}{GGUF[name]}.weight"] = tensor
        elif name != "attn_rot_embd":  # a table that old files carry
            raise LoadError(f"{path}: tensor {tensor.name} belongs to no LLaMA: {ADVICE}")
    if "tok_embeddings.weight" not in tensors and "output.weight" in tensors:
        tensors["tok_embeddings.weight"] = tensors.pop("output.weight")
    args.tie_word_embeddings = "output.weight" not in tensors  # only one of the two is stored

    def read(name, dtype):
        """Dequantised by blocks of rows, so that little of it is in float32 at a time."""
        tensor = tensors[name]
        *n_rows, columns = tensor.shape.tolist()[::-1]  # GGUF names the last size first; a norm has no rows
        stored = tensor.data.reshape(*n_rows or [1], -1)  # in Q4_1 (576, 360) bytes are a matrix (576, 576)
        stored, wanted = stored[share(name, len(stored), 0)], share(name, columns, 1)
        rows = torch.empty(len(stored), wanted.stop - wanted.start, dtype=dtype or torch.bfloat16)
        n = max(1, 2**22 // columns)  # rows that are 16 MB in float32
        for start in range(0, len(rows), n):
            block = gguf.quants.dequantize(stored[start : start + n], tensor.tensor_type)
            rows[start : start + n] = torch.from_numpy(block)[:, wanted]
        return rows if n_rows else rows[0]

    return args, tensors.keys(), read


def gguf_args(path, value, shapes):
    """The ModelArgs that a GGUF file's metadata and tensors' shapes mean. Raises LoadError for what is no LLaMA-2."""
    if value("general.architecture") != "llama":
        raise LoadError(f"{path}: architecture {value('general.architecture')!r} is not supported, only 'llama' is")
    if value("split.count", 1) > 1:
        first = re.sub(r"-\d+-of-", "-00001-of-", str(path))
        whole = re.sub(r"-\d+-of-\d+", "", str(path))
        raise LoadError(f"{path}: one of {value('split.count')} parts: llama-gguf-split --merge {first} {whole} makes "
                        "one file of them")
    for key, fine in GGUF_FINE.items():
        if value(key, fine) not in (fine, 0):
            raise LoadError(f"{path}: {key} = {value(key)!r} is not supported: {ADVICE}")
    rotary = value("llama.rope.dimension_count")
    head_dim = value("llama.attention.key_length", rotary)
    if rotary not in (None, head_dim) or value("llama.attention.value_length", head_dim) != head_dim:
        raise LoadError(f"{path}: rotary embeddings over part of a head, or values of another size, are not supported")
    embedding = "token_embd.weight" if "token_embd.weight" in shapes else "output.weight"
    with load_errors(path, "its metadata makes no LLaMA"):
        return ModelArgs(
            dim=value("llama.embedding_length"),
            n_layers=value("llama.block_count"),
            n_heads=value("llama.attention.head_count"),
            n_kv_heads=value("llama.attention.head_count_kv"),
            vocab_size=value("llama.vocab_size") or int(shapes[embedding][1]),
            hidden_dim=value("llama.feed_forward_length"),
            head_dim=head_dim,
            norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=value("llama.rope.freq_base", 10000.0),
            max_seq_len=value("llama.context_length"),
        )


def build_bpe(path, pieces, kinds, merges, pre, bos=None):
    """
    The package tokenizers' Tokenizer of a vocabulary, merges ("a b"), and its pre-tokenizer's name in llama.cpp.
    bos: the text of the token that every text begins with, or None.
    """
    tokenizers = import_optional("tokenizers", path)
    split = tokenizers.pre_tokenizers
    known = {
        "gpt-2": [split.ByteLevel(add_prefix_space=False)],
        "smollm": [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [split.Split(tokenizers.Regex(LLAMA_3), "isolated"), split.ByteLevel(False, use_regex=False)],
    }
    if pre not in known:
        raise LoadError(f"{path}: pre-tokenizer {pre!r} is not supported, only {', '.join(known)} are")
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split.Sequence(known[pre]), tokenizers.decoders.ByteLevel()
    added = [(piece, kind == CONTROL) for piece, kind in zip(pieces, kinds) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([tokenizers.AddedToken(piece, special=control, normalized=False) for piece, control in added])
    if bos:
        template = tokenizers.processors.TemplateProcessing
        tokenizer.post_processor = template(single=[bos, "$A"], special_tokens=[(bos, ids[bos])])
    return tokenizer


def sentencepiece_proto(pieces, scores, kinds, unk, bos, eos, add_space_prefix):
    """
    The bytes of a sentencepiece model, so that sentencepiece itself does the work. unk, bos, eos: ids, -1 for none.
    The package cannot write a model without protobuf, hence by hand: each entry is the number and type of its field
    (https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto), and its content.
    """

    def varint(n):
        n &= 2**64 - 1
        return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + varint(n >> 7)

    def number(field, n):
        return varint(field << 3) + varint(n)

    def block(field, data):
        return varint(field << 3 | 2) + varint(len(data)) + data

    out = b""
    for piece, score, kind in zip(pieces, scores, kinds):
        score = varint(2 << 3 | 5) + struct.pack("<f", score)
        out += block(1, block(1, piece.encode("utf-8", "surrogatepass")) + score + number(3, kind))
    trainer = number(3, 2) + number(35, BYTE in kinds)  # model_type BPE, byte_fallback
    trainer += number(40, unk) + number(41, bos) + number(42, eos) + number(43, -1)
    normalizer = block(1, b"identity") + number(3, add_space_prefix) + number(4, 0) + number(5, 1)
    return out + block(2, trainer) + block(3, normalizer)
