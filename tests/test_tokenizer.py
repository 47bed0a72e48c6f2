"""Every tokenizer gives the ids of the original it was made from."""

import json
import shutil
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from test_golden import GOLDEN

from support.chat_template import llama_2_turns, render
from support.common import LoadError
from support.gguf_file import sentencepiece_proto
from support.tokenizer import SentencePieceTokenizer, load_tokenizer

ORIGINAL = SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer.model"))
LINES = (GOLDEN / "text.txt").read_text(encoding="utf-8").splitlines() + [
    "1234567 3.14159 2024-11-23", "🙂🚀👩‍👩‍👧 ☕️", "   leading   spaces\t tabs", "don't WE'LL I'm", "a\n\nb\n \nc", " ",
    "", "x = [i**2 for i in range(10)]  # squares", "٣٤٥ ½ ² Ⅷ …—“quotes”",
]  # fmt: skip


def gguf(name):
    pytest.importorskip("gguf", reason="the tokenizer inside a GGUF file needs the package gguf")
    return load_tokenizer(GOLDEN / name)


def test_sentencepiece_adds_the_beginning_of_text_as_llama_2_does():
    tokenizer = load_tokenizer(GOLDEN / "hf-gqa")
    for line in LINES:
        assert tokenizer.encode(line) == [1] + ORIGINAL.encode(line)
        assert tokenizer.encode(line, bos=False) == ORIGINAL.encode(line)
        assert tokenizer.decode(tokenizer.encode(line) + [2]) == ORIGINAL.decode(ORIGINAL.encode(line))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, {2}, 380)


def test_the_sentencepiece_model_in_a_gguf_file_gives_the_ids_of_sentencepiece():
    tokenizer = gguf("gqa-f16.gguf")
    for line in LINES:
        assert tokenizer.encode(line, bos=False) == ORIGINAL.encode(line)
        assert tokenizer.decode(ORIGINAL.encode(line)) == ORIGINAL.decode(ORIGINAL.encode(line))
    assert tokenizer.encode("a")[0] == tokenizer.bos_id == 1 and tokenizer.eos_ids == {2}


@given(st.text(max_size=30))
def test_a_rebuilt_sentencepiece_model_is_the_original(text):
    """Pieces, scores and types are all of it: for LLaMA's normalisation, which is none."""
    pieces, scores, kinds = [], [], []
    for i in range(ORIGINAL.vocab_size()):
        pieces.append(ORIGINAL.id_to_piece(i))
        scores.append(ORIGINAL.get_score(i))
        kinds.append(2 * ORIGINAL.is_unknown(i) or 3 * ORIGINAL.is_control(i) or 6 * ORIGINAL.is_byte(i) or 1)
    rebuilt = SentencePieceTokenizer(sentencepiece_proto(pieces, scores, kinds, 0, 1, 2, True), "test")
    assert rebuilt.encode(text, bos=False) == ORIGINAL.encode(text)


def test_the_bpe_in_a_gguf_file_gives_the_ids_of_tokenizer_json():
    """SmolLM2's kind: digits one by one, then bytes; no beginning of text."""
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers")
    inside, original = gguf("gqa-q8_0.gguf"), load_tokenizer(GOLDEN / "hf-theta")
    for line in LINES:
        assert inside.encode(line) == original.encode(line)
        assert inside.decode(inside.encode(line)) == line
    assert inside.eos_ids == original.eos_ids == {0, 2} and inside.bos_id == original.bos_id == 1
    assert len(inside.encode("2024")) == 4 and inside.encode("x", bos=True)[0] == 1
    assert inside.decode([1, 2]) == ""


def test_chat_is_the_checkpoints_own_template_with_its_control_tokens():
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers")
    tokenizer = gguf("gqa-q8_0.gguf")
    ids = tokenizer.chat([dict(role="user", content="Hi")])
    assert ids == [1, *tokenizer.encode("user\nHi"), 2, *tokenizer.encode("\n"), 1, *tokenizer.encode("assistant\n")]


