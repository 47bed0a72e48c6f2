"""experiments/evaluate.py: metrics by hand, data files good and bad, every task on a tiny model, resuming."""

import csv
import io
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import baselines
import evaluate
import readers
from test_golden import GOLDEN
from tiny import close, tiny_model

from generate import generate
from model import KVCache, dense
from skip import FFNSkip, Trace

STORY = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "


class Letters:
    """A tokenizer with a token for each ASCII character."""

    eos_ids = (0,)

    def encode(self, text, bos=None):
        return [ord(c) % 128 for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def chat(self, messages):
        return self.encode("".join(f"[{m['role']}] {m['content']}\n" for m in messages))


@pytest.fixture
def model():
    return tiny_model(n_layers=6, vocab_size=128, max_seq_len=1024)


@pytest.fixture
def data(tmp_path):
    """One small file for each task: what the user would have."""
    write = lambda name, text: (tmp_path / name).write_text(text, encoding="utf-8")
    write("text.raw", STORY * 12)
    write("c4.jsonl", "".join(json.dumps(dict(text=f"{i} {STORY}")) + "\n" for i in range(3)))
    write("questions.txt", "Which fox is quick? | brown\nWhich dog is lazy? | the dog\nWho minds? | nobody \n")
    turns = [dict(question_id=i, category="writing", turns=[f"Say {i}.", "Say it again."]) for i in (81, 82)]
    write("question.jsonl", "".join(json.dumps(t) + "\n" for t in turns))
    rows = [
        ["", "text", "y"],
        ["0", STORY * 2, "A fox jumps."],
        ["1", "word " * 500, "Words."],
        ["2", "w " * 800, "Ws."],
    ]
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    write("stories.csv", out.getvalue())
    for part, header, answers in ("dev", True, "0123"), ("test", False, "ABCD"):
        (tmp_path / "mmlu" / part).mkdir(parents=True)
        for name in ("anatomy", "sociology"):
            lines = ["question,choice0,choice1,choice2,choice3,answer"] * header
            lines += [f'"{name}, {i}?",red,green,blue,grey,{a}' for i, a in enumerate(answers)]
            write(f"mmlu/{part}/{name}_{part}.csv", "\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def run(model, data, monkeypatch):
    """run(task, file or None, *flags) -> the rows of its CSV, as dicts."""
    monkeypatch.setattr(evaluate, "find_checkpoint", lambda path: Path("tiny"))
    monkeypatch.setattr(evaluate.load_weights, "load_tokenizer", lambda path: Letters())
    monkeypatch.setattr(evaluate.load_weights, "load_model", lambda path, device, dtype: model)

    def call(task, file, *flags):
        output = data / "out.csv"
        common = [
            "--cold-s",
            "1",
            "--cold-e",
            "5",
            "--k",
            "1",
            "--calibration",
            str(data / "text.raw"),
            "--window",
            "64",
        ]
        common += ["--warm-up-index", "4", "--skip", "0.2", "--calibration-tokens", "256", "--device", "cpu"]
        evaluate.main([task, *(["--data", str(data / file)] if file else []), "--output", str(output), *common, *map(str, flags)])
        lines = output.read_text().splitlines()
        assert lines[0].startswith("# command: python") and "torch" in lines[1]
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))

    return call


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_normalise():
    assert evaluate.normalise("  The  Beatles! ") == evaluate.normalise("beatles") == "beatles"
    assert evaluate.normalise("A Tale of Two-Cities") == "tale of two cities"
    assert evaluate.normalise("than") == "than"  # articles are words, not letters


def test_rouge_l_by_hand():
    assert evaluate.rouge_l("The cat sat.", "the cat sat") == 1
    assert evaluate.rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)  # Lin 2004, S2
    assert evaluate.rouge_l("the gunman kill police", "police kill the gunman") == pytest.approx(0.5)  # Lin 2004, S3
    assert evaluate.rouge_l("a b c d", "b d") == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert (
        evaluate.rouge_l("the the the", "the") == evaluate.rouge_l("the", "the the the") == 0.5
    )  # a word matches once
    assert evaluate.rouge_l("", "x") == evaluate.rouge_l("y", "x") == 0


