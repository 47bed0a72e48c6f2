"""
One row on a CPU. Decoding a single text is bound by how fast the weights are read, and which product reads fastest
differs between CPUs by up to two times. It is chosen by dtype and by what the CPU can do, never by timing, so that one
machine gives the same bits with the same number of threads; `python experiments/bench.py --products` shows every way on
yours. More rows, other devices and sharded weights are left to PyTorch, whose functions give the same up to rounding.

Small matrices are stored by columns. W x is then a sum of columns, each by its number in x, which torch.embedding_bag
computes in float32, to the same bits with any number of threads; and a column that is left out need not be read.
"""

import functools
import math
import sys
import threading
from contextlib import contextmanager
from ctypes import c_float
from weakref import WeakKeyDictionary

import numpy
import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from fast import parallel

FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")  # on CUDA one kernel for four, to the same bits
AMX, AVX512_BF16 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
SMALL = 2**20  # numbers of a matrix up to which columns are faster for one row, and no slower for many
here = threading.local()  # .way: how this thread's pass multiplies its one row; None: it is not of one row on a CPU
native = threading.Lock(), []  # one entry per pass of any thread that is under way without oneDNN


def way_of_one(dtype):
    """How a row is multiplied: "mv", "native mv" or, where nothing else was measured, "linear", PyTorch's default."""
    if dtype == torch.bfloat16 and AMX:
        return "mv"  # oneDNN with the weights as the left matrix, as they lie: 1.3 times F.linear on a Xeon
    if dtype == torch.bfloat16 and AVX512_BF16:
        return "native mv"  # without oneDNN, whose product has 0.6 of the speed of PyTorch's own on an EPYC
    return "linear"


@contextmanager
def products(tokens, weight):
    """For a forward pass over tokens of a model with this weight: sets what `as_row` and `linear` do."""
    before, one = way(), tokens.numel() == 1 and weight.device.type == "cpu"
    here.way = way_of_one(weight.dtype) if one and type(weight) is nn.Parameter else None
    try:
        if here.way == "native mv":
            with without_onednn():
                yield
        else:
            yield
    finally:
        here.way = before


@contextmanager
def without_onednn():
    """PyTorch's switch is one for all threads: the first pass that comes turns it, the last that goes turns it back."""
    lock, passes = native
    with lock:
        passes.append(torch.backends.mkldnn.enabled if not passes else passes[0])
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        with lock:
            enabled = passes.pop()
            torch.backends.mkldnn.enabled = enabled and not passes


def way():
    return getattr(here, "way", None)


def as_row(x):
    """x, (1, 1, dim), as a vector (dim,) if this pass is of one row, else x."""
    return x if way() is None or x.numel() != x.size(-1) else x.view(-1)


def linear(x, weight):
    return F.linear(x, weight) if x.dim() > 1 or way() in (None, "linear") else torch.mv(weight, x)


def stored(name, weight, device, dtype):
    """A tensor of a model as it is read fastest there, a matrix perhaps by columns; its shape stays."""
    small = name.startswith("layers.") and weight.dim() == 2 and weight.numel() <= SMALL and not is_by_columns(weight)
    if small and torch.device(device).type == "cpu" and dtype == torch.bfloat16 and (AMX or AVX512_BF16):
        return by_columns(weight, dtype)
    return weight.to(device, dtype)


def by_columns(weight, dtype=None):
    """A copy of a matrix (out, in), whose columns lie one after the other in memory."""
    return torch.empty_like(weight.t(), dtype=dtype, memory_format=torch.contiguous_format).copy_(weight.t()).t()


def is_by_columns(weight):
    return weight.t().is_contiguous()


