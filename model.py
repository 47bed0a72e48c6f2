"""
LLaMA-2 in one file, with an explicit key-value cache and one forward pass for every layer-skipping policy.
Paper: https://arxiv.org/abs/2307.09288. Meta's code, whose names are kept: https://github.com/meta-llama/llama
Shapes in comments: one token of SmolLM2-135M, dim 576, 9 heads and 3 key-value heads of 64, 100 columns in the cache.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ModelArgs:
    """Sizes of a LLaMA model under Meta's names; the defaults are LLaMA-2-7B."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads (no grouped-query attention)
    vocab_size: int = 32000
    hidden_dim: int = 11008  # of the feed-forward block
    head_dim: int | None = None  # None: dim / n_heads
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    freq_factors: list[float] | None = None  # Llama-3.1 and later: head_dim / 2 divisors of the rotary frequencies
    max_seq_len: int = 4096
    tie_word_embeddings: bool = False  # the output head is the embedding matrix

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.dim // self.n_heads


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich 2019), computed in float32 whatever the dtype of x."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)  # (1, 1, 1)
        return (x32 * scale * self.weight).type_as(x)


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
        self.pad = torch.zeros(batch_size, dtype=torch.long)  # columns of left padding in each row
        self.length = 0  # columns filled so far: where the next token goes
        self.freqs_cis = precompute_freqs_cis(torch.arange(max_seq_len)[None], args, device)[0]  # (100, 1, 32)
        self.args, self.max_seq_len = args, max_seq_len

    def write(self, layer_id, k, v, active=None):
        """Store k, v, (batch, n_kv_heads, seq, head_dim), from column `length` on; return views of the layer's."""
        start, end = self.length, self.length + k.size(2)
        all_k, all_v = self.k[layer_id, :, :, :end], self.v[layer_id, :, :, :end]  # (1, 3, 100, 64)
        if active is not None:  # (batch, seq); only for policies that skip attention, whose other tokens miss an entry
            keep = active[:, None, :, None].to(k.device)  # (batch, seq) -> (batch, 1, seq, 1)
            k, v = torch.where(keep, k, all_k[:, :, start:]), torch.where(keep, v, all_v[:, :, start:])
            active = active | self.written[layer_id, :, start:end]
        all_k[:, :, start:], all_v[:, :, start:] = k, v
        self.written[layer_id, :, start:end] = True if active is None else active
        return all_k, all_v

    def complete(self):
        """True if every layer has written every column below `length`, so that later tokens miss no entry."""
        return bool(self.written[:, :, : self.length].all())

    def check(self, tokens, weight, pad):
        """Raise ValueError if tokens (batch, seq) of a model with this weight, padded so, cannot be added."""
        batch, seq = tokens.shape
        if self.length + seq > self.max_seq_len:
            raise ValueError(f"{self.length} + {seq} tokens are more than the cache's max_seq_len {self.max_seq_len}")
        if self.k.size(1) != batch or self.k.dtype != weight.dtype:
            raise ValueError(f"a cache of {len(self.pad)} rows, {self.k.dtype}, does not fit {batch}, {weight.dtype}")
        if self.length and not torch.equal(pad, self.pad):
            raise ValueError("left padding cannot change once the cache holds tokens")


@dataclass
class Step:
    """What one forward pass knows: the same for every layer, and what a policy may look at."""

    cache: KVCache
    positions: torch.Tensor  # (batch, seq) on the host, where it is read without waiting for a GPU; 0 in padding
    token_index: torch.Tensor  # (batch, seq) on the host: position - prompt_len, negative in the prompt and in padding
    freqs_cis: torch.Tensor  # (batch, seq, 1, head_dim / 2), the rotary factors of the positions
    mask: torch.Tensor | None  # bool (batch, 1, seq, columns): what each token sees; None: all up to its own column
    trace: object  # a support.tracing.Trace, or None
    logits: object  # x (batch, seq, dim) -> fp32 logits (batch, seq, vocab): the model's final norm and head