def test_repetition_by_hand():
    assert evaluate.distinct_n([1, 2, 1, 2, 1], 2) == 2 / 4
    assert evaluate.distinct_n([1, 2, 3], 1) == evaluate.distinct_n([1], 2) == 1
    assert evaluate.longest_loop([1, 2, 3, 4]) == 0
    assert evaluate.longest_loop([9, 7, 7, 8]) == 0  # twice is no loop
    assert evaluate.longest_loop([9, 7, 7, 7, 8]) == 3
    assert evaluate.longest_loop([0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 5]) == 10
    assert evaluate.longest_loop([1, 2, 3, 1, 2, 3, 1, 2]) == 0  # not yet three times
    assert evaluate.parts_at([1, 2, 3], [1, 2, 4]) == 2 and evaluate.parts_at([1, 2], [1, 2, 3]) == 2


def test_counts_and_ratios_by_hand():
    ran = torch.tensor([[[1, 1, 1, 0, 1]], [[1, 1, 0, 0, 1]]]).bool()  # (2 layers, 1 row, 5 tokens)
    trace = Namespace(ran=ran, token_index=torch.tensor([[-1, 0, 1, 2, 3]]))
    assert evaluate.counts(trace, 1) == [2, 4, 3, 8]
    assert evaluate.ratios([[2, 4, 3, 8], [0, 4, 0, 8]]) == dict(ffn_skip_ratio=2 / 8, ffn_saved_ratio=3 / 16)
    assert evaluate.ratios([[0, 0, 1, 8]]) == dict(ffn_skip_ratio=None, ffn_saved_ratio=1 / 8)


# --- data -------------------------------------------------------------------------------------------------------------


def test_questions_in_all_formats(tmp_path):
    file = tmp_path / "q.txt"
    file.write_text("Who? | ghana \n\nWhat | a|b\n")
    assert evaluate.load_questions(file) == [("Who?", ["ghana"]), ("What", ["a", "b"])]
    answers = [dict(AnswersMid="m.1", AnswersName=["the who"]), dict(AnswersMid="m.2", AnswersName=["who"])]
    freebase = dict(Questions=[dict(RawQuestion="Band?", Parses=[dict(Answers=answers), dict(Answers=answers[:1])])])
    trivia = dict(Data=[dict(Question="Sea?", Answer=dict(Value="Red", Aliases=["Red", "Red Sea"]))])
    file = tmp_path / "q.json"
    file.write_text(json.dumps(freebase))
    assert evaluate.load_questions(file) == [("Band?", ["the who", "who"])]
    file.write_text(json.dumps(trivia))
    assert evaluate.load_questions(file)[0][1][-1] == "Red Sea"


def test_mmlu_with_and_without_header(data):
    subjects = evaluate.load_mmlu(data / "mmlu", Namespace(subjects=None))
    assert list(subjects) == ["anatomy", "sociology"]
    shots, questions = subjects["anatomy"]
    assert shots == questions and shots[2] == ("anatomy, 2?", ["red", "green", "blue", "grey"], "C")
    assert sum(len(names.split()) for names in evaluate.CATEGORIES.values()) == 19 + 13 + 12  # 57, with 13 "other"


def test_stories_in_both_formats(data):
    stories = evaluate.load_stories(data / "stories.csv")
    assert len(stories) == 3 and stories[0] == (STORY * 2, "A fox jumps.")
    file = data / "stories.jsonl"
    file.write_text(json.dumps(dict(query="?", docs=["One.", "Two."], result=dict(text="1####Both."))) + "\n")
    assert evaluate.load_stories(file) == [("One.\n\nTwo.", "Both.")]


