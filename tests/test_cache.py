"""KVCache.rewind and .fork: what is forgotten reads as if it had never been, and a fork goes on where row 0 stands."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import DTYPES, chunkings, close, models, new_cache, run, texts, tiny_model

from support.cache import fork, rewind


def state(cache):
    """All that a later token can see of a cache."""
    return cache.k.clone(), cache.v.clone(), cache.written.clone(), cache.pad.clone(), cache.length


def same(a, b):
    return all(x == y if isinstance(x, int) else torch.equal(x, y) for x, y in zip(a, b))


class Patchy:
    """A policy that leaves layers out altogether for some tokens, whose cache entries are then missing."""

    def __init__(self, every):
        self.every = every

    def __call__(self, layers, x, step):
        for layer in layers:
            active = (step.positions + layer.layer_id) % self.every != 0
            h = layer.add_attention(x, step, active)
            x = torch.where(active[..., None].to(x.device), layer.add_feed_forward(h, step, active), x)
        return x


@st.composite
def rewinds(draw):
    """A model, a text, the column to rewind to, the chunks before and after it, and two policies."""
    model = draw(DTYPES.flatmap(lambda dtype: models(dtype=dtype)))
    text = draw(texts(model))
    seq = text["tokens"].size(1)
    column = draw(st.integers(0, seq))
    before = draw(chunkings(column)) if column else []
    after = draw(chunkings(seq - column)) if column < seq else []
    policies = st.none() | st.integers(2, 3).map(Patchy)
    return model, text["tokens"], text["pad"], column, before, after, draw(policies), draw(policies)


def forward(model, tokens, chunks, cache, pad, policy):
    return run(model, tokens, chunks, cache, pad, policy=policy) if chunks else None


@given(rewinds())
def test_a_rewound_cache_is_the_one_that_never_went_on(case):
    """What is forgotten reads as zero, and the same tokens again give the same logits bit for bit."""
    model, tokens, pad, column, before, after, policy, other = case
    fresh, cache = new_cache(model, len(tokens)), new_cache(model, len(tokens))
    for each in fresh, cache:
        forward(model, tokens[:, :column], before, each, pad, policy)
    stood = state(cache)
    once = forward(model, tokens[:, column:], after, cache, pad if not column else None, other)
    rewind(cache, column)
    assert same(state(cache), stood) and cache.length == column
    assert not cache.k[..., column:, :].any() and not cache.v[..., column:, :].any()
    assert not cache.written[..., column:].any()
    for each in fresh, cache:  # Patchy reads what is missing, and writes only a part
        again = forward(model, tokens[:, column:], after, each, pad if not column else None, other)
        assert once is None or torch.equal(again, once)
    assert same(state(cache), state(fresh))


def test_a_rewind_to_the_start_forgets_the_padding_and_one_to_later_keeps_it():
    model, tokens = tiny_model(), torch.arange(12).view(2, 6)
    cache = new_cache(model, 2)
    model(tokens, cache, pad=[0, 3])
    rewind(cache, 4)
    assert cache.pad.tolist() == [0, 3] and cache.length == 4
    rewind(cache)
    assert same(state(cache), state(new_cache(model, 2)))
    logits = model(tokens, cache, pad=[1, 0])  # another padding than before
    assert torch.equal(logits, model(tokens, pad=[1, 0]))


@given(rewinds(), st.integers(1, 4))
def test_a_fork_goes_on_as_row_0_would(case, batch):
    """With its padding and its missing entries, in any number of rows; and the cache it is of stays as it is."""
    model, tokens, pad, column, before, after, policy, _ = case
    model.float()
    cache = new_cache(model, len(tokens))
    forward(model, tokens[:, :column], before, cache, pad, policy)
    stood, new = state(cache), fork(cache, batch, 30)
    for row in range(batch):
        for own, its in (new.k, cache.k), (new.v, cache.v):
            assert torch.equal(own[:, row, :, :column], its[:, 0, :, :column])
        assert torch.equal(new.written[:, row, :column], cache.written[:, 0, :column])
    for rest in new.k[..., column:, :], new.v[..., column:, :], new.written[..., column:]:
        assert not rest.any()
    assert new.k.size(3) == new.max_seq_len == 30 and new.length == column
    if after:
        start = 0 if pad is None else pad[0].item()
        own_pad = torch.full((batch,), start) if not column else None  # a cache that holds nothing has no padding yet
        logits = forward(model, tokens[:1, column:].expand(batch, -1), after, new, own_pad, policy)
        alone = model(tokens[:1, start:], policy=policy)
        for row in logits:
            assert close(row[max(0, start - column) :], alone[0, max(0, column - start) :])
    assert same(state(cache), stood)


def test_a_fork_keeps_the_dtype():
    model = tiny_model(dtype=torch.bfloat16)
    cache = new_cache(model, 1)
    model(torch.arange(5)[None], cache)
    assert fork(cache, 3, 9).k.dtype == fork(cache, 3, 9).v.dtype == torch.bfloat16


def test_a_fork_cannot_be_longer_than_the_model_allows():
    model = tiny_model(max_seq_len=8)
    with pytest.raises(ValueError, match="max_seq_len 8"):
        fork(new_cache(model, 1, 8), 2, 9)
