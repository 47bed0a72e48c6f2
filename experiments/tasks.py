"""
The tasks of evaluate.py, each a function run(model, tokenizer, policy, data, context) -> a dict of columns for the row,
and the metrics they are scored by. TASKS names them beside the reader of their --data.
"""

import re
import string
import time
import uuid
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path

import torch
import torch.nn.functional as F
from policies.baselines import attended_missing, written_text
from readers import (
    CLASSES,
    length_class,
    load_mmlu,
    load_prompts,
    load_questions,
    load_stories,
    load_text,
    load_turns,
)
from table import add_record, columns, read_records

from support.cache import fork
from support.common import first_difference, progress
from generate import generate_batch, sample
from support.common import check_finite
from support.measuring import as_tokens, compare_with_dense, cut
from model import KVCache, dense
from support.tracing import Trace
from support.tracing import saved_blocks

CHAT = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: {} ASSISTANT:")
SUMMARIZE = ("Summarize the given story in less than 150 words while preserving high coherence, consistency, fluency, "
             "and relevance.\n\n{}")
SHOTS = ("Question: What is the capital of Italy?\nAnswer: Rome\n\n"
         "Question: Who wrote the play Hamlet?\nAnswer: William Shakespeare\n\n"
         "Question: Which planet is known as the Red Planet?\nAnswer: Mars\n\n"
         "Question: In which country would you find the Great Pyramid of Giza?\nAnswer: Egypt\n\n"
         "Question: Who was the first man to walk on the moon?\nAnswer: Neil Armstrong\n\n")
