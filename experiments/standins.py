"""
Stand-ins: leave a feed-forward block out where a linear probe predicts that it does little harm, and let a low-rank map
stand in for it. This project's own, beside the paper's Algorithm 1 and not in its place: docs/standins.md derives it.

    python experiments/standins.py --text c4.jsonl wiki.train.raw     fits the demo model (--ckpt: another one)
    python generate.py --policy standins --skip 0.15 "..."            finds the fit beside the checkpoint

fit_standins.py holds the closed forms of the fit.
"""

import json
import math
import re
import sys
import zlib
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = str(HERE), str(HERE.parent)  # common.py opens this file by its path

from fit_standins import PARTS, WARM_UP_INDEX, fit_twice

import common
from generate import load as load_checkpoint
from measuring import (
    as_windows,
    bring_to,
    quality,
    quality_table,
    read_text,
    skip_ratio,
    text_windows,
    written_windows,
)
from one_row import is_one_row, linear

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


class StandIns:
    """
    The policy: a token skips the blocks whose predicted harm is below a budget, at most `most` of them. fitted has, per
    layer, down (r, dim), up (dim, r) and mean (dim,), which stand in, and probe (dim,) and a number bias, in log nats.
    The probe is one of h, divided by its root mean square.
    """

    def __init__(self, fitted, log_budget, most, warm_up_index=WARM_UP_INDEX):
        self.fitted, self.log_budget, self.most, self.warm_up_index = fitted, log_budget, most, warm_up_index

    def __call__(self, layers, x, step):
        may_skip = step.token_index > self.warm_up_index  # (batch, seq)
        left = (may_skip * self.most).flatten().tolist()  # per token, how many blocks it may still skip
        for layer in layers:
            h = layer.add_attention(x, step)
            skips = self.decide(h, layer, step, left) if any(left) else left
            left = [n - skip for n, skip in zip(left, skips)]
            if not any(skips):
                x = layer.add_feed_forward(h, step)
            elif all(skips):
                x = self.stand_in(layer, h)
            else:
                x = self.add_feed_forward(layer, h, step, active=~torch.tensor(skips).view(may_skip.shape))
        return x

    def decide(self, h, layer, step, left):
        """Per token of h, (batch, seq, dim), as a list: whether it skips this layer's block, since it does no harm."""
        probe, bias, eps = self.fitted["probe"][layer.layer_id], self.fitted["bias"][layer.layer_id], layer.ffn_norm.eps
        if is_one_row(h):  # in fewer operations
            h = h.float().view(-1)
            size = torch.dot(h, h).item() / len(h) + eps
            harm = [torch.dot(h, probe).item() / size**0.5 + bias]
        else:
            h = h.float().flatten(0, 1)  # -> (tokens, dim)
            size = h.square().mean(-1) + eps
            harm = (h @ probe * size.rsqrt() + bias).tolist()  # logarithms of nats
        if step.trace is not None and step.trace.cosines:
            step.trace.record_cosine(layer.layer_id, [math.exp(value) for value in harm], [n > 0 for n in left])
        return [n > 0 and value < self.log_budget for n, value in zip(left, harm)]

    def stand_in(self, layer, h):
        """temp, (batch, seq, dim): h and the map of the layer's block."""
        down, up, mean = (self.fitted[name][layer.layer_id] for name in ("down", "up", "mean"))
        return h + linear(linear(layer.ffn_norm(h), down), up) + mean

    def add_feed_forward(self, layer, h, step, active=None):
        """The layer's own, except that a map stands in for it where not active."""
        temp = layer.add_feed_forward(h, step, active)
        if active is None or active.all():
            return temp
        return torch.where(active[..., None].to(h.device), temp, self.stand_in(layer, h))  # -> (batch, seq, 1)

    def shifted(self, shift):
        """The same with a budget of e^-shift as many nats: it skips less."""
        return StandIns(self.fitted, self.log_budget - shift, self.most, self.warm_up_index)

    def thresholds(self, n_layers):
        """The budget in nats, per layer: what the page of a trace shows beside the predicted harm."""
        return [math.exp(self.log_budget)] * n_layers


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


def at_ratio(model, parts, skip, most, windows, warm_up_index=WARM_UP_INDEX, low=-3.0, high=12.0):
    """The StandIns whose budget skips the share `skip` of the blocks of windows: e^-shift nats, from low to high."""
    nat = StandIns(parts, 0.0, most, warm_up_index)

    def at(shift):
        policy = nat.shifted(shift)
        return policy, skip_ratio(model, policy, windows)

    return bring_to(at, low, high, skip)[0]


