"""experiments/tasks.py on a tiny model: the metrics, the paper's prompts, and each task against plain computation."""

import json
import math
from types import SimpleNamespace

import pytest
import readers
import tasks
import torch
from tasks import Context
from tiny import STORY, Bytes, close, write_jsonl

from generate import generate
from model import KVCache, dense
from policies import baselines
from skip import FFNSkip
from support.common import first_difference, note
from support.measuring import mean_interval, paired_interval
from support.tracing import Trace

# --- metrics ----------------------------------------------------------------------------------------------------------


def test_normalise():
    assert tasks.normalise("  The  Beatles! ") == tasks.normalise("beatles") == "beatles"
    assert tasks.normalise("A Tale of Two-Cities") == "tale of two cities"
    assert tasks.normalise("than") == "than"  # articles are words, not letters


def test_repetition_by_hand():
    assert tasks.longest_loop([1, 2, 3, 4]) == 0
    assert tasks.longest_loop([9, 7, 7, 8]) == 0  # twice is no loop
    assert tasks.longest_loop([9, 7, 7, 7, 8]) == 3
    assert tasks.longest_loop([0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 5]) == 10
    assert tasks.longest_loop([1, 2, 3, 1, 2, 3, 1, 2]) == 0  # not yet three times


def test_counts_and_ratios_by_hand():
    read = torch.tensor([[1, 1, 0.5, 0, 1], [1, 1, 0, 0, 0.75]])  # (2 layers, 5 tokens)
    token_index, policy = torch.tensor([-1, 0, 1, 2, 3]), SimpleNamespace(warm_up_index=1)
    assert tasks.count_blocks(read, token_index, policy, Context()) == [2, 4, 3, 8, 2.25]
    assert tasks.count_blocks(read, token_index, dense, Context(warm_up_index=0)) == [3, 6, 3, 8, 3.75]  # has none
    both = tasks.count_blocks(read[:, None].expand(2, 3, 5), token_index.expand(3, 5), policy, Context())
    assert both == [6, 12, 9, 24, 6.75]  # of three rows
    found = tasks.ratios([[2, 4, 3, 8, 2.25], [0, 4, 0, 8, 0]])
    assert found == dict(unread_ratio=2.25 / 8, ffn_skip_ratio=2 / 8, ffn_saved_ratio=3 / 16)
    assert tasks.ratios([[0, 0, 1, 8, 0]]) == dict(unread_ratio=None, ffn_skip_ratio=None, ffn_saved_ratio=1 / 8)


# --- prompts ----------------------------------------------------------------------------------------------------------

# As the paper prints them (sections 4.2 and 4.3), where \n\n has blanks around it that only set it apart.
PAPER_CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <QUESTION> ASSISTANT:"
)
PAPER_SUMMARY = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: Summarize the given story in less than 150 words while "
    "preserving high coherence, consistency, fluency, and relevance.\n\n<STORY> ASSISTANT:"
)


@pytest.fixture
def prompted(monkeypatch):
    """The text of every prompt that is written on from then on."""
    texts, write_texts = [], tasks.write_texts

    def keep(model, tokenizer, policy, prompts, *args, **kwargs):
        texts.extend(map(tokenizer.decode, prompts))
        return write_texts(model, tokenizer, policy, prompts, *args, **kwargs)

    monkeypatch.setattr(tasks, "write_texts", keep)
    return texts


def test_the_prompts_are_those_of_the_paper(model, prompted, tmp_path):
    question = "How can I improve my time management skills?"  # the paper's example
    context = Context(max_new_tokens=4, answers=tmp_path / "answers.jsonl")
    tasks.write_answers(model, Bytes(), dense, [dict(question_id=1, turns=[question])], context)
    assert prompted.pop() == PAPER_CHAT.replace("<QUESTION>", question)
    tasks.collapse(model, Bytes(), dense, [dict(turns=[question, "And then?"])], context)
    assert prompted.pop() == PAPER_CHAT.replace("<QUESTION>", question)  # the first turn
    context.answers = tmp_path / "summaries.jsonl"
    write_jsonl(tmp_path / "stories.jsonl", dict(article=STORY, highlights="A fox jumps."))
    stories = readers.load_stories(tmp_path / "stories.jsonl")
    tasks.write_answers(model, Bytes(), dense, stories, context)
    assert prompted.pop() == PAPER_SUMMARY.replace("<STORY>", STORY) and not prompted


