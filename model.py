"""
LLaMA-2 in one file, with an explicit key-value cache and one forward pass for every layer-skipping policy.
Paper: https://arxiv.org/abs/2307.09288. Meta's code, whose names are kept: https://github.com/meta-llama/llama

Shapes in comments: SmolLM2-135M, one token: dim 576, 9 heads, 3 key-value heads of 64, and 100 columns in the cache.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from one_row import Linear, RMSNorm, as_row, knows_causal, linear, products, scaled_dot_product_attention, with_parts


@dataclass
class ModelArgs:
    """Sizes of a LLaMA model under Meta's names (params.json); the defaults are LLaMA-2-7B."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads (no grouped-query attention)
    vocab_size: int = 32000
    hidden_dim: int | None = None  # of the feed-forward block; None: Meta's rule below
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    head_dim: int | None = None  # None: dim / n_heads
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    freq_factors: list[float] | None = None  # Llama-3.1 and later: head_dim / 2 divisors of the rotary frequencies
    max_seq_len: int = 4096
    tie_word_embeddings: bool = False  # the output head is the embedding matrix

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings turn pairs")
        if self.hidden_dim is None:
            # two thirds of 4 * dim, since SwiGLU has three matrices and not two; rounded up: 11008 for LLaMA-2-7B
            hidden_dim = int((self.ffn_dim_multiplier or 1) * int(2 * (4 * self.dim) / 3))
            self.hidden_dim = (hidden_dim + self.multiple_of - 1) // self.multiple_of * self.multiple_of


SIZES = {  # of the published LLaMA-2: ModelArgs(**SIZES["13B"])
    "7B": dict(),
    "13B": dict(dim=5120, n_layers=40, n_heads=40),
    "70B": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
}


def precompute_freqs_cis(positions, args, device):
    """(batch, seq, 1, head_dim / 2) complex64: e^(i angle) at positions (batch, seq), per pair of a head (RoFormer)."""
    freqs = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)  # (32,)
    freqs = freqs / torch.tensor(args.freq_factors or 1.0)  # (32,)
    angles = positions[:, :, None, None] * freqs  # (1, 1, 1, 32)
    return torch.polar(torch.ones_like(angles), angles).to(device)


def apply_rotary_emb(x, freqs_cis):
    """x, (batch, seq, heads, head_dim), with each pair of neighbours turned as one complex number."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # -> (1, 1, 9, 32, 2) -> (1, 1, 9, 32)
    return torch.view_as_real(pairs * freqs_cis).flatten(-2).type_as(x)  # -> (1, 1, 9, 32, 2) -> (1, 1, 9, 64)


class KVCache:
    """Keys and values of every layer, for every token so far; an entry that its layer has not written is zero."""

    def __init__(self, args, batch_size, max_seq_len, dtype=torch.float32, device="cpu"):
        if max_seq_len > args.max_seq_len:
            raise ValueError(f"a cache of {max_seq_len} tokens is more than the model's max_seq_len {args.max_seq_len}")
        shape = (args.n_layers, batch_size, args.n_kv_heads, max_seq_len, args.head_dim)  # (30, 1, 3, 100, 64)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.written = torch.zeros(args.n_layers, batch_size, max_seq_len, dtype=torch.bool)  # on the host
        self.pad = torch.zeros(batch_size, dtype=torch.long)  # columns of left padding in each row, on the host
        self.length = 0  # columns filled so far: where the next token goes
        self.freqs_cis = precompute_freqs_cis(torch.arange(max_seq_len)[None], args, device)[0]  # (100, 1, 32)
        self.args, self.max_seq_len, self.scratch, self.graphs = args, max_seq_len, None, None  # one_row's, graphs.py's

    def write(self, layer_id, k, v, active=None):
        """Store k, v, (batch, n_kv_heads, seq, head_dim), from column `length` on; return views of the layer's."""
        start, end = self.length, self.length + k.size(2)
        all_k, all_v = self.k[layer_id, :, :, :end], self.v[layer_id, :, :, :end]  # (1, 3, 100, 64)
        if active is not None:  # (batch, seq): the other tokens keep what they had, or miss an entry
            keep = active[:, None, :, None].to(k.device)  # (batch, seq) -> (batch, 1, seq, 1)
            k, v = torch.where(keep, k, all_k[:, :, start:]), torch.where(keep, v, all_v[:, :, start:])
            active = active | self.written[layer_id, :, start:end]
        all_k[:, :, start:], all_v[:, :, start:] = k, v
        self.written[layer_id, :, start:end] = active is None or active
        return all_k, all_v

    def complete(self):
        """True if every layer has written every column below `length`, so that later tokens miss no entry."""
        return bool(self.written[:, :, : self.length].all())

    def rewind(self, length=0):
        """Forget every column from `length` on."""
        self.k[..., length : self.length, :] = 0
        self.v[..., length : self.length, :] = 0
        self.written[..., length:] = False
        self.length, self.pad = min(length, self.length), self.pad * (length > 0)

    def fork(self, batch_size, max_seq_len):
        """A new cache of batch_size rows, each a copy of row 0 of this one."""
        new, length = KVCache(self.args, batch_size, max_seq_len, self.k.dtype, self.k.device), self.length
        new.k[..., :length, :] = self.k[:, :1, :, :length]
        new.v[..., :length, :] = self.v[:, :1, :, :length]
        new.written[..., :length] = self.written[:, :1, :length]
        new.length, new.pad = length, self.pad[:1].expand(batch_size)
        return new

    def check(self, tokens, weight, pad):
        """Raise ValueError if tokens (batch, seq) of a model with this weight, padded so, cannot be added."""
        batch, seq = tokens.shape
        if self.length + seq > self.max_seq_len:
            raise ValueError(f"{self.length} + {seq} tokens are more than the cache's max_seq_len {self.max_seq_len}")
        if self.k.size(1) != batch or self.k.dtype != weight.dtype:
            raise ValueError(f"a cache of {len(self.pad)} rows, {self.k.dtype}, does not fit {batch}, {weight.dtype}")
        if self.length and pad is not self.pad and (pad != self.pad).any():
            raise ValueError("left padding cannot change once the cache holds tokens")


