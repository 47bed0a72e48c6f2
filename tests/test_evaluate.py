"""experiments/evaluate.py: which policy at which ratio, a table that goes on where it stood, and the command line."""

import csv
import json
import math
import sys
from pathlib import Path
from statistics import median

import evaluate
import pytest
import tasks
import torch
from at_ratio import Calibration, at_ratio_ffnskip, describe, make_policy, on_text, prompts_ratio
from readers import load_questions, load_text
from table import Table, cell, check_settings
from tasks import TASKS, perplexity
from test_golden import GOLDEN
from test_standins import random_fit, write_fit
from tiny import Bytes, mistake, random_ids, start, tiny_model, write_data

import policies
from calibrate import cold_regions
from policies.baselines import POLICIES
from skip import FFNSkip
from support import common
from support.measuring import mean_interval, measure, replay, skip_ratio


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """run(task, file or None, *flags) -> the rows of its CSV, as dicts."""
    write_data(tmp_path)
    questions = [f"Which of {n} dogs is so lazy that it does not jump? | dog {n}\n" for n in range(12)]
    (tmp_path / "many.txt").write_text("".join(questions))
    monkeypatch.setattr(common, "find_checkpoint", lambda path: Path("tiny"))
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda path: Bytes())
    monkeypatch.setattr(evaluate, "load_model", lambda path, device, dtype: model)
    shared = ["--cold-s=1", "--cold-e=5", "--k=1", "--window=64", "--warm-up-index=4", "--skip=0.2", "--device=cpu"]
    shared += ["--calibration", str(tmp_path / "text.raw"), "--calibration-tokens=256"]

    def call(task, file, *flags):
        output = tmp_path / "out.csv"
        data = ["--data", str(tmp_path / file)] if file else []
        evaluate.main([task, *data, "--output", str(output), *shared, *map(str, flags)])
        lines = output.read_text().splitlines()
        assert lines[0].startswith("# command: python") and "torch" in lines[1]
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))

    return call


# --- every task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, file, columns, limit",
    [
        ("perplexity", "text.raw", ["perplexity", "kl", "top1_agreement"], 128),
        ("perplexity", "c4.jsonl", ["perplexity"], 128),
        ("warmup", "text.raw", ["perplexity_past_warm_up"], 128),
        ("factoid", "many.txt", ["exact_match", "answer_within_high", "difference_low"], 6),
        ("mtbench", "question.jsonl", ["answers"], 2),
        ("summarize", "stories.csv", ["answers", "looping"], None),
        ("collapse", "question.jsonl", ["dense_nll", "longest_loop", "parts_from_dense"], 2),
        ("worstcase", "c4.jsonl", ["never"], 2),
    ],
)
def test_every_task(run, task, file, columns, limit):
    flags = ["--max-new-tokens", "12", "--policies", "dense,ffnskip,random,shortgpt", "--calibration-tokens=96"]
    flags += ["--limit", limit] if limit else []
    flags += ["--prompt-tokens", "16"] if task == "warmup" else []
    rows = run(task, file, *flags)
    assert [(row["policy"], row["skip"], row["match"]) for row in rows] == [
        ("dense", "", "ffn"),
        ("ffnskip", "0.2", "ffn"),
        ("random", "0.2", "ffn"),
        ("shortgpt", "0.2", "ffn"),
        ("shortgpt", "0.2", "bytes"),
    ]
    assert all(column in rows[0] for column in columns)
    assert rows[0]["ffn_skip_ratio"] == "0"
    assert all(float(row["ffn_saved_ratio"]) > 0.01 for row in rows[1:])


def test_warm_up_is_compared_over_the_same_tokens(run):
    flags = ["--policies", "ffnskip,random", "--warm-up-index=-1,8,30", "--limit", 128, "--prompt-tokens", 10]
    rows = run("warmup", "text.raw", *flags)
    assert [row["warm_up_index"] for row in rows] == ["-1", "-1", "8", "8", "30", "30"]
    assert {row["tokens_compared"] for row in rows} == {str(2 * (63 - 10 - 31))}
    saved = [float(row["ffn_saved_ratio"]) for row in rows]
    assert saved[0] > saved[2] > saved[4] > 0


# --- which policy at which ratio --------------------------------------------------------------------------------------


def options(*flags):
    return evaluate.parse_args(["perplexity", "--window=64", *flags])


WINDOWS = [(random_ids(64, seed, vocab_size=128), 0) for seed in range(6)]


