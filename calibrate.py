"""
From a checkpoint to skip settings that keep their promise.

    python calibrate.py --ckpt llama-2-7b --text wiki.train.raw --target-skip 0.25

measures the cosine before and after each feed-forward block (Figure 2 of the paper), finds the cold regions, plans settings
that skip the wanted share of blocks by replaying Algorithm 1 over what was measured, tries them for real on text held out, and
writes the best as skip.json beside the checkpoint, where generate.py finds it. With no --text the model writes its own.

    python calibrate.py --cosines cosines.csv --target-skip 0.25 --out skip.json

plans from recorded cosines alone (one row a token, one column a layer), with no model in memory.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import load_weights
from generate import find_checkpoint, find_device, generate, model_name, positive, settings_path
from skip import FFNSkip, Trace

WINDOW = 512  # tokens of text that are forwarded at once
NEVER = 2.0  # a threshold no cosine reaches


def read_text(files):
    """The text of the files, one after the other: JSON lines with a key "text", or plain (as WikiText is)."""
    parts = []
    for file in map(Path, files):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        if file.suffix in (".jsonl", ".json"):
            for number, line in enumerate(text.splitlines(), 1):
                try:
                    parts += [json.loads(line)["text"]] if line.strip() else []
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f'{file}, line {number}: not a JSON object with a key "text"') from None
        else:
            parts.append(text)
    return "\n\n".join(parts)


def text_windows(tokenizer, text, n_tokens, window=WINDOW):
    """Windows (tokens, prompt_len 0) of up to `window` ids, n_tokens in all, each begun as the tokenizer begins a text."""
    begin = tokenizer.encode("")
    ids = tokenizer.encode(text[: 12 * n_tokens], bos=False)[:n_tokens]
    size = window - len(begin)
    return [(begin + ids[i : i + size], 0) for i in range(0, len(ids), size)]


def written_windows(model, prompts, n_new, seed):
    """Windows (tokens, prompt_len) of prompts, lists of ids, each with n_new tokens that the model drew at temperature 1."""
    steps = list(generate(model, prompts, n_new, temperature=1.0, seed=seed))
    return [(prompt + [step[row] for step in steps], len(prompt)) for row, prompt in enumerate(prompts)]


def forward(model, windows, policy=None):
    """Yield (tokens, logits (seq, vocab), past (seq,) bool: not prompt, Trace) of each window, in one parallel pass."""
    device = model.tok_embeddings.weight.device
    for number, (ids, prompt_len) in enumerate(windows, 1):
        if sys.stderr.isatty():
            print(f"\r  window {number} of {len(windows)} ", end="", file=sys.stderr, flush=True)
        trace, tokens = Trace(), torch.tensor([ids], device=device)
        logits = model(tokens, policy=policy, prompt_len=prompt_len, trace=trace)[0]
        yield tokens[0], logits, trace.token_index[0], trace
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def measure(model, windows, warm_up_index):
    """(tokens, n_layers) fp32: cosine before and after each FFN block, of the dense model, for tokens past the warm-up."""
    n_layers = model.args.n_layers
    watch = FFNSkip(0, n_layers, math.inf, warm_up_index)  # measures all, skips nothing
    cosines = [trace.cosine[:, 0, index > warm_up_index].T for _, _, index, trace in forward(model, windows, watch)]
    return torch.cat(cosines)


def cold_regions(curve):
    """
    (cold_s, cold_e) from the mean cosine of each layer. In Figure 2 the curve falls over the first layers, rises, and falls
    over the last ones; the rising part is not cold. So:
    - layers at either end that lie lower than the middle half of the layers by more than its whole range are cold;
    - of what is left, smoothed over three layers, cold_s is the first layer within a tenth of the curve's range of the
      lowest among its first quarter, and cold_e follows the last layer as near to the highest among its last quarter.
    """
    curve = torch.as_tensor(curve, dtype=torch.float64)
    quarter = max(1, len(curve) // 4)
    middle = curve[quarter:-quarter] if len(curve) > 2 * quarter else curve
    inside = (curve >= 2 * middle.min() - middle.max()).nonzero()
    start, end = inside[0].item(), inside[-1].item() + 1
    left = curve[start:end]
    smooth = torch.stack([left[max(0, i - 1) : i + 2].mean() for i in range(len(left))])
    near = 0.1 * (smooth.max() - smooth.min())
    low = (smooth[:quarter] <= smooth[:quarter].min() + near).nonzero()[0].item()
    high = (smooth >= smooth[-quarter:].max() - near).nonzero()[-1].item() + 1
    return start + low, start + max(low, high)


def replay(cosines, policy):
    """
    The ffn_skip_ratio of an FFNSkip over recorded cosines (tokens, n_layers), all past the warm-up, and full_every None: a
    prediction, since what is skipped would change later cosines. The walk of skip.py, with a layer's tokens at once.
    """
    each = policy.sim_threshold if isinstance(policy.sim_threshold, (list, tuple)) else [policy.sim_threshold] * cosines.size(1)
    watch = torch.ones(len(cosines), dtype=torch.bool)
    left = torch.zeros(len(cosines), dtype=torch.long)  # FFN blocks still to skip
    skipped = 0
    for i in range(policy.cold_s, policy.cold_e):
        skip_state = left > 0
        skipped += skip_state.sum().item()
        reached = watch & ~skip_state & (cosines[:, i].double() >= each[i])  # in double, as Python compares
        if not policy.recheck:
            watch &= left != 1  # its last block to skip: the rest of the token runs in full
        left = torch.where(reached, policy.k or cosines.size(1), (left - 1).clamp(min=0))
    return skipped / cosines.numel()


def plan(cosines, make, wanted):
    """(policy, predicted ratio): make(threshold) with the threshold bisected until replaying it skips the wanted share."""
    low, high = -1.01, 1.01
    best = make(low), replay(cosines, make(low))
    if best[1] < wanted:
        return None, best[1]
    for _ in range(14):
        middle = (low + high) / 2
        ratio = replay(cosines, make(middle))
        if abs(ratio - wanted) < abs(best[1] - wanted):
            best = make(middle), ratio
        low, high = (middle, high) if ratio > wanted else (low, middle)
    return best


def each_layer(cosines, cold_s, cold_e):
    """
    threshold -> one threshold a layer. What layer i decides is whether the next block runs; so its own threshold is the
    cosine at which the next block's, predicted from it by a straight line over the recorded tokens, is the one given.
    """
    x, y = cosines[:, :-1].double(), cosines[:, 1:].double()
    slope = ((x - x.mean(0)) * (y - y.mean(0))).mean(0) / x.var(0, unbiased=False).clamp(min=1e-12)
    slope = slope.clamp(min=0.05)  # a next block that does not follow: nearly all of its tokens or none

    def thresholds(threshold):
        each = (x.mean(0) + (threshold - y.mean(0)) / slope).clamp(-NEVER, NEVER).tolist() + [NEVER]
        return [each[i] if cold_s <= i < cold_e else NEVER for i in range(len(each))]

    return thresholds


def candidates(cosines, cold_s, cold_e, warm_up_index):
    """Name -> make(threshold): Algorithm 1 as printed, and what is tried against it."""
    made = {"as printed": lambda x: FFNSkip(cold_s, cold_e, x, warm_up_index)}
    for k in (1, 2):
        made[f"k={k}"] = lambda x, k=k: FFNSkip(cold_s, cold_e, x, warm_up_index, k=k)
    for s, e in (cold_s, cold_e), (cold_s + 1, cold_e):
        if e - s > 1:
            thresholds = each_layer(cosines, s, e)
            name = "k=1, a threshold a layer" + (f", cold_s {s}" if s != cold_s else "")
            made[name] = lambda x, s=s, e=e, thresholds=thresholds: FFNSkip(s, e, thresholds(x), warm_up_index, k=1)
    return made


def quality(model, windows, policy, reference):
    """
    Of a policy against the dense model's log-probabilities (a list of (seq, vocab), one a window), over the tokens past the
    warm-up: a dict of the achieved ffn_skip_ratio, perplexity, KL divergence (nats a token) and top-1 agreement.
    """
    total = dict(ffn_skip_ratio=0.0, perplexity=0.0, kl=0.0, top1=0.0)
    counted = 0
    for (tokens, logits, index, trace), dense in zip(forward(model, windows, policy), reference):
        past = index[:-1] > policy.warm_up_index
        log_probs, dense = logits.log_softmax(-1)[:-1][past], dense[:-1][past]
        n = len(log_probs)
        counted += n
        total["ffn_skip_ratio"] += (trace.ffn_skip_ratio(policy.warm_up_index) or 0.0) * n
        total["perplexity"] -= log_probs.gather(1, tokens[1:][past][:, None]).sum().item()
        total["kl"] += (dense.exp() * (dense - log_probs)).sum().item()
        total["top1"] += (dense.argmax(-1) == log_probs.argmax(-1)).sum().item()
    total = {key: value / counted for key, value in total.items()}
    return total | dict(perplexity=math.exp(total["perplexity"]))


def verify(model, windows, reference, cosines, make, target):
    """
    (policy, predicted ratio, quality) of the try nearest the target: planned, tried, and planned again by what was missed.
    None if no try comes within 0.01. It goes on to 0.005, so that candidates are compared at the same ratio.
    """
    wanted, best, missed = target, None, math.inf
    for _ in range(6):
        policy, predicted = plan(cosines, make, min(max(wanted, 0.0), 1.0))
        if policy is None:
            break
        found = quality(model, windows, policy, reference)
        miss = target - found["ffn_skip_ratio"]
        if abs(miss) < missed:
            best, missed = (policy, predicted, found), abs(miss)
        if missed <= 0.005:
            break
        wanted += miss
    return best if missed <= 0.01 else None


def draw_curve(curve, cold_s, cold_e):
    """Lines for a terminal: a bar a layer, from the lowest cosine that is not cold to 1."""
    low = min(curve[cold_s:cold_e], default=0) - 0.01
    for i, value in enumerate(curve):
        bar = "█" * round(40 * max(0.0, value - low) / (1 - low))
        yield f"  layer {i:2}  {value:.3f}  {bar}{'' if cold_s <= i < cold_e else '  cold'}"


def plot_curve(path, curve, cold_s, cold_e, title):
    """Figure 2 of the paper: the curve over the layers, cold regions red, the rest yellow."""
    import matplotlib

    matplotlib.use("Agg")  # draws into files, with or without a screen
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.axvspan(-0.5, cold_s - 0.5, color="red", alpha=0.15, label="cold")
    axes.axvspan(cold_s - 0.5, cold_e - 0.5, color="gold", alpha=0.2, label="may skip")
    axes.axvspan(cold_e - 0.5, len(curve) - 0.5, color="red", alpha=0.15)
    axes.plot(curve, marker=".", color="black")
    axes.set(xlabel="layer", ylabel="cosine before and after the FFN", title=title, xlim=(-0.5, len(curve) - 0.5))
    axes.legend(loc="lower center")
    figure.savefig(path, dpi=150)


def is_number(cell):
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def read_cosines(file):
    """(tokens, n_layers) of a CSV file, one row a token, one column a layer, with or without a header."""
    rows = []
    with open(file, newline="", encoding="utf-8") as lines:
        for number, row in enumerate(csv.reader(lines), 1):
            try:
                values = [float(cell) for cell in row]
                if not all(-1.01 <= value <= 1.01 for value in values):
                    raise ValueError
            except ValueError:
                if number == 1 and not any(map(is_number, row)):
                    continue  # a header
                raise ValueError(f"{file}, line {number}: not a row of cosines") from None
            if rows and len(values) != len(rows[0]):
                raise ValueError(f"{file}, line {number}: {len(values)} columns, and the rows before have {len(rows[0])}")
            rows += [values] if values else []
    if not rows:
        raise ValueError(f"{file}: no cosines in it: expected one row a token, one column a layer")
    return torch.tensor(rows)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    add = parser.add_argument
    add("--ckpt", help="checkpoint, as for generate.py; default: the demo model")
    add("--target-skip", type=float, default=0.25, metavar="R", help="share of all FFN blocks to skip past the warm-up (0.25)")
    add("--text", nargs="+", metavar="FILE", help='text, plain or JSON lines with a key "text"; default: the model\'s own')
    add("--generated", action="store_true", help="measure on 128 tokens generated after prompts from the text, as the paper")
    add("--samples", type=positive, default=8, metavar="N", help="texts to generate, where any are (default 8)")
    add("--max-tokens", type=positive, default=4608, metavar="N", help="tokens to measure and to verify on (default 4608)")
    add("--warm-up-index", type=int, default=25, metavar="N", help="tokens 0 to N of a text run in full (default 25)")
    add("--seed", type=int, default=0, help="of all random choices (default 0)")
    add("--device", help="as for generate.py")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="as for generate.py")
    add("--out", metavar="FILE", help="where to write the settings; default: beside the checkpoint")
    add("--save-cosines", metavar="FILE", help="write the measured cosines as CSV, one row a token, one column a layer")
    add("--cosines", metavar="FILE", help="plan from such a file, without a model")
    add("--plot", metavar="FILE", help="draw the curve as Figure 2 does (needs matplotlib)")
    options = parser.parse_args(argv)
    if not 0 < options.target_skip < 1:
        parser.error(f"--target-skip {options.target_skip} is not a share between 0 and 1")
    if options.warm_up_index < -1:
        parser.error(f"--warm-up-index {options.warm_up_index} is below -1")
    if options.cosines and not (options.out or options.ckpt):
        parser.error("--cosines needs --out FILE, or --ckpt to know which checkpoint the settings are for")
    return options


def check_outputs(*files):
    """Raise ValueError if one of the files cannot be written, before minutes of work and without writing anything."""
    for file in map(Path, filter(None, files)):
        problem = (
            "it is a folder" if file.is_dir() else "there is no such folder" if not file.parent.is_dir()
            else None if os.access(file if file.exists() else file.parent, os.W_OK) else "no permission"
        )  # fmt: skip
        if problem:
            raise ValueError(f"{file}: cannot be written: {problem}")


def gather_windows(model, tokenizer, options):
    """What to measure on, and what to verify on: two thirds and one third of --max-tokens. And what to call it."""
    window = min(WINDOW, model.args.max_seq_len)
    n, corpus = options.max_tokens, ", ".join(Path(file).name for file in options.text or ["the model's own text"])
    if options.text is None:
        begin = [tokenizer.bos_id if tokenizer.bos_id is not None else min(tokenizer.eos_ids)]
        n_new = window - 1
        windows = written_windows(model, [begin] * max(2, min(options.samples, n // n_new)), n_new, options.seed)
    else:
        windows = text_windows(tokenizer, read_text(options.text), n, window)
        if options.generated:
            corpus += ", 128 tokens generated after each of its prompts"
            starts = torch.randperm(max(1, len(windows)), generator=torch.Generator().manual_seed(options.seed)).tolist()
            prompts = [windows[i][0][: min(128, window // 2)] for i in starts[: options.samples]]
            windows = written_windows(model, prompts, 128, options.seed)
    windows = [(ids, prompt_len) for ids, prompt_len in windows if len(ids) - prompt_len > options.warm_up_index + 8]
    if len(windows) < 2:
        raise ValueError(f"too little text: two windows of more than {options.warm_up_index + 8} tokens are needed, "
                         f"one to measure on and one to verify on")  # fmt: skip
    held_out = max(1, len(windows) // 3)
    return windows[:-held_out], windows[-held_out:], corpus


def main(argv=None):
    options = parse_args(argv)
    target, say = options.target_skip, lambda *lines: print(*lines, sep="\n", file=sys.stderr, flush=True)
    out = Path(options.out) if options.out else settings_path(find_checkpoint(options.ckpt))
    check_outputs(out, options.plot, options.save_cosines)
    if options.plot and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs the package matplotlib: pip install matplotlib")
    if options.cosines:
        cosines, corpus = read_cosines(options.cosines), Path(options.cosines).name
        name = model_name(find_checkpoint(options.ckpt)) if options.ckpt else out.stem
        n_layers = load_weights.read_checkpoint(find_checkpoint(options.ckpt))[0].n_layers if options.ckpt else cosines.size(1)
        if n_layers != cosines.size(1):
            raise ValueError(f"{options.cosines}: {cosines.size(1)} columns, and {name} has {n_layers} layers")
    else:
        ckpt = find_checkpoint(options.ckpt)
        name = model_name(ckpt)
        tokenizer = load_weights.load_tokenizer(ckpt)
        model = load_weights.load_model(ckpt, find_device(options.device), options.dtype)
        say(f"[{name}: gathering text]")
        windows, held_out, corpus = gather_windows(model, tokenizer, options)
        say(f"[measuring cosines over {sum(len(ids) for ids, _ in windows)} tokens]")
        cosines = measure(model, windows, options.warm_up_index).cpu()
    curve = cosines.mean(0).tolist()
    cold_s, cold_e = cold_regions(curve)
    print(f"mean cosine before and after each FFN block, {len(cosines)} tokens of {corpus}:")
    print(*draw_curve(curve, cold_s, cold_e), sep="\n")
    print(f"cold regions: [0, {cold_s}) and [{cold_e}, {len(curve)})")
    made = candidates(cosines, cold_s, cold_e, options.warm_up_index)

    print("share of FFN blocks skipped, as predicted:", "  sim_threshold" + "".join(f"{k:>12}" for k in list(made)[:3]), sep="\n")
    for threshold in (0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99):
        print(f"  {threshold:13.2f}" + "".join(f"{replay(cosines, made[k](threshold)):12.3f}" for k in list(made)[:3]))

    if options.cosines:
        policy, predicted = plan(cosines, made["as printed"], target)
        chosen, found, tried = "as printed", None, {}
        most = predicted
    else:
        say(f"[trying settings on {sum(len(ids) for ids, _ in held_out)} tokens held out]")
        reference = [logits.log_softmax(-1) for _, logits, _, _ in forward(model, held_out)]
        dense = quality(model, held_out, FFNSkip(0, 0, math.inf, options.warm_up_index), reference)
        print(f"on text held out:\n  {'':32} skipped  perplexity      KL   top-1 as dense\n"
              f"  {'dense':32} {0:7.3f} {dense['perplexity']:11.2f} {0:7.3f} {1:9.1%}", flush=True)  # fmt: skip
        tried, most = {}, max(replay(cosines, make(-1.01)) for make in made.values())
        for candidate, make in made.items():
            result = verify(model, held_out, reference, cosines, make, target)
            if result:
                tried[candidate] = result
                q = result[2]
                print(f"  {candidate:32} {q['ffn_skip_ratio']:7.3f} {q['perplexity']:11.2f} {q['kl']:7.3f} {q['top1']:9.1%}",
                      flush=True)  # fmt: skip
        chosen = min(tried, key=lambda candidate: tried[candidate][2]["kl"], default=None)
        policy, predicted, found = tried.get(chosen, (None, None, None))
    if policy is None:
        raise ValueError(f"a share of {target} cannot be reached: at most {most:.3f} of all blocks can be skipped "
                         f"between the cold regions [0, {cold_s}) and [{cold_e}, {len(curve)})")  # fmt: skip
    if options.plot:
        plot_curve(options.plot, curve, cold_s, cold_e, f"{name}, {corpus}")
    if options.save_cosines:
        with open(options.save_cosines, "w", newline="") as file:
            csv.writer(file).writerows([f"{value:.5f}" for value in row] for row in cosines.tolist())
    settings = dict(
        model=name, n_layers=len(curve), **asdict(policy), target_skip=target, predicted_skip=predicted,
        achieved_skip=found and found["ffn_skip_ratio"], chosen=chosen, quality=found,
        over={candidate: result[2] for candidate, result in tried.items() if candidate != chosen},
        corpus=corpus, tokens=len(cosines), seed=options.seed, curve=[round(value, 4) for value in curve],
        note="planned from recorded cosines, not verified on the weights" if found is None else
        f"chosen for the least KL divergence from the dense model, on {sum(len(ids) for ids, _ in held_out)} tokens held out",
    )  # fmt: skip
    out.write_text(json.dumps(settings, indent=1) + "\n")
    achieved = f", achieved {found['ffn_skip_ratio']:.3f}" if found else ""
    print(f"chosen: {chosen}; predicted {predicted:.3f}{achieved}; written to {out}")


if __name__ == "__main__":
    load_weights.run_command(main)