def test_two_turns_in_the_papers_prompt_and_in_the_checkpoints_own():
    text = Bytes().decode(tasks.chat_ids(Bytes(), ["One?", "Yes.", "Two?"], Context()))
    assert text == PAPER_CHAT.replace("<QUESTION>", "One?") + " Yes. USER: Two? ASSISTANT:"
    own = Bytes().decode(tasks.chat_ids(Bytes(), ["One?", "Yes.", "Two?"], Context(chat=True)))
    assert own == "[user] One?\n[assistant] Yes.\n[user] Two?\n"


def test_the_questions_held_out_are_those_after_the_scored_ones_with_their_answers():
    questions = [("One?", ["a"]), ("Two?", ["b", "c"]), ("Three?", ["d"])]
    first, second = tasks.held_out(Bytes(), questions, Context(limit=1))
    assert Bytes().decode(first) == tasks.QUESTION.format("Two?") + " b"
    assert Bytes().decode(second).endswith("Question: Three?\nAnswer: d")
    assert Bytes().decode(second).count("Answer: ") == 6
    with pytest.raises(ValueError, match="no question is left after 3 .* give a smaller --limit"):
        tasks.held_out(Bytes(), questions, Context(limit=3))
    assert len(tasks.held_out(Bytes(), questions * 100, Context(limit=5))) == 128


def test_a_prompt_from_text_is_its_first_tokens():
    assert tasks.prompt_ids(Bytes(), dict(text=STORY), Context(prompt_tokens=16)) == list(STORY.encode()[:16])


@pytest.mark.parametrize("chat", [False, True])
def test_the_second_turn_of_mtbench_is_asked_after_the_first_and_its_answer(model, tmp_path, chat):
    policy = FFNSkip(1, 5, 0.9, warm_up_index=4, k=1)
    context = Context(max_new_tokens=12, chat=chat, answers=tmp_path / "answers.jsonl")

    def answer(prompt):
        ids = generate(model, Bytes().encode(prompt), 12, policy, eos_ids=Bytes.eos_ids)
        return Bytes().decode(ids).split("USER:")[0].strip()

    if chat:
        first = answer("[user] Say 81.\n")
        second = answer(f"[user] Say 81.\n[assistant] {first}\n[user] Say it again.\n")
        alone = answer("[user] Say it again.\n")
    else:
        prompt = PAPER_CHAT.replace("<QUESTION>", "Say 81.")
        first = answer(prompt)
        second = answer(f"{prompt} {first} USER: Say it again. ASSISTANT:")
        alone = answer(PAPER_CHAT.replace("<QUESTION>", "Say it again."))
    assert second != alone  # else the test shows nothing
    records = [dict(question_id=81, turns=["Say 81.", "Say it again."])]
    row = tasks.write_answers(model, Bytes(), policy, records, context)
    (written,) = map(json.loads, context.answers.read_text().splitlines())
    assert written["choices"] == [dict(index=0, turns=[first, second])] and written["model_id"] == "answers"
    assert row["answers"] == 1 and row["ffn_saved_ratio"] > 0


# --- tasks against plain computation ----------------------------------------------------------------------------------