def make(name, model, skip, settings, warm_up_index, *flags, windows=WINDOWS):
    tokens = torch.tensor([ids for ids, _ in windows])
    calibration = on_text(model, tokens, 0, 4, 64)
    return make_policy(name, model, skip, calibration, settings, warm_up_index, 0, options(*flags))


@pytest.mark.parametrize("name", ["ffnskip", "static", "skipdecode", "statecopy_cosine"])
def test_policies_are_brought_to_the_ratio(model, name):
    settings = dict(cold_s=1, cold_e=5, k=1, sim_threshold=[0.5, 0.6, 0.7, 0.6, 0.5, 0.5], warm_up_index=9)
    settings |= dict(ratios=[[0.1, 0.1], [0.0, 0.5]])  # of another text
    policy, got = make(name, model, 0.2, settings, 4)
    assert got == pytest.approx(0.2, abs=0.03) and got == skip_ratio(model, policy, WINDOWS)
    assert policy.warm_up_index == 4  # the task's, and not that of the settings
    if name == "ffnskip":  # the thresholds keep their distances
        steps = [b - a for a, b in zip(policy.sim_threshold, policy.sim_threshold[1:])]
        assert steps == pytest.approx([0.1, 0.1, -0.1, -0.1, 0], abs=1e-6) and policy.k == 1
    if name == "static":
        assert (policy.cold_s, policy.cold_e) == (1, 5)
    if name == "skipdecode":
        assert policy.target_len == 64


@pytest.mark.parametrize("name", ["ffnskip", "printed", *POLICIES])
def test_the_warm_up_index_of_a_row_reaches_its_policy(model, name):
    settings = dict(cold_s=1, cold_e=5, sim_threshold=0.9)
    if name == "authors":
        model = tiny_model(n_layers=11, vocab_size=128)
    for warm_up_index in -1, 7:
        policy, _ = make(name, model, 0.2, settings, warm_up_index, windows=WINDOWS[:1])
        assert policy.warm_up_index == warm_up_index


def test_a_text_too_short_for_a_later_row_is_enough_for_those_before(model):
    """One that ends within the largest warm-up: what needs its cosines is told in one line, what does not is made."""
    tokens = torch.tensor([random_ids(20, vocab_size=128)])
    calibration = on_text(model, tokens, 0, 30, 20)
    assert make_policy("random", model, 0.2, calibration, {}, 4, 0, options())[1] == pytest.approx(0.2, abs=0.06)
    with pytest.raises(ValueError, match="no text in windows of 20 tokens lies past the warm-up of 31"):
        make_policy("random", model, 0.2, calibration, {}, 30, 0, options())
    assert make_policy("printed", model, 0.2, calibration, {}, 4, 0, options())[1] == pytest.approx(0.2, abs=0.06)
    with pytest.raises(ValueError, match="the texts to calibrate on end within the largest warm-up"):
        make_policy("ffnskip", model, 0.2, calibration, dict(cold_s=1, cold_e=5), 4, 0, options())


@pytest.mark.parametrize("threshold", [0.9, [0.5, 0.6, 0.7, 0.6, 0.5, 0.5]])
def test_printed_is_algorithm_1_as_printed(model, threshold):
    """One threshold, and cold regions by the rule from the calibration text, whatever the settings hold."""
    settings = dict(cold_s=2, cold_e=4, k=1, sim_threshold=threshold, full_every=7, recheck=False)
    policy, ratio = make("printed", model, 0.1, settings, 4)
    assert (policy.cold_s, policy.cold_e) == tuple(cold_regions(measure(model, WINDOWS, 4).mean(0))) != (2, 4)
    assert policy.k is None and policy.full_every is None and policy.recheck
    assert isinstance(policy.sim_threshold, float) and ratio == pytest.approx(0.1, abs=0.03)
    fixed, ratio = make("printed", model, None, settings, 4, "--sim-threshold", "0.8")
    assert fixed.sim_threshold == 0.8 and ratio > 0


def test_prompts_count_in_the_calibration_of_windows_that_have_them(model):
    """So that a ratio is reached over the tokens that the task counts."""
    tokens = torch.tensor([ids for ids, _ in WINDOWS])
    settings = dict(cold_s=1, cold_e=5, k=1, sim_threshold=0.9)
    policy, ratio = make_policy("ffnskip", model, None, on_text(model, tokens, 30, 4, 34), settings, 4, 0, options())
    assert ratio == skip_ratio(model, policy, [(ids, 30) for ids, _ in WINDOWS]) != skip_ratio(model, policy, WINDOWS)


