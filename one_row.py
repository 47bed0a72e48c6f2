"""
One row on a CPU. Decoding a single text is bound by how fast the weights are read, and which product reads fastest
differs between CPUs by up to two times. It is chosen by dtype and by what the CPU can do, never by a clock, so that one
machine gives the same bits with the same number of threads; `python experiments/bench.py --products` shows every way on
yours. More rows, other devices and sharded weights are left to PyTorch, whose functions give the same up to rounding.
"""

from contextlib import contextmanager
from ctypes import c_float

import torch
import torch.nn as nn
import torch.nn.functional as F

FUSED_NORM = hasattr(torch.ops.aten, "_fused_rms_norm")  # on CUDA one kernel for four, to the same bits
AMX, AVX512_BF16 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
way = None  # how the forward pass under way multiplies its one row; None: it is not of one row on a CPU


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
    global way
    way_before, enabled_before = way, torch.backends.mkldnn.enabled
    one = tokens.numel() == 1 and weight.device.type == "cpu"
    way = way_of_one(weight.dtype) if one and type(weight) is nn.Parameter else None
    torch.backends.mkldnn.enabled = enabled_before and way != "native mv"
    try:
        yield
    finally:
        way, torch.backends.mkldnn.enabled = way_before, enabled_before


def as_row(x):
    """
    x, (1, 1, dim), as a vector (dim,) if this pass is of one row, else x. A vector is what the functions below are fast
    for, and spares norms and products two views each, which would take 4 % of a small model's token. What is put in the
    place of a norm, of attention or feed_forward, or hooked to them, must take vectors too.
    """
    return x if way is None or x.numel() != x.size(-1) else x.view(-1)


def linear(x, weight):
    return F.linear(x, weight) if x.dim() > 1 or way in (None, "linear") else torch.mv(weight, x)


def with_parts(*names):
    """
    A class decorator: properties by which a module finds its parts of these names at once. nn.Module's own search takes
    half a microsecond, twenty times per layer; eleven of these are for parts, and take 2.5 % of a small model's token.
    """

    def add_properties(cls):
        for name in names:
            setattr(cls, name, part(name))
        return cls

    return add_properties


def part(name):
    def find(module):
        return module._modules[name]

    return property(find)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight)

    def __call__(self, x):
        """nn.Module's, without global hooks and other things that it looks for: 2 % of a small model's token."""
        hooked = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return super().__call__(x) if hooked else self.forward(x)


def is_one_row(x):
    return x.numel() == x.size(-1) and x.device.type == "cpu"


def cosine(layer, h, temp):
    """
    (batch, seq): the cosine of two states (batch, seq, dim), in float32 whatever their dtype, for graphs.read. Nine
    operations for F.cosine_similarity's fourteen: 4 % of a token of LLaMA-2-7B on an H200, if half of its layers ask.
    """
    both = torch.stack((h, temp)).float()  # (2, batch, seq, dim)
    dots = (both[:, None] * both).sum(-1)  # (2, 2, batch, seq)
    return dots[0, 1] / (dots[0, 0].sqrt() * dots[1, 1].sqrt()).clamp(min=1e-8)


def cosine_of_one(a, b):
    """The cosine of two vectors as a number, in float32 whatever their dtype, without the dozen operations of F's."""
    a, b = a.view(-1).float(), b.view(-1).float()
    return c_float(torch.dot(a, b).item() / max(torch.dot(a, a).item() * torch.dot(b, b).item(), 1e-16) ** 0.5).value


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (Zhang and Sennrich 2019), in float32 whatever the dtype of x."""

    def forward(self, x):
        if FUSED_NORM and x.is_cuda:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        if way is None or x.dim() > 1:
            out = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
            return out.type_as(x)  # PyTorch 2.5 would round twice in 16 bits; later ones do the same as this
        x32 = x.float()  # a dot product and two multiplications instead of ten operations
        scale = (torch.dot(x32, x32).item() / len(x) + self.eps) ** -0.5
        return (x32 * scale * self.weight).type_as(x)


def knows_causal(device):
    """Whether a text from its beginning needs no mask. With CUDA that would be cuDNN's kernel, whose bits vary."""
    return device.type != "cuda"


def scaled_dot_product_attention(q, k, v, mask, cache):
    """
    PyTorch's, (batch, n_heads, seq, head_dim), of q in that shape and k, v (batch, n_kv_heads, columns, head_dim), of
    which groups of query heads share one. Where mask is None, a query sees every column up to its own.

    One 16-bit query whose heads share no keys is another matter: without AMX PyTorch's kernel has a quarter of the
    speed of float32 copies, made for as many heads at a time as a scratch memory has room for. The cache keeps that
    memory, since new memory costs more than the copies.
    """
    group = q.size(1) // k.size(1)
    if q.size(2) > 1:  # every query head has a copy of the keys that it shares
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (1, 3, 100, 64) -> (1, 9, ...)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    one = q.size(0) == group == 1 and q.device.type == "cpu"
    if not one or q.dtype == torch.float32 or AMX or not AVX512_BF16:  # a group's heads are more queries of one head
        out = F.scaled_dot_product_attention(q.reshape(len(q), -1, group, q.size(3)), k, v, attn_mask=mask)
        return out.reshape(q.shape)  # (1, 9, 1, 64) -> (1, 3, 3, 64), and back
    columns, head_dim = k.shape[2:]
    if cache.scratch is None:  # 2 MB each for keys and values, and always enough for one head
        cache.scratch = torch.empty(2, max(2**19, cache.max_seq_len * head_dim))
    heads = cache.scratch.size(1) // (columns * head_dim)  # 2,000 columns of LLaMA-2-7B: 2 heads
    out = []
    for start in range(0, k.size(1), heads):
        some = slice(start, start + heads)
        shape = k[:, some].shape
        k32 = cache.scratch[0, : shape.numel()].view(shape).copy_(k[:, some])
        v32 = cache.scratch[1, : shape.numel()].view(shape).copy_(v[:, some])
        out.append(F.scaled_dot_product_attention(q[:, some].float(), k32, v32, attn_mask=mask))
    return torch.cat(out, dim=1).type_as(q)
