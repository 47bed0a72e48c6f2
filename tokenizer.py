"""
A checkpoint's own tokenizer and chat template: sentencepiece (tokenizer.model), the package tokenizers
(tokenizer.json), or the vocabulary in a GGUF file, from which one of those two is built.
"""

import contextlib
import functools
import importlib.util
import re
import struct
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from common import LoadError, first_line, import_optional, read_json

END_OF_TEXT = ("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # kinds of token, numbered alike by sentencepiece and GGUF
LLAMA_3 = (  # its pre-tokenizer: contractions, words with one sign before them, up to three digits, signs, white space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@contextlib.contextmanager
def load_errors(*where):
    """Turn whatever a library raises inside into a LoadError; where: the file, and what is wrong with it."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:  # the packages tokenizers and gguf raise anything
        why = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise LoadError(": ".join([*map(str, where), why])) from error


def load_tokenizer(path):
    """
    The tokenizer of the checkpoint at path: encode(text, bos=None) -> list of ids (bos None: as the checkpoint's own
    tokenizer does), decode(ids) -> str without control tokens, chat(messages) -> list of ids; bos_id (or None),
    eos_ids, the set of ids that end a text, and vocab_size. Raises LoadError.
    """
    path = Path(path)
    if not path.exists():
        raise LoadError(f"{path}: no such file or folder")
    if path.suffix != ".gguf":
        return folder_tokenizer(path if path.is_dir() else path.parent)
    with load_errors(path, "its tokenizer cannot be read"):
        return gguf_tokenizer(path)


class SentencePieceTokenizer:
    """LLaMA-2's tokenizer, from the bytes of a sentencepiece model; file: their origin, for errors."""

    def __init__(self, proto, file, eos_ids=(), add_bos=True, template=None):
        with load_errors(file, "not a sentencepiece model"):
            self.processor = SentencePieceProcessor(model_proto=proto)
        self.proto, self.add_bos, self.template = proto, add_bos, template
        self.bos_id = self.processor.bos_id() if self.processor.bos_id() >= 0 else None
        self.eos_ids = {*eos_ids, self.processor.eos_id()} - {-1}
        self.vocab_size = self.processor.vocab_size()

    def encode(self, text, bos=None):
        bos = self.add_bos if bos is None else bos
        return self.processor.encode(text, add_bos=bool(bos) and self.bos_id is not None)

    def decode(self, ids):
        return self.processor.decode([i for i in ids if i < self.vocab_size])  # a model may have more rows than that

    def chat(self, messages):
        if self.template:
            return self.chat_by_template(messages)
        # else as LLaMA-2: https://github.com/meta-llama/llama/blob/main/llama/generation.py, chat_completion
        ids, text, system = [], "", ""
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
            elif message["role"] == "user":
                text, system = f"[INST] {(system + content).strip()} [/INST]", ""
            else:
                ids += self.encode(f"{text} {content.strip()} ", bos=True) + [self.processor.eos_id()]
                text = ""
        return ids + (self.encode(text, bos=True) if text else [])

    def chat_by_template(self, messages):
        piece = self.processor.id_to_piece
        control = {piece(i): i for i in range(self.vocab_size) if self.processor.is_control(i)}
        bos = "" if self.bos_id is None else piece(self.bos_id)
        eos = piece(min(self.eos_ids)) if self.eos_ids else ""
        text = render(self.template, messages, bos, eos)  # in which control tokens are written out, as "<s>"
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, control)) + ")", text):
            ids += [control[part]] if part in control else self.encode(part, bos=False)
        return ids


class BPETokenizer:
    """A Tokenizer of the package tokenizers; bos, eos: the texts of two special tokens, or None."""

    def __init__(self, tokenizer, bos, eos, eos_ids=(), template=None, add_bos=None):
        self.tokenizer, self.template, self.add_bos = tokenizer, template, add_bos
        self.bos, self.eos = bos or "", eos or ""
        self.bos_id = tokenizer.token_to_id(self.bos)
        self.eos_ids = {*eos_ids, tokenizer.token_to_id(self.eos)} - {None}
        self.vocab_size = tokenizer.get_vocab_size()

    def encode(self, text, bos=None):
        bos = self.add_bos if bos is None else bos
        ids = self.tokenizer.encode(text, add_special_tokens=bos is None).ids  # None: those of its own post-processor
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids))

    def chat(self, messages):
        if not self.template:
            raise LoadError("this checkpoint has no chat template: leave out --chat")
        return self.encode(render(self.template, messages, self.bos, self.eos), bos=False)