def test_a_fixed_threshold_is_measured_once_and_at_no_wanted_ratio(run):
    flags = ["--policies", "dense,ffnskip,random", "--sim-threshold", "0.9", "--skip", "0.1,0.2", "--limit", 128]
    rows = run("perplexity", "text.raw", *flags)
    assert [(row["policy"], row["skip"]) for row in rows] == [
        ("dense", ""),
        ("ffnskip", ""),
        ("random", "0.1"),
        ("random", "0.2"),
    ]
    assert "sim_threshold=0.9" in rows[1]["setting"] and float(rows[1]["calibrated_ratio"]) > 0


def test_layers_at_equal_bytes(run, model):
    sizes = {name: p.numel() for name, p in model.layers[0].named_parameters()}
    ffn = sum(n for name, n in sizes.items() if name.startswith("feed_forward"))
    attention = sum(n for name, n in sizes.items() if name.startswith("attention."))
    copied = sizes["attention.wq.weight"] + sizes["attention.wo.weight"]
    norm = sizes["attention_norm.weight"]
    for name in "dense", "ffnskip", "printed", "random", "static", "checkerboard":
        assert evaluate.bytes_per_skip(name, model) == (4 * ffn, 4 * ffn)
    for name in "statecopy", "statecopy_cosine":
        assert evaluate.bytes_per_skip(name, model) == (4 * (ffn + copied), 4 * ffn)
    for name in "shortgpt", "skipdecode", "earlyexit", "earlyexit_cosine":
        assert evaluate.bytes_per_skip(name, model) == (4 * (ffn + attention + norm), 4 * ffn)
    total = sum(p.numel() for p in model.parameters()) - model.tok_embeddings.weight.numel()
    rows = run("perplexity", "text.raw", "--policies", "random,skipdecode", "--skip", "0.3", "--limit", 128)
    for row in rows:
        whole = ffn if row["policy"] == "random" else ffn + attention + norm
        assert float(row["bytes_saved"]) == pytest.approx(float(row["ffn_skip_ratio"]) * 6 * whole / total, rel=1e-3)
    equal = [float(row["bytes_saved"]) for row in rows if (row["policy"], row["match"]) != ("skipdecode", "ffn")]
    assert len(equal) == 2 and equal[0] == pytest.approx(equal[1], abs=0.03)


def test_what_cannot_be_reached_gets_no_row(run, capsys):
    rows = run("perplexity", "text.raw", "--policies", "dense,ffnskip,skipdecode", "--skip", "0.55", "--limit", 128)
    assert [row["policy"] for row in rows] == ["dense", "skipdecode"]  # at equal bytes 0.55 is less
    assert [row["match"] for row in rows] == ["ffn", "bytes"]
    said = capsys.readouterr().err
    assert "ffnskip 0.55: cannot: the nearest is" in said and "skipdecode cannot skip 0.55" in said


def test_a_policy_file_of_ones_own(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from policies.baselines import RandomSkip\n\n\nclass make(RandomSkip):\n    also_skips = ('attention.wo',)\n"
    )
    rows = run("perplexity", "text.raw", "--policies", f"{tmp_path}/mine.py:make", "--limit", 128)
    assert [row["match"] for row in rows] == ["ffn", "bytes"]
    assert float(rows[0]["ffn_skip_ratio"]) == pytest.approx(0.2, abs=0.04)


def test_factoid_ratios_are_reached_on_the_questions_after_those_scored(run, model, tmp_path, monkeypatch):
    made = []

    def watched(*args):
        made.append((args[3], *make_policy(*args)))
        return made[-1][1:]

    monkeypatch.setattr(evaluate, "make_policy", watched)
    rows = run("factoid", "many.txt", "--policies", "ffnskip,skipdecode", "--match", "ffn", "--limit", 8)
    rest = load_questions(tmp_path / "many.txt")[8:]
    prompts = [Bytes().encode(f"{tasks.QUESTION.format(q)} {a[0]}") for q, a in rest]
    for row, (calibration, policy, ratio) in zip(rows, made):
        assert ratio == prompts_ratio(model, policy, prompts, tasks.Context()) == pytest.approx(0.2, abs=0.05)
        assert cell(ratio) == row["calibrated_ratio"] and row["questions"] == "8"
    assert made[1][1].target_len == made[1][0].target_len == round(median(map(len, prompts)))


