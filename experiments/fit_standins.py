"""
Fit the stand-ins of policies/standins.py to a checkpoint, on text of yours and on chat that the model writes about it:

    python experiments/fit_standins.py --text c4.jsonl wiki.train.raw     the demo model; --ckpt: another one

Regressions have a closed form, and the backward pass tells what an error costs: docs/standins.md has the derivation. In
shapes, tokens are those of all calibration windows past the warm-up, r is the rank, and n the number of maps per layer.
"""

import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
import policies
from generate import generate_batch
from load_weights import load
from model import KVCache
from policies import standins
from support import common
from support.cache import fork
from support.measuring import as_tokens, quality, quality_table, read_text, text_windows

DRAWS = 2  # of labels; with one, what is harmless by chance hides what is so by nature
TEMPERATURE = 2.0  # of the labels: confident text, such as a greedy answer, is not free to skip
OTHERS = 0.02  # what a token of any cell adds to the fit of a cell's map, where the cell's own weigh 1
DESIGN = 0.25  # the share that skips while layers are fitted, each on the states that the ones before leave

REQUESTS = [  # with a sentence of the text, what the model is asked for chat to fit on
    "{}",
    "Explain this to a beginner: {}",
    "Write a short story that begins with this sentence: {}",
    "What questions does this raise, and how would you answer them? {}",
    "Write an email about this: {}",
    "Is this true? Give your reasons step by step. {}",
    "Rewrite this as a list of points, and add what is missing: {}",
    "Imagine you were there. {} What would you do?",
]


def moments(x, y, weight):
    """Weighted sums over tokens of [x, 1]^T [x, 1] and [x, 1]^T y: all that a regression needs, and they add up."""
    with_one = F.pad(x, (0, 1), value=1.0)  # (tokens, dim) -> (tokens, dim + 1)
    scaled = (with_one * weight[:, None]).T
    return scaled @ with_one, scaled @ y


def fit_ridge(squares, products, ridge):
    """
    (W, b, explained) of the ridge regression y = x @ W + b from moments; ridge in units of x's mean variance. explained
    is W^T C W of x's covariance C with the ridge, which is W^T times the covariance of x and y.
    """
    n, x_sum, y_sum = squares[-1, -1], squares[-1, :-1], products[-1]
    covariance = squares[:-1, :-1] / n - torch.outer(x_sum / n, x_sum / n)
    covariance.diagonal().add_(ridge * covariance.diagonal().mean())
    with_y = products[:-1] / n - torch.outer(x_sum / n, y_sum / n)
    slope = torch.linalg.solve(covariance, with_y)
    return slope, (y_sum - x_sum @ slope) / n, slope.T @ with_y


def fit_map(squares, products, rank):
    """down (r, dim), up (dim, r), mean (dim,): reduced-rank regression of a block's output on its normed input."""
    slope, mean, explained = fit_ridge(squares, products, 0.1)
    up = torch.svd_lowrank(explained, rank)[0]  # of what the full map explains, the largest part
    down = (slope @ up).T
    left_out = slope - down.T @ up.T
    return down, up, mean + squares[-1, :-1] / squares[-1, -1] @ left_out


def find_centres(x, n, steps=12):
    """(n, dim): k-means of x (tokens, dim), from n tokens drawn at random (Lloyd 1982)."""
    centre = x[torch.randperm(len(x))[:n]]
    for _ in range(steps):
        cell = standins.nearest(x, centre, standins.centre_offset(centre))
        for i in cell.unique():
            centre[i] = x[cell == i].mean(0)
    return centre


def fit_maps(normed, out, weight, cell, n, rank):
    """fit_map for each of n cells, stacked: its own tokens, and all tokens with weight OTHERS. Rank 0: of zeros."""
    if rank == 0:
        dim = normed.size(1)
        return [normed.new_zeros(n, *shape) for shape in ((0, dim), (dim, 0), (dim,))]
    own = [moments(normed[cell == i], out[cell == i], weight[cell == i]) for i in range(n)]
    of_all = [OTHERS * sum(parts) for parts in zip(*own)]
    maps = [fit_map(squares + of_all[0], products + of_all[1], rank) for squares, products in own]
    return [torch.stack(parts) for parts in zip(*maps)]


