"""
The ledger of adaptivity: what is the token's own cosine worth? Policies that skip as many feed-forward blocks as
ffnskip, and differ in who chooses them: one choice for all texts (fixed, fixed_run), one per text (adaskip), another
token's choice (shuffled), all rows of a batch together (Together). attention_drop leaves out attention instead, and
InPrompt skips in the prompt. Factories are as baselines.py describes them.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from policies.baselines import calibration_text, find_threshold, shifted, uniform
from skip import FULL, FFNSkip
from support.common import nbytes, note, progress
from support.measuring import as_tokens, as_windows, bring_to, cold_regions, measure, quality, replay
from support.tracing import Trace

GREEDY_TOKENS = 512  # of calibration text, on which a set of blocks is chosen greedily
TRIED = 6  # how many blocks are tried in a round: those that did least harm when they were tried last


class Fixed:
    """
    The first skip * n_layers blocks of `order`, a list of all layers that may skip, for every token past the warm-up.
    Where this is no whole number, the last of them is skipped by a share of the tokens, drawn by chance.
    """

    def __init__(self, model, skip, warm_up_index, order, seed=0):
        self.n = round(skip * model.args.n_layers, 6)
        self.order, self.warm_up_index, self.seed = order[: math.ceil(self.n)], warm_up_index, seed
        if self.n > len(order):
            raise ValueError(f"a share of {skip} cannot be skipped: only {len(order)} layers are tried")

    def __call__(self, layers, x, step):
        may_skip = step.token_index > self.warm_up_index  # (batch, seq)
        chance = uniform(self.seed, 0, step.token_index)  # (batch, seq), below 1
        for layer in layers:
            h, active = layer.add_attention(x, step), None
            if layer.layer_id in self.order:
                active = ~(may_skip & (self.order.index(layer.layer_id) + chance < self.n))
            x = layer.add_feed_forward(h, step, active)
        return x


def fixed(model, skip, warm_up_index=25, tokens=None, seed=0):
    """Blocks chosen once, each next one for the least KL divergence from dense (after FinerCut, arXiv 2405.18218)."""
    order = greedy_order(model, as_tuples(calibration_text(model, tokens, seed)), warm_up_index, attention=False)
    return Fixed(model, skip, warm_up_index, list(order), seed)


def fixed_run(model, skip, warm_up_index=25, tokens=None, seed=0):
    """One run of neighbouring blocks, that of the highest mean cosine: read off the cosines, with no search."""
    cosines = measure(model, as_windows(calibration_text(model, tokens, seed)), warm_up_index).mean(0)  # (n_layers,)
    n = math.ceil(skip * len(cosines))
    start = cosines.unfold(0, n, 1).mean(1).argmax().item()  # (n_layers - n + 1, n) -> the best of the runs
    order = start + cosines[start : start + n].argsort(descending=True)
    return Fixed(model, skip, warm_up_index, order.tolist(), seed)


def as_tuples(tokens):
    """tokens (batch, seq) as what lru_cache can compare."""
    return tuple(map(tuple, tokens.tolist()))


@lru_cache(maxsize=2)  # for all ratios of a table: the first choices of a longer search are those of a shorter
def greedy_order(model, texts, warm_up_index, attention):
    """
    Layers in the order in which to leave out their feed-forward blocks, half of all, or with `attention` all their
    attention: each does, after those before it, the least harm to GREEDY_TOKENS of the texts, tuples of ids.
    """
    every = math.ceil(len(texts) * len(texts[0]) / GREEDY_TOKENS)
    windows = [(list(ids), 0) for ids in texts[::every]]
    n_layers, reference, harm, order = model.args.n_layers, {}, {}, []

    def divergence(layer_ids):
        policy = AttentionDrop(layer_ids, warm_up_index)
        if not attention:
            policy = Fixed(model, len(layer_ids) / n_layers, warm_up_index, layer_ids)
        return quality(model, windows, policy, reference)["kl"]

    rounds = n_layers if attention else n_layers // 2
    note(f"[choosing layers by KL: {n_layers + TRIED * rounds} passes over {len(windows)} texts, or fewer]")
    for layer_id in progress(range(n_layers), "trying each layer"):
        harm[layer_id] = divergence([layer_id])
    for _ in progress(range(rounds), "choosing layers"):
        tried = sorted(harm, key=harm.get)[:TRIED]
        for layer_id in tried:
            harm[layer_id] = divergence([*order, layer_id])
        order.append(min(tried, key=harm.get))
        del harm[order[-1]]
    return tuple(order)


class Shuffled:
    """
    The decisions of other tokens: ran (n, n_layers) bool says which blocks ffnskip ran for n tokens of another text,
    and every token past the warm-up takes a row of it by chance. Layers and counts are as ffnskip's, and so is what is
    skipped in one token; only the token's own cosine has no say.
    """

    def __init__(self, ran, warm_up_index, seed=0):
        self.ran, self.warm_up_index, self.seed = ran, warm_up_index, seed

    def __call__(self, layers, x, step):
        full = step.token_index <= self.warm_up_index  # (batch, seq)
        drawn = (uniform(self.seed, 0, step.token_index) * len(self.ran)).long()  # (batch, seq)
        for layer in layers:
            h = layer.add_attention(x, step)
            x = layer.add_feed_forward(h, step, active=full | self.ran[drawn, layer.layer_id])
        return x


def shuffled(model, skip, warm_up_index=25, tokens=None, seed=0, settings=None):
    """Shuffled decisions of the FFNSkip with these settings, or with k=1, at the share `skip` of the text."""
    windows = as_windows(calibration_text(model, tokens, seed))
    cosines = measure(model, windows, warm_up_index).cpu()
    if settings is None:
        cold_s, cold_e = cold_regions(cosines.mean(0))
        settings = dict(cold_s=cold_s, cold_e=cold_e, sim_threshold=1.0, k=1)
    base = FFNSkip(**settings | dict(warm_up_index=warm_up_index))

    make = partial(shifted, base)

    def at(shift):
        return shift, replay(cosines, make(shift))

    near, _ = bring_to(at, -1.0, 1.0, skip)  # by the cosines alone
    policy, ran = find_threshold(make, model, windows, skip, near - 0.03, near + 0.03), []
    for ids, _ in windows:
        trace = Trace()
        model(as_tokens(model, ids), policy=policy, trace=trace, last_only=True)
        ran.append(trace.ran[:, trace.token_index > warm_up_index].T)
    reached = (~torch.cat(ran)).float().mean().item()
    if reached < skip - 0.1:
        note(f"[--skip {skip}: shuffled reaches {reached:.2f} here]")
    return Shuffled(torch.cat(ran), warm_up_index, seed)


class AdaSkip:
    """
    The rule of AdaSkip (He et al. 2025, arXiv 2501.02336) for feed-forward blocks: those that change the text at hand
    least, as its cosines say so far as it runs in full (its prompt and the warm-up), are skipped for the rest of it.
    AdaSkip skips attention by the same rule, and goes on measuring in the answer.
    """

    def __init__(self, model, skip, warm_up_index=25, tokens=None, seed=0):
        windows = as_windows(calibration_text(model, tokens, seed))
        self.before = measure(model, windows, -1).cpu().mean(0)  # (n_layers,): for a text of which nothing is known
        self.n, self.warm_up_index, self.seed = skip * model.args.n_layers, warm_up_index, seed

    def __call__(self, layers, x, step):
        full = step.token_index <= self.warm_up_index  # (batch, seq)
        seen, cosines = getattr(step.cache, "cosines", (0, None))  # (n_layers, batch), summed over the tokens in full
        if cosines is None or step.cache.length < max(1, seen):  # a new text, or one that was rewound
            cosines = self.before[:, None].expand(-1, len(full)).clone()
        step.cache.cosines = step.cache.length + full.size(1), cosines
        if full.any():
            watched = self.watch(layers, x, step, full, cosines)
            if full.all():
                return watched
        rank = cosines.argsort(0, descending=True).argsort(0)  # (n_layers, batch)
        chance = uniform(self.seed, 0, step.token_index)  # (batch, seq)
        for layer in layers:
            h = layer.add_attention(x, step)
            skips = rank[layer.layer_id][:, None] + chance < self.n
            x = layer.add_feed_forward(h, step, active=full | ~skips)
        return x

    def watch(self, layers, x, step, full, cosines):
        """x after all layers in full; adds the cosines of the tokens in `full` that are no padding."""
        column = torch.arange(step.cache.length, step.cache.length + full.size(1))
        counted = full & (column >= step.cache.pad[:, None])
        untraced = replace(step, trace=None)  # the walk that counts comes after this one, unless it is the only one
        for layer in layers:
            h = layer.add_attention(x, step)
            x = layer.add_feed_forward(h, step if full.all() else untraced)
            cosine = torch.tensor(layer.cosine(h, x)).view(full.shape)  # (batch, seq)
            cosines[layer.layer_id] += (cosine * counted).sum(1)
        return x


class AttentionDrop:
    """
    Past the warm-up attention is left out in the layers `dropped`, in which no token of the same answer then reads what
    is missing. The next message of a conversation does.
    """

    def __init__(self, dropped, warm_up_index=25):
        self.dropped, self.warm_up_index = list(dropped), warm_up_index

    def __call__(self, layers, x, step):
        full = step.token_index <= self.warm_up_index  # (batch, seq)
        for layer in layers:
            h = x
            if layer.layer_id not in self.dropped or full.all():
                h = layer.add_attention(x, step)
            elif full.any():
                h = torch.where(full[..., None].to(x.device), layer.add_attention(x, step, full), x)
            if layer.layer_id in self.dropped and step.trace is not None:
                step.trace.record_unread(layer.layer_id, "attention", 1.0, ~full)
            x = layer.add_feed_forward(h, step)
        return x


def attention_drop(model, skip, warm_up_index=25, tokens=None, seed=0):
    """
    Is attention the redundant half (FinerCut; LLM-Drop, arXiv 2406.15786)? It drops as many layers' attention as have
    the bytes of the share `skip` of all feed-forward blocks, chosen as `fixed` chooses blocks.
    """
    layer, n_layers = model.layers[0], model.args.n_layers
    size = nbytes(layer.attention) / nbytes(layer.feed_forward)
    n = round(skip * n_layers / size)
    if n > n_layers:
        raise ValueError(f"attention_drop cannot save {skip} of the feed-forward bytes: all attention has {size:.3f}")
    order = greedy_order(model, as_tuples(calibration_text(model, tokens, seed)), warm_up_index, attention=True)
    policy = AttentionDrop(order[:n], warm_up_index)
    policy.as_blocks = n * size / n_layers  # the share of all feed-forward blocks that has the bytes it saves
    return policy


@dataclass
class Together(FFNSkip):
    """Algorithm 1 whose rows decide together: all skip a block where at least the share `agree` would, else none."""

    agree: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.agree <= 1:
            raise ValueError(f"--agree {self.agree} is not a share above 0 and at most 1")

    def active(self, skip_state, shape):
        """A block that a row in full needs is read anyway, so then no row skips it."""
        state = torch.tensor(skip_state).view(shape)  # (batch, seq)
        all_skip = ((state > 0).double().mean(0) >= self.agree) & (state != FULL).all(0)  # (seq,)
        return ~all_skip.expand(shape)

    def cosine(self, h, temp, layer, step, skip_state):
        """A token that skipped against its own vote is not compared: its block has not run."""
        scores = super().cosine(h, temp, layer, step, skip_state)
        active = self.active(skip_state, step.token_index.shape).flatten().tolist()
        return [score if ran else -math.inf for score, ran in zip(scores, active)]


@dataclass
class InPrompt:
    """
    Skip in the prompt too: `prompt` walks over passes that are all prompt, and counts its tokens from 0; `after` walks
    over the others. Both are policies, model.dense among them.
    """

    prompt: object
    after: object

    def __call__(self, layers, x, step):
        if (step.token_index < 0).all():
            return self.prompt(layers, x, replace(step, token_index=step.positions))
        return self.after(layers, x, step)


LEDGER = {
    "fixed": fixed,
    "fixed_run": fixed_run,
    "shuffled": shuffled,
    "adaskip": AdaSkip,
    "attention_drop": attention_drop,
}
