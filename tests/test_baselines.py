"""experiments/baselines.py on tiny random models: each policy by its definition, and what it leaves in the cache."""

import inspect
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import baselines
from tiny import chunkings, close, is_real, models, poisoned_cache, run, texts, tiny_model

from model import KVCache, ModelArgs, Transformer
from skip import FFNSkip, Trace

NAMES = [
    "random",
    "static",
    "shortgpt",
    "skipdecode",
    "statecopy",
    "statecopy_cosine",
    "earlyexit",
    "earlyexit_cosine",
    "yours",
]
COMPLETE = ["random", "static", "statecopy", "statecopy_cosine", "yours"]


def text(model, batch=1, seq=40, seed=0):
    return torch.randint(model.args.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))


def make(name, model, skip=0.3, warm_up_index=4, tokens=None, seed=0):
    """A policy of any name with a short warm-up, that skips something in models of few layers."""
    measure = baselines.similarity if "cosine" in name else baselines.confidence
    if name.startswith(("statecopy", "earlyexit")):  # without the factory's bisection, which has tests of its own
        policy = baselines.exit_policy(name.startswith("statecopy"), measure, 0.8 if "cosine" in name else 0.1)
        policy.every = 1
    else:
        tokens = text(model, 4, seed=9) if tokens is None else tokens
        policy = getattr(baselines, name)(model, skip, tokens=tokens, seed=seed)
    policy.warm_up_index, policy.target_len = warm_up_index, 20
    return policy


def ran(model, policy, tokens, **kwargs):
    trace = Trace()
    logits = model(tokens, policy=policy, trace=trace, **kwargs)
    return trace, logits


def keep_cache(model, tokens):
    return KVCache(model.args, len(tokens), model.args.max_seq_len, model.tok_embeddings.weight.dtype)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_factory(name):
    model = tiny_model(n_layers=8)
    policy = getattr(baselines, name)(model, 0.25, tokens=text(model, 4, 60))
    assert policy.warm_up_index == FFNSkip(0, 1, 1.0).warm_up_index == 25
    policy.target_len = 60
    assert len(inspect.getsource(getattr(baselines, name)).splitlines()) <= 30
    assert len(inspect.getsource(baselines.exit_policy).splitlines()) <= 30
    trace, _ = ran(model, policy, text(model, 2, 60))
    assert trace.ran[:, trace.token_index <= 25].all()
    assert not trace.ran[:, trace.token_index > 25].all()


@pytest.mark.parametrize("name", NAMES)
def test_ratio_on_calibration_text(name):
    model = tiny_model(n_layers=10)
    tokens = text(model, 8, 60)
    for skip in (0.1, 0.3):
        policy = getattr(baselines, name)(model, skip, tokens=tokens)
        policy.target_len = 60
        got = baselines.ffn_skip_ratio(model, policy, tokens)
        # exits after every fourth layer of ten leave gaps between the ratios that can be had
        assert abs(got - skip) <= (0.06 if name in ("random", "static") else 0.05 if "exit" in name else 0.02), name


