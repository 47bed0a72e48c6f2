"""
What else may be left out of a block: not the block, but the inputs of its matrices that hardly count. A number that is
small adds little to a product, and its column of the matrix need not be read. Both papers need kernels of their own to
save the time; on a CPU, a sum of columns (fast/one_row.py) saves it in plain PyTorch.

teal       inputs of w1, w3 and w2 whose size is below a threshold, one per layer and place: a quantile of what is seen
           there in calibration text (Liu et al. 2024, https://arxiv.org/abs/2408.14690)
teal_all   the same for all the matrices of the layers, as in that paper
cats       neurons whose gate, silu(w1 x), is below a threshold: their rows of w3 and columns of w2 (Lee et al. 2024,
           https://arxiv.org/abs/2404.08763)
teal_standins  teal, and from --skip 0.3 on 6 % of the blocks replaced whole, those whose stand-in (standins.py) is
           predicted to do the least harm, which harms less there (docs/teal.md). This project's own

--skip is the share of the feed-forward blocks' bytes that is left out (teal_all: of all that the layers read). No cache
entry is missing.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from fast import one_row, parallel
from model import apply_rotary_emb, dense
from policies import standins
from support.common import LoadError, made_for, note, read_json
from support.measuring import as_windows, written_text

PLACES = "attention", "wo", "feed_forward", "w2", "gate"  # inputs of wq, wk and wv, of wo, of w1 and w3, of w2; gates
OUTPUT_FACTOR = 1.4  # as large a share of the inputs of wo and w2 is left out as of all: the others harm more
BLOCKS, FROM = 0.06, 0.3  # of all, how many teal_standins replaces whole, and from which --skip on
N_QUANTILES = 20  # quantiles in a file: 0, 1/20, ..., 19/20
MAX_SHARE = 0.65  # with OUTPUT_FACTOR the last quantile in a file
SAMPLE = 200_000  # numbers per layer and place, of which quantiles are taken
WARM_UP_INDEX = 25


class Teal:
    """
    The policy: `inner`, dense or another, over layers that leave out small inputs of the tokens past the warm-up. lows
    has per layer a threshold per place; 0 leaves out nothing. as_blocks: the share of blocks that has as many bytes.
    """

    def __init__(self, lows, warm_up_index=WARM_UP_INDEX, as_blocks=None, inner=dense):
        self.lows, self.warm_up_index, self.as_blocks, self.inner = lows, warm_up_index, as_blocks, inner

    def __call__(self, layers, x, step):
        past = step.token_index > self.warm_up_index  # (batch, seq)
        if past.any():
            layers = [partial(layer, self.lows[layer.layer_id], past) for layer in layers]
        return self.inner(layers, x, step)


def partial(layer, low, past):
    """The layer without inputs below low: of one row by columns, which are then not read, or else a Partial."""
    if past.numel() == 1 and hasattr(layer, "leaving_out") and not low[PLACES.index("gate")]:
        found = layer.leaving_out(low)
        if found is not None:
            return found
    return Partial(layer, low, past)


class Partial:
    """
    A layer with the same methods, in which small numbers are set to zero for the tokens past, (batch, seq) bool: the
    same up to rounding as if they were left out, and no faster. seen: {place: numbers}, to which samples are added.
    """

    def __init__(self, layer, low, past, seen=None):
        self.layer, self.low, self.seen = layer, dict(zip(PLACES, low)), seen
        self.past = past.unsqueeze(-1).to(layer.ffn_norm.weight.device)  # (batch, seq, 1)

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __call__(self, x, step):
        return self.add_feed_forward(self.add_attention(x, step), step)

    def add_attention(self, x, step, active=None):
        attention = self.layer.attention
        normed = self.leave_out(self.layer.attention_norm(x), "attention")
        k, v = attention.write_kv(normed, step, active)
        q = attention.wq(normed).unflatten(-1, (-1, attention.args.head_dim))  # (1, 1, 576) -> (1, 1, 9, 64)
        q = apply_rotary_emb(q, step.freqs_cis)
        out = attention.attend(q.transpose(1, 2), k, v, step)  # (1, 9, 1, 64)
        out = self.leave_out(out.transpose(1, 2).flatten(2), "wo")  # -> (1, 1, 9, 64) -> (1, 1, 576)
        if step.trace is not None:
            unread = mix(zeros(normed), zeros(out), one_row.share_of_wo(attention))
            step.trace.record_unread(self.layer_id, "attention", unread)
        return x + attention.wo(out)

    def add_feed_forward(self, h, step, active=None):
        if active is not None and not active.any():
            return h
        block = self.layer.feed_forward
        normed = self.leave_out(self.layer.ffn_norm(h), "feed_forward")
        gate = self.leave_out(F.silu(block.w1(normed)), "gate")
        product = self.leave_out(gate * block.w3(normed), "w2")
        temp = h + block.w2(product)
        if step.trace is not None:
            left_out = zeros(normed)
            of_w3 = 1 - (1 - left_out) * (1 - zeros(gate))  # its columns, and the rows of the neurons left out
            unread = (left_out + of_w3 + zeros(product)) / 3
            step.trace.record_unread(self.layer_id, "feed_forward", unread, active)
            step.trace.record_ran(self.layer_id, active)
        return temp if active is None else torch.where(active.unsqueeze(-1).to(h.device), temp, h)

    def leave_out(self, x, place):
        """x, (batch, seq, n), with zeros for the small numbers of the tokens past."""
        size = x.float().abs()  # in bfloat16 a threshold would be rounded
        if self.seen is not None:
            self.seen[place].append(sample(size, SAMPLE // 8))
        return torch.where((size < self.low[place]) & self.past, 0, x)


def zeros(x):
    """(batch * seq,): the share of zeros in x, (batch, seq, n)."""
    return (x == 0).float().mean(-1).flatten().cpu()


def mix(a, b, of_b):
    return a + (b - a) * of_b


def sample(x, n):
    """About n numbers of x, from all over it."""
    x = x.flatten()
    return x[:: max(1, len(x) // n) | 1].cpu()  # an odd step, so that all columns are met


def find_quantiles(model, windows):
    """{place: (n_layers, N_QUANTILES)}: quantiles of the size of what each matrix reads, over windows of text."""
    seen = [{place: [] for place in PLACES} for _ in model.layers]

    def watch(layers, x, step):
        everything = torch.ones(step.token_index.shape, dtype=torch.bool)
        for layer in layers:
            x = Partial(layer, [0] * len(PLACES), everything, seen[layer.layer_id])(x, step)
        return x

    for ids, _ in windows:
        model(torch.tensor([ids], device=model.tok_embeddings.weight.device), policy=watch, last_only=True)
    at, found = torch.arange(N_QUANTILES) / N_QUANTILES, {}
    for place in PLACES:
        numbers = [sample(torch.cat(seen[layer_id][place]), SAMPLE) for layer_id in range(model.args.n_layers)]
        found[place] = torch.stack([torch.quantile(some, at) for some in numbers])
    return found


def thresholds(quantiles, shares):
    """Per layer, the thresholds by PLACES that leave out these shares of the numbers there: {place: share}."""
    lows = [[0.0] * len(PLACES) for _ in quantiles["w2"]]
    for place, share in shares.items():
        at = share * N_QUANTILES
        before = min(int(at), N_QUANTILES - 2)
        for low, values in zip(lows, quantiles[place]):
            low[PLACES.index(place)] = mix(values[before], values[before + 1], at - before).item()
    return lows


def make(model, skip, warm_up_index=WARM_UP_INDEX, tokens=None, seed=0, fitted=None, shares=None):
    """
    Teal with thresholds from the calibration text `tokens`, (batch, seq), from the file `fitted` that
    experiments/fit_teal.py writes, or from text that the model writes. shares: {place: share of its inputs}.
    """
    check(skip, MAX_SHARE, "teal")
    if tokens is not None:
        quantiles = find_quantiles(model, as_windows(tokens))
    elif fitted is not None:
        quantiles = load(fitted, model)
    else:
        note("[no quantiles for this checkpoint: those of text that it writes (experiments/fit_teal.py: of a text)]")
        quantiles = find_quantiles(model, as_windows(written_text(model, 4, 128, seed)))
    shares = shares or of_blocks(skip)
    on_a_cpu = model.tok_embeddings.weight.device.type == "cpu"
    if not on_a_cpu or parallel.size > 1 or "gate" in shares:
        note("[what is left out is set to zero here: the text is the same, and no time is saved]")
    else:
        store_by_columns(model)
    return Teal(thresholds(quantiles, shares), warm_up_index, skip)


def check(skip, most, name):
    if not 0 <= skip <= most:
        raise ValueError(f"a share of {skip}: {name} leaves out a share from 0 to {most} of what it reads")


def of_blocks(skip):
    """{place: share of its inputs} that leave out the share `skip` of a block's bytes, whose w2 is a third of them."""
    return dict(feed_forward=skip * (3 - OUTPUT_FACTOR) / 2, w2=skip * OUTPUT_FACTOR)


