"""
Measure skip policies on a task: a table on the screen and a CSV, one row per policy and ratio.

    python experiments/evaluate.py perplexity --data wiki.test.raw --calibration wiki.train.raw
    python experiments/evaluate.py factoid --data FreebaseQA-eval.json --policies dense,ffnskip,random --skip 0.05,0.25
    python experiments/evaluate.py perplexity --policies ffnskip,mine.py:make --skip 0.25

tasks, and what --data is for each:
  perplexity  text, plain or JSONL with a key "text" (WikiText-2 raw, C4). In windows, each through the real skip path
              in one parallel pass; with --decode token by token, which gives the same. Also KL(dense || policy), top-1
              agreement with dense, and the share of the cache entries read that are missing (holes_read). Without
              --data the model writes the text itself: enough to compare policies, not models
  warmup      the same for several --warm-up-index, all measured over the tokens past the largest of them (Figure 5)
  factoid     FreebaseQA (JSON, or lines "question | answer") or TriviaQA (JSON): 5-shot, greedy, exact match (Table 3)
  mmlu        a folder with dev/ and test/, Hendrycks' CSV files: 5-shot, the likeliest letter, by category (Table 5)
  mtbench     MT-Bench's question.jsonl: answers of both turns, as FastChat's judge reads them (Table 2, Figure 4)
  summarize   CNN/DailyMail, CSV or JSONL: ROUGE-L against the reference by length of the story (Figure 3)
  collapse    prompts (JSONL with "turns" or "text"): repetition, and the first token that differs from the dense text
              (Figure 1)
  worstcase   as collapse: share of tokens for which nothing at all was skipped, by position (Table 6)

Every policy is first brought to the wanted ratio on calibration text, by its own knob and with the same warm-up; the
ratios in the table are those achieved. Policies that skip whole layers come twice: at the same share of FFN blocks
("ffn"), and at the same bytes not read ("bytes"), since a layer saves more. In factoid and mmlu, whose answers end
before a warm-up does, the prompt past its own warm-up is skipped as well. A row is written as soon as it is done; the
same command again skips it.
"""

import sys
import time
import zlib
from dataclasses import fields, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from baselines import POLICIES, calibration_text
from readers import load_text
from table import Table, cell
from tasks import TASKS, Context, full_windows

import common
from load_weights import load_model, load_tokenizer
from measuring import as_windows, bring_to, measure, skip_ratio
from model import dense
from skip import FFNSkip


def edition(name):
    """What a policy's rows are kept under: FILE.py:FACTORY@CHECKSUM, so that a changed file is run again."""
    file, _, _ = name.rpartition(":")
    return f"{name}@{zlib.crc32(Path(file).read_bytes()):08x}" if file else name


def bytes_per_skip(name, model):
    """Bytes of weights not read when the policy called `name` skips one FFN block, and those of the block alone."""
    parts = ["feed_forward"]
    if name not in ("dense", "ffnskip", "printed"):
        parts += getattr(common.find_factory(name), "also_skips", ())
    skipped = 0
    for part, weight in model.layers[0].named_parameters():
        if part.startswith(tuple(parts)):
            skipped += weight.nbytes
    return skipped, common.nbytes(model.layers[0].feed_forward)


def at_ratio(name, model, skip, tokens, settings, warm_up_index, options):
    """(policy, its ratio): a baseline or a policy of a file, brought as near to `skip` of the FFN blocks of tokens."""
    own = {}  # arguments of three policies alone
    if name == "standins":
        own = dict(fitted=common.find_fitted(options, common.find_checkpoint(options.ckpt)))
    if name == "skipdecode":
        own = dict(target_len=options.target_len)
    if name == "static":
        own = {key: settings[key] for key in ("cold_s", "cold_e") if key in settings}
    make = partial(common.find_factory(name), model, tokens=tokens, seed=options.seed, **own)
    windows = as_windows(tokens)

    def at(negative):  # of the share to ask for, since bring_to wants a ratio that falls
        policy = make(-negative, warm_up_index=warm_up_index)
        return policy, skip_ratio(model, policy, windows)

    policy, ratio = at(-skip)
    if abs(ratio - skip) <= 0.005:
        return policy, ratio
    try:  # to ask for more or less than is wanted
        near, near_ratio = bring_to(at, -min(0.99, skip + 0.1), 0.0, skip, tolerance=0.005, tries=6)
    except ValueError:  # some share on the way cannot be had
        return policy, ratio
    if abs(near_ratio - skip) < abs(ratio - skip):
        return near, near_ratio
    return policy, ratio


