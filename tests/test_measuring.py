"""measuring.py: reading and cutting text, what a policy skips and how far it lies from the dense model, by hand."""

import math

import numpy
import pytest
import torch
from fit_standins import written_windows
from hypothesis import given
from hypothesis import strategies as st
from test_golden import GOLDEN
from tiny import Bytes, random_ids, tiny_model

from generate import generate_batch
from load_weights import load_tokenizer
from policies.baselines import RandomSkip
from skip import FFNSkip
from support.measuring import (
    bring_to,
    compare_with_dense,
    cut,
    mean_interval,
    measure,
    paired_interval,
    quality,
    read_jsonl,
    read_text,
    saved_in_batches,
    skip_ratio,
    text_windows,
    variance_shares,
    written_text,
)
from support.tracing import Trace

# --- text -------------------------------------------------------------------------------------------------------------


def test_text_is_read_from_plain_files_and_json_lines(tmp_path):
    (tmp_path / "a.raw").write_text("= A =\n\nText\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two"}\n')
    assert read_text([tmp_path / "a.raw", tmp_path / "b.jsonl"]) == "= A =\n\nText\n\n\none\n\ntwo"


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"text": "a"}\n{"body": "b"}\n', "t.jsonl:2: expected an object with 'text' or 'turns'"),
        ('{"text": "a"}\n\n[1]\n', "t.jsonl:3: expected an object"),
        ('{"text": null}\n', "t.jsonl:1: expected an object"),
        ('{"text": "a"}\nb\n', "t.jsonl:2: not a line of JSON"),
        ("\n", "t.jsonl:1: no record in it"),
        ("na\u00efve".encode("latin-1"), "t.jsonl: not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "t.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        read_jsonl(tmp_path / "t.jsonl", "text", "turns")
    assert str(error.value).startswith(f"{tmp_path}/{message}")


@given(st.lists(st.integers(), max_size=30), st.lists(st.integers(), max_size=2), st.integers(3, 9))
def test_cutting_loses_nothing_and_begins_each_window_alike(ids, begin, size):
    windows = cut(ids, size, begin)
    assert all(window[: len(begin)] == begin and len(begin) < len(window) <= size for window in windows)
    assert all(len(window) == size for window in windows[:-1])
    assert sum((window[len(begin) :] for window in windows), []) == ids


def test_windows_of_text_begin_as_the_tokenizer_begins_a_text():
    windows = text_windows(load_tokenizer(GOLDEN / "hf-gqa"), "word " * 900, 1100)
    assert [len(ids) for ids, _ in windows] == [512, 512, 1100 - 2 * 511 + 1]
    assert all(ids[0] == 1 and prompt_len == 0 for ids, prompt_len in windows)
    tokenizer = Bytes()
    tokenizer.encode = lambda text, bos=None: list(range(len(text) // 10))  # as many characters as real tokens may have
    assert [len(ids) for ids, _ in text_windows(tokenizer, "x" * 1000, 80, size=50)] == [50, 30]
    assert text_windows(Bytes(), "abcdefgh", 5, size=3) == [(list(b"abc"), 0), (list(b"de"), 0)]  # no bos to begin with


def test_text_that_the_model_writes_follows_the_token_that_begins_one():
    model, read = tiny_model(), []
    model.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    ids = written_text(model, 2, 5, seed=1, begin=7)
    assert torch.equal(torch.cat(read, dim=1), torch.cat((torch.full((2, 1), 7), ids[:, :-1]), dim=1))


def test_windows_that_the_model_writes_are_its_prompts_and_what_it_drew():
    model, prompts = tiny_model(), [[1, 2, 3], [4]]
    windows = written_windows(model, prompts, n_new=8, seed=5)
    steps = list(generate_batch(model, prompts, 8, temperature=1.0, seed=5))
    for row, (ids, prompt_len) in enumerate(windows):
        assert ids == prompts[row] + [step[row] for step in steps] and prompt_len == len(prompts[row])
    assert windows == written_windows(model, prompts, 8, seed=5) != written_windows(model, prompts, 8, seed=6)


# --- what is skipped --------------------------------------------------------------------------------------------------


def test_cosines_are_measured_past_the_warm_up_and_generated_text_past_its_prompt():
    model, ids = tiny_model(), random_ids(12)
    trace = Trace(cosines=True)
    model(torch.tensor([ids]), policy=FFNSkip(0, 4, math.inf, warm_up_index=2), trace=trace, prompt_len=5)
    measured = measure(model, [(ids, 5)], warm_up_index=2)
    assert torch.equal(measured, trace.cosine[:, 0, 8:].T) and measured.shape == (4, 4) and measured.isfinite().all()
    assert measure(model, [(ids, 0)], warm_up_index=2).shape == (9, 4)
    assert torch.equal(measure(model, [(ids, 0), (ids, 5)], 2)[9:], measured)  # window after window


def test_the_skip_ratio_is_over_all_tokens_past_the_warm_up_and_the_prompt():
    model, windows = tiny_model(), [(random_ids(12), 0), (random_ids(20), 6)]
    everything = FFNSkip(1, 4, -math.inf, warm_up_index=2)  # of layers 1 to 3 all but the first
    assert skip_ratio(model, everything, windows) == 2 / 4
    half = FFNSkip(1, 4, -math.inf, warm_up_index=2, full_every=2)
    tokens = sum(len(ids) - prompt_len - 3 for ids, prompt_len in windows)  # 9 and 11, of which 5 and 6 not in full
    assert skip_ratio(model, half, windows) == 2 * (5 + 6) / (4 * tokens)
    with pytest.raises(ValueError, match="past the warm-up of 41"):
        skip_ratio(model, FFNSkip(1, 4, 0.9, warm_up_index=40), windows)


# --- against the dense model ------------------------------------------------------------------------------------------


def test_quality_against_itself_is_perfect_and_perplexity_is_that_of_the_tokens():
    model, ids = tiny_model(), random_ids(20, seed=2)
    log_probs, reference = model(torch.tensor([ids]))[0].log_softmax(-1), {}
    found = quality(model, [(ids, 0)], FFNSkip(0, 4, math.inf, warm_up_index=4), reference)
    assert (found["ffn_skip_ratio"], found["kl"], found["top1"]) == (0, 0, 1)
    nll = -log_probs[torch.arange(19), torch.tensor(ids[1:])][5:].mean()  # predictions by tokens 5 to 18
    assert found["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-5)
    worse = quality(model, [(ids, 0)], FFNSkip(0, 4, -1.5, warm_up_index=4), reference)
    assert worse["kl"] > 0 and worse["ffn_skip_ratio"] == 3 / 4


def test_kl_is_from_the_dense_model_to_the_policy():
    """KL(dense || policy) = sum of p log(p / q), in plain Python, over all windows at once; reversed it is another."""
    model, windows = tiny_model(), [(random_ids(20, seed=3), 0), (random_ids(31, seed=4), 8)]
    policy = FFNSkip(0, 4, -1.5, warm_up_index=4, k=1)
    forward, reversed_, agree, nlls = [], [], [], []
    for ids, prompt_len in windows:
        tokens = torch.tensor([ids])
        dense_probs = model(tokens)[0].double().softmax(-1).tolist()
        probs = model(tokens, policy=policy, prompt_len=prompt_len)[0].double().softmax(-1).tolist()
        for t in range(prompt_len + 5, len(ids) - 1):
            p, q = dense_probs[t], probs[t]
            forward.append(sum(a * math.log(a / b) for a, b in zip(p, q)))
            reversed_.append(sum(b * math.log(b / a) for a, b in zip(p, q)))
            agree.append(p.index(max(p)) == q.index(max(q)))
            nlls.append(-math.log(q[ids[t + 1]]))
    found = quality(model, windows, policy, {})
    assert found["kl"] == pytest.approx(sum(forward) / len(forward), rel=1e-4)
    assert abs(sum(forward) - sum(reversed_)) > 0.01 * sum(forward)  # else the test shows nothing
    assert found["top1"] == pytest.approx(sum(agree) / len(agree))
    assert found["perplexity"] == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-4)
    assert found["ffn_skip_ratio"] == skip_ratio(model, policy, windows)


def test_the_dense_model_runs_once_per_window():
    model, windows, reference, passes = tiny_model(), [(random_ids(20), 0), (random_ids(9), 3)], {}, []
    model.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[0].size(1)))
    first = quality(model, windows, FFNSkip(0, 4, 0.9, warm_up_index=2), reference)
    assert passes == [20, 20, 9, 3, 6]  # a prompt of its own
    assert quality(model, windows, FFNSkip(0, 4, 0.9, warm_up_index=2), reference) == first
    assert passes[5:] == [20, 3, 6]


def test_token_by_token_gives_what_one_pass_gives():
    model, windows, policy = tiny_model(), [(random_ids(20), 0), (random_ids(25), 7)], FFNSkip(1, 4, 0.9, 2, k=1)
    at_once = list(compare_with_dense(model, windows, policy, {}))
    for expected, got in zip(at_once, compare_with_dense(model, windows, policy, {}, decode=True), strict=True):
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(got[1].ran, expected[1].ran)
        assert got[2].complete() and expected[2].complete()


# --- to a ratio -------------------------------------------------------------------------------------------------------


def randomly(model, windows, share_of, tried):
    """at(value) for bring_to: RandomSkip of the share_of(value), and what it skips of the windows."""

    def at(value):
        tried.append(value)
        policy = RandomSkip(model, share_of(value), warm_up_index=-1)
        return policy, skip_ratio(model, policy, windows)

    return at


def test_bring_to():
    model, windows, tried = tiny_model(n_layers=6), [(random_ids(40, seed), 0) for seed in range(8)], []
    at = randomly(model, windows, lambda value: 0.8 * (1 - value) ** 2, tried)
    for skip in 0.05, 0.4, 0.7:
        tried.clear()
        policy, ratio = bring_to(at, 0, 1, skip, tolerance=0.02)
        assert ratio == skip_ratio(model, policy, windows) == pytest.approx(skip, abs=0.02)
        assert len(tried) <= 10
    policy, ratio = bring_to(at, 0, 1, 0.95)  # out of reach
    assert policy.skip == pytest.approx(0.8, abs=0.01) and ratio < 0.85


def test_bring_to_gives_the_nearest_of_few():
    model, windows = tiny_model(n_layers=6), [(random_ids(40, seed), 0) for seed in range(4)]
    at = randomly(model, windows, lambda value: 0.5 if value < 0.3 else 0.0, [])
    for skip, near in (0.1, 0.0), (0.45, 0.5):
        assert bring_to(at, 0, 1, skip)[0].skip == near


def test_bring_to_keeps_the_nearest_and_not_the_last():
    ratios = [0.3, 0.21, 0.1, 0.4]
    left = iter(ratios)
    assert bring_to(lambda value: (value, next(left)), 0, 1, 0.2, tries=4)[1] == 0.21


def test_bring_to_begins_where_it_is_told_and_ends_when_it_is_near():
    tried = []

    def at(value):
        tried.append(value)
        return value, 1 - value**2

    assert bring_to(at, 0, 1, 0.75, first=0.5) == (0.5, 0.75) and tried == [0.5]
    tried.clear()
    assert bring_to(at, 0, 1, 0.3, tolerance=1e-9, tries=3, first=0.9)[0] == min(tried, key=lambda v: abs(0.7 - v**2))
    assert len(tried) == 3 and tried[0] == 0.9 and max(tried[1:]) < 0.9  # 0.9 skips 0.19: too little


def test_paired_interval_holds_the_mean_and_narrows_where_items_agree():
    """The spread that two lists share, question by question, is none of their difference's."""
    theirs = [float(i % 7) for i in range(100)]
    ours = [value + 0.5 + 0.1 * (i % 2) for i, value in enumerate(theirs)]
    mean, low, high = paired_interval(ours, theirs)
    assert mean == pytest.approx(0.55) and low < mean < high and high - low < 0.03
    assert paired_interval(ours, theirs) == (mean, low, high)  # the same resamples every time
    wide = mean_interval(ours)
    assert wide[2] - wide[1] == pytest.approx(2 * 1.96 * torch.tensor(ours).std().item() / 10, rel=0.15)


def test_an_interval_of_few_blocks_is_wider_and_covers_the_mean():
    """Values of one block are drawn together, and the quantiles reach as far as Student's t does."""
    random, inside = numpy.random.default_rng(0), 0
    for i in range(400):
        blocks = numpy.repeat(range(12), 4)
        values = random.normal(size=12)[blocks] + 0.1 * random.normal(size=48)
        _, low, high = mean_interval(values, blocks, resamples=400, seed=i)
        inside += low <= 0 <= high
        naive = mean_interval(values, resamples=400, seed=i)
        assert high - low > naive[2] - naive[1] or i % 10
    assert 0.92 <= inside / 400 <= 0.98
    mean, low, high = mean_interval([1.0, 3.0, 5.0, 7.0], [0, 0, 1, 1])
    assert mean == 4 and low == 2 and high == 6
    assert paired_interval([2.0, 4.0, 6.0, 8.0], [1.0] * 4, [0, 0, 1, 1]) == (4, 2, 6)


def test_the_shares_of_a_variance_that_layers_and_tokens_have_by_hand():
    layers, tokens = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[0.0], [3.0]])
    by_layer, by_token = variance_shares(layers + tokens)  # variances 2/3 and 9/4
    assert by_layer == pytest.approx((2 / 3) / (2 / 3 + 9 / 4)) and by_layer + by_token == pytest.approx(1)


def test_what_batches_of_recorded_tokens_save():
    skipped = torch.tensor([[True, True, False], [True, False, False]])
    one, two, many = saved_in_batches(skipped, [1, 2, 32])
    assert one == pytest.approx(0.5, abs=0.01) and two == pytest.approx(1 / 3 + 1 / 12, abs=0.01)
    assert many == pytest.approx(1 / 3)
