"""
From a checkpoint to skip settings that keep their promise.

    python calibrate.py --ckpt llama-2-7b --text wiki.train.raw --skip 0.25

measures the cosine before and after each feed-forward block (Figure 2 of the paper), finds the cold regions, plans
settings that skip the wanted share of blocks by replaying Algorithm 1 over what was measured, tries them on text held
out, and writes the best as skip.json beside the checkpoint, where generate.py finds it. --text is optional.

    python calibrate.py --cosines cosines.csv --skip 0.25 --out skip.json

plans from recorded cosines alone (one row per token, one column per layer), with no model in memory. With
--rows 1,2,4,8 it prints what such settings save in batches.
"""

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)
import functools
import math
import sys
from argparse import ArgumentTypeError
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path

import numpy

import policies
from fast import parallel
from load_weights import load, read_checkpoint
from skip import FFNSkip
from support import common
from support.measuring import (
    bring_to,
    cold_regions,
    decisions,
    measure,
    plan,
    quality,
    quality_table,
    read_cosines,
    read_text,
    replay,
    saved_in_batches,
    skip_ratio,
    text_windows,
    variance_shares,
    written_text,
)

NEVER = 2.0  # a threshold no cosine reaches


def skip_per_layer(cosines, cold_s, cold_e, warm_up_index, threshold):
    """
    FFNSkip with k=1 and one threshold per layer. A high cosine in layer i makes layer i + 1 skip. So the threshold of
    layer i is the cosine at which that of layer i + 1 is expected to be `threshold`, by least squares over the tokens.
    """
    x, y = cosines[:, :-1].double(), cosines[:, 1:].double()
    slope = ((x - x.mean(0)) * (y - y.mean(0))).mean(0) / x.var(0, unbiased=False).clamp(min=1e-12)
    slope = slope.clamp(min=0.05)  # where the next cosine does not follow, nearly all tokens skip, or none
    thresholds = (x.mean(0) + (threshold - y.mean(0)) / slope).clamp(-NEVER, NEVER).tolist() + [NEVER]
    for layer in range(len(thresholds)):
        if not cold_s <= layer < cold_e:
            thresholds[layer] = NEVER
    return FFNSkip(cold_s, cold_e, thresholds, warm_up_index, k=1)


def candidates(cosines, cold_s, cold_e, warm_up_index):
    """Name -> make(threshold): Algorithm 1 as printed, and what is tried against it."""
    found = {"as printed": functools.partial(FFNSkip, cold_s, cold_e, warm_up_index=warm_up_index)}
    for k in 1, 2:
        found[f"k={k}"] = functools.partial(FFNSkip, cold_s, cold_e, warm_up_index=warm_up_index, k=k)
    name = "k=1, a threshold per layer"
    if cold_e - cold_s > 1:
        found[name] = functools.partial(skip_per_layer, cosines, cold_s, cold_e, warm_up_index)
    if cold_e - cold_s > 2:
        later = cold_s + 1
        found[f"{name}, cold_s {later}"] = functools.partial(skip_per_layer, cosines, later, cold_e, warm_up_index)
    return found


def verify(model, windows, reference, cosines, make, target):
    """
    (policy, quality) of the candidate at the target: planned, tried on windows that were not measured, planned again by
    what was missed; None if no try comes within 0.01. It goes on to 0.005, so that all are compared at one ratio.
    """
    most = replay(cosines, make(-1.01))
    if most < target:
        return None

    def at(share):
        policy, _ = plan(cosines, make, share)
        found = quality(model, windows, policy, reference)
        return (policy, found), found["ffn_skip_ratio"]

    best, ratio = bring_to(at, most, 0.0, target, tolerance=0.005, tries=6, first=target)
    if abs(ratio - target) > 0.01:
        return None
    return best


def find_ratios(cosines, policy, ratio_of):
    """
    [threshold shift, ratio] pairs, by which `generate.py --skip R` plans, from 1% up to all that the policy can skip:
    the shifts are planned by replay, and ratio_of(policy) says what they really skip.
    """

    def at(shift):
        return shift, replay(cosines, policies.shifted(policy, shift))

    pairs = []
    shares = 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8
    for wanted in common.progress(shares, "other shares"):
        if at(-0.9)[1] >= wanted >= at(0.9)[1]:
            shift = round(bring_to(at, -0.9, 0.9, wanted, tolerance=0.0005, tries=30)[0], 6)
            pairs.append([shift, round(ratio_of(policies.shifted(policy, shift)), 4)])
    return pairs