PROMPTS = {  # of factoid; the second is that of https://github.com/VITA-Group/llm-kick, by the paper's first author
    "few-shot": SHOTS + "Question: {}\nAnswer:",
    "llm-kick": "Please give answer to this question: {}\nThe answer is ",
}
CATEGORIES = {  # of MMLU's subjects, after Hendrycks et al. 2021; "other" is what is left
    "stem": "abstract_algebra astronomy college_biology college_chemistry college_computer_science "
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


@dataclass
class Context:
    """What a task knows beside the policy and its data: the command line's options, and what is kept between rows."""

    limit: int | None = None  # tokens, questions, stories or prompts; None: the task's own
    window: int = 512
    decode: bool = False  # token by token, not in one parallel pass
    max_new_tokens: int = 256
    prompt_tokens: int = 0  # of each window of text, or of a prompt that is the beginning of a text
    prompt_style: str = "few-shot"
    chat: bool = False  # the checkpoint's chat template, not the paper's prompt
    batch_size: int = 16
    seed: int = 0
    first: int = 26  # the first token_index whose prediction is compared, in all rows
    warm_up_index: int = 25  # this row's: the dense model's ratios are counted past it too
    label: str = ""  # this row's, for progress bars
    answers: Path | None = None  # this row's file of answers
    scores: dict = field(default_factory=dict)  # {column: [score of each item]} of this row
    dense_scores: dict = field(default_factory=dict)  # the same of the dense model's row; {} if there is none
    reference: dict = field(default_factory=dict)  # what the dense model computed or wrote, kept from row to row


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
    """Distinct n-grams of ids / all of them, 0 to 1 (Li et al. 2016); 1 if there is none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_loop(ids, longest_period=64):
    """Tokens in the longest stretch that repeats one thing at least three times; 0 if there is none."""
    best = 0
    for period in range(1, min(longest_period, len(ids) // 3) + 1):
        run = 0
        for i in range(period, len(ids)):
            run = run + 1 if ids[i] == ids[i - period] else 0
            if run >= 2 * period:
                best = max(best, run + period)
    return best


def means(context, **scores):
    """The columns of several scores; and `difference`, the first ones minus the dense model's of the same items."""
    context.scores.update(scores)
    row = {}
    for name, values in scores.items():
        row |= columns(name, values)
    first = next(iter(scores))
    theirs = context.dense_scores.get(first, [])
    paired = zip(scores[first], theirs) if len(theirs) == len(scores[first]) else []
    return row | columns("difference", [ours - dense for ours, dense in paired])


def policy_warm_up(policy, context):
    """The dense model's ratios are counted from where those of the others in its row are."""
    return getattr(policy, "warm_up_index", context.warm_up_index)


def count_blocks(ran, token_index, policy, context):
    """FFN blocks [skipped, of all] past the warm-up, then the same over all generated tokens; see tracing.Trace."""
    warm_up_index = policy_warm_up(policy, context)
    return [*saved_blocks(ran, token_index, warm_up_index), *saved_blocks(ran, token_index, -1)]


def ratios(counts):
    """ffn_skip_ratio and ffn_saved_ratio from a list of what count_blocks gave; None where no token was counted."""
    skipped, past, saved, generated = (sum(column) for column in zip(*counts))
    return dict(
        ffn_skip_ratio=skipped / past if past else None,
        ffn_saved_ratio=saved / generated if generated else None,
    )


def full_windows(tokenizer, text, n_tokens, size):
    """The ids of the first n_tokens of text in windows of `size`, without the rest. ValueError for none."""
    ids = tokenizer.encode(text[: 16 * n_tokens])[:n_tokens]
    windows = [window for window in cut(ids, size) if len(window) == size]
    if not windows:
        raise ValueError(f"{len(ids)} tokens of text do not fill a window of {size}")
    return windows


def perplexity(model, tokenizer, policy, text, context):
    """
    Each window of text on its own: its first prompt_tokens are prompt, the others count as "generated". What any of the
    rows skips begins past them and the largest warm-up.
    """
    size, begin = min(context.window, model.args.max_seq_len), context.prompt_tokens
    if text is None:  # not the text that policies are calibrated on
        windows = written_text(model, 16, min(size, 256), context.seed + 1).tolist()
    else:
        windows = full_windows(tokenizer, text, context.limit or 32768, size)
    windows = [(ids, begin) for ids in windows]
    generated, past, counts, missing, read = [], [], [], 0, 0
    for score, trace, cache in compare_with_dense(
        model, windows, policy, context.reference, context.decode, context.label
    ):
        score = score[:, begin:].double()  # of the predictions by generated tokens
        generated.append(score[0].mean().item())
        past.append(score[:, context.first :].mean(1).tolist())
        counts.append(count_blocks(trace.ran, trace.token_index, policy, context))
        missing += attended_missing(cache).sum().item()
        read += (cache.written * torch.arange(1, cache.max_seq_len + 1)).sum().item()
    nll, kl, top1 = map(list, zip(*past))
    return dict(
        **means(context, perplexity_past_warm_up=nll, perplexity=generated, kl=kl, top1_agreement=top1),
        holes_read=missing / read,
        tokens=sum(len(ids) for ids, _ in windows),
        tokens_compared=len(windows) * (score.size(1) - context.first),
        **ratios(counts),
    )


def with_shared_prefix(model, policy, prompts, room, context, name=""):
    """
    What all prompts (lists of ids) begin with is run once; then groups of prompts of equal length, so that there is no
    padding: yields (which prompts, their other tokens (batch, seq), a cache that holds the beginning and has `room`).
    The policy works in the prompt too, past its warm-up (prompt_len=0): chunks do not change what it skips.
    """
    weight = model.tok_embeddings.weight
    n = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)
    base = KVCache(model.args, 1, max(n, 1), weight.dtype, weight.device)
    if n:
        model(torch.tensor([prompts[0][:n]], device=weight.device), base, policy, last_only=True)
    groups = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        full = groups and len(groups[-1]) == context.batch_size
        if not groups or full or len(prompts[groups[-1][0]]) != len(prompts[i]):
            groups.append([])
        groups[-1].append(i)
    for group in progress(groups, f"{context.label} {name}"):
        cache = fork(base, len(group), len(prompts[group[0]]) + room)
        yield group, torch.tensor([prompts[i][n:] for i in group], device=weight.device), cache


