"""
Measure skip policies on a task: a table on the screen and a CSV, one row for each policy and ratio.

    python experiments/evaluate.py perplexity --data wiki.test.raw --calibration wiki.train.raw
    python experiments/evaluate.py factoid --data FreebaseQA-eval.json --policies dense,ffnskip,random --skip 0.05,0.25
    python experiments/evaluate.py perplexity --policies ffnskip,mine.py:make --skip 0.25

tasks, and what --data is for each:
  perplexity  text, plain or JSONL with a key "text" (WikiText-2 raw, C4). In windows, each through the real skip path
              in one parallel pass; with --decode token by token, which gives the same. Also KL(dense || policy), top-1
              agreement with dense, and the share of holes among the cache entries that were read. Without --data the
              model writes the text itself: enough to compare policies, not models
  warmup      the same for several --warm-up-index, all measured over the tokens past the largest of them (Figure 5)
  factoid     FreebaseQA (JSON, or lines "question | answer") or TriviaQA (JSON): 5-shot, greedy, exact match (Table 3)
  mmlu        a folder with dev/ and test/, Hendrycks' CSV files: 5-shot, the likeliest letter, by category (Table 5)
  mtbench     MT-Bench's question.jsonl: answers of both turns, as FastChat's judge reads them (Table 2, Figure 4)
  summarize   CNN/DailyMail, CSV or JSONL: ROUGE-L against the reference by length of the story (Figure 3)
  collapse    prompts (JSONL with "turns" or "text"): repetition, and where the text parts from the dense one (Figure 1)
  worstcase   as collapse: share of tokens for which nothing at all was skipped, by position (Table 6)

Every policy is first brought to the wanted ratio on calibration text, by its own knob and with the same warm-up; the
ratios in the table are those achieved. Policies that skip whole layers come twice: at the same share of FFN blocks
("ffn"), and at the same bytes not read ("bytes"), since a layer saves more. In factoid and mmlu, whose answers end
before a warm-up does, the prompt past its own warm-up is skipped as well. A row is written as soon as it is done; the
same command again skips it.
"""

import argparse
import csv
import io
import json
import math
import platform
import re
import string
import sys
import time
import uuid
import zlib
from argparse import Namespace
from collections import Counter
from dataclasses import fields, replace
from itertools import product
from os.path import commonprefix
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import baselines
from readers import load_mmlu, load_prompts, load_questions, load_stories, load_text

import load_weights
from generate import find_checkpoint, find_device, find_policy, find_settings, generate, load_module
from model import KVCache, dense
from skip import FFNSkip, Trace

POLICIES = "dense,ffnskip,printed,random,static,shortgpt,skipdecode,statecopy,earlyexit,yours"
CHAT = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: {} ASSISTANT:")  # fmt: skip
SUMMARIZE = ("Summarize the given story in less than 150 words while preserving high coherence, consistency, fluency, "
             "and relevance.\n\n{}")  # fmt: skip
SHOTS = ("Question: What is the capital of Italy?\nAnswer: Rome\n\n"
         "Question: Who wrote the play Hamlet?\nAnswer: William Shakespeare\n\n"
         "Question: Which planet is known as the Red Planet?\nAnswer: Mars\n\n"
         "Question: In which country would you find the Great Pyramid of Giza?\nAnswer: Egypt\n\n"
         "Question: Who was the first man to walk on the moon?\nAnswer: Neil Armstrong\n\n")  # fmt: skip
CATEGORIES = {  # of MMLU's subjects, after Hendrycks et al. 2021; "other" is what is left
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social_sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics "
    "high_school_microeconomics high_school_psychology human_sexuality professional_psychology "
    "public_relations security_studies sociology us_foreign_policy",
}


# --- metrics ----------------------------------------------------------------------------------------------------------