@pytest.mark.parametrize("load, name, text, line", [
    (evaluate.load_questions, "q.txt", "a | b\nno answer\n", 2),
    (evaluate.load_questions, "q.txt", "", 1),
    (evaluate.load_questions, "q.json", '{"Questions": [\n{]}', 2),
    (evaluate.load_questions, "q.json", '{"Questions": [{}]}', 1),
    (evaluate.load_text, "t.jsonl", '{"text": "a"}\n{"txt": "b"}\n', 2),
    (evaluate.load_text, "t.jsonl", '{"text": "a"}\nb\n', 2),
    (evaluate.load_text, "t.raw", " \n", 1),
    (evaluate.load_prompts, "p.jsonl", '{"text": "a"}\n\n[1]\n', 3),
    (evaluate.load_stories, "s.csv", "text,y\nx,z\nx\n", 3),
    (evaluate.load_stories, "s.jsonl", '{"docs": "a"}\n', 1),
    (lambda path: list(readers.mmlu_questions(path)), "m.csv", "q,a,b,c,d,A\nq,a,b,c,D\n", 2),
    (lambda path: list(readers.mmlu_questions(path)), "m.csv", "q,a,b,c,d,E\n", 1),
    (lambda path: list(readers.mmlu_questions(path)), "m.csv", '"q\n2",a,b,c,d,A\nq,a,b,c,d,5\n', 3),
])  # fmt: skip
def test_bad_files_are_named_with_the_line(tmp_path, load, name, text, line):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        load(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}:{line}: ")


def test_mmlu_folder_without_the_subject(data):
    with pytest.raises(ValueError, match="no law_test.csv"):
        evaluate.load_mmlu(data / "mmlu", Namespace(subjects=["law"]))


# --- tasks against plain computation ----------------------------------------------------------------------------------


def options_for(**more):
    return Namespace(**dict(limit=128, window=64, warm_up=[4], warm_up_index=4, decode=False, reference={}, label="",
                            batch_size=2, max_new_tokens=20, prompt_tokens=16, chat=False) | more)  # fmt: skip


def test_perplexity_by_hand(model):
    policy = FFNSkip(1, 5, 0.9, warm_up_index=4, k=1)
    result = evaluate.perplexity(model, Letters(), policy, STORY * 4, options_for())
    tokens = torch.tensor(Letters().encode(STORY * 4)[:128]).view(2, 64)
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
        evaluate.perplexity(model, Letters(), policy, "short", options_for())


@pytest.mark.parametrize("policy", [dense, FFNSkip(1, 5, 0.9, 4, k=1), "random", "earlyexit"])
def test_parallel_and_token_by_token_agree(model, policy):
    if policy == "random":
        policy = baselines.random(model, 0.3)
    if policy == "earlyexit":
        policy = baselines.exit_policy(False, baselines.similarity, 0.8)
        policy.warm_up_index = 4
    results, lengths = [], []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].size(1)))
    for decode in False, True:
        results.append(evaluate.perplexity(model, Letters(), policy, STORY, options_for(limit=64, decode=decode)))
    assert lengths == [64, 64] + [1] * 64 + [64]  # with the dense model's own pass
    assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-6)
    assert (results[0]["kl"] > 0.01) == (policy is not dense)
    assert (results[0]["holes_read"] > 0) == isinstance(policy, baselines.exit_policy)