def test_the_prompt_is_skipped_alone_or_too(run):
    flags = ["--policies", "dense,ffnskip", "--skip-in", "decoding,prompt,both", "--prompt-tokens", 20, "--limit", 128]
    dense, *rows = run("perplexity", "text.raw", *flags)
    assert [row["policy"] for row in rows] == ["ffnskip", "ffnskip in prompt", "ffnskip in both"]
    for row, prompt, after in zip(rows, (False, True, True), (True, False, True)):
        assert (float(row["prompt_skip_ratio"]) > 0.05) == prompt and (float(row["ffn_skip_ratio"]) > 0.05) == after
        assert float(row["kl"]) > float(dense["kl"])
    with pytest.raises(ValueError, match=r"other settings \(prompt_skip\)"):
        run("perplexity", "text.raw", *flags, "--prompt-skip", 0.4)


def test_the_prompt_has_a_share_of_its_own(run):
    flags = ["--policies", "static", "--skip-in", "both", "--prompt-tokens", 30, "--limit", 128]
    (row,) = run("perplexity", "text.raw", *flags, "--skip", 0.2, "--prompt-skip", 0.5)
    assert float(row["prompt_skip_ratio"]) > 0.35 and abs(float(row["ffn_skip_ratio"]) - 0.2) < 0.06


def test_windows_in_a_batch_agree(run):
    flags = ["--policies", "dense,ffnskip,random", "--agree", "0.5", "--rows", 2, "--limit", 128]
    dense, together, alone = run("perplexity", "text.raw", *flags)
    assert together["ffn_saved_at_2"] == together["ffn_skip_ratio"] and float(together["ffn_skip_ratio"]) > 0.05
    assert "agree=0.5" in together["setting"] and dense["ffn_saved_at_2"] == "0" and alone["ffn_saved_at_4"] == ""


def test_texts_are_drawn_at_a_temperature(run):
    flags = ["--max-new-tokens", 12, "--policies", "dense", "--limit", 2]
    (greedy,) = run("collapse", "question.jsonl", *flags)
    with pytest.raises(ValueError, match=r"other settings \(temperature\)"):
        run("collapse", "question.jsonl", *flags, "--temperature", 5)


def test_a_table_that_does_not_name_a_setting_has_its_old_value(tmp_path):
    check_settings("x.csv", dict(task="x"), dict(task="x", temperature=0.0, rows=1), "delete it")
    with pytest.raises(ValueError, match=r"x.csv: made with other settings \(windows\): delete it"):
        check_settings("x.csv", dict(task="x"), dict(task="x", windows="all over the text"), "delete it")
    check_settings("x.csv", {}, dict(windows="all over the text"), "delete it")


# --- the table --------------------------------------------------------------------------------------------------------


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_resume(run, tmp_path, monkeypatch):
    flags = ["--limit", 128, "--policies", "dense,random,checkerboard"]
    rows = run("perplexity", "text.raw", *flags)
    ran = []

    def watched(model, tokenizer, policy, *args):
        ran.append(type(policy).__name__)
        return perplexity(model, tokenizer, policy, *args)

    monkeypatch.setitem(TASKS, "perplexity", (load_text, watched))
    assert run("perplexity", "text.raw", *flags) == rows and not ran
    text = (tmp_path / "out.csv").read_text()
    (tmp_path / "out.csv").write_text(text[: text.index("checkerboard,") + 9])  # cut off within the last row
    again = run("perplexity", "text.raw", *flags)
    assert without_seconds(again) == without_seconds(rows) and ran == ["Checkerboard"]
    more = run("perplexity", "text.raw", *flags, "--policies", "static", "--skip", "0.3")
    assert len(more) == 4 and more[:3] == again
    with pytest.raises(ValueError, match=r"out.csv: made with other settings \(limit\)"):
        run("perplexity", "text.raw", *flags, "--limit", 64)


def test_scores_are_kept_one_by_one(run, tmp_path, capsys):
    """So that an interval, and a difference from dense on the same questions, can be had afterwards."""
    flags = ["--limit", 6, "--policies", "dense,random", "--match", "ffn"]
    rows = run("factoid", "many.txt", *flags)
    dense, random = map(json.loads, (tmp_path / "items" / "out.jsonl").read_text().splitlines())
    assert random["policy"] == "random" and random["skip"] == 0.2 and random["seed"] == 0
    assert len(random["scores"]["exact_match"]) == len(random["scores"]["answer_within"]) == 6
    for record, row in (dense, rows[0]), (random, rows[1]):
        ends = [row["answer_within"], row["answer_within_low"], row["answer_within_high"]]
        assert ends == [cell(value) for value in mean_interval(record["scores"]["answer_within"])]
    assert "| policy | 20% |" in capsys.readouterr().out
    assert rows[0]["difference"] == "" and rows[1]["difference"] != ""
    more = run("factoid", "many.txt", *flags, "--policies", "shortgpt")  # in another run
    assert more[2]["difference"] != "" and len((tmp_path / "items" / "out.jsonl").read_text().splitlines()) == 3
    (tmp_path / "out.csv").unlink()
    run("factoid", "many.txt", *flags, "--policies", "random")
    assert len((tmp_path / "items" / "out.jsonl").read_text().splitlines()) == 1  # a new table begins with none


