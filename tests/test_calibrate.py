"""calibrate.py: the rule for the cold regions, the prediction by replay, the closed loop, and the settings file."""

import csv
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_golden import GOLDEN
from tiny import tiny_model

import calibrate
from calibrate import cold_regions, measure, plan, quality, read_cosines, read_text, replay, text_windows, verify
from generate import main as generate_main
from load_weights import load_tokenizer, run_command
from skip import FFNSkip, Trace

# Means over 279 generated tokens on C4 prompts, logged by the paper's first author: https://github.com/Ajay1994/layer-skip
LLAMA_2_7B = [
    0.928, 0.890, 0.917, 0.893, 0.867, 0.881, 0.868, 0.868, 0.878, 0.885, 0.895, 0.904, 0.905, 0.901, 0.908, 0.911,
    0.919, 0.927, 0.935, 0.942, 0.953, 0.962, 0.965, 0.969, 0.974, 0.974, 0.977, 0.977, 0.974, 0.973, 0.953, 0.758,
]  # fmt: skip


def test_the_cold_regions_of_llama_2_7b_are_where_figure_2_has_them():
    cold_s, cold_e = cold_regions(LLAMA_2_7B)
    assert 4 <= cold_s <= 7 and 28 <= cold_e <= 31


@given(st.lists(st.floats(-0.002, 0.002), min_size=32, max_size=32))
def test_noise_of_the_size_of_a_sample_moves_the_cold_regions_by_one_layer_at_most(noise):
    """The standard error of the means is 0.002: halves of the data must agree."""
    cold_s, cold_e = cold_regions(LLAMA_2_7B)
    s, e = cold_regions([c + d for c, d in zip(LLAMA_2_7B, noise)])
    assert abs(s - cold_s) <= 1 and abs(e - cold_e) <= 1


@given(st.integers(3, 6), st.integers(3, 6), st.integers(16, 30), st.floats(0.1, 1), st.floats(-0.5, 0.5))
def test_a_fall_a_rise_and_a_fall_give_the_rise(falling, last, rising, scale, offset):
    """The shape of Figure 2 at any height and scale; the ends of the rise are found within a layer."""
    rise = [i / rising for i in range(rising + 1)]
    curve = [0.1 * i for i in range(falling, 0, -1)] + rise + [1 - 0.1 * i for i in range(1, last + 1)]
    cold_s, cold_e = cold_regions([offset + scale * 0.2 * c for c in curve])
    assert abs(cold_s - falling) <= 2 and abs(cold_e - (falling + rising + 1)) <= 2


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=50))
def test_any_curve_has_cold_regions(curve):
    cold_s, cold_e = cold_regions(curve)
    assert 0 <= cold_s <= cold_e <= len(curve)


def policies(n_layers):
    threshold = st.floats(0.5, 1)
    return st.builds(
        FFNSkip, cold_s=st.integers(0, 2), cold_e=st.integers(3, n_layers),
        sim_threshold=threshold | st.lists(threshold, min_size=n_layers, max_size=n_layers), warm_up_index=st.just(3),
        k=st.sampled_from([None, 1, 2, 3]), recheck=st.booleans(),
    )  # fmt: skip


@given(st.data())
def test_a_replay_is_algorithm_1_token_by_token(data):
    """The predicted ratio is that of the pseudocode, written out here for one token's cosines."""
    n_layers = data.draw(st.integers(4, 8))
    rows = data.draw(st.lists(st.lists(st.floats(0.5, 1), min_size=n_layers, max_size=n_layers), min_size=1, max_size=6))
    policy = data.draw(policies(n_layers))
    limits = torch.tensor(policy.sim_threshold).expand(n_layers)
    assume((torch.tensor(rows) - limits).abs().min() > 1e-6)  # no cosine so near that rounding decides
    skipped = 0
    for row in rows:
        left, done = 0, False
        for layer in range(policy.cold_s, policy.cold_e):
            each = policy.sim_threshold
            threshold = each[layer] if isinstance(each, list) else each
            if left:
                skipped, left = skipped + 1, left - 1
                done = not left and not policy.recheck
            elif not done and row[layer] >= threshold:
                left = policy.k or n_layers
    assert replay(torch.tensor(rows), policy) == pytest.approx(skipped / (len(rows) * n_layers))


