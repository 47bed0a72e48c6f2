"""show.py: what is on the screen while texts are written, on a terminal and elsewhere."""

import fcntl
import importlib.util
import io
import os
import pty
import re
import struct
import subprocess
import termios
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_golden import GOLDEN
from tiny import Bytes, new_cache, random_ids, start

from generate import main, parse_args
from generate import start as begin
from model import dense
from skip import FFNSkip
from support import show

CKPT = str(GOLDEN / "hf-gqa")
SKIP = ["--policy", "ffnskip", "--cold-s", "0", "--cold-e", "2", "--sim-threshold", "0.5", "--warm-up-index", "1"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def two():
    return [SimpleNamespace(name=name, pieces=[[]], text=lambda: "later") for name in ("dense", "mine")]


def test_on_a_pipe_the_first_text_streams_and_the_other_follows(capsys):
    first, other = generations = two()
    seen = []
    with show.screen(generations) as draw:
        for piece in "a", "b", "c":
            first.pieces[0].append(piece)
            other.pieces[0].append("x")
            draw()
            seen.append(capsys.readouterr().out)
    assert seen == ["[dense]\na", "b", "c"] and capsys.readouterr().out == "\n\n[mine]\nlater\n"


def test_without_rich_a_terminal_shows_what_a_pipe_does(monkeypatch):
    for terminal, packages, expected in (True, None, "below"), (False, "rich", "below"), (True, "rich", "side"):
        monkeypatch.setattr("sys.stdout", Terminal() if terminal else io.StringIO())
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: packages)
        monkeypatch.setattr(show, "side_by_side", lambda generations: "side")
        monkeypatch.setattr(show, "below_each_other", lambda generations: "below")
        assert show.screen(two()) == expected


def run_on_a_terminal(*args, columns=80):
    """All that generate.py writes on a terminal, as bytes."""
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = dict(TERM="xterm", COLUMNS="", LINES="", TTY_COMPATIBLE="1")
    process = start("generate.py", "--ckpt", CKPT, *args, stdout=follower, stderr=follower, env=env)
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 100000)
        except OSError:  # it has ended
            break
    os.close(leader)
    assert process.wait() == 0, shown
    return shown


def test_on_a_terminal_both_texts_are_live_columns_after_a_bar(capsys):
    pytest.importorskip("rich", reason="two columns need the package rich")
    args = [*SKIP, "--max-new-tokens", "30", "--compare", "The capital"]
    shown = run_on_a_terminal(*args).decode(errors="replace")
    bar, *tables = shown.split("┏")
    assert "loading: " in bar and "weights: " in bar and len(tables) > 1  # drawn before the end, too
    last = re.sub(r"\x1b\[[\d;]*m", "", tables[-1])
    assert len(last.split("\r\n")[0]) == 78  # and its left corner: two columns alike
    assert re.search(r"dense +┃ ffnskip", last) and len(re.findall(r"[\d.]+ tokens/s, [\d.]+% skipped", last)) == 2
    assert "[ffnskip: 30 tokens, " in last and "[first difference: " in last
    assert main(["--ckpt", CKPT, *args]) == 0
    texts = re.fullmatch(r"\[dense\]\n(.*)\n\n\[ffnskip\]\n(.*)\n", capsys.readouterr().out, re.DOTALL).groups()
    rows = [line.split("│")[1:3] for line in last.split("\r\n") if line.startswith("│")]
    for column, text in zip(zip(*rows), texts):
        assert re.sub(r"\W", "", "".join(column)) == re.sub(r"\W", "", text)