def test_perplexity_by_hand(model):
    policy, context = FFNSkip(1, 5, 0.9, warm_up_index=4, k=1), Context(limit=128, window=64, first=5)
    result = tasks.perplexity(model, Bytes(), policy, STORY * 4, context)
    half = len(STORY) * 2  # the windows begin all over the text
    tokens = torch.tensor([Bytes().encode(STORY * 4)[:64], Bytes().encode(STORY * 4)[half : half + 64]])
    trace = Trace()
    p, q = (model(tokens, policy=way, trace=t).softmax(-1)[:, :-1] for way, t in ((policy, trace), (None, None)))
    loss = -p.gather(2, tokens[:, 1:, None])[:, :, 0].log()
    assert result["perplexity"] == pytest.approx(loss.mean().exp().item(), rel=1e-4)
    assert result["perplexity_past_warm_up"] == pytest.approx(loss[:, 5:].mean().exp().item(), rel=1e-4)
    assert result["kl"] == pytest.approx((q * (q / p).log()).sum(-1)[:, 5:].mean().item(), rel=1e-3)
    assert result["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1))[:, 5:].double().mean().item())
    assert result["ffn_skip_ratio"] == trace.ffn_skip_ratio(4) > 0.1
    assert result["ffn_saved_ratio"] == trace.ffn_saved_ratio()
    assert result["tokens"] == 128 and result["tokens_compared"] == 2 * (63 - 5) and result["holes_read"] == 0
    with pytest.raises(ValueError, match="do not fill"):
        tasks.perplexity(model, Bytes(), policy, "short", context)


def test_windows_come_from_all_over_the_text_with_the_article_that_each_begins_in():
    text = "".join(f" = Article {i} = \n" + f" = = Part = = \n{i}\n" * 20 for i in range(3))
    windows, articles = tasks.spread_windows(Bytes(), text, 6 * 16, 16)
    assert len(windows) == 6 and articles == [1, 1, 2, 2, 3, 3]
    for i, ids in enumerate(windows):
        assert ids == Bytes().encode(text[len(text) * i // 6 :])[:16]
    assert tasks.spread_windows(Bytes(), STORY, 64, 16)[1] == [0, 1, 2, 3]  # no headings
    windows, articles = tasks.spread_windows(Bytes(), STORY[:50], 64, 16)  # too short for four apart: in a row
    assert windows == [list(STORY[i : i + 16].encode()) for i in (0, 16, 32)] and articles == [0, 1, 2]


def test_what_a_batch_saves_is_what_none_of_its_rows_needs():
    ran = torch.ones(3, 2, 4, dtype=torch.bool)  # (text, layer, token)
    ran[:, 0, 1] = False  # skipped by all
    ran[0, 1, 2] = False
    assert tasks.saved_at(ran, 1, draws=500) == pytest.approx((1 + 1 / 3) / 8, abs=0.01)
    assert tasks.saved_at(ran, 3) == 1 / 8 and tasks.saved_at(ran, 4) is None


def test_what_is_lost_is_within_the_margin_only_by_the_whole_interval():
    right, wrong = [1.0] * 12, [1.0] * 11 + [0.0]
    for margin, within in (0.5, 1), (0.1, 0), (None, None):
        context = Context(dense_scores=dict(exact_match=right), margin=margin)
        assert tasks.means(context, exact_match=wrong).get("within_margin") == within
    context = Context(dense_scores=dict(kl=[0.0] * 12), margin=0.05)
    assert tasks.means(context, kl=[0.0] * 12)["within_margin"] == 1
    assert tasks.means(context, kl=[-1.0] * 6 + [1.0] * 6)["within_margin"] == 0
    assert tasks.means(Context(margin=0.05), kl=[0.0] * 12)["within_margin"] is None  # no dense row


def test_the_prompt_of_a_window_is_in_full_and_the_warm_up_counts_after_it(model):
    """Else Figure 5 without a warm-up would show what skipping at the first token of a text does."""
    policy = FFNSkip(1, 5, 0.9, warm_up_index=-1, k=1)
    context = Context(limit=64, window=64, first=9, prompt_tokens=20)
    result = tasks.perplexity(model, Bytes(), policy, STORY, context)
    tokens, trace = torch.tensor([Bytes().encode(STORY)[:64]]), Trace()
    p = model(tokens, policy=policy, prompt_len=20, trace=trace).softmax(-1)[0, :-1]
    loss = -p.gather(1, tokens[0, 1:, None])[:, 0].log()
    assert trace.ran[:, 0, :20].all() and not trace.ran[:, 0, 20].all()
    assert result["perplexity"] == pytest.approx(loss[20:].mean().exp().item(), rel=1e-4)
    assert result["perplexity_past_warm_up"] == pytest.approx(loss[29:].mean().exp().item(), rel=1e-4)
    assert result["tokens_compared"] == 63 - 29 and result["ffn_skip_ratio"] == trace.ffn_skip_ratio(-1)


def test_means_have_intervals_over_items_and_a_paired_difference():
    ours, theirs = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.5, 2.0, 2.5, 4.5, 5.5, 6.5]
    context = Context(dense_scores=dict(perplexity=theirs, kl=[0.0]))
    row = tasks.means(context, perplexity=ours, kl=ours[:4], never=[])
    for end, value in zip(("", "_low", "_high"), mean_interval(ours)):
        assert row[f"perplexity{end}"] == pytest.approx(math.exp(value))
    ends = row["difference"], row["difference_low"], row["difference_high"]
    assert ends == pytest.approx(paired_interval(ours, theirs)) and ends[1] < ends[0] < ends[2]
    assert row["kl"] == 2.5 and row["kl_low"] is row["kl_high"] is row["never"] is row["never_low"] is None
    assert context.scores == dict(perplexity=ours, kl=ours[:4], never=[])
    other = tasks.means(Context(dense_scores=dict(perplexity=theirs[:5])), perplexity=ours)
    assert other["difference"] is None  # of other items


@pytest.mark.parametrize("name", ["dense", "ffnskip", "random", "earlyexit"])
def test_parallel_and_token_by_token_agree(model, name):
    policy = {
        "dense": dense,
        "ffnskip": FFNSkip(1, 5, 0.9, 4, k=1),
        "random": baselines.RandomSkip(model, 0.3),
        "earlyexit": baselines.EarlyExit(False, baselines.similarity, 0.8, warm_up_index=4),
    }[name]
    results, lengths = [], []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].size(1)))
    for decode in False, True:
        context = Context(limit=64, window=64, first=5, decode=decode)
        results.append(tasks.perplexity(model, Bytes(), policy, STORY, context))
    assert lengths == [64, 64] + [64] + [1] * 64  # after the dense model's own pass
    measured = [{key: value for key, value in result.items() if value is not None} for result in results]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4, abs=1e-6)
    assert (results[0]["kl"] > 0.01) == (name != "dense")
    assert (results[0]["holes_read"] > 0) == (name == "earlyexit")