def table_of(weight, parts):
    """A matrix by columns as rows that are parts of its columns: (576, 1536) -> (1536, 576) -> (3072, 288), of two."""
    return weight.t().view(-1, weight.size(0) // parts)


@functools.lru_cache
def all_columns(n, parts):
    """For torch.embedding_bag, the rows that are the parts of n columns; part 0 of a column is row `column * parts`."""
    return (torch.arange(n) * parts + torch.arange(parts)[:, None]).flatten()


@functools.lru_cache(2**15)
def offsets(n, parts):
    """Where each part begins among the rows of n columns."""
    return torch.arange(parts) * n


def with_columns(x, parts):
    """x, (in,), with every column: what sum_of_columns reads."""
    return x if parts == 1 else x.repeat(parts), all_columns(len(x), parts), offsets(len(x), parts)


def with_some_columns(x, low, parts):
    """The same without the numbers of x below low, whose columns are then not read. numpy finds them soonest."""
    numbers = x.float().numpy()
    columns = numpy.flatnonzero(~(numpy.abs(numbers) < low))  # NaN is kept
    numbers, n = numbers[columns], len(columns)
    if parts > 1:
        numbers = numpy.tile(numbers, parts)
        columns = numpy.concatenate([columns * parts + part for part in range(parts)])
    return torch.from_numpy(numbers).to(x.dtype), torch.from_numpy(columns), offsets(n, parts)


def sum_of_columns(inputs, weight):
    """The matrix of table_of(weight, parts) by inputs, from with_columns. A part of the outputs is one thread's."""
    x, rows, begins = inputs
    out = torch.embedding_bag(weight, rows, begins, mode=0, per_sample_weights=x)[0]
    return out.view(-1)  # (2, 288) -> (576,)


class Squares:
    """
    The last state (1, 1, dim) that was asked for, in float32, and the sum of its squares. Two norms and the cosine
    between them need the same two sums; so monitoring a layer costs one dot product and not three. It tells states
    apart by identity: a policy must make new states, and change none in place. That is verified at some tokens.
    """

    def __init__(self):
        self.state, self.state32, self.square, self.zeros, self.verifies = None, None, None, None, True

    def of(self, state):
        """(the state in float32, (dim,); the sum of its squares). ValueError if the state was changed since."""
        if state is not self.state or self.verifies:
            state32 = state.view(-1).float()
            square = torch.dot(state32, state32).item()
            if state is self.state and square != self.square and square == square:  # it is not NaN
                raise ValueError("the policy changed a state in place: it must make a new one, as x = x + y does")
            self.state, self.state32, self.square = state, state32, square
        return self.state32, self.square

    def norm(self, state, weight, eps):
        """RMSNorm of a state as a vector (dim,): five operations and not ten."""
        state32, square = self.of(state)
        if self.zeros is None:
            self.zeros = torch.zeros_like(state32)
        scale = (square / len(state32) + eps) ** -0.5
        return torch.addcmul(self.zeros, state32, weight.float(), value=scale).type_as(state)

    def cosine(self, h, temp):
        """The cosine of two states as a number of float32, whatever their dtype."""
        h32, h_square = self.of(h)
        temp32, temp_square = self.of(temp)
        return c_float(torch.dot(h32, temp32).item() / max(h_square * temp_square, 1e-16) ** 0.5).value


class Layer:
    """
    A model.Block for one token of one text, with the same sums in the same order on vectors (dim,), which spares two
    views per product, and without modules, whose calls and searches take as long as a small model's products.
    """

    partial = low = unread = None  # of one that leaves out inputs: thresholds, and which shares it left out last

    def __init__(self, layer, cache, squares):
        attention, block = layer.attention, layer.feed_forward
        self.layer, self.layer_id, self.attend, self.squares = layer, layer.layer_id, attention.attend, squares
        matrices = attention.wq, attention.wk, attention.wv, attention.wo, block.w1, block.w2, block.w3
        weights, self.parts = [matrix.weight for matrix in matrices], 0
        self.product = F.linear if way() == "linear" else multiply
        if all(map(is_by_columns, weights)):
            self.product, self.parts = sum_of_columns, math.gcd(torch.get_num_threads(), *map(len, weights))
            weights = [table_of(weight, self.parts) for weight in weights]
        self.wq, self.wk, self.wv, self.wo, self.w1, self.w2, self.w3 = weights
        self.norm_1, self.norm_2, self.eps = layer.attention_norm.weight, layer.ffn_norm.weight, layer.ffn_norm.eps
        self.n_heads, self.head_dim = attention.args.n_heads, attention.args.head_dim
        self.k, self.keys, self.values = cache.k, cache.k[self.layer_id], cache.v[self.layer_id]  # (1, 3, 100, 64)
        self.written = cache.written[self.layer_id, 0].numpy()  # the same memory; numpy sets an entry sooner

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __call__(self, x, step):
        return self.add_feed_forward(self.add_attention(x, step), step)

    def add_attention(self, x, step, active=None):
        if active is not None or x.numel() != x.size(-1) or step.cache.k is not self.k:
            return self.layer.add_attention(x, step, active)
        product, column = self.product, step.cache.length
        normed = self.inputs(self.squares.norm(x, self.norm_1, self.eps), 0)
        queries_keys = torch.cat((product(normed, self.wq), product(normed, self.wk)))  # one rotation for both
        pairs = torch.view_as_complex(queries_keys.float().view(-1, self.head_dim // 2, 2))  # -> (12, 32)
        turned = torch.view_as_real(pairs * step.freqs_cis).view(-1, self.head_dim)  # -> (1, 1, 12, 32, 2) -> (12, 64)
        self.keys.select(2, column).copy_(turned[self.n_heads :])
        self.values.select(2, column).copy_(product(normed, self.wv).view(-1, self.head_dim))
        self.written[column] = True
        q = turned[: self.n_heads].type_as(x).view(1, self.n_heads, 1, self.head_dim)
        out = self.attend(q, self.keys.narrow(2, 0, column + 1), self.values.narrow(2, 0, column + 1), step)
        out = product(self.inputs(out.reshape(-1), 1), self.wo)
        if self.low is not None and step.trace is not None:
            unread = self.unread[0] * (1 - self.of_wo) + self.unread[1] * self.of_wo
            step.trace.record_unread(self.layer_id, "attention", unread)
        return x + self.add_up(out)

    def add_feed_forward(self, h, step, active=None):
        if active is not None and not active.any():
            return h
        if h.numel() != h.size(-1):
            return self.layer.add_feed_forward(h, step, active)
        product = self.product
        normed = self.inputs(self.squares.norm(h, self.norm_2, self.eps), 2)
        out = product(self.inputs(F.silu(product(normed, self.w1)) * product(normed, self.w3), 3), self.w2)
        if step.trace is not None:
            step.trace.record_ran(self.layer_id, active)
            if self.low is not None:
                step.trace.record_unread(self.layer_id, "feed_forward", (2 * self.unread[2] + self.unread[3]) / 3)
        return h + self.add_up(out)

    def inputs(self, x, place):
        """x, (in,), as self.product takes it: itself, or with the columns that it weights."""
        if not self.parts:
            return x
        if self.low is None or not self.low[place]:
            return with_columns(x, self.parts)
        some = with_some_columns(x, self.low[place], self.parts)
        self.unread[place] = 1 - len(some[0]) / len(x) / self.parts
        return some

    def leaving_out(self, low):
        """
        This layer without the inputs below low, thresholds: of wq, wk and wv, of wo, of w1 and w3, and of w2. None
        if its matrices are not by columns, or are divided among processes.
        """
        if not self.parts or parallel.size > 1:
            return None
        if self.partial is None or self.partial.low is not low:
            self.partial = Layer.__new__(Layer)
            vars(self.partial).update(vars(self), low=low, unread=[0.0] * 4, of_wo=share_of_wo(self.layer.attention))
        return self.partial

    def add_up(self, out):
        """The output of a block; of several processes, summed over them, which a hook does for model.py's layers."""
        return parallel.add_up(None, None, out) if parallel.size > 1 else out

    def cosine(self, h, temp):
        return [self.squares.cosine(h, temp)] if h.numel() == h.size(-1) else self.layer.cosine(h, temp)


def share_of_wo(attention):
    return attention.wo.weight.numel() / sum(weight.numel() for weight in attention.parameters())


def multiply(x, weight):
    return torch.mv(weight, x)


kept = WeakKeyDictionary()  # {KVCache: its Layers}
compared = WeakKeyDictionary()  # {model.Block: whether a Layer computes the same}
VERIFY = 8  # a token of so many is verified to be changed nowhere in place


def faster(layers, cache):
    """
    A Layer for each of the layers, kept as long as the cache is; the layers themselves if one of them or the cache is
    not as model.py had it when this file was written. What is replaced, hooked or changed after a cache's first row is
    noticed with the next cache; weights that are changed in place are, at once.
    """
    plain, found = kept.get(cache, (None, None))
    if plain == layers:
        found[0].squares.verifies = cache.length % VERIFY == 0
        return found
    if type(cache) is not model.KVCache or "write" in vars(cache) or not are_known(layers, cache.args):
        return layers
    squares = Squares()
    found = [Layer(layer, cache, squares) for layer in layers]
    kept[cache] = layers, found
    return found


def are_known(layers, args):
    """Whether the layers are as model.py had them when this file was written, and a Layer computes the same."""
    if not all(map(is_plain, layers)):
        return False
    for layer in layers:
        if layer not in compared:
            compared[layer] = computes_the_same(layer, args)
        if not compared[layer]:
            return False
    return True


def computes_the_same(layer, args):
    """
    Whether a Layer gives for a random row what the layer of model.py gives, up to rounding. It does not if somebody has
    changed model.py, which then decodes as it stands, and slower.
    """
    dtype = layer.attention.wq.weight.dtype
    x = torch.randn(1, 1, args.dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    cache, other = model.KVCache(args, 1, 1, dtype), model.KVCache(args, 1, 1, dtype)
    temp, cosine = one_token(layer, x, cache)
    fast_temp, fast_cosine = one_token(Layer(layer, other, Squares()), x, other)
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    same = (temp - fast_temp).abs().max() <= tolerance * temp.abs().max() and abs(cosine - fast_cosine) <= tolerance
    if not same and temp.isfinite().all():
        print(f"[layer {layer.layer_id} of model.py computes something else than fast/one_row.py: it decodes as it "
              "stands, and slower]", file=sys.stderr)
    return same


def one_token(layer, x, cache):
    """(temp in float32, the cosine) of a layer for x, (1, 1, dim), the first token of a text."""
    step = model.Step(cache, torch.zeros(1, 1), torch.zeros(1, 1), cache.freqs_cis[None], None, None, None)
    h = layer.add_attention(x, step)
    temp = layer.add_feed_forward(h, step)
    return temp.float(), layer.cosine(h, temp)[0]


METHODS = {"forward", "attend", "write_kv", "add_attention", "add_feed_forward", "cosine"}  # which one may replace


def is_plain(module):
    """Whether a module, in all its parts, is of model.py's classes, with no hook but that of several processes."""
    if nn.modules.module._has_any_global_hook():
        return False
    for part in module.modules():
        own = vars(part)
        hooked = own["_forward_pre_hooks"] or set(own["_forward_hooks"].values()) - {parallel.add_up}
        if type(part) not in KNOWN or METHODS & own.keys() or getattr(part, "bias", None) is not None or hooked:
            return False
    return True


class RMSNorm(model.RMSNorm):
    def forward(self, x):
        if FUSED_NORM and x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


class Attention(model.Attention):
    def attend(self, q, k, v, step):
        """
        A group of query heads is more queries of one head. One 16-bit query whose heads share no keys is another
        matter: without AMX PyTorch's kernel has a quarter of the speed of float32 copies.
        """
        group, mask = q.size(1) // k.size(1), step.mask
        if q.size(2) > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        one = q.size(0) == group == 1 and q.device.type == "cpu"
        if one and q.dtype != torch.float32 and AVX512_BF16 and not AMX:
            return attend_in_float32(q, k, v, mask)
        out = F.scaled_dot_product_attention(q.reshape(len(q), -1, group, q.size(3)), k, v, attn_mask=mask)
        return out.reshape(q.shape)  # (1, 9, 1, 64) -> (1, 3, 3, 64), and back


def needs_no_mask(step, x):
    """
    True if each token of x, (batch, seq, dim), sees all columns up to its own, and the kernel knows: of one token, or
    of a text from its beginning. On CUDA the second would be cuDNN's kernel, whose bits vary. On a Mac's GPU neither
    is sure: PyTorch 2.8 to 2.11 are reported to give wrong numbers without a mask (pytorch/pytorch#169222, #174861).
    """
    one = x.size(1) == 1 and x.device.type in ("cpu", "cuda")
    from_the_start = step.cache.length == 0 and x.device.type == "cpu"
    return (one or from_the_start) and not step.cache.pad.any()


KNOWN = {nn.Linear, nn.Embedding, model.FeedForward, model.Block, RMSNorm, Attention}


def attend_in_float32(q, k, v, mask):
    """For as many heads at a time as a memory has room for, which is kept: new memory costs more than the copies."""
    columns, head_dim = k.shape[2:]
    scratch = getattr(here, "scratch", None)
    if scratch is None or scratch.size(1) < columns * head_dim:  # always enough for one head
        scratch = here.scratch = torch.empty(2, max(2**19, 2 * columns * head_dim))  # at first 2 MB each
    heads = scratch.size(1) // (columns * head_dim)  # 2,000 columns of LLaMA-2-7B: 2 heads
    out = []
    for start in range(0, k.size(1), heads):
        some = slice(start, start + heads)
        shape = k[:, some].shape
        k32 = scratch[0, : shape.numel()].view(shape).copy_(k[:, some])
        v32 = scratch[1, : shape.numel()].view(shape).copy_(v[:, some])
        out.append(F.scaled_dot_product_attention(q[:, some].float(), k32, v32, attn_mask=mask))
    return torch.cat(out, dim=1).type_as(q)
