"""
How stand-ins are fitted: ridge regressions in closed form, weighted by what the backward pass says an error costs. The
derivation is in docs/standins.md; standins.py is the policy, its file and the command line. In shapes, tokens are those
of all calibration windows past the warm-up, and r is the rank.
"""

import math

import torch
import torch.nn.functional as F

import common
from measuring import as_tokens
from model import KVCache

PARTS = "down", "up", "mean", "probe", "bias"
WARM_UP_INDEX = 25
DRAWS = 2  # of labels; with one, what is harmless by chance hides what is so by nature
TEMPERATURE = 2.0  # of the labels: confident text, such as a greedy answer, is not free to skip
DESIGN = 0.25  # the share that skips while layers are fitted, each on the states that the ones before leave


def weighted_mean(x, weight):
    """(dim,) of x (tokens, dim), weighted by weight (tokens,)."""
    return weight @ x / weight.sum()


def fit_ridge(x, y, weight, ridge):
    """(W, b, covariance) of the weighted ridge regression y = x @ W + b; ridge is in units of x's mean variance."""
    x_mean, y_mean = weighted_mean(x, weight), weighted_mean(y, weight)
    scaled = (x - x_mean) * weight[:, None] / weight.sum()  # (tokens, dim)
    covariance = scaled.T @ (x - x_mean)
    covariance.diagonal().add_(ridge * covariance.diagonal().mean())
    slope = torch.linalg.solve(covariance, scaled.T @ (y - y_mean))
    return slope, y_mean - x_mean @ slope, covariance


def fit_map(normed, out, weight, rank):
    """down (r, dim), up (dim, r), mean (dim,): reduced-rank regression of a block's output on its normed input."""
    slope, mean, covariance = fit_ridge(normed, out, weight, 0.1)
    _, vectors = torch.linalg.eigh(slope.T @ covariance @ slope)  # of what the full map explains, ascending
    up = vectors[:, len(vectors) - rank :]
    down = (slope @ up).T
    left_out = slope - down.T @ up.T
    return down, up, mean + weighted_mean(normed, weight) @ left_out


def fit_probe(normed, harm, weight, held):
    """probe (dim,), bias: log harm, predicted from the normed input; a line through tenths of `held` makes it nats."""
    slope, bias, _ = fit_ridge(normed[~held], harm[~held, None].log(), weight[~held], 2.0)
    order = (normed[held] @ slope + bias)[:, 0].sort()
    predicted = torch.stack([part.mean() for part in order.values.tensor_split(10)])
    true = torch.stack([part.mean().log() for part in harm[held][order.indices].tensor_split(10)])
    tilt = ((predicted - predicted.mean()) * (true - true.mean())).sum() / predicted.var(correction=0) / 10
    tilt = tilt.clamp(min=0.1)
    return tilt * slope[:, 0], tilt * (bias[0] - predicted.mean()) + true.mean()


def new_step(model, ids, prompt_len):
    """(tokens (1, seq), Step) of a forward pass over one window, with a throw-away cache."""
    tokens = as_tokens(model, ids)
    weight = model.tok_embeddings.weight
    cache = KVCache(model.args, 1, len(ids), weight.dtype, weight.device)
    return tokens, model.prepare(tokens, cache, prompt_len, trace=None)


def may_skip(step):
    """(seq,) bool on the host: the tokens of a window that may skip."""
    return step.token_index[0] > WARM_UP_INDEX


