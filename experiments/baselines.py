"""
What FFN-SkipLLM is compared with, and a place for your own: every policy here is a walk over the layers,

    policy(layers, x, step) -> x             x: (batch, seq, dim), the residual stream; see model.dense for the plainest

and is called by its name (`python generate.py --policy shortgpt --skip 0.25 "..."`), which is a factory

    make(model, skip, tokens=None, seed=0)   skip: the share of feed-forward blocks to leave out, of all layers
                                             tokens: (batch, seq) or (seq,) ids of calibration text; None: its own
                                             seed: of all that is drawn by chance
    make.also_skips                          a layer's parameters that a skip leaves unread, beside feed_forward

(hence the small letters of its classes). All share FFN-SkipLLM's warm-up: the prompt and the tokens with token_index <=
warm_up_index run in full, so that a comparison is one of what comes after. What each leaves in the key-value cache:

    random, static, yours   all entries, of true states: only feed-forward blocks are skipped, as by FFN-SkipLLM
    statecopy               all entries, some of copied states
    shortgpt, skipdecode    holes, which no later token reads: what one token leaves out, all later tokens leave out too
    earlyexit               holes that later tokens read, the failure the paper starts from: see attended_holes
"""

import torch
import torch.nn.functional as F

from skip import FFNSkip, Trace

WARM_UP_INDEX = 25  # the paper's section 5.1: 25 to 30 tokens are enough


class random:
    """
    The paper's Baseline 1 (section 4): each feed-forward block of any layer, cold or not, is dropped with probability
    `skip`, drawn anew for each token.
    """

    def __init__(self, model, skip, tokens=None, seed=0):
        self.skip, self.seed, self.warm_up_index = skip, seed, WARM_UP_INDEX

    def __call__(self, layers, x, step):
        may_skip = step.token_index > self.warm_up_index  # (batch, seq)
        for layer in layers:
            drop = uniform(self.seed, layer.layer_id, step.token_index) < self.skip
            x = layer.feed(layer.attend(x, step), step, rows=~(drop & may_skip))
        return x


class static:
    """
    The paper's Baseline 2 (section 4, "no input adaptive"): as `random`, in the layers [cold_s, cold_e) only. The cold
    regions are an eighth of the layers at either end unless you set them (the authors' code: 4 and 5 of 32).
    """

    def __init__(self, model, skip, tokens=None, seed=0):
        n_layers = model.args.n_layers
        self.cold_s, self.cold_e = n_layers // 8, n_layers - n_layers // 8
        self.skip, self.seed, self.warm_up_index = skip, seed, WARM_UP_INDEX
        if skip * n_layers > self.cold_e - self.cold_s:
            raise ValueError(
                f"static cannot skip {skip}: only {self.cold_e - self.cold_s} of {n_layers} layers are not cold"
            )

    def __call__(self, layers, x, step):
        may_skip = step.token_index > self.warm_up_index
        rate = self.skip * len(layers) / max(1, self.cold_e - self.cold_s)
        for layer in layers:
            drop = uniform(self.seed, layer.layer_id, step.token_index) < rate
            warm = self.cold_s <= layer.layer_id < self.cold_e
            x = layer.feed(layer.attend(x, step), step, rows=~(drop & may_skip & warm))
        return x


class shortgpt:
    """
    ShortGPT (Men et al. 2024, https://arxiv.org/abs/2403.03853): whole layers are removed, those of the lowest Block
    Influence. The number of layers is the whole number nearest to skip * n_layers. There the prompt goes without them
    too; here it and the warm-up are in full, as for all policies.
    """

    also_skips = ("attention",)

    def __init__(self, model, skip, tokens=None, seed=0):
        influence = block_influence(model, calibration_text(model, tokens, seed))
        self.removed = set(influence.argsort()[: round(skip * model.args.n_layers)].tolist())
        self.warm_up_index = WARM_UP_INDEX

    def __call__(self, layers, x, step):
        full = step.token_index <= self.warm_up_index
        for layer in layers:
            x = run_rows(layer, x, step, rows=full | (layer.layer_id not in self.removed))
        return x


def block_influence(model, tokens):
    """
    BI (n_layers,) = 1 - the mean over tokens, (batch, seq), of the cosine between the residual stream that enters a
    layer and the one that leaves it; for the last layer, before the final norm.
    """
    influence = []

    def measure(layers, x, step):
        for layer in layers:
            past, x = x, layer(x, step)
            influence.append(1 - similarity(x, past, step).mean())
        return x

    model(tokens, policy=measure, last_only=True)
    return torch.stack(influence).cpu()


