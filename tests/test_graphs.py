"""
graphs.py: what is replayed is what would have run. On the CPU a graph is played by a stand-in that calls its function
again on the same memory, and writes into the same output, which holds NaN before; on a GPU by CUDA itself.
"""

import math
from unittest import mock

import pytest
import standins
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cache import Patchy
from test_standins import random_fit
from tiny import close, models, texts, tiny_model

import graphs
from generate import generate
from graphs import Graphs, add_graphs
from model import KVCache
from skip import FFNSkip, Trace

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
pytestmark = pytest.mark.parametrize("device", DEVICES)


class Again:
    """A graph that is none: it calls its function anew."""

    def __init__(self, function, inputs, output):
        self.function, self.inputs, self.output = function, inputs, output

    def replay(self):
        for kept, new in zip(flat(self.output), flat(self.function(*self.inputs))):
            kept.copy_(new)


def flat(output):
    """The tensors of a captured function's output, of which there may be one, two or none."""
    return output if isinstance(output, tuple) else [output] if output is not None else []


def capture_again(self, pool, function, *inputs):
    cache = self.cache.k.clone(), self.cache.v.clone()
    output = function(*inputs)
    self.cache.k.copy_(cache[0])  # a capture runs nothing
    self.cache.v.copy_(cache[1])
    for tensor in flat(output):
        tensor.fill_(math.nan)
    return Again(function, inputs, output), output


@pytest.fixture(autouse=True)
def graphs_of_eight_columns(device, monkeypatch):
    monkeypatch.setattr(graphs, "COLUMNS", 8)  # short texts need several recordings
    if device == "cpu":
        fake = mock.MagicMock()
        fake.is_available.return_value = False
        monkeypatch.setattr(graphs, "cuda", fake)
        monkeypatch.setattr(Graphs, "capture", capture_again)


def new_cache(model, batch, columns, replay):
    weight = model.norm.weight
    cache = KVCache(model.args, batch, columns, weight.dtype, weight.device)
    if replay:
        cache.graphs = Graphs(model, cache)
    return cache


def decode(model, tokens, policy=None, pad=None, replay=True, first=2, prompt_len=1, cache=None):
    """(logits, cache, trace) of tokens (batch, seq): the first ones at once, the others one by one."""
    tokens, trace, logits = tokens.to(model.norm.weight.device), Trace(), []
    cache = cache or new_cache(model, *tokens.shape, replay)
    for part in tokens.tensor_split([*range(first, tokens.size(1))], dim=1):
        logits.append(model(part, cache, policy, prompt_len, pad, trace=trace).cpu())
    return torch.cat(logits, dim=1), cache, trace