def held_out(tokenizer, questions, context):
    """Prompts of the 128 questions after the scored ones, each with its answer, as ids. ValueError for none."""
    first, texts = context.limit or 500, []
    for question, names in questions[first : first + 128]:
        texts.append(f"{PROMPTS[context.prompt_style].format(question).rstrip()} {' '.join(names[:1])}")
    if not texts:
        raise ValueError(f"no question is left after {first} to bring policies to a ratio on: give a smaller --limit")
    return [tokenizer.encode(text) for text in texts]


def factoid(model, tokenizer, policy, questions, context):
    """Greedy answers of at most 16 tokens, up to the end of the line."""
    questions = questions[: context.limit or 500]
    prompts = [tokenizer.encode(PROMPTS[context.prompt_style].format(question)) for question, _ in questions]
    answers, counts = {}, []
    for group, tokens, cache in with_shared_prefix(model, policy, prompts, 16, context):
        trace, ids, forwarded = Trace(), [], [tokens.size(1)] * len(group)
        for _ in range(16):
            tokens = sample(model(tokens, cache, policy, trace=trace, last_only=True)[:, -1])[:, None].to(tokens.device)
            ids.append(tokens)
            texts = [tokenizer.decode(row) for row in torch.cat(ids, dim=1).tolist()]
            for row, text in enumerate(texts):
                forwarded[row] += "\n" not in text.lstrip()
            if all("\n" in text.lstrip() for text in texts):
                break
        token_index = trace.token_index  # (batch, tokens)
        for row, n in enumerate(forwarded):
            token_index[row, n:] = -1  # what a row writes beside the others after its answer counts for nothing
        for i, text in zip(group, texts):
            answers[i] = normalise(text.strip().split("\n")[0])
        counts.append(count_blocks(trace.ran, token_index, policy, context))
    right, inside = [], []
    for i, (_, names) in enumerate(questions):
        names = {normalise(name) for name in names}
        right.append(int(answers[i] in names))
        inside.append(int(any(f" {name} " in f" {answers[i]} " for name in names)))
    scores = means(context, exact_match=right, answer_within=inside)
    return dict(**scores, questions=len(questions), **ratios(counts))


def question_prompt(question, choices):
    lines = [question, *(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices)), "Answer:"]
    return "\n".join(lines)


def mmlu_prompts(tokenizer, subject, shots, questions, longest):
    """Hendrycks' prompt for each question, as ids, with as many of the five solved questions as fit."""
    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    shown = [f"{question_prompt(question, choices)} {answer}\n\n" for question, choices, answer in shots]
    while True:
        begin = head + "".join(shown)
        prompts = [tokenizer.encode(begin + question_prompt(question, choices)) for question, choices, _ in questions]
        if not shown or max(map(len, prompts)) <= longest:
            return prompts
        shown.pop()


def mmlu(model, tokenizer, policy, subjects, context):
    """5-shot; the likeliest of the four letters after "Answer:"."""
    right, counts = {}, []  # right: {(subject, question): bool}
    letters = [tokenizer.encode(f"Answer: {letter}")[-1] for letter in "ABCD"]
    for subject, (shots, questions) in subjects.items():
        questions = questions[: context.limit]
        prompts = mmlu_prompts(tokenizer, subject, shots, questions, model.args.max_seq_len)
        for group, tokens, cache in with_shared_prefix(model, policy, prompts, 0, context, subject):
            trace = Trace()
            logits = model(tokens, cache, policy, trace=trace, last_only=True)[:, -1, letters]
            check_finite(logits)
            for i, best in zip(group, logits.argmax(-1).tolist()):
                right[subject, i] = int("ABCD"[best] == questions[i][2])
            counts.append(count_blocks(trace.ran, trace.token_index, policy, context))
    scores = {category: [] for category in ("all", *CATEGORIES, "other")}
    for (subject, _), value in sorted(right.items()):
        of = [category for category, names in CATEGORIES.items() if subject in names.split()]
        scores["all"].append(value)
        scores[of[0] if of else "other"].append(value)
    return dict(**means(context, **scores), questions=len(right), **ratios(counts))