def test_the_holes_that_are_read_are_a_share_of_what_is_read(model):
    policy = baselines.EarlyExit(False, baselines.similarity, 0.8, warm_up_index=4)
    result = tasks.perplexity(model, Bytes(), policy, STORY, Context(limit=64, window=64))
    cache, trace = KVCache(model.args, 1, 64), Trace()
    model(torch.tensor([Bytes().encode(STORY)[:64]]), cache, policy, trace=trace)
    read, missing = 0, 0
    for layer, _, token in trace.ran.nonzero().tolist():  # a token that ran in a layer reads all columns up to its own
        read += token + 1
        missing += (~cache.written[layer, 0, :token]).sum().item()
    assert result["holes_read"] == pytest.approx(missing / read) and missing > 0


@pytest.mark.parametrize("name", ["ffnskip", "random", "shortgpt", "earlyexit"])
def test_shared_prefix_is_what_each_prompt_alone_would_give(model, name):
    prompts = [Bytes().encode(STORY[:40] + rest) for rest in ("one", "another one", "two", "six")]
    if name == "ffnskip":
        policy = FFNSkip(1, 5, 0.9, 4, k=1)
    elif name == "earlyexit":
        policy = baselines.EarlyExit(False, baselines.similarity, 0.8, warm_up_index=4)
    else:
        policy = baselines.POLICIES[name](model, 0.3, warm_up_index=4, tokens=torch.tensor(prompts[0])[None])
    seen = []
    for group, tokens, cache in tasks.with_shared_prefix(model, policy, prompts, 1, Context(batch_size=2)):
        logits = model(tokens, cache, policy, last_only=True)
        for row, i in enumerate(group):
            alone_cache = KVCache(model.args, 1, len(prompts[i]))
            alone = model(torch.tensor([prompts[i]]), alone_cache, policy)
            assert close(logits[row, 0], alone[0, -1], 1e-4)
            assert torch.equal(cache.written[:, row, : len(prompts[i])], alone_cache.written[:, 0])
            assert tokens.size(1) == len(prompts[i]) - 40  # the common beginning ran once
            seen.append(i)
        assert len({len(prompts[i]) for i in group}) == 1 and len(group) <= 2
    assert sorted(seen) == [0, 1, 2, 3]