def test_llama_2_chats_as_meta_wrote_it():
    """https://github.com/meta-llama/llama: [INST] and <<SYS>>, each turn between beginning and end of text."""
    tokenizer = load_tokenizer(GOLDEN / "hf-gqa")
    turns = [
        dict(role="system", content="Be kind."),
        dict(role="user", content=" Hi "),
        dict(role="assistant", content="Ho"),
        dict(role="user", content="Why?"),
    ]
    first = "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n Hi [/INST] Ho "
    assert tokenizer.decode(tokenizer.chat(turns)) == tokenizer.decode(
        tokenizer.encode(first) + tokenizer.encode("[INST] Why? [/INST]")
    )
    assert tokenizer.chat(turns[1:2]) == tokenizer.encode("[INST] Hi [/INST]")
    assert tokenizer.chat(turns).count(2) == 1 and tokenizer.chat(turns).count(1) == 2


def test_a_template_is_rendered_in_a_sandbox():
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert render(template, [dict(content="x")], "<s>", "") == "<s>x"
    for template, message in [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ ''.__class__.__mro__ }}", "template failed"),
        ("{% for %}", "template failed"),
    ]:
        with pytest.raises(LoadError, match=message):
            render(template, [dict(content="x")], "", "")


def test_a_sentencepiece_model_with_a_template_of_its_own_knows_its_control_tokens(tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(GOLDEN / "hf-gqa", folder)
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=template, add_bos_token=False)))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat([dict(role="user", content="Hi")]) == [1, *ORIGINAL.encode("user: Hi"), 2]
    assert tokenizer.encode("Hi") == ORIGINAL.encode("Hi")


def test_an_id_past_the_vocabulary_is_no_text():
    """A model's embedding may have more rows than its tokenizer has tokens; a sampled one must not end the stream."""
    tokenizer = load_tokenizer(GOLDEN / "hf-gqa")
    ids = ORIGINAL.encode("Paris")
    assert tokenizer.decode([*ids, 380, 10**6]) == "Paris"


@pytest.mark.parametrize(
    "pre, stated, adds", [("llama-bpe", None, True), ("llama-bpe", False, False), ("smollm", None, False)]
)
def test_a_gguf_file_that_does_not_say_adds_the_beginning_of_text_as_llama_cpp_does(pre, stated, adds, tmp_path):
    assert load_tokenizer(write_gguf(tmp_path, pre, ["a c"], stated)).encode("ac") == [3] * adds + [2]


@pytest.mark.parametrize("merges", [None, ["a b"], ["no such words here"]])
def test_a_broken_tokenizer_in_a_gguf_file_is_an_error(merges, tmp_path):
    path = write_gguf(tmp_path, "smollm", merges)
    with pytest.raises(LoadError, match="x.gguf: its tokenizer cannot be read"):
        load_tokenizer(path)