def fit_probe(normed, harm, weight, held):
    """
    probe (dim,), bias: the mean of harm as exp(normed @ probe + bias). That is a gamma regression with a logarithmic
    link and a ridge, each step of which solves the same linear equations (Nelder and Wedderburn 1972). A line through
    tenths of `held`, which it has not seen, mends the scale.
    """
    x, y, weight = normed[~held], harm[~held], weight[~held] / weight[~held].sum()
    x = x - weight @ x
    covariance = (x * weight[:, None]).T @ x
    penalty = 0.5 * covariance.diagonal().mean()
    covariance.diagonal().add_(penalty)
    factor, slope, bias = torch.linalg.cholesky(covariance), torch.zeros_like(x[0]), (weight @ y).log()
    for _ in range(12):
        excess = (y / (x @ slope + bias).exp() - 1).clamp(max=5) * weight  # no single token tells more than that
        step = x.T @ excess - penalty * slope
        slope, bias = slope + torch.cholesky_solve(step[:, None], factor)[:, 0], bias + excess.sum()
    order, n = (normed[held] @ slope).sort(), min(10, held.sum().item())
    predicted = torch.stack([part.mean() for part in order.values.tensor_split(n)])
    true = torch.stack([part.mean().log() for part in harm[held][order.indices].tensor_split(n)])
    tilt = ((predicted - predicted.mean()) * (true - true.mean())).mean() / predicted.var(correction=0)
    tilt = tilt.clamp(min=0.1)
    return tilt * slope, true.mean() - tilt * predicted.mean()


def new_step(model, ids, prompt_len):
    """(tokens (1, seq), Step) of a forward pass over one window, with a throw-away cache."""
    tokens = as_tokens(model, ids)
    weight = model.tok_embeddings.weight
    cache = KVCache(model.args, 1, len(ids), weight.dtype, weight.device)
    return tokens, model.prepare(tokens, cache, prompt_len, trace=None)


def may_skip(step):
    """(seq,) bool on the host: the tokens of a window that may skip."""
    return step.token_index[0] > standins.WARM_UP_INDEX


def pull_back(out, x, gradient):
    """The gradient at x, given the one at out."""
    return torch.autograd.grad(out, x, gradient, retain_graph=True)[0]


@torch.no_grad()
def gradients(model, windows, seed):
    """
    For each layer, and each window, (tokens, DRAWS, dim) in the model's dtype: the gradients of the loss at the layer's
    output, each for labels drawn anew from the model's own predictions. To second order an error e there costs the mean
    of (g . e)^2 / 2 nats (the Fisher information). One layer at a time is run again under enable_grad, so that memory
    holds one window's states. A prompt is not run again: its tokens never skip, and its keys are in the cache.
    """
    torch.manual_seed(seed)
    head = (model.output or model.tok_embeddings).weight  # (vocab, dim)
    found = [[] for _ in model.layers]
    for ids, prompt_len in common.progress(windows, "gradients"):
        tokens, step = new_step(model, ids, prompt_len)
        states = [model.tok_embeddings(tokens)]  # (1, seq, dim) before each layer, and after the last
        for layer in model.layers:
            states.append(layer(states[-1], step))
        states = [state[:, prompt_len:] for state in states]
        step.cache.length = prompt_len  # to be forked from there
        where = may_skip(step)[prompt_len:]
        probs = (model.logits(states[-1])[0] / TEMPERATURE).softmax(-1)  # (seq, vocab)
        labels = torch.multinomial(probs, DRAWS, replacement=True).T  # (DRAWS, seq)
        mean = probs.type_as(head) @ head  # (seq, dim): cross entropy's gradient before the head is this - head[label]
        with torch.enable_grad():
            x = states[-1].requires_grad_()
            normed = model.norm(x)
        found_here = [pull_back(normed, x, (mean - head[drawn])[None]) for drawn in labels]  # of (1, seq, dim) each
        for i in reversed(range(len(model.layers))):
            found[i].append(torch.cat(found_here)[:, where].transpose(0, 1))  # -> (tokens, DRAWS, dim)
            again = model.prepare(tokens[:, prompt_len:], fork(step.cache, 1, len(ids)), prompt_len, trace=None)
            with torch.enable_grad():
                x = states[i].requires_grad_()
                out = model.layers[i](x, again)
            found_here = [pull_back(out, x, g) for g in found_here]
    return found


