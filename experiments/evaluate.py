"""
Measure skip policies on a task: a CSV with a row per policy and ratio, and a table of its first score.

    python experiments/evaluate.py perplexity --data wiki.test.raw --calibration wiki.train.raw
    python experiments/evaluate.py factoid --data FreebaseQA-eval.json --policies dense,ffnskip,random --skip 0.05,0.25
    python experiments/evaluate.py perplexity --policies ffnskip,mine.py:make --skip 0.25

tasks, and what --data is for each:
  perplexity  text, plain or JSONL with a key "text" (WikiText-2 raw, C4). In windows from all over it, each through the
              real skip path in one parallel pass; with --decode token by token, which gives the same. Also KL(dense ||
              policy), top-1 agreement with dense, the share of the cache entries read that are missing (holes_read),
              and of FFN blocks that no row of a batch of N windows needs (ffn_saved_at_N). Without --data the model
              writes the text itself: enough to compare policies, not models
  warmup      the same for several --warm-up-index, after a prompt of --prompt-tokens in full, all measured over the
              tokens past the largest of them (Figure 5)
  factoid     FreebaseQA (JSON, or lines "question | answer") or TriviaQA (JSON): 5-shot, greedy, exact match, and
              whether a right answer is within the answer (Table 3). Ratios are reached on the next 64 questions
  mtbench     MT-Bench's or Vicuna's question.jsonl: answers to all turns, for judge.py or FastChat's judge (Table 2,
              Figure 4)
  summarize   CNN/DailyMail, CSV or JSONL: summaries, for judge.py, by length of the story (Figure 3)
  collapse    prompts (JSONL with "turns" or "text"): repetition, and the first token that differs from the dense text
              (Figure 1)
  worstcase   as collapse: the share of tokens for which nothing at all was skipped (Table 6)
MMLU (Table 5) and other multiple-choice tasks: lm_eval_model.py.

Every policy is first brought to the wanted ratio on calibration text, by its own knob and with the same warm-up; the
ratios in the table are those achieved. Policies that skip whole layers come twice: at the same share of FFN blocks
("ffn"), and at the same bytes not read ("bytes"), since a layer saves more. In factoid, whose answers end before a
warm-up does, the prompt past its own warm-up is skipped as well. NAME_low and NAME_high are the 95 % interval of a mean
by bootstrap over questions, texts, or articles of windows, whose scores are kept in items/; `difference` is that of the
first score from the dense model's, paired (of perplexity, in nats per token), where the dense row was measured before.
A row is written as soon as it is done; the same command again skips it.
"""

import re
import sys
import time
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)
import torch
import plot
from at_ratio import describe, make_policy, on_text, prompts_ratio
from readers import load_text
from table import Table, cell, read
from tasks import TASKS, WRITTEN, Context, held_out, spread_windows

import policies
from load_weights import load_model, load_tokenizer
from model import dense
from policies import standins
from policies.baselines import POLICIES, written_text
from policies.ledger import InPrompt
from support import common

DRAWN = "random", "random_but_first", "random_run", "static", "static_run", "shuffled"  # policies that draw at random
OWN = "dense", "ffnskip"  # policies that no factory makes
PLACES = "decoding", "prompt", "both"
TEXT_TASKS = "perplexity", "warmup"
SETTINGS = """task data ckpt dtype limit window decode max_new_tokens prompt_tokens per_class chat seed calibration
calibration_tokens sim_threshold temperature margin rows prompt_skip""".split()  # what a table's rows have in common


def edition(name):
    """What a policy's rows are kept under: FILE.py:FACTORY@CHECKSUM, so that a changed file is run again."""
    file, _, _ = name.rpartition(":")
    return f"{name}@{common.checksum(file)}" if file else name


def bytes_per_skip(name, model):
    """Bytes of weights not read when the policy called `name` skips one FFN block, and those of the block alone."""
    parts = ["feed_forward"]
    if name not in OWN:
        parts += getattr(policies.find_factory(name), "also_skips", ())
    skipped = 0
    for part, weight in model.layers[0].named_parameters():
        if part.startswith(tuple(parts)):
            skipped += weight.nbytes
    return skipped, common.nbytes(model.layers[0].feed_forward)


