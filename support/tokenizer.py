"""
A checkpoint's own tokenizer: sentencepiece (tokenizer.model), the package tokenizers (tokenizer.json), or the
vocabulary in a GGUF file, from which one of those two is built.

What a trainer left in a file is not the user's wish: truncation, padding, dropout, and an end of text after every text.
With a tokenizer.json, its post-processor says what stands before a text, and add_bos_token says nothing, as in
transformers 5. In Meta's layout, as in Meta's code, text that looks like a special token is text; elsewhere it is one.
Where a folder has both files, tokenizer.model counts in Meta's layout and for the class LlamaTokenizer, and else
tokenizer.json: this is what gives the ids of transformers 5, and no optional package has a say in it.
"""

import functools
import json
import re
import sys

from sentencepiece import SentencePieceProcessor

from support.chat_template import (
    added_tokens,
    content,
    find_template,
    llama_2_turns,
    llama_2_warning,
    more_tokens,
    render,
    token_pattern,
)
from support.common import LoadError, first_bytes, import_optional, model_name, read_json, read_utf8
from support.gguf_file import CONTROL, NORMAL, USER_DEFINED, build_bpe, open_gguf, sentencepiece_proto
from support.weight_files import load_errors, locate

END_OF_TEXT = (  # tokens that end a text or a turn by what they are called, as in llama.cpp
    "</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|end|>", "<end_of_turn>",
    "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<end_of_utterance>", "<｜end▁of▁sentence｜>", "<|return|>",
    "<|call|>", "<|calls|>", "<|flush|>",
)  # fmt: skip
SPECIAL = {  # special tokens by their names in a chat template -> the same in GGUF, where one is misspelt
    "bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id", "pad_token": "padding_token_id", "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}  # fmt: skip
NO_PREFIX = b"\x1a\x02\x18\x00"  # after the bytes of a sentencepiece model: no space before a text


def load_tokenizer(path):
    """
    The tokenizer of the checkpoint at path: encode(text, bos=None) -> list of ids (bos None: as the checkpoint's own
    tokenizer does), decode(ids) -> str without special tokens, chat(messages) -> list of ids; bos_id (or None),
    eos_ids, the set of ids that end a text, and vocab_size. Raises LoadError; encode raises ValueError.
    """
    path = locate(path)
    with load_errors(path, "its tokenizer cannot be read"):
        if path.is_dir():
            return folder_tokenizer(path)
        return gguf_tokenizer(path)


def check_utf8(text):
    """Raise ValueError for half of a surrogate pair, which Python makes of bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"not UTF-8 text: {text[error.start]!r} at character {error.start}") from None


def is_tiktoken(file):
    return re.match(rb"[\w+/=]+ \d+\s", first_bytes(file)) is not None


class SentencePieceTokenizer:
    """
    LLaMA-2's tokenizer, from the bytes of a sentencepiece model; file: their origin, for errors.
    special        texts of special tokens by their names in a chat template
    stated, named  tokens outside the model, as in added_tokens; a token: content, special, lstrip, rstrip, single_word
    match          whether special and added tokens that are written out in a text are meant as such
    legacy         whether text after such a token begins with a space, as other text does; None: after the model's own
    """

    warning = None  # printed once, where a chat has no template

    def __init__(
        self, proto, file, eos_ids=(), template=None, special=(), stated=(), named=(), add_bos=True, match=True,
        legacy=None,
    ):  # fmt: skip
        if is_tiktoken(file):
            raise LoadError(f"{file}: Llama-3's tiktoken file: put Hugging Face's tokenizer.json beside it")
        with load_errors(file, "not a sentencepiece model"):
            self.processor = processor = SentencePieceProcessor(model_proto=proto)
        self.proto, self.template, self.add_bos, self.match, self.legacy = proto, template, add_bos, match, legacy
        self.n_pieces, self.special, self.stated = processor.vocab_size(), dict(special), dict(stated)
        ids = {processor.id_to_piece(i): i for i in range(self.n_pieces)}
        added = added_tokens(dict(stated), [*self.special.values(), *named], ids.get, self.n_pieces)
        for piece, i in ids.items():
            if processor.is_control(i) or processor.is_unknown(i):
                added.setdefault(i, dict(content=piece, special=True))
        self.ids = ids | {token["content"]: i for i, token in added.items()}
        own = dict(bos_token=processor.bos_id(), eos_token=processor.eos_id(), unk_token=processor.unk_id())
        for name, i in own.items():
            if i >= 0:  # -1: none
                self.special.setdefault(name, processor.id_to_piece(i))
        self.bos_id = self.ids.get(self.special.get("bos_token"))
        self.eos_ids = {*eos_ids, self.ids.get(self.special.get("eos_token")), own["eos_token"]} - {-1, None}
        self.vocab_size = max([self.n_pieces - 1, *added]) + 1
        self.texts = {i: token["content"] * (not token.get("special")) for i, token in added.items()}  # in decoded text
        self.matched = sorted(added, key=lambda i: -len(added[i]["content"]))  # of two that begin alike, the longer
        self.pattern = re.compile("|".join(token_pattern(**added[i]) for i in self.matched) or "(?!)")

    @functools.cached_property
    def inner(self):
        """The same for text that follows other text: encoding adds no space, and decoding drops none."""
        return SentencePieceProcessor(model_proto=self.proto + NO_PREFIX)

    def encode(self, text, bos=None, match=None):
        check_utf8(text)
        if bos is None:
            bos = self.add_bos
        ids, start, before = [], 0, None
        if bos and self.bos_id is not None:
            ids.append(self.bos_id)
        if match or self.match:
            for found in self.pattern.finditer(text):
                ids += self.encode_run(text[start : found.start()], before)
                start, before = found.end(), self.matched[found.lastindex - 1]
                ids.append(before)
        return ids + self.encode_run(text[start:], before)

    def encode_run(self, run, before):
        """The ids of text without special tokens, which stands after the token `before`, or None."""
        if self.legacy is None:
            begins = before is None or before < self.n_pieces
        else:
            begins = before is None or self.legacy and not run.startswith(" ")
        if begins:
            return self.processor.encode(run)
        return self.inner.encode(run)

    def decode(self, ids):
        text, run, processor = "", [], self.processor  # run: pieces that follow each other, and are decoded together
        for i in ids:
            if i not in self.texts and i < self.n_pieces:  # a model may have more rows than that
                run.append(i)
            elif self.texts.get(i):
                text += processor.decode(run) + self.texts[i]
                run, processor = [], self.inner
        return text + processor.decode(run)

    def chat(self, messages):
        if self.template:
            return self.encode(render(self.template, messages, **self.special), bos=False, match=True)
        if self.warning:
            print(self.warning, file=sys.stderr)
            self.warning = None
        ids = []
        for text, ends in llama_2_turns(messages):
            ids += self.encode(text, bos=True) + [self.processor.eos_id()] * ends
        return ids


class BPETokenizer:
    """A Tokenizer of the package tokenizers; file, eos_ids, ... named: as for SentencePieceTokenizer."""

    def __init__(self, tokenizer, file, eos_ids=(), template=None, special=(), stated=(), named=()):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        self.tokenizer, self.template, self.special = tokenizer, template, dict(special)
        known = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
        named = [*self.special.values(), *named]
        added = added_tokens(dict(stated), named, tokenizer.token_to_id, tokenizer.get_vocab_size())
        for i, token in sorted(added.items()):
            if token["content"] not in known or token.get("special") and not known[token["content"]]:
                tokenizer.add_tokens([import_optional("tokenizers", file).AddedToken(**token)])
            if tokenizer.token_to_id(token["content"]) != i:
                raise LoadError(f"{file}: it cannot give token {token['content']!r} the id {i} of a file beside it")
        probe = tokenizer.encode("a")  # of which its post-processor makes more
        self.begin = probe.ids[: probe.special_tokens_mask.index(0)]
        self.bos_id = tokenizer.token_to_id(self.special.get("bos_token", ""))
        if self.bos_id is None and self.begin:
            self.bos_id = self.begin[0]
        self.eos_ids = {*eos_ids, tokenizer.token_to_id(self.special.get("eos_token", ""))} - {None}
        if not self.eos_ids:  # in Meta's layout no file names one
            self.eos_ids = {tokenizer.token_to_id(text) for text in known if text in END_OF_TEXT}
        self.vocab_size = tokenizer.get_vocab_size()

    def encode(self, text, bos=None):
        check_utf8(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if bos is None:
            return self.begin + ids
        if bos and self.bos_id is not None:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids):
        return self.tokenizer.decode(list(ids))

    def chat(self, messages):
        if not self.template:
            raise LoadError("this checkpoint has no chat template: omit --chat")
        return self.encode(render(self.template, messages, **self.special), bos=False)


def tokenizer_folder(folder):
    """Where the tokenizer is: beside the weights or, where Meta's own download puts it, in the folder above."""
    folders = [folder]
    if (folder / "params.json").exists():
        folders += [folder.absolute().parent, folder.resolve().parent]  # the second, if the folder is a link
    found = [each for each in folders if (each / "tokenizer.json").exists() or (each / "tokenizer.model").exists()]
    for each in found:
        if (each / "tokenizer.json").exists() or not is_tiktoken(each / "tokenizer.model"):
            return each
    if found:
        return found[0]
    where = " or in ".join(["beside the weights", *map(str, dict.fromkeys(folders[1:]))])
    raise LoadError(f"{folder}: no tokenizer: expected tokenizer.model or tokenizer.json {where}")


def folder_tokenizer(folder):
    """The tokenizer in Meta's and Hugging Face's layout, from all the files that say something of it."""
    own, config = tokenizer_folder(folder), read_optional(folder / "config.json")
    for file in folder / "generation_config.json", own / "generation_config.json", folder / "config.json":
        eos_ids = read_optional(file).get("eos_token_id", [])
        if not isinstance(eos_ids, list):
            eos_ids = [eos_ids]
        if any(type(i) is not int for i in eos_ids):
            raise LoadError(f"{file}: eos_token_id is {eos_ids!r:.40}, expected the id of a token or a list of ids")
        if eos_ids:  # the first file that says any counts, as in transformers
            break
    config |= read_optional(own / "tokenizer_config.json")
    named, older = more_tokens(config), read_optional(own / "special_tokens_map.json")
    if "added_tokens_decoder" in config:  # all tokens are in the newest file, which counts then, as in transformers
        config = older | config
    else:
        config = config | older
    special = {name: content(config[name]) for name in SPECIAL if config.get(name)}
    bpe, proto = own / "tokenizer.json", own / "tokenizer.model"
    parts, stated = read_optional(bpe), config.get("added_tokens_decoder")
    if stated is None:
        marked, ids = more_tokens(older), read_optional(own / "added_tokens.json")
        stated = {i: dict(content=text, special=text in marked) for text, i in ids.items()}
        stated |= {token["id"]: token for token in parts.get("added_tokens", ())}
    template = find_template(own, config.get("chat_template"))
    known = dict(eos_ids=eos_ids, template=template, special=special, stated=stated, named=named)
    is_llama = "Llama" in config.get("tokenizer_class", "")
    meta = (folder / "params.json").exists() and not (own / "tokenizer_config.json").exists()
    if parts and (not proto.exists() or not (is_llama or meta) or is_tiktoken(proto)):
        with load_errors(bpe, "not a tokenizer"):
            tokenizer = import_optional("tokenizers", bpe).Tokenizer.from_str(read_utf8(bpe))
        return BPETokenizer(tokenizer, bpe, **known)
    legacy, add_bos = config.get("legacy"), config.get("add_bos_token", True)
    if legacy is None and is_llama:
        legacy = False
    if parts and is_llama:
        add_bos = json.dumps(special.get("bos_token", "<s>")) in json.dumps(parts.get("post_processor"))
    no_prefix = NO_PREFIX * (config.get("add_prefix_space") is False)
    flags = dict(add_bos=add_bos, match=not meta, legacy=legacy)
    tokenizer = SentencePieceTokenizer(proto.read_bytes() + no_prefix, proto, **known, **flags)
    if read_optional(folder / "params.json").get("vocab_size") != -1:  # as in Meta's own
        tokenizer.warning = llama_2_warning(folder, f"{model_name(folder)} {config.get('_name_or_path')}")
    return tokenizer


def read_optional(file):
    """The JSON object in a file without what is null; {} where there is no file."""
    config = read_json(file) if file.exists() else {}
    return {key: value for key, value in config.items() if value is not None}


def gguf_tokenizer(path):
    """The tokenizer in a GGUF file: BPE ("gpt2") or sentencepiece ("llama")."""
    _, value = open_gguf(path)

    def key(name, default=None):
        return value("tokenizer.ggml." + name, default)

    pieces, kind = key("tokens"), key("model")
    if kind not in ("gpt2", "llama") or not pieces:
        raise LoadError(f"{path}: tokenizer {kind!r} is not supported, only gpt2 (BPE) and llama (sentencepiece) are")
    kinds = key("token_type") or [NORMAL] * len(pieces)
    named = value("tokenizer.chat_templates") or ()
    templates = {name: value(f"tokenizer.chat_template.{name}") for name in named}
    template = value("tokenizer.chat_template") or templates or None
    special = {name: pieces[key(ids)] for name, ids in SPECIAL.items() if key(ids) in range(len(pieces))}
    eos_ids = {key("eos_token_id"), key("eot_token_id"), key("eom_token_id")} - {None}
    for i, piece in enumerate(pieces):
        if piece in END_OF_TEXT:
            eos_ids.add(i)
            kinds[i] = CONTROL  # whatever a converter has made of it
    if kind == "llama":
        ids = key("unknown_token_id", 0), key("bos_token_id", -1), key("eos_token_id", -1)
        proto = sentencepiece_proto(pieces, key("scores"), kinds, *ids, key("add_space_prefix", True))
        added = {i: dict(content=piece) for i, piece in enumerate(pieces) if kinds[i] == USER_DEFINED}
        known = dict(stated=added, add_bos=key("add_bos_token", True))
        tokenizer = SentencePieceTokenizer(proto, path, eos_ids, template, special, **known)
        tokenizer.warning = llama_2_warning(path, f"{model_name(path)} {value('general.name')}")
        return tokenizer
    bos = None
    if key("add_bos_token", key("pre") == "llama-bpe"):  # where the file does not say it, as llama.cpp does
        bos = special.get("bos_token")
    tokenizer = build_bpe(path, pieces, kinds, key("merges"), key("pre"), bos)
    return BPETokenizer(tokenizer, path, eos_ids, template, special)


class TextStream:
    """Text of a growing list of ids, piece by piece. A piece is "" while the bytes of a character are not all there."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer = tokenizer
        self.ids = list(prompt[-8:])  # whether a word begins with a space depends on what stands before it
        self.start, self.read = 0, len(self.ids)

    def add(self, token):
        """The text that is certain now that `token` has come."""
        self.ids.append(token)
        return self.rest(certain=True)

    def rest(self, certain=False):
        """The text not given yet; at the end, what is left of an unfinished character too."""
        before = self.tokenizer.decode(self.ids[self.start : self.read])
        text = self.tokenizer.decode(self.ids[self.start :])
        if certain and text.endswith("\ufffd"):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return text[len(before) :]