@dataclass
class Step:
    """What one forward pass knows: the same for every layer, and what a policy may look at."""

    cache: KVCache
    positions: torch.Tensor  # (batch, seq) on the host; 0 in padding
    token_index: torch.Tensor  # (batch, seq) on the host: position - prompt_len, negative in the prompt and in padding
    freqs_cis: torch.Tensor  # (batch, seq, 1, head_dim / 2), the rotary factors of the positions
    mask: torch.Tensor | None  # bool (batch or 1, 1, seq, columns); None if a token sees every column up to its own
    trace: object  # a skip.Trace, or None
    logits: object  # x (batch, seq, dim) -> fp32 logits (batch, seq, vocab): the model's final norm and head


@with_parts("wq", "wk", "wv", "wo")
class Attention(nn.Module):
    def __init__(self, args, layer_id):
        super().__init__()
        self.args, self.layer_id = args, layer_id
        self.wq = Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def write_kv(self, x, step, active=None):
        """Write the keys and values of x, which is as in `forward`; return the layer's, from column 0 on."""
        heads = (*step.positions.shape, self.args.n_kv_heads, self.args.head_dim)
        k = apply_rotary_emb(self.wk(x).view(heads), step.freqs_cis)  # (192,) -> (1, 1, 3, 64)
        v = self.wv(x).view(heads)
        return step.cache.write(self.layer_id, k.transpose(1, 2), v.transpose(1, 2), active)  # (1, 3, 100, 64)

    def forward(self, x, step, active=None):
        """What is added to the residual stream. x, (batch, seq, dim) or one row's (dim,), is that stream's norm."""
        batch, seq = step.positions.shape
        n_heads, head_dim = self.args.n_heads, self.args.head_dim
        k, v = self.write_kv(x, step, active)
        q = apply_rotary_emb(self.wq(x).view(batch, seq, n_heads, head_dim), step.freqs_cis)  # -> (1, 1, 9, 64)
        out = scaled_dot_product_attention(q.transpose(1, 2), k, v, step.mask, step.cache)  # -> (1, 9, 1, 64)
        out = out.transpose(1, 2)  # back: (1, 9, 1, 64) -> (1, 1, 9, 64)
        return self.wo(out.reshape(*x.shape[:-1], n_heads * head_dim))  # -> (576,)


@with_parts("w1", "w2", "w3")
class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): three matrices, two thirds of a layer's parameters; what FFN-SkipLLM leaves out."""

    def __init__(self, args):
        super().__init__()
        self.w1 = Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


@with_parts("attention", "feed_forward", "attention_norm", "ffn_norm")
class Block(nn.Module):
    """
    One layer, in the parts that a policy may call. x, h, temp: (batch, seq, dim), the residual stream before the
    attention, between the blocks, and after the feed-forward block. active: (batch, seq) bool on the host; None: all.
    """

    def __init__(self, args, layer_id):
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args, layer_id)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def add_attention(self, x, step, active=None):
        """h = x + attention. With `active`, only those tokens enter the cache, and h of the others means nothing."""
        return x + self.attention(self.attention_norm(as_row(x)), step, active)

    def add_feed_forward(self, h, step, active=None):
        """temp = h + feed_forward. With `active`, the block does not run for the other tokens, whose temp is h."""
        if active is not None and not active.any():
            return h
        if active is None or active.all():
            temp = h + self.feed_forward(self.ffn_norm(as_row(h)))
        else:
            index = active.flatten().nonzero().squeeze(1).to(h.device, non_blocking=True)  # (active tokens,)
            some = h.flatten(0, 1)[index]  # (batch, seq, dim) -> (batch * seq, dim) -> (active tokens, dim)
            some = some + self.feed_forward(self.ffn_norm(some))
            temp = h.flatten(0, 1).index_copy(0, index, some).view_as(h)
        if step.trace is not None:
            step.trace.record_ran(self.layer_id, active)
        return temp

    def write_kv(self, x, step, active=None):
        """Write only the keys and values that add_attention would have written."""
        self.attention.write_kv(self.attention_norm(as_row(x)), step, active)

    def forward(self, x, step):
        return self.add_feed_forward(self.add_attention(x, step), step)