def test_factoid_answers_are_greedy_up_to_the_end_of_the_line(model):
    """And right if they are any alias, whatever the capitals, articles and punctuation of both."""
    policy = FFNSkip(1, 5, 0.9, 25, k=1)
    prompts = [Bytes().encode(tasks.QUESTION.format(question)) for question in ("Fox?", "Bee?")]
    ids = [list(generate(model, p, 16, policy, prompt_len=0)) for p in prompts]
    end = next(i for i in ids[0][1:] if i not in (ids[0][0], ids[0][-1], *ids[1]))  # the second answer never ends
    tokenizer = Bytes()
    tokenizer.decode = lambda ids: "".join("\n" if i == end else chr(97 + i % 26) for i in ids)
    lines = [tokenizer.decode(row).strip().split("\n")[0] for row in ids]
    assert 0 < len(lines[0]) < len(tokenizer.decode(ids[0]).strip())
    context = Context(batch_size=2)
    for alias in lines[0], f"The {lines[0].title()}!", lines[0].upper() + ".":
        questions = [("Fox?", ["x", alias]), ("Bee?", ["y"])]
        right = tasks.factoid(model, tokenizer, policy, questions, context)
        assert right["exact_match"] == right["answer_within"] == 0.5
    assert right["questions"] == 2 and right["ffn_skip_ratio"] > 0.05
    alone = tasks.factoid(model, tokenizer, policy, questions, Context(batch_size=1))  # each stops at its own end
    assert alone["ffn_skip_ratio"] == right["ffn_skip_ratio"] and alone["ffn_saved_ratio"] == right["ffn_saved_ratio"]
    part = [("Fox?", [lines[0][1:]]), ("Bee?", ["y"])]
    assert tasks.factoid(model, tokenizer, policy, part, context)["exact_match"] == 0


def test_an_alias_within_an_answer_is_a_whole_word(model):
    tokenizer = Bytes()
    tokenizer.decode = lambda ids: " the Red-Planet, Mars\n"
    for alias, exact, within in ("Mars", 0, 1), ("RED PLANET", 0, 1), ("plan", 0, 0), ("A red planet: Mars.", 1, 1):
        result = tasks.factoid(model, tokenizer, dense, [("Which?", ["no", alias])], Context())
        assert (result["exact_match"], result["answer_within"]) == (exact, within)


def test_collapse_by_hand(model):
    policy = FFNSkip(1, 5, 0.9, warm_up_index=4, k=1)
    prompt = Bytes().encode(STORY)[:16]
    texts = [list(generate(model, prompt, 60, way)) for way in (dense, policy)]
    assert texts[0] != texts[1]
    context = Context(max_new_tokens=60, prompt_tokens=16)
    result = tasks.collapse(model, Bytes(), policy, [dict(text=STORY)], context)
    assert result["parts_from_dense"] == first_difference(*texts) < 60
    assert result["longest_loop"] == tasks.longest_loop(texts[1])
    assert result["looping"] == (tasks.longest_loop(texts[1]) >= 32)
    assert result["tokens"] == 60
    log_probs = model(torch.tensor([prompt + texts[1]]))[0].log_softmax(-1)
    chosen = [log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(texts[1])]
    assert result["dense_nll"] == pytest.approx(-sum(chosen) / 60, abs=1e-4)
    assert tasks.collapse(model, Bytes(), dense, [dict(text=STORY)], context)["parts_from_dense"] == 60


@pytest.mark.parametrize("chat", [False, True])
def test_collapse_ends_with_end_of_text_where_the_template_is_the_checkpoints_own(model, chat):
    ids = Bytes().encode("[user] Say.\n" if chat else PAPER_CHAT.replace("<QUESTION>", "Say."))
    text = list(generate(model, ids, 40))
    tokenizer = Bytes()
    tokenizer.eos_ids = {text[20]}
    result = tasks.collapse(model, tokenizer, dense, [dict(turns=["Say."])], Context(max_new_tokens=40, chat=chat))
    assert result["tokens"] == (text.index(text[20]) if chat else 40)


