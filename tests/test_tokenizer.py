"""Every tokenizer gives the ids of the original it was made from."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from test_golden import GOLDEN

from common import LoadError
from tokenizer import SentencePieceTokenizer, load_tokenizer, render, sentencepiece_proto

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
