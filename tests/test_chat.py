"""chat.py: a conversation says what fresh runs over the whole of it would say, and survives what its user types."""

import io
import os
import pty
import subprocess
from functools import partial

import pytest
from test_golden import GOLDEN
from tiny import Bytes, start, tiny_model

from generate import generate, parse_args
from generate import start as begin
from model import dense
from support import chat
from support.show import Generation

CKPT = GOLDEN / "hf-gqa"
FLAGS = ["--chat", "--max-new-tokens", "6", "--policy", "dense"]


@pytest.fixture
def talk(monkeypatch, capsys, model):
    """talk(lines, *flags, model=...) -> what converse() prints on standard output and standard error."""

    def call(lines, *flags, model=model):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        options = parse_args([*FLAGS, *flags])
        answers = partial(begin, options, model, Bytes(), "dense", dense)
        assert chat.converse(model, Bytes(), options, "tiny, dense", answers) == 0
        return capsys.readouterr()

    return call


def fresh(model, lines, system=()):
    """The transcript of dense runs over the whole conversation, each with a cache of its own."""
    messages, out = list(system), ""
    for line in lines:
        messages.append(dict(role="user", content=line))
        ids = Bytes().chat(messages)
        text = bytes(i for i in generate(model, ids, 6, eos_ids={0}) if i).decode(errors="replace")
        messages.append(dict(role="assistant", content=text))
        out += f"> {line}\n{text}\n"
    return out


def test_each_answer_is_that_of_a_run_over_the_whole_conversation(talk, model):
    lines = ["hello", "and then?", "who are you?"]
    said = talk(lines)
    assert said.out == fresh(model, lines) + "\n"
    assert said.err.splitlines()[0].endswith(f"dense: {chat.COMMANDS}]") and said.err.count("[dense: 6 tokens") == 3


def test_only_what_is_new_is_forwarded_and_the_cache_grows_with_the_conversation(talk, monkeypatch):
    passes, lines = [], ["a" * 700, "b" * 20, "c" * 150]
    made, real = [], chat.Conversation.make_room

    def make_room(self, ids, room):
        real(self, ids, room)
        made.append((len(ids), self.cache.max_seq_len))

    monkeypatch.setattr(chat.Conversation, "make_room", make_room)
    big = tiny_model(n_layers=6, vocab_size=128, max_seq_len=4096)
    big.tok_embeddings.register_forward_hook(lambda module, args, out: passes.append(out.size(1)))
    talk(lines + ["d" * 400], model=big)
    prompts = [n for n in passes if n > 1]
    assert prompts[0] == made[0][0] and prompts[1] < 60 and prompts[2] < 190
    assert [size for _, size in made] == [1024, 1024, 1024, 2 * (made[3][0] + 6)]


def test_exit_ends_the_conversation(talk):
    said = talk(["hello", "/exit", "hello"]).err
    assert said.count("[dense: 6 tokens") == 1


def test_a_reset_forgets_all_but_the_system_text(talk, model):
    system = [dict(role="system", content="Be brief.")]
    said = talk(["hello", "/reset", "hello"], "--system", "Be brief.")
    once = fresh(model, ["hello"], system)
    assert said.out == f"{once}> /reset\n{once}\n" and once != fresh(model, ["hello"])


def test_an_unknown_command_is_named_and_says_nothing_to_the_model(talk):
    said = talk(["/what now", "hello"])
    assert said.err.splitlines()[1] == f"[no command /what: {chat.COMMANDS}]"
    assert said.err.count("[dense: 6 tokens") == 1


def test_a_full_context_is_one_line_that_names_reset(talk):
    small = tiny_model(n_layers=2, vocab_size=128, max_seq_len=24)
    full = "[the conversation fills the model's context of 24 tokens: /reset begins another]"
    said = talk(["hello you", "more", "/reset", "hi"], model=small)  # "[user] hello you\n" has 17 tokens
    lines = said.err.splitlines()[1:]
    starts = ["[dense: 6 tokens", full[:16], "[begun anew]", "[dense: 6 tokens"]
    assert [line[:16] for line in lines] == starts and lines[1] == full
    said = talk(["hello you all"], model=small)  # 21, and there is room for three more and the one after
    assert "[dense: 4 tokens" in said.err and said.err.splitlines()[-1] == full


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(talk, model, monkeypatch):
    """As if the answer had ended there; a message whose answer had not begun is forgotten."""
    calls, seen = [], []

    def interrupted(self, real=Generation.advance):
        calls.append(self)
        if len(calls) in (4, 5):
            raise KeyboardInterrupt
        return real(self)

    def recorded(self, messages, real=Bytes.chat):
        seen.append([message["content"] for message in messages])
        return real(self, messages)

    monkeypatch.setattr(Generation, "advance", interrupted)
    monkeypatch.setattr(Bytes, "chat", recorded)
    said = talk(["hello", "unheard", "more"])
    cut = calls[0].text()
    assert len(calls[0].ids[0]) == 3 and seen[2:] == [["hello", cut, "unheard"], ["hello", cut, "more"]]
    roles = "user", "assistant", "user"
    ids = Bytes().chat([dict(role=role, content=text) for role, text in zip(roles, seen[-1])])
    assert calls[-1].ids[0] == list(generate(model, ids, 6)) and "Traceback" not in said.err


def test_a_pass_that_was_interrupted_leaves_nothing_in_the_cache(model):
    """A policy that writes only some entries would otherwise keep those of the pass before it."""
    options = parse_args(FLAGS)

    def interrupted(layers, x, step):
        for layer in layers[:3]:
            x = layer(x, step)
        raise KeyboardInterrupt

    answers = partial(begin, options, model, Bytes(), "mine", interrupted)
    conversation = chat.Conversation(model, Bytes(), options, answers)
    conversation.answer("hello")
    assert conversation.cache.length == 0 and conversation.messages == conversation.held == []
    assert not conversation.cache.written.any() and not conversation.cache.k.any() and not conversation.cache.v.any()


def test_on_a_terminal_it_asks_and_ends_with_ctrl_d():
    leader, follower = pty.openpty()
    process = start("generate.py", "--ckpt", CKPT, *FLAGS, stdin=follower, stdout=follower, stderr=subprocess.PIPE)
    os.close(follower)
    os.write(leader, b"hello\n")
    shown = b""
    while shown.count(b"> ") < 2:
        shown += os.read(leader, 1000)
    os.write(leader, b"\x04")
    _, said = process.communicate()
    os.close(leader)
    assert process.returncode == 0 and b"[dense: " in said and b"Traceback" not in said


def test_flags_that_do_not_fit_are_one_line(capsys):
    for flags, message in (["--raw", "--system", "x", "y"], "--raw continues"), (["--chat", "--json"], "need a prompt"):
        with pytest.raises(SystemExit):
            parse_args(flags)
        assert message in capsys.readouterr().err
