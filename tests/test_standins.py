"""standins.py: closed forms against plain ones, and a policy that keeps what every policy here promises."""

import argparse
import json
import math
import operator
import re

import fit_standins
import pytest
import torch
from safetensors.torch import save_file
from test_golden import GOLDEN
from tiny import Bytes, close, mistake, new_cache, run, tiny_model

import generate
from load_weights import load_model
from policies import standins
from support import common, measuring
from support.tracing import Trace


def random_fit(model, rank=3, seed=0):
    """Tensors of the right shapes, whose probe tells tokens apart."""
    torch.manual_seed(seed)
    n_layers, dim = model.args.n_layers, model.args.dim
    return dict(
        down=torch.randn(n_layers, 4, rank, dim) * 0.1, up=torch.randn(n_layers, 4, dim, rank) * 0.1,
        mean=torch.randn(n_layers, 4, dim) * 0.1, centre=torch.randn(n_layers, 4, dim),
        probe=torch.randn(n_layers, dim), bias=torch.randn(n_layers),
    )


def write_fit(path, model, fitted, budgets):
    """A fit file of the model; its name as text."""
    about = dict(budgets=json.dumps(budgets), weights_checksum=json.dumps(common.fingerprint(model)), model='"tiny"')
    save_file({name: value.contiguous() for name, value in fitted.items()}, str(path), about)
    return str(path)


def make_policy(model, log_budget=0.0, most=100):
    return standins.StandIns(standins.ready(random_fit(model), torch.float32), log_budget, most, warm_up_index=2)


def text(model, batch=2, seq=20):
    return torch.randint(model.args.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1))


def test_a_ridge_regression_is_least_squares_with_weighted_rows():
    torch.manual_seed(0)
    x, y, weight = torch.randn(50, 4).double(), torch.randn(50, 2).double(), torch.rand(50).double() + 0.1
    slope, bias, _ = fit_standins.fit_ridge(*fit_standins.moments(x, y, weight), ridge=0.0)
    ones = torch.cat([x, torch.ones(50, 1).double()], dim=1) * weight.sqrt()[:, None]
    expected = torch.linalg.lstsq(ones, y * weight.sqrt()[:, None]).solution
    assert torch.allclose(torch.cat([slope, bias[None]]), expected, atol=1e-9)


def test_a_map_of_full_rank_is_the_regression_and_a_smaller_one_the_best_of_its_rank():
    torch.manual_seed(0)
    x, weight = torch.randn(200, 5).double(), torch.ones(200).double()
    y = x @ torch.randn(5, 5).double() + 0.1 * torch.randn(200, 5).double() + 3
    errors = []
    for rank in 5, 3, 1:
        down, up, mean = fit_standins.fit_map(*fit_standins.moments(x, y, weight), rank)
        assert down.shape == (rank, 5) and up.shape == (5, rank)
        errors.append((x @ down.T @ up.T + mean - y).square().sum().item())
    slope, bias, _ = fit_standins.fit_ridge(*fit_standins.moments(x, y, weight), 0.1)
    assert errors[0] == pytest.approx((x @ slope + bias - y).square().sum().item())
    assert errors[0] < errors[1] < errors[2]
    line = x[:, :1] @ torch.ones(1, 5).double()
    down, up, mean = fit_standins.fit_map(*fit_standins.moments(x, line, weight), 1)
    assert torch.allclose(x @ down.T @ up.T + mean, (x @ down.T @ up.T + mean)[:, :1].expand(-1, 5), atol=1e-9)


def test_a_probe_is_the_logarithm_of_the_mean_of_a_noisy_harm():
    """Not the mean of the logarithm, here lower by half a nat; from rows that weigh nothing it learns nothing."""
    torch.manual_seed(0)
    x = torch.randn(20000, 2).double()
    harm = (x[:, 0] - 3 + torch.randn(20000).double()).exp()
    held, weight = torch.arange(20000) % 5 == 4, torch.ones(20000).double()
    weight[:4000], harm[:4000][~held[:4000]] = 0.0, 1e3
    probe, bias = fit_standins.fit_probe(x, harm, weight, held)
    assert bias.item() == pytest.approx(-2.5, abs=0.1) and probe[0].item() == pytest.approx(1, abs=0.1)
    assert abs(probe[1].item()) < 0.1