def grid(options):
    """The key of every row: for dense and a fixed --sim-threshold, skip is None."""
    rows = []
    for warm_up, match, name in product(options.warm_up, options.match, options.policies):
        fixed = name == "dense" or (name in ("ffnskip", "printed") and options.sim_threshold is not None)
        seeds = options.seeds if name in DRAWN or ":" in name else options.seeds[:1]
        places = options.skip_in if name != "dense" else options.skip_in[:1]
        for skip, seed, place in product([None] if fixed else options.skip, seeds, places):
            label = name if place == "decoding" or name == "dense" else f"{name} in {place}"
            rows.append(dict(policy=label, skip=skip, match=match, warm_up_index=warm_up, seed=seed))
    return rows


def split_label(label):
    """(policy, place of PLACES) of what grid() calls a policy."""
    name, _, place = label.rpartition(" in ")
    return (name, place) if place in PLACES and name else (label, "decoding")


def calibrate(model, tokenizer, data, context, options):
    """
    The Calibration: text in windows as long as the task's texts, from all over the file, or what the model writes. For
    factoid the ratios are reached on questions.
    """
    prompt_len = context.prompt_tokens if options.task in TEXT_TASKS else 0
    size = min(options.target_len + prompt_len, model.args.max_seq_len)
    if options.calibration is None:
        print("[no --calibration text: the model writes some]", file=sys.stderr)
        tokens = written_text(model, 4, min(128 + prompt_len, size), options.seed)
    else:
        windows, _ = spread_windows(tokenizer, load_text(options.calibration), options.calibration_tokens, size)
        tokens = torch.tensor(windows, device=model.tok_embeddings.weight.device)
    found = on_text(model, tokens, prompt_len, max(options.warm_up), options.target_len, options.rows)
    if options.task == "factoid":
        prompts = held_out(tokenizer, data, context)
        found.target_len = round(median(map(len, prompts)))
        found.ratio_of = lambda policy: prompts_ratio(model, policy, prompts, context)
    return found


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
    add("--data", metavar="FILE", help="see the tasks above")
    common.add_model_arguments(parser)
    add("--policies", type=listed(str), default=list(dict.fromkeys([*OWN, *POLICIES])), metavar="A,B",
        help="dense, ffnskip, others of policies/, which docs/results.md lists, FILE.py:FACTORY; default: those in "
        "baselines.py")
    add("--skip", type=listed(float), default=[0.05, 0.15, 0.25, 0.35], metavar="R,R",
        help="shares of FFN blocks to skip past the warm-up (default 0.05,0.15,0.25,0.35)")
    add("--match", type=listed(str), default=["ffn", "bytes"],
        help="for policies that skip whole layers: ffn, bytes or both")
    add("--warm-up-index", dest="warm_up", type=listed(int), metavar="N,N", help="tokens 0 to N run in full; several "
        "for task warmup, with a = before -1 (default 25; warmup: -1,5,10,15,20,25,30,40,60)")
    add("--calibration", metavar="FILE", help="text, other than --data, on which the ratios are reached; default: the "
        "model's own")
    add("--calibration-tokens", type=common.positive, default=4096, metavar="N", help="how much of it (default 4096)")
    add("--limit", type=common.positive, metavar="N", help="tokens (perplexity, warmup: 32768), questions (factoid: "
        "500; mtbench: all), stories (all), prompts (collapse, worstcase: 32)")
    add("--window", type=common.positive, default=512, metavar="N", help="tokens of a window of text (default 512)")
    add("--decode", action="store_true", help="perplexity: token by token, as generation does, instead of in parallel")
    add("--max-new-tokens", type=common.positive, metavar="N", help="of a text (default: mtbench 1024, summarize 256, "
        "worstcase 512, collapse 256)")
    add("--prompt-tokens", type=int, metavar="N", help="of a window of text (default: perplexity 0, warmup 64) "
        "or of a prompt from text (collapse, worstcase: 128)")
    add("--skip-in", type=listed(str), default=["decoding"], metavar="A,B", help="decoding, prompt, both: where to "
        "skip, with --prompt-tokens; the ratio is reached in decoding (default decoding)")
    add("--prompt-skip", type=common.share, metavar="R", help="with --skip-in: the share for the prompt, if not --skip")
    add("--rows", type=common.positive, default=1, metavar="N", help="perplexity: windows of text that are one batch, "
        "for --agree (default 1)")
    add("--temperature", type=float, default=0.0, metavar="T", help="of texts that the model writes (default 0)")
    add("--margin", type=float, metavar="M", help="write whether less than M is lost to dense, by the whole interval "
        "of the difference; say it before you measure")
    add("--per-class", type=common.positive, metavar="N", help="summarize: the first N stories of each length")
    add("--seeds", type=listed(common.seed), metavar="N,N", help="a row each, of policies that draw at random "
        "(default: --seed)")
    add("--chat", action="store_true", help="the checkpoint's chat template instead of the paper's prompt")
    add("--batch-size", type=common.positive, default=16, metavar="N", help="texts at a time (default 16)")
    add("--output", type=Path, metavar="CSV", help="default: out/TASK.csv, without --data out/TASK_own_text.csv")
    policies.add_skip_arguments(parser)
    options = parser.parse_args(argv)
    if options.data is None and options.task not in TEXT_TASKS:
        parser.error(f"{options.task} needs --data")
    if any(not 0 < skip < 1 for skip in options.skip):
        parser.error("--skip wants shares between 0 and 1")
    if not set(options.match) <= {"ffn", "bytes"}:
        parser.error("--match wants ffn, bytes or both")
    if not set(options.skip_in) <= set(PLACES):
        parser.error(f"--skip-in wants {', '.join(PLACES)}")
    if options.warm_up is None:
        options.warm_up = [-1, 5, 10, 15, 20, 25, 30, 40, 60] if options.task == "warmup" else [25]
    if min(options.warm_up) < -1:
        parser.error(f"--warm-up-index {min(options.warm_up)} is below -1")
    if options.prompt_tokens is None:
        options.prompt_tokens = dict(perplexity=0, warmup=64).get(options.task, 128)
    if options.prompt_tokens < (0 if options.task in TEXT_TASKS else 1):
        parser.error(f"--prompt-tokens {options.prompt_tokens} is too few")
    if options.task in TEXT_TASKS and options.window < options.prompt_tokens + max(options.warm_up) + 3:
        after = f"--prompt-tokens {options.prompt_tokens} and --warm-up-index {max(options.warm_up)}"
        parser.error(f"--window {options.window} is too short for {after}")
    options.seeds = options.seeds or [options.seed]
    options.max_new_tokens = options.max_new_tokens or WRITTEN.get(options.task, 256)
    options.output = options.output or Path("out", f"{options.task}{'' if options.data else '_own_text'}.csv")
    options.target_len = options.max_new_tokens if options.task in WRITTEN else options.window
    if options.task in TEXT_TASKS:
        options.target_len -= options.prompt_tokens
    return options