def test_worstcase_by_hand(model):
    policy = FFNSkip(1, 5, 0.97, warm_up_index=4, k=1)
    result = tasks.worstcase(model, Bytes(), policy, [dict(text=STORY)], Context(max_new_tokens=80, prompt_tokens=16))
    trace = Trace()
    list(generate(model, Bytes().encode(STORY)[:16], 80, policy, trace=trace))
    never, index = trace.ran[:, 0].all(0), trace.token_index[0]
    assert result["never"] == never[index > 4].double().mean()
    assert 0 < result["never"] < 1


@pytest.mark.parametrize("chat", [False, True])
def test_a_story_that_is_too_long_loses_its_end_and_not_the_instruction(model, prompted, tmp_path, capsys, chat):
    """It is counted; an answer before a second turn is cut likewise, and what would lose more than that is an error."""
    note.cache_clear()
    context = Context(max_new_tokens=24, chat=chat, answers=tmp_path / "a" / "answers.jsonl", label="summarize x")
    stories = [dict(question_id=i, turns=[readers.SUMMARIZE + text]) for i, text in enumerate((STORY, STORY * 40))]
    row = tasks.write_answers(model, Bytes(), dense, stories, context)
    short, long = sorted(prompted, key=len)
    head, tail = ("[user] ", "\n") if chat else (PAPER_CHAT.split("<")[0], " ASSISTANT:")
    assert short == head + readers.SUMMARIZE + STORY + tail
    assert long.startswith(head + readers.SUMMARIZE + STORY) and long.endswith(tail) and 960 < len(long) <= 1000
    assert row["prompts_cut"] == 1 and "summarize x: 1 of 2 prompts were too long" in capsys.readouterr().err
    turns = ["One?", "word " * 400, "Two?"]
    ids, cut = tasks.fitting_ids(model, Bytes(), turns, context)
    assert cut and "One?" in Bytes().decode(ids) and "Two?" in Bytes().decode(ids) and len(ids) <= 1000
    assert tasks.fitting_ids(model, Bytes(), turns[:1], context) == (tasks.chat_ids(Bytes(), turns[:1], context), 0)
    context.max_new_tokens = 1000
    with pytest.raises(ValueError, match="and 1000 new ones are more than the model's max_seq_len 1024: give"):
        tasks.write_answers(model, Bytes(), dense, [dict(question_id=7, turns=["Why? " * 99])], context)
    with pytest.raises(ValueError, match="a prompt of 30 tokens and 1000 new ones"):
        tasks.collapse(model, Bytes(), dense, [dict(text=STORY)], Context(max_new_tokens=1000, prompt_tokens=30))


def test_answers_are_those_of_each_record_alone(model, tmp_path):
    """Whatever else is in a batch, and however many turns it has; what describes a record is kept beside them."""
    turns = ["Say 1."], ["Say 22.", "Say it again."], ["Say 333."]
    records = [dict(question_id=i, length="small", words=2, turns=own) for i, own in enumerate(turns)]
    together = Context(max_new_tokens=8, batch_size=3, answers=tmp_path / "together.jsonl")
    row = tasks.write_answers(model, Bytes(), dense, records, together)
    alone = Context(max_new_tokens=8, batch_size=1, answers=tmp_path / "alone.jsonl")
    assert tasks.write_answers(model, Bytes(), dense, records, alone) == row and row["answers"] == 3
    both = [map(json.loads, context.answers.read_text().splitlines()) for context in (together, alone)]
    for record, a, b in zip(records, *both):
        assert a["choices"] == b["choices"] and a["counts"] == b["counts"] and a["length"] == "small"
        assert len(a["choices"][0]["turns"]) == len(record["turns"])


def test_text_of_the_models_own_is_not_that_which_policies_are_calibrated_on(model, monkeypatch):
    seeds = []
    monkeypatch.setattr(tasks, "written_text", lambda *args: seeds.append(args[3]) or torch.tensor([[1, 2, 3, 4]] * 2))
    tasks.perplexity(model, Bytes(), dense, None, Context(seed=5, window=4))
    assert seeds == [6]  # evaluate.calibrate has 5