class skipdecode:
    """
    SkipDecode (Del Corro et al. 2023, https://arxiv.org/abs/2307.02628): a token's number of layers depends on its
    index alone, so that a batch stays together. It falls linearly from n_layers after the warm-up to a minimum at
    token target_len (from then on it stays), chosen so that `skip` is the mean between them. The layers left out
    follow the first `always`: later tokens run a subset of what earlier ones ran, and never miss a cache entry.
    """

    also_skips = ("attention",)
    always = 2  # "warm-up layers" at the bottom, which every token runs

    def __init__(self, model, skip, tokens=None, seed=0):
        self.most = 2 * skip * model.args.n_layers  # left out at target_len: twice the mean of a line from 0
        self.target_len, self.warm_up_index = 256, WARM_UP_INDEX  # tokens: what generate.py writes unless told
        if self.most > model.args.n_layers - self.always:
            raise ValueError(f"skipdecode cannot skip {skip} in the mean: a line from all layers down to none has half")

    def __call__(self, layers, x, step):
        past_warm_up = (step.token_index - self.warm_up_index).clamp(min=0)
        progress = past_warm_up / max(1, self.target_len - self.warm_up_index)  # (batch, seq), 0 to 1
        left_out = (self.most * progress.clamp(max=1)).round()
        for layer in layers:
            skipped = (layer.layer_id >= self.always) & (layer.layer_id < self.always + left_out)
            x = run_rows(layer, x, step, rows=~skipped)
        return x


class exit_policy:
    """
    Early exit (CALM, Schuster et al. 2022, https://arxiv.org/abs/2207.07061): once measure(x, past, step) reaches the
    threshold after a layer, the token takes part in none of the later ones. With `copy` each of them still computes
    its keys and values, from the state at the exit; without, it is left with a hole. Confidence is tested after every
    fourth layer, since a test reads the whole output head (EE-LLM, Chen et al. 2023, has exits at two depths).
    """

    def __init__(self, copy, measure, threshold):
        self.copy, self.measure, self.threshold, self.warm_up_index = copy, measure, threshold, WARM_UP_INDEX
        self.every = 4 if measure is confidence else 1

    def __call__(self, layers, x, step):
        may_exit = step.token_index > self.warm_up_index
        inside = torch.ones_like(may_exit)  # (batch, seq): has not left yet
        for layer in layers:
            past, x = x, (run_or_copy if self.copy else run_rows)(layer, x, step, inside)
            tested = inside & may_exit
            if (layer.layer_id + 1) % self.every == 0 and layer.layer_id + 1 < len(layers) and tested.any():
                rows = tested.to(x.device)  # x[rows]: (batch, seq, dim) -> (tested, dim)
                stays = (self.measure(x[rows], past[rows], step) < self.threshold).cpu()
                inside = inside.masked_scatter(tested, stays)
        return x


def confidence(x, past, step):
    """Of the token that would come if x, (tokens, dim), were final: top-1 minus top-2 probability, (tokens,)."""
    first, second = step.logits(x).softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def similarity(x, past, step):
    """Cosine between x, (..., dim), and what it was a layer ago: (...), in float32 always."""
    return F.cosine_similarity(past.float(), x.float(), dim=-1)


def statecopy(model, skip, tokens=None, seed=0, measure=confidence):
    """Early exit that copies the state at the exit upward into the cache (Elbayad et al. 2019; CALM)."""
    tokens = calibration_text(model, tokens, seed)
    return bring_to(lambda threshold: exit_policy(True, measure, threshold), 0, 1, skip, model, tokens)


def earlyexit(model, skip, tokens=None, seed=0, measure=confidence):
    """Early exit that leaves holes in the cache: later tokens that go deeper read zeros there."""
    tokens = calibration_text(model, tokens, seed)
    return bring_to(lambda threshold: exit_policy(False, measure, threshold), 0, 1, skip, model, tokens)


def statecopy_cosine(model, skip, tokens=None, seed=0):
    """statecopy by the cosine between consecutive layers, which costs next to nothing to test after each of them."""
    return statecopy(model, skip, tokens, seed, similarity)


def earlyexit_cosine(model, skip, tokens=None, seed=0):
    """earlyexit by the cosine between consecutive layers."""
    return earlyexit(model, skip, tokens, seed, similarity)


for factory in (statecopy, statecopy_cosine):
    factory.also_skips = ("attention.wq", "attention.wo")
for factory in (earlyexit, earlyexit_cosine):
    factory.also_skips = ("attention",)


def attended_holes(cache):
    """(n_layers, batch, columns) int: how many columns that hold nothing each token attended to, in each layer."""
    written = cache.written[:, :, : cache.length]
    return (~written).cumsum(-1) * written  # a token that did not attend there has written nothing either


# --- yours -----------------------------------------------------------------------------------------------------------
# A policy that nobody has published, to copy and change. In a file of your own it runs, and is compared, like the rest:
#     python generate.py --policy FILE.py:yours --skip 0.25 "..."
#     python experiments/evaluate.py perplexity --policies dense,ffnskip,FILE.py:yours --data TEXT