class Recorded:
    """A layer for FFNSkip whose block turns h = (1, 0) by an angle of the recorded cosine, whatever was skipped before."""

    def __init__(self, layer_id, cosine):
        self.layer_id, self.temp = layer_id, torch.stack((cosine, (1 - cosine**2).sqrt()), dim=-1)[None]

    def attend(self, x, step):
        return torch.tensor([1.0, 0.0]).expand(self.temp.shape)  # (1, tokens, 2)

    def feed(self, h, step, rows=None):
        step.trace.record_ran(self.layer_id, rows)
        return self.temp

    def __call__(self, x, step):
        return self.feed(self.attend(x, step), step)


def walk(cosines, policy):
    """The ffn_skip_ratio of the walk in skip.py itself over layers that show it the recorded cosines."""
    layers = [Recorded(i, column) for i, column in enumerate(cosines.T.double())]
    token_index = torch.full((1, len(cosines)), policy.warm_up_index + 1)
    trace = Trace()
    trace.begin(len(layers), token_index, real=torch.ones_like(token_index, dtype=torch.bool))
    policy(layers, None, SimpleNamespace(token_index=token_index, trace=trace))
    return trace.ffn_skip_ratio(policy.warm_up_index)


@st.composite
def recordings(draw, max_layers=12):
    """(tokens, n_layers) cosines, many of them equal, so that thresholds are met exactly; and some settings."""
    n_layers, n_tokens = draw(st.integers(1, max_layers)), draw(st.integers(1, 30))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    cosines = torch.randint(0, 9, (n_tokens, n_layers), generator=random) / 8  # 0, 1/8, ... 1
    cold_s = draw(st.integers(0, n_layers))
    threshold = st.integers(0, 9).map(lambda eighths: eighths / 8 - 1 / 16) | st.sampled_from([2.0, -2.0])
    each = st.lists(threshold, min_size=n_layers, max_size=n_layers)
    return cosines, FFNSkip(
        cold_s, draw(st.integers(cold_s, n_layers)), draw(threshold | each), draw(st.sampled_from([-1, 25])),
        k=draw(st.none() | st.integers(1, 4)), recheck=draw(st.booleans()),
    )  # fmt: skip


@given(recordings())
def test_a_replay_is_the_walk_of_skip_py_to_the_last_bit(recorded):
    cosines, policy = recorded
    assert replay(cosines, policy) == walk(cosines, policy)


def test_the_replay_of_cosines_drawn_by_hand():
    cosines = torch.tensor([[0.9, 0.5, 0.9, 0.5, 0.9, 0.9]])
    skipped = lambda threshold, **how: round(6 * replay(cosines, FFNSkip(0, 6, threshold, **how)))
    assert skipped(0.75) == 5  # as printed: from the layer after the first to the last
    assert skipped(0.75, k=1) == 3  # the second, the fourth and the last
    assert skipped(0.75, k=1, recheck=False) == 1
    assert skipped(0.75, k=2, recheck=False) == 2
    assert skipped([2, 2, 0.75, 2, 2, 2], k=2) == 2
    assert skipped(0.75, k=9) == 5 and skipped(2.0) == 0
    exact = cosines[0, 0].item()  # equal is enough, and what lies above it by less than float32 can tell is not
    assert skipped(exact, k=1) == 3 and skipped(math.nextafter(exact, 1), k=1) == 0