def test_every_cell_has_a_map_of_its_own():
    """Two groups of inputs with opposite maps: two cells find both, and one map for all finds neither."""
    torch.manual_seed(0)
    group = torch.arange(400) % 2
    x = torch.randn(400, 3).double() + 8 * group[:, None]
    y = torch.where(group[:, None] == 1, x - 8, -x)
    centre = fit_standins.find_centres(x, 2)
    cell = standins.nearest(x, centre, standins.centre_offset(centre))
    assert torch.equal(cell, torch.cdist(x, centre).argmin(1)) and torch.equal(cell == cell[0], group == group[0])
    errors = []
    for n in 1, 2:
        down, up, mean = fit_standins.fit_maps(x, y, torch.ones(400).double(), cell * (n - 1), n, 3)
        own = cell * (n - 1)
        found = torch.einsum("td,trd,tkr->tk", x, down[own], up[own]) + mean[own]
        errors.append((found - y).square().mean().item())
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("prompt_len", [0, 7])
def test_gradients_are_those_of_the_whole_model(prompt_len):
    """Layer by layer they equal what autograd finds for the sum of log-likelihoods of the labels that were drawn."""
    model = tiny_model(n_layers=3)
    ids = text(model, 1, 40)[0].tolist()
    found = fit_standins.gradients(model, [(ids, prompt_len)], seed=0)
    with torch.enable_grad():
        states = [model.tok_embeddings(torch.tensor([ids])).requires_grad_()]
        for layer in model.layers:  # each with a cache of its own, which is written in place
            states.append(layer(states[-1], fit_standins.new_step(model, ids, 0)[1]))
        logits = model.logits(states[-1])[0, prompt_len:] / fit_standins.TEMPERATURE
    torch.manual_seed(0)
    labels = torch.multinomial(logits.detach().softmax(-1), fit_standins.DRAWS, replacement=True)
    for draw in range(fit_standins.DRAWS):
        loss = torch.nn.functional.cross_entropy(logits, labels[:, draw], reduction="sum")
        gradients = torch.autograd.grad(fit_standins.TEMPERATURE * loss, states[1:], retain_graph=True)
        for layer, gradient in enumerate(gradients):
            assert close(found[layer][0][:, draw], gradient[0, prompt_len + 26 :])


def test_a_budget_of_nothing_is_dense_bit_for_bit():
    model = tiny_model()
    tokens = text(model)
    for policy in make_policy(model, -math.inf), make_policy(model).shifted(math.inf):  # of e^-inf as many nats
        assert torch.equal(model(tokens, policy=policy), model(tokens))


@pytest.mark.parametrize("chunk", [1, 7])
def test_one_pass_is_token_by_token_and_the_cache_is_complete(chunk):
    model = tiny_model()
    tokens, whole = text(model), Trace()
    expected = model(tokens, policy=make_policy(model), trace=whole)
    cache, trace = new_cache(model, 2), Trace()
    out = run(model, tokens, chunks=chunk, cache=cache, policy=make_policy(model), trace=trace)
    assert torch.equal(trace.ran, whole.ran) and 0.1 < trace.ffn_skip_ratio(2) < 0.9
    assert close(out, expected) and cache.complete()


def test_no_token_skips_more_than_its_cap_and_none_within_the_warm_up():
    model, trace = tiny_model(), Trace()
    model(text(model), policy=make_policy(model, math.inf, most=2), trace=trace)
    skipped = (~trace.ran).sum(0)
    assert (skipped[:, 3:] == 2).all() and (skipped[:, :3] == 0).all()


def test_of_rank_0_nothing_stands_in():
    """Neither in one pass nor token by token."""
    model = tiny_model()
    maps = fit_standins.fit_maps(torch.randn(9, model.args.dim), None, None, None, n=4, rank=0)
    parts = dict(zip(("down", "up", "mean"), [part.expand(model.args.n_layers, *part.shape) for part in maps]))
    policy = standins.StandIns(standins.ready(random_fit(model) | parts, torch.float32), 0.0, 100, warm_up_index=2)
    tokens, trace = text(model), Trace()
    out = model(tokens, policy=policy, trace=trace)

    def without(layers, x, step):
        for layer in layers:
            x = layer.add_feed_forward(layer.add_attention(x, step), step, active=trace.ran[layer.layer_id])
        return x

    assert 0.1 < trace.ffn_skip_ratio(2) < 0.9 and close(out, model(tokens, policy=without))
    row = tokens[:1]
    alone = model(row, policy=policy)
    assert close(run(model, row, chunks=1, cache=new_cache(model, 1), policy=policy), alone)


