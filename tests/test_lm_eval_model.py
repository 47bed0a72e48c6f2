"""experiments/lm_eval_model.py: the harness gets the numbers it would get of transformers, and a policy is at work."""

import os
import sys
import tempfile
from functools import partial
from types import SimpleNamespace

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
for name in "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE":
    os.environ[name] = "1"  # before datasets is imported: no test goes to the network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()

import evaluate
import lm_eval_model
from lm_eval.tasks import TaskManager
from lm_eval_model import SkipLM
from peers import Transformers
from table import read
from tasks import Context
from test_golden import GOLDEN
from tiny import mistake, tiny_model, write_jsonl

from load_weights import load_tokenizer
from model import KVCache, dense
from skip import FFNSkip
from support import common

TOKENIZER = GOLDEN / "hf-theta"  # a tokenizer.json that transformers reads as well
LONG = "jumps over the lazy dog, and the dog does not mind at all. " * 2
TEXTS = "The quick brown fox", "a lazy dog.", "Is it?", LONG


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=380, max_seq_len=48)


def ask(lm, kind, *args):
    """What the model answers to requests as the harness makes them."""
    return getattr(lm, kind)([SimpleNamespace(args=each) for each in args])


def ours(model, policy=dense, batch_size=3):
    return SkipLM(model, load_tokenizer(TOKENIZER), policy, Context(batch_size=batch_size, warm_up_index=4))