def test_the_command_stands_directly_before_the_rows_that_it_made(tmp_path, monkeypatch):
    """And only if it made any. Of a table's name only .csv is a suffix."""

    def run(command, *policies):
        monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", command])
        table = Table(tmp_path / "llama-3.1.csv", dict(task="x"))
        for policy in policies:
            table.add(dict(policy=policy), dict(kl=0.5), dict(kl=[0.5]))

    run("one.py")
    assert not list(tmp_path.iterdir())
    for command, *names in ("one.py", "a"), ("two.py",), ("one.py", "b"), ("two.py", "c"):
        run(command, *names)
    lines = (tmp_path / "llama-3.1.csv").read_text().splitlines()
    assert [line for line in lines if not line.startswith("# versions: python")] == [
        "# command: python one.py", '# settings: {"task": "x"}', "policy,kl", "a,0.5", "b,0.5",
        "# command: python two.py", "c,0.5",
    ]  # fmt: skip
    assert len((tmp_path / "items" / "llama-3.1.jsonl").read_text().splitlines()) == 3


def test_seeds_are_rows_of_policies_that_draw(run):
    rows = run("perplexity", "text.raw", "--policies", "dense,random,ffnskip", "--seeds", "3,4", "--limit", 128)
    assert [(row["policy"], row["seed"]) for row in rows] == [
        ("dense", "3"), ("random", "3"), ("random", "4"), ("ffnskip", "3")
    ]  # fmt: skip
    assert rows[1]["kl"] != rows[2]["kl"]


def test_answers_are_kept_one_by_one(run, tmp_path):
    flags = ["--max-new-tokens", "12", "--policies", "random", "--match", "ffn"]
    run("mtbench", "question.jsonl", *flags)
    file = tmp_path / "out" / "random-0.2-ffn-w4.jsonl"
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first["question_id"] == 81 and first["model_id"] == "random-0.2-ffn-w4"
    assert first["choices"][0]["index"] == 0 and len(first["choices"][0]["turns"]) == 2
    assert first["answer_id"] != second["answer_id"]
    file.write_text(json.dumps(first) + '\n{"question_id"')
    (tmp_path / "out.csv").unlink()
    (row,) = run("mtbench", "question.jsonl", *flags)
    kept, new = (json.loads(line) for line in file.read_text().splitlines())
    assert kept == first and new["choices"] == second["choices"] and new["answer_id"] != second["answer_id"]
    assert row["answers"] == "2"


def test_a_policy_file_that_changed_is_run_again_on_text_of_the_models_own(run, tmp_path):
    """Each version keeps its row; the same version is not run twice."""
    file = tmp_path / "mine.py"
    file.write_text("from policies.baselines import RandomSkip as make\n")
    first = run("perplexity", None, "--policies", f"{file}:make")
    assert run("perplexity", None, "--policies", f"{file}:make") == first and len(first) == 1
    assert first[0]["policy"].startswith(f"{file}:make@") and int(first[0]["tokens"]) == 16 * 64
    file.write_text("from policies.baselines import Checkerboard as make\n")
    policies.load_module.cache_clear()  # another run is another process
    second = run("perplexity", None, "--policies", f"{file}:make")
    assert len(second) == 2 and second[0] == first[0] and second[1]["kl"] != first[0]["kl"]


def test_cells_are_numbers_again():
    assert cell(None) == "" and cell(0.123456789) == "0.12346" and cell("a\nb") == "a\\nb"
    assert math.isclose(float(cell(1234567.0)), 1234567, rel_tol=1e-4)


