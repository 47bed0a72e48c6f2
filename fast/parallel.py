"""
Several processes for a model that fits no single device: `torchrun --nproc-per-node 8 generate.py --ckpt llama-2-70b`.

Tensor parallel (Megatron-LM, https://arxiv.org/abs/1909.08053): attention heads, their cache and hidden_dim are divided
among the processes; norms, embedding and head are replicated. So a process has a Transformer of smaller sizes, and a
hook sums its blocks' outputs over all. A skipped block sends nothing, and no policy need know. All decide alike: an
all-reduce makes each sum once and sends its bits to all, and processes.py refuses processes that may round differently.
"""

import math
from dataclasses import replace

import torch
import torch.distributed as dist

rank, size = 0, 1  # this process among how many; processes.py sets them


def local(args):
    """The ModelArgs of one process's share. Raises ValueError if that is no whole number of heads."""
    most = math.gcd(args.n_heads, args.n_kv_heads, args.hidden_dim)
    if most % size:
        sizes = f"n_heads {args.n_heads}, n_kv_heads {args.n_kv_heads} and hidden_dim {args.hidden_dim}"
        raise ValueError(f"{size} processes do not divide {sizes}: --nproc-per-node must, as {most} does")
    n_heads, n_kv_heads, hidden_dim = args.n_heads // size, args.n_kv_heads // size, args.hidden_dim // size
    return replace(args, n_heads=n_heads, n_kv_heads=n_kv_heads, hidden_dim=hidden_dim)  # head_dim stays


def connect(model):
    """Let the blocks of a Transformer with local sizes add up over the processes. Returns the model."""
    if size > 1:
        for layer in model.layers:
            layer.attention.register_forward_hook(add_up)
            layer.feed_forward.register_forward_hook(add_up)
    return model


def add_up(module, inputs, out):
    """A forward hook: out, (..., dim), becomes its sum over the processes."""
    dist.all_reduce(out)
    return out


def split_dim(name):
    """The dimension in which the matrix of that name is divided, as in Meta's shards; None: each has all of it."""
    if not name.startswith("layers.") or name.endswith("norm.weight"):
        return None
    if name.endswith(("wo.weight", "w2.weight")):
        return 1
    return 0


def share(name, n, dim):
    """The slice of n rows (dim 0) or columns (dim 1) of the matrix `name` that this process has."""
    if dim != split_dim(name):
        return slice(0, n)
    return slice(n * rank // size, n * (rank + 1) // size)


def read_share(name, shards, dim):
    """This process's share of the matrix that `shards` are, put together in dim; no other bytes of them are read."""
    if size > 1 and split_dim(name) is not None:
        n, pieces = shards[0].size(dim), []
        wanted = share(name, n * len(shards), dim)
        for i, shard in enumerate(shards):
            start, stop = max(wanted.start - i * n, 0), min(wanted.stop - i * n, n)
            if start < stop:
                pieces.append(shard.narrow(dim, start, stop - start).contiguous())  # a copy only of columns
        shards = pieces
    if len(shards) == 1:
        return shards[0]
    return torch.cat(shards, dim)