def shared_settings(options, settings, ckpt, model):
    """
    What a table's rows have in common, with checksums of what stands behind the names: rows made with other settings
    are no rows of it.
    """
    shared = {key: getattr(options, key) for key in SETTINGS}
    if settings:
        shared["skip"] = {key: value for key, value in settings.items() if key not in ("ratios", "made_for")}
    if options.task in TEXT_TASKS:
        shared["first"] = max(options.warm_up) + 1  # the first token that is compared
        shared["windows"] = "all over the text"
    files = dict(data=options.data, calibration=options.calibration)
    for name in options.policies:
        if name not in OWN and policies.takes_fit(policies.find_factory(name)):
            files["fit"] = policies.find_fitted(options, ckpt)[standins.make.fit]
    for name, file in files.items():
        shared[f"{name}_checksum"] = common.checksum(file)
    return shared | dict(weights_checksum=common.fingerprint(model))


def missing(table, model, options, editions):
    """(key, edition of the policy, the share of FFN blocks to skip) of every row that the table has not yet."""
    for key in grid(options):
        name, _ = split_label(key["policy"])
        whole, ffn = bytes_per_skip(name, model)
        policy_edition = editions[name] + key["policy"].removeprefix(name)
        table.read()  # another run may have added rows
        if table.find(key | dict(policy=policy_edition)):
            continue
        if key["match"] == "ffn":
            yield key, policy_edition, key["skip"]
        elif whole != ffn and key["skip"] is not None:  # else equal bytes are equal blocks
            yield key, policy_edition, key["skip"] * ffn / whole


