"""
LLaMA-2 in one file, with an explicit key-value cache and one forward pass for every layer-skipping policy.

References:
1) the LLaMA-2 code released by Meta, whose parameter names are kept:
   https://github.com/meta-llama/llama
2) the paper: "Llama 2: Open Foundation and Fine-Tuned Chat Models", https://arxiv.org/abs/2307.09288
3) FFN-SkipLLM, https://arxiv.org/abs/2404.03865, whose Algorithm 1 is in skip.py

Shapes are written in comments beside the code that makes them, with the example of SmolLM2-135M decoding one token
(batch 1, seq 1, dim 576, 9 heads and 3 key-value heads of 64, 100 positions in the cache).
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


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
    max_seq_len: int = 4096
    tie_word_embeddings: bool = False  # the output head is the embedding matrix

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            self.head_dim = self.dim // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings turn pairs")
        if self.hidden_dim is None:
            # two thirds of 4 * dim, since SwiGLU has three matrices and not two: 11008 for LLaMA-2-7B
            hidden_dim = int(2 * (4 * self.dim) / 3)
            if self.ffn_dim_multiplier is not None:
                hidden_dim = int(self.ffn_dim_multiplier * hidden_dim)
            self.hidden_dim = self.multiple_of * -(-hidden_dim // self.multiple_of)

    @classmethod
    def named(cls, size, **overrides):
        """The published LLaMA-2 sizes: "7B", "13B" or "70B"."""
        if size not in SIZES:
            raise ValueError(f"no model size {size!r}: choose from {', '.join(SIZES)}")
        return cls(**SIZES[size], **overrides)


SIZES = {
    "7B": dict(),
    "13B": dict(dim=5120, n_layers=40, n_heads=40),
    "70B": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
}


class KVCache:
    """
    Keys and values of every layer and every column computed so far.

    .k, .v     (n_layers, batch, n_kv_heads, max_seq_len, head_dim), zero where nothing was written: a hole
    .written   (n_layers, batch, max_seq_len) bool, on the host
    .length    columns every forward pass so far has filled: where the next one writes
    .pad       (batch,) columns of left padding, on the host, or None: set by the first forward pass
    """

    def __init__(self, args, batch_size, max_seq_len, dtype=torch.float32, device="cpu"):
        if max_seq_len > args.max_seq_len:
            raise ValueError(f"a cache of {max_seq_len} tokens is more than the model's max_seq_len {args.max_seq_len}")
        shape = (args.n_layers, batch_size, args.n_kv_heads, max_seq_len, args.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (30, 1, 3, 100, 64)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.written = torch.zeros(args.n_layers, batch_size, max_seq_len, dtype=torch.bool)
        self.max_seq_len = max_seq_len
        self.length = 0
        self.pad = None

    def write(self, layer_id, k, v, rows=None):
        """
        Store k and v, (batch, n_kv_heads, seq, head_dim), in the columns after `length`, for all rows or for the
        (batch, seq) rows named; return the layer's keys and values from column 0, (batch, n_kv_heads, length + seq,
        head_dim), as views.
        """
        end = self.length + k.size(2)
        all_k, all_v = self.k[layer_id, :, :, :end], self.v[layer_id, :, :, :end]  # (1, 3, 100, 64)
        new_k, new_v = all_k[:, :, self.length :], all_v[:, :, self.length :]  # (1, 3, 1, 64)
        if rows is not None:
            keep = rows[:, None, :, None].to(k.device)  # (batch, seq) -> (batch, 1, seq, 1)
            k, v = torch.where(keep, k, new_k), torch.where(keep, v, new_v)
        new_k.copy_(k)
        new_v.copy_(v)
        if rows is None:
            self.written[layer_id, :, self.length : end] = True
        else:
            self.written[layer_id, :, self.length : end] |= rows
        return all_k, all_v

    def complete(self):
        """True if every layer has written every column below `length`: nothing later tokens attend to is a hole."""
        return bool(self.written[:, :, : self.length].all())


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019)."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # computes in float32 whatever the dtype of x


def rope_factors(positions, args, device):
    """
    cos and sin, each (batch, seq, 1, head_dim) in float32, for `rotate`. The angle of pair i at a position is
    position * rope_theta^(-2i / head_dim) (RoFormer, Su et al. 2021).
    """
    freqs = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2, device=device).float() / args.head_dim)  # (32,)
    angles = positions.to(device)[:, :, None, None] * freqs  # (1, 1, 1, 32)
    cos, sin = angles.cos(), angles.sin()
    # one factor for each of a pair: (1, 1, 1, 32) -> (1, 1, 1, 64)
    return torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate(x, rope):
    """Turn each pair (a, b) of neighbours in x, (batch, seq, heads, head_dim), to (a cos - b sin, b cos + a sin)."""
    cos, sin = rope
    x32 = x.float()
    swapped = x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (1, 1, 9, 64) -> (1, 1, 9, 32, 2) -> (1, 1, 9, 64)
    return torch.addcmul(x32 * cos, swapped, sin).type_as(x)


@contextmanager
def matrix_vector():
    """
    For one row, which is bound by reading the weights: where a CPU has bfloat16 instructions, PyTorch would hand it to
    oneDNN's matrix kernels, which read at a third of the speed of PyTorch's own matrix-vector product.
    """
    enabled, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def attention_of_one(q, k, v, mask, scratch):
    """
    Scaled dot-product attention of a single 16-bit row, q (1, n_heads, 1, head_dim), which PyTorch's CPU kernel multiplies at
    a tenth of the memory's speed: in float32, so many heads at a time as `scratch`, (2, elements), has room for. It is kept
    over the layers, since memory that is given back to the system and asked for again costs more than the copies.
    """
    heads, out = max(1, scratch.size(1) // k[:, 0].numel()), []  # 2,000 columns of LLaMA-2-7B: 2 heads
    for q_part, *parts in zip(*(x.split(heads, dim=1) for x in (q, k, v))):
        k32, v32 = (room[: x.numel()].view(x.shape).copy_(x) for room, x in zip(scratch, parts))
        out.append(F.scaled_dot_product_attention(q_part.float(), k32, v32, attn_mask=mask))
    return torch.cat(out, dim=1).type_as(q)


@dataclass
class Step:
    """What one forward pass knows: the same for every layer, and what a policy may look at."""

    cache: KVCache
    positions: torch.Tensor  # (batch, seq) on the host; 0 in padding
    token_index: torch.Tensor  # (batch, seq) on the host: position - prompt_len, negative in the prompt and in padding
    rope: tuple  # cos and sin of the positions
    mask: torch.Tensor | None  # (batch or 1, 1, group * seq, columns), None where a token sees every column
    scratch: torch.Tensor | None  # for attention_of_one, None where that is not needed
    trace: object  # a skip.Trace, or None
    logits: object  # x (batch, seq, dim) -> fp32 logits (batch, seq, vocab): the model's final norm and head


class Attention(nn.Module):
    def __init__(self, args, layer_id):
        super().__init__()
        self.args, self.layer_id = args, layer_id
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def remember(self, x, step, rows=None):
        """Write the keys and values of x, (batch, seq, dim) after its norm; return the layer's, from column 0 on."""
        heads = (*x.shape[:2], self.args.n_kv_heads, self.args.head_dim)
        k = rotate(self.wk(x).view(heads), step.rope)  # (1, 1, 192) -> (1, 1, 3, 64)
        v = self.wv(x).view(heads)
        return step.cache.write(self.layer_id, k.transpose(1, 2), v.transpose(1, 2), rows)  # (1, 3, 100, 64)

    def forward(self, x, step, rows=None):
        batch, seq, _ = x.shape
        n_heads, n_kv_heads, head_dim = self.args.n_heads, self.args.n_kv_heads, self.args.head_dim
        k, v = self.remember(x, step, rows)
        q = rotate(self.wq(x).view(batch, seq, n_heads, head_dim), step.rope)  # (1, 1, 576) -> (1, 1, 9, 64)
        # The heads of a group share their keys: queries of one group become more queries of one head, and no key is
        # copied. Head h of Meta's order belongs to key-value head h // group.
        q = q.transpose(1, 2).reshape(batch, n_kv_heads, -1, head_dim)  # (1, 1, 9, 64) -> (1, 9, 1, 64) -> (1, 3, 3 * 1, 64)
        if step.scratch is not None:
            out = attention_of_one(q, k, v, step.mask, step.scratch)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask)
        out = out.reshape(batch, n_heads, seq, head_dim).transpose(1, 2)  # (1, 3, 3 * 1, 64) -> (1, 9, 1, 64) -> (1, 1, 9, 64)
        return self.wo(out.reshape(batch, seq, n_heads * head_dim))  # (1, 1, 576)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): three matrices, two thirds of a layer's parameters; what FFN-SkipLLM leaves out."""

    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """
    One layer, in the parts a policy may call. x, h, temp: (batch, seq, dim), the residual stream before the attention,
    between the two blocks, and after the feed-forward block. rows: (batch, seq) bool on the host, None for all.
    """

    def __init__(self, args, layer_id):
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args, layer_id)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def attend(self, x, step, rows=None):
        """h. The keys and values of `rows` go into the cache; h of the other rows means nothing."""
        return x + self.attention(self.attention_norm(x), step, rows)

    def feed(self, h, step, rows=None):
        """temp for `rows`, h for the others, whose feed-forward block does not run."""
        if rows is not None and not rows.any():
            return h
        if rows is None or rows.all():
            temp = h + self.feed_forward(self.ffn_norm(h))
        else:
            index = rows.flatten().nonzero().squeeze(1).to(h.device, non_blocking=True)  # (rows that run,)
            some = h.flatten(0, 1)[index]  # (batch, seq, dim) -> (batch * seq, dim) -> (rows that run, dim)
            some = some + self.feed_forward(self.ffn_norm(some))
            temp = h.flatten(0, 1).index_copy(0, index, some).view_as(h)
        if step.trace is not None:
            step.trace.record_ran(self.layer_id, rows)
        return temp

    def remember(self, x, step, rows=None):
        """Only write the keys and values that `attend` would have written."""
        self.attention.remember(self.attention_norm(x), step, rows)

    def forward(self, x, step):
        return self.feed(self.attend(x, step), step)


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
        self.output = None if args.tie_word_embeddings else nn.Linear(args.dim, args.vocab_size, bias=False)

    def logits(self, x):
        """fp32 logits (batch, seq, vocab) of the residual stream x (batch, seq, dim), at any depth."""
        x = self.norm(x)
        return (F.linear(x, self.tok_embeddings.weight) if self.output is None else self.output(x)).float()

    @torch.no_grad()
    def forward(self, tokens, cache=None, policy=None, prompt_len=0, pad=None, trace=None, last_only=False):
        """
        fp32 logits (batch, seq, vocab) of tokens (batch, seq), or (batch, 1, vocab) with last_only.

        cache       a KVCache that holds the columns before; None: a throw-away one
        policy      policy(layers, x, step) -> x; None: dense
        prompt_len  int or (batch,): positions below it are prompt. Generated tokens count from 0 after it
        pad         (batch,) columns of left padding; said once, with the first tokens, and kept in the cache
        trace       a skip.Trace that records which feed-forward blocks ran
        Raises ValueError, before anything is written, if the cache has no room for the tokens or does not fit them.
        """
        batch, seq = tokens.shape
        weight = self.tok_embeddings.weight
        if cache is None:
            cache = KVCache(self.args, batch, seq, weight.dtype, weight.device)
        step = self.prepare(batch, seq, cache, prompt_len, pad, trace)
        with matrix_vector() if batch * seq == 1 else nullcontext():
            with torch.inference_mode():  # saves no_grad's bookkeeping, 7 % of a token of SmolLM2-135M
                x = self.tok_embeddings(tokens)  # (1, 1) -> (1, 1, 576)
                x = (policy or dense)(self.layers, x, step)
            if x is None:
                raise ValueError("the policy returned nothing: it must return x")
            cache.length += seq
            return self.logits(x[:, -1:] if last_only else x)

    def prepare(self, batch, seq, cache, prompt_len=0, pad=None, trace=None):
        """The Step of a forward pass over `seq` new tokens; see `forward` for the arguments and the errors."""
        start, end = cache.length, cache.length + seq
        device = self.tok_embeddings.weight.device
        if end > cache.max_seq_len:
            raise ValueError(f"{start} + {seq} tokens are more than the cache's max_seq_len {cache.max_seq_len}")
        if cache.k.size(1) != batch or cache.k.dtype != self.tok_embeddings.weight.dtype:
            raise ValueError(
                f"a cache for batch {cache.k.size(1)} in {cache.k.dtype} does not fit tokens of batch {batch} "
                f"and weights in {self.tok_embeddings.weight.dtype}"
            )
        if pad is not None:
            pad = torch.as_tensor(pad).cpu().view(batch)
            if start and (pad != (0 if cache.pad is None else cache.pad)).any():
                raise ValueError("padding stands at the left: it cannot change once the cache holds tokens")
            cache.pad = pad if pad.any() else None
        columns = torch.arange(start, end)  # (seq,)
        positions = columns.expand(batch, -1)  # (batch, seq)
        mask = None
        if seq > 1 or cache.pad is not None:
            query, key = columns[:, None], torch.arange(end)
            mask = (key <= query)[None]  # (1, seq, columns): causal, whatever is in the cache already
            if cache.pad is not None:
                positions = positions - cache.pad[:, None]
                left = cache.pad[:, None, None]  # (batch, 1, 1)
                # real tokens never see padding; padding sees itself, so that its softmax has a term and stays finite
                mask = mask & ((key >= left) | (query < left))  # (batch, seq, columns)
            # one copy for each query head of a group, as Attention folds them: (1, seq, columns) -> (1, 1, 3 * seq, columns)
            mask = mask.repeat(1, self.args.n_heads // self.args.n_kv_heads, 1)[:, None].to(device)
        token_index = positions - torch.as_tensor(prompt_len).cpu().view(-1, 1)  # (batch, seq)
        if trace is not None:
            trace.begin(self.args.n_layers, token_index, real=positions >= 0)
        positions = positions.clamp(min=0)
        rope = rope_factors(positions, self.args, device)
        one = batch * seq == 1 and self.args.n_heads == self.args.n_kv_heads and device.type == "cpu"
        # 2 MB for the keys and 2 MB for the values, and for one head always
        scratch = torch.empty(2, max(2**19, end * self.args.head_dim)) if one and cache.k.dtype != torch.float32 else None
        return Step(cache, positions, token_index, rope, mask, scratch, trace, self.logits)