def policies(n_layers):
    """Some that compare, some that do not, and one whose tokens skip other things in one row than in the next."""
    cold = st.sampled_from([(0, n_layers), (1, max(1, n_layers - 1))])
    k, threshold = st.sampled_from([None, 1, 2]), st.sampled_from([-1.0, 0.6, 0.9, math.inf])
    skips = st.builds(lambda cold, s, k: FFNSkip(*cold, s, warm_up_index=0, k=k), cold, threshold, k)
    return st.none() | skips | st.builds(Patchy, st.integers(2, 3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_replayed_is_what_would_have_run(device, data):
    """Any model, padding and policy: logits and cache to fp32 rounding, and what ran, and what is missing, exactly."""
    model = data.draw(models()).to(device)
    text = data.draw(texts(model, max_seq=21))
    policy = data.draw(policies(model.args.n_layers))
    expected, eager, ran = decode(model, text["tokens"], policy, text["pad"], replay=False)
    logits, cache, ran_too = decode(model, text["tokens"], policy, text["pad"])
    assert close(logits, expected)
    assert close(cache.k.cpu(), eager.k.cpu()) and close(cache.v.cpu(), eager.v.cpu())
    assert torch.equal(cache.written, eager.written) and torch.equal(ran_too.ran, ran.ran)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_skip_share_their_graphs(device, dtype):
    """Threshold infinity, and watching that skips nothing, give the dense logits and cache bit for bit."""
    model = tiny_model(dtype=dtype).to(device)
    tokens = torch.randint(31, (2, 30))
    logits, cache, _ = decode(model, tokens)
    for threshold in math.inf, 1.0005:
        same, same_cache, trace = decode(model, tokens, FFNSkip(0, 4, threshold, warm_up_index=-1))
        assert torch.equal(same, logits) and torch.equal(same_cache.k, cache.k) and trace.ran.all()


def test_states_keep_their_numbers_until_the_next_token(device):
    """A policy may look back at the states of earlier layers: no graph writes into the memory of another."""
    model, seen = tiny_model().to(device), []

    def keep(layers, x, step):
        kept = []
        for layer in layers:
            h = layer.add_attention(x, step)
            x = layer.add_feed_forward(h, step)
            kept += [(h, h.clone()), (x, x.clone())]
        seen.append(all(torch.equal(state, copy) for state, copy in kept))
        return x

    decode(model, torch.randint(31, (1, 20)), keep)
    assert len(seen) == 19 and all(seen)


@pytest.mark.parametrize("exits", [False, True])
def test_attention_begun_early_counts_only_for_the_state_that_it_saw(device, exits):
    """read() begins the next layer's attention to temp; a policy may hand on h instead, or leave that layer out."""

    def compare_and_forget(layers, x, step):
        for layer in layers:
            h = layer.add_attention(x, step)
            temp = layer.add_feed_forward(h, step)
            if not exits or step.positions[0, -1] % 2:
                numbers = graphs.read(layer, dot, h, temp)
                assert torch.allclose(torch.tensor(numbers), dot(layer, h, temp).flatten().cpu(), rtol=1e-5, atol=1e-5)
                if exits and layer.layer_id == 1:
                    return temp
            x = temp if exits else h
        return x

    def dot(layer, h, temp):
        return (h * temp).sum(-1)

    model, tokens = tiny_model().to(device), torch.randint(31, (2, 20))
    expected, eager, _ = decode(model, tokens, compare_and_forget, replay=False)
    logits, cache, _ = decode(model, tokens, compare_and_forget)
    assert close(logits, expected) and close(cache.k[:, :, :, :-1].cpu(), eager.k[:, :, :, :-1].cpu())
    assert torch.equal(cache.written, eager.written)


@pytest.mark.parametrize("batch", [1, 3])
def test_stand_ins(device, batch):
    """What predicts harm and what stands in are replayed too; a batch whose rows disagree is mixed from both."""
    model = tiny_model().to(device)
    fitted = {name: value.to(device) for name, value in random_fit(model.to(device)).items()}
    policy = standins.StandIns(standins.ready(fitted, torch.float32), 0.0, most=2, warm_up_index=2)
    tokens = torch.randint(31, (batch, 30), generator=torch.Generator().manual_seed(1))
    expected, _, ran = decode(model, tokens, policy, replay=False)
    logits, cache, ran_too = decode(model, tokens, policy)
    assert close(logits, expected) and cache.complete()
    assert torch.equal(ran.ran, ran_too.ran) and 0.1 < 1 - ran.ran.float().mean() < 0.9


def test_a_cache_that_was_rewound_replays_for_other_padding(device):
    model, tokens = tiny_model().to(device), torch.randint(31, (2, 30))
    cache = new_cache(model, 2, 30, replay=True)
    for length, pad in (30, None), (20, torch.tensor([3, 0])), (30, torch.tensor([0, 5])):
        cache.rewind()
        logits, _, _ = decode(model, tokens[:, :length], pad=pad, cache=cache)
        assert close(logits, decode(model, tokens[:, :length], pad=pad, replay=False)[0])


def test_generation_replays_on_a_gpu_and_nowhere_else(device):
    model = tiny_model().to(device)
    cache = new_cache(model, 1, 40, replay=False)
    list(generate(model, [1, 2, 3], 20, cache=cache))
    assert (cache.graphs is not None) == (device == "cuda")
    add_graphs(model, cache)
    assert (cache.graphs is not None) == (device == "cuda")