def at_ratio_ffnskip(base, model, skip, tokens):
    """(policy, its ratio): an FFNSkip with thresholds shifted until it skips the share `skip` of the FFN blocks."""
    windows = as_windows(tokens)
    if skip is None:
        return base, skip_ratio(model, base, windows)
    thresholds = torch.tensor(base.thresholds(model.args.n_layers))
    base = base.shifted(-thresholds[0].item())  # thresholds of one per layer keep their distances from the first

    def at(threshold):
        policy = base.shifted(threshold)
        return policy, skip_ratio(model, policy, windows)

    cosines = measure(model, windows, base.warm_up_index).cpu() - (thresholds - thresholds[0])  # (tokens, layer)
    cosines = cosines[:, base.cold_s : base.cold_e].flatten().sort().values  # the threshold lies among them
    return bring_to(at, cosines[len(cosines) // 50].item(), cosines[-1].item() + 1e-3, skip)


def make_policy(name, model, skip, tokens, settings, warm_up_index, options):
    """(policy, its ratio on tokens) of a row."""
    if name == "dense":
        return dense, 0.0
    if name not in ("ffnskip", "printed"):
        return at_ratio(name, model, skip, tokens, settings, warm_up_index, options)
    settings = dict(sim_threshold=1.0) | settings
    settings.pop("ratios", None)  # --skip is reached on the calibration text instead
    base = common.find_policy("ffnskip", model, settings, warm_up_index=warm_up_index)
    if name == "printed":
        cold_s, cold_e = options.printed_cold or (base.cold_s, base.cold_e)
        base = FFNSkip(cold_s, cold_e, base.sim_threshold, base.warm_up_index)
    return at_ratio_ffnskip(base, model, skip, tokens)


def describe(policy):
    """A policy's settings in a few words, for the table."""
    if policy is dense:
        return ""
    shown = []
    for key, value in sorted(vars(policy).items()):
        if key in ("seed", "warm_up_index") or not isinstance(value, (int, float, list, set, type(None))):
            continue
        if isinstance(value, list) and value and max(value) - min(value) < 1e-9:
            value = value[0]
        if isinstance(value, list):
            value = [round(each, 5) for each in value]
        elif isinstance(value, float):
            value = round(value, 5)
        shown.append(f"{key}={value}".replace(" ", ""))
    return " ".join(shown)


def grid(options):
    """(policy, skip, match, warm-up index) of every row; for dense and a fixed --sim-threshold, skip is None."""
    rows = []
    for warm_up, match, name in product(options.warm_up, options.match, options.policies):
        fixed = name == "dense" or (name in ("ffnskip", "printed") and options.sim_threshold is not None)
        rows += [(name, skip, match, warm_up) for skip in ([None] if fixed else options.skip)]
    return rows


def calibration_tokens(model, tokenizer, options):
    """(batch, seq) ids in windows as long as the task's texts, from all over the file, or what the model writes."""
    if options.calibration is None:
        print("[no --calibration text: the model writes some]", file=sys.stderr)
        return calibration_text(model, None, options.seed)
    text, size = load_text(options.calibration), min(options.target_len, model.args.max_seq_len)
    n = max(1, options.calibration_tokens // size)
    windows = [full_windows(tokenizer, text[len(text) * i // n :], size, size)[0][0] for i in range(n)]
    return torch.tensor(windows, device=model.tok_embeddings.weight.device)


def listed(kind):
    def parse(text):
        values = [kind(part.strip()) for part in text.split(",") if part.strip()]
        if not values:
            raise ValueError("nothing in it")
        return values

    return parse


def parse_args(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--data", metavar="FILE", help="see the tasks above; for mmlu a folder")
    common.add_model_arguments(parser)
    add("--policies", type=listed(str), default=["dense", "ffnskip", "printed", *POLICIES], metavar="A,B",
        help="dense, ffnskip, printed (Algorithm 1 as printed: skip up to cold_e), names in baselines.py, "
        "FILE.py:FACTORY; default: all")
    add("--skip", type=listed(float), default=[0.05, 0.15, 0.25, 0.35], metavar="R,R",
        help="shares of FFN blocks to skip past the warm-up (default 0.05,0.15,0.25,0.35)")
    add("--match", type=listed(str), default=["ffn", "bytes"],
        help="for policies that skip whole layers: ffn, bytes or both")
    add("--warm-up-index", dest="warm_up", type=listed(int), metavar="N,N", help="tokens 0 to N run in full; several "
        "for task warmup, with a = before -1 (default 25; warmup: -1,5,10,15,20,25,30,40,60)")
    add("--calibration", metavar="FILE", help="text, other than --data, on which the ratios are reached; default: the "
        "model's own")
    add("--calibration-tokens", type=common.positive, default=4096, metavar="N", help="how much of it (default 4096)")
    add("--limit", type=common.positive, metavar="N",
        help="tokens (perplexity, warmup: 32768), questions (factoid: 500; mmlu: all, of each subject; mtbench: all), "
        "stories (all), prompts (collapse, worstcase: 32)")
    add("--window", type=common.positive, default=512, metavar="N", help="tokens of a window of text (default 512)")
    add("--decode", action="store_true", help="perplexity: token by token, as generation does, instead of in parallel")
    add("--subjects", type=listed(str), metavar="A,B", help="of MMLU; default: all 57")
    add("--max-new-tokens", type=common.positive, metavar="N", help="of a text (default: mtbench 1024, summarize 256, "
        "worstcase 512, collapse 256)")
    add("--prompt-tokens", type=common.positive, default=128, metavar="N", help="of a prompt from text (default 128)")
    add("--chat", action="store_true", help="the checkpoint's chat template instead of the paper's prompt")
    add("--batch-size", type=common.positive, default=16, metavar="N", help="texts at a time (default 16)")
    add("--output", metavar="CSV", help="default: experiments/results/TASK.csv, without --data TASK_own_text.csv")
    group = common.add_skip_arguments(parser)
    group.add_argument("--printed-cold", type=listed(int), metavar="S,E",
                       help="cold_s and cold_e of `printed` (default: those of ffnskip)")
    options = parser.parse_args(argv)
    if options.data is None and options.task not in ("perplexity", "warmup"):
        parser.error(f"{options.task} needs --data")
    if any(not 0 < skip < 1 for skip in options.skip):
        parser.error("--skip wants shares between 0 and 1")
    if not set(options.match) <= {"ffn", "bytes"}:
        parser.error("--match wants ffn, bytes or both")
    if options.warm_up is None:
        options.warm_up = [-1, 5, 10, 15, 20, 25, 30, 40, 60] if options.task == "warmup" else [25]
    if min(options.warm_up) < -1:
        parser.error(f"--warm-up-index {min(options.warm_up)} is below -1")
    if options.task in ("perplexity", "warmup") and options.window < max(options.warm_up) + 3:
        parser.error(f"--window {options.window} is too short for --warm-up-index {max(options.warm_up)}")
    lengths = dict(mtbench=1024, summarize=256, worstcase=512, collapse=256)
    options.max_new_tokens = options.max_new_tokens or lengths.get(options.task, 256)
    if options.output is None:
        own = "" if options.data else "_own_text"
        options.output = str(HERE / "results" / f"{options.task}{own}.csv")
    options.target_len = options.max_new_tokens if options.task in lengths else options.window
    return options


SETTINGS = """task data ckpt dtype limit window decode subjects max_new_tokens prompt_tokens chat seed calibration
calibration_tokens""".split()  # what all rows of a table have in common


def main(argv=None):
    options = parse_args(argv)
    load, run = TASKS[options.task]
    for name in options.policies:
        if name not in ("dense", "ffnskip", "printed"):
            common.find_factory(name)
    device = common.find_device(options.device)
    data = load(options.data, options) if options.data else None
    ckpt = common.find_checkpoint(options.ckpt)
    tokenizer, model = load_tokenizer(ckpt), load_model(ckpt, device, options.dtype)
    settings = common.find_settings(options, ckpt, model.args.n_layers)
    common_settings = {key: getattr(options, key) for key in SETTINGS}
    if {"ffnskip", "printed"} & set(options.policies):  # rows made with other ones are no rows of this table
        common_settings["skip"] = {key: value for key, value in settings.items() if key != "ratios"}
        common_settings["printed_cold"] = options.printed_cold
    table = Table(options.output, common_settings)
    known = {field.name: getattr(options, field.name) for field in fields(Context) if hasattr(options, field.name)}
    context = Context(**known, first=max(options.warm_up) + 1)
    tokens = None
    for name, skip, match, warm_up_index in grid(options):
        key = dict(policy=edition(name), skip=skip, match=match, warm_up_index=warm_up_index)
        whole, ffn = bytes_per_skip(name, model)
        if table.has(key) or (match == "bytes" and (whole == ffn or skip is None)):
            continue  # of a policy that skips nothing but FFN blocks, equal bytes are equal blocks
        if tokens is None and name != "dense":
            tokens = calibration_tokens(model, tokenizer, options)
        begin = time.time()
        wanted = skip * ffn / whole if match == "bytes" else skip
        label = f"{options.task} {name} {'' if skip is None else skip}"
        try:
            policy, calibrated = make_policy(name, model, wanted, tokens, settings, warm_up_index, options)
        except ValueError as error:
            if len(options.policies) == 1:
                raise
            print(f"{label}: {error}", file=sys.stderr)
            continue
        if wanted is not None and abs(calibrated - wanted) > max(0.03, 0.6 / model.args.n_layers):  # layers are coarse
            print(f"{label}: cannot: the nearest is {calibrated:.3f}", file=sys.stderr)
            continue
        model_id = f"{name.replace('/', '_').replace(':', '_')}-{cell(skip)}-{match}"
        answers = Path(options.output).with_suffix("") / f"{model_id}.jsonl"
        row = replace(context, warm_up_index=warm_up_index, label=label, answers=answers)
        result = run(model, tokenizer, policy, data, row)
        ratio = result.pop("ffn_skip_ratio")
        bytes_saved = None
        if ratio is not None:  # what a policy reads to decide (for confidence, the output head) is not taken off
            bytes_saved = ratio * model.args.n_layers * whole / sum(common.weight_bytes(model).values())
        key |= dict(calibrated_ratio=calibrated, ffn_skip_ratio=ratio, ffn_saved_ratio=result.pop("ffn_saved_ratio"))
        seconds = round(time.time() - begin, 1)
        table.add(key | dict(bytes_saved=bytes_saved, **result, seconds=seconds, setting=describe(policy)))
        shown = list(table.rows[-1].items())[4:12]
        print(f"{label}: {' '.join(f'{key}={value}' for key, value in shown)}", file=sys.stderr)
    print(table)


if __name__ == "__main__":
    common.run_command(main)
