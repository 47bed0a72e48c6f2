"""
fast/ gives what model.py gives, sooner: model.py, which anyone can check by reading, is the oracle. What is replayed on
a GPU is in test_graphs.py.
"""

import copy
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn as nn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_baselines import make as baseline
from test_cache import Patchy
from tiny import close, models, new_cache, random_ids, tiny_model

from fast import accelerate, compare, one_row, parallel, plain
from model import Block, FeedForward, KVCache, Transformer, dense
from policies.baselines import POLICIES
from policies.standins import StandIns, ready
from skip import FFNSkip
from support.tracing import Trace


def random_standins(model, seed):
    """StandIns whose maps and probes are random, so that tokens skip here and there."""
    n_layers, dim, draw = model.args.n_layers, model.args.dim, torch.Generator().manual_seed(seed)
    shapes = dict(
        down=(n_layers, 2, 3, dim), up=(n_layers, 2, dim, 3), mean=(n_layers, 2, dim), centre=(n_layers, 2, dim),
        probe=(n_layers, dim), bias=(n_layers,),
    )  # fmt: skip
    parts = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return StandIns(ready(parts, torch.float32), 0.0, n_layers, warm_up_index=1)


def make(name, model, seed):
    """A policy by its name, made of the model, which skips some blocks of it."""
    if name == "standins":
        return random_standins(model, seed)
    if name == "ffnskip":
        return FFNSkip(0, model.args.n_layers, 0.9, warm_up_index=1, k=1)
    if name == "printed":
        return FFNSkip(0, model.args.n_layers, 0.9, warm_up_index=1)
    tokens = torch.tensor(random_ids(48, seed)).view(4, 12)
    if name == "dense":
        return None
    if name == "patchy":  # which skips attention too, and says so for the only token of a pass
        return Patchy(3)
    return baseline(name, model, 0.25, 1, tokens, seed)


def decode(model, ids, policy, prompt_len):
    """(logits, cache, trace) of a text whose prompt is forwarded at once, and the rest token by token."""
    tokens, trace, cache, logits = torch.tensor([ids]), Trace(), new_cache(model, 1), []
    for part in tokens.tensor_split([*range(prompt_len, len(ids))], dim=1):
        logits.append(model(part, cache, policy, prompt_len, trace=trace))
    return torch.cat(logits, dim=1), cache, trace


@pytest.mark.parametrize("name", ["dense", "ffnskip", "patchy", "standins", *POLICIES])
@settings(max_examples=8)
@given(data=st.data())
def test_an_accelerated_model_is_the_plain_one(name, data):
    """
    Logits to 5e-5 in float32, since fifteen layers of rounding were found at 1e-5; what ran, what was written and what
    was compared, exactly.
    """
    at_least = 11 if name == "authors" else 5
    model, seed = data.draw(models(n_layers=st.integers(at_least, at_least + 4))), data.draw(st.integers(0, 2**20))
    fast, ids = accelerate(copy.deepcopy(model)), random_ids(14, seed)
    policy = make(name, model, seed)
    logits, cache, trace = decode(model, ids, policy, prompt_len=4)
    if name in ("ffnskip", "printed", "authors"):  # at a tie, rounding decides
        assume(((trace.cosine - policy.threshold(model.layers[0])).abs().nan_to_num(1) > 1e-5).all())
    fast_logits, fast_cache, fast_trace = decode(fast, ids, policy, prompt_len=4)
    assert close(fast_logits, logits, 5e-5)
    assert torch.equal(fast_trace.ran, trace.ran) and torch.equal(fast_cache.written, cache.written)
    assert torch.allclose(fast_trace.cosine, trace.cosine, atol=1e-5, equal_nan=True)
    assert close(fast_cache.k, cache.k, 5e-5) and close(fast_cache.v, cache.v, 5e-5)


@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_an_infinite_threshold_is_dense_bit_for_bit_on_either(data, dtype):
    model = data.draw(models(dtype=dtype))
    skip = FFNSkip(0, model.args.n_layers, math.inf, warm_up_index=-1)
    for each in model, accelerate(copy.deepcopy(model)):
        logits, cache, _ = decode(each, random_ids(12), None, prompt_len=5)
        again, again_cache, trace = decode(each, random_ids(12), skip, prompt_len=5)
        assert torch.equal(again, logits) and torch.equal(again_cache.k, cache.k)
        assert trace.ran.all() and cache.complete() and again_cache.complete()
    assert one_row.way() is None  # how a pass multiplies is no way for what is computed after it