def test_a_pipe_has_no_bars():
    args = ["--ckpt", CKPT, *SKIP, "--max-new-tokens", "3", "Once", "Twice"]
    process = start("generate.py", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate()
    assert process.returncode == 0 and said.startswith("[ffnskip: ") and said.count("\n") == 1 and "\r" not in said


def test_a_table_keeps_the_last_lines_that_fit():
    console = pytest.importorskip("rich.console", reason="two columns need the package rich").Console
    generation = SimpleNamespace(name="dense", decode_speed=lambda: None, skipped=lambda: 0.0)
    generation.text = lambda: " ".join(f"word{i}" for i in range(100))
    out = console(file=io.StringIO(), width=60)
    out.print(show.columns(out, [generation, generation], n_lines=3))
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 8 and "word99" in lines[-2] and "word0 " not in out.file.getvalue()


def test_the_live_share_and_speed_are_those_of_the_report(model):
    generation = begin(parse_args(["x"]), model, Bytes(), "ffnskip", FFNSkip(0, 6, 0.7, 3), [random_ids(5)])
    assert generation.skipped() == 0 and generation.decode_speed() is None
    for _ in range(12):
        generation.advance()
    report = generation.report()
    assert generation.skipped() == pytest.approx(report["ffn_saved_ratio"]) and report["ffn_saved_ratio"] > 0
    assert generation.decode_speed() == report["decode_tokens_per_s"] == 11 / sum(generation.times[1:])


@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_picture_has_a_dot_per_block_that_was_skipped_and_fits_its_columns(n_layers, n_tokens, random):
    ran = torch.tensor([[random.random() < 0.5 for _ in range(n_tokens)] for _ in range(n_layers)])
    lines = list(show.blocks_picture(ran, columns=3))
    assert len(lines) == -(-n_layers // 4) and {len(line) for line in lines} == {min(3, -(-n_tokens // 2))}
    bit = {(0, 0): 0, (1, 0): 1, (2, 0): 2, (0, 1): 3, (1, 1): 4, (2, 1): 5, (3, 0): 6, (3, 1): 7}
    for layer in range(n_layers):
        for token in range(min(n_tokens, 6)):
            from_top = n_layers - 1 - layer
            char = ord(lines[from_top // 4][token // 2]) - 0x2800
            assert (char >> bit[from_top % 4, token % 2] & 1) == (not ran[layer, token])


@pytest.mark.parametrize("unread", [0.0, 0.253])
@pytest.mark.parametrize("skipped, planned", [(0.0, None), (None, None), (0.101, 0.1), (0.101, None)])
def test_the_lines_that_sum_up_fit_a_hundred_columns(skipped, planned, unread):
    report = dict(policy="checkerboard", new_tokens=2048, decode_tokens_per_s=123.4, ffn_skip_ratio=skipped,
                  ffn_saved_ratio=0.0 if not skipped else 0.0912, planned_skip_ratio=planned,
                  prompt_ffn_skip_ratio=None, ffn_unread=None if skipped is None else unread or skipped)  # fmt: skip
    line = show.summary(report)
    assert len(line) <= 100 and line.startswith("[checkerboard: 2048 tokens, 123.4 tokens/s")
    in_part = skipped is not None and unread > 0
    assert ("25.3% of FFN weights not read" in line) == in_part
    if not in_part:
        assert ("skipped 10.1%" in line) == bool(skipped) and ("(planned 10.0%)" in line) == bool(planned)
    for speedup in 0.99, 1.2:
        lines = show.comparison_summary(dict(first_difference=1049, speedup=speedup, speedup_bound=1.19)).split("\n")
        assert max(map(len, lines)) <= 100 and len(lines) == 1 + (speedup < 1)


def finished(model, policy, prompts, *flags):
    generation = begin(parse_args(["x", "--max-new-tokens", "12", *flags]), model, Bytes(), "mine", policy, prompts)
    while generation.advance():
        pass
    return generation


def test_a_block_is_saved_where_no_row_of_a_step_runs_it(model):
    """The bytes of a block are read if one row needs it, so that rows that disagree save less than either alone."""
    policy, prompts = FFNSkip(0, 6, 0.9, warm_up_index=-1, k=1), [random_ids(5, seed) for seed in range(4)]
    together = finished(model, policy, prompts).report()
    alone = [finished(model, policy, [prompt]).report() for prompt in prompts]
    assert alone[0]["blocks_saved"] == pytest.approx(alone[0]["ffn_saved_ratio"])
    assert 0 < together["blocks_saved"] < min(report["blocks_saved"] for report in alone)


def test_prompt_and_decoding_are_told_apart(model):
    """With --skip-prompt the prompt counts as generated: its share is one number, that of decoding another."""
    policy, prompt = FFNSkip(0, 6, 0.7, warm_up_index=-1), random_ids(40)
    plain, both = finished(model, policy, [prompt]), finished(model, policy, [prompt], "--skip-prompt")
    ran = both.trace.ran[:, 0]
    report = both.report()
    assert plain.report()["prompt_ffn_skip_ratio"] is None
    assert report["prompt_ffn_skip_ratio"] == pytest.approx((~ran[:, :40]).float().mean().item())
    assert report["ffn_saved_ratio"] == pytest.approx((~ran[:, 40:]).float().mean().item())
    assert "in the prompt" in show.summary(report) and "in the prompt" not in show.summary(plain.report())


def test_a_long_prompt_has_a_bar_of_layers_which_changes_nothing(model, monkeypatch):
    pytest.importorskip("tqdm", reason="bars need the package tqdm")
    monkeypatch.setattr(show, "PATIENCE", 0)
    tokens = torch.tensor([random_ids(9)])
    logits = model(tokens)
    for stream, shown in (Terminal(), True), (io.StringIO(), False):
        monkeypatch.setattr("sys.stderr", stream)
        with show.layer_bar(model, "reading"):
            assert torch.equal(model(tokens), logits)
        assert ("reading: " in stream.getvalue()) == shown
    assert not any(layer.attention._forward_hooks for layer in model.layers)


def test_what_is_drawn_is_not_timed(model, monkeypatch):
    """The clock of a generation stands still while the screen is drawn."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def policy(layers, x, step):
        clock[0] += 1
        return dense(layers, x, step)

    def draw():
        clock[0] += 100

    ids, cache = random_ids(5), new_cache(model, 1)
    model(torch.tensor([ids[:2]]), cache)
    generation = begin(parse_args(["x"]), model, Bytes(), "dense", policy, [ids], cache)
    assert show.write([generation], nullcontext(draw), range(4)) and generation.times == [1, 1, 1, 1]
    assert generation.report()["prefill_tokens_per_s"] == 3  # two of the five were held by the cache


def test_ctrl_c_shows_what_was_held_back():
    """The bytes of a character that will not be completed: also of a text whose turn it was not."""
    shown = []

    def interrupted():
        raise KeyboardInterrupt

    generations = [SimpleNamespace(advance=interrupted, finish=lambda name=name: shown.append(name)) for name in "ab"]
    assert not show.write(generations, nullcontext(lambda: shown.append("drawn")), range(4))
    assert shown == ["a", "b", "drawn"]