@dataclass
class Text:
    """One text that a policy wrote."""

    ids: list  # without end-of-text
    counts: list  # count_blocks of it
    ran: torch.Tensor  # (layer, token) bool, of its prompt and its tokens
    token_index: torch.Tensor  # (token,)


def write_texts(model, tokenizer, policy, prompts, context, stop=True):
    """Greedy Texts for prompts (lists of ids), in batches of like length. stop=False: past end-of-text, all as long."""
    texts, room = {}, context.max_new_tokens
    stops = tokenizer.eos_ids if stop else ()
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for batch in progress(cut(by_length, context.batch_size), context.label):
        trace = Trace()
        rows = [prompts[i][-max(1, model.args.max_seq_len - room) :] for i in batch]
        columns = list(generate_batch(model, rows, room, policy, eos_ids=stops, trace=trace))
        ran, token_index = trace.ran, trace.token_index  # (layer, batch, token), (batch, token)
        for row, i in enumerate(batch):
            ids = [column[row] for column in columns if column[row] is not None and column[row] not in stops]
            own = ran[:, row], token_index[row]
            texts[i] = Text(ids, count_blocks(*own, policy, context), *own)
    return [texts[i] for i in range(len(prompts))]


def prompt_ids(tokenizer, record, context):
    """The first turn of an MT-Bench question as a chat, or the first prompt_tokens of a text."""
    if "turns" in record:
        return chat_ids(tokenizer, record["turns"][:1], context)
    return tokenizer.encode(record["text"][:4096])[: context.prompt_tokens]


def chat_ids(tokenizer, turns, context):
    """Turns of user and assistant as ids: the paper's prompt, or with --chat the checkpoint's own template."""
    if context.chat:
        roles = ("user", "assistant") * len(turns)
        return tokenizer.chat([dict(role=role, content=turn) for role, turn in zip(roles, turns)])
    text = CHAT.format(turns[0])
    for answer, question in zip(turns[1::2], turns[2::2]):
        text += f" {answer} USER: {question} ASSISTANT:"
    return tokenizer.encode(text)


def collapse(model, tokenizer, policy, records, context):
    """
    Texts that do not stop at end-of-text, so that all have the same length; with --chat they do, as a user has them.
    The dense ones are written once.
    """
    stop = context.chat
    prompts = [prompt_ids(tokenizer, record, context) for record in records[: context.limit or 32]]
    if "texts" not in context.reference:
        context.reference["texts"] = write_texts(model, tokenizer, dense, prompts, context, stop)
    texts = context.reference["texts"]
    if policy is not dense:
        texts = write_texts(model, tokenizer, policy, prompts, context, stop)
    ids = [text.ids for text in texts]
    loops = [longest_loop(text) for text in ids]
    scores = dict(looping=[int(loop >= 32) for loop in loops], longest_loop=loops)
    scores |= {f"distinct_{n}": [distinct_n(text, n) for text in ids] for n in (1, 2, 4)}
    scores["dense_nll"] = [mean_nll(model, *text) for text in zip(prompts, ids)]
    scores["parts_from_dense"] = [first_difference(a, b.ids) for a, b in zip(ids, context.reference["texts"])]
    return dict(
        **means(context, **scores),
        texts=len(ids),
        tokens=sum(map(len, ids)),
        **ratios([text.counts for text in texts]),
        example=tokenizer.decode(ids[0]),
    )


def mean_nll(model, prompt, ids):
    """Of the ids after the prompt, lists, under the dense model, in nats per token: how likely it finds the text."""
    if not ids:
        return 0.0
    tokens = as_tokens(model, (prompt + ids)[-model.args.max_seq_len :])
    logits = model(tokens)[0, -len(ids) - 1 : -1]  # (len(ids), vocab)
    return F.cross_entropy(logits, tokens[0, -len(ids) :]).item()


