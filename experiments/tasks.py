"""
The tasks of evaluate.py, each a function run(model, tokenizer, policy, data, context) -> a dict of columns for the row,
and the metrics they are scored by. TASKS names them beside the reader of their --data.
"""

import operator
import re
import string
import time
import uuid
from bisect import bisect
from dataclasses import dataclass, field
from os.path import commonprefix
from pathlib import Path

import torch
import torch.nn.functional as F
from readers import load_prompts, load_questions, load_stories, load_text, load_turns
from table import add_record, check_settings, columns, read_records

from generate import generate_batch, sample
from model import KVCache, dense
from policies.baselines import attended_missing, written_text
from support.cache import fork
from support.common import first_difference, note, progress, read_json, to_json, write_whole
from support.measuring import as_tokens, compare_with_dense, cut
from support.tracing import Trace, saved_blocks

CHAT = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: {} ASSISTANT:")
QUESTION = ("Question: What is the capital of Italy?\nAnswer: Rome\n\n"
            "Question: Who wrote the play Hamlet?\nAnswer: William Shakespeare\n\n"
            "Question: Which planet is known as the Red Planet?\nAnswer: Mars\n\n"
            "Question: In which country would you find the Great Pyramid of Giza?\nAnswer: Egypt\n\n"
            "Question: Who was the first man to walk on the moon?\nAnswer: Neil Armstrong\n\n"
            "Question: {}\nAnswer:")


SHORTEST = 256  # characters of a turn, which is not cut to fewer
HEADING = re.compile(r"^ = [^=].* = $", re.MULTILINE)  # of an article of WikiText
LOOP = 32  # tokens of a stretch that repeats one thing, from which on a text counts as looping


@dataclass
class Context:
    """What a task knows beside the policy and its data: the command line's options, and what is kept between rows."""

    limit: int | None = None  # tokens, questions, stories or prompts; None: the task's own
    window: int = 512
    decode: bool = False  # token by token, not in one parallel pass
    max_new_tokens: int = 256
    prompt_tokens: int = 0  # of each window of text, or of a prompt that is the beginning of a text
    chat: bool = False  # the checkpoint's chat template, not the paper's prompt
    batch_size: int = 16
    temperature: float = 0.0  # of texts that the model writes
    margin: float | None = None  # a difference from dense that would be too much, stated beforehand
    rows: int = 1  # windows of text that are one batch
    seed: int = 0
    first: int = 26  # the first token_index whose prediction is compared, in all rows
    warm_up_index: int = 25  # this row's: the dense model's ratios are counted past it too
    label: str = ""  # this row's, for progress bars
    answers: Path | None = None  # this row's file of answers
    settings: dict = field(default_factory=dict)  # what all files in that folder are made with
    scores: dict = field(default_factory=dict)  # {column: [score of each item]} of this row
    articles: list | None = None  # the article that each item is of: those of one are alike, and drawn together
    dense_scores: dict = field(default_factory=dict)  # the same of the dense model's row; {} if there is none
    reference: dict = field(default_factory=dict)  # what the dense model computed or wrote, kept from row to row