def test_a_plan_skips_the_wanted_share_or_says_what_can_be_reached():
    cosines = torch.rand(300, 12, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.6
    for k in None, 1, 2:
        make = lambda threshold: FFNSkip(1, 11, threshold, k=k)
        policy, ratio = plan(cosines, make, 0.25)
        assert abs(ratio - 0.25) < 0.01 and replay(cosines, policy) == ratio
    assert plan(cosines, make, 0.95)[0] is None and plan(cosines, make, 0.95)[1] < 0.95


def test_cosines_are_measured_past_the_warm_up_and_generated_text_past_its_prompt():
    model, ids = tiny_model(), torch.randint(31, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    trace = Trace()
    model(torch.tensor([ids]), policy=FFNSkip(0, 4, math.inf, warm_up_index=2), trace=trace, prompt_len=5)
    measured = measure(model, [(ids, 5)], warm_up_index=2)
    assert torch.equal(measured, trace.cosine[:, 0, 8:].T) and measured.shape == (4, 4) and measured.isfinite().all()
    assert measure(model, [(ids, 0)], warm_up_index=2).shape == (9, 4)


def test_quality_against_itself_is_perfect_and_perplexity_is_that_of_the_tokens():
    model, ids = tiny_model(), torch.randint(31, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    reference = [model(torch.tensor([ids]))[0].log_softmax(-1)]
    found = quality(model, [(ids, 0)], FFNSkip(0, 4, math.inf, warm_up_index=4), reference)
    assert (found["ffn_skip_ratio"], found["kl"], found["top1"]) == (0, 0, 1)
    nll = -reference[0][torch.arange(19), torch.tensor(ids[1:])][5:].mean()  # predictions by tokens 5 to 18
    assert found["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-5)
    worse = quality(model, [(ids, 0)], FFNSkip(0, 4, -1.5, warm_up_index=4), reference)
    assert worse["kl"] > 0 and worse["ffn_skip_ratio"] == 3 / 4


def test_the_loop_closes_on_the_target_where_the_replay_misses_it():
    model = tiny_model(n_layers=8, max_seq_len=256)
    measured, held_out = [
        [(torch.randint(31, (250,), generator=torch.Generator().manual_seed(seed)).tolist(), 0)] for seed in (1, 2)
    ]
    cosines = measure(model, measured, 5)
    reference = [model(torch.tensor([ids]))[0].log_softmax(-1) for ids, _ in held_out]
    wrong = cosines - 0.02  # a prediction that is off
    make = lambda x: FFNSkip(0, 8, x, 5, k=1)
    once = quality(model, held_out, plan(wrong, make, 0.25)[0], reference)["ffn_skip_ratio"]
    policy, _, found = verify(model, held_out, reference, wrong, make, 0.25)
    assert abs(found["ffn_skip_ratio"] - 0.25) <= 0.01 < abs(once - 0.25)
    assert found == quality(model, held_out, policy, reference)
    assert verify(model, held_out, reference, cosines, make, 0.9) is None


@pytest.mark.parametrize("ratios, nearest", [
    ([0.23, 0.207, 0.19, 0.212, 0.15, 0.25], 0.207), ([0.23, 0.199, 0.2], 0.199), ([0.23, 0.211] * 3, None),
])  # fmt: skip
def test_the_try_nearest_the_target_is_kept(ratios, nearest, monkeypatch):
    tries = iter(ratios)
    monkeypatch.setattr(calibrate, "quality", lambda *_: dict(ffn_skip_ratio=next(tries)))
    cosines = torch.rand(300, 12, generator=torch.Generator().manual_seed(0))
    result = verify(None, None, None, cosines, lambda x: FFNSkip(1, 11, x), 0.2)
    assert (result and result[2]["ffn_skip_ratio"]) == nearest


def test_text_is_read_from_plain_files_and_json_lines(tmp_path):
    (tmp_path / "a.raw").write_text("= A =\n\nText\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n', encoding="utf-8")
    assert read_text([tmp_path / "a.raw", tmp_path / "b.jsonl"]) == "= A =\n\nText\n\n\none\n\ntwo"
    windows = text_windows(load_tokenizer(GOLDEN / "hf-gqa"), "word " * 900, 1100)
    assert [len(ids) for ids, _ in windows] == [512, 512, 1100 - 2 * 511 + 1] and all(ids[0] == 1 for ids, _ in windows)


def run(*args):
    with pytest.raises(SystemExit) as end:
        run_command(lambda: calibrate.main(list(map(str, args))))
    return end.value.code


@pytest.fixture
def checkpoint(tmp_path):
    shutil.copytree(GOLDEN / "hf-theta", tmp_path / "small", ignore=shutil.ignore_patterns("token*"))
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path / "small")
    (tmp_path / "text.txt").write_text((GOLDEN / "text.txt").read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path / "small"


def test_what_calibrate_writes_is_what_generate_runs(checkpoint, capsys):
    """The command line from text to skip.json beside the checkpoint, twice the same, and on to generate.py."""
    args = ["--ckpt", checkpoint, "--text", checkpoint.parent / "text.txt", "--target-skip", "0.1", "--warm-up-index", "5"]
    assert not run(*args), capsys.readouterr().err
    first = json.loads((checkpoint / "skip.json").read_text())
    assert abs(first["achieved_skip"] - 0.1) <= 0.01 and first["model"] == "small" and first["n_layers"] == 2
    assert first["quality"]["kl"] <= min(other["kl"] for other in first["over"].values()) if first["over"] else True
    assert "cold regions" in capsys.readouterr().out
    assert not run(*args) and json.loads((checkpoint / "skip.json").read_text()) == first
    generate_main(["--ckpt", str(checkpoint), "--json", "--max-new-tokens", "20", "The capital"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["policy"] == "ffnskip" and report["settings"]["skip"]["sim_threshold"] == first["sim_threshold"]


def test_the_model_can_write_its_own_text_and_cosines_are_saved(checkpoint, tmp_path):
    saved = tmp_path / "cosines.csv"
    args = ["--ckpt", checkpoint, "--target-skip", "0.1", "--warm-up-index", "5", "--save-cosines", saved, "--seed", "3"]
    run(*args, "--out", tmp_path / "own.json")
    rows = list(csv.reader(saved.open()))
    assert len(rows) > 50 and {len(row) for row in rows} == {2}
    first = saved.read_text()
    run(*args, "--out", tmp_path / "own.json")
    assert saved.read_text() == first  # the same seed
    run(*args, "--seed", "4", "--out", tmp_path / "own.json")
    assert saved.read_text() != first


def test_recorded_cosines_are_planned_without_a_model(tmp_path, capsys):
    random = torch.Generator().manual_seed(0)
    rows = (torch.tensor(LLAMA_2_7B) + 0.02 * torch.randn(200, 32, generator=random)).clamp(max=1)
    (tmp_path / "c.csv").write_text("\n".join(",".join(f"{c:.3f}" for c in row) for row in rows.tolist()))
    assert not run("--cosines", tmp_path / "c.csv", "--target-skip", "0.25", "--out", tmp_path / "llama.json")
    written = json.loads((tmp_path / "llama.json").read_text())
    assert abs(written["predicted_skip"] - 0.25) < 0.01 and written["achieved_skip"] is None and "not verified" in written["note"]
    assert read_cosines(tmp_path / "c.csv").shape == (200, 32)


def test_mistakes_are_one_line_and_write_nothing(tmp_path, capsys):
    folder = tmp_path
    (folder / "empty.txt").write_text("")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (folder / "ragged.csv").write_text("0.9,0.9\n0.9\n")
    (folder / "words.csv").write_text("0.9,0.9\n0.9,high\n")
    (folder / "good.csv").write_text("0.9,0.8\n0.9,0.7\n")
    (folder / "first.csv").write_text("0.9,high\n0.9,0.8\n")
    (folder / "wide.csv").write_text("0.9,0.8,0.7\n")
    (folder / "latin.txt").write_bytes("na\u00efve".encode("latin-1"))
    text = str(GOLDEN / "text.txt")
    small, out = str(GOLDEN / "hf-gqa"), ["--out", str(folder / "out.json")]
    for args, message in [
        (["--ckpt", "nosuch", *out], "no checkpoint at nosuch"),
        (["--ckpt", small, "--text", str(folder / "empty.txt"), *out], "too little text"),
        (["--ckpt", small, "--text", str(folder / "bad.jsonl"), *out], "bad.jsonl, line 2"),
        (["--ckpt", small, "--text", str(folder / "nosuch.txt"), *out], "nosuch.txt"),
        (["--cosines", str(folder / "ragged.csv"), *out], "ragged.csv, line 2: 1 columns, and the rows before have 2"),
        (["--cosines", str(folder / "words.csv"), *out], "words.csv, line 2: not a row of cosines"),
        (["--cosines", str(folder / "first.csv"), *out], "first.csv, line 1: not a row of cosines"),
        (["--cosines", str(folder / "wide.csv"), "--ckpt", small, *out], "wide.csv: 3 columns, and hf-gqa has 2 layers"),
        (["--cosines", str(folder / "good.csv"), "--target-skip", "0.9", *out], "0.9 cannot be reached"),
        (["--ckpt", small, "--text", text, "--target-skip", "0.9", *out], "0.9 cannot be reached"),
        (["--ckpt", small, "--text", str(folder / "latin.txt"), *out], "latin.txt: not UTF-8 text"),
        (["--ckpt", small, "--text", text, "--out", str(folder)], "cannot be written: it is a folder"),
        (["--ckpt", small, "--text", text, "--out", str(folder / "no" / "out.json")], "cannot be written: there is no such folder"),
        (["--cosines", str(folder / "good.csv"), "--ckpt", str(GOLDEN / "hf-gqa"), "--target-skip", "0.9"], "cannot be reached"),
        (["--cosines", str(folder / "good.csv")], "--cosines needs --out"),
        (["--target-skip", "2", *out], "--target-skip 2.0"),
    ]:
        before = sorted(folder.iterdir())
        code = run("--warm-up-index", 5, "--save-cosines", folder / "saved.csv", *args)
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
        assert code and len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], (args, errors)
        assert sorted(folder.iterdir()) == before


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="--plot needs the package matplotlib")
    calibrate.plot_curve(tmp_path / "curve.png", LLAMA_2_7B, 4, 30, "LLaMA-2-7B")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
