"""Tiny random models, ways to run them, and a LLaMA in plain Python floats to check them against."""

import cmath
import math

import torch
from hypothesis import strategies as st

from model import KVCache, ModelArgs, Transformer

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def tiny_model(seed=0, dtype=torch.float32, **sizes):
    """A random model whose feed-forward blocks matter: nine of ten cosines lie between 0.47 and 1."""
    sizes = dict(dim=16, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=31, hidden_dim=24, max_seq_len=64) | sizes
    model = Transformer(ModelArgs(**sizes))
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.data = torch.randn(weight.shape, generator=random)
        if weight.dim() == 1:
            weight.data = 1 + 0.2 * weight.data  # the norms
        elif name != "tok_embeddings.weight":
            weight.data *= weight.size(1) ** -0.5
        if name.endswith("w2.weight"):
            weight.data *= 4 * torch.rand((), generator=random)  # a different weight for each layer's block
    return model.to(dtype)


@st.composite
def models(draw, n_layers=st.integers(1, 6), dtype=torch.float32):
    """Multi-head, grouped-query and multi-query attention, tied or not, any head_dim."""
    n_heads, n_kv_heads = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3), (6, 2)]))
    return tiny_model(
        seed=draw(st.integers(0, 2**31)),
        dtype=dtype,
        n_layers=draw(n_layers),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        dim=12 if n_heads == 6 else 16,
        head_dim=draw(st.sampled_from([None, 6])) if n_heads > 1 else None,
        hidden_dim=draw(st.sampled_from([8, 21])),
        rope_theta=draw(st.sampled_from([10000.0, 100.0])),
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def texts(draw, model, max_batch=3, max_seq=12):
    """dict(tokens, pad, prompt_len): a batch of token ids whose rows have their own left padding and prompt."""
    batch, seq = draw(st.integers(1, max_batch)), draw(st.sampled_from([max_seq, max_seq // 2, 3, 2, 1]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = torch.randint(model.args.vocab_size, (batch, seq), generator=random)
    each = st.lists(st.integers(0, seq // 2), min_size=batch, max_size=batch).map(torch.tensor)
    return dict(tokens=tokens, pad=draw(st.none() | each), prompt_len=draw(st.just(0) | each))


@st.composite
def chunkings(draw, seq):
    """Lengths that sum to seq: all at once, one by one, or anything between."""
    cuts = draw(st.just(set()) | st.just(set(range(1, seq))) | st.sets(st.integers(1, max(1, seq - 1))))
    cuts = [0, *sorted(cut for cut in cuts if cut < seq), seq]
    return [b - a for a, b in zip(cuts, cuts[1:])]


def poisoned_cache(model, batch, max_seq_len=None):
    """A cache of NaN: whatever is read before it is written shows. `.writes` counts how often each slot was written."""
    cache = KVCache(model.args, batch, max_seq_len or model.args.max_seq_len, dtype=model.tok_embeddings.weight.dtype)
    cache.k.fill_(math.nan)
    cache.v.fill_(math.nan)
    cache.writes = torch.zeros_like(cache.written, dtype=torch.long)
    write = cache.write

    def counted(layer_id, k, v, rows=None):
        columns = slice(cache.length, cache.length + k.size(2))
        cache.writes[layer_id, :, columns] += 1 if rows is None else rows.long()
        return write(layer_id, k, v, rows)

    cache.write = counted
    return cache


def run(model, tokens, chunks=None, cache=None, pad=None, **kwargs):
    """Logits of tokens forwarded chunk by chunk through one cache, poisoned unless given."""
    cache = poisoned_cache(model, len(tokens)) if cache is None else cache
    logits = []
    for part in tokens.split(chunks or [tokens.size(1)], dim=1):
        logits.append(model(part, cache, pad=pad, **kwargs))
        pad = None  # said once
    return torch.cat(logits, dim=1)


def is_real(tokens, pad=None):
    """(batch, seq): this column is no padding."""
    return torch.arange(tokens.size(1)) >= torch.zeros(len(tokens), 1) + (0 if pad is None else pad[:, None])


def close(a, b, tolerance=1e-5):
    """Equal to fp32 rounding: the error is within `tolerance` of the largest magnitude."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def add(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


class NaiveLlama:
    """LLaMA-2 for one text, one token and one head at a time, in Python's 64-bit floats; written from the papers."""

    def __init__(self, model):
        self.args = model.args
        self.weights = {name: weight.double().tolist() for name, weight in model.state_dict().items()}
        self.keys, self.values = {}, {}  # (layer, position, head) -> head_dim floats

    def linear(self, name, x):
        return [dot(row, x) for row in self.weights[name + ".weight"]]

    def norm(self, name, x):
        root_mean_square = math.sqrt(dot(x, x) / len(x) + self.args.norm_eps)
        return [gain * value / root_mean_square for gain, value in zip(self.weights[name + ".weight"], x)]

    def heads(self, x):
        return [x[start : start + self.args.head_dim] for start in range(0, len(x), self.args.head_dim)]

    def turn(self, head, position):
        """Each pair of a head is a complex number, turned by position * theta^(-2i / head_dim) (RoFormer, eq. 13)."""
        turned = []
        for i in range(0, len(head), 2):
            angle = position * self.args.rope_theta ** (-i / len(head))
            pair = complex(head[i], head[i + 1]) * cmath.exp(1j * angle)
            turned += [pair.real, pair.imag]
        return turned

    def embed(self, token):
        return self.weights["tok_embeddings.weight"][token]

    def attention(self, layer, x, position):
        x = self.norm(f"layers.{layer}.attention_norm", x)
        q, k, v = (self.heads(self.linear(f"layers.{layer}.attention.w{name}", x)) for name in "qkv")
        for head in range(self.args.n_kv_heads):
            self.keys[layer, position, head] = self.turn(k[head], position)
            self.values[layer, position, head] = v[head]
        out = []
        for head in range(self.args.n_heads):
            shared = head // (self.args.n_heads // self.args.n_kv_heads)
            query = self.turn(q[head], position)
            hole = [0.0] * self.args.head_dim
            keys = [self.keys.get((layer, p, shared), hole) for p in range(position + 1)]
            values = [self.values.get((layer, p, shared), hole) for p in range(position + 1)]
            weights = [math.exp(dot(query, key) / math.sqrt(self.args.head_dim)) for key in keys]
            out += [dot(weights, column) / sum(weights) for column in zip(*values)]
        return self.linear(f"layers.{layer}.attention.wo", out)

    def feed_forward(self, layer, h):
        h, name = self.norm(f"layers.{layer}.ffn_norm", h), f"layers.{layer}.feed_forward."
        gate = [a / (1 + math.exp(-a)) for a in self.linear(name + "w1", h)]
        return self.linear(name + "w2", [a * b for a, b in zip(gate, self.linear(name + "w3", h))])

    def logits(self, x):
        return self.linear("tok_embeddings" if self.args.tie_word_embeddings else "output", self.norm("norm", x))
