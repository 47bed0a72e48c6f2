"""
Stand-ins: skip a feed-forward block where a linear probe predicts that this does little harm, and let a low-rank map
replace it. This project's own, beside the paper's Algorithm 1: docs/standins.md derives it.

    python experiments/fit_standins.py --text c4.jsonl wiki.train.raw   fits the demo model (--ckpt: another one)
    python generate.py --policy standins --skip 0.15 "..."              finds the fit beside the checkpoint
"""

import json
import math
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from fast.graphs import read, run
from fast.one_row import as_row, linear
from support import common
from support.measuring import as_windows, measure

PARTS = "down", "up", "mean", "centre", "probe", "bias"
WARM_UP_INDEX = 25
MAP = "down", "up", "mean", "centre", "offset"  # what ready() makes of a fit for the maps


class StandIns:
    """
    The policy: a token skips the blocks whose predicted harm is below a budget, at most `most` of them. fitted has, per
    layer, a probe (dim,) of h divided by its root mean square and a number bias, which predict the harm in log nats;
    and n maps, down (n, r, dim), up (n, dim, r) and mean (n, dim), of which the one replaces the block whose centre
    (n, dim) is nearest to the block's normed input.
    """

    measures = "harm"  # what it leaves in trace.cosine, in nats

    def __init__(self, fitted, log_budget, most, warm_up_index=WARM_UP_INDEX):
        self.fitted, self.log_budget, self.most, self.warm_up_index = fitted, log_budget, most, warm_up_index

    def __call__(self, layers, x, step):
        may_skip = step.token_index > self.warm_up_index  # (batch, seq)
        remaining = (may_skip * self.most).flatten().tolist()  # per token, how many blocks it may still skip
        for layer in layers:
            h = layer.add_attention(x, step)
            skips = self.decide(h, layer, step, remaining)
            remaining = [n - skip for n, skip in zip(remaining, skips)]
            if not any(skips):
                x = layer.add_feed_forward(h, step)
            elif all(skips):
                x = run(layer, self.stand_in, h)
            else:
                x = self.add_feed_forward(layer, h, step, active=~torch.tensor(skips).view(may_skip.shape))
        return x

    def decide(self, h, layer, step, remaining):
        """Per token of h, (batch, seq, dim), as a list: whether it skips this layer's block, since it does no harm."""
        if not any(remaining):
            return [False] * len(remaining)
        row = as_row(h)
        if row.dim() == 1:  # in fewer operations
            row, probe = row.float(), self.fitted["probe"][layer.layer_id]
            size = torch.dot(row, row).item() / len(row) + layer.ffn_norm.eps
            harm = [torch.dot(row, probe).item() / size**0.5 + self.fitted["bias"][layer.layer_id]]
        else:
            harm = read(layer, self.predict, h)
        if step.trace is not None and step.trace.cosines:
            step.trace.record_cosine(layer.layer_id, [math.exp(value) for value in harm], [n > 0 for n in remaining])
        return [n > 0 and value < self.log_budget for n, value in zip(remaining, harm)]

    def predict(self, layer, h):
        """(batch, seq): of h (batch, seq, dim), the predicted harm of skipping the layer's block, in log nats."""
        h, probe, bias = h.float(), self.fitted["probe"][layer.layer_id], self.fitted["bias"][layer.layer_id]
        return h @ probe * (h.square().mean(-1) + layer.ffn_norm.eps).rsqrt() + bias

    def stand_in(self, layer, h):
        """temp: h, (..., dim), and the map that replaces the layer's block."""
        down, up, mean, centre, offset = (self.fitted[name][layer.layer_id] for name in MAP)
        normed = layer.ffn_norm(as_row(h))
        cell = nearest(normed.float(), centre, offset)  # (...)
        if normed.dim() == 1:
            i = cell.item()
            return h + linear(linear(normed, down[i]), up[i]) + mean[i]
        if h.dim() == 3 and h.size(1) == 1:  # a copy of each row's map, so that nothing need be read back
            return h + mean[cell] + (up[cell] @ (down[cell] @ normed[..., None]))[..., 0]  # (batch, 1, dim)
        return add_maps(h + mean[cell], normed, cell, down, up)

    def add_feed_forward(self, layer, h, step, active=None):
        """The layer's own, except that a map replaces the block where not active."""
        temp = layer.add_feed_forward(h, step, active)
        if active is None or active.all():
            return temp
        index = (~active).flatten().nonzero().squeeze(1).to(h.device)  # (skipping tokens,)
        some = self.stand_in(layer, h.flatten(0, 1)[index])  # -> (batch * seq, dim) -> (skipping, dim)
        return temp.flatten(0, 1).index_copy(0, index, some).view_as(h)

    def shifted(self, shift):
        """The same with a budget of e^-shift as many nats: it skips less."""
        return StandIns(self.fitted, self.log_budget - shift, self.most, self.warm_up_index)

    def thresholds(self, n_layers):
        """The budget in nats, per layer: what the page of a trace shows beside the predicted harm."""
        return [math.exp(self.log_budget)] * n_layers