class Attention(nn.Module):
    def __init__(self, args, layer_id):
        super().__init__()
        self.args, self.layer_id = args, layer_id
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x, step, active=None):
        """What is added to the residual stream; x, (batch, seq, dim), is the norm of that stream."""
        k, v = self.write_kv(x, step, active)
        q = self.wq(x).unflatten(-1, (-1, self.args.head_dim))  # (1, 1, 576) -> (1, 1, 9, 64)
        q = apply_rotary_emb(q, step.freqs_cis)
        out = self.attend(q.transpose(1, 2), k, v, step)  # (1, 9, 1, 64)
        return self.wo(out.transpose(1, 2).flatten(2))  # -> (1, 1, 9, 64) -> (1, 1, 576)

    def write_kv(self, x, step, active=None):
        """Write the keys and values of x into the cache; return the layer's, from column 0 on."""
        k = apply_rotary_emb(self.wk(x).unflatten(-1, (-1, self.args.head_dim)), step.freqs_cis)
        v = self.wv(x).unflatten(-1, (-1, self.args.head_dim))  # (1, 1, 192) -> (1, 1, 3, 64), and so is k
        return step.cache.write(self.layer_id, k.transpose(1, 2), v.transpose(1, 2), active)  # (1, 3, 100, 64)

    def attend(self, q, k, v, step):
        """softmax(q k^T / sqrt(head_dim)) v, (batch, n_heads, seq, head_dim); a group of query heads shares k and v."""
        group = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (1, 3, 100, 64) -> (1, 9, ...)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask)


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
    One layer, in the parts that a policy may call. x, h, temp: (batch, seq, dim), the residual stream before the
    attention, between the blocks, and after the feed-forward block; a policy changes none of them in place. active:
    (batch, seq) bool on the host; None: all.
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
        return x + self.attention(self.attention_norm(x), step, active)

    def add_feed_forward(self, h, step, active=None):
        """temp = h + feed_forward. With `active`, the block does not run for the other tokens, whose temp is h."""
        if active is None or active.all():
            temp = h + self.feed_forward(self.ffn_norm(h))
        elif active.any():  # some tokens of several, which never happens when one text is decoded
            index = active.flatten().nonzero().squeeze(1).to(h.device)  # (active tokens,)
            some = h.flatten(0, 1).index_select(0, index)  # -> (batch * seq, dim) -> (active tokens, dim)
            some = some + self.feed_forward(self.ffn_norm(some))
            temp = h.flatten(0, 1).index_copy(0, index, some).view_as(h)
        else:
            return h
        if step.trace is not None:
            step.trace.record_ran(self.layer_id, active)
        return temp

    def cosine(self, h, temp):
        """The cosine of h and temp, one number per token, as a list; in float32: bfloat16 has steps of 0.004 near 1."""
        return F.cosine_similarity(h.float(), temp.float(), dim=-1).flatten().tolist()

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
        self.output = None if args.tie_word_embeddings else nn.Linear(args.dim, args.vocab_size, bias=False)

    @torch.no_grad()
    def forward(self, tokens, cache=None, policy=None, prompt_len=0, pad=None, trace=None, last_only=False):
        """
        fp32 logits (batch, seq, vocab) of tokens (batch, seq), or (batch, 1, vocab) with last_only.
        cache       a KVCache that holds the columns before; None: a throw-away one
        policy      policy(layers, x, step) -> x; None: dense
        prompt_len  int or (batch,): positions below it are prompt; generated tokens count from 0 after it
        pad         (batch,) columns of left padding; given with the first tokens, and kept in the cache
        trace       a support.tracing.Trace that records which feed-forward blocks ran
        """
        weight = self.tok_embeddings.weight
        if cache is None:
            cache = KVCache(self.args, *tokens.shape, weight.dtype, weight.device)
        pad = cache.pad if pad is None else torch.as_tensor(pad).cpu().view(len(tokens))
        cache.check(tokens, weight, pad)
        cache.pad = pad
        step = self.prepare(tokens, cache, prompt_len, trace)
        x = (policy or dense)(list(self.layers), self.tok_embeddings(tokens), step)  # (1, 1) -> (1, 1, 576)
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
        freqs_cis = cache.freqs_cis[positions.to(tokens.device)]
        query, key, pad = columns[:, None], torch.arange(columns[-1] + 1), cache.pad[:, None, None]
        # No token sees padding, but padding sees itself, so that its softmax has a term and stays finite.
        mask = (key <= query) & ((key >= pad) | (query < pad))  # (batch, seq, keys)
        mask = mask[:, None].to(tokens.device)  # (batch, 1, seq, keys), the same for all heads
        return Step(cache, positions, token_index, freqs_cis, mask, trace, self.logits)

    def logits(self, x):
        """fp32 logits (batch, seq, vocab) of the residual stream x (batch, seq, dim), at any depth."""
        x = self.norm(x)
        x = F.linear(x, self.tok_embeddings.weight) if self.output is None else self.output(x)
        return x.float()  # (1, 1, 49152)