@torch.no_grad()
def gradients(model, windows, seed):
    """
    For each layer, and each window, (tokens, DRAWS, dim) in the model's dtype: the gradients of the loss at the layer's
    output, each for labels drawn anew from the model's own predictions. To second order an error e there costs the mean
    of (g . e)^2 / 2 nats (the Fisher information). One layer at a time is run again under enable_grad, so that memory
    holds one window's states.
    """
    torch.manual_seed(seed)
    found = [[] for _ in model.layers]
    for ids, prompt_len in common.progress(windows, "gradients"):
        tokens, step = new_step(model, ids, prompt_len)
        states = [model.tok_embeddings(tokens)]  # (1, seq, dim) before each layer, and after the last
        for layer in model.layers:
            states.append(layer(states[-1], step))
        with torch.enable_grad():
            x = states[-1].requires_grad_()
            logits = model.logits(x)[0] / TEMPERATURE  # (seq, vocab)
            labels = torch.multinomial(logits.detach().softmax(-1), DRAWS, replacement=True).T  # (DRAWS, seq)
            losses = [TEMPERATURE * F.cross_entropy(logits, drawn, reduction="sum") for drawn in labels]
        found_here = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses]  # of (1, seq, dim) each
        for i in reversed(range(len(model.layers))):
            found[i].append(torch.cat(found_here)[:, may_skip(step)].transpose(0, 1))  # -> (tokens, DRAWS, dim)
            with torch.enable_grad():
                x = states[i].requires_grad_()
                out = model.layers[i](x, new_step(model, ids, prompt_len)[1])
            found_here = [torch.autograd.grad(out, x, g, retain_graph=True)[0] for g in found_here]
    return found


@torch.no_grad()
def fit(model, windows, gradient, rank, log_budget=-math.inf):
    """
    Fit every layer in turn: (tensors by PARTS, predicted log harm (layer, tokens)). With a budget, later layers see the
    states that earlier stand-ins leave, and each is fitted again with the tokens that skip counted five times. Every
    fifth window is kept for the line that turns the probe's scores into nats.
    """
    fitted, predictions = {name: [] for name in PARTS}, []
    states = [model.tok_embeddings(as_tokens(model, ids)) for ids, _ in windows]
    steps = [new_step(model, *window)[1] for window in windows]
    wheres = [may_skip(step) for step in steps]
    held = torch.cat([where[where] & (i % 5 == 4) for i, where in enumerate(wheres)])  # (tokens,)
    for layer, g in zip(common.progress(model.layers, "fitting"), gradient):
        normed, out = [], []
        for i, where in enumerate(wheres):
            h = layer.add_attention(states[i], steps[i])  # (1, seq, dim)
            normed_h = layer.ffn_norm(h)
            block = layer.feed_forward(normed_h)
            normed.append(normed_h[0, where])  # (tokens, dim)
            out.append(block[0, where])
            states[i] = h + block
        g, normed, out = torch.cat(g).float(), torch.cat(normed).float(), torch.cat(out).float()
        weight = torch.ones(len(normed), device=normed.device)
        for _ in range(1 if log_budget == -math.inf else 2):
            down, up, mean = fit_map(normed[~held], out[~held], weight[~held], rank)
            error = normed @ down.T @ up.T + mean - out
            harm = torch.einsum("td,tkd->tk", error, g).square().mean(1) / 2 + 1e-12
            probe, bias = fit_probe(normed, harm, weight, held)
            prediction = normed @ probe + bias
            skips = prediction < log_budget
            weight = 1 + 4 * skips.float()
        probe = probe * layer.ffn_norm.weight  # of h by its root mean square instead, so that no norm need run
        for name, value in zip(PARTS, (down, up, mean, probe, bias)):
            fitted[name].append(value)
        predictions.append(prediction)
        changes = (error * skips[:, None]).to(states[0].dtype).split([where.sum().item() for where in wheres])
        for state, where, change in zip(states, wheres, changes):
            state[0, where] += change
    return {name: torch.stack(values) for name, values in fitted.items()}, torch.stack(predictions)


def fit_twice(model, windows, rank, seed):
    """The tensors of fit: first on a quarter of the windows without skipping, which tells the budget for DESIGN."""
    gradient = gradients(model, windows, seed)
    _, predictions = fit(model, windows[::4], [g[::4] for g in gradient], rank)
    fitted, _ = fit(model, windows, gradient, rank, predictions.flatten()[::7].quantile(DESIGN).item())
    dtype = model.tok_embeddings.weight.dtype
    return fitted | {name: fitted[name].to(dtype) for name in ("down", "up", "mean")}