def make(model, skip, warm_up_index=WARM_UP_INDEX, tokens=None, seed=0, fitted=None):
    """
    The StandIns of the file `fitted` that skips the share `skip` of the tokens (batch, seq), if given; else of chat, as
    found by the fit, with a cap per token, since free-running text feeds on itself. ValueError without a fit.
    """
    if fitted is None:
        raise ValueError("policy standins needs a fit of this checkpoint: python experiments/fit_standins.py --ckpt "
                         "... --text FILE makes one, and --standins FILE names one that lies elsewhere")
    tensors, about = load(fitted, model)
    if tokens is not None:
        n_layers = model.args.n_layers
        budgets = find_budgets(model, tensors, [(skip, n_layers)], as_windows(tokens), warm_up_index)
        return StandIns(tensors, budgets[0], n_layers, warm_up_index)
    ratios, budgets = zip(*about["budgets"])
    if not ratios[0] <= skip <= ratios[-1]:
        raise ValueError(f"a share of {skip}: {fitted} knows budgets for {ratios[0]} to {ratios[-1]}")
    return StandIns(tensors, float(numpy.interp(skip, ratios, budgets)), cap(model, skip), warm_up_index)


make.fit = "standins.safetensors"  # beside a checkpoint


def cap(model, skip):
    """How many blocks a token may skip: ten points more than asked for, so that no text skips more than that."""
    n_layers = model.args.n_layers
    return max(math.floor((skip + 0.1) * n_layers), math.ceil(skip * n_layers))  # the second if ten points are no block


def find_budgets(model, tensors, wanted, windows, warm_up_index=WARM_UP_INDEX):
    """Per (skip, most) wanted: the log budget that skips the share `skip` of the blocks, at most `most` per token."""
    policy, budgets = StandIns(tensors, -math.inf, model.args.n_layers, warm_up_index), []
    harm = measure(model, windows, warm_up_index, policy).log()  # (tokens, n_layers), log nats
    for skip, most in common.progress(wanted, "budgets"):
        for _ in range(8):  # what is skipped changes later predictions a little
            # the blocks that the cap lets tokens skip, by their harm: (tokens, n_layers) -> (tokens * most,)
            least = harm.topk(most, largest=False).values.flatten().sort().values
            budget = least[min(round(skip * harm.numel()), len(least) - 1)].item()
            if budget == policy.log_budget:  # as near as it goes
                break
            policy.log_budget = budget
            harm = measure(model, windows, warm_up_index, policy).log()
            below = (harm < budget).sum(1).clamp(max=most).sum().item()
            if abs(below / harm.numel() - skip) <= 0.005:
                break
        budgets.append(policy.log_budget)
    return budgets


def load(path, model):
    """(tensors by PARTS, on the model's device; what the file says of itself). ValueError for another model's file."""
    weight = model.tok_embeddings.weight
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).to(weight.device) for name in PARTS}
            about = {name: json.loads(value) for name, value in file.metadata().items()}
        n_layers, dim = tensors["probe"].shape
        budgets = about["budgets"]
    except (OSError, SafetensorError, AttributeError, KeyError, ValueError) as error:
        problem = common.first_line(error)
        raise ValueError(f"{path}: no fit of experiments/fit_standins.py of this version ({problem})") from None
    if (n_layers, dim) != (model.args.n_layers, model.args.dim) or not budgets:
        raise ValueError(f"{path}: fitted for {n_layers} layers of width {dim}, and this model has "
                         f"{model.args.n_layers} of {model.args.dim}")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{path}: numbers in it are not finite: fit anew")
    if not common.made_for(model, path, about.get("weights_checksum")):
        raise ValueError(f"{path}: fitted for other weights, those of {about.get('model')}: fit these anew")
    return ready(tensors, weight.dtype), about


def ready(tensors, dtype):
    """The tensors of a fit as StandIns wants them: a list of one tensor per layer each, and the bias as numbers."""
    maps = {name: list(tensors[name].to(dtype)) for name in ("down", "up", "mean")}
    maps["up"] = [up.mT.contiguous().mT for up in maps["up"]]  # by columns: its rows of r are too short to be read fast
    centre = tensors["centre"].float()
    choice = dict(centre=list(centre), offset=list(centre_offset(centre)))
    return maps | choice | dict(probe=list(tensors["probe"]), bias=tensors["bias"].tolist())


def centre_offset(centre):
    """(..., n) that makes nearest() of a product: |x - c|^2 = |x|^2 - 2 (x . c - |c|^2 / 2)."""
    return -centre.square().sum(-1) / 2


def nearest(x, centre, offset):
    """Of x (..., dim), the index (...) of the nearest centre."""
    return F.linear(x, centre, offset).argmax(-1)


def add_maps(out, normed, cell, down, up):
    """out, (..., dim), to which the map of its cell (...) of every input in normed (..., dim) is added in place."""
    for i in cell.unique().tolist():
        out[cell == i] += F.linear(F.linear(normed[cell == i], down[i]), up[i])
    return out