def teal_all(model, skip, warm_up_index=WARM_UP_INDEX, tokens=None, seed=0, fitted=None):
    """The same of every matrix of the layers."""
    of_wo = one_row.share_of_wo(model.layers[0].attention)
    shares = dict(attention=skip * (1 - of_wo * OUTPUT_FACTOR) / (1 - of_wo), wo=skip * OUTPUT_FACTOR)
    return make(model, skip, warm_up_index, tokens, seed, fitted, shares | of_blocks(skip))


def cats(model, skip, warm_up_index=WARM_UP_INDEX, tokens=None, seed=0, fitted=None):
    """Teal by the gate alone: two of three matrices have no part in the neurons that it leaves out."""
    check(skip, 0.6, "cats")  # which reads all of w1
    return make(model, skip, warm_up_index, tokens, seed, fitted, dict(gate=1.5 * skip))


def teal_standins(model, skip, warm_up_index=WARM_UP_INDEX, tokens=None, seed=0, fitted=None):
    """Teal over the blocks that run, and from FROM on stand-ins for some, so that `skip` of all bytes is left out."""
    fitted = fitted or {}
    check(skip, MAX_SHARE, "teal_standins")
    if skip < FROM:
        return make(model, skip, warm_up_index, tokens, seed, fitted.get(make.fit))
    inner = standins.make(model, BLOCKS, warm_up_index, tokens, seed, fitted.get(standins.make.fit))
    of_the_rest = 1 - (1 - skip) / (1 - BLOCKS)
    policy = make(model, of_the_rest, warm_up_index, tokens, seed, fitted.get(make.fit))
    policy.inner, policy.as_blocks = inner, skip
    return policy


