"""Solutions to docs/exercises.md. Try first."""

import math
from dataclasses import replace

import torch

from model import dense
from policies.baselines import run_active, uniform

# 1. In layer 8 the threshold is reached once more, and layer 9 is cold.
SKIPPED = {
    "as printed": [3, 4, 5, 6, 7, 8],
    "k = 1": [3, 6],
    "k = 2": [3, 4, 6, 7],
    "k = 2, recheck off": [3, 4],
}

# 5. bfloat16 keeps 8 significant bits, the first of them before the binary point: next to 1 from below 2^-8.
STEP = 2**-8


def forget(layers, x, step):
    """2. run_active writes keys and values for the active tokens only; see EarlyExit in policies/baselines.py."""
    for layer in layers:
        active = torch.ones_like(step.token_index, dtype=torch.bool)
        if layer.layer_id == 2:
            active = step.token_index != 5
        x = run_active(layer, x, step, active)
    return x


def lost(model, tokens):
    """2. The token itself, since it missed a layer, and all later ones, which read a zero key and a zero value."""
    difference = (model(tokens, policy=forget) - model(tokens)).abs().amax(-1)[0]  # (seq,)
    return (difference > 0.001).nonzero().flatten().tolist()


class Baseline1:
    """3. As RandomSkip in policies/baselines.py, whose coins depend on (seed, layer, token_index) and nothing else."""

    def __init__(self, model, skip, warm_up_index=25, tokens=None, seed=0):
        self.skip, self.warm_up_index, self.seed = skip, warm_up_index, seed

    def __call__(self, layers, x, step):
        for layer in layers:
            skipped = uniform(self.seed, layer.layer_id, step.token_index) < self.skip
            skipped &= step.token_index > self.warm_up_index
            h = layer.add_attention(x, step)
            x = layer.add_feed_forward(h, step, active=~skipped)
        return x


def skipped_layers(cosines, cold_s, cold_e, threshold, k):
    """4. What skip.py and the page's replay do, for one token."""
    skipped, left = [], 0
    for layer in range(cold_s, cold_e):
        if left > 0:
            skipped.append(layer)
            left -= 1
        elif cosines[layer] >= threshold:
            left = len(cosines) if k is None else k
    return skipped


def cosine(h, temp):
    """5. Convert before anything is multiplied or added up: sums of bfloat16 numbers round to bfloat16."""
    return torch.nn.functional.cosine_similarity(h.float(), temp.float(), dim=-1)


def without(layer_id):
    """6. The policy that skips one layer's FFN block, for all tokens."""

    def policy(layers, x, step):
        for layer in layers:
            h = layer.add_attention(x, step)
            x = h if layer.layer_id == layer_id else layer.add_feed_forward(h, step)
        return x

    return policy


def harm(model, tokens, policy):
    """6. The mean KL divergence, in nats, of the dense model's predictions from the policy's."""
    log_dense = model(tokens, policy=dense).log_softmax(-1)
    log_p = model(tokens, policy=policy).log_softmax(-1)
    return (log_dense.exp() * (log_dense - log_p)).sum(-1).mean().item()


def harms(model, tokens):
    return [harm(model, tokens, without(layer.layer_id)) for layer in model.layers]


def most_harmful(model, tokens):
    """6. There is no way around trying each."""
    found = harms(model, tokens)
    return found.index(max(found))


class Better:
    """
    7. checkerboard chooses the blocks that change the residual stream least; this one those whose absence changes the
    predictions least. All tokens skip the same, but for the last block, which a part of them skips.
    """

    def __init__(self, model, skip, warm_up_index=25, tokens=None, seed=0):
        found = torch.tensor(harms(model, tokens))
        self.order = found.argsort().tolist()  # the least harmful first
        self.wanted, self.warm_up_index, self.seed = skip * len(found), warm_up_index, seed

    def __call__(self, layers, x, step):
        rank = {layer_id: place for place, layer_id in enumerate(self.order)}
        whole = math.floor(self.wanted)
        for layer in layers:
            skipped = step.token_index > self.warm_up_index
            if rank[layer.layer_id] == whole:
                skipped = skipped & (uniform(self.seed, 0, step.token_index) < self.wanted - whole)
            h = layer.add_attention(x, step)
            x = layer.add_feed_forward(h, step, active=~skipped if rank[layer.layer_id] <= whole else None)
        return x


class SkipInPrompt:
    """8. The policy sees another token_index. generate.py --skip-prompt says prompt_len 0 instead."""

    def __init__(self, policy, first):
        self.policy, self.first = policy, first

    def __call__(self, layers, x, step):
        return self.policy(layers, x, replace(step, token_index=step.positions - self.first))
