"""
policies/baselines.py on tiny random models: each policy by its definition, and what it leaves in the cache. Those of
policies/ledger.py that skip feed-forward blocks are tested like them here, and by definition in test_ledger.py.
"""

import inspect
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import chunkings, close, is_real, models, new_cache, poisoned_cache, run, texts, tiny_model, walk

from model import ModelArgs, Transformer
from policies import baselines
from policies.ledger import LEDGER, Fixed
from skip import FFNSkip
from support.measuring import as_windows, cold_regions, measure, quality, skip_ratio
from support.tracing import Trace

POLICIES = baselines.POLICIES | LEDGER
EXITS = ["statecopy", "statecopy_cosine", "earlyexit", "earlyexit_cosine"]
CHANCE = ["random", "random_but_first", "random_run", "static", "static_run"]
ONES = ["fixed", "fixed_run", "shuffled", "adaskip"]  # of the ledger
NAMES = ["random", "random_run", "static", "shortgpt", "skipdecode", *EXITS, "checkerboard", *ONES]
LIKE_THOSE = ["random_but_first", "static_run", "printed", "authors"]  # other arguments of random and of FFNSkip
COMPLETE = ["random", "random_run", "static", "statecopy", "statecopy_cosine", "checkerboard", *ONES]


def text(model, batch=1, seq=40, seed=0):
    return torch.randint(model.args.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def make(name, model, skip=0.3, warm_up_index=4, tokens=None, seed=0):
    """A policy of any name with a short warm-up, that skips something in models of few layers."""
    if name in EXITS:  # without the bisection, which has tests of its own, and tested after every layer
        cosine = name.endswith("cosine")
        measure, threshold = (baselines.similarity, 0.8) if cosine else (baselines.confidence, 0.1)
        policy = baselines.EarlyExit(name.startswith("statecopy"), measure, threshold, warm_up_index)
        policy.every = 1
        return policy
    if name == "fixed":  # without the search, which has a test of its own
        return Fixed(model, skip, warm_up_index, list(range(model.args.n_layers)), seed)
    tokens = text(model, 4, seed=9) if tokens is None else tokens
    more = dict(target_len=20) if name == "skipdecode" else {}
    return POLICIES[name](model, skip, warm_up_index, tokens, seed, **more)


def ran(model, policy, tokens, **kwargs):
    trace = Trace()
    logits = model(tokens, policy=policy, trace=trace, **kwargs)
    return trace, logits


# --- all of them ------------------------------------------------------------------------------------------------------


def test_the_names_are_those_in_the_table():
    assert sorted(POLICIES) == sorted([*NAMES, *LIKE_THOSE, "attention_drop"])


@pytest.mark.parametrize("name", NAMES)
def test_factory(name):
    """README: a new policy is one function or small class, and so is each of these."""
    model = tiny_model(n_layers=8)
    more = dict(target_len=60) if name == "skipdecode" else {}
    policy = POLICIES[name](model, 0.25, tokens=text(model, 4, 60), **more)
    assert policy.warm_up_index == FFNSkip(0, 1, 1.0).warm_up_index == 25
    for part in type(policy), getattr(POLICIES[name], "func", POLICIES[name]):
        assert len(inspect.getsource(part).splitlines()) <= (45 if name in ONES else 30)
    trace, _ = ran(model, policy, text(model, 2, 60))
    assert trace.ran[:, trace.token_index <= 25].all()
    assert not trace.ran[:, trace.token_index > 25].all()


@pytest.mark.parametrize("name", NAMES)
def test_ratio_on_calibration_text(name):
    model = tiny_model(n_layers=10)
    tokens = text(model, 8, 60)
    for skip in (0.1, 0.3):
        more = dict(target_len=60) if name == "skipdecode" else {}
        policy = POLICIES[name](model, skip, tokens=tokens, **more)
        got = skip_ratio(model, policy, [(ids, 0) for ids in tokens.tolist()])
        # exits after every fourth layer of ten leave gaps between the ratios that can be had
        assert abs(got - skip) <= (0.06 if name in [*CHANCE, "shuffled"] else 0.05 if "exit" in name else 0.02), name


@pytest.mark.parametrize("name", NAMES)
def test_calibrates_on_the_models_own_text(name):
    model = tiny_model(n_layers=4)
    assert str(vars(POLICIES[name](model, 0.25))) == str(vars(POLICIES[name](model, 0.25)))


@st.composite
def cases(draw):
    """A model, a text, chunks, one of its rows, a warm-up index and a seed."""
    model = draw(models(n_layers=st.integers(5, 6)))
    inputs = draw(texts(model))
    batch, seq = inputs["tokens"].shape
    row = draw(st.integers(0, batch - 1))
    return model, inputs, draw(chunkings(seq)), row, draw(st.integers(-1, 3)), draw(st.integers(0, 9))


@pytest.mark.parametrize("name", NAMES)
@given(cases())
def test_batching_and_chunking_change_nothing(name, case):
    model, inputs, chunks, row, warm_up_index, seed = case
    tokens, pad, prompt_len = inputs["tokens"], inputs["pad"], inputs["prompt_len"]
    policy = make(name, model, warm_up_index=warm_up_index, seed=seed)
    whole, logits = ran(model, policy, **inputs)
    real, trace = is_real(tokens, pad), Trace()
    parts = run(model, chunks=chunks, cache=new_cache(model, len(tokens)), policy=policy, trace=trace, **inputs)
    start = 0 if pad is None else pad[row].item()
    own_prompt = prompt_len if isinstance(prompt_len, int) else prompt_len[row].item()
    alone, alone_logits = ran(model, policy, tokens[row : row + 1, start:], prompt_len=own_prompt)
    if name in [*EXITS, "adaskip"]:  # rounding may flip a decision that is taken by a threshold, or a rank
        assume(torch.equal(whole.ran, trace.ran) and torch.equal(whole.ran[:, row, start:], alone.ran[:, 0]))
    assert torch.equal(whole.ran, trace.ran)
    assert torch.equal(whole.ran[:, row, start:], alone.ran[:, 0])
    assert close(logits[real], parts[real], 1e-4)
    assert close(logits[row, start:], alone_logits[0], 1e-4)
    assert not whole.ran[:, ~real].any()
    assert torch.isfinite(logits).all() and torch.isfinite(parts).all()


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_warm_up_are_dense(name):
    model = tiny_model(n_layers=6)
    policy = make(name, model, warm_up_index=4)
    tokens = text(model, 2, 30)
    trace, logits = ran(model, policy, tokens, prompt_len=torch.tensor([10, 3]))
    for row, end in enumerate((15, 8)):
        assert trace.ran[:, row, :end].all() and not trace.ran[:, row, end:].all()
        assert close(logits[row, :end], model(tokens)[row, :end])
    policy.warm_up_index = 30
    assert torch.equal(model(tokens, policy=policy), model(tokens))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_skipped_does_not_run(name):
    model = tiny_model(n_layers=6)
    policy = make(name, model, warm_up_index=-1)
    calls = {part: [0] * 6 for part in ("feed_forward", "attention", "attention.wk")}
    for layer_id, layer in enumerate(model.layers):
        for part in calls:

            def count(module, inputs, out, part=part, layer_id=layer_id):
                calls[part][layer_id] += 1

            layer.get_submodule(part).register_forward_hook(count)
    trace = Trace()
    tokens = text(model, 1, 30)
    run(model, tokens, chunks=[1] * 30, cache=new_cache(model, len(tokens)), policy=policy, trace=trace)
    executed = trace.ran.sum((1, 2)).tolist()
    assert calls["feed_forward"] == executed and sum(executed) < 6 * 30
    also_skips = getattr(POLICIES[name], "also_skips", ())
    assert calls["attention"] == (executed if also_skips else [30] * 6)
    assert calls["attention.wk"] == (executed if "attention" in also_skips else [30] * 6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_what_it_leaves_in_the_cache(name, chunk):
    model = tiny_model(n_layers=6)
    policy = make(name, model, warm_up_index=3)
    tokens = text(model, 2, 30)
    cache, trace = new_cache(model, len(tokens)), Trace()
    run(model, tokens, chunks=chunk, cache=cache, policy=policy, trace=trace)
    assert cache.complete() == (name in COMPLETE)
    missing = ~cache.written[:, :, :30]
    if name in COMPLETE:
        assert not baselines.attended_missing(cache).any()
    else:
        assert torch.equal(missing, ~trace.ran)  # a layer that did not run for a token has nothing of it
        assert cache.k[:, :, :, :30].transpose(2, 3)[missing].count_nonzero() == 0
    by_hand = torch.zeros(6, 2, 30, dtype=torch.long)
    for layer, row, token in trace.ran.nonzero().tolist():
        by_hand[layer, row, token] = missing[layer, row, :token].sum()
    assert torch.equal(baselines.attended_missing(cache)[:, :, :30], by_hand)
    assert by_hand.any() == name.startswith("earlyexit")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_entry_that_is_read_shows(name):
    """Token by token through a cache of NaN: only earlyexit ever meets one, where it first reads a missing entry."""
    model = tiny_model(n_layers=6)
    policy = make(name, model, warm_up_index=3)
    tokens = text(model, 1, 30)
    cache, clean = poisoned_cache(model, 1), new_cache(model, len(tokens))
    logits = run(model, tokens, chunks=1, cache=cache, policy=policy)
    run(model, tokens, chunks=1, cache=clean, policy=policy)
    reads = baselines.attended_missing(clean).sum((0, 1)) > 0  # (columns,)
    first = reads.long().argmax().item() if reads.any() else 30
    assert torch.isfinite(logits[0, :first]).all()
    assert reads.any() == name.startswith("earlyexit")
    assert first == 30 or logits[0, first].isnan().all()


# --- one by one -------------------------------------------------------------------------------------------------------


def test_uniform_is_a_function_of_its_arguments():
    index = torch.arange(-5, 5000)[None]
    numbers = torch.stack([baselines.uniform(s, layer, index) for s in (0, 1) for layer in range(20)])
    assert (numbers >= 0).all() and (numbers < 1).all()
    assert numbers.unique().numel() > 0.999 * numbers.numel()
    assert abs(numbers.mean() - 0.5) < 0.005 and abs(numbers.var() - 1 / 12) < 0.002
    flat = numbers.flatten(1)
    assert torch.corrcoef(flat).triu(1).abs().max() < 0.08  # between layers and seeds
    assert torch.corrcoef(torch.stack((flat[:, 1:].flatten(), flat[:, :-1].flatten())))[0, 1].abs() < 0.01  # neighbours
    assert torch.equal(baselines.uniform(1, 3, index[:, 7:9]), numbers[23][:, 7:9])
    assert baselines.uniform(0, 0, torch.tensor([[0]])).item() == numbers[0][0, 5].item()


def test_random_drops_any_layer():
    model = tiny_model(n_layers=8)
    trace, _ = ran(model, make("random", model, 0.3, -1), text(model, 1, 64))
    share = (~trace.ran).float().mean((1, 2))
    assert (share > 0.1).all() and abs(share.mean() - 0.3) < 0.06
    other, _ = ran(model, make("random", model, 0.3, -1, seed=1), text(model, 1, 64))
    assert not torch.equal(trace.ran, other.ran)


def test_static_drops_outside_the_cold_regions():
    model = tiny_model(n_layers=8)
    trace, _ = ran(model, make("static", model, 0.3, -1), text(model, 1, 64))
    assert trace.ran[[0, 7]].all()
    share = (~trace.ran).float().mean((1, 2))
    assert (share[1:7] > 0.2).all() and abs(share.mean() - 0.3) < 0.06
    policy = baselines.static(model, 0.3, -1, cold_s=2, cold_e=5)
    trace, _ = ran(model, policy, text(model, 1, 64))
    assert trace.ran[[0, 1, 5, 6, 7]].all() and abs((~trace.ran).float().mean() - 0.3) < 0.06
    with pytest.raises(ValueError, match="6 of 8 layers"):
        baselines.static(model, 0.8)


@pytest.mark.parametrize("name", CHANCE)
def test_what_chance_drops_does_not_depend_on_the_input(name):
    model = tiny_model(n_layers=8)
    policy = make(name, model, 0.3, -1)
    one, _ = ran(model, policy, text(model, 1, 64, seed=1))
    two, _ = ran(model, policy, text(model, 1, 64, seed=2))
    assert torch.equal(one.ran, two.ran)
    other, _ = ran(model, make(name, model, 0.3, -1, seed=1), text(model, 1, 64, seed=1))
    assert not torch.equal(one.ran, other.ran)


def test_random_but_first_is_random_without_layer_0():
    model = tiny_model(n_layers=8)
    trace, _ = ran(model, make("random_but_first", model, 0.3, -1), text(model, 1, 64))
    share = (~trace.ran).float().mean((1, 2))
    assert share[0] == 0 and (share[1:] > 0.15).all() and abs(share.mean() - 0.3) < 0.06


@pytest.mark.parametrize(
    "name, n_layers, skip, k, first, last",
    [
        ("random_run", 8, 0.3, 2, 0, 8),
        ("random_run", 8, 0.05, 0, 0, 8),
        ("random_run", 8, 1.0, 8, 0, 8),
        ("static_run", 32, 0.15, 5, 10, 28),  # what model_ffn_baseline.py has for 32 layers,
        ("static_run", 40, 0.125, 5, 10, 35),  # and for 40
        ("static_run", 32, 18 / 32, 18, 10, 28),
        ("static_run", 8, 0.3, 2, 2, 7),
    ],
)
def test_a_run_of_neighbouring_blocks_is_dropped_from_a_start_of_chance(name, n_layers, skip, k, first, last):
    """As Python's randint draws it in model_ffn_baseline.py: each start from the first to last - k is as likely."""
    policy = make(name, tiny_model(n_layers=n_layers), skip, -1)
    trace = walk(policy, [[0.5]] * n_layers, list(range(1000)))
    dropped = ~trace.ran[:, 0]  # (layer, token)
    assert (dropped.sum(0) == k).all()
    if k == 0:
        return
    starts = dropped.long().argmax(0)  # (token,)
    number = torch.arange(n_layers)[:, None]
    assert torch.equal(dropped, (number >= starts) & (number < starts + k))
    times = starts.bincount(minlength=n_layers)
    assert times[first : last - k + 1].sum() == 1000
    assert times[first : last - k + 1].min() > 0.4 * 1000 / (last - k + 1 - first)


def test_a_run_longer_than_the_layers_that_are_not_cold_is_refused():
    with pytest.raises(ValueError, match="5 of 8 layers"):
        make("static_run", tiny_model(n_layers=8), 0.75)


@pytest.mark.parametrize("skip, k", [(0.03, 1), (0.077, 2), (0.108, 3), (0.126, 4), (0.9, 6)])
def test_authors_has_the_k_whose_ratio_is_nearest(skip, k):
    """The code of the authors knows a k and no ratio; on the text that it was chosen on no other k is nearer."""
    model, tokens = tiny_model(n_layers=16), text(tiny_model(), 4, 60)
    for layer in model.layers:  # so that some tokens, and not all, have a cosine above 0.95
        weight = layer.feed_forward.w2.weight
        weight.data *= 0.5 * 1.2**layer.layer_id / weight.data.std()
    policy = POLICIES["authors"](model, skip, 3, tokens)
    assert policy == FFNSkip(4, 11, math.nextafter(0.95, 1), 3, k, recheck=False, full_every=6)
    windows = [(ids, 0) for ids in tokens.tolist()]
    misses = [abs(skip_ratio(model, replace(policy, k=k), windows) - skip) for k in range(1, 7)]
    assert misses.index(min(misses)) == k - 1
    share = skip_ratio(model, replace(policy, k=1), windows) * 16 * 6 / 5
    assert 0.7 < share < 0.9


def test_the_warm_up_of_authors_is_that_of_their_code():
    model = tiny_model(n_layers=11)
    assert POLICIES["authors"](model, 0.1).warm_up_index == 13
    assert POLICIES["authors"](model, 0.1, max_seq_len=256).warm_up_index == 1
    assert POLICIES["authors"](model, 0.1, 5, max_seq_len=256).warm_up_index == 5
    with pytest.raises(ValueError, match="skips nothing in 10"):
        POLICIES["authors"](tiny_model(n_layers=10), 0.1)
    with pytest.raises(ValueError, match="past the warm-up of 61 tokens"):
        POLICIES["authors"](model, 0.1, 60, text(model, 4, 60))


def test_printed_is_algorithm_1_between_the_cold_regions_that_do_least_harm():
    """Those of the rule are tried, and parts of what they leave; here others do less harm than the rule's."""
    model, tokens = tiny_model(seed=3, n_layers=10), text(tiny_model(), 8, 60)
    windows, reference = as_windows(tokens), {}
    policy = POLICIES["printed"](model, 0.2, 3, tokens)
    cold_s, cold_e = cold_regions(measure(model, windows, 3).mean(0))
    assert policy == FFNSkip(policy.cold_s, policy.cold_e, policy.sim_threshold, 3)
    assert cold_s <= policy.cold_s < policy.cold_e <= cold_e
    assert abs(skip_ratio(model, policy, windows) - 0.2) <= 0.01
    by_rule = baselines.find_threshold(partial(FFNSkip, cold_s, cold_e, warm_up_index=3), model, windows, 0.2, -1, 1)
    kl = [quality(model, windows, each, reference)["kl"] for each in (policy, by_rule)]
    assert kl[0] <= kl[1] and (policy.cold_s, policy.cold_e) != (cold_s, cold_e)


def test_block_influence_by_hand():
    model, tokens = tiny_model(n_layers=3), text(tiny_model(), 2, 9)
    states, x = [], model.tok_embeddings(tokens)
    step = model.prepare(tokens, new_cache(model, len(tokens)), 0, None)
    for layer in model.layers:
        states.append(x)
        h = x + layer.attention(layer.attention_norm(x), step)
        x = h + layer.feed_forward(layer.ffn_norm(h))
    states.append(x)
    expected = []
    for before, after in zip(states, states[1:]):
        cosines = [(a @ b / a.norm() / b.norm()).item() for a, b in zip(before.flatten(0, 1), after.flatten(0, 1))]
        expected.append(1 - sum(cosines) / len(cosines))
    assert baselines.block_influence(model, tokens).tolist() == pytest.approx(expected, abs=1e-5)


def test_shortgpt_is_the_model_without_its_least_influential_layers():
    model = tiny_model(n_layers=5)
    tokens = text(model, 2, 12)
    policy = make("shortgpt", model, 0.4, -1, tokens=text(model, 3, seed=4))
    influence = baselines.block_influence(model, text(model, 3, seed=4)).tolist()
    kept = sorted(sorted(range(5), key=lambda i: influence[i])[2:])
    small = Transformer(ModelArgs(**vars(model.args) | dict(n_layers=3)))
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("layers.")}
    for new, old in enumerate(kept):
        weights |= {f"layers.{new}.{k}": v for k, v in model.layers[old].state_dict().items()}
    small.load_state_dict(weights)
    assert close(model(tokens, policy=policy), small(tokens))


def test_skipdecode_by_hand():
    model = tiny_model(n_layers=10)
    policy = baselines.SkipDecode(model, 0.3, warm_up_index=3, target_len=23)
    trace, _ = ran(model, policy, text(model, 2, 40))
    for t in range(40):
        progress = min(max(t - 3, 0) / 20, 1)  # from the last token of the warm-up to target_len
        left_out = round(6 * progress)  # 0 to 2 * 0.3 * 10
        expected = [not 2 <= layer < 2 + left_out for layer in range(10)]
        assert trace.ran[:, 0, t].tolist() == trace.ran[:, 1, t].tolist() == expected
    sets = [set(trace.ran[:, 0, t].nonzero().flatten().tolist()) for t in range(40)]
    assert all(later <= earlier for earlier, later in zip(sets, sets[1:]))
    assert (~trace.ran[:, :, 4:24]).float().mean() == pytest.approx(0.3, abs=0.02)
    with pytest.raises(ValueError, match="cannot skip 0.6"):
        baselines.SkipDecode(model, 0.6)


@pytest.mark.parametrize("name", EXITS)
def test_early_exit_by_hand(name):
    """Token by token and layer by layer, with a cache in plain lists."""
    model = tiny_model(n_layers=6)
    policy = make(name, model, warm_up_index=3)
    copy = name.startswith("statecopy")
    tokens = text(model, 1, 20)
    cache, trace = new_cache(model, len(tokens)), Trace()
    logits = run(model, tokens, chunks=1, cache=cache, policy=policy, trace=trace)
    exits = []
    mine = new_cache(model, len(tokens))
    for t in range(20):
        x, exited = model.tok_embeddings(tokens[:, t : t + 1]), None
        step = model.prepare(tokens[:, t : t + 1], mine, 0, None)
        for layer in model.layers:
            if exited is not None:
                if copy:
                    layer.attention.write_kv(layer.attention_norm(exited), step)
                continue
            past, x = x, layer(x, step)
            if policy.measure is baselines.confidence:
                probs = sorted(torch.softmax(model.logits(x)[0, 0], 0).tolist())
                score = probs[-1] - probs[-2]
            else:
                score = F.cosine_similarity(past, x, dim=-1).item()
            if t > 3 and score >= policy.threshold and layer.layer_id < 5:
                exited = x
                exits.append((t, layer.layer_id))
        mine.length += 1
        assert close(model.logits(x)[0], logits[0, t : t + 1])
    assert len(exits) > 3 and len({depth for _, depth in exits}) > 1
    assert close(cache.k, mine.k) and close(cache.v, mine.v) and torch.equal(cache.written, mine.written)
    expected = torch.ones(6, 20, dtype=torch.bool)
    for t, depth in exits:
        expected[depth + 1 :, t] = False
    assert torch.equal(trace.ran[:, 0], expected)
    assert cache.complete() == copy


@pytest.mark.parametrize("name", EXITS)
def test_a_name_says_what_an_exit_copies_and_measures(name):
    model = tiny_model(n_layers=8)
    policy = POLICIES[name](model, 0.25, tokens=text(model, 4, 60))
    assert policy.copy == name.startswith("statecopy")
    assert policy.measure is (baselines.similarity if name.endswith("cosine") else baselines.confidence)


def test_confidence_is_tested_after_every_fourth_layer():
    model = tiny_model(n_layers=10)
    policy = baselines.EarlyExit(True, baselines.confidence, -1.0, -1)  # leaves wherever it may
    trace, _ = ran(model, policy, text(model))
    assert trace.ran[:4].all() and not trace.ran[4:].any()
    assert baselines.EarlyExit(True, baselines.similarity, 1.0).every == 1


def test_checkerboard():
    model = tiny_model(n_layers=10)
    policy = make("checkerboard", model, 0.3, -1)
    trace, _ = ran(model, policy, text(model))
    skipped = ~trace.ran[:, 0]  # (layer, token)
    watch = Trace(cosines=True)
    model(text(model, 4, seed=9), policy=FFNSkip(0, 10, math.inf, warm_up_index=-1), trace=watch)
    changed_least = watch.cosine.mean((1, 2)).topk(6).indices.sort().values
    assert torch.equal(skipped.any(1).nonzero().flatten(), changed_least)
    assert (skipped.sum(0) == 3).all()
    assert not (skipped[:, 1:] & skipped[:, :-1]).any()  # of two neighbouring tokens, one has the block
    chosen = skipped[skipped.any(1)]
    assert not (chosen[1:] & chosen[:-1]).any()


def test_calibration_text_shapes():
    model = tiny_model(max_seq_len=64)
    assert baselines.calibration_text(model, list(range(30))).shape == (1, 30)
    assert baselines.calibration_text(model, torch.zeros(200, dtype=torch.long)).shape == (3, 64)
    assert baselines.calibration_text(tiny_model(max_seq_len=600), list(range(31)) * 40).shape == (2, 512)
    assert baselines.calibration_text(model, torch.zeros(2, 9, dtype=torch.long)).shape == (2, 9)
    own = baselines.calibration_text(tiny_model(max_seq_len=200))
    assert own.shape == (4, 128) and own.unique().numel() > 10
    assert math.isfinite(baselines.block_influence(model, own[:, :64]).sum())
