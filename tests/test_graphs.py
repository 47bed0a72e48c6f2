"""
graphs.py: what is replayed is what would have run. On the CPU a graph is played by a stand-in that records a function's
operations once and repeats them on the same memory; on a GPU by CUDA itself.
"""

import gc
import math
import weakref
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch._dynamo  # noqa: F401 (imported by the first recorded operation, it would keep the frames of that one)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cache import Patchy
from test_standins import random_fit
from tiny import close, texts
from tiny import models as plain_models
from tiny import tiny_model as plain_model
from torch.utils._python_dispatch import TorchDispatchMode

from fast import accelerate, graphs
from fast.graphs import Graphs, add_graphs
from generate import generate
from model import KVCache
from policies import standins
from skip import FFNSkip
from support.cache import rewind
from support.tracing import Trace

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def tiny_model(**sizes):
    return accelerate(plain_model(**sizes))


def models():
    return plain_models().map(accelerate)


class Recorder(TorchDispatchMode):
    """Keeps the operations, and what they gave; like a capture, it takes none whose numbers the host must know."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.name() in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2"):
            raise RuntimeError(f"{operation.name()} is not permitted when stream is capturing")
        out = operation(*args, **kwargs or {})
        self.operations.append((operation, args, kwargs or {}, out))
        return out


class Recorded:
    """The graph of these operations."""

    def __init__(self, operations):
        self.operations = operations

    def replay(self):
        for operation, args, kwargs, kept in self.operations:
            new = operation(*args, **kwargs)
            if kept.data_ptr() != new.data_ptr():
                kept.copy_(new)


def record(self, pool, stream, function, *inputs):
    cache, recorder = (self.cache.k.clone(), self.cache.v.clone()), Recorder()
    with recorder:
        output = function(*inputs)
    self.cache.k.copy_(cache[0])  # a capture runs nothing
    self.cache.v.copy_(cache[1])
    for _, args, _, out in recorder.operations:
        memory = [x.untyped_storage().data_ptr() for x in args if torch.is_tensor(x)]
        if out.is_floating_point() and out.untyped_storage().data_ptr() not in memory:  # what the operation made
            out.fill_(math.nan)
    return Recorded(recorder.operations), output


@pytest.fixture(autouse=True)
def graphs_of_eight_columns(device, monkeypatch):
    monkeypatch.setattr(graphs, "COLUMNS", 8)  # short texts need several recordings
    monkeypatch.setattr(graphs, "MOST", 4)
    if device == "cpu":
        fake = mock.MagicMock()
        fake.is_available.return_value = False
        monkeypatch.setattr(graphs, "cuda", fake)
        monkeypatch.setattr(Graphs, "capture", record)
        monkeypatch.setattr("fast.one_row.products", lambda *args: nullcontext())  # no row is a vector, as on a GPU


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


def dot(layer, h, temp):
    return (h * temp).sum(-1)


def size(layer, x):
    return x.square().mean(-1)


def hands_on_h(layers, x, step):
    """Asks about temp, to which the next layer's attention then begins, and hands on h; leaves the first layer out."""
    for layer in layers[1:]:
        h = layer.add_attention(x, step)
        graphs.read(layer, dot, h, layer.add_feed_forward(h, step))
        x = h + 0.1 * graphs.read(layer, size, 2 * h)[0]  # of a state that is none of the layer's
    return x


def exits_early(layers, x, step):
    """At every other token, leaves the model after the second layer, the third one's attention having begun."""
    for layer in layers:
        h = layer.add_attention(x, step)
        x = layer.add_feed_forward(h, step)
        if step.positions[0, -1] % 2:
            graphs.read(layer, dot, h, x)
            if layer.layer_id == 1:
                return x
    return x


def copies_states(layers, x, step):
    """At every other token, the layers after the second get keys and values only, from its state."""
    for layer in layers:
        if layer.layer_id > 1 and step.positions[0, -1] % 2:
            layer.attention.write_kv(layer.attention_norm(x), step)
            continue
        h = layer.add_attention(x, step)
        x = layer.add_feed_forward(h, step)
        graphs.read(layer, dot, h, x)
    return x


def drops_rows(layers, x, step):
    """Rows take turns in leaving the third layer out, the attention of all having begun."""
    for layer in layers:
        active = step.positions % 2 == 0
        active[0] ^= True
        h = layer.add_attention(x, step, active if layer.layer_id == 2 else None)
        h = torch.where(active[..., None].to(x.device), h, x) if layer.layer_id == 2 else h
        x = layer.add_feed_forward(h, step)
        graphs.read(layer, dot, h, x)
    return x


def asks_twice(layers, x, step):
    """One function of two states, and another one of h alone where the block is skipped."""
    for layer in layers:
        h = layer.add_attention(x, step)
        before = graphs.read(layer, size, h)[0]
        x = layer.add_feed_forward(h, step, torch.full_like(step.positions, before < 1, dtype=torch.bool))
        gain = graphs.read(layer, dot, h, x)[0] - graphs.read(layer, size, x)[0] + graphs.run(layer, size, h)
        x = x + 0.1 * gain.mean() + [0.1, 0.2, 0.3][graphs.read(layer, largest, x)[0] % 3]
    return x


def largest(layer, x):
    return x.argmax(-1)  # whole numbers


def asks_anew(layers, x, step):
    """A function that is made for every token: it runs as usual once there are MOST."""
    for layer in layers:
        h = layer.add_attention(x, step)
        scale = 1 / (1 + step.positions[0, -1].item())
        x = layer.add_feed_forward(h, step) + 0.1 * graphs.read(layer, lambda layer, h: scale * size(layer, h), h)[0]
        assert len(getattr(layer, "functions", ())) <= graphs.MOST
    return x