@pytest.mark.parametrize("name", ["ffnskip", "random", "shortgpt", "earlyexit"])
def test_shared_prefix_is_what_each_prompt_alone_would_give(model, name):
    prompts = [Letters().encode(STORY[:40] + rest) for rest in ("one", "another one", "two", "six")]
    policy = FFNSkip(1, 5, 0.9, 4, k=1)
    if name == "earlyexit":
        policy = baselines.exit_policy(False, baselines.similarity, 0.8)
    elif name != "ffnskip":
        policy = getattr(baselines, name)(model, 0.3, tokens=torch.tensor(prompts[0])[None])
    policy.warm_up_index = 4
    seen = []
    for group, tokens, cache in evaluate.with_shared_prefix(model, policy, prompts, 1, options_for()):
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
    policy = FFNSkip(1, 5, 0.9, 25, k=1)
    prompts = [Letters().encode(f"{evaluate.SHOTS}Question: {q}\nAnswer:") for q in ("Fox?", "Bee?")]
    ids = [list(generate(model, p, 16, policy, prompt_len=0)) for p in prompts]
    end = next(i for i in ids[0][1:] if i not in (ids[0][0], ids[0][-1], *ids[1]))  # the second answer never ends
    tokenizer = Letters()
    tokenizer.decode = lambda ids: "".join("\n" if i == end else chr(97 + i % 26) for i in ids)
    lines = [tokenizer.decode(row).strip().split("\n")[0] for row in ids]
    assert 0 < len(lines[0]) < len(tokenizer.decode(ids[0]).strip())
    options = options_for(warm_up_index=25)
    right = evaluate.factoid(model, tokenizer, policy, [("Fox?", ["x", lines[0]]), ("Bee?", ["y"])], options)
    assert right["exact_match"] == 0.5 and right["questions"] == 2 and right["ffn_skip_ratio"] > 0.05


@pytest.mark.parametrize("seed", range(6))
def test_mmlu_takes_the_likeliest_letter(data, seed):
    model = tiny_model(seed, n_layers=6, vocab_size=128, max_seq_len=1024)
    subjects = evaluate.load_mmlu(data / "mmlu", Namespace(subjects=["sociology"]))
    shots, questions = subjects["sociology"]
    questions[:] = [
        (q, c, "A") for q, c, _ in questions
    ]  # so that a model that always says the same is not a quarter right
    policy = FFNSkip(1, 5, 0.9, 25, k=1)
    ask = lambda q, c: f"{q}\nA. {c[0]}\nB. {c[1]}\nC. {c[2]}\nD. {c[3]}\nAnswer:"
    head = "The following are multiple choice questions (with answers) about sociology.\n\n"
    head += "".join(f"{ask(q, c)} {a}\n\n" for q, c, a in shots)
    right = []
    for q, c, a in questions:
        logits = model(torch.tensor([Letters().encode(head + ask(q, c))]), policy=policy)[0, -1]
        right.append(max("ABCD", key=lambda letter: logits[ord(letter)].item()) == a)
    result = evaluate.mmlu(model, Letters(), policy, subjects, options_for(limit=None, warm_up_index=25))
    assert result["all"] == result["social_sciences"] == sum(right) / 4 and result["stem"] is None
    assert result["questions"] == 4 and result["ffn_skip_ratio"] > 0.05


def test_collapse_by_hand(model):
    policy = FFNSkip(1, 5, 0.9, warm_up_index=4, k=1)
    prompt = Letters().encode(STORY)[:16]
    texts = [list(generate(model, prompt, 60, way)) for way in (dense, policy)]
    assert texts[0] != texts[1]
    options = options_for(max_new_tokens=60)
    result = evaluate.collapse(model, Letters(), policy, [dict(text=STORY)], options)
    assert result["parts_from_dense"] == evaluate.parts_at(*texts) < 60
    assert result["longest_loop"] == evaluate.longest_loop(texts[1])
    assert result["looping"] == (evaluate.longest_loop(texts[1]) >= 32)
    assert result["distinct_2"] == evaluate.distinct_n(texts[1], 2) and result["tokens"] == 60
    assert evaluate.collapse(model, Letters(), dense, [dict(text=STORY)], options)["parts_from_dense"] == 60