def dense(layers, x, step):
    """The policy that skips nothing, and the shape of every other: walk x, (batch, seq, dim), through the layers."""
    for layer in layers:
        x = layer(x, step)
    return x


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, layer_id) for layer_id in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = None if args.tie_word_embeddings else Linear(args.dim, args.vocab_size, bias=False)

    def logits(self, x):
        """fp32 logits (batch, seq, vocab) of the residual stream x (batch, seq, dim), at any depth."""
        normed = self.norm(as_row(x))  # (1, 1, 576) -> (576,)
        out = linear(normed, self.tok_embeddings.weight) if self.output is None else self.output(normed)
        return out.view(*x.shape[:-1], out.size(-1)).float()  # (49152,) -> (1, 1, 49152)

    @torch.no_grad()
    def forward(self, tokens, cache=None, policy=None, prompt_len=0, pad=None, trace=None, last_only=False):
        """
        fp32 logits (batch, seq, vocab) of tokens (batch, seq), or (batch, 1, vocab) with last_only.
        cache       a KVCache that holds the columns before; None: a throw-away one
        policy      policy(layers, x, step) -> x; None: dense
        prompt_len  int or (batch,): positions below it are prompt; generated tokens count from 0 after it
        pad         (batch,) columns of left padding; given with the first tokens, and kept in the cache
        trace       a skip.Trace that records which feed-forward blocks ran
        Raises ValueError, before anything is written, if the cache has no room for the tokens or does not fit them.
        """
        weight = self.tok_embeddings.weight
        if cache is None:
            cache = KVCache(self.args, *tokens.shape, weight.dtype, weight.device)
        pad = cache.pad if pad is None else torch.as_tensor(pad).cpu().view(len(tokens))
        cache.check(tokens, weight, pad)
        cache.pad = pad
        step = self.prepare(tokens, cache, prompt_len, trace)
        with products(tokens, weight):
            with torch.inference_mode():  # less bookkeeping than no_grad; the logits, outside, remain plain tensors
                layers = list(self.layers) if step.freqs_cis is not None else cache.graphs.begin(step)
                x = (policy or dense)(layers, self.tok_embeddings(tokens), step)  # (1, 1) -> (1, 1, 576)
            if x is None:
                raise ValueError("the policy returned nothing: it must return x")
            cache.length += tokens.size(1)
            return self.logits(x[:, -1:] if last_only else x)

    def prepare(self, tokens, cache, prompt_len, trace):
        """The Step of a forward pass over tokens (batch, seq), which come after what is in the cache."""
        columns = torch.arange(cache.length, cache.length + tokens.size(1))  # (seq,)
        positions = columns - cache.pad[:, None]  # (batch, seq), negative in padding
        token_index = positions - torch.as_tensor(prompt_len).cpu().view(-1, 1)
        if trace is not None:
            trace.begin(self.args.n_layers, token_index, real=positions >= 0)
        positions = positions.clamp(min=0)
        if cache.graphs is not None and cache.graphs.replays(self, tokens):  # and find the rest on the device
            return Step(cache, positions, token_index, None, None, trace, self.logits)
        mask, freqs_cis = None, cache.freqs_cis[positions.to(tokens.device)]
        from_the_start = cache.length == 0 and knows_causal(tokens.device)
        if cache.pad.any() or (len(columns) > 1 and not from_the_start):
            mask = causal_mask(columns, cache.pad).to(tokens.device)
        return Step(cache, positions, token_index, freqs_cis, mask, trace, self.logits)


def causal_mask(columns, pad):
    """(batch or 1, 1, seq, keys) bool: the keys that `columns`, (seq,), see."""
    pad = pad[:, None, None] if pad.any() else pad[:1, None, None]  # without padding one mask serves every row
    query, key = columns[:, None], torch.arange(columns[-1] + 1)
    # no token sees padding, but padding sees itself, so that its softmax has a term and stays finite
    return ((key <= query) & ((key >= pad) | (query < pad)))[:, None]  # (1, seq, keys) -> (1, 1, seq, keys)