def load(path, model):
    """(tensors by PARTS, on the model's device; what the file says of itself). ValueError for another model's file."""
    weight = model.tok_embeddings.weight
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file")
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
    if about.get("weights") != fingerprint(model):
        raise ValueError(f"{path}: fitted for other weights, those of {about.get('model')}: fit these anew")
    return ready(parts, weight.dtype), about


def ready(parts, dtype):
    """The tensors of a fit as StandIns wants them: a list of one tensor per layer each, and the bias as numbers."""
    for name in "down", "up", "mean":
        parts[name] = parts[name].to(dtype)
    return {name: list(parts[name]) for name in PARTS[:-1]} | dict(bias=parts["bias"].tolist())


def fingerprint(model):
    """A number that tells models of one shape apart: the checksum of the final norm, in the dtype that files have."""
    return zlib.crc32(model.norm.weight.to(torch.bfloat16).view(torch.int16).cpu().numpy())


def chat_windows(model, tokenizer, text, n, n_new=192):
    """n windows (ids, prompt_len): REQUESTS about sentences of the text, and the model's greedy answers."""
    sentences = [re.split(r"(?<=[.!?])\s", line.strip())[0] for line in text.split("\n")]
    sentences = [sentence for sentence in sentences if 20 < len(sentence) < 200]
    windows, prompts, batch = [], [], 16
    for i, sentence in enumerate(sentences[:: max(1, len(sentences) // n)][:n]):
        try:
            message = REQUESTS[i % len(REQUESTS)].format(sentence)
            prompts.append(tokenizer.chat([dict(role="user", content=message)]))
        except ValueError:  # no chat template: a model that goes on writing
            prompts.append(tokenizer.encode(sentence))
    for start in range(0, len(prompts), batch):
        windows += written_windows(model, prompts[start : start + batch], n_new, 0, 0.0, tokenizer.eos_ids)
    return [(ids, prompt_len) for ids, prompt_len in windows if len(ids) - prompt_len > WARM_UP_INDEX + 9]


def gather(model, tokenizer, options):
    """(windows to fit on, text held out, chat held out): of each file the last eighth, and the last chats."""
    windows, text_held, chat_held, n_held = [], [], [], len(REQUESTS)
    for file in options.text:
        text = read_text([file])
        found = text_windows(tokenizer, text, options.tokens // len(options.text), min(512, model.args.max_seq_len))
        n_chats = max(8, options.tokens // len(options.text) // 256)  # of about 128 tokens: half as many as of text
        chat = chat_windows(model, tokenizer, text, n_chats + n_held)
        for some, held, n in (found, text_held, max(1, len(found) // 8)), (chat, chat_held, n_held):
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
    tokenizer, model = load_checkpoint(ckpt, common.find_device(options.device), options.dtype)
    if options.rank > model.args.dim:
        raise ValueError(f"--rank {options.rank} is more than the model's width {model.args.dim}")
    windows, text_held, chat_held = gather(model, tokenizer, options)
    fitted = fit_twice(model, windows, options.rank, options.seed)
    parts = ready(fitted, model.tok_embeddings.weight.dtype)
    budgets, search = [], {}
    for skip in common.progress([0.05, 0.1, 0.15, 0.2, 0.25, 0.3], "budgets"):
        log_budget = at_ratio(model, parts, skip, cap(model, skip), chat_held, **search).log_budget
        search = dict(low=-log_budget - 1, high=-log_budget)  # for the next one, which is larger
        budgets.append([skip, log_budget])
    reference, measured = {}, {}
    tried = {"dense": -math.inf, "budget of 15 % of chat": budgets[2][1], "budget of 25 % of chat": budgets[4][1]}
    for name, log_budget in tried.items():
        policy = StandIns(parts, log_budget, model.args.n_layers)
        measured[name] = quality(model, text_held, policy, reference)
    about = dict(model=common.model_name(ckpt), weights=fingerprint(model), rank=options.rank, seed=options.seed,
                 budgets=budgets, quality=list(measured.values()), corpus=[Path(file).name for file in options.text],
                 tokens=sum(len(ids) for ids, _ in windows), text_held=text_held, chat_held=chat_held)
    save_file({name: value.contiguous().cpu() for name, value in fitted.items()}, out,
              {name: common.to_json(value) for name, value in about.items()})
    print(*quality_table(measured), f"written to {out}", sep="\n")


if __name__ == "__main__":
    common.run_command(main)