def test_worstcase_by_hand(model):
    policy = FFNSkip(1, 5, 0.97, warm_up_index=4, k=1)
    options = options_for(max_new_tokens=80)
    result = evaluate.worstcase(model, Letters(), policy, [dict(text=STORY)], options)
    trace = Trace()
    list(generate(model, Letters().encode(STORY)[:16], 80, policy, trace=trace))
    never, index = trace.ran[:, 0].all(0), trace.token_index[0]
    assert result["never"] == never[index > 4].double().mean()
    assert 0 < result["never_below_64"] == never[(index > 4) & (index < 64)].double().mean() < 1
    assert result["never_below_80"] == never[index >= 64].double().mean()


def test_two_turns_in_the_papers_prompt(model):
    text = Letters().decode(evaluate.chat_ids(Letters(), ["One?", "Yes.", "Two?"], options_for()))
    assert text.startswith("A chat between a curious user") and text.endswith(
        "USER: One? ASSISTANT: Yes. USER: Two? ASSISTANT:"
    )
    own = Letters().decode(evaluate.chat_ids(Letters(), ["One?", "Yes.", "Two?"], options_for(chat=True)))
    assert own == "[user] One?\n[assistant] Yes.\n[user] Two?\n"


# --- the runner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, file, columns", [
    ("perplexity", "text.raw", ["perplexity", "kl", "top1_agreement"]),
    ("perplexity", "c4.jsonl", ["perplexity"]),
    ("warmup", "text.raw", ["perplexity_past_warm_up"]),
    ("factoid", "questions.txt", ["exact_match"]),
    ("mmlu", "mmlu", ["stem", "all"]),
    ("mtbench", "question.jsonl", ["answers"]),
    ("summarize", "stories.csv", ["rouge_l", "rouge_l_small", "n_medium"]),
    ("collapse", "question.jsonl", ["distinct_2", "longest_loop", "parts_from_dense"]),
    ("worstcase", "c4.jsonl", ["never"]),
])  # fmt: skip
def test_every_task(run, task, file, columns):
    flags = ["--max-new-tokens", "12", "--policies", "dense,ffnskip,random,shortgpt"]
    flags += ["--limit", 128] if task in ("perplexity", "warmup") else ["--limit", 2] if task != "summarize" else []
    rows = run(task, file, *flags)
    keys = [(row["policy"], row["skip"], row["match"]) for row in rows]
    assert keys == [
        ("dense", "", "ffn"),
        *((p, "0.2", "ffn") for p in ("ffnskip", "random", "shortgpt")),
        ("shortgpt", "0.2", "bytes"),
    ]
    assert all(column in rows[0] for column in columns)
    assert rows[0]["ffn_skip_ratio"] == "0"
    assert all(float(row["ffn_saved_ratio"]) > 0.01 for row in rows[1:])


def test_resume(run, data, monkeypatch):
    flags = ["--limit", 128, "--policies", "dense,random,yours"]
    rows = run("perplexity", "text.raw", *flags)
    ran = []
    task = evaluate.perplexity
    monkeypatch.setitem(evaluate.TASKS, "perplexity", (evaluate.load_text, lambda *a: ran.append(a[2]) or task(*a)))
    assert run("perplexity", "text.raw", *flags) == rows and not ran
    text = (data / "out.csv").read_text()
    (data / "out.csv").write_text(text[: text.index("yours") + 9])  # cut off within the last row
    again = run("perplexity", "text.raw", *flags)
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert drop(again) == drop(rows) and [type(policy).__name__ for policy in ran] == ["yours"]
    more = run("perplexity", "text.raw", *flags, "--policies", "static", "--skip", "0.3")
    assert len(more) == 4 and more[:3] == again
    with pytest.raises(ValueError, match="out.csv:3: made with other settings"):
        run("perplexity", "text.raw", *flags, "--limit", 64)