def normalise(text):
    """SQuAD's and TriviaQA's: lower case, without punctuation, articles and double spaces."""
    text = "".join(" " if c in string.punctuation + "‘’´`_" else c for c in text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def rouge_l(answer, reference):
    """F1 of the longest common subsequence of words (Lin 2004), 0 to 1; lower case, no stemming."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    row = [0] * (len(b) + 1)
    for word in a:
        last = row
        row = [0]
        for j, other in enumerate(b):
            row.append(last[j] + 1 if word == other else max(last[j + 1], row[j]))
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


def distinct_n(ids, n):
    """The share of different ones among all n-grams of ids, 0 to 1 (Li et al. 2016); 1 if there is none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_loop(ids, longest_period=64):
    """Tokens in the longest stretch that says the same thing three times over at least; 0 if there is none."""
    best = 0
    for period in range(1, min(longest_period, len(ids) // 3) + 1):
        run = 0
        for i in range(period, len(ids)):
            run = run + 1 if ids[i] == ids[i - period] else 0
            if run >= 2 * period:
                best = max(best, run + period)
    return best


def parts_at(ids, others):
    """Index of the first token in which two texts differ; the length of the shorter if one begins with the other."""
    return next((i for i, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))


def counts(trace, warm_up_index):
    """FFN blocks [skipped, in all] past the warm-up, then the same of all tokens that are no prompt: a list of 4."""
    ran, index = trace.ran, trace.token_index  # (layer, batch, token), (batch, token)
    past, made = ran[:, index > warm_up_index], ran[:, index >= 0]
    return [(~past).sum().item(), past.numel(), (~made).sum().item(), made.numel()]


def ratios(many):
    """ffn_skip_ratio and ffn_saved_ratio (see DESIGN: the first past the warm-up) from a list of `counts`."""
    skipped, past, saved, made = (sum(column) for column in zip(*many))
    return dict(ffn_skip_ratio=skipped / past if past else None, ffn_saved_ratio=saved / made if made else None)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


# --- tasks: run(model, tokenizer, policy, data, options) -> what the row says -----------------------------------------


def progress(items, label):
    """The items one by one, and on a terminal a line that says how far it is."""
    begin, items = time.time(), list(items)
    for i, item in enumerate(items):
        if sys.stderr.isatty():
            left = f", {(time.time() - begin) / i * (len(items) - i):.0f} s left" if i else ""
            print(f"\r\x1b[K{label}: {i}/{len(items)}{left}", end="", file=sys.stderr, flush=True)
        yield item
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def windows(tokenizer, text, n_tokens, seq):
    """The first n_tokens of text, (windows, seq) ids; the rest is dropped. Raises ValueError for less than one."""
    ids = tokenizer.encode(text[: 16 * n_tokens] if n_tokens else text)[:n_tokens]
    if len(ids) < seq:
        raise ValueError(f"{len(ids)} tokens of text do not fill a window of {seq}")
    return torch.tensor(ids[: len(ids) // seq * seq]).view(-1, seq)


def perplexity(model, tokenizer, policy, text, options):
    """
    Each window of text on its own, as tokens that were "generated" from the first on. The dense model's part of the
    work is done once, up to its output head.
    """
    device = model.tok_embeddings.weight.device
    seq = min(options.window, model.args.max_seq_len)
    if text is None:
        all_tokens = baselines.written_text(model, 16, min(seq, 256), options.seed + 1)  # not what it is calibrated on
    else:
        all_tokens = windows(tokenizer, text, options.limit or 32768, seq)
    first = max(options.warm_up) + 1  # of the tokens whose predictions are compared
    nll, kl, agree, work, holes, read = [], [], [], [], 0, 0
    for i, tokens in enumerate(progress(all_tokens.to(device), options.label)):
        cache, trace = KVCache(model.args, 1, len(tokens), model.tok_embeddings.weight.dtype, device), Trace()
        parts = tokens[None].split(1 if options.decode else len(tokens), dim=1)
        logits = torch.cat([model(part, cache, policy, trace=trace)[0] for part in parts])[:-1]  # (seq - 1, vocab)
        reference = model.logits(dense_state(model, tokens, i, options.reference))[0, :-1]
        loss, divergence, same = [], [], []
        for ours, theirs, target in zip(logits.split(32), reference.split(32), tokens[1:].split(32)):  # what caches hold
            log_p, log_dense = ours.log_softmax(-1), theirs.log_softmax(-1)  # (32, vocab)
            loss.append(-log_p.gather(1, target[:, None])[:, 0])
            divergence.append((log_dense.exp() * (log_dense - log_p)).sum(-1))
            same.append(log_p.argmax(-1) == log_dense.argmax(-1))
        nll.append(torch.cat(loss))
        kl.append(torch.cat(divergence)[first:])
        agree.append(torch.cat(same)[first:])
        holes += baselines.attended_holes(cache).sum().item()
        read += (cache.written * torch.arange(1, len(tokens) + 1)).sum().item()
        work.append(counts(trace, policy_warm_up(policy, options)))
    average = lambda parts: torch.cat(parts).double().mean()
    return dict(
        perplexity=average(nll).exp().item(), perplexity_past_warm_up=average([loss[first:] for loss in nll]).exp().item(),
        kl=average(kl).item(), top1_agreement=average(agree).item(), holes_read=holes / read,
        tokens=all_tokens.numel(), tokens_compared=sum(map(len, kl)), **ratios(work),
    )  # fmt: skip


def dense_state(model, tokens, i, reference):
    """(1, seq, dim): what the dense model gives its output head for window i, kept in `reference`."""

    def keep(layers, x, step):
        reference[i] = dense(layers, x, step)
        return reference[i]

    if i not in reference:
        model(tokens[None], policy=keep, last_only=True)
    return reference[i]


def policy_warm_up(policy, options):
    """The ratios of the dense model are counted from where the others' are."""
    return getattr(policy, "warm_up_index", options.warm_up_index)


def with_shared_prefix(model, policy, prompts, room, options, name=""):
    """
    What all prompts (lists of ids) begin with is run once; then groups of prompts of equal length, so that nothing is
    padded: yields (which prompts, their other tokens (batch, seq), a cache that holds the beginning and has `room`).
    The policy works in the prompt too, past its warm-up (prompt_len=0): chunks do not change what it skips.
    """
    weight = model.tok_embeddings.weight
    n = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    make = lambda batch, seq: KVCache(model.args, batch, seq, weight.dtype, weight.device)
    base = make(1, max(n, 1))
    if n:
        model(torch.tensor([prompts[0][:n]], device=weight.device), base, policy, last_only=True)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = []
    for i in by_length:
        if not groups or len(groups[-1]) == options.batch_size or len(prompts[groups[-1][0]]) != len(prompts[i]):
            groups.append([])
        groups[-1].append(i)
    for group in progress(groups, f"{options.label} {name}"):
        cache = make(len(group), len(prompts[group[0]]) + room)
        for new, old in (cache.k, base.k), (cache.v, base.v):
            new[:, :, :, :n] = old[:, :, :, :n]
        cache.written[:, :, :n] = base.written[:, :, :n]
        cache.length = n
        yield group, torch.tensor([prompts[i][n:] for i in group], device=weight.device), cache


def factoid(model, tokenizer, policy, questions, options):
    """Greedy answers of at most 16 tokens, up to the end of the line."""
    questions = questions[: options.limit or 500]
    prompts = [tokenizer.encode(f"{SHOTS}Question: {question}\nAnswer:") for question, _ in questions]
    answers, work = {}, []
    for group, tokens, cache in with_shared_prefix(model, policy, prompts, 16, options):
        trace, ids = Trace(), []
        for _ in range(16):
            tokens = model(tokens, cache, policy, trace=trace, last_only=True)[:, -1].argmax(-1, keepdim=True)
            ids.append(tokens)
            texts = [tokenizer.decode(row) for row in torch.cat(ids, dim=1).tolist()]
            if all("\n" in text.lstrip() for text in texts):
                break
        answers |= {i: text.strip().split("\n")[0] for i, text in zip(group, texts)}
        work.append(counts(trace, policy_warm_up(policy, options)))
    right = [normalise(answers[i]) in {normalise(a) for a in names} for i, (_, names) in enumerate(questions)]
    inside = [any(f" {normalise(a)} " in f" {normalise(answers[i])} " for a in names) for i, (_, names) in enumerate(questions)]
    return dict(exact_match=mean(right), answer_within=mean(inside), questions=len(questions), **ratios(work))


def mmlu(model, tokenizer, policy, subjects, options):
    """5-shot, in Hendrycks' prompt; the likeliest of the four letters after "Answer:"."""
    right, work = {}, []
    for name, (shots, questions) in subjects.items():
        ask = lambda q, choices: "".join([q, *(f"\n{a}. {c}" for a, c in zip("ABCD", choices)), "\nAnswer:"])
        head = f"The following are multiple choice questions (with answers) about {name.replace('_', ' ')}.\n\n"
        shown = [f"{ask(q, choices)} {answer}\n\n" for q, choices, answer in shots]
        letters = [tokenizer.encode(f"Answer: {a}")[-1] for a in "ABCD"]
        questions = questions[: options.limit]
        prompts = [tokenizer.encode(head + "".join(shown) + ask(q, choices)) for q, choices, _ in questions]
        while shown and max(map(len, prompts)) > model.args.max_seq_len:
            shown.pop()
            prompts = [tokenizer.encode(head + "".join(shown) + ask(q, choices)) for q, choices, _ in questions]
        for group, tokens, cache in with_shared_prefix(model, policy, prompts, 0, options, name):
            trace = Trace()
            logits = model(tokens, cache, policy, trace=trace, last_only=True)[:, -1, letters]
            right |= {(name, i): "ABCD"[best] == questions[i][2] for i, best in zip(group, logits.argmax(-1).tolist())}
            work.append(counts(trace, policy_warm_up(policy, options)))
    of = {subject: category for category, names in CATEGORIES.items() for subject in names.split()}
    by = lambda c: mean(value for (name, _), value in right.items() if of.get(name, "other") == c)
    return {c: by(c) for c in (*CATEGORIES, "other")} | dict(all=mean(right.values()), questions=len(right), **ratios(work))


def write_texts(model, tokenizer, policy, prompts, options, stop=True):
    """
    Greedy texts for prompts (lists of ids), in batches of like length: for each its ids without end-of-text, its
    `counts` and its part of the trace.
    """
    done, room = {}, options.max_new_tokens
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [by_length[i : i + options.batch_size] for i in range(0, len(prompts), options.batch_size)]
    for batch in progress(batches, options.label):
        trace, rows = Trace(), [prompts[i][-max(1, model.args.max_seq_len - room) :] for i in batch]
        stops = tokenizer.eos_ids if stop else ()
        columns = list(generate(model, rows, room, policy, eos_ids=stops, trace=trace))
        ran, index, warm_up = trace.ran, trace.token_index, policy_warm_up(policy, options)
        for row, i in enumerate(batch):
            ids = [column[row] for column in columns if column[row] is not None and column[row] not in stops]
            own = Namespace(ran=ran[:, row : row + 1], token_index=index[row : row + 1])
            done[i] = ids, counts(own, warm_up), own
    return [done[i] for i in range(len(prompts))]


def prompt_ids(tokenizer, record, options):
    """An MT-Bench question's first turn as a chat, or the first 128 tokens of a text."""
    if "turns" in record:
        return chat_ids(tokenizer, record["turns"][:1], options)
    return tokenizer.encode(record["text"][:4096])[: options.prompt_tokens]


def chat_ids(tokenizer, turns, options):
    """Turns of user and assistant as ids: the paper's prompt, or with --chat the checkpoint's own template."""
    if options.chat:
        return tokenizer.chat([dict(role=("user", "assistant")[i % 2], content=turn) for i, turn in enumerate(turns)])
    text = CHAT.format(turns[0])
    for answer, question in zip(turns[1::2], turns[2::2]):
        text += f" {answer} USER: {question} ASSISTANT:"
    return tokenizer.encode(text)


def collapse(model, tokenizer, policy, records, options):
    """Texts that do not stop at end-of-text, so that all have the same length; the dense ones are written once."""
    prompts = [prompt_ids(tokenizer, record, options) for record in records[: options.limit or 32]]
    write = lambda policy: write_texts(model, tokenizer, policy, prompts, options, stop=False)
    if "texts" not in options.reference:
        options.reference["texts"] = write(dense)
    texts = options.reference["texts"] if policy is dense else write(policy)
    ids = [text for text, *_ in texts]
    return dict(
        **{f"distinct_{n}": mean(distinct_n(text, n) for text in ids) for n in (1, 2, 4)},
        longest_loop=mean(map(longest_loop, ids)), looping=mean(longest_loop(text) >= 32 for text in ids),
        parts_from_dense=mean(parts_at(a, b[0]) for a, b in zip(ids, options.reference["texts"])),
        texts=len(ids), tokens=sum(map(len, ids)), **ratios([work for _, work, _ in texts]),
        example=tokenizer.decode(ids[0]),
    )  # fmt: skip


def worstcase(model, tokenizer, policy, records, options):
    """Tokens past the warm-up for which no FFN block at all was skipped, by position in the generated text."""
    prompts = [prompt_ids(tokenizer, record, options) for record in records[: options.limit or 32]]
    texts = write_texts(model, tokenizer, policy, prompts, options, stop=False)
    never, edges = Counter(), [e for e in (64, 128, 256, 512, 1024, 2048) if e < options.max_new_tokens]
    edges.append(options.max_new_tokens)
    total = Counter()
    for _, _, own in texts:
        past = own.token_index[0] > policy_warm_up(policy, options)
        full, index = own.ran[:, 0, past].all(0).tolist(), own.token_index[0, past].tolist()
        for f, i in zip(full, index):
            edge = next(e for e in edges if i < e)
            total[edge] += 1
            never[edge] += f
    by = {f"never_below_{e}": never[e] / total[e] if total[e] else None for e in edges}
    tokens = sum(total.values())
    return dict(never=sum(never.values()) / max(1, tokens), **by, texts=len(texts), tokens=tokens,
                **ratios([work for _, work, _ in texts]))  # fmt: skip


def answers_file(options):
    """Where the answers of one row go, one JSON object a line; and those of an earlier run that was cut off."""
    path = Path(options.output).with_suffix("") / f"{options.model_id}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # a last line cut short is dropped
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path, [json.loads(line) for line in lines]


def mtbench(model, tokenizer, policy, records, options):
    """
    Both turns of each question, appended to OUTPUT/MODEL_ID.jsonl in FastChat's format for model answers. Put it under
    data/mt_bench/model_answer/ of FastChat, and its gen_judgment.py asks GPT-4 for the scores.
    """
    path, done = answers_file(options)
    for record in records[: options.limit]:
        if any(answer["question_id"] == record["question_id"] for answer in done):
            continue
        turns, work, ids = [], [], []
        for question in record["turns"]:
            prompt = chat_ids(tokenizer, [*turns, question], options)
            ((new, counted, _),) = write_texts(model, tokenizer, policy, [prompt], options)
            turns += [question, tokenizer.decode(new).split("USER:")[0].strip()]
            work.append(counted)
            ids.append(new)
        answer = dict(
            question_id=record["question_id"], answer_id=uuid.uuid4().hex[:22], model_id=options.model_id,
            choices=[dict(index=0, turns=turns[1::2])], tstamp=time.time(),
            counts=[sum(column) for column in zip(*work)], tokens=sum(map(len, ids)), loop=max(map(longest_loop, ids)),
        )  # fmt: skip
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(answer) + "\n")
        done.append(answer)
    return dict(answers=len(done), tokens=sum(a["tokens"] for a in done), looping=mean(a["loop"] >= 32 for a in done),
                **ratios([a["counts"] for a in done]))  # fmt: skip


def summarize(model, tokenizer, policy, stories, options):
    """Summaries by the paper's prompt, in its classes: small up to 470 words, medium up to 790, large above."""
    path, done = answers_file(options)
    stories = stories[: options.limit]
    for start in range(len(done), len(stories), options.batch_size):
        some = stories[start : start + options.batch_size]
        prompts = [chat_ids(tokenizer, [SUMMARIZE.format(story)], options) for story, _ in some]
        texts = write_texts(model, tokenizer, policy, prompts, options)
        for (story, reference), (ids, work, _) in zip(some, texts):
            words, summary = len(story.split()), tokenizer.decode(ids).split("USER:")[0].strip()
            size = "small" if words <= 470 else "medium" if words <= 790 else "large"
            done.append(dict(size=size, rouge_l=rouge_l(summary, reference), words=words, summary=summary, counts=work))
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
    sizes = {}
    for size in ("small", "medium", "large"):
        scores = [record["rouge_l"] for record in done if record["size"] == size]
        sizes |= {f"rouge_l_{size}": mean(scores), f"n_{size}": len(scores)}
    return dict(rouge_l=mean(r["rouge_l"] for r in done), **sizes, **ratios([r["counts"] for r in done]))


TASKS = {
    "perplexity": (load_text, perplexity),
    "warmup": (load_text, perplexity),
    "factoid": (load_questions, factoid),
    "mmlu": (load_mmlu, mmlu),
    "mtbench": (load_prompts, mtbench),
    "summarize": (load_stories, summarize),
    "collapse": (load_prompts, collapse),
    "worstcase": (load_prompts, worstcase),
}


# --- the runner -------------------------------------------------------------------------------------------------------


def find_factory(name):
    """What makes the policy called `name`; None for those of skip.py. Raises ValueError if there is none."""
    file, _, factory = name.rpartition(":")
    factory = getattr(load_module(Path(file)) if file else baselines, factory, None)
    if not callable(factory) and name not in ("dense", "ffnskip", "printed"):
        raise ValueError(f"no policy {name}: choose from {POLICIES.replace(',', ', ')}, or FILE.py:FACTORY")
    return factory


def edition(name):
    """What a policy's rows are kept under: FILE.py:FACTORY@CHECKSUM, so that a changed file is run again."""
    file, _, _ = name.rpartition(":")
    return f"{name}@{zlib.crc32(Path(file).read_bytes()):08x}" if file else name


def bytes_per_skip(name, model):
    """Bytes of weights not read when the policy called `name` skips one FFN block, and those of the block alone."""
    left_out = ("feed_forward", *getattr(find_factory(name), "also_skips", ()))
    sizes = {part: p.numel() * p.element_size() for part, p in model.layers[0].named_parameters()}
    return tuple(sum(n for part, n in sizes.items() if part.startswith(parts)) for parts in (left_out, "feed_forward"))


def bytes_saved(name, model, ratio):
    """
    The share of the bytes which dense decoding reads for a token that the policy does not, when it skips `ratio` of the
    FFN blocks. What it reads to decide (for confidence, the output head) is not taken off.
    """
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.output is not None:
        read -= model.tok_embeddings.weight.numel() * model.tok_embeddings.weight.element_size()
    return ratio * model.args.n_layers * bytes_per_skip(name, model)[0] / read


def make_policy(name, model, skip, tokens, options):
    """(policy, ratio): the policy called `name`, brought as near to `skip` of the FFN blocks of tokens as can be."""
    if name == "dense":
        return dense, 0.0

    def settled(policy):
        common = dict(warm_up_index=options.warm_up_index, target_len=options.target_len)
        common |= {key: options.settings[key] for key in ("cold_s", "cold_e") if key in options.settings}
        for key, value in common.items():
            if hasattr(policy, key):
                setattr(policy, key, value)
        return policy

    measure = lambda policy: baselines.ffn_skip_ratio(model, policy, tokens)
    if name not in ("ffnskip", "printed"):
        at = lambda skip: settled(find_policy(name, model, None, skip, tokens, options.seed))
        policy = at(skip)
        ratio = measure(policy)
        if abs(ratio - skip) > 0.005:  # ask for more or less than is wanted
            most = min(0.99, skip + 0.1)
            try:
                near = baselines.bring_to(lambda v: at(most - v), 0.0, most, skip, model, tokens, 0.005, tries=6)
            except ValueError:  # some ratio on the way cannot be had
                near = policy
            policy, ratio = min([(policy, ratio), (near, measure(near))], key=lambda pair: abs(pair[1] - skip))
        return policy, ratio
    settings = dict(sim_threshold=1.0) | options.settings | dict(warm_up_index=options.warm_up_index)
    base = find_policy("ffnskip", model, settings)
    if name == "printed":
        cold_s, cold_e = options.printed_cold or (base.cold_s, base.cold_e)
        base = FFNSkip(cold_s, cold_e, base.sim_threshold, options.warm_up_index)
    if skip is None:
        return base, measure(base)
    steps = base.sim_threshold if isinstance(base.sim_threshold, list) else [base.sim_threshold] * model.args.n_layers
    steps = torch.tensor([step - steps[0] for step in steps])  # thresholds of one each layer keep their distances
    at = lambda value: replace(base, sim_threshold=(value + steps).tolist())
    trace = Trace()
    model(tokens, policy=replace(base, sim_threshold=math.inf), trace=trace, last_only=True)
    cosine = (trace.cosine - steps[:, None, None]).flatten()
    cosine = cosine[~cosine.isnan()].sort().values  # the threshold lies among them
    policy = baselines.bring_to(at, cosine[len(cosine) // 50].item(), cosine[-1].item() + 1e-3, skip, model, tokens)
    return policy, measure(policy)


def describe(policy):
    """A policy's settings in a few words, for the table."""
    shown = {}
    for key, value in sorted(vars(policy).items()) if hasattr(policy, "__dict__") and policy is not dense else ():
        if isinstance(value, list) and value and max(value) - min(value) < 1e-9:
            value = value[0]
        if isinstance(value, (int, float, list, set, type(None))) and key not in ("seed", "warm_up_index"):
            value = round(value, 5) if isinstance(value, float) else value
            shown[key] = [round(v, 5) for v in value] if isinstance(value, list) else value
    return " ".join(f"{key}={value}".replace(" ", "") for key, value in shown.items())


def grid(options):
    """(policy, skip, match, warm-up index) of every row; for dense and a fixed --sim-threshold, skip is None."""
    rows = []
    for warm_up, match, name in product(options.warm_up, options.match, options.policies):
        fixed = name == "dense" or (name in ("ffnskip", "printed") and options.sim_threshold is not None)
        rows += [(name, skip, match, warm_up) for skip in ([None] if fixed else options.skip)]
    return rows


class Table:
    """A CSV with the command and the versions in its first lines, which grows row by row and is never begun anew."""

    def __init__(self, path, settings):
        self.path, self.columns, self.rows = Path(path), None, []
        head = f"# settings: {json.dumps(settings, sort_keys=True)}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]  # the last run was cut off within a row
            self.path.write_text(text, encoding="utf-8")
        command = f"# command: {' '.join(['python', *sys.orig_argv[1:]])}\n"
        if text and head not in text:
            raise ValueError(f"{path}:3: made with other settings: give another --output, or delete it")
        if command not in text:  # begun, or taken up by another command
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{command}# versions: {versions()}\n{head if not text else ''}")
        lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#")]
        if lines:
            reader = csv.DictReader(io.StringIO("".join(lines)))
            self.rows, self.columns = list(reader), reader.fieldnames

    def has(self, key):
        return any(all(row[name] == cell(value) for name, value in key.items()) for row in self.rows)

    def add(self, row):
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        if self.columns is None:
            self.columns = list(row)
            writer.writerow(self.columns)
        self.rows.append({name: cell(value) for name, value in row.items()})
        writer.writerow([self.rows[-1].get(name, "") for name in self.columns])
        with open(self.path, "a", encoding="utf-8") as file:  # in one write, so that a row is there or not
            file.write(out.getvalue())

    def __str__(self):
        names = [name for name in self.columns or [] if name not in ("setting", "example")]
        cells = [names, *([row.get(name) or "-" for name in names] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in cells)


def cell(value):
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value).replace("\n", "\\n")


def versions():
    import numpy

    return (f"python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}, "
            f"{torch.get_num_threads()} threads on {platform.machine()}")  # fmt: skip


def calibration_tokens(model, tokenizer, options):
    """(windows, seq) ids, windows as long as the task's texts from all over the file; without one, what the model writes."""
    if options.calibration is None:
        print("[no --calibration text: the model writes some]", file=sys.stderr)
        return baselines.calibration_text(model, None, options.seed)
    text, seq = load_text(options.calibration), min(options.target_len, model.args.max_seq_len)
    n = max(1, options.calibration_tokens // seq)
    parts = [windows(tokenizer, text[len(text) * i // n :], seq, seq) for i in range(n)]
    return torch.cat(parts).to(model.tok_embeddings.weight.device)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]
    names = lambda text: [part.strip() for part in text.split(",") if part.strip()]
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--data", metavar="FILE", help="see the tasks above; for mmlu a folder")
    add("--ckpt", help="checkpoint, as for generate.py; default: the demo model")
    add("--policies", type=names, default=names(POLICIES), metavar="A,B", help="dense, ffnskip, printed (Algorithm 1 "
        "as printed: skip up to cold_e), names in baselines.py, FILE.py:FACTORY; default: all")  # fmt: skip
    add("--skip", type=numbers(float), default=[0.05, 0.15, 0.25, 0.35], metavar="R,R", help="shares of FFN blocks to "
        "skip, past the warm-up (default 0.05,0.15,0.25,0.35)")  # fmt: skip
    add("--match", type=names, default=["ffn", "bytes"], help="for policies that skip whole layers: ffn, bytes or both")
    add("--warm-up-index", dest="warm_up", type=numbers(int), metavar="N,N", help="tokens 0 to N run in full; several "
        "for task warmup, with a = before -1 (default 25; warmup: -1,5,10,15,20,25,30,40,60)")  # fmt: skip
    add("--calibration", metavar="FILE", help="text, not that of --data, on which the ratios are reached; default: the model's")
    add("--calibration-tokens", type=int, default=4096, metavar="N", help="how much of it (default 4096)")
    add("--limit", type=int, metavar="N", help="tokens (perplexity, warmup: 32768), questions (factoid: 500; mmlu: "
        "all, of each subject; mtbench: all), stories (all), prompts (collapse, worstcase: 32)")  # fmt: skip
    add("--window", type=int, default=512, metavar="N", help="tokens of a window of text (default 512)")
    add("--decode", action="store_true", help="perplexity: token by token, as generation does, instead of in parallel")
    add("--subjects", type=names, metavar="A,B", help="of MMLU; default: all 57")
    add("--max-new-tokens", type=int, metavar="N", help="of a text (default: mtbench 1024, summarize 256, worstcase "
        "512, collapse 256)")  # fmt: skip
    add("--prompt-tokens", type=int, default=128, metavar="N", help="of a prompt from text (default 128)")
    add("--chat", action="store_true", help="the checkpoint's chat template instead of the paper's prompt")
    add("--batch-size", type=int, default=16, metavar="N", help="texts at a time (default 16)")
    add("--output", metavar="CSV", help="default: experiments/results/TASK.csv, without --data TASK_own_text.csv")
    add("--device", help="cpu, cuda, cuda:1, mps; default: cuda or mps where there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    add("--seed", type=int, default=0)
    group = parser.add_argument_group("ffnskip's settings", "as for generate.py: --skip-config, the checkpoint's "
                                      "folder or config/; --skip then moves the threshold")  # fmt: skip
    group.add_argument("--skip-config", metavar="FILE")
    group.add_argument("--cold-s", type=int, metavar="L")
    group.add_argument("--cold-e", type=int, metavar="L")
    group.add_argument("--k", type=int, help="0: None, up to --cold-e")
    group.add_argument("--sim-threshold", type=float, metavar="C", help="use this one; --skip is for the other policies")
    group.add_argument("--printed-cold", type=numbers(int), metavar="S,E", help="cold_s and cold_e of `printed` "
                       "(default: those of ffnskip)")  # fmt: skip
    options = parser.parse_args(argv)
    if options.data is None and options.task not in ("perplexity", "warmup"):
        parser.error(f"{options.task} needs --data")
    if any(not 0 < skip < 1 for skip in options.skip):
        parser.error("--skip wants shares between 0 and 1")
    if not set(options.match) <= {"ffn", "bytes"}:
        parser.error("--match wants ffn, bytes or both")
    options.warm_up = options.warm_up or ([-1, 5, 10, 15, 20, 25, 30, 40, 60] if options.task == "warmup" else [25])
    lengths = dict(mtbench=1024, summarize=256, worstcase=512)
    options.max_new_tokens = options.max_new_tokens or lengths.get(options.task, 256)
    own = "" if options.data else "_own_text"
    options.output = options.output or str(HERE / "results" / f"{options.task}{own}.csv")
    written = options.task in ("mtbench", "summarize", "collapse", "worstcase")
    options.target_len = options.max_new_tokens if written else options.window
    return options


def main(argv=None):
    options = parse_args(argv)
    load, run = TASKS[options.task]
    for name in options.policies:
        find_factory(name)
    device = find_device(options.device)
    data = load(options.data, options) if options.data else None
    same = ("task", "data", "ckpt", "dtype", "limit", "window", "decode", "subjects", "max_new_tokens", "prompt_tokens",
            "chat", "seed", "calibration", "calibration_tokens")  # fmt: skip
    table = Table(options.output, {key: getattr(options, key) for key in same})
    ckpt = find_checkpoint(options.ckpt)
    tokenizer, model = load_weights.load_tokenizer(ckpt), load_weights.load_model(ckpt, device, options.dtype)
    given = {field.name: getattr(options, field.name, None) for field in fields(FFNSkip)}
    flags = Namespace(**given | dict(warm_up_index=None), skip_config=options.skip_config)
    options.settings = find_settings(flags, ckpt, model.args.n_layers)
    tokens, options.reference = None, {}
    for name, skip, match, warm_up in grid(options):
        key = dict(policy=edition(name), skip=skip, match=match, warm_up_index=warm_up)
        whole, ffn = bytes_per_skip(name, model)
        if table.has(key) or (match == "bytes" and (whole == ffn or skip is None)):
            continue  # of a policy that skips nothing but FFN blocks, equal bytes are equal blocks
        if tokens is None and name != "dense":
            tokens = calibration_tokens(model, tokenizer, options)
        begin, options.warm_up_index = time.time(), warm_up
        wanted = skip * ffn / whole if match == "bytes" else skip
        options.label = f"{options.task} {name} {'' if skip is None else skip}"
        try:
            policy, calibrated = make_policy(name, model, wanted, tokens, options)
        except ValueError as error:
            if len(options.policies) == 1:
                raise
            print(f"{options.label}: {error}", file=sys.stderr)
            continue
        if wanted is not None and abs(calibrated - wanted) > max(0.03, 0.6 / model.args.n_layers):  # whole layers are coarse
            print(f"{options.label}: cannot: the nearest is {calibrated:.3f}", file=sys.stderr)
            continue
        options.model_id = f"{name.replace('/', '_').replace(':', '_')}-{cell(skip)}-{match}"
        result = run(model, tokenizer, policy, data, options)
        ratio = result["ffn_skip_ratio"]
        table.add(dict(
            key, calibrated_ratio=calibrated, ffn_skip_ratio=ratio, ffn_saved_ratio=result["ffn_saved_ratio"],
            bytes_saved=None if ratio is None else bytes_saved(name, model, ratio),
            **{name: value for name, value in result.items() if name not in ("ffn_skip_ratio", "ffn_saved_ratio")},
            seconds=round(time.time() - begin, 1), setting=describe(policy),
        ))  # fmt: skip
        print(f"{options.label}: {' '.join(f'{k}={v}' for k, v in list(table.rows[-1].items())[4:12])}", file=sys.stderr)
    print(table)


if __name__ == "__main__":
    load_weights.run_command(main)