def sentencepiece_gguf(path, *more):
    """golden/tokenizer.model in a GGUF file, with more (piece, kind), of which the score is low."""
    package = pytest.importorskip("gguf", reason="the tokenizer inside a GGUF file needs the package gguf")
    n, kinds = range(ORIGINAL.vocab_size()), [piece[1] for piece in more]
    own = [2 * ORIGINAL.is_unknown(i) or 3 * ORIGINAL.is_control(i) or 6 * ORIGINAL.is_byte(i) or 1 for i in n]
    writer = package.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([ORIGINAL.id_to_piece(i) for i in n] + [piece[0] for piece in more])
    writer.add_token_scores([ORIGINAL.get_score(i) for i in n] + [-1000.0] * len(more))
    writer.add_token_types(own + kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


LLAMA_CPP = json.loads((GOLDEN / "llama_cpp.json").read_text(encoding="utf-8"))
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


@pytest.mark.parametrize("added, ends, ids", LLAMA_CPP["added"])
def test_tokens_that_a_gguf_file_adds_give_the_ids_and_the_ends_of_llama_cpp(added, ends, ids, tmp_path):
    tokenizer = load_tokenizer(sentencepiece_gguf(tmp_path / "x.gguf", *added))
    assert tokenizer.eos_ids == {*ends}
    assert [tokenizer.encode(text) for text in LLAMA_CPP["texts"]] == ids


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
def test_a_token_that_ends_a_turn_does_so_whatever_a_gguf_file_calls_its_kind(kind, tmp_path):
    """By its text, as in llama.cpp, where it then is a control token too: it is found in a text, and is no text."""
    path = sentencepiece_gguf(tmp_path / "x.gguf", ("<|im_start|>", CONTROL), ("<|im_end|>", kind), ("<|end|>", kind))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_ids == {2, 381, 382}
    assert tokenizer.encode("a<|im_end|>", bos=False) == [*ORIGINAL.encode("a"), 381]
    assert tokenizer.decode([*ORIGINAL.encode("a"), 381]) == "a"


def test_user_defined_pieces_of_a_gguf_file_are_found_before_a_text_is_cut(tmp_path):
    """As in llama.cpp: no space is put before them, and one before the text after them; --out keeps them."""
    path = sentencepiece_gguf(tmp_path / "x.gguf", ("<|user|>", USER_DEFINED), ("\t\t", USER_DEFINED))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("<|user|>Paris") == [1, 380, *ORIGINAL.encode("Paris")]
    assert tokenizer.encode("x\t\ty", bos=False) == [*ORIGINAL.encode("x"), 381, *ORIGINAL.encode("y")]
    assert tokenizer.decode([1, 380, *ORIGINAL.encode("Paris")]) == "<|user|> Paris"


def write_gguf(folder, pre, merges, add_bos=None):
    package = pytest.importorskip("gguf", reason="the tokenizer inside a GGUF file needs the package gguf")
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers")
    writer = package.GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([b"a", b"c", b"ac", b"<begin>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_bos_token_id(3)
    if merges:
        writer.add_token_merges(merges)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "x.gguf"


# --- what files beside the tokenizer's own say ------------------------------------------------------------------------

INNER = SentencePieceProcessor(model_proto=ORIGINAL.serialized_model_proto() + b"\x1a\x02\x18\x00")  # no space before


def hf(folder, layout="hf-gqa", **files):
    """A golden checkpoint with JSON files of these names, underscores for what a file's name has, beside it."""
    shutil.copytree(GOLDEN / layout, folder)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def edited(folder, **changes):
    """hf-theta with these changes of its tokenizer.json, and no eos or bos beside it."""
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers")
    hf(folder, "hf-theta", tokenizer_config={})
    parts = json.loads((folder / "tokenizer.json").read_text())
    parts["model"] |= changes.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(parts | changes))
    return folder


def processor_of(*parts):
    """A tokenizer.json's post-processor: a text, "A", between special tokens."""
    ids = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    single = [{"Sequence" if part == "A" else "SpecialToken": dict(id=part, type_id=0)} for part in parts]
    pair = [*single, dict(Sequence=dict(id="B", type_id=0))]
    special = {text: dict(id=text, ids=[i], tokens=[text]) for text, i in ids.items()}
    return dict(type="TemplateProcessing", single=single, pair=pair, special_tokens=special)


TRUNCATION = dict(direction="Right", max_length=8, strategy="LongestFirst", stride=0)
PADDING = dict(strategy=dict(Fixed=32), direction="Left", pad_to_multiple_of=None) | dict(
    pad_id=2, pad_type_id=0, pad_token="<|im_end|>"
)
TRAINED = {
    "truncation": (dict(truncation=TRUNCATION), []),
    "padding": (dict(padding=PADDING), []),
    "both": (dict(truncation=TRUNCATION, padding=dict(PADDING, strategy="BatchLongest", pad_to_multiple_of=64)), []),
    "dropout": (dict(model=dict(dropout=0.9)), []),
    "an end after every text": (dict(post_processor=processor_of("A", "<|im_end|>")), []),
    "a beginning and an end": (dict(post_processor=processor_of("<|im_start|>", "A", "<|im_end|>")), [1]),
    "one token for both": (dict(post_processor=processor_of("<|endoftext|>", "A", "<|endoftext|>")), [0]),
}


@pytest.mark.parametrize("changes, begin", TRAINED.values(), ids=TRAINED)
def test_what_a_trainer_left_in_tokenizer_json_is_not_the_users_wish(changes, begin, tmp_path):
    tokenizer = load_tokenizer(edited(tmp_path / "m", **changes))
    plain = load_tokenizer(GOLDEN / "hf-theta")
    for text in "The quick brown fox jumps over the lazy dog, and then it runs on.", "Hi", "":
        assert tokenizer.encode(text) == begin + plain.encode(text)
        assert tokenizer.encode(text, bos=False) == plain.encode(text)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ADDED = {"<|im_end|>": 380, "<|im_start|>": 381, "<pad>": 382}


def token(text, **flags):
    return dict(content=text, lstrip=False, rstrip=False, normalized=False, single_word=False, special=True) | flags


FILES = {
    "added_tokens.json": dict(
        added_tokens=ADDED, tokenizer_config=dict(eos_token="<|im_end|>", pad_token="<pad>", chat_template=CHATML)
    ),
    "special_tokens_map.json": dict(
        added_tokens=ADDED, tokenizer_config=dict(chat_template=CHATML),
        special_tokens_map=dict(eos_token=token("<|im_end|>"), additional_special_tokens=["<|im_start|>", "<pad>"]),
    ),
    "added_tokens_decoder": dict(
        added_tokens={"<|im_end|>": 9}, special_tokens_map=dict(eos_token="<pad>"),  # which it takes the place of
        tokenizer_config=dict(
            chat_template=CHATML, eos_token=token("<|im_end|>"),
            added_tokens_decoder={str(i): token(text) for text, i in ADDED.items()},
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_special_tokens_outside_the_sentencepiece_model_are_known(files, tmp_path):
    """In a chat, in a text, in decoding and as the end, as for the LlamaTokenizer of transformers 5."""
    tokenizer = load_tokenizer(hf(tmp_path / "m", **files))
    ids = [381, *INNER.encode("user\nHi"), 380, *INNER.encode("\n")]
    assert tokenizer.chat([dict(role="user", content="Hi")]) == ids
    assert tokenizer.encode("a <pad> b") == [1, *ORIGINAL.encode("a "), 382, *INNER.encode(" b")]
    assert tokenizer.eos_ids == {2, 380} and tokenizer.vocab_size == 383
    start = "<|im_start|>" * ("pad_token" in str(files))  # which nothing there calls special
    assert tokenizer.decode([1, *ids, 382, 10**6]) == start + "user\nHi\n"


@pytest.mark.parametrize(
    "legacy, after_own, after_added",
    [(None, True, False), (True, True, True), (False, False, False)],
)
def test_whether_text_after_a_special_token_begins_with_a_space(legacy, after_own, after_added, tmp_path):
    config = {} if legacy is None else dict(legacy=legacy)
    tokenizer = load_tokenizer(hf(tmp_path / "m", added_tokens=ADDED, tokenizer_config=config))
    for text, special, begins in ("<s>user", 1, after_own), ("<|im_start|>user", 381, after_added):
        assert tokenizer.encode(text, bos=False) == [special, *(ORIGINAL if begins else INNER).encode("user")]


def test_how_an_added_token_is_matched(tmp_path):
    """lstrip and rstrip take the white space beside it, single_word wants none of a word there; the longest counts."""
    decoder = {
        380: token("<a>", lstrip=True),
        381: token("<b>", rstrip=True),
        382: token("go", single_word=True, special=False),
        383: token("<b>c"),
    }
    tokenizer = load_tokenizer(hf(tmp_path / "m", tokenizer_config=dict(added_tokens_decoder=decoder, legacy=False)))
    assert tokenizer.encode("x \n<a> y", bos=False) == [*ORIGINAL.encode("x"), 380, *INNER.encode(" y")]
    assert tokenizer.encode("x<b> \ny", bos=False) == [*ORIGINAL.encode("x"), 381, *INNER.encode("y")]
    assert tokenizer.encode("x<b>c", bos=False) == [*ORIGINAL.encode("x"), 383]
    assert tokenizer.encode("go gone", bos=False) == [382, *INNER.encode(" gone")]
    assert tokenizer.decode([*ORIGINAL.encode("x"), 382, 381, *ORIGINAL.encode("y")]) == "xgo y"


def test_a_text_means_special_tokens_except_in_metas_layout(tmp_path):
    for layout in "hf-gqa", "meta-gqa":
        ids = load_tokenizer(GOLDEN / layout).encode("a</s>", bos=False)
        assert ids == ([*ORIGINAL.encode("a"), 2] if layout == "hf-gqa" else ORIGINAL.encode("a</s>"))


def test_a_prefix_space_that_the_configuration_does_without(tmp_path):
    tokenizer = load_tokenizer(hf(tmp_path / "m", tokenizer_config=dict(add_prefix_space=False)))
    assert tokenizer.encode("Hi", bos=False) == INNER.encode("Hi") and tokenizer.decode(ORIGINAL.encode("Hi")) == " Hi"


def test_tokens_that_the_files_beside_tokenizer_json_add_to_it(tmp_path):
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers")
    config = dict(eos_token="<|end|>", added_tokens_decoder={381: token("<x>", special=False), 380: token("<|end|>")})
    tokenizer = load_tokenizer(hf(tmp_path / "m", "hf-theta", tokenizer_config=config | dict(pad_token="[PAD]")))
    ids = tokenizer.encode("<x>[PAD]<|end|>")
    assert ids == [381, 382, 380] and tokenizer.eos_ids == {0, 2, 380} and tokenizer.decode([*ids, 10**6]) == "<x>"
    config["added_tokens_decoder"] = {400: token("<|end|>")}
    with pytest.raises(LoadError, match="tokenizer.json: it cannot give token '<|end|>' the id 400"):
        load_tokenizer(hf(tmp_path / "gap", "hf-theta", tokenizer_config=config))


def test_ends_and_beginnings_that_only_special_tokens_map_json_names(tmp_path):
    for layout in "hf-gqa", "hf-theta":
        if layout == "hf-theta":
            pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers")
        names = dict(bos_token="<s>", eos_token=token("</s>"))
        if layout == "hf-theta":
            names = dict(bos_token="<|im_start|>", eos_token=token("<|im_end|>"))
        folder = hf(tmp_path / layout, layout, tokenizer_config=dict(chat_template="{{ bos_token }}{{ eos_token }}"))
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.bos_id == 1 and tokenizer.eos_ids == {2} and tokenizer.chat([]) == [1, 2]


def test_an_optional_package_never_changes_what_a_folder_gives(tmp_path, monkeypatch):
    """A folder with both files: for LlamaTokenizer the tokens that tokenizer.json adds count too, else it is needed."""
    parts = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    parts["added_tokens"].append(token("<|im_end|>", id=380))
    config = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", add_bos_token=True)
    folder = hf(tmp_path / "m", tokenizer=parts, tokenizer_config=config)
    parts["post_processor"] = None  # then nothing stands before a text, whatever add_bos_token says
    bare = hf(tmp_path / "bare", tokenizer=parts, tokenizer_config=config)
    other = hf(tmp_path / "other", tokenizer=parts)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer(folder).encode("a<|im_end|>b") == [1, *ORIGINAL.encode("a"), 380, *INNER.encode("b")]
    assert load_tokenizer(bare).encode("a") == ORIGINAL.encode("a")
    with pytest.raises(LoadError, match="other/tokenizer.json: needs the package tokenizers: pip"):
        load_tokenizer(other)


def test_the_ids_of_indented_text_are_sentencepieces():
    """transformers 5 ranks the merges of a tokenizer.model otherwise, and then cuts an indented return elsewhere."""
    tokenizer = load_tokenizer(GOLDEN / "hf-gqa")
    for text in "def f():\n    return 1", "a  b", "\tx\n\n   y   z":
        assert tokenizer.encode(text, bos=False) == ORIGINAL.encode(text)


def test_in_metas_layout_a_tokenizer_json_names_no_end_so_its_tokens_do(tmp_path):
    """Llama-3's, put beside Meta's weights: the beginning is the post-processor's."""
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers")
    folder = edited(tmp_path / "m", post_processor=processor_of("<|im_start|>", "A"))
    for name in "config.json", "generation_config.json":
        (folder / name).unlink()
    (folder / "params.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == {0, 2} and tokenizer.bos_id == 1 and tokenizer.encode("a")[0] == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers")
    folder = edited(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("x")
    expected = load_tokenizer(folder).chat([])
    for name in "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja":
        (folder / name).write_text((folder / name).read_text(), encoding="utf-8-sig")
    assert load_tokenizer(folder).chat([]) == expected


@pytest.mark.parametrize("layout", ["hf-gqa", "hf-theta"])
def test_half_a_surrogate_pair_is_not_utf_8(layout):
    if layout == "hf-theta":
        pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers")
    with pytest.raises(ValueError, match=r"^not UTF-8 text: '\\udce9' at character 3$"):
        load_tokenizer(GOLDEN / layout).encode("caf\udce9")


# --- chat templates ---------------------------------------------------------------------------------------------------

TURNS = [dict(role="user", content="Grüße <b>'x'</b>"), dict(role="assistant", content="Ho")]
RENDERED = {  # template -> what transformers makes of TURNS
    "{% generation %}x{% endgeneration %}y": "xy",
    "{% for m in messages %}{%- generation -%} {{ m.role }} {%- endgeneration -%}{% endfor %}": "userassistant",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}": "21",
    "{% if tools is not none %}T{% endif %}{% if documents is none and tools is defined %}D{% endif %}": "D",
    "{{ messages[0] | tojson }}": '{"role": "user", "content": "Grüße <b>\'x\'</b>"}',
    "{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=True, sort_keys=True) }}": '{"a": "\\u00e9", "b": 1}',
    "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':')) }}": '{"b":1,"a":2}',
    "{{ {'a': [none, 1.5]} | tojson(indent=1) }}": '{\n "a": [\n  null,\n  1.5\n ]\n}',
    "{{ pad_token }}{{ unk_token }}{{ sep_token is defined }}{{ bos_token is defined }}{{ eos_token }}":
        "<>?FalseFalse",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}": "Ho",
}


@pytest.mark.parametrize("template, text", RENDERED.items())
def test_a_template_has_the_environment_that_transformers_gives_it(template, text):
    assert render(template, TURNS, pad_token="<>", unk_token="?", sep_token=None) == text


def test_a_template_may_ask_for_the_day():
    guarded = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}"
    before = time.strftime("%d %b %Y")
    assert render(guarded, []) in (before, time.strftime("%d %b %Y"))  # midnight may lie between


def test_templates_with_names(tmp_path):
    """A list, or files, which count first; without a default one they are named."""
    named = [dict(name="rag", template="R"), dict(name="default", template="D")]
    folder = hf(tmp_path / "m", tokenizer_config=dict(chat_template=named))
    assert load_tokenizer(folder).chat([]) == ORIGINAL.encode("D")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    with pytest.raises(LoadError, match="templates are named tool_use, and none default: copy .*chat_template.jinja"):
        load_tokenizer(folder).chat([])
    (folder / "chat_template.jinja").write_text("F")
    assert load_tokenizer(folder).chat([]) == ORIGINAL.encode("F")


@pytest.mark.parametrize(
    "layout, name, config, warns",
    [
        ("hf-gqa", "vicuna-7b-v1.5", {}, True),
        ("hf-gqa", "Llama-2-7b-chat-hf", {}, False),
        ("hf-gqa", "mine", dict(_name_or_path="meta-llama/Llama-2-7b-chat-hf"), False),
        ("hf-gqa", "mine", dict(_name_or_path="huggyllama/llama-7b"), True),
        ("meta-gqa", "mine", {}, False),
        ("hf-gqa", "own", dict(chat_template="x"), False),
    ],
)
def test_llama_2s_chat_format_on_another_model_is_told_once(layout, name, config, warns, tmp_path, capsys):
    shutil.copytree(GOLDEN / layout, tmp_path / name)
    if layout == "hf-gqa":
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / name)
    tokenizer.chat(TURNS)
    tokenizer.chat(TURNS)
    err = capsys.readouterr().err
    assert err.count("no chat template: LLaMA-2's format is used") == err.count("\n") == warns


def test_a_template_cannot_change_the_conversation_and_leaves_no_blanks_of_its_tags():
    """As transformers renders it: in an immutable sandbox; white space before a tag that begins a line is not text."""
    messages = [dict(role="user", content="x")]
    with pytest.raises(LoadError, match="template failed"):
        render("{% set _ = messages.append(messages[0]) %}", messages)
    assert render("a\n  {% if messages %}\nb\n  {% endif %}", messages) == "a\nb\n" and len(messages) == 1


def test_an_answer_in_llama_2s_format_has_one_space_at_either_side():
    """However many the text that was generated, and comes back, had."""
    turns = dict(role="user", content="Hi"), dict(role="assistant", content="  Ho\n")
    assert llama_2_turns(turns) == [("[INST] Hi [/INST] Ho ", True)]


def test_null_says_nothing(tmp_path):
    """As in files that Hugging Face's own scripts have written, whatever the name."""
    null = dict.fromkeys(["eos_token_id", "eos_token", "added_tokens_decoder", "chat_template", "legacy"])
    folder = hf(tmp_path / "m", generation_config=null, tokenizer_config=null, special_tokens_map=null)
    tokenizer, plain = load_tokenizer(folder), load_tokenizer(GOLDEN / "hf-gqa")
    assert tokenizer.eos_ids == plain.eos_ids and tokenizer.encode("a</s>b") == plain.encode("a</s>b")