@pytest.fixture(scope="module")
def theirs(model):
    """The harness's own model around the same weights in transformers."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    named = dict(bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER / "tokenizer.json"), **named)
    return HFLM(Transformers(model, 0, None).model, tokenizer=tokenizer, device="cpu", batch_size=2)


def test_log_likelihoods_are_those_of_transformers(model, theirs):
    """Padding, contexts that are empty or end in a space, and more than max_seq_len tokens in all."""
    pairs = [(a, " " + b) for a in (*TEXTS, "") for b in TEXTS[:3]] + [("Is it? ", "a dog"), (LONG, " yes")]
    for mine, other in zip(ask(ours(model), "loglikelihood", *pairs), ask(theirs, "loglikelihood", *pairs)):
        assert mine[0] == pytest.approx(other[0], abs=1e-4) and mine[1] == other[1]


def test_a_text_of_several_windows_is_that_of_transformers(model, theirs):
    assert len(load_tokenizer(TOKENIZER).encode(LONG)) > model.args.max_seq_len
    texts = [(text,) for text in TEXTS]
    mine = ask(ours(model), "loglikelihood_rolling", *texts)
    assert mine == pytest.approx(ask(theirs, "loglikelihood_rolling", *texts), abs=1e-4)


def test_texts_are_those_of_transformers(model, theirs):
    wanted = dict(until=["e", "\n"], max_gen_toks=12, do_sample=False)
    prompts = [(text, wanted) for text in TEXTS]
    mine = ask(ours(model), "generate_until", *prompts)
    assert mine == ask(theirs, "generate_until", *prompts) and not any("e" in text for text in mine)


def test_a_policy_works_in_the_context_too(model):
    """Token by token through a cache, skipping from the fifth token on, whatever is prompt, it says the same."""
    policy = FFNSkip(0, 4, sim_threshold=0.8, warm_up_index=4, k=1)
    pairs = [(TEXTS[0], " " + TEXTS[1]), (TEXTS[1], " " + TEXTS[0])]
    lm, encode = ours(model, policy), load_tokenizer(TOKENIZER).encode
    answers = ask(lm, "loglikelihood", *pairs)
    skipped, past, *_ = (sum(column) for column in zip(*lm.counts))
    assert 0.1 < skipped / past < 0.9
    for (context, continuation), (total, _) in zip(pairs, answers):
        ids = encode(context + continuation)
        cache, n, by_hand = KVCache(model.args, 1, 48, torch.float32), len(encode(context)), 0.0
        for i, token in enumerate(ids[:-1]):
            log_p = model(torch.tensor([[token]]), cache, policy).log_softmax(-1)[0, 0]
            by_hand += log_p[ids[i + 1]].item() if i >= n - 1 else 0.0
        assert total == pytest.approx(by_hand, abs=1e-4)
        (full,) = ask(ours(model), "loglikelihood", (context, continuation))
        assert abs(total - full[0]) > 0.01  # and it is not what the dense model says


def test_a_policy_works_in_the_prompt_of_a_text(model):
    """All but the first five tokens may skip, and are counted: those of the prompt, and all new ones but the last."""
    lm = ours(model, FFNSkip(0, 4, sim_threshold=0.8, warm_up_index=4, k=1))
    ask(lm, "generate_until", (TEXTS[0], dict(until=[], max_gen_toks=3)))
    ((_, past, *_),) = lm.counts
    assert past == 4 * (len(load_tokenizer(TOKENIZER).encode(TEXTS[0])) + 2 - 5)


def test_sampled_texts_are_refused(model):
    with pytest.raises(ValueError, match="do_sample"):
        ask(ours(model), "generate_until", ("Is it?", dict(until=[], do_sample=True)))


def test_what_a_task_may_write_is_read_as_the_harness_reads_it(model, theirs):
    """One stop text or a list of them, and every name of the most tokens; not more tokens than the context has."""
    prompt = "The quick brown fox"
    for wanted in dict(until="e", max_gen_toks=12), dict(until="the", max_new_tokens=12), dict(until=[], max_tokens=5):
        mine = ask(ours(model), "generate_until", (prompt, wanted))
        assert mine == ask(theirs, "generate_until", (prompt, wanted))
    for until in [""], None:
        wanted = dict(until=until, max_completion_tokens=5, temperature=0.0)
        assert ask(ours(model), "generate_until", (prompt, wanted)) == mine
    for wanted in dict(until=[], temperature=0.7), dict(until="e", do_sample=True):
        with pytest.raises(ValueError, match="the task wants sampled texts"):
            ask(ours(model), "generate_until", ("Is it?", wanted))
    with pytest.raises(ValueError, match="the task wants 48 new tokens, and the model's max_seq_len is 48"):
        ask(ours(model), "generate_until", ("Is it?", dict(until="e", max_new_tokens=48)))


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_a_text_that_is_too_long_is_told(model, theirs, capsys, kind):
    """Its beginning is cut off, as the harness does it."""
    common.note.cache_clear()
    what = " yes" if kind == "loglikelihood" else dict(until=["e"], max_gen_toks=12)
    ask(ours(model), kind, ("Is it?", what))
    assert "lose their beginning" not in capsys.readouterr().err
    mine = ask(ours(model), kind, (LONG, what))
    assert "texts longer than the context of 48 lose their beginning" in capsys.readouterr().err
    other = ask(theirs, kind, (LONG, what))
    assert mine == other if kind == "generate_until" else mine[0][0] == pytest.approx(other[0][0], abs=1e-4)


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """run(*flags): the program on a task file over local data, with a tiny model."""
    questions = [dict(question=f"{i} {text}", choices=["dog", "fox", "a lazy fox"], answer=i % 3)
                 for i, text in enumerate(TEXTS[:3] * 4)]  # fmt: skip
    write_jsonl(tmp_path / "data.jsonl", *questions)
    (tmp_path / "animals.yaml").write_text(TASK.format(file=tmp_path / "data.jsonl"))
    monkeypatch.setattr(common, "find_checkpoint", lambda path: TOKENIZER)
    monkeypatch.setattr(evaluate, "load_model", lambda path, device, dtype: model)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # thousands: slow

    def call(*flags):
        shared = ["--tasks=animals", f"--include-path={tmp_path}", f"--results={tmp_path}", "--device=cpu"]
        lm_eval_model.main([*shared, "--warm-up-index=4", "--window=48", *flags])
        return read(tmp_path / "lm_eval_animals.csv")

    return call


TASK = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def test_the_program_answers_as_transformers_does_and_goes_on(run, theirs, tmp_path, capsys):
    flags = ["--policies=dense,random", "--skip=0.25", "--limit=10"]
    dense_row, random_row = run(*flags)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    expected = lm_eval.simple_evaluate(theirs, tasks=["animals"], limit=10, task_manager=manager, bootstrap_iters=10)
    for name in "acc", "acc_norm":
        assert dense_row[name] == pytest.approx(expected["results"]["animals"][f"{name},none"], abs=1e-4)
    assert 0 < dense_row["acc"] < 1 and dense_row["ffn_skip_ratio"] == 0
    assert random_row["ffn_skip_ratio"] == pytest.approx(0.25, abs=0.08)
    assert random_row["difference"] == pytest.approx(random_row["acc"] - dense_row["acc"])
    assert random_row["difference_low"] <= random_row["difference"] <= random_row["difference_high"]
    before = (tmp_path / "lm_eval_animals.csv").read_text()
    run(*flags)
    assert (tmp_path / "lm_eval_animals.csv").read_text() == before  # nothing is run again
    assert capsys.readouterr().out.count("| random |") == 2  # the table is printed each time
    with pytest.raises(ValueError, match="made with other settings"):
        run(*flags, "--num-fewshot=2")
    task = tmp_path / "animals.yaml"
    task.write_text(task.read_text().replace("Answer:", "It is:"))  # the fixture's own, seen by the next run
    with pytest.raises(ValueError, match="made with other settings"):
        run(*flags)


def test_mistakes_are_one_line(run, tmp_path, capsys, monkeypatch):
    said = mistake(capsys, lm_eval_model.main, "--tasks", "nosuch")
    assert "no task nosuch" in said and "--include-path" in said
    assert "required: --tasks" in mistake(capsys, lm_eval_model.main)
    for flag in "--chat", "--decode":
        assert f"{flag} is not for tasks" in mistake(capsys, lm_eval_model.main, "--tasks", "animals", flag)
    assert "--nosuch" in mistake(capsys, lm_eval_model.main, "--tasks", "animals", "--nosuch", "1")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "make eval" in mistake(capsys, lm_eval_model.main, "--tasks", "animals")
