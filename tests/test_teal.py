"""teal.py: small inputs of matrices are left out, to the same numbers whether set to zero or not read."""

import csv
import json
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_golden import GOLDEN
from test_standins import random_fit, write_fit
from tiny import close, new_cache, random_ids, tiny_model

import generate
from fast import accelerate, one_row, plain
from model import dense
from policies import find_policy, teal
from skip import FFNSkip
from support.common import HERE
from support.tracing import Trace

CKPT = str(GOLDEN / "hf-mha")


def tokens(seed=0, rows=4, columns=24):
    return torch.tensor(random_ids(rows * columns, seed)).view(rows, columns)


def decode(model, ids, policy, prompt_len=4):
    """(logits of all tokens, trace) of ids (1, seq), the prompt at once and the rest token by token."""
    cache, trace, logits = new_cache(model, 1), Trace(), []
    for part in ids.tensor_split([*range(prompt_len, ids.size(1))], dim=1):
        logits.append(model(part, cache, policy, prompt_len, trace=trace))
    assert cache.complete()
    return torch.cat(logits, dim=1), trace


@pytest.mark.parametrize("name", ["teal", "teal_all", "cats"])
def test_as_much_is_left_out_as_was_asked_for(name):
    """Of the text that the thresholds come from, per layer: of what is read past the warm-up, and nothing before."""
    model, ids = accelerate(tiny_model(dim=64, hidden_dim=96)), tokens(columns=64)
    for skip in 0.1, 0.3:
        policy, trace = teal.POLICIES[name](model, skip, warm_up_index=5, tokens=ids), Trace()
        model(ids, policy=policy, trace=trace)
        past = trace.token_index > 5
        for part in ["feed_forward"] + ["attention"] * (name == "teal_all"):
            unread = trace.unread(part)
            assert unread[:, past].mean() == pytest.approx(skip, abs=0.05) and not unread[:, ~past].any()
        assert trace.ran.all()


@given(st.sampled_from(["teal", "teal_all"]), st.integers(0, 5))
def test_what_is_not_read_is_what_is_set_to_zero(name, seed):
    """One row by columns gives the plain model's masked numbers, in one pass or token by token, and the same shares."""
    model, ids = accelerate(tiny_model(seed=seed)), tokens(seed, 1)
    policy = teal.POLICIES[name](model, 0.3, warm_up_index=2, tokens=tokens(seed + 9))
    assert one_row.is_by_columns(model.layers[0].attention.wo.weight)
    logits, trace = decode(model, ids, policy)
    assert trace.unread("feed_forward")[:, trace.token_index > 2].min() > 0
    at_once = model(ids, policy=policy, prompt_len=4, trace=(whole := Trace()))
    for found, record in (at_once, whole), decode(plain(model), ids, policy):
        assert close(logits, found, 1e-3)
        assert torch.allclose(trace.unread("feed_forward"), record.unread("feed_forward"), atol=0.03)
        assert torch.allclose(trace.unread("attention"), record.unread("attention"), atol=0.03)


def test_nothing_left_out_is_dense():
    """Zero thresholds, and the tokens of a warm-up: bit for bit, in one row and in many."""
    model, ids = accelerate(tiny_model()), tokens(rows=1)
    teal.store_by_columns(model)
    nothing = teal.Teal([[0.0] * 5] * model.args.n_layers, warm_up_index=-1)
    everything = teal.Teal([[99.0] * 5] * model.args.n_layers, warm_up_index=99)
    for policy in nothing, everything:
        assert torch.equal(decode(model, ids, policy)[0], decode(model, ids, None)[0])
        assert torch.equal(model(ids, policy=policy), model(ids))


def test_rows_of_a_batch_are_their_own():
    model, ids = accelerate(tiny_model()), tokens()
    policy = teal.make(model, 0.3, warm_up_index=3, tokens=ids)
    together = model(ids, policy=policy)
    for row, one in zip(together, ids):
        assert close(row, model(one[None], policy=policy)[0], 1e-4)