def test_accelerating_is_undone_and_changes_no_name_and_no_weight():
    model = tiny_model()
    weights, classes = model.state_dict(), [type(module) for module in model.modules()]
    assert accelerate(model) is model and type(model) is not Transformer
    found = model.state_dict()
    assert list(found) == list(weights) and all(found[name] is weights[name] or torch.equal(found[name], weights[name])
                                                for name in weights)
    assert [type(module) for module in plain(model).modules()] == classes


def test_monitoring_a_layer_costs_one_dot_product():
    """The two norms around it have the squares of h and of temp."""
    model = accelerate(tiny_model(n_layers=4))
    monitor, calls = FFNSkip(0, 4, 1.0005, warm_up_index=-1), []
    for policy in None, monitor:
        cache = new_cache(model, 1)
        for part in [1, 2], [3]:
            model(torch.tensor([part]), cache)
        with mock.patch.object(torch, "dot", side_effect=torch.dot) as dot:
            model(torch.tensor([[3]]), cache, policy)
        calls.append(dot.call_count)
    assert calls == [2 * 4 + 1, 2 * 4 + 1 + 4 + 1]  # two norms per layer and the final one; the last temp twice


def test_only_a_cache_as_model_py_has_it_is_written_to_directly():
    class Counting(KVCache):
        writes = 0

        def write(self, *args):
            self.writes += 1
            return super().write(*args)

    model = accelerate(tiny_model(n_layers=4))
    cache = Counting(model.args, 1, 8)
    model(torch.tensor([[1]]), cache)
    assert cache.writes == 4
    cache, written = new_cache(model, 1), []
    write = cache.write
    cache.write = lambda layer_id, *args: written.append(layer_id) or write(layer_id, *args)
    model(torch.tensor([[1]]), cache)
    assert written == [0, 1, 2, 3]


def test_a_cache_serves_one_model_after_another_and_a_copy_of_it_stands_alone():
    model, other = accelerate(tiny_model(seed=1)), accelerate(tiny_model(seed=2))
    cache = new_cache(model, 1)
    model(torch.tensor([[1]]), cache)
    copied = copy.deepcopy(cache)
    logits = other(torch.tensor([[2]]), cache)
    assert close(other(torch.tensor([[2]]), copied), logits)
    assert close(plain(other)(torch.tensor([[2]]), fresh(model)), logits)


def fresh(model):
    """A cache that holds token 1 as the model writes it."""
    cache = new_cache(model, 1)
    model(torch.tensor([[1]]), cache)
    return cache


def test_one_row_of_several_processes_has_vectors_too():
    """Their blocks carry a hook that sums over the processes; a layer with any other hook is walked as it is."""
    model = accelerate(tiny_model())
    for module in model.layers[0].attention, model.layers[0].feed_forward:
        module.register_forward_hook(parallel.add_up)
    assert one_row.is_plain(model.layers[0])
    for register in "register_forward_hook", "register_forward_pre_hook":
        handle = getattr(model.layers[0].feed_forward.w1, register)(lambda module, *args: None)
        assert not one_row.is_plain(model.layers[0])
        handle.remove()
    assert one_row.is_plain(model.layers[0])