def test_what_stands_in_is_the_low_rank_map():
    model = tiny_model(n_layers=1)
    policy, tokens = make_policy(model, math.inf), text(model, 1, 4)
    fitted, layer = policy.fitted, model.layers[0]

    def by_hand(layers, x, step):
        h = layer.add_attention(x, step)
        normed = layer.ffn_norm(h)
        cell = torch.cdist(normed, fitted["centre"][0]).argmin(-1)  # (1, 4)
        low = torch.einsum("bsd,bsrd->bsr", normed, fitted["down"][0][cell])
        stand_in = h + torch.einsum("bsr,bsdr->bsd", low, fitted["up"][0][cell]) + fitted["mean"][0][cell]
        return torch.where(step.token_index[..., None] > 2, stand_in, layer.add_feed_forward(h, step))

    assert close(model(tokens, policy=policy), model(tokens, policy=by_hand))


def test_a_fit_brings_a_policy_to_its_ratio_and_does_less_harm_than_leaving_blocks_out(tmp_path):
    model = tiny_model(n_layers=3, dtype=torch.float32)
    windows = [(ids, 0) for ids in text(model, 12, 60).tolist()]
    fitted = fit_standins.fit_twice(model, windows, n=2, rank=8, seed=0)
    file = write_fit(tmp_path / "f.safetensors", model, fitted, [[0.1, -9.0], [0.3, -7.0]])
    tokens = text(model, 4, 60)
    policy = standins.make(model, 0.3, tokens=tokens, fitted=file)
    assert all(part.isfinite().all() for part in fitted.values())
    trace = Trace()
    skipping = model(tokens, policy=policy, trace=trace)
    assert trace.ffn_skip_ratio(25) == pytest.approx(0.3, abs=0.02)

    def without(layers, x, step):
        for layer in layers:
            x = layer.add_feed_forward(layer.add_attention(x, step), step, active=trace.ran[layer.layer_id])
        return x

    dense = model(tokens)
    assert (skipping - dense).square().mean() < (model(tokens, policy=without) - dense).square().mean()
    chat = standins.make(model, 0.2, fitted=file)
    assert chat.log_budget == pytest.approx(-8) and chat.most == 1
    assert standins.cap(tiny_model(n_layers=30), 0.15) == 7  # 23 %: no answer is more than ten points off


def test_budgets_are_those_at_which_the_wanted_shares_are_skipped(monkeypatch):
    """With a cap and without, one after the other, in few passes; where the cap allows no more than the share, all."""
    model, tokens = tiny_model(), text(tiny_model(), 4, 60)
    parts, windows = standins.ready(random_fit(model), torch.float32), measuring.as_windows(tokens)
    wanted = [(0.1, 1), (0.25, 2), (0.4, 4), (0.2, 4), (0.25, 1), (0.0, 4)]
    passes = count_calls(monkeypatch, standins, "measure")
    budgets = standins.find_budgets(model, parts, wanted, windows, 2)
    assert len(passes) <= 1 + 2 * len(wanted)
    for (skip, most), budget in zip(wanted, budgets, strict=True):
        policy = standins.StandIns(parts, budget, most, warm_up_index=2)
        assert measuring.skip_ratio(model, policy, windows) == pytest.approx(skip, abs=0.006)
    passes.clear()
    standins.find_budgets(model, parts, [(0.9, 2)], windows, 2)  # which no budget reaches
    assert len(passes) <= 3
    with pytest.raises(ValueError, match="no text in windows of 60 tokens lies past the warm-up of 61"):
        standins.find_budgets(model, parts, wanted, windows, 60)