def normalise(text):
    """SQuAD's and TriviaQA's: lower case, without punctuation, articles and double spaces."""
    text = re.sub(f"[{re.escape(string.punctuation)}‘’´`_]", " ", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


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
    """
    The columns of several scores; and `difference`, the first ones minus the dense model's of the same items. With a
    margin, within_margin is 1 where the whole interval of the difference says that no more than that is lost.
    """
    context.scores.update(scores)
    row = {}
    for name, values in scores.items():
        row |= columns(name, values, context.articles)
    first = next(iter(scores))
    ours, theirs, differences = scores[first], context.dense_scores.get(first, []), []
    if len(ours) == len(theirs):
        differences = list(map(operator.sub, ours, theirs))
    row |= columns("difference", differences, context.articles)
    if context.margin is not None:
        lost = -(row["difference_low"] or 0) if first == "exact_match" else row["difference_high"] or 0
        row["within_margin"] = int(lost <= context.margin) if differences else None
    return row


def policy_warm_up(policy, context):
    """The dense model's ratios are counted from where those of the others in its row are."""
    return getattr(policy, "warm_up_index", context.warm_up_index)


def count_blocks(read, token_index, policy, context):
    """
    FFN blocks [skipped, of all] past the warm-up, the same over all generated tokens, and as how many blocks past the
    warm-up all that was not read counts, from Trace.read, (layer, ..., token).
    """
    warm_up_index, ran = policy_warm_up(policy, context), read > 0
    unread = (1 - read[:, token_index > warm_up_index]).sum().item()
    return [*saved_blocks(ran, token_index, warm_up_index), *saved_blocks(ran, token_index, -1), unread]


def ratios(counts):
    """The ratios of a list of what count_blocks gave; None where no token was counted."""
    skipped, past, saved, generated, unread = map(sum, zip(*counts))
    return dict(
        unread_ratio=unread / past if past else None,
        ffn_skip_ratio=skipped / past if past else None,
        ffn_saved_ratio=saved / generated if generated else None,
    )


def full_windows(tokenizer, text, n_tokens, size):
    """The ids of the first n_tokens of text in windows of `size`, without the rest. ValueError for none."""
    ids = tokenizer.encode(text[: 16 * n_tokens])[:n_tokens]
    if len(ids) < size:
        raise ValueError(f"{len(ids)} tokens of text do not fill a window of {size}")
    return cut(ids[: len(ids) // size * size], size)


def spread_windows(tokenizer, text, n_tokens, size):
    """
    (windows, articles): the ids of windows of `size`, n_tokens in all, that begin all over the text, and the number of
    the article in which each begins: WikiText's, by its headings; without any, each window is of its own. The first
    n_tokens in a row where the text has not enough for that.
    """
    n = max(1, n_tokens // size)
    headings, windows, articles = [match.start() for match in HEADING.finditer(text)], [], []
    for i in range(n):
        begin, end = len(text) * i // n, len(text) * (i + 1) // n
        ids = tokenizer.encode(text[begin : min(end, begin + 16 * size)])[:size]
        windows.append(ids)
        articles.append(bisect(headings, begin) if headings else i)
    if min(map(len, windows)) < size:
        windows = full_windows(tokenizer, text, n_tokens, size)
        articles = list(range(len(windows)))
    return windows, articles


def saved_at(ran, rows, draws=50):
    """
    The share of FFN blocks that none of `rows` texts needs, which run as one batch: ran (texts, layer, token) bool says
    which blocks each runs alone, and the texts of a batch are drawn. None where there are fewer texts.
    """
    if len(ran) < rows:
        return None
    random, saved = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        batch = ran[torch.randperm(len(ran), generator=random)[:rows]]
        saved.append((~batch.any(0)).double().mean().item())
    return sum(saved) / draws


def perplexity(model, tokenizer, policy, text, context):
    """
    Each window of text on its own: its first prompt_tokens are prompt, the others count as "generated". What any of the
    rows skips begins past them and the largest warm-up.
    """
    size, begin = min(context.window, model.args.max_seq_len), context.prompt_tokens
    if text is None:  # not the text that policies are calibrated on
        windows = written_text(model, 16, min(size, 256), context.seed + 1).tolist()
        articles = list(range(len(windows)))
    else:
        windows, articles = spread_windows(tokenizer, text, context.limit or 32768, size)
    windows = [(ids, begin) for ids in windows]
    generated, past, counts, blocks, missing, read = [], [], [], [], 0, 0
    args = context.reference, context.decode, context.label, context.rows
    for number, (score, trace, cache) in enumerate(compare_with_dense(model, windows, policy, *args)):
        score = score[:, begin:].cpu().double()  # of the predictions by generated tokens
        generated.append(score[0].mean().item())
        past.append(score[:, context.first :].mean(1).tolist())
        row = number % context.rows  # of its batch
        shares, token_index = trace.read[:, row], trace.token_index[row]  # (layer, token), (token,)
        counts.append(count_blocks(shares, token_index, policy, context))
        blocks.append(shares > 0)
        missing += attended_missing(cache).sum().item()
        read += (cache.written * torch.arange(1, cache.max_seq_len + 1)).sum().item()
    nll, kl, top1 = map(list, zip(*past))
    context.articles = articles
    row = means(context, perplexity_past_warm_up=nll, perplexity=generated, kl=kl, top1_agreement=top1)
    context.scores["article"] = articles
    blocks = torch.stack(blocks)  # (window, layer, token)
    for n in 2, 4, 8, 16:
        row[f"ffn_saved_at_{n}"] = saved_at(blocks[:, :, begin + context.first :], n)
    in_prompt = blocks[:, :, context.first : begin]
    return dict(
        **row,
        prompt_skip_ratio=(~in_prompt).double().mean().item() if in_prompt.numel() else None,
        holes_read=missing / read,
        tokens=len(windows) * len(windows[0][0]),
        tokens_compared=len(windows) * (score.size(1) - context.first),
        windows=len(windows),
        articles=len(set(articles)),
        **ratios(counts),
    )


@dataclass
class Text:
    """One text that a policy wrote."""

    ids: list  # without end-of-text
    counts: list  # count_blocks of it
    ran: torch.Tensor  # (layer, token) bool, of its prompt and its tokens
    token_index: torch.Tensor  # (token,)


def check_room(model, context, n):
    """Raise ValueError if a prompt of n tokens leaves less room than the text may take."""
    limit, room = model.args.max_seq_len, context.max_new_tokens
    if n + room > limit:
        raise ValueError(f"a prompt of {n} tokens and {room} new ones are more than the model's max_seq_len {limit}: "
                         "give a smaller --max-new-tokens or --prompt-tokens")


def write_texts(model, tokenizer, policy, prompts, context, stop=True):
    """Texts for prompts (lists of ids), in batches of like length. stop=False: past end-of-text, all as long."""
    texts, room = [None] * len(prompts), context.max_new_tokens
    eos_ids = tokenizer.eos_ids if stop else ()
    check_room(model, context, max(map(len, prompts)))
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for batch in progress(cut(by_length, context.batch_size), context.label):
        trace, written = Trace(), [[] for _ in batch]
        rows = [prompts[i] for i in batch]
        drawn = dict(temperature=context.temperature, seed=context.seed)
        for column in generate_batch(model, rows, room, policy, **drawn, eos_ids=eos_ids, trace=trace):
            for ids, token in zip(written, column):
                if token is not None and token not in eos_ids:
                    ids.append(token)
        read, token_index = trace.read, trace.token_index  # (layer, batch, token), (batch, token)
        for row, i in enumerate(batch):
            counts = count_blocks(read[:, row], token_index[row], policy, context)
            texts[i] = Text(written[row], counts, read[:, row] > 0, token_index[row])
    return texts


def with_shared_prefix(model, policy, prompts, room, context):
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
    for group in progress(groups, context.label):
        cache = fork(base, len(group), len(prompts[group[0]]) + room)
        yield group, torch.tensor([prompts[i][n:] for i in group], device=weight.device), cache


def held_out(tokenizer, questions, context):
    """Prompts of the 128 questions after the scored ones, each with its answer, as ids. ValueError for none."""
    first, texts = context.limit or 500, []
    for question, names in questions[first : first + 128]:
        texts.append(f"{QUESTION.format(question)} {' '.join(names[:1])}")
    if not texts:
        raise ValueError(f"no question is left after {first} to bring policies to a ratio on: give a smaller --limit")
    return [tokenizer.encode(text) for text in texts]


def factoid(model, tokenizer, policy, questions, context):
    """Greedy answers of at most 16 tokens, up to the end of the line."""
    questions = questions[: context.limit or 500]
    prompts = [tokenizer.encode(QUESTION.format(question)) for question, _ in questions]
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
        counts.append(count_blocks(trace.read, token_index, policy, context))
    right, inside = [], []
    for i, (_, names) in enumerate(questions):
        names = {normalise(name) for name in names}
        right.append(int(answers[i] in names))
        inside.append(int(any(f" {name} " in f" {answers[i]} " for name in names)))
    scores = means(context, exact_match=right, answer_within=inside)
    return dict(**scores, questions=len(questions), **ratios(counts))


def prompt_ids(tokenizer, record, context):
    """The first turn of an MT-Bench question as a chat, or the first prompt_tokens of a text."""
    if "turns" in record:
        return chat_ids(tokenizer, record["turns"][:1], context)
    return tokenizer.encode(record["text"][:4096])[: context.prompt_tokens]


def fitting_ids(model, tokenizer, turns, context):
    """
    (chat_ids, cut): cut is 1 where there was too little room for new tokens, and the longest turn, a story or an
    answer, lost its end for that; what stands at its beginning, such as the instruction, stays.
    """
    turns, longest, cut = list(turns), max(1, model.args.max_seq_len - context.max_new_tokens), 0
    ids = chat_ids(tokenizer, turns, context)
    while len(ids) > longest and max(map(len, turns)) > SHORTEST:
        i = max(range(len(turns)), key=lambda i: len(turns[i]))
        turns[i], cut = turns[i][: max(SHORTEST, len(turns[i]) * longest // len(ids))], 1
        ids = chat_ids(tokenizer, turns, context)
    return ids, cut


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
    prompts = [prompt_ids(tokenizer, record, context) for record in records[: context.limit or 32]]
    if "texts" not in context.reference:
        context.reference["texts"] = write_texts(model, tokenizer, dense, prompts, context, context.chat)
    texts = context.reference["texts"]
    if policy is not dense:
        texts = write_texts(model, tokenizer, policy, prompts, context, context.chat)
    scores, counts, tokens = dict(looping=[], longest_loop=[], dense_nll=[], parts_from_dense=[]), [], 0
    for prompt, text, reference in zip(prompts, texts, context.reference["texts"]):
        loop = longest_loop(text.ids)
        scores["looping"].append(int(loop >= LOOP))
        scores["longest_loop"].append(loop)
        scores["dense_nll"].append(mean_nll(model, prompt, text.ids))
        scores["parts_from_dense"].append(first_difference(text.ids, reference.ids))
        counts.append(text.counts)
        tokens += len(text.ids)
    example = tokenizer.decode(texts[0].ids)
    return dict(**means(context, **scores), texts=len(texts), tokens=tokens, **ratios(counts), example=example)


def mean_nll(model, prompt, ids):
    """Of the ids after the prompt, lists, under the dense model, in nats per token: how likely it finds the text."""
    if not ids:
        return 0.0
    tokens = as_tokens(model, (prompt + ids)[-model.args.max_seq_len :])
    logits = model(tokens)[0, -len(ids) - 1 : -1]  # (len(ids), vocab)
    return F.cross_entropy(logits, tokens[0, -len(ids) :]).item()


def worstcase(model, tokenizer, policy, records, context):
    """The share of the tokens past the warm-up for which no FFN block at all was skipped."""
    prompts = [prompt_ids(tokenizer, record, context) for record in records[: context.limit or 32]]
    texts = write_texts(model, tokenizer, policy, prompts, context, stop=False)
    never, counts, tokens = [], [], 0
    for text in texts:
        counts.append(text.counts)
        past = text.token_index > policy_warm_up(policy, context)
        if past.any():
            never.append(text.ran[:, past].all(0).double().mean().item())
        tokens += past.sum().item()
    return dict(**means(context, never=never), texts=len(texts), tokens=tokens, **ratios(counts))


def write_answers(model, tokenizer, policy, records, context):
    """
    An answer to every turn of each record (MT-Bench's questions, or stories to summarize), appended to
    OUTPUT/MODEL_ID.jsonl in FastChat's format for model answers. judge.py has them scored; or put the file under
    data/mt_bench/model_answer/ of FastChat, whose gen_judgment.py asks GPT-4.
    """
    check_answers(context.answers.parent, context.settings)
    answers = list({answer["question_id"]: answer for answer in read_records(context.answers)}.values())
    done = {answer["question_id"] for answer in answers}
    left = [record for record in records[: context.limit] if record["question_id"] not in done]
    for some in cut(left, context.batch_size):
        new, talks = [], [[] for _ in some]  # talks: turns of user and assistant
        for record in some:
            answer = dict(record, answer_id=uuid.uuid4().hex[:22], model_id=context.answers.stem, tstamp=time.time())
            new.append(answer | dict(turns=len(record["turns"]), counts=[0] * 5, tokens=0, loop=0, cut=0))
        for turn in range(max(answer["turns"] for answer in new)):
            asked, prompts = [], []
            for record, answer, talk in zip(some, new, talks):
                if turn < answer["turns"]:
                    talk.append(record["turns"][turn])
                    asked.append((answer, talk))
                    ids, cut_now = fitting_ids(model, tokenizer, talk, context)
                    answer["cut"] |= cut_now
                    prompts.append(ids)
            for (answer, talk), text in zip(asked, write_texts(model, tokenizer, policy, prompts, context)):
                talk.append(tokenizer.decode(text.ids).split("USER:")[0].strip())  # it may go on with a question
                answer["counts"] = list(map(operator.add, answer["counts"], text.counts))
                answer["tokens"] += len(text.ids)
                answer["loop"] = max(answer["loop"], longest_loop(text.ids))
        for answer, talk in zip(new, talks):
            add_record(context.answers, answers, answer | dict(choices=[dict(index=0, turns=talk[1::2])]))
    looping, counts, tokens, n_cut = [], [], 0, 0
    for answer in answers:
        looping.append(int(answer["loop"] >= LOOP))
        counts.append(answer["counts"])
        tokens += answer["tokens"]
        n_cut += answer.get("cut", 0)
    if n_cut:
        note(f"[{context.label}: {n_cut} of {len(answers)} prompts were too long, and their longest turn was cut]")
    row = means(context, looping=looping)
    return dict(**row, answers=len(answers), prompts_cut=n_cut, tokens=tokens, **ratios(counts))


def check_answers(folder, settings):
    """Keep what the answers in a folder are made with. ValueError if those in it are made with something else."""
    file, kept = folder / "settings.json", {}
    if file.exists():
        kept = read_json(file)
    elif any(folder.glob("*.jsonl")):
        note(f"[{folder}: the answers there hold no checksums, so they may be of other weights and data]")
    check_settings(folder, kept, settings, "give another --output, or delete the folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, to_json(kept | settings, indent=1) + "\n")


WRITTEN = dict(mtbench=1024, summarize=256, worstcase=512, collapse=256)  # the model writes: so many tokens at most
TASKS = {
    "perplexity": (load_text, perplexity),
    "warmup": (load_text, perplexity),
    "factoid": (load_questions, factoid),
    "mtbench": (load_turns, write_answers),
    "summarize": (load_stories, write_answers),
    "collapse": (load_prompts, collapse),
    "worstcase": (load_prompts, worstcase),
}