ASKING = [hands_on_h, exits_early, copies_states, drops_rows, asks_twice, asks_anew]


@pytest.mark.parametrize("policy", ASKING)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_policies_ask_for_is_of_this_token_and_of_these_states(device, policy, batch):
    """Attention that was begun early counts only for the state that it saw, and leaves nothing where none was due."""
    model, tokens = tiny_model().to(device), torch.randint(31, (batch, 30), generator=torch.Generator().manual_seed(0))
    expected, eager, _ = decode(model, tokens, policy, replay=False)
    logits, cache, _ = decode(model, tokens, policy)
    assert close(logits, expected) and torch.equal(cache.written, eager.written)
    assert close(cache.k[:, :, :, :-1].cpu(), eager.k[:, :, :, :-1].cpu())  # the last is cleared by the next pass


@pytest.mark.parametrize("policy", [FFNSkip(0, 4, 0.9, warm_up_index=-1), exits_early])
def test_a_pass_that_was_interrupted_leaves_nothing_behind(device, policy, monkeypatch):
    """Ctrl-C while a number is waited for, the next layer's attention having begun; then a conversation goes on."""
    model, tokens = tiny_model().to(device), torch.randint(31, (1, 30))
    cache = new_cache(model, 1, 30, replay=True)
    decode(model, tokens[:, :11], policy, cache=cache)

    def interrupted(layer, key, function, states):
        read(layer, key, function, states)
        raise KeyboardInterrupt

    read = graphs.Graphed.read
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(graphs.Graphed, "read", interrupted)
        decode(model, tokens[:, 11:12], policy, cache=cache, first=1)
    for first in 1, 4:
        _, eager, _ = decode(model, tokens[:, :11], policy, cache=new_cache(model, 1, 30, replay=False))
        for each in cache, eager:
            rewind(each, 9)
        expected, _, _ = decode(model, tokens[:, 9:], policy, cache=eager, first=first)
        logits, _, _ = decode(model, tokens[:, 9:], policy, cache=cache, first=first)
        assert close(logits, expected)


def test_a_recording_that_was_interrupted_is_made_anew(device, monkeypatch):
    model, tokens = tiny_model().to(device), torch.randint(31, (1, 30))
    expected, _, _ = decode(model, tokens, replay=False)
    cache, write, calls = new_cache(model, 1, 30, replay=True), Graphs.write, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) in (3, 12):  # in the first recording, and in one that is made once 8 columns are full
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(Graphs, "write", interrupted)
    done = 0
    for _ in range(3):
        try:
            while done < 30:
                logits = model(tokens[:, done : done + 1].to(device), cache)
                assert close(logits[:, 0].cpu(), expected[:, done])
                done += 1
        except KeyboardInterrupt:
            pass
    assert done == 30 and len(calls) > 12


def test_a_function_that_reads_numbers_back_is_named(device):
    """Not the end of the recording, which fails too: a policy's author must see what the trouble is."""

    def reads_back(layers, x, step):
        for layer in layers:
            x = layer(x, step)
            graphs.read(layer, lambda layer, x: x.norm(dim=-1) / x.norm().item(), x)
        return x

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        decode(tiny_model().to(device), torch.randint(31, (1, 20)), reads_back)


def test_another_model_and_other_caches_do_not_replay(device, monkeypatch):
    """Neither another model's layers on this one's embeddings, nor a cache that writes in its own way."""
    one, two = tiny_model(seed=1).to(device), tiny_model(seed=2).to(device)
    tokens, cache = torch.randint(31, (1, 30)), new_cache(one, 1, 30, replay=True)
    for model in one, two:
        rewind(cache)
        assert close(decode(model, tokens, cache=cache)[0], decode(model, tokens, replay=False)[0])
    monkeypatch.setattr(graphs, "USED", False)  # the way to have every hook run
    counted = []
    one.layers[0].attention.register_forward_hook(lambda *args: counted.append(1))
    rewind(cache)
    decode(one, tokens, cache=cache)
    assert len(counted) == 29
    own = type("OwnCache", (KVCache,), {})(one.args, 1, 30, device=device)
    monkeypatch.setattr(graphs, "USED", True)
    add_graphs(one, own)
    assert not hasattr(own, "graphs")


def test_a_cache_and_its_graphs_go_with_their_last_user(device):
    """Without waiting for Python to look for cycles, which knows nothing of a GPU's memory."""
    model = tiny_model().to(device)
    gc.disable()
    try:
        _, cache, _ = decode(model, torch.randint(31, (1, 20)), FFNSkip(0, 4, 0.9, warm_up_index=-1))
        gone = weakref.ref(cache), weakref.ref(cache.graphs)
        del cache
        assert gone[0]() is None and gone[1]() is None
    finally:
        gc.enable()


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
        rewind(cache)
        logits, _, _ = decode(model, tokens[:, :length], pad=pad, cache=cache)
        assert close(logits, decode(model, tokens[:, :length], pad=pad, replay=False)[0])


def test_generation_replays_on_a_gpu_and_nowhere_else(device):
    model = tiny_model().to(device)
    cache = new_cache(model, 1, 40, replay=False)
    list(generate(model, [1, 2, 3], 20, cache=cache))
    assert hasattr(cache, "graphs") == (device == "cuda")
    add_graphs(model, cache)
    assert hasattr(cache, "graphs") == (device == "cuda")