def parse_args(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    common.add_model_arguments(parser)
    add("--skip", type=float, default=0.25, metavar="R",
        help="share of all FFN blocks to skip past the warm-up (default 0.25)")
    add("--text", nargs="+", metavar="FILE", help='text, plain or JSON lines with a key "text"; default: its own')
    add("--max-tokens", type=common.positive, default=4608, metavar="N", help="of text to work on (default 4608)")
    add("--warm-up-index", type=int, default=25, metavar="N", help="tokens 0 to N of a text run in full (default 25)")
    add("--out", metavar="FILE", help="where to write the settings; default: beside the checkpoint")
    add("--save-cosines", metavar="FILE", help="write the cosines as CSV, one row per token and one column per layer")
    add("--cosines", metavar="FILE", help="plan from such a file, without a model")
    add("--rows", metavar="N,N", help="print which blocks are saved in batches of so many rows")
    options = parser.parse_args(argv)
    if not 0 < options.skip < 1:
        parser.error(f"--skip {options.skip} is not a share between 0 and 1")
    if options.warm_up_index < -1:
        parser.error(f"--warm-up-index {options.warm_up_index} is below -1")
    try:
        options.rows = [common.positive(n) for n in options.rows.split(",")] if options.rows else []
    except (ValueError, ArgumentTypeError):
        parser.error(f"--rows {options.rows}: expected whole numbers above 0 with commas between")
    if options.cosines and not (options.out or options.ckpt or options.rows):
        parser.error("--cosines needs --out FILE, or --ckpt to know which checkpoint the settings are for")
    return options


def gather_windows(model, tokenizer, options, texts):
    """
    Windows to measure on and windows held out, two thirds and one third of --max-tokens, as many of each of texts,
    {file: text}, or of what the model writes; and a name for the text.
    """
    size, least = min(512, model.args.max_seq_len), options.warm_up_index + 9  # tokens per window
    windows_of = {}
    for file, text in texts.items():
        windows_of[file] = text_windows(tokenizer, text, options.max_tokens // len(options.text), size)
    if not texts:
        begin = tokenizer.bos_id
        if begin is None:
            begin = min(tokenizer.eos_ids, default=None)
        if begin is None:
            raise ValueError("the tokenizer names no token that begins or ends a text: give --text")
        n_texts = max(2, min(8, options.max_tokens // (size - 1)))
        written = written_text(model, n_texts, size - 1, options.seed, begin)
        windows_of["the model's own text"] = [([begin, *ids], 1) for ids in written.tolist()]
    ordered = []  # by their place in their file, so that the ends of all are held out
    for file, windows in windows_of.items():
        windows = [(ids, prompt_len) for ids, prompt_len in windows if len(ids) - prompt_len >= least]
        if not windows:
            raise ValueError(f"{file}: too little text, or too few --max-tokens: of each file a window of at least "
                             f"{least} tokens is needed")
        ordered += [(i / len(windows), window) for i, window in enumerate(windows)]
    windows = [window for _, window in sorted(ordered, key=itemgetter(0))]
    if len(windows) < 2:
        raise ValueError(f"too little text: two windows of at least {least} tokens are needed, "
                         "one to measure on and one to verify on")
    held_out = max(1, len(windows) // 3)
    return windows[:-held_out], windows[-held_out:], ", ".join(Path(file).name for file in windows_of)


def choose(model, held_out, cosines, makers, options):
    """
    {name: (policy, quality)} of the candidates that reach the share --skip of the text held out, the one nearest to the
    dense model first. Prints their qualities.
    """
    reference, found = {}, {}
    nothing = FFNSkip(0, 0, math.inf, options.warm_up_index)
    qualities = {"dense": quality(model, held_out, nothing, reference)}
    for name, make in makers.items():
        best = verify(model, held_out, reference, cosines, make, options.skip)
        if best is not None:
            found[name], qualities[name] = best, best[1]
    print(*quality_table(qualities), sep="\n", flush=True)
    return dict(sorted(found.items(), key=lambda item: item[1][1]["kl"]))


def describe_curve(cosines, makers, cold_s, cold_e, corpus):
    """Print the curve, the cold regions, and what Algorithm 1 and two of the candidates skip at usual thresholds."""
    curve = cosines.mean(0).tolist()
    low = min(curve[cold_s:cold_e], default=0) - 0.01  # where the bars begin; they end at 1
    print(f"mean cosine before and after each FFN block, {len(cosines)} tokens of {corpus}:")
    for i, value in enumerate(curve):
        bar = "█" * round(40 * max(0.0, value - low) / (1 - low))
        cold = "" if cold_s <= i < cold_e else "  cold"
        print(f"  layer {i:2}  {value:.3f}  {bar}{cold}")
    print(f"cold regions: [0, {cold_s}) and [{cold_e}, {len(curve)})")
    by_layer, by_token = variance_shares(cosines[:, cold_s:cold_e])
    print(f"between them {by_layer:.0%} of the variance of the cosines is the layers', {by_token:.0%} the tokens'")
    print("share of FFN blocks skipped, as predicted, and of tokens that skip none:")
    rows, most = [["sim_threshold", *list(makers)[:3], "none"]], cosines[:, cold_s:cold_e].amax(1)
    for threshold in 0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99:
        ratios = [replay(cosines, makers[name](threshold)) for name in rows[0][1:-1]]
        ratios.append((most < threshold).double().mean().item())
        rows.append([f"{threshold:.2f}", *(f"{ratio:.3f}" for ratio in ratios)])
    print(*common.table(rows), sep="\n", flush=True)


def print_batches(cosines, makers, options):
    """Print which share of the blocks no row of a batch needs, with the candidates that skip --skip of one row's."""
    rows = [[f"at {options.skip} no row needs, of", *(f"{n} rows" for n in options.rows)]]
    for name, make in makers.items():
        policy, _ = plan(cosines, make, options.skip)
        if policy is not None:
            shares = saved_in_batches(decisions(cosines, policy), options.rows)
            rows.append([name, *(f"{share:.1%}" for share in shares)])
    print(*common.table(rows), sep="\n", flush=True)


def no_setting(cosines, makers, cold_s, cold_e, skip):
    """The ValueError that says why no candidate skips the share `skip`."""
    most = max(replay(cosines, make(-1.01)) for make in makers.values())
    regions = f"with the cold regions [0, {cold_s}) and [{cold_e}, {cosines.size(1)})"
    if most < skip:
        return ValueError(f"a share of {skip} cannot be reached: at most {most:.3f} is possible {regions}")
    return ValueError(f"no setting comes within 0.01 of a share of {skip} {regions}: try another --skip")


def main(argv=None):
    options = parse_args(argv)
    ckpt = None
    if options.ckpt or not options.cosines:
        ckpt = common.find_checkpoint(options.ckpt)
    out = None  # where there is only --rows to print
    if options.out or ckpt:
        out = Path(options.out) if options.out else policies.default_out(options.ckpt, policies.settings_path(ckpt))
    name = common.model_name(ckpt) if ckpt else Path(options.out or options.cosines).stem
    common.check_outputs(out, options.save_cosines)
    texts = {file: read_text([file]) for file in options.text or ()}  # mistakes in them come before minutes of loading
    if options.cosines:
        model = None
        cosines, corpus = read_cosines(options.cosines), Path(options.cosines).name
        n_layers = read_checkpoint(ckpt)[0].n_layers if ckpt else cosines.size(1)
        if n_layers != cosines.size(1):
            raise ValueError(f"{options.cosines}: {cosines.size(1)} columns, and {name} has {n_layers} layers")
    else:
        tokenizer, model = load(ckpt, common.find_device(options.device), options.dtype)
        print(f"[{name}: gathering text]", file=sys.stderr)
        windows, held_out, corpus = gather_windows(model, tokenizer, options, texts)
        cosines = measure(model, windows, options.warm_up_index).cpu()
    curve = cosines.mean(0)
    cold_s, cold_e = cold_regions(curve)
    makers = candidates(cosines, cold_s, cold_e, options.warm_up_index)
    describe_curve(cosines, makers, cold_s, cold_e, corpus)
    if options.rows:
        print_batches(cosines, makers, options)
    if out is None:
        return

    if model:
        found = choose(model, held_out, cosines, makers, options)
        ratio_of = functools.partial(skip_ratio, model, windows=held_out)
        n_tokens = sum(len(ids) for ids, _ in held_out)
        note = f"chosen for the least KL divergence from the dense model, on {n_tokens} tokens held out"
    else:
        policy, ratio = plan(cosines, makers["as printed"], options.skip)
        found = {"as printed": (policy, None)} if policy and abs(ratio - options.skip) <= 0.01 else {}
        ratio_of = functools.partial(replay, cosines)
        note = "planned from recorded cosines, not verified on the weights"
    if not found:
        raise no_setting(cosines, makers, cold_s, cold_e, options.skip)
    chosen = next(iter(found))
    policy, measured = found.pop(chosen)
    predicted, achieved, verified = replay(cosines, policy), None, "not verified"
    if measured:
        achieved = measured["ffn_skip_ratio"]
        verified = f"achieved {achieved:.3f}"

    settings = dict(model=name, n_layers=len(curve), **asdict(policy))
    settings["weights_checksum"] = common.fingerprint(model) if model else None
    settings["ratios"] = find_ratios(cosines, policy, ratio_of)
    settings |= dict(target_skip=options.skip, predicted_skip=predicted, achieved_skip=achieved)
    settings |= dict(chosen=chosen, quality=measured, over={other: result for other, (_, result) in found.items()})
    settings |= dict(corpus=corpus, tokens=len(cosines), seed=options.seed)
    settings |= dict(curve=[round(value, 4) for value in curve.tolist()], note=note)
    if parallel.rank > 0:
        return  # the first process writes what they have measured together
    common.write_whole(out, common.to_json(settings, indent=1) + "\n")
    if options.save_cosines:
        write = functools.partial(numpy.savetxt, X=cosines, fmt="%.5f", delimiter=",")
        common.write_whole(options.save_cosines, write)
    print(f"chosen: {chosen}; predicted {predicted:.3f}; {verified}; written to {out}")


if __name__ == "__main__":
    common.run_command(main, torchrun=True)
