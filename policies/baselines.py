"""
What FFN-SkipLLM is compared with, and a place for your own: every policy here is a walk over the layers,

    policy(layers, x, step) -> x             x: (batch, seq, dim), the residual stream; see model.dense for the plainest

and is called by its name in POLICIES (`python generate.py --policy shortgpt --skip 0.25 "..."`), beside its factory:

    make(model, skip, warm_up_index=25, tokens=None, seed=0) -> policy
    skip             the share of all layers' feed-forward blocks to skip
    warm_up_index    the prompt and the tokens with token_index <= warm_up_index run in full; the policy keeps it as an
                     attribute, since its ratio is counted past the warm-up
    tokens           (batch, seq) ids of calibration text; None: text that the model writes itself
    seed             of all random choices
    make.also_skips  names of a layer's parameters that a skip leaves unread, beside feed_forward

Of the policies here, those that skip only feed-forward blocks leave a complete cache, and statecopy one that holds some
copied states. shortgpt and skipdecode miss entries that no later token reads, and earlyexit entries that later tokens
do read: the failure that the paper starts from (see attended_missing).
"""

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from skip import FFNSkip
from support.measuring import as_windows, bring_to, cold_regions, measure, quality, replay, skip_ratio, written_text


class RandomSkip:
    """
    Each feed-forward block of the layers [cold_s, cold_e) is skipped by a coin of its own, anew for each token, so that
    the share `skip` of all blocks is: the paper's Baseline 1 (section 4), in any layer, is `random`; its Baseline 2
    ("no input adaptive"), in the layers that are not cold, is `static`; and `random_but_first` spares layer 0, whose
    block alone does most of the harm of `random`.
    """

    def __init__(self, model, skip, warm_up_index=25, tokens=None, seed=0, cold_s=0, cold_e=None):
        n_layers = model.args.n_layers
        self.cold_s, self.cold_e = cold_s, n_layers if cold_e is None else cold_e
        self.skip, self.seed, self.warm_up_index = skip, seed, warm_up_index
        check_room(skip * n_layers, self.cold_e - self.cold_s, skip, n_layers)

    def __call__(self, layers, x, step):
        may_skip = step.token_index > self.warm_up_index  # (batch, seq)
        rate = self.skip * len(layers) / max(1, self.cold_e - self.cold_s)
        for layer in layers:
            drop = uniform(self.seed, layer.layer_id, step.token_index) < rate
            drop &= self.cold_s <= layer.layer_id < self.cold_e
            h = layer.add_attention(x, step)
            x = layer.add_feed_forward(h, step, active=~(drop & may_skip))
        return x


def static(model, skip, warm_up_index=25, tokens=None, seed=0, cold_s=None, cold_e=None):
    """RandomSkip in layers that are not cold. An eighth of the layers is cold at either end, unless given."""
    n_layers = model.args.n_layers
    cold_s = n_layers // 8 if cold_s is None else cold_s
    cold_e = n_layers - n_layers // 8 if cold_e is None else cold_e
    return RandomSkip(model, skip, warm_up_index, tokens, seed, cold_s, cold_e)