def worstcase(model, tokenizer, policy, records, context):
    """Tokens past the warm-up for which no FFN block at all was skipped, by position in the generated text."""
    prompts = [prompt_ids(tokenizer, record, context) for record in records[: context.limit or 32]]
    texts = write_texts(model, tokenizer, policy, prompts, context, stop=False)
    edges = [edge for edge in (64, 128, 256, 512, 1024, 2048) if edge < context.max_new_tokens]
    edges.append(context.max_new_tokens)
    scores, tokens = {"never": [], **{f"never_below_{edge}": [] for edge in edges}}, 0
    for text in texts:
        past = text.token_index > policy_warm_up(policy, context)
        full, index = text.ran[:, past].all(0).double(), text.token_index[past]
        tokens += len(index)
        if len(index):
            scores["never"].append(full.mean().item())
        for low, high in zip([0, *edges], edges):
            inside = full[(index >= low) & (index < high)]
            if len(inside):
                scores[f"never_below_{high}"].append(inside.mean().item())
    return dict(**means(context, **scores), texts=len(texts), tokens=tokens, **ratios([text.counts for text in texts]))


def mtbench(model, tokenizer, policy, records, context):
    """
    Both turns of each question, appended to OUTPUT/MODEL_ID.jsonl in FastChat's format for model answers. Put it under
    data/mt_bench/model_answer/ of FastChat, and its gen_judgment.py asks GPT-4 for the scores.
    """
    answers = read_records(context.answers)
    done = {answer["question_id"] for answer in answers}
    for record in records[: context.limit]:
        if record["question_id"] in done:
            continue
        turns, counts, loops, tokens = [], [], [], 0
        for question in record["turns"]:
            prompt = chat_ids(tokenizer, [*turns, question], context)
            (text,) = write_texts(model, tokenizer, policy, [prompt], context)
            turns += [question, tokenizer.decode(text.ids).split("USER:")[0].strip()]
            counts.append(text.counts)
            loops.append(longest_loop(text.ids))
            tokens += len(text.ids)
        add_record(context.answers, answers, dict(
            question_id=record["question_id"],
            answer_id=uuid.uuid4().hex[:22],
            model_id=context.answers.stem,
            choices=[dict(index=0, turns=turns[1::2])],
            tstamp=time.time(),
            counts=[sum(column) for column in zip(*counts)],
            tokens=tokens,
            loop=max(loops),
        ))
    return dict(
        **means(context, looping=[int(answer["loop"] >= 32) for answer in answers]),
        answers=len(answers),
        tokens=sum(answer["tokens"] for answer in answers),
        **ratios([answer["counts"] for answer in answers]),
    )


def summarize(model, tokenizer, policy, stories, context):
    """Summaries by the paper's prompt, scored in all and by length of the story."""
    answers = read_records(context.answers)
    for some in cut(stories[len(answers) : context.limit], context.batch_size):
        prompts = [chat_ids(tokenizer, [SUMMARIZE.format(story)], context) for story, _ in some]
        texts = write_texts(model, tokenizer, policy, prompts, context)
        for (story, reference), text in zip(some, texts):
            summary = tokenizer.decode(text.ids).split("USER:")[0].strip()
            score = rouge_l(summary, reference)
            answer = dict(size=length_class(story), words=len(story.split()), rouge_l=score)
            answer |= dict(summary=summary, counts=text.counts)
            add_record(context.answers, answers, answer)
    scores = {"rouge_l": [answer["rouge_l"] for answer in answers]}
    for size in CLASSES:
        scores[f"rouge_l_{size}"] = [answer["rouge_l"] for answer in answers if answer["size"] == size]
    numbers = {f"rouge_l_{size}_n": len(scores[f"rouge_l_{size}"]) for size in CLASSES}
    return dict(**means(context, **scores), **numbers, **ratios([answer["counts"] for answer in answers]))


WRITTEN = dict(mtbench=1024, summarize=256, worstcase=512, collapse=256)  # the model writes: so many tokens at most
TASKS = {
    "perplexity": (load_text, perplexity),
    "warmup": (load_text, perplexity),
    "factoid": (load_questions, factoid),
    "mmlu": (load_mmlu, mmlu),
    "mtbench": (load_turns, mtbench),
    "summarize": (load_stories, summarize),
    "collapse": (load_prompts, collapse),
    "worstcase": (load_prompts, worstcase),
}