def test_answers_are_kept_one_by_one(run, data, monkeypatch):
    flags = ["--max-new-tokens", "12", "--policies", "random", "--match", "ffn"]
    run("mtbench", "question.jsonl", *flags)
    file = data / "out" / "random-0.2-ffn.jsonl"
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert (
        first["question_id"] == 81 and first["model_id"] == "random-0.2-ffn" and len(first["choices"][0]["turns"]) == 2
    )
    assert first["choices"][0]["index"] == 0 and first["answer_id"] != second["answer_id"]
    file.write_text(json.dumps(first) + '\n{"question_id"')
    (data / "out.csv").unlink()
    (row,) = run("mtbench", "question.jsonl", *flags)
    kept, new = (json.loads(line) for line in file.read_text().splitlines())
    assert kept == first and new["choices"] == second["choices"] and new["answer_id"] != second["answer_id"]
    assert row["answers"] == "2"


def test_warm_up_is_compared_over_the_same_tokens(run):
    rows = run("warmup", "text.raw", "--policies", "ffnskip,random", "--warm-up-index=-1,8,30", "--limit", 128)
    assert [row["warm_up_index"] for row in rows] == ["-1", "-1", "8", "8", "30", "30"]
    assert {row["tokens_compared"] for row in rows} == {str(2 * (63 - 31))}
    saved = [float(row["ffn_saved_ratio"]) for row in rows]
    assert saved[0] > saved[2] > saved[4] > 0


def test_layers_at_equal_bytes(run, model):
    sizes = {name: p.numel() for name, p in model.layers[0].named_parameters()}
    ffn = sum(n for name, n in sizes.items() if name.startswith("feed_forward"))
    attention = sum(n for name, n in sizes.items() if name.startswith("attention."))
    copied = sizes["attention.wq.weight"] + sizes["attention.wo.weight"]
    assert evaluate.bytes_per_skip("random", model) == (4 * ffn, 4 * ffn)
    assert evaluate.bytes_per_skip("statecopy", model) == (4 * (ffn + copied), 4 * ffn)
    norm = sizes["attention_norm.weight"]
    assert evaluate.bytes_per_skip("skipdecode", model) == (4 * (ffn + attention + norm), 4 * ffn)
    total = sum(p.numel() for p in model.parameters()) - model.tok_embeddings.weight.numel()
    assert evaluate.bytes_saved("random", model, 0.5) == pytest.approx(3 * ffn / total)
    rows = run("perplexity", "text.raw", "--policies", "random,skipdecode", "--skip", "0.3", "--limit", 128)
    equal = [float(row["bytes_saved"]) for row in rows if (row["policy"], row["match"]) != ("skipdecode", "ffn")]
    assert len(equal) == 2 and equal[0] == pytest.approx(equal[1], abs=0.03)


@pytest.mark.parametrize("name", ["ffnskip", "static", "skipdecode", "statecopy_cosine"])
def test_policies_are_brought_to_the_ratio(model, name):
    tokens = torch.randint(128, (6, 64), generator=torch.Generator().manual_seed(1))
    settings = dict(cold_s=1, cold_e=5, k=1, sim_threshold=[0.5, 0.6, 0.7, 0.6, 0.5, 0.5], warm_up_index=9)  # the task says 4
    options = options_for(settings=settings, target_len=64, seed=0, printed_cold=None)
    policy, got = evaluate.make_policy(name, model, 0.2, tokens, options)
    assert got == pytest.approx(0.2, abs=0.03) and got == baselines.ffn_skip_ratio(model, policy, tokens)
    assert policy.warm_up_index == 4
    if name == "ffnskip":  # the thresholds keep their distances
        steps = [b - a for a, b in zip(policy.sim_threshold, policy.sim_threshold[1:])]
        assert steps == pytest.approx([0.1, 0.1, -0.1, -0.1, 0], abs=1e-6) and policy.k == 1
    if name == "static":
        assert (policy.cold_s, policy.cold_e) == (1, 5)