def test_every_fifth_window_is_held_and_tells_the_maps_nothing():
    model, fits = tiny_model(n_layers=2), []
    windows = measuring.as_windows(text(model, 6, 40))
    for some in windows[:5], windows[:4] + windows[5:]:
        gradient = fit_standins.gradients(model, some, seed=0)
        fits.append(fit_standins.fit(model, some, gradient, n=2, rank=3)[0])
    same = {name: torch.equal(fits[0][name], fits[1][name]) for name in standins.PARTS}
    assert same == dict(down=True, up=True, mean=True, centre=True, probe=False, bias=False)


def test_a_layer_is_fitted_on_the_states_that_stand_ins_before_it_leave():
    """With one map per layer its centre is the mean of the inputs: those that the policy gives to the layer."""
    model, inputs = tiny_model(n_layers=2), []
    windows = measuring.as_windows(text(model, 5, 40))
    fitted, _ = fit_standins.fit(model, windows, fit_standins.gradients(model, windows, 0), 1, 3, log_budget=math.inf)
    policy = standins.StandIns(standins.ready(fitted, torch.float32), math.inf, most=2)

    def first_layer(layers, x, step):
        h = layers[1].add_attention(policy(layers[:1], x, step), step)
        inputs.append(layers[1].ffn_norm(h)[0, 26:])
        return h

    for ids, _ in windows[:4]:  # the fifth is held
        model(torch.tensor([ids]), policy=first_layer)
    assert close(fitted["centre"][1, 0], torch.cat(inputs).mean(0))


def count_calls(monkeypatch, module, name):
    """A list that grows by the arguments of each call of the module's function."""
    calls, function = [], getattr(module, name)

    def counted(*args):
        calls.append(args)
        return function(*args)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("n, few", [(8, 2), (2, 1)])
def test_the_first_fit_has_a_part_of_the_windows_and_of_the_maps(n, few, monkeypatch):
    model = tiny_model(n_layers=2)
    fits = count_calls(monkeypatch, fit_standins, "fit")
    fit_standins.fit_twice(model, [(ids, 0) for ids in text(model, 40, 40).tolist()], n, rank=2, seed=0)
    assert [(len(windows), n) for _, windows, _, n, *_ in fits] == [(10, few), (40, n)]


def test_what_is_held_out_is_the_end_of_every_file_and_not_fitted_on(model, tmp_path):
    """Of text the last eighth, none of whose sentences is asked about, and of chat the last eight."""
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text("\n".join(f"Sentence {i} of file {file.stem} is here." for i in range(200)))
    options = argparse.Namespace(text=files, tokens=8192, seed=0)
    windows, text_held, chat_held = fit_standins.gather(model, Bytes(), options)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).tolist()  # by --seed alone
    assert windows[order.index(0)][0] == list(files[0].read_bytes()[:512])
    assert [prompt_len for _, prompt_len in text_held] == [0, 0]
    for file, (ids, _) in zip(files, text_held, strict=True):
        assert bytes(ids).decode() == file.read_text()[3584:4096]
    assert sum(prompt_len == 0 for _, prompt_len in windows) == 14 and len(chat_held) == 16
    kinds = [prompt_len > 0 for _, prompt_len in windows]
    assert sum(map(operator.ne, kinds, kinds[1:])) > 3  # in the order of files they would change three times
    for name, held in ("a", chat_held[:8]), ("b", chat_held[8:]):
        own = [window for window in windows if window[1] and f"file {name}".encode() in bytes(window[0])]
        assert len(own) >= 12 and max(map(sentence_number, own)) < min(map(sentence_number, held))
        assert not {119, 120, 128} & set(map(sentence_number, own))  # 120 and 128 would have their turn
        assert all(f"file {name}".encode() in bytes(ids) for ids, _ in held)
    for ids, prompt_len in [window for window in windows if window[1]] + chat_held:
        first = next(generate.generate(model, ids[:prompt_len], 1))
        assert first == ids[prompt_len]


