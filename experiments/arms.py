"""
What stand-ins are compared with: the same maps under other decisions, and one map in the place of whole layers. Each is
a factory as in baselines.py; `fitted` is a file of standins.py.

    python experiments/evaluate.py perplexity --policies standins,experiments/arms.py:by_layer --standins FILE ...
"""

import math
from functools import partial

import torch
from policies.baselines import calibration_text, run_active, similarity, warm_up
from fit_standins import fit_ridge, moments
from policies.standins import StandIns, load

import policies
from calibrate import cold_regions, plan, skip_per_layer
from support.measuring import as_windows, measure


def by_layer(model, skip, warm_up_index=None, tokens=None, seed=0, fitted=None):
    """The same layers for all tokens, those of the least predicted harm in the mean: no decision per token."""
    parts, _ = load(fitted, model)
    n_layers, warm_up_index = model.args.n_layers, warm_up(warm_up_index)
    watching = StandIns(parts, -math.inf, n_layers, warm_up_index)
    windows = as_windows(calibration_text(model, tokens, seed))
    harm = measure(model, windows, warm_up_index, watching).mean(0).log()  # (n_layers,), log nats
    fixed = dict(probe=[torch.zeros_like(probe) for probe in parts["probe"]], bias=harm.tolist())
    budget = harm.sort().values[min(round(skip * n_layers), n_layers - 1)].item()
    return StandIns(parts | fixed, budget, n_layers, warm_up_index)


def by_cosine(model, skip, warm_up_index=None, tokens=None, seed=0, fitted=None):
    """Algorithm 1's decision as calibrate.py makes it best, k=1 and a threshold per layer, with stand-ins."""
    parts, _ = load(fitted, model)
    warm_up_index = warm_up(warm_up_index)
    cosines = measure(model, as_windows(calibration_text(model, tokens, seed)), warm_up_index)
    regions = cold_regions(cosines.mean(0).tolist())
    policy, most = plan(cosines, partial(skip_per_layer, cosines, *regions, warm_up_index), skip)
    if policy is None:
        raise ValueError(f"by_cosine cannot skip {skip}: {most:.3f} at most")
    return WithStandIns(policy, StandIns(parts, -math.inf, 0, warm_up_index))


class WithStandIns:
    """A policy of which every feed-forward block that it skips is stood in for."""

    def __init__(self, policy, stand_ins):
        self.policy, self.stand_ins, self.warm_up_index = policy, stand_ins, policy.warm_up_index

    def shifted(self, shift):
        """The same with every threshold raised by `shift`."""
        return WithStandIns(policies.shifted(self.policy, shift), self.stand_ins)

    def __call__(self, layers, x, step):
        return self.policy([Replaceable(layer, self.stand_ins) for layer in layers], x, step)


class Replaceable:
    """A layer whose feed-forward block is stood in for where it does not run."""

    def __init__(self, layer, stand_ins):
        self.layer, self.layer_id, self.stand_ins = layer, layer.layer_id, stand_ins
        self.add_attention, self.cosine = layer.add_attention, layer.cosine

    def add_feed_forward(self, h, step, active=None):
        return self.stand_ins.add_feed_forward(self.layer, h, step, active)

    def __call__(self, x, step):
        return self.layer(x, step)


class ReplaceMe:
    """
    After ReplaceMe (Shopkhoev et al. 2025, https://arxiv.org/abs/2505.02819): a run of whole layers is replaced with
    one linear map of the residual stream, fitted by ridge regression; the run is the one whose map gives states nearest
    to the true ones. The prompt and the warm-up are in full, as for all policies.
    """

    also_skips = ("attention",)

    def __init__(self, model, skip, warm_up_index=None, tokens=None, seed=0):
        self.n, self.warm_up_index = round(skip * model.args.n_layers), warm_up(warm_up_index)
        states = residual_streams(model, calibration_text(model, tokens, seed), self.warm_up_index)
        best = -math.inf
        for start in range(model.args.n_layers - self.n + 1):
            before, after = states[start], states[start + self.n]
            weight = torch.ones(len(before), device=before.device)
            slope, bias, _ = fit_ridge(*moments(before, after - before, weight), 0.1)
            nearness = similarity(after, before + before @ slope + bias, None).mean().item()
            if nearness > best:
                best, self.start, self.slope, self.bias = nearness, start, slope, bias

    def __call__(self, layers, x, step):
        full = step.token_index <= self.warm_up_index  # (batch, seq)
        for layer in layers:
            inside = self.start <= layer.layer_id < self.start + self.n
            if layer.layer_id == self.start:
                mapped = (x.float() + x.float() @ self.slope + self.bias).type_as(x)
            x = run_active(layer, x, step, active=full | (not inside))
            if layer.layer_id == self.start + self.n - 1:
                x = torch.where(full[..., None].to(x.device), x, mapped)  # (batch, seq) -> (batch, seq, 1)
        return x


def residual_streams(model, tokens, warm_up_index):
    """The residual stream (past the warm-up, dim) before each layer and after the last, of tokens (batch, seq)."""
    states = []

    def watch(layers, x, step):
        past = (step.token_index > warm_up_index).to(x.device)  # (batch, seq)
        states.append(x[past].float())
        for layer in layers:
            x = layer(x, step)
            states.append(x[past].float())
        return x

    model(tokens, policy=watch, last_only=True)
    return states