def test_another_policy_walks_over_partial_layers():
    """What it skips is skipped, and the blocks that run leave out inputs."""
    model, ids = accelerate(tiny_model()), tokens(rows=1)
    skip = FFNSkip(0, model.args.n_layers, 0.0, warm_up_index=2, k=1)
    lows = teal.make(model, 0.3, tokens=tokens(1)).lows
    for run in (lambda policy: decode(model, ids, policy)[1]), lambda policy: record(model, ids, policy):
        trace = run(teal.Teal(lows, warm_up_index=2, inner=skip))
        past, unread = trace.token_index > 2, trace.unread("feed_forward")
        assert 0 < (~trace.ran[:, past]).sum() < trace.ran[:, past].numel()
        assert not unread[~trace.ran].any() and (unread[:, past][trace.ran[:, past]] > 0).all()


def record(model, ids, policy):
    model(ids, policy=policy, prompt_len=4, trace=(trace := Trace()))
    return trace


def test_a_file_of_quantiles_is_found_beside_the_checkpoint(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "teal.json"
    text.write_text("Plants make food from sunlight, and the water that their roots find. " * 40)
    command = [sys.executable, HERE / "experiments" / "fit_teal.py", "--ckpt", CKPT, "--text", text, "--out", out]
    assert "written to" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    from load_weights import load_model

    model = load_model(CKPT)
    policy = find_policy("teal", model, skip=0.25, fitted={"teal.json": out})
    same = teal.thresholds(teal.load(out, model), dict(feed_forward=0.2, w2=0.35))
    assert policy.lows == same and policy.inner is dense
    with pytest.raises(ValueError, match="another model"):
        teal.load(out, tiny_model())
    out.write_text(json.dumps({"quantiles": {}}))
    with pytest.raises(ValueError, match="fit_teal.py"):
        teal.load(out, model)


@pytest.mark.parametrize("name, skip", [("teal", 0.66), ("teal_all", -0.1), ("cats", 0.7)])
def test_what_cannot_be_left_out_is_said(name, skip):
    with pytest.raises(ValueError, match=f"a share of {skip}"):
        teal.POLICIES[name](tiny_model(), skip, tokens=tokens())


def test_blocks_are_replaced_and_the_rest_read_in_part(tmp_path):
    """teal_standins: the share asked for, a small part of it whole blocks; in one pass and token by token."""
    model, ids = accelerate(tiny_model(n_layers=6)), tokens(3, 1, 40)
    fit = write_fit(tmp_path / "f.safetensors", model, random_fit(model), [[0.05, -9.0], [0.3, -7.0]])
    policy = teal.teal_standins(model, 0.3, 2, tokens(1, 4, 40), fitted={"standins.safetensors": fit})
    for trace in decode(model, ids, policy)[1], record(model, ids, policy):
        past = trace.token_index > 2
        assert 1 - trace.read[:, past].mean() == pytest.approx(0.3, abs=0.08)
        assert 0 < (~trace.ran[:, past]).float().mean() < 0.25 and trace.ran[:, ~past].all()


def test_a_text_written_by_teal_says_what_was_not_read(capsys, tmp_path, monkeypatch):
    """In its last lines, in the CSV of its trace, and in what the bound by bytes counts."""
    monkeypatch.setattr("sys.argv", ["generate.py"])
    trace = tmp_path / "t.csv"
    flags = ["--policy", "teal_all", "--skip", "0.4", "--warm-up-index", "1", "--compare", "--max-new-tokens", "9"]
    generate.main(["--ckpt", CKPT, *flags, "--trace", str(trace), "Plants make food"])
    said = capsys.readouterr().err
    share = float(re.search(r"([\d.]+)% of FFN weights not read, 0.0% as whole blocks", said)[1])
    assert 20 < share < 60 and float(re.search(r"([\d.]+)x by the bytes not read", said)[1]) > 1.1
    rows = list(csv.DictReader(trace.open(encoding="utf-8")))
    assert rows[-1]["layer_1"].endswith("% not read") and rows[0]["layer_1"] == "run"
