"""
One row on a CPU: decoding a single sequence multiplies one row at a time, and is bound by how fast weights are read.
Without this file model.py would compute the same up to rounding, and slower.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F


@contextmanager
def matrix_vector(rows):
    """
    For a forward pass of one row: where a CPU has bfloat16 instructions, PyTorch would hand the product to oneDNN's
    matrix kernels, which read at a third of the speed of PyTorch's own matrix-vector product. Else nothing changes.
    """
    before = torch.backends.mkldnn.enabled
    if rows == 1:
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def scaled_dot_product_attention(q, k, v, mask, cache):
    """
    PyTorch's, of q (batch, heads, seq, head_dim), except for one 16-bit query on a CPU where no heads share their keys:
    its kernel multiplies that at a tenth of the memory's speed. There it is computed in float32, as many heads at a
    time as the scratch memory has room for; the cache keeps that memory over the layers, since asking the system for it
    again costs more than the copies.
    """
    single = q.size(0) == q.size(2) == 1 and q.size(1) == k.size(1)
    if not single or q.dtype == torch.float32 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
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