class yours:
    """
    Checkerboard: of the layers whose feed-forward block changes its input least, even tokens skip one half and odd
    tokens the other. No token misses two of them in a row, and what a token lacks its neighbours have in the cache.
    """

    def __init__(self, model, skip, tokens=None, seed=0):
        trace, everything = Trace(), FFNSkip(0, model.args.n_layers, float("inf"), warm_up_index=-1)
        model(calibration_text(model, tokens, seed), policy=everything, trace=trace, last_only=True)
        closest = trace.cosine.mean((1, 2)).argsort(descending=True)  # (layer, batch, token) -> (layer,)
        chosen = sorted(closest[: round(2 * skip * model.args.n_layers)].tolist())
        self.turn = {layer_id: turn for turn, layer_id in enumerate(chosen)}
        self.warm_up_index = WARM_UP_INDEX

    def __call__(self, layers, x, step):
        may_skip = step.token_index > self.warm_up_index
        for layer in layers:
            turn = self.turn.get(layer.layer_id)
            skipped = may_skip & (turn is not None) & ((step.token_index + (turn or 0)) % 2 == 0)
            x = layer.feed(layer.attend(x, step), step, rows=~skipped)
        return x


# --- what they share -------------------------------------------------------------------------------------------------


def run_rows(layer, x, step, rows):
    """One layer for `rows`, (batch, seq) bool on the host: the others pass it by and leave holes in its cache."""
    if not rows.any():
        return x
    if rows.all():
        return layer(x, step)
    temp = layer.feed(layer.attend(x, step, rows), step, rows)
    return torch.where(rows[..., None].to(x.device), temp, x)  # (batch, seq) -> (batch, seq, 1)


def run_or_copy(layer, x, step, rows):
    """One layer for `rows`: of the others only keys and values are computed, from the x they left with."""
    if not rows.any():
        layer.remember(x, step)
        return x
    temp = layer.feed(layer.attend(x, step), step, rows)  # attend writes the keys and values of all x, and of theirs
    return torch.where(rows[..., None].to(x.device), temp, x)


def uniform(seed, layer_id, token_index):
    """
    float64 in [0, 1) of token_index's shape, by its arguments alone: however tokens are batched and chunked, each gets
    the same. Three rounds of the 32-bit hash lowbias32 (https://github.com/skeeto/hash-prospector).
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
    tokens = torch.as_tensor(tokens).to(model.tok_embeddings.weight.device)
    if tokens.dim() == 1:
        seq = min(len(tokens), 512, model.args.max_seq_len)
        tokens = tokens[: len(tokens) // seq * seq].view(-1, seq)
    return tokens


def written_text(model, batch, seq, seed=0):
    """(batch, seq) ids that the dense model writes, drawn at temperature 1, after random first tokens."""
    from generate import generate  # only here: generate.py looks policies up in this file

    first = torch.randint(model.args.vocab_size, (batch, 1), generator=torch.Generator().manual_seed(seed))
    written = list(generate(model, first.tolist(), max_new_tokens=seq, temperature=1.0, seed=seed))
    return torch.tensor(written).T.to(model.tok_embeddings.weight.device)  # (seq, batch) -> (batch, seq)


def ffn_skip_ratio(model, policy, tokens):
    """
    The share of feed-forward blocks that the policy skips on tokens, (batch, seq), past its warm-up. Raises ValueError
    if no token lies past it.
    """
    trace = Trace()
    model(tokens, policy=policy, trace=trace, last_only=True)
    ratio = trace.ffn_skip_ratio(policy.warm_up_index)
    if ratio is None:
        raise ValueError(f"{tokens.size(1)} tokens a row do not reach past the warm-up of {policy.warm_up_index + 1}")
    return ratio


def bring_to(at, low, high, skip, model, tokens, tolerance=0.003, tries=14):
    """
    The policy at(value), low <= value <= high, that skips the share `skip` of tokens, (batch, seq), or as near to it as
    `tries` tries come. The ratio must fall as the value rises.
    """
    ratio_low, ratio_high = 1.0, 0.0  # as far as we know yet
    off, best = 2.0, None
    for i in range(tries):
        # bisection, which always ends, in turn with a straight line between the ends, which is mostly faster
        share = (ratio_low - skip) / (ratio_low - ratio_high) if i % 2 and ratio_low > skip > ratio_high else 0.5
        value = low + (high - low) * min(max(share, 0.05), 0.95)
        policy = at(value)
        ratio = ffn_skip_ratio(model, policy, tokens)
        if abs(ratio - skip) < off:
            off, best = abs(ratio - skip), policy
        if off <= tolerance:
            break
        low, ratio_low, high, ratio_high = (
            (value, ratio, high, ratio_high) if ratio > skip else (low, ratio_low, value, ratio)
        )
    return best