@torch.no_grad()
def fit(model, windows, gradient, n, rank, log_budget=-math.inf):
    """
    Fit n maps for every layer in turn: (tensors by PARTS, predicted log harm (layer, tokens)). With a budget, later
    layers see the states that earlier stand-ins leave, and each is fitted again with the tokens that skip counted five
    times. Every fifth window is held: only the line that mends the probe's scale is fitted to it.
    """
    fitted, predictions = {name: [] for name in standins.PARTS}, []
    states, steps, wheres, held = [], [], [], []
    for i, (ids, prompt_len) in enumerate(windows):
        tokens, step = new_step(model, ids, prompt_len)
        states.append(model.tok_embeddings(tokens))
        steps.append(step)
        wheres.append(may_skip(step))
        held.append(torch.full((wheres[-1].sum(),), i % 5 == 4))
    held = torch.cat(held)  # (tokens,)
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
        centre = find_centres(normed[~held], n)
        cell = standins.nearest(normed, centre, standins.centre_offset(centre))
        for _ in range(1 if log_budget == -math.inf else 2):
            down, up, mean = fit_maps(normed[~held], out[~held], weight[~held], cell[~held], len(centre), rank)
            error = standins.add_maps(mean[cell] - out, normed, cell, down, up)
            harm = torch.einsum("td,tkd->tk", error, g).square().mean(1) / 2 + 1e-12
            probe, bias = fit_probe(normed, harm, weight, held)
            prediction = normed @ probe + bias
            skips = prediction < log_budget
            weight = 1 + 4 * skips.float()
        probe = probe * layer.ffn_norm.weight  # of h by its root mean square instead, so that no norm need run
        for name, value in zip(standins.PARTS, (down, up, mean, centre, probe, bias)):
            fitted[name].append(value)
        predictions.append(prediction)
        changes, begin = (error * skips[:, None]).to(states[0].dtype), 0
        for state, where in zip(states, wheres):
            state[0, where] += changes[begin : begin + where.sum()]
            begin += where.sum()
    return {name: torch.stack(values) for name, values in fitted.items()}, torch.stack(predictions)