def main(argv=None):
    options = parse_args(argv)
    load, run = TASKS[options.task]
    editions = {}
    for name in options.policies:
        if name not in OWN:
            policies.find_factory(name)
        editions[name] = edition(name)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    common.check_outputs(options.output)
    device = common.find_device(options.device)
    data = load(options.data, options) if options.data else None
    ckpt = common.find_checkpoint(options.ckpt)
    tokenizer, model = load_tokenizer(ckpt), load_model(ckpt, device, options.dtype)
    settings = {}
    if {"ffnskip", "static", "shuffled"} & set(options.policies):  # others need none
        settings = policies.find_settings(options, ckpt, model.args.n_layers)
    table = Table(options.output, shared_settings(options, settings, ckpt, model))
    known = {field.name: getattr(options, field.name) for field in fields(Context) if hasattr(options, field.name)}
    context = Context(**known, first=max(options.warm_up) + 1)
    calibration = None
    for key, policy_edition, wanted in missing(table, model, options, editions):
        label, skip, match, warm_up_index, seed = key.values()
        name, place = split_label(label)
        if calibration is None and name != "dense":
            calibration = calibrate(model, tokenizer, data, context, options)
        begin = time.time()
        label = f"{options.task} {label} {'' if skip is None else skip}"
        try:
            policy, calibrated = make_policy(name, model, wanted, calibration, settings, warm_up_index, seed, options)
        except ValueError as error:
            if len(options.policies) == 1:
                raise
            print(f"{label}: {error}", file=sys.stderr)
            continue
        far = max(0.03, 0.6 / model.args.n_layers)  # layers are coarse; authors has steps of some blocks in a row
        if wanted is not None and abs(calibrated - wanted) > far and name != "authors":
            print(f"{label}: cannot: the nearest is {calibrated:.3f}", file=sys.stderr)
            continue
        model_id = re.sub("[/:]", "_", f"{policy_edition}-{cell(skip)}-{match}") + (f"-{seed}" if seed else "")
        if warm_up_index != 25:
            model_id += f"-w{warm_up_index}"
        in_place = policy
        if place != "decoding":
            in_prompt = policy
            if options.prompt_skip is not None:
                args = calibration, settings, warm_up_index, seed, options
                in_prompt, _ = make_policy(name, model, options.prompt_skip, *args)
            in_place = InPrompt(in_prompt, dense if place == "prompt" else policy)
        answers = table.path.parent / table.name / f"{model_id}.jsonl"
        row = replace(context, warm_up_index=warm_up_index, label=label, answers=answers, scores={})
        row.settings = table.settings
        row.dense_scores = table.dense_scores()
        result = run(model, tokenizer, in_place, data, row)
        ratio, unread, bytes_saved = result.pop("ffn_skip_ratio"), result.pop("unread_ratio"), None
        if unread is not None:  # what a policy reads to decide (for confidence, the output head) is not taken off
            layer = bytes_per_skip(name, model)[0]
            if not unread:  # no feed-forward block is spared, but perhaps others
                unread = getattr(policy, "as_blocks", 0.0)
            bytes_saved = unread * model.args.n_layers * layer / sum(common.weight_bytes(model).values())
        columns = dict(calibrated_ratio=calibrated, ffn_skip_ratio=ratio, ffn_saved_ratio=result.pop("ffn_saved_ratio"))
        columns |= dict(bytes_saved=bytes_saved, **result, seconds=round(time.time() - begin, 1))
        columns["setting"] = describe(policy)
        table.add(key | dict(policy=policy_edition), columns, row.scores)
        shown = list(table.rows[-1].items())[5:12]
        print(f"{label}: {' '.join(map('='.join, shown))}", file=sys.stderr)
    if table.rows:
        plot.table(read(table.path), table.columns[9], by_bytes=False)  # the task's first score
        print(f"[written to {table.path}; plot.py prints its other columns]", file=sys.stderr)


if __name__ == "__main__":
    common.run_command(main)
