"""
GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): their weights, and the tokenizers that are built
from the vocabulary in one.
"""

import functools
import re
import struct

import torch

from fast.parallel import share
from support.common import LoadError, first_bytes, import_optional
from support.weight_files import check_layers, load_errors, model_args

ADVICE = "transformers or llama.cpp may run it"  # what model.py does not compute
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # kinds of token, alike in sentencepiece and GGUF
LLAMA_3 = (  # its pre-tokenizer: contractions, words with one sign before them, up to three digits, signs, white space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.lru_cache(maxsize=1)  # reading the vocabulary takes seconds, and load_model opens the same file
def open_gguf(path):
    """(reader, value): the package gguf's reader of a file, and value(key, default=None) for its metadata."""
    gguf = import_optional("gguf", path)
    if first_bytes(path)[4:7] == b"\0\0\0":  # the high bytes of its version
        raise LoadError(f"{path}: a big-endian GGUF file: llama.cpp's gguf_convert_endian.py makes a little-endian one")
    with load_errors(path, "not a GGUF file, or cut short"):  # it checks nothing, and fails anywhere in a cut file
        try:
            reader = gguf.GGUFReader(path, "c")  # "c": mapped, and what is written stays in memory
        except ValueError as error:
            unknown = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
            if unknown is None:
                raise
            raise LoadError(f"{path}: holds tensors of type {unknown[1]}, which the package gguf does not know: "
                            "pip install -U gguf, or take another quantisation") from None

    def value(key, default=None):
        field = reader.get_field(key)
        return default if field is None else field.contents()

    check_kind(path, value)
    return reader, value


def check_kind(path, value):
    """Raise LoadError unless a GGUF file's metadata, value(key, default), is that of a whole LLaMA."""
    if value("general.type", "model") == "adapter" or value("adapter.type") is not None:
        raise LoadError(f"{path}: a LoRA adapter and no model: first merge it into its model (llama-export-lora)")
    if value("general.type", "model") != "model":
        raise LoadError(f"{path}: no model, but what general.type calls {value('general.type')!r}")
    if value("general.architecture") != "llama":
        raise LoadError(f"{path}: architecture {value('general.architecture')!r} is not supported, only 'llama' is")
    if value("split.count", 1) > 1:
        first = re.sub(r"-\d+-of-", "-00001-of-", str(path))
        whole = re.sub(r"-\d+-of-\d+", "", str(path))
        raise LoadError(f"{path}: one of {value('split.count')} parts: llama-gguf-split --merge {first} {whole} makes "
                        "one file of them")


GGUF = {
    "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output",
    "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
}  # fmt: skip
GGUF_SIZES = {  # of ModelArgs -> the same in a GGUF file, where vocab_size and rope_theta may be missing
    "dim": "llama.embedding_length", "n_layers": "llama.block_count", "n_heads": "llama.attention.head_count",
    "n_kv_heads": "llama.attention.head_count_kv", "hidden_dim": "llama.feed_forward_length",
    "head_dim": "llama.attention.key_length", "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "max_seq_len": "llama.context_length", "vocab_size": "llama.vocab_size", "rope_theta": "llama.rope.freq_base",
}  # fmt: skip
GGUF_FINE = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1, "llama.rope.scale_linear": 1,
             "llama.expert_count": 0, "llama.attention.sliding_window": 0}  # fmt: skip


def read_gguf(path):
    """A GGUF file, whose wq and wk are in Meta's order already."""
    reader, value = open_gguf(path)
    gguf = import_optional("gguf", path)
    args = gguf_args(path, value, {tensor.name: tensor.shape for tensor in reader.tensors})
    tensors, end = {}, 0
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
        if tensor.data_offset < end:
            raise LoadError(f"{path}: tensor {tensor.name} begins within another: the file is damaged")
        end = tensor.data_offset + tensor.n_bytes
        layer, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(.*)", tensor.name.removesuffix(".weight")).groups()
        if name == "rope_freqs":
            args.freq_factors = gguf.quants.dequantize(tensor.data, tensor.tensor_type).flatten().tolist()
        elif name in GGUF:
            prefix = f"layers.{layer}." if layer else ""
            tensors[f"{prefix}{GGUF[name]}.weight"] = tensor
        elif name != "attn_rot_embd":  # a table that old files carry
            raise LoadError(f"{path}: tensor {tensor.name} belongs to no LLaMA: {ADVICE}")
    check_layers(path, "llama.block_count", args.n_layers, tensors)
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
    linear = value("llama.rope.scaling.type") == "linear"  # by a factor of 1, if the next lines let it pass
    for key, fine in GGUF_FINE.items():
        if value(key, fine) not in (fine, 0) and not (linear and key.endswith("type")):
            raise LoadError(f"{path}: {key} = {value(key)!r} is not supported: {ADVICE}")
    rotary = value("llama.rope.dimension_count")
    head_dim = value("llama.attention.key_length", rotary)
    if rotary not in (None, head_dim) or value("llama.attention.value_length", head_dim) != head_dim:
        raise LoadError(f"{path}: rotary embeddings over part of a head, or values of another size, are not supported")
    embedding = "token_embd.weight" if "token_embd.weight" in shapes else "output.weight"
    with load_errors(path):
        sizes = {size: value(key) for size, key in GGUF_SIZES.items()} | dict(head_dim=head_dim)
        sizes["vocab_size"] = value("llama.vocab_size") or int(shapes[embedding][1])
        sizes["rope_theta"] = value("llama.rope.freq_base", 10000.0)
        return model_args(GGUF_SIZES, **sizes)


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