make.fit = teal_all.fit = cats.fit = "teal.json"  # beside a checkpoint
teal_standins.fit = make.fit, standins.make.fit
teal_all.also_skips = ("attention",)
POLICIES = {"teal": make, "teal_all": teal_all, "teal_standins": teal_standins, "cats": cats}


def store_by_columns(model):
    """
    Store each matrix of the layers by columns, in place, one after the other: as much memory as before. Every policy
    has them so from then on, dense too, which is rounded otherwise and for large matrices slower.
    """
    changed = False
    for layer in model.layers:
        for weight in layer.parameters():
            if weight.dim() == 2 and not one_row.is_by_columns(weight):
                weight.data, changed = one_row.by_columns(weight), True
    if changed:
        note("[the layers' matrices are stored by columns from here on, also for dense, which may be slower so]")


def load(path, model):
    """{place: (n_layers, N_QUANTILES)} of a file by experiments/fit_teal.py. ValueError if it is another model's."""
    again = "python experiments/fit_teal.py makes one for these weights"
    try:
        about = read_json(Path(path))
        quantiles = {place: torch.tensor(about["quantiles"][place]) for place in PLACES}
    except (LoadError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a file of quantiles ({error}): {again}") from None
    shapes = {tuple(values.shape) for values in quantiles.values()}
    if not all(values.isfinite().all() for values in quantiles.values()):
        raise ValueError(f"{path}: numbers in it are not finite: {again}")
    if shapes != {(model.args.n_layers, N_QUANTILES)} or not made_for(model, path, about.get("weights_checksum")):
        raise ValueError(f"{path}: made for another model than this: {again}")
    return quantiles