@pytest.mark.parametrize("name", NAMES)
def test_calibrates_on_the_models_own_text(name):
    model = tiny_model(n_layers=4)
    policy = getattr(baselines, name)(model, 0.25)
    again = getattr(baselines, name)(model, 0.25)
    assert {k: v for k, v in vars(policy).items() if k != "measure"} == {
        k: v for k, v in vars(again).items() if k != "measure"
    }


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_batching_and_chunking_change_nothing(name, data):
    model = data.draw(models(n_layers=st.integers(5, 6)))
    inputs = data.draw(texts(model))
    tokens, pad = inputs["tokens"], inputs["pad"]
    policy = make(name, model, warm_up_index=data.draw(st.integers(-1, 3)), seed=data.draw(st.integers(0, 9)))
    whole, logits = ran(model, policy, **inputs)
    real = is_real(tokens, pad)
    trace = Trace()
    parts = run(
        model,
        chunks=data.draw(chunkings(tokens.size(1))),
        cache=keep_cache(model, tokens),
        policy=policy,
        trace=trace,
        **inputs,
    )
    row = data.draw(st.integers(0, len(tokens) - 1))
    start = 0 if pad is None else pad[row].item()
    prompt_len = inputs["prompt_len"] if isinstance(inputs["prompt_len"], int) else inputs["prompt_len"][row].item()
    alone, alone_logits = ran(model, policy, tokens[row : row + 1, start:], prompt_len=prompt_len)
    if torch.equal(whole.ran, trace.ran):  # rounding may flip a decision that is taken by a threshold
        assert close(logits[real], parts[real], 1e-4)
    if torch.equal(whole.ran[:, row, start:], alone.ran[:, 0]):
        assert close(logits[row, start:], alone_logits[0], 1e-4)
    if "statecopy" not in name and "earlyexit" not in name:
        assert torch.equal(whole.ran, trace.ran)
        assert torch.equal(whole.ran[:, row, start:], alone.ran[:, 0])
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
    policy.target_len = 20
    calls = {}
    for layer_id, layer in enumerate(model.layers):
        for part in ("feed_forward", "attention"):
            count = lambda *_, key=(part, layer_id): calls.__setitem__(key, calls.get(key, 0) + 1)
            layer.get_submodule(part).register_forward_hook(count)
        layer.attention.wk.register_forward_hook(
            lambda *_, key=("wk", layer_id): calls.__setitem__(key, calls.get(key, 0) + 1)
        )
    trace = Trace()
    tokens = text(model, 1, 30)
    run(model, tokens, chunks=[1] * 30, cache=keep_cache(model, tokens), policy=policy, trace=trace)
    executed = trace.ran.sum((1, 2)).tolist()
    assert [calls.get(("feed_forward", i), 0) for i in range(6)] == executed
    assert sum(executed) < 6 * 30
    attended = [calls.get(("attention", i), 0) for i in range(6)]
    also_skips = getattr(getattr(baselines, name), "also_skips", ())
    assert attended == (executed if also_skips else [30] * 6)
    written = "attention" in also_skips
    assert [calls.get(("wk", i), 0) for i in range(6)] == (executed if written else [30] * 6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_what_it_leaves_in_the_cache(name, chunk):
    model = tiny_model(n_layers=6)
    policy = make(name, model, warm_up_index=3)
    tokens = text(model, 2, 30)
    cache, trace = keep_cache(model, tokens), Trace()
    run(model, tokens, chunks=chunk, cache=cache, policy=policy, trace=trace)
    assert cache.complete() == (name in COMPLETE)
    holes = ~cache.written[:, :, :30]
    if name in COMPLETE:
        assert not baselines.attended_holes(cache).any()
    else:
        assert torch.equal(holes, ~trace.ran)  # a layer that did not run for a token has nothing of it
        assert cache.k[:, :, :, :30].transpose(2, 3)[holes].count_nonzero() == 0
    ran, empty = trace.ran.tolist(), holes.tolist()
    by_hand = [[[sum(empty[layer][row][:i]) if ran[layer][row][i] else 0 for i in range(30)] for row in range(2)]
               for layer in range(6)]  # fmt: skip
    assert baselines.attended_holes(cache).tolist() == by_hand
    assert baselines.attended_holes(cache).any() == name.startswith("earlyexit")


@pytest.mark.parametrize("name", NAMES)
def test_a_hole_that_is_read_shows(name):
    """Token by token through a cache of NaN: only earlyexit ever meets one, where it first reads a hole."""
    model = tiny_model(n_layers=6)
    policy = make(name, model, warm_up_index=3)
    tokens = text(model, 1, 30)
    cache, clean = poisoned_cache(model, 1), keep_cache(model, tokens)
    logits = run(model, tokens, chunks=1, cache=cache, policy=policy)
    run(model, tokens, chunks=1, cache=clean, policy=policy)
    reads = baselines.attended_holes(clean).sum((0, 1)) > 0  # (columns,)
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
    policy = make("static", model, 0.3, -1)
    trace, _ = ran(model, policy, text(model, 1, 64))
    assert trace.ran[[0, 7]].all()
    share = (~trace.ran).float().mean((1, 2))
    assert (share[1:7] > 0.2).all() and abs(share.mean() - 0.3) < 0.06
    policy.cold_s, policy.cold_e = 2, 5
    trace, _ = ran(model, policy, text(model, 1, 64))
    assert trace.ran[[0, 1, 5, 6, 7]].all() and abs((~trace.ran).float().mean() - 0.3) < 0.06
    with pytest.raises(ValueError, match="6 of 8 layers"):
        baselines.static(model, 0.8)


def test_static_does_not_look_at_the_input():
    model = tiny_model(n_layers=8)
    policy = make("static", model, 0.3, -1)
    one, _ = ran(model, policy, text(model, 1, 64, seed=1))
    two, _ = ran(model, policy, text(model, 1, 64, seed=2))
    assert torch.equal(one.ran, two.ran)


def test_block_influence_by_hand():
    model, tokens = tiny_model(n_layers=3), text(tiny_model(), 2, 9)
    states, x = [], model.tok_embeddings(tokens)
    step = model.prepare(2, 9, keep_cache(model, tokens))
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
    policy = baselines.skipdecode(model, 0.3)
    policy.warm_up_index, policy.target_len = 3, 23
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
        baselines.skipdecode(model, 0.6)


@pytest.mark.parametrize("name", [name for name in NAMES if "exit" in name or "copy" in name])
def test_early_exit_by_hand(name):
    """Token by token and layer by layer, with a cache in plain lists."""
    model = tiny_model(n_layers=6)
    policy = make(name, model, warm_up_index=3)
    copy = name.startswith("statecopy")
    tokens = text(model, 1, 20)
    cache, trace = keep_cache(model, tokens), Trace()
    logits = run(model, tokens, chunks=1, cache=cache, policy=policy, trace=trace)
    exits = []
    mine = keep_cache(model, tokens)
    for t in range(20):
        x, exited = model.tok_embeddings(tokens[:, t : t + 1]), None
        step = model.prepare(1, 1, mine)
        for layer in model.layers:
            if exited is not None:
                if copy:
                    layer.remember(exited, step)
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


def test_confidence_is_tested_after_every_fourth_layer():
    model = tiny_model(n_layers=10)
    policy = baselines.exit_policy(True, baselines.confidence, -1.0)  # leaves wherever it may
    policy.warm_up_index = -1
    trace, _ = ran(model, policy, text(model))
    assert trace.ran[:4].all() and not trace.ran[4:].any()
    assert baselines.exit_policy(True, baselines.similarity, 1.0).every == 1


def test_checkerboard():
    model = tiny_model(n_layers=10)
    policy = make("yours", model, 0.3, -1)
    trace, _ = ran(model, policy, text(model))
    skipped = ~trace.ran[:, 0]  # (layer, token)
    watch = Trace()
    model(text(model, 4, seed=9), policy=FFNSkip(0, 10, math.inf, warm_up_index=-1), trace=watch)
    changed_least = watch.cosine.mean((1, 2)).topk(6).indices.sort().values
    assert torch.equal(skipped.any(1).nonzero().flatten(), changed_least)
    assert (skipped.sum(0) == 3).all()
    assert not (skipped[:, 1:] & skipped[:, :-1]).any()  # of two neighbouring tokens, one has the block
    chosen = skipped[skipped.any(1)]
    assert not (chosen[1:] & chosen[:-1]).any()


def test_bring_to():
    model, tokens, tried = tiny_model(n_layers=6), text(tiny_model(), 8), []

    def at(value):
        tried.append(value)
        policy = baselines.random(model, 0.8 * (1 - value) ** 2)
        policy.warm_up_index = -1
        return policy

    for skip in (0.05, 0.4, 0.7):
        tried.clear()
        policy = baselines.bring_to(at, 0, 1, skip, model, tokens, tolerance=0.02)
        assert baselines.ffn_skip_ratio(model, policy, tokens) == pytest.approx(skip, abs=0.02)
        assert len(tried) <= 10
    nearest = baselines.bring_to(at, 0, 1, 0.95, model, tokens)  # out of reach
    assert nearest.skip == pytest.approx(0.8, abs=0.01)


def test_bring_to_gives_the_nearest_of_few():
    model, tokens = tiny_model(n_layers=6), text(tiny_model(), 4)

    def at(value):
        policy = baselines.random(model, 0.5 if value < 0.3 else 0.0)
        policy.warm_up_index = -1
        return policy

    for skip, near in (0.1, 0.0), (0.45, 0.5):
        assert baselines.bring_to(at, 0, 1, skip, model, tokens).skip == near
    policy = at(0)
    policy.warm_up_index = 40
    with pytest.raises(ValueError, match="past the warm-up of 41"):
        baselines.ffn_skip_ratio(model, policy, tokens)


def test_calibration_text_shapes():
    model = tiny_model(max_seq_len=64)
    assert baselines.calibration_text(model, list(range(30))).shape == (1, 30)
    assert baselines.calibration_text(model, torch.zeros(200, dtype=torch.long)).shape == (3, 64)
    assert baselines.calibration_text(model, torch.zeros(2, 9, dtype=torch.long)).shape == (2, 9)
    own = baselines.calibration_text(tiny_model(max_seq_len=200))
    assert own.shape == (4, 128) and own.unique().numel() > 10
    assert math.isfinite(baselines.block_influence(model, own[:, :64]).sum())