def test_no_window_is_within_the_warm_up_or_longer_than_the_context(tmp_path):
    """A rest of text that is all warm-up is not what is held out; an answer that fills the context ends with it."""
    model, options = tiny_model(vocab_size=128, max_seq_len=96), argparse.Namespace(text=[], tokens=2 * 970, seed=0)
    for name in "a", "b":
        options.text.append(tmp_path / f"{name}.txt")
        options.text[-1].write_text("\n".join(f"Sentence {i} of {name} is here." for i in range(200)))
    tokenizer = Bytes()
    tokenizer.encode = lambda text, bos=None: [1] * (bos is None) + list(text.encode())
    tokenizer.eos_ids = set()
    windows, text_held, chat_held = fit_standins.gather(model, tokenizer, options)
    assert len(text_held) == 2 and max(len(ids) for ids, _ in chat_held) == 96
    for ids, prompt_len in windows + text_held + chat_held:
        assert 26 < len(ids) - prompt_len and len(ids) <= 96
    policy = standins.StandIns(standins.ready(random_fit(model), torch.float32), 0.0, 100)
    assert measuring.quality(model, text_held, policy, {})["perplexity"] > 1


def sentence_number(window):
    return int(re.search(rb"Sentence (\d+)", bytes(window[0]))[1])


def test_mistakes_are_one_line(tmp_path, capsys):
    model, file = tiny_model(), tmp_path / "f.safetensors"
    with pytest.raises(ValueError, match="needs a fit of this checkpoint: python experiments/fit_standins.py"):
        standins.make(model, 0.2)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="no fit of experiments/fit_standins.py"):
        standins.make(model, 0.2, fitted=str(file))
    other = tiny_model(n_layers=model.args.n_layers + 1)
    write_fit(file, other, random_fit(other), [[0.1, -9.0]])
    with pytest.raises(ValueError, match="and this model has"):
        standins.make(model, 0.2, fitted=str(file))
    write_fit(file, model, random_fit(model), [[0.1, -9.0]])
    with pytest.raises(ValueError, match="knows budgets for"):
        standins.make(model, 0.9, fitted=str(file))
    write_fit(file, model, random_fit(model) | dict(bias=torch.full((model.args.n_layers,), math.nan)), [[0.1, -9.0]])
    with pytest.raises(ValueError, match="numbers in it are not finite: fit anew"):
        standins.make(model, 0.1, fitted=str(file))
    write_fit(file, model, random_fit(model), [[0.1, -9.0]])
    with torch.no_grad():
        model.norm.weight[3] += 1
    with pytest.raises(ValueError, match="fitted for other weights, those of tiny: fit these anew"):
        standins.make(model, 0.1, fitted=str(file))
    args = ["--ckpt", str(GOLDEN / "hf-gqa"), "--policy", "standins", "--skip", "0.2", "x"]
    assert mistake(capsys, generate.main, *args).startswith("error: policy standins needs a fit of this checkpoint")
    other = [*args[:2], "--policy", "static", "--skip", "0.2", "--standins", str(file), "x"]
    line = mistake(capsys, generate.main, *other)
    assert line == "error: --standins is for policies standins and teal_standins, and the policy is static"
    with pytest.raises(ValueError, match="^nosuch: no such file$"):
        standins.make(model, 0.2, fitted="nosuch")
    assert "no checkpoint at" in mistake(capsys, fit_standins.main, "--text", str(file), "--ckpt", "nosuch")


def test_the_shipped_fit_does_what_it_says_of_itself(demo):
    """On the text and the chat that it was not fitted on, of which it holds the ids."""
    model, file = load_model(demo), common.HERE / "config" / "smollm2-135m-instruct.standins.safetensors"
    parts, about = standins.load(file, model)
    policy, expected = standins.StandIns(parts, dict(about["budgets"])[0.15], model.args.n_layers), about["quality"][1]
    trace, nll = Trace(), []
    for ids, _ in about["text_held"]:
        logits = model(torch.tensor([ids]), policy=policy, trace=trace)[0, 26:-1]  # past the warm-up
        nll.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[27:])))
    assert torch.stack(nll).mean().exp().item() == pytest.approx(expected["perplexity"], rel=0.01)
    assert trace.ffn_skip_ratio(25) == pytest.approx(expected["ffn_skip_ratio"], abs=0.005)
    policy = standins.make(model, 0.15, fitted=file)
    assert measuring.skip_ratio(model, policy, about["chat_held"]) == pytest.approx(0.15, abs=0.01)