def test_printed_is_algorithm_1_as_printed(model):
    tokens = torch.randint(128, (6, 64), generator=torch.Generator().manual_seed(1))
    options = options_for(settings=dict(cold_s=1, cold_e=5, k=1), printed_cold=[2, 5])
    policy, _ = evaluate.make_policy("printed", model, 0.2, tokens, options)
    assert (policy.cold_s, policy.cold_e, policy.k, policy.full_every) == (2, 5, None, None)
    fixed, ratio = evaluate.make_policy("printed", model, None, tokens, options)
    assert fixed.sim_threshold == 1.0 and ratio == 0


def test_what_cannot_be_reached_gets_no_row(run, capsys):
    rows = run("perplexity", "text.raw", "--policies", "dense,ffnskip,skipdecode", "--skip", "0.55", "--limit", 128)
    assert [row["policy"] for row in rows] == ["dense", "skipdecode"]  # at equal bytes 0.55 is less
    assert [row["match"] for row in rows] == ["ffn", "bytes"]
    said = capsys.readouterr().err
    assert "ffnskip 0.55: cannot: the nearest is" in said and "skipdecode cannot skip 0.55" in said


def test_a_policy_file_of_ones_own(run, data):
    (data / "mine.py").write_text(
        "from baselines import random\n\n\nclass make(random):\n    also_skips = ('attention.wo',)\n"
    )
    rows = run("perplexity", "text.raw", "--policies", f"{data}/mine.py:make", "--limit", 128)
    assert [row["match"] for row in rows] == ["ffn", "bytes"] and float(rows[0]["ffn_skip_ratio"]) == pytest.approx(
        0.2, abs=0.04
    )


