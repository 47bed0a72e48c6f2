"""Two verbs for a KVCache that model.py itself has no need of: forget the last columns, and copy row 0 into many."""

from model import KVCache


def rewind(cache, length=0):
    """Forget every column from `length` on."""
    cache.k[..., length : cache.length, :] = 0
    cache.v[..., length : cache.length, :] = 0
    cache.written[..., length:] = False
    cache.length, cache.pad = min(length, cache.length), cache.pad * (length > 0)


def fork(cache, batch_size, max_seq_len):
    """A new cache of batch_size rows, each a copy of row 0 of this one."""
    new, length = KVCache(cache.args, batch_size, max_seq_len, cache.k.dtype, cache.k.device), cache.length
    new.k[..., :length, :] = cache.k[:, :1, :, :length]
    new.v[..., :length, :] = cache.v[:, :1, :, :length]
    new.written[..., :length] = cache.written[:, :1, :length]
    new.length, new.pad = length, cache.pad[:1].expand(batch_size)
    return new