def test_a_mask_is_left_out_only_where_the_kernel_is_known_to_be_right():
    """On a Mac's GPU, which is simulated here by the device's name, there always is one."""
    def needs_no_mask(device, seq, length=0, pad=0):
        cache = SimpleNamespace(length=length, pad=torch.tensor([pad]))
        x = SimpleNamespace(size=lambda dim: seq, device=SimpleNamespace(type=device))
        return one_row.needs_no_mask(SimpleNamespace(cache=cache), x)

    assert needs_no_mask("cpu", 1, length=5) and needs_no_mask("cuda", 1, length=5) and needs_no_mask("cpu", 7)
    assert not needs_no_mask("cpu", 7, length=5) and not needs_no_mask("cuda", 7) and not needs_no_mask("cpu", 7, pad=1)
    assert not needs_no_mask("mps", 1, length=5) and not needs_no_mask("mps", 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_that_changes_a_state_in_place_is_told_so(dtype):
    """Its norm would be that of the state before; model.py's own layers compute every norm anew."""
    model = accelerate(tiny_model(dtype=dtype))

    def in_place(layers, x, step):
        for layer in layers:
            h = layer.add_attention(x, step)
            temp = layer.add_feed_forward(h, step)
            layer.cosine(h, temp)
            x = temp.mul_(0.5)
        return x

    cache = new_cache(model, 1)
    with pytest.raises(ValueError, match="the policy changed a state in place"):
        for token in random_ids(1 + one_row.VERIFY):
            model(torch.tensor([[token]]), cache, in_place)


CHANGES = {  # of model.py itself, as a fork has them, and of a model before its first row
    "SwiGLU": lambda model: mock.patch.object(FeedForward, "forward", lambda self, x: self.w2(self.w1(x).relu())),
    "add_attention": lambda model: mock.patch.object(Block, "add_attention", lambda self, x, step, active=None: 2 * x),
    "cosine": lambda model: mock.patch.object(Block, "cosine", lambda self, h, temp: [1.0] * h[..., 0].numel()),
    "bias": lambda model: mock.patch.object(model.layers[1].feed_forward.w2, "bias", nn.Parameter(torch.ones(16))),
    "eps": lambda model: mock.patch.object(model.layers[2].attention_norm, "eps", 0.5),
    "global hook": lambda model: nn.modules.module.register_module_forward_hook(lambda module, inputs, out: 2 * out),
    "method": lambda model: mock.patch.object(model.layers[3], "add_feed_forward", lambda h, step, active=None: h / 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_somebody_has_changed_decodes_as_it_stands(change, capsys):
    """Whoever forks changes model.py, and must not see the old one decode."""
    model = accelerate(tiny_model(seed=7))
    policy = FFNSkip(0, 4, 0.9, warm_up_index=-1, k=1)
    before = decode(model, random_ids(9), policy, prompt_len=3)[0]
    compared = dict(one_row.compared)
    one_row.compared.clear()
    with CHANGES[change](model):
        logits, _, trace = decode(model, random_ids(9), policy, prompt_len=3)
        expected, _, plain_trace = decode(plain(model), random_ids(9), policy, prompt_len=3)
    accelerate(model)
    one_row.compared.update(compared)
    assert close(logits, expected) and torch.equal(trace.ran, plain_trace.ran) and not close(logits, before)


def test_weights_that_are_changed_in_place_count_at_once():
    """Also those of which a Layer has a copy, the norms of a 16-bit model."""
    model = accelerate(tiny_model(dtype=torch.bfloat16))
    cache, other = new_cache(model, 1), new_cache(model, 1)
    for each in cache, other:
        model(torch.tensor([[1]]), each)
    for layer in model.layers:
        layer.attention_norm.weight.data.mul_(3)
        layer.ffn_norm.weight.data.mul_(0.2)
    fast = model(torch.tensor([[2]]), cache)
    assert close(fast, plain(model)(torch.tensor([[2]]), other), 0.05)


def test_a_draft_of_the_first_layers_shares_the_cache_of_the_whole_model():
    """As self-speculation has it: each walks its own layers, whoever came first."""
    model = accelerate(tiny_model())
    draft = accelerate(copy.deepcopy(model))
    draft.layers = model.layers[:2]
    for first, second in (model, draft), (draft, model):
        cache, other = new_cache(model, 1), new_cache(model, 1)
        for each in cache, other:
            first(torch.tensor([[1]]), each)
        fast = second(torch.tensor([[2]]), cache)
        assert close(fast, plain(second)(torch.tensor([[2]]), other))
        accelerate(second)


def test_a_step_with_another_cache_leaves_the_real_one_alone():
    """A policy that looks ahead on a copy."""
    model = accelerate(tiny_model())

    def look_ahead(layers, x, step):
        ahead = dataclasses.replace(step, cache=copy.deepcopy(step.cache))
        dense(layers, x + 1, ahead)
        return dense(layers, x, step)

    cache, other = new_cache(model, 1), new_cache(model, 1)
    for token in random_ids(4):
        logits = model(torch.tensor([[token]]), cache, look_ahead)
        assert torch.equal(logits, model(torch.tensor([[token]]), other)) and torch.equal(cache.k, other.k)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["bfloat16", "float32"]), st.integers(0, 9))
def test_a_sum_of_columns_is_the_product_whatever_the_number_of_parts(n_in, n_out, dtype, seed):
    """Summed in float32, to the same bits with one, two or four parts; and columns left out count as zero."""
    dtype, draw = getattr(torch, dtype), torch.Generator().manual_seed(seed)
    weight = one_row.by_columns(torch.randn(4 * n_out, n_in, generator=draw).to(dtype))
    x = torch.randn(n_in, generator=draw).to(dtype)
    expected = (weight.double() @ x.double()).to(dtype)
    for low in 0.0, 0.7, 99.0:
        outs = []
        for parts in 1, 2, 4:
            inputs = one_row.with_some_columns(x, low, parts)
            outs.append(one_row.sum_of_columns(inputs, one_row.table_of(weight, parts)))
        kept = torch.where(x.float().abs() < low, 0, x)
        expected = (weight.double() @ kept.double()).to(dtype)
        assert torch.allclose(outs[0], expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    every = one_row.sum_of_columns(one_row.with_columns(x, 2), one_row.table_of(weight, 2))
    assert torch.equal(every, one_row.sum_of_columns(one_row.with_some_columns(x, 0.0, 1), one_row.table_of(weight, 1)))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_model_by_columns_computes_and_holds_the_same(parts, monkeypatch):
    """Its names and shapes stay, one row of it is summed by columns, and decisions are the plain model's."""
    monkeypatch.setattr(one_row, "AMX", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: parts)
    model = accelerate(tiny_model(dtype=torch.bfloat16))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids, policy = random_ids(24), FFNSkip(0, model.args.n_layers, 0.9, warm_up_index=1, k=1)
    by_rows, _, _ = decode(model, ids, policy, prompt_len=2)
    for name, weight in model.named_parameters():
        weight.data = one_row.stored(name, weight.data, "cpu", weight.dtype)
    assert one_row.is_by_columns(model.layers[1].feed_forward.w2.weight)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    with mock.patch.object(one_row, "sum_of_columns", side_effect=one_row.sum_of_columns) as sums:
        logits, cache, trace = decode(model, ids, policy, prompt_len=2)
        assert sums.call_count > 22 * 4 * model.args.n_layers  # attention's four, and some blocks
    assert close(logits, by_rows, 0.02) and cache.complete()
    plain_logits, _, plain_trace = decode(plain(model), ids, policy, prompt_len=2)
    assert close(logits, plain_logits, 0.02) and torch.equal(trace.ran, plain_trace.ran)


@pytest.mark.parametrize("amx", [True, False])
def test_threads_do_not_disturb_each_other(amx, monkeypatch):
    """Each with a cache of its own, on either kind of CPU; and PyTorch is left as it was."""
    monkeypatch.setattr(one_row, "AMX", amx)
    monkeypatch.setattr(one_row, "AVX512_BF16", True)
    model = accelerate(tiny_model(n_heads=4, n_kv_heads=4, dtype=torch.bfloat16))
    texts = [random_ids(24, seed) for seed in range(4)]
    alone = [decode(model, ids, None, prompt_len=2)[0] for ids in texts]
    enabled = torch.backends.mkldnn.enabled
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda ids: decode(model, ids, None, prompt_len=2)[0], texts))
    assert all(close(a, b, 0.02) for a, b in zip(together, alone))
    assert one_row.way() is None and torch.backends.mkldnn.enabled == enabled


def test_what_is_compared_before_the_first_token_takes_none_of_its_time():
    """Else the first of two texts that are compared would pay for both."""
    model, calls = compare(accelerate(tiny_model())), []
    with mock.patch.object(one_row, "computes_the_same", side_effect=lambda *args: calls.append(args) or True):
        decode(model, random_ids(6), None, prompt_len=2)
        assert not calls
        decode(accelerate(tiny_model(seed=1)), random_ids(6), None, prompt_len=2)
    assert len(calls) == 4
