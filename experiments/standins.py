"""
Stand-ins: leave a feed-forward block out where a linear probe predicts that it does little harm, and let a low-rank map
stand in for it. This project's own, beside the paper's Algorithm 1 and not in its place: docs/standins.md derives it.

    python experiments/standins.py --text c4.jsonl wiki.train.raw     fits the demo model (--ckpt: another one)
    python generate.py --policy standins --skip 0.15 "..."            finds the fit beside the checkpoint

All fits are closed form. In shapes, tokens are those of all calibration windows past the warm-up, and r is the rank.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common
from load_weights import load_model, load_tokenizer
from measuring import (
    as_tokens,
    as_windows,
    bring_to,
    quality,
    quality_table,
    read_text,
    skip_ratio,
    text_windows,
    written_windows,
)
from model import KVCache
from one_row import linear

WARM_UP_INDEX = 25
TEMPERATURE = 2.0  # of the labels: confident text, such as a greedy answer, is not free to skip
DESIGN = 0.25  # the share that skips while layers are fitted, each on the states that the ones before leave
PARTS = "down", "up", "mean", "probe", "bias"


class StandIns:
    """
    The policy: a token skips the blocks whose predicted harm is below a budget, at most `most` of them. fitted has, per
    layer, down (r, dim), up (dim, r) and mean (dim,), which stand in, and probe (dim,) and bias, in log nats.
    """

    def __init__(self, fitted, log_budget, most, warm_up_index=WARM_UP_INDEX):
        self.fitted, self.log_budget, self.most, self.warm_up_index = fitted, log_budget, most, warm_up_index

    def __call__(self, layers, x, step):
        left = (step.token_index > self.warm_up_index).int() * self.most  # (batch, seq): blocks it may still skip
        for layer in layers:
            h = layer.add_attention(x, step)
            if not left.any():
                x = layer.add_feed_forward(h, step)
                continue
            down, up, mean, probe, bias = (self.fitted[name][layer.layer_id] for name in PARTS)
            normed = layer.ffn_norm(h)
            harm = (normed.float() @ probe + bias).cpu()  # (batch, seq), the logarithm of nats
            skips = (harm < self.log_budget) & (left > 0)
            if step.trace is not None and step.trace.cosines:
                step.trace.record_cosine(layer.layer_id, harm.exp().flatten().tolist(), left > 0)
            left = left - skips.int()
            x = layer.add_feed_forward(h, step, active=~skips)
            if skips.any():
                stand_in = linear(linear(normed, down), up) + mean
                x = torch.where(skips[..., None].to(x.device), h + stand_in, x)
        return x


def make(model, skip, warm_up_index=None, tokens=None, seed=0, fitted=None):
    """
    The StandIns of the file `fitted` that skips the share `skip` of the tokens (batch, seq), if given; else of chat, as
    found when it was fitted, with a cap of 1.5 times the share per token, since free-running text feeds on itself.
    Raises ValueError without a fit of this model.
    """
    if fitted is None:
        raise ValueError("policy standins needs a fit of this checkpoint: python experiments/standins.py --text FILE "
                         "makes one, and --standins FILE names one that lies elsewhere")
    parts, about = load(fitted, model)
    warm_up_index = WARM_UP_INDEX if warm_up_index is None else warm_up_index
    if tokens is not None:
        return at_ratio(model, parts, skip, model.args.n_layers, as_windows(tokens), warm_up_index)
    ratios, budgets = zip(*about["budgets"])
    if not ratios[0] <= skip <= ratios[-1]:
        raise ValueError(f"--skip {skip}: {fitted} knows budgets for {ratios[0]} to {ratios[-1]}")
    return StandIns(parts, float(numpy.interp(skip, ratios, budgets)), cap(model, skip), warm_up_index)


def cap(model, skip):
    return math.ceil(1.5 * skip * model.args.n_layers)


def at_ratio(model, parts, skip, most, windows, warm_up_index=WARM_UP_INDEX):
    """The StandIns whose budget skips the share `skip` of the blocks of windows."""

    def at(negative):  # of the logarithm of the budget, since bring_to wants a ratio that falls
        policy = StandIns(parts, -negative, most, warm_up_index)
        return policy, skip_ratio(model, policy, windows)

    return bring_to(at, -3.0, 12.0, skip)[0]


def load(path, model):
    """(tensors by PARTS, on the model's device; what the file says of itself). ValueError for another model's file."""
    weight = model.tok_embeddings.weight
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_tensor(name).to(weight.device) for name in PARTS}
            about = {name: json.loads(value) for name, value in file.metadata().items()}
        n_layers, dim = parts["probe"].shape
        budgets = about["budgets"]
    except (OSError, SafetensorError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: no fit of experiments/standins.py: {common.first_line(error)}") from None
    if (n_layers, dim) != (model.args.n_layers, model.args.dim) or not budgets:
        raise ValueError(f"{path}: fitted for {n_layers} layers of width {dim}, and this model has "
                         f"{model.args.n_layers} of {model.args.dim}")
    for name in "down", "up", "mean":
        parts[name] = parts[name].to(weight.dtype)
    return parts, about


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
    up = vectors[:, -rank:]
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
    For each layer, and each window, (tokens, dim) in the model's dtype: the gradient of the loss at the layer's output,
    with labels drawn from the model's own predictions. To second order an error e there costs (g . e)^2 / 2 nats (the
    Fisher information). One layer at a time is run again under enable_grad, so that memory holds one window's states.
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
            labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
            loss = TEMPERATURE * F.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
        for i in reversed(range(len(model.layers))):
            found[i].append(gradient[0, may_skip(step)])
            with torch.enable_grad():
                x = states[i].requires_grad_()
                out = model.layers[i](x, new_step(model, ids, prompt_len)[1])
            (gradient,) = torch.autograd.grad(out, x, gradient)
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
            harm = (error * g).sum(-1).square() / 2 + 1e-12
            probe, bias = fit_probe(normed, harm, weight, held)
            prediction = normed @ probe + bias
            skips = prediction < log_budget
            weight = 1 + 4 * skips.float()
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


def chat_windows(model, tokenizer, text, n, n_new=192):
    """n windows (ids, prompt_len): sentences of the text as a user's message, and the model's greedy answers."""
    sentences = [re.split(r"(?<=[.!?])\s", line.strip())[0] for line in text.split("\n")]
    sentences = [sentence for sentence in sentences if 20 < len(sentence) < 200]
    windows, prompts, batch = [], [], 16
    for sentence in sentences[:: max(1, len(sentences) // n)][:n]:
        try:
            prompts.append(tokenizer.chat([dict(role="user", content=sentence)]))
        except ValueError:  # no chat template: a model that goes on writing
            prompts.append(tokenizer.encode(sentence))
    for start in common.progress(range(0, len(prompts), batch), "writing chat"):
        windows += written_windows(model, prompts[start : start + batch], n_new, 0, 0.0, tokenizer.eos_ids)
    return [(ids, prompt_len) for ids, prompt_len in windows if len(ids) - prompt_len > WARM_UP_INDEX + 9]


def gather(model, tokenizer, options):
    """(windows to fit on, text held out, chat held out): the last eighth of each file, and of the chat, is held out."""
    windows, text_held, chat_held = [], [], []
    for file in options.text:
        text = read_text([file])
        found = text_windows(tokenizer, text, options.tokens // len(options.text), min(512, model.args.max_seq_len))
        chat = chat_windows(model, tokenizer, text, max(8, options.tokens // len(options.text) // 256))
        for some, held in (found, text_held), (chat, chat_held):
            n = max(1, len(some) // 8)
            windows += some[:-n]
            held += some[-n:]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed)).tolist()
    if len(windows) < 10 or not chat_held:
        raise ValueError("too little text: at least ten windows of 512 tokens and lines with a sentence are needed")
    return [windows[i] for i in order], text_held, chat_held


def parse_args(argv):
    parser = common.Parser(__doc__)
    common.add_model_arguments(parser)
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help='plain text or JSON lines with a key "text"')
    add("--tokens", type=common.positive, default=12288, metavar="N", help="of text to work on (default 12288)")
    add("--rank", type=common.positive, default=192, metavar="R", help="of the map that stands in (default 192)")
    add("--out", metavar="FILE", help="default: standins.safetensors beside the checkpoint")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_args(argv)
    ckpt = common.find_checkpoint(options.ckpt)
    out = Path(options.out) if options.out else common.fitted_path(ckpt)
    common.check_outputs(out)
    tokenizer, model = load_tokenizer(ckpt), load_model(ckpt, common.find_device(options.device), options.dtype)
    if options.rank > model.args.dim:
        raise ValueError(f"--rank {options.rank} is more than the model's width {model.args.dim}")
    windows, text_held, chat_held = gather(model, tokenizer, options)
    parts = fit_twice(model, windows, options.rank, options.seed)
    budgets = []
    for skip in 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4:
        policy = at_ratio(model, parts, skip, cap(model, skip), chat_held)
        budgets.append([skip, policy.log_budget])
    reference, measured = {}, {}
    tried = {"dense": -math.inf, "budget of 15 % of chat": budgets[3][1], "budget of 25 % of chat": budgets[5][1]}
    for name, log_budget in tried.items():
        policy = StandIns(parts, log_budget, model.args.n_layers)
        measured[name] = quality(model, text_held, policy, reference)
    about = dict(model=common.model_name(ckpt), rank=options.rank, seed=options.seed, budgets=budgets,
                 quality=list(measured.values()), corpus=[Path(file).name for file in options.text],
                 tokens=sum(len(ids) for ids, _ in windows))
    save_file({name: value.contiguous().cpu() for name, value in parts.items()}, out,
              {name: common.to_json(value) for name, value in about.items()})
    print(*quality_table(measured), f"written to {out}", sep="\n")


if __name__ == "__main__":
    common.run_command(main)