def render(template, messages, bos, eos):
    """The text of a chat by a checkpoint's jinja2 template: somebody else's program, so it runs in a sandbox."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    names = dict(messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=True)
    with load_errors("the checkpoint's chat template failed"):
        return env.from_string(template).render(names, raise_exception=raise_exception)


def folder_tokenizer(folder):
    """The tokenizer beside the weights, in Meta's and Hugging Face's layout."""
    config, eos_ids = {}, set()
    for name in "config.json", "generation_config.json", "tokenizer_config.json":
        if (folder / name).exists():
            config |= read_json(folder / name)
            eos = config.get("eos_token_id")
            eos_ids.update(eos if isinstance(eos, list) else [eos])
    eos_ids.discard(None)
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if isinstance(template, list):  # several, each with a name
        template = {one["name"]: one["template"] for one in template}.get("default")
    bpe, proto = folder / "tokenizer.json", folder / "tokenizer.model"
    # tokenizer.json knows the tokens that were added to a tokenizer.model later, but needs an optional package
    if bpe.exists() and (importlib.util.find_spec("tokenizers") or not proto.exists()):
        for name in "bos_token", "eos_token":
            if isinstance(config.get(name), dict):
                config[name] = config[name].get("content")  # its text
        tokenizers = import_optional("tokenizers", bpe)
        with load_errors(bpe, "not a tokenizer"):
            tokenizer = tokenizers.Tokenizer.from_file(str(bpe))
        return BPETokenizer(tokenizer, config.get("bos_token"), config.get("eos_token"), eos_ids, template)
    if proto.exists():
        return SentencePieceTokenizer(proto.read_bytes(), proto, eos_ids, config.get("add_bos_token", True), template)
    raise LoadError(f"{folder}: no tokenizer: expected tokenizer.model or tokenizer.json beside the weights")


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


def gguf_tokenizer(path):
    """The tokenizer in a GGUF file: BPE ("gpt2") or sentencepiece ("llama")."""
    _, value = open_gguf(path)

    def key(name, default=None):
        return value("tokenizer.ggml." + name, default)

    pieces, kind, template = key("tokens"), key("model"), value("tokenizer.chat_template")
    if kind not in ("gpt2", "llama") or not pieces:
        raise LoadError(f"{path}: tokenizer {kind!r} is not supported, only gpt2 (BPE) and llama (sentencepiece) are")
    kinds = key("token_type") or [NORMAL] * len(pieces)
    bos, eos = key("bos_token_id"), key("eos_token_id")
    eos_ids = {eos, key("eot_token_id"), key("eom_token_id")} - {None}
    eos_ids |= {i for i, piece in enumerate(pieces) if piece in END_OF_TEXT and kinds[i] == CONTROL}
    if kind == "llama":
        special = key("unknown_token_id", 0), key("bos_token_id", -1), key("eos_token_id", -1)
        proto = sentencepiece_proto(pieces, key("scores"), kinds, *special, key("add_space_prefix", True))
        return SentencePieceTokenizer(proto, path, eos_ids, key("add_bos_token", True), template)
    tokenizer = build_bpe(path, pieces, kinds, key("merges"), key("pre"))
    piece = dict(enumerate(pieces)).get  # of an id, or None
    add_bos = key("add_bos_token", key("pre") == "llama-bpe")  # where the file does not say: as llama.cpp does
    return BPETokenizer(tokenizer, piece(bos), piece(eos), eos_ids, template, add_bos)


def build_bpe(path, pieces, kinds, merges, pre):
    """The package tokenizers' Tokenizer of a vocabulary, merges ("a b"), and its pre-tokenizer's name in llama.cpp."""
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