class RandomRun:
    """
    The two baselines as the authors' public code has them (model_ffn_baseline.py): a token skips one run of k
    neighbouring feed-forward blocks, drawn anew for each token; k is the whole number nearest to skip * n_layers. For
    `random_run` the run lies anywhere, for `static_run` between cold regions of their own: the first 10 and the last 4
    of LLaMA-2-7B's 32 layers, 10 and 5 of 13B's 40, for other models as many in proportion. There every sixth token is
    in full, and for random none, not even in the prompt; here as for all other policies.
    """

    def __init__(self, model, skip, warm_up_index=25, tokens=None, seed=0, cold=False):
        n_layers = model.args.n_layers
        self.cold_s, self.cold_e = 0, n_layers
        if cold:
            self.cold_s, self.cold_e = min(10, n_layers * 10 // 32), n_layers - n_layers // 8
        self.k, self.seed, self.warm_up_index = round(skip * n_layers), seed, warm_up_index
        check_room(self.k, self.cold_e - self.cold_s, skip, n_layers)

    def __call__(self, layers, x, step):
        may_skip = step.token_index > self.warm_up_index  # (batch, seq)
        n_starts = self.cold_e - self.cold_s - self.k + 1
        start = self.cold_s + (uniform(self.seed, 0, step.token_index) * n_starts).long()  # (batch, seq)
        for layer in layers:
            drop = (start <= layer.layer_id) & (layer.layer_id < start + self.k)
            h = layer.add_attention(x, step)
            x = layer.add_feed_forward(h, step, active=~(drop & may_skip))
        return x


def check_room(n_skipped, n_warm, skip, n_layers):
    if n_skipped > n_warm:
        raise ValueError(f"a share of {skip} cannot be skipped: only {n_warm} of {n_layers} layers are not cold")


def printed(model, skip, warm_up_index=25, tokens=None, seed=0):
    """
    Algorithm 1 as printed, with the threshold that skips the share `skip` of the calibration text, and between the cold
    regions that do least harm to some of it: those of calibrate.py's rule, or a part of what these leave.
    """
    windows = as_windows(calibration_text(model, tokens, seed))
    cosines = measure(model, windows, warm_up_index).cpu()
    start, end = cold_regions(cosines.mean(0))
    some, reference, makers = windows[:: math.ceil(len(windows) / 4)], {}, {}  # makers: by their harm
    for first, last in (0, 1), (0, 1 / 2), (1 / 4, 3 / 4), (1 / 2, 1), (0, 3 / 4), (1 / 4, 1), (3 / 8, 5 / 8):
        cold_s, cold_e = round(start + first * (end - start)), round(start + last * (end - start))
        make = partial(FFNSkip, cold_s, cold_e, warm_up_index=warm_up_index)
        if makers and cold_e - cold_s - 1 < skip * cosines.size(1):
            continue  # too few layers for that share
        low, high = cosines[:, cold_s:cold_e].quantile(0.02).item(), cosines[:, cold_s:cold_e].max().item()
        make.bounds = low, high + 1e-3  # of the threshold, which lies among the cosines
        found = quality(model, some, find_threshold(make, model, some, skip, *make.bounds, 0.01), reference)
        if not makers or abs(found["ffn_skip_ratio"] - skip) <= 0.02:
            makers[found["kl"]] = make
    best = makers[min(makers)]
    return find_threshold(best, model, windows, skip, *best.bounds)


def authors_settings(n_layers, k, max_seq_len=1024):
    """
    What https://github.com/Ajay1994/layer-skip does, as settings of FFNSkip, for max_seq_len tokens of prompt and
    answer. It tests > and not >=. Its warm-up is max_seq_len // 64 zeros, of which it reads those from the third on.
    """
    warm_up_index = max(-1, max_seq_len // 64 - 3)
    return FFNSkip(4, n_layers - 5, math.nextafter(0.95, 1), warm_up_index, k, recheck=False, full_every=6)


def authors(model, skip, warm_up_index=None, tokens=None, seed=0, max_seq_len=1024):
    """
    FFN-SkipLLM with the authors_settings: the threshold is fixed, and k is the whole number whose ratio on the
    calibration text, by a replay of its cosines, is nearest to `skip`.
    """
    n_layers = model.args.n_layers
    if n_layers < 11:
        raise ValueError(f"authors runs the first and the last five layers in full: it skips nothing in {n_layers}")
    policy = authors_settings(n_layers, 1, max_seq_len)
    if warm_up_index is not None:
        policy.warm_up_index = warm_up_index
    cosines = measure(model, as_windows(calibration_text(model, tokens, seed)), policy.warm_up_index).cpu()
    misses = []  # by k, from 1 on
    for k in range(1, n_layers - 9):
        ratio = replay(cosines, replace(policy, k=k)) * 5 / 6  # every sixth token runs in full
        misses.append(abs(ratio - skip))
    policy.k = 1 + misses.index(min(misses))
    return policy


class ShortGPT:
    """
    ShortGPT (Men et al. 2024, https://arxiv.org/abs/2403.03853): the layers of the lowest Block Influence are removed,
    skip * n_layers of them. There the prompt goes without them too; here it and the warm-up run in full.
    """

    also_skips = ("attention",)

    def __init__(self, model, skip, warm_up_index=25, tokens=None, seed=0):
        influence = block_influence(model, calibration_text(model, tokens, seed))
        self.removed = set(influence.argsort()[: round(skip * model.args.n_layers)].tolist())
        self.warm_up_index = warm_up_index

    def __call__(self, layers, x, step):
        full = step.token_index <= self.warm_up_index
        for layer in layers:
            x = run_active(layer, x, step, active=full | (layer.layer_id not in self.removed))
        return x


def block_influence(model, tokens):
    """
    BI (n_layers,) = 1 - the mean over tokens, (batch, seq), of the cosine between the residual stream that enters a
    layer and the one that leaves it; for the last layer, before the final norm.
    """
    influence = []

    def record(layers, x, step):
        for layer in layers:
            past, x = x, layer(x, step)
            influence.append(1 - similarity(x, past, step).mean())
        return x

    model(tokens, policy=record, last_only=True)
    return torch.stack(influence).cpu()


class SkipDecode:
    """
    SkipDecode (Del Corro et al. 2023, https://arxiv.org/abs/2307.02628): a token's number of layers falls linearly with
    its index, from n_layers after the warm-up to a minimum at token target_len; `skip` is the mean share skipped on the
    way. The skipped layers follow the first `always`, so that later tokens run a subset of what earlier ones ran.
    """

    also_skips = ("attention",)
    always = 2  # "warm-up layers" at the bottom, which every token runs

    def __init__(self, model, skip, warm_up_index=25, tokens=None, seed=0, target_len=256):
        self.most = 2 * skip * model.args.n_layers  # layers skipped at target_len: twice the mean of a line from 0
        self.target_len, self.warm_up_index = target_len, warm_up_index
        if self.most > model.args.n_layers - self.always:
            raise ValueError(f"skipdecode cannot skip {skip} on average: a line from all layers down to none has half")

    def __call__(self, layers, x, step):
        past_warm_up = (step.token_index - self.warm_up_index).clamp(min=0)
        progress = past_warm_up / max(1, self.target_len - self.warm_up_index)  # (batch, seq), 0 to 1
        n_skipped = (self.most * progress.clamp(max=1)).round()
        for layer in layers:
            skipped = (layer.layer_id >= self.always) & (layer.layer_id < self.always + n_skipped)
            x = run_active(layer, x, step, active=~skipped)
        return x


def confidence(x, past, step):
    """Of the token that would come if x, (tokens, dim), were final: top-1 minus top-2 probability, (tokens,)."""
    first, second = step.logits(x).softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def similarity(x, past, step):
    """Cosine between x, (..., dim), and what it was a layer ago: (...), in float32 always."""
    return F.cosine_similarity(past.float(), x.float(), dim=-1)


# After how many layers EarlyExit tests: for confidence it reads the whole output head, for similarity next to nothing.
EVERY = {confidence: 4, similarity: 1}


class EarlyExit:
    """
    Early exit (CALM, Schuster et al. 2022, https://arxiv.org/abs/2207.07061): once measure(x, past, step) reaches the
    threshold after a layer, the token takes part in none of the later ones. With `copy` each of them still computes
    its keys and values, from the state at the exit (Elbayad et al. 2019); without, its cache entries are missing.
    """

    def __init__(self, copy, measure, threshold, warm_up_index=25):
        self.copy, self.measure, self.threshold = copy, measure, threshold
        self.every, self.warm_up_index = EVERY[measure], warm_up_index
        self.also_skips = ("attention.wq", "attention.wo") if copy else ("attention",)

    def __call__(self, layers, x, step):
        run = run_or_copy if self.copy else run_active
        may_exit = step.token_index > self.warm_up_index
        inside = torch.ones_like(may_exit)  # (batch, seq): has not exited yet
        for layer in layers:
            past, x = x, run(layer, x, step, inside)
            tested = inside & may_exit
            if (layer.layer_id + 1) % self.every == 0 and layer.layer_id + 1 < len(layers) and tested.any():
                some = tested.to(x.device)  # x[some]: (batch, seq, dim) -> (tested, dim)
                stays = (self.measure(x[some], past[some], step) < self.threshold).cpu()
                inside = inside.masked_scatter(tested, stays)
        return x


def find_exit(model, skip, warm_up_index=25, tokens=None, seed=0, copy=False, measure=confidence):
    """The EarlyExit whose threshold skips the share `skip` of the calibration text."""
    windows = as_windows(calibration_text(model, tokens, seed))
    make = partial(EarlyExit, copy, measure, warm_up_index=warm_up_index)
    return find_threshold(make, model, windows, skip, 0, 1)


def early_exit(copy, measure):
    """find_exit as the factory of one of four policies."""
    make = partial(find_exit, copy=copy, measure=measure)
    make.also_skips = ("attention.wq", "attention.wo") if copy else ("attention",)
    return make


class Checkerboard:
    """
    A policy that nobody has published, to copy and change. Of the layers whose feed-forward block changes its input
    least, even tokens skip one half and odd tokens the other: no token misses two of them in a row, and what a token
    lacks its neighbours have in the cache. In a file of your own it runs, and is compared, like the rest:

        python generate.py --policy FILE.py:Checkerboard --skip 0.25 "..."
        python experiments/evaluate.py perplexity --policies dense,ffnskip,FILE.py:Checkerboard --data TEXT
    """

    def __init__(self, model, skip, warm_up_index=25, tokens=None, seed=0):
        windows = as_windows(calibration_text(model, tokens, seed))
        closest = measure(model, windows, warm_up_index=-1).mean(0).argsort(descending=True)  # (layer,)
        chosen = sorted(closest[: round(2 * skip * model.args.n_layers)].tolist())
        self.turn = dict(zip(chosen, range(len(chosen))))
        self.warm_up_index = warm_up_index

    def __call__(self, layers, x, step):
        may_skip = step.token_index > self.warm_up_index
        for layer in layers:
            h = layer.add_attention(x, step)
            active = None
            if layer.layer_id in self.turn:
                active = ~(may_skip & ((step.token_index + self.turn[layer.layer_id]) % 2 == 0))
            x = layer.add_feed_forward(h, step, active)
        return x


POLICIES = {
    "random": RandomSkip,
    "random_but_first": partial(RandomSkip, cold_s=1),
    "random_run": RandomRun,
    "static": static,
    "static_run": partial(RandomRun, cold=True),
    "printed": printed,
    "authors": authors,
    "shortgpt": ShortGPT,
    "skipdecode": SkipDecode,
    "statecopy": early_exit(copy=True, measure=confidence),
    "statecopy_cosine": early_exit(copy=True, measure=similarity),
    "earlyexit": early_exit(copy=False, measure=confidence),
    "earlyexit_cosine": early_exit(copy=False, measure=similarity),
    "checkerboard": Checkerboard,
}


def shifted(policy, shift):
    """The settings of an FFNSkip with every threshold raised by `shift`."""
    if isinstance(policy.sim_threshold, list):
        return replace(policy, sim_threshold=[value + shift for value in policy.sim_threshold])
    return replace(policy, sim_threshold=policy.sim_threshold + shift)


def find_threshold(make, model, windows, skip, most, least, tolerance=0.003):
    """The make(threshold), from most skipped to least, that skips the share `skip` of windows."""

    def at(threshold):
        policy = make(threshold)
        return policy, skip_ratio(model, policy, windows)

    policy, _ = bring_to(at, most, least, skip, tolerance)
    return policy


def attended_missing(cache):
    """(n_layers, batch, columns) int: how many columns with a missing entry each token attended to, in each layer."""
    written = cache.written[:, :, : cache.length]
    return (~written).cumsum(-1) * written  # a token that did not attend in a layer has written nothing there either


def run_active(layer, x, step, active):
    """One layer for the active tokens, (batch, seq) bool: the others pass it by, and miss an entry in its cache."""
    if not active.any():
        return x
    if active.all():
        return layer(x, step)
    temp = layer.add_feed_forward(layer.add_attention(x, step, active), step, active)
    return torch.where(active[..., None].to(x.device), temp, x)  # (batch, seq) -> (batch, seq, 1)


def run_or_copy(layer, x, step, active):
    """One layer for the active tokens: of the others only keys and values are computed, from the x they exited with."""
    if not active.any():
        layer.attention.write_kv(layer.attention_norm(x), step)
        return x
    temp = layer.add_feed_forward(layer.add_attention(x, step), step, active)
    return torch.where(active[..., None].to(x.device), temp, x)


def uniform(seed, layer_id, token_index):
    """
    float64 in [0, 1) of token_index's shape, by its arguments alone: however tokens are batched and chunked, each gets
    the same number. Three rounds of the 32-bit hash lowbias32 (https://github.com/skeeto/hash-prospector).
    """
    low = 0xFFFFFFFF  # int64 wraps around, which leaves the lower 32 bits right
    x = torch.zeros_like(token_index)
    for part in (seed, layer_id, token_index):
        x = (x * 0x9E3779B1 + part) & low
        x = (x ^ x >> 16) * 0x7FEB352D & low
        x = (x ^ x >> 15) * 0x846CA68B & low
        x = x ^ x >> 16
    return x.double() / 2**32


def calibration_text(model, tokens=None, seed=0):
    """
    (batch, seq) ids on the model's device: `tokens`, in windows of 512 where they are one long row; for None, four
    short texts that the model itself writes.
    """
    if tokens is None:
        return written_text(model, 4, 128, seed)
    tokens = torch.as_tensor(tokens)
    if tokens.dim() == 1:
        size = min(len(tokens), 512, model.args.max_seq_len)
        tokens = tokens[: len(tokens) // size * size].view(-1, size)
    return tokens.to(model.tok_embeddings.weight.device)