def fit_twice(model, windows, n, rank, seed):
    """The tensors of fit: first on a part of the windows without skipping, which tells the budget for DESIGN."""
    gradient = gradients(model, windows, seed)
    every = min(4, max(1, len(windows) // 10))  # ten at least, so that some are held
    few = max(1, n // every)  # maps, so that each has as many tokens to learn from
    _, predictions = fit(model, windows[::every], [g[::every] for g in gradient], few, rank)
    fitted, _ = fit(model, windows, gradient, n, rank, predictions.flatten()[::7].quantile(DESIGN).item())
    dtype = model.tok_embeddings.weight.dtype
    return fitted | {name: fitted[name].to(dtype) for name in ("down", "up", "mean", "centre")}


def chat_windows(model, tokenizer, text, n, apart, n_new=192):
    """
    n windows (ids, prompt_len): REQUESTS about sentences of the text, and the model's greedy answers. Sentences that
    the text `apart` has are left out.
    """
    sentences, prompts, windows, batch = [], [], [], 32
    for line in text.split("\n"):
        sentence = re.split(r"(?<=[.!?])\s", line.strip())[0]
        if 20 < len(sentence) < 200:
            sentences.append(sentence)
    longest = model.args.max_seq_len - standins.WARM_UP_INDEX - 10
    for i, sentence in enumerate(sentences[:: max(1, len(sentences) // n)][:n]):
        if sentence in apart:
            continue
        try:
            message = REQUESTS[i % len(REQUESTS)].format(sentence)
            prompt = tokenizer.chat([dict(role="user", content=message)])
        except ValueError:  # no chat template: a model that goes on writing
            prompt = tokenizer.encode(sentence)
        if len(prompt) <= longest:
            prompts.append(prompt)
    for start in range(0, len(prompts), batch):
        windows += written_windows(model, prompts[start : start + batch], n_new, 0, 0.0, tokenizer.eos_ids)
    long_enough = []
    for ids, prompt_len in windows:
        if len(ids) - prompt_len > standins.WARM_UP_INDEX + 9:
            long_enough.append((ids, prompt_len))
    return long_enough


def written_windows(model, prompts, n_new, seed, temperature=1.0, eos_ids=()):
    """Windows (ids, prompt_len) of prompts, lists of ids, each with up to n_new tokens that the model draws for it."""
    loop = generate_batch(model, prompts, n_new, temperature=temperature, seed=seed, eos_ids=eos_ids)
    windows = [(list(prompt), len(prompt)) for prompt in prompts]
    for step, _ in zip(loop, common.progress(range(n_new), "writing")):
        for (ids, _), token in zip(windows, step):
            if token is not None:
                ids.append(token)
    return [(ids[: model.args.max_seq_len], prompt_len) for ids, prompt_len in windows]  # the last may be one too many


def gather(model, tokenizer, options):
    """(windows to fit on, text held out, chat held out): of each file the last eighth, and the last chats."""
    windows, text_held, chat_held, n_held = [], [], [], len(REQUESTS)
    for file in options.text:
        text = read_text([file])
        size, found = min(512, model.args.max_seq_len), []
        for window in text_windows(tokenizer, text, options.tokens // len(options.text), size):
            if len(window[0]) > standins.WARM_UP_INDEX + 9:
                found.append(window)
        n_text = max(1, len(found) // 8)
        apart = "".join(tokenizer.decode(ids) for ids, _ in found[-n_text:])
        n_chats = max(8, options.tokens // len(options.text) // 256)  # of about 128 tokens: half as many as of text
        chat = chat_windows(model, tokenizer, text, n_chats + n_held, apart)
        for some, held, n in (found, text_held, n_text), (chat, chat_held, n_held):
            windows += some[:-n]
            held += some[-n:]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed)).tolist()
    if len(windows) < 10 or not chat_held or not text_held:
        raise ValueError("too little text: at least ten windows of 512 tokens and lines with a sentence are needed")
    return [windows[i] for i in order], text_held, chat_held


def save(path, fitted, about):
    """Write the tensors of a fit and what it says of itself, a dict."""
    tensors = {name: value.contiguous().cpu() for name, value in fitted.items()}
    about = {name: common.to_json(value) for name, value in about.items()}
    common.write_whole(path, lambda file: save_file(tensors, file, about))


def parse_args(argv):
    parser = common.Parser(__doc__)
    common.add_model_arguments(parser)
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="FILE", help='plain text or JSON lines with a key "text"')
    add("--tokens", type=common.positive, default=10240, metavar="N", help="of text to work on (default 10240)")
    add("--maps", type=common.positive, default=16, metavar="N", help="to choose from, per layer (default 16)")
    add("--rank", type=int, default=64, metavar="R", help="of a map (default 64); 0: blocks are skipped without a map")
    add("--out", metavar="FILE", help="default: standins.safetensors beside the checkpoint")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_args(argv)
    ckpt = common.find_checkpoint(options.ckpt)
    out = Path(options.out) if options.out else common.beside(ckpt, policies.STANDINS)
    common.check_outputs(out)
    tokenizer, model = load(ckpt, common.find_device(options.device), options.dtype)
    if not 0 <= options.rank <= model.args.dim:
        raise ValueError(f"--rank {options.rank} is not from 0 to the model's width {model.args.dim}")
    windows, text_held, chat_held = gather(model, tokenizer, options)
    fitted = fit_twice(model, windows, options.maps, options.rank, options.seed)
    parts = standins.ready(fitted, model.tok_embeddings.weight.dtype)
    shares = 0.05, 0.1, 0.15, 0.2, 0.25, 0.3
    found = standins.find_budgets(model, parts, [(skip, standins.cap(model, skip)) for skip in shares], chat_held)
    budgets = list(zip(shares, found))
    about = dict(
        model=common.model_name(ckpt), weights_checksum=common.fingerprint(model), maps=options.maps, rank=options.rank,
        seed=options.seed, budgets=budgets, corpus=[Path(file).name for file in options.text],
        tokens=sum(len(ids) for ids, _ in windows), text_held=text_held, chat_held=chat_held,
    )  # fmt: skip
    save(out, fitted, about)  # before it is measured, which may fail
    reference, measured = {}, {}
    tried = {"dense": -math.inf, "budget of 15 % of chat": budgets[2][1], "budget of 25 % of chat": budgets[4][1]}
    for name, log_budget in tried.items():
        policy = standins.StandIns(parts, log_budget, model.args.n_layers)
        measured[name] = quality(model, text_held, policy, reference)
    print(*quality_table(measured), sep="\n", flush=True)
    save(out, fitted, about | dict(quality=list(measured.values())))
    print(f"written to {out}")


if __name__ == "__main__":
    common.run_command(main)