def test_a_setting_in_a_few_words():
    policy = FFNSkip(1, 5, 0.9, warm_up_index=4, k=1)
    assert describe(policy) == "cold_e=5 cold_s=1 full_every=None k=1 recheck=True sim_threshold=0.9"
    policy.sim_threshold = [2.0, 0.123456789]
    assert "sim_threshold=[2.0,0.12346]" in describe(policy)


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_mistake_is_one_line_in_a_shell(tmp_path):
    (tmp_path / "bad.txt").write_text("a | b\nc\n")
    process = start("experiments/evaluate.py", "factoid", "--data", tmp_path / "bad.txt", stderr=-1, text=True)
    _, said = process.communicate()
    assert process.returncode == 1 and said == f"error: {tmp_path}/bad.txt:2: expected `question | answer`\n"


def test_a_table_has_rows_of_one_fit(run, model, tmp_path):
    """A fit made anew is another policy: its rows are not taken for those that are there."""

    def measured(fit):
        flags = "--policies=dense,standins", "--limit=512", "--window=128", "--standins", tmp_path / fit
        return run("perplexity", "text.raw", *flags)

    for seed, fit in enumerate(("a.safetensors", "b.safetensors")):
        write_fit(tmp_path / fit, model, random_fit(model, seed=seed), [[0.1, 0.0], [0.3, 1.0]])
    rows = measured("a.safetensors")
    assert measured("a.safetensors") == rows
    with pytest.raises(ValueError, match=r"out.csv: made with other settings \(fit_checksum\): give another --output"):
        measured("b.safetensors")


@pytest.mark.parametrize(
    "flags",
    [
        ["nonsense"],
        ["factoid"],
        ["perplexity", "--data", "x", "--skip", "2"],
        ["perplexity", "--match", "time"],
        ["warmup", "--window", "120"],  # shorter than its prompt of 64 and the largest warm-up
        ["worstcase", "--data", "x", "--prompt-tokens", "0"],
        ["warmup", "--prompt-tokens=-1"],
    ],
)
def test_a_mistake_is_one_line(flags, capsys):
    mistake(capsys, evaluate.main, *flags)


def test_an_unknown_policy_ends_before_anything_runs(run, tmp_path):
    for name in "nosuch", "factory", "uniform":
        with pytest.raises(ValueError, match=f"no policy {name}: choose from dense, ffnskip"):
            run("perplexity", "text.raw", "--policies", f"dense,{name}")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    "body, message",
    [("1 / 0", "mine.py, line 2: ZeroDivisionError"), ("None", "the policy returned nothing")],
)
def test_a_mistake_in_a_policy_file_is_one_line_that_names_it(body, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(f"def make(*args, **kwargs):\n    return lambda layers, x, step: {body}\n")
    args = ["--ckpt", GOLDEN / "hf-gqa", "--policies", f"{tmp_path}/mine.py:make", "--output", tmp_path / "x.csv"]
    assert message in mistake(capsys, evaluate.main, "perplexity", *args)


def test_help_reads(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(task in text for task in TASKS) and "--calibration" in text


def test_calibration_windows_come_from_all_over_the_file(model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("".join(char * 64 for char in "abcd"))
    flags = options("--calibration", str(tmp_path / "text.txt"), "--calibration-tokens=256", "--warm-up-index=4")
    found = evaluate.calibrate(model, Bytes(), None, tasks.Context(), flags)
    assert [Bytes().decode(ids) for ids in found.tokens.tolist()] == [char * 64 for char in "abcd"]


def test_the_nearest_to_the_ratio_is_kept(model, tmp_path):
    """Also where it is the first policy made, and what is asked for beside it skips nothing or all."""
    (tmp_path / "mine.py").write_text(
        "from policies.baselines import RandomSkip\n\n\n"
        "def make(model, skip, *args, **more):\n"
        "    return RandomSkip(model, 0.2 if skip == 0.3 else round(skip), *args, **more)\n"
    )
    policy, ratio = make(f"{tmp_path}/mine.py:make", model, 0.3, {}, 4)
    assert policy.skip == 0.2 and ratio == skip_ratio(model, policy, WINDOWS) < 0.29


def test_a_threshold_is_looked_for_among_the_cosines_of_warm_layers():
    """Of all tokens: here the first ones, and the cold layers of all, have none that is reached."""
    cosines = torch.full((200, 6), 0.1)
    cosines[20:, 1:5] = 0.9 + 0.1 * torch.rand(180, 4, generator=torch.Generator().manual_seed(0))
    calibration = Calibration(None, cosines, lambda policy: replay(cosines, policy), 0)
    policy, ratio = at_ratio_ffnskip(FFNSkip(1, 5, 1.0, k=1), tiny_model(n_layers=6), 0.02, calibration)
    assert ratio == pytest.approx(0.02, abs=0.003) and 0.9 < policy.sim_threshold < 1