def test_errors_are_one_line(data, capsys):
    (data / "bad.txt").write_text("a | b\nc\n")
    script = Path(evaluate.__file__)
    done = subprocess.run(
        [sys.executable, script, "factoid", "--data", data / "bad.txt"], capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr == f"error: {data}/bad.txt:2: expected `question | answer`\n"
    for flags in ["nonsense"], ["factoid"], ["perplexity", "--data", "x", "--skip", "2"]:
        with pytest.raises(SystemExit) as stop:
            evaluate.parse_args(flags)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_policy_ends_before_anything_runs(run, data):
    with pytest.raises(ValueError, match="no policy nosuch: choose from dense, ffnskip"):
        run("perplexity", "text.raw", "--policies", "dense,nosuch")
    assert not (data / "out.csv").exists()


def test_a_policy_file_that_changed_is_run_again_on_text_of_the_models_own(run, data):
    """Each version keeps its row; the same version is not run twice."""
    file = data / "mine.py"
    file.write_text("from baselines import random as make\n")
    first = run("perplexity", None, "--policies", f"{file}:make")
    assert run("perplexity", None, "--policies", f"{file}:make") == first and len(first) == 1
    assert first[0]["policy"].startswith(f"{file}:make@") and int(first[0]["tokens"]) == 16 * 64
    file.write_text("from baselines import yours as make\n")
    second = run("perplexity", None, "--policies", f"{file}:make")
    assert len(second) == 2 and second[0] == first[0] and second[1]["kl"] != first[0]["kl"]


def test_one_token_is_walked_and_all_are_drawn(tmp_path, capsys):
    """plot.py on what generate.py --trace writes."""
    import plot

    (tmp_path / "t.csv").write_text(
        "prompt,token_index,token_id,token,ffn_skipped,layer_0,layer_1,layer_2\n"
        '0,-1,5,a,0,run,run,run\n0,0,6,"b,""",1,run,0.9876,skip\n0,1,7,c,0,run,0.5,0.25\n'
    )
    plot.main([str(tmp_path / "t.csv"), "0"])
    assert capsys.readouterr().out.splitlines() == [
        "token_index 0, token 'b,\"': 1 of 3 FFN blocks skipped",
        "    0  attention, feed_forward",
        "    1  attention, feed_forward, cosine 0.9876",
        "    2  attention",
    ]
    with pytest.raises(ValueError, match="no token with token_index 9"):
        plot.main([str(tmp_path / "t.csv"), "9"])
    pytest.importorskip("matplotlib")
    plot.main([str(tmp_path / "t.csv")])
    assert (tmp_path / "t.png").stat().st_size > 5000


@pytest.mark.parametrize("task, file, flags", [
    ("perplexity", "text.raw", ["--limit", 128, "--skip", "0.1,0.2"]),
    ("warmup", "text.raw", ["--limit", 128, "--warm-up-index=-1,8"]),
    ("worstcase", "c4.jsonl", ["--limit", 1, "--max-new-tokens", 80]),
])  # fmt: skip
def test_pictures(run, data, task, file, flags):
    pytest.importorskip("matplotlib")
    import plot

    run(task, file, "--policies", "dense,random,shortgpt", *flags)
    (data / "out.csv").rename(data / f"{task}.csv")
    (data / "other.csv").write_text("a,b\n1,2\n")  # not evaluate.py's
    plot.main([str(data)])
    assert (data / f"{task}.png").stat().st_size > 10000 and not (data / "other.png").exists()


def test_table(tmp_path, capsys):
    import plot

    head = "# command: x\npolicy,skip,match,ffn_skip_ratio,kl\n"
    rows = "dense,,ffn,0,0\nrandom,0.05,ffn,0.051,1.23456\nshortgpt,0.15,ffn,0.133,2\nshortgpt,0.05,bytes,0.033,3\n"
    (tmp_path / "x.csv").write_text(head + rows)
    plot.main([str(tmp_path / "x.csv"), "kl"])
    assert capsys.readouterr().out.splitlines() == [
        "| policy | 5% | 15% |",
        "| --- | --- | --- |",
        "| dense | 0 at 0.0% |  |",
        "| random | 1.23 at 5.1% | - |",
        "| shortgpt | - | 2 at 13.3% |",
        "| shortgpt (equal bytes) | 3 at 3.3% | - |",
    ]


@pytest.mark.parametrize("argv, message", [
    (["x.csv", "nosuch"], "x.csv: no column of numbers nosuch: choose from policy, skip"), (["empty.csv"], "empty.csv: no row in it"),
    (["nosuch.csv"], "nosuch.csv: no such file"), ([".", "kl"], "a folder: give the path of a CSV"), (["page.md"], "not a CSV"),
    (["t.csv", "abc"], "no token with token_index abc"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_one_line(tmp_path, argv, message):
    import plot

    (tmp_path / "x.csv").write_text("policy,skip,match,ffn_skip_ratio,kl\nrandom,0.05,ffn,0.051,1\n")
    (tmp_path / "t.csv").write_text("prompt,token_index,token,ffn_skipped,layer_0\n0,0,a,0,run\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "page.md").write_text("# A page\n\nwith a, b\nc\nd, e, f\n")
    done = subprocess.run([sys.executable, plot.__file__, *argv], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_mistake_in_a_policy_file_is_one_line_that_names_it(tmp_path):
    (tmp_path / "mine.py").write_text("def make(model, skip, tokens=None, seed=0):\n    return lambda layers, x, step: 1 / 0\n")
    (tmp_path / "nothing.py").write_text("def make(model, skip, tokens=None, seed=0):\n    return lambda layers, x, step: None\n")
    for file, message in ("mine.py", "mine.py, line 2: ZeroDivisionError"), ("nothing.py", "the policy returned nothing"):
        done = subprocess.run([sys.executable, evaluate.__file__, "perplexity", "--ckpt", GOLDEN / "hf-gqa", "--policies", f"{file}:make", "--output", "x.csv"],
                              capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
        assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr


def test_help_reads(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(task in text for task in evaluate.TASKS) and "--calibration" in text


def test_cells_are_numbers_again():
    assert evaluate.cell(None) == "" and evaluate.cell(0.123456789) == "0.12346" and evaluate.cell("a\nb") == "a\\nb"
    assert math.isclose(float(evaluate.cell(1234567.0)), 1234567, rel_tol=1e-4)
