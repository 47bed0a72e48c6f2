"""
generate.py as a user runs it, on a small checkpoint, and on the demo model where it is installed. Most run in this
process, by main([...]); those in which the terminal, a signal or the exit status matters, in one of their own.
"""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
from test_golden import GOLDEN
from tiny import mistake, start

from generate import QUESTION, generate, main
from load_weights import load_model, load_tokenizer
from support.show import Generation, speedup_bound

CKPT = str(GOLDEN / "hf-gqa")
SKIP = ["--policy", "ffnskip", "--cold-s", "0", "--cold-e", "2", "--sim-threshold", "0.5", "--warm-up-index", "1"]


@pytest.fixture
def run(capsys, monkeypatch):
    """run(*args) -> standard output and standard error of generate.py, run in this process."""

    def call(*args, ckpt=CKPT, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        assert main([*(["--ckpt", ckpt] if ckpt else []), *args]) == 0
        return capsys.readouterr()

    return call


@pytest.fixture
def report(run):
    def call(*args, **kwargs):
        return json.loads(run("--json", *args, **kwargs).out)  # nothing but one JSON object

    return call


def test_the_text_is_that_of_the_library_streamed_or_as_json(report):
    model, tokenizer = load_model(CKPT), load_tokenizer(CKPT)
    prompt = tokenizer.encode("The capital")
    ids = list(generate(model, prompt, 20, eos_ids=tokenizer.eos_ids))
    out = report("--max-new-tokens", "20", "The capital")
    assert out["token_ids"] == ids and out["new_tokens"] == len(ids) and out["prompt_tokens"] == len(prompt)
    assert out["policy"] == "dense" and out["ffn_saved_ratio"] == 0 and out["settings"]["max_new_tokens"] == 20
    args = ["--ckpt", CKPT, "--max-new-tokens", 20, "The capital"]
    process = start("generate.py", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    streamed, said = process.communicate()
    assert process.returncode == 0 and streamed == out["text"] + "\n"
    assert "no skip settings for hf-gqa" in said and "calibrate.py" in said
    assert said.splitlines()[-1].startswith("[dense: ") and "tokens/s" in said


def test_prompts_come_from_arguments_and_standard_input_as_one_batch(run, report):
    out = report("--max-new-tokens", "5", "-", "Once upon", "The quick", stdin="It could count\n")
    alone = [report("--max-new-tokens", "5", prompt) for prompt in ("It could count", "Once upon", "The quick")]
    assert out["prompt_tokens"] == [one["prompt_tokens"] for one in alone] and len(out["text"]) == 3
    printed = run("--max-new-tokens", "5", "Once upon", "The quick").out
    assert printed.startswith("> Once upon\n") and "\n> The quick\n" in printed


@pytest.mark.parametrize("words, said", [([], ""), (["-"], ""), (["Tom"], "[standard input is not read: ")])
def test_what_is_piped_in_is_the_prompt_or_is_named(words, said):
    """UTF-8, whatever the code page of the terminal; and a prompt beside it is told that it is not read."""
    args = ["--ckpt", CKPT, "--json", "--max-new-tokens", "2", *words]
    env = dict(PYTHONIOENCODING="cp1252")
    process = start("generate.py", *args, stdin=-1, stdout=-1, stderr=-1, env=env)
    out, err = process.communicate("\ufeffOù est le café ?\n".encode())
    expected = load_tokenizer(CKPT).encode(words[0] if said else "Où est le café ?")
    assert json.loads(out)["prompt_tokens"] == len(expected) and err.decode().startswith(said or "[no skip settings")


def test_nothing_piped_in_is_no_prompt(tmp_path, report):
    (tmp_path / "empty").touch()
    for stdin in open(os.devnull), open(tmp_path / "empty"):
        args = ["--ckpt", CKPT, "--json", "--max-new-tokens", 1]
        process = start("generate.py", *args, stdin=stdin, stdout=-1, stderr=-1)
        assert json.loads(process.communicate()[0])["prompt_tokens"] == len(load_tokenizer(CKPT).encode(QUESTION))


def test_an_empty_prompt_is_the_start_of_a_text_where_the_tokenizer_has_a_token_for_it(report):
    out = report("--max-new-tokens", "3", "")
    model, bos_id = load_model(CKPT), load_tokenizer(CKPT).bos_id
    assert out["prompt_tokens"] == 1 and out["token_ids"] == list(generate(model, [bos_id], 3))
    assert report("--max-new-tokens", "3", "\n")["prompt_tokens"] > 1  # blanks are a prompt as any other


def test_a_prompt_is_a_message_where_there_is_a_chat_template(tmp_path, report):
    """And a text to continue where there is none, or where --raw says so."""
    folder = tmp_path / "hf-gqa"
    shutil.copytree(CKPT, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }} says {{ m.content }}{% endfor %}")
    encode = load_tokenizer(CKPT).encode

    def prompt_tokens(*args, ckpt=folder):
        out = report("--max-new-tokens", "1", *args, "Once upon", ckpt=str(ckpt))
        return out["settings"]["chat"], out["prompt_tokens"]

    message, text = len(encode("user says Once upon", bos=False)), len(encode("Once upon"))
    assert prompt_tokens() == prompt_tokens("--chat") == (True, message)
    assert prompt_tokens("--raw") == prompt_tokens("--raw", ckpt=CKPT) == prompt_tokens(ckpt=CKPT) == (False, text)
    system = len(encode("system says Be briefuser says Once upon", bos=False))
    assert prompt_tokens("--system", "Be brief") == (True, system)
    assert prompt_tokens("--chat", ckpt=CKPT) == (True, len(encode("[INST] Once upon [/INST]")))


def test_a_text_that_ends_before_it_begins_is_told(monkeypatch, run):
    """Of each prompt whose text is empty, with what to try; any other text speaks for itself."""
    eos = min(load_tokenizer(CKPT).eos_ids)
    monkeypatch.setattr("generate.sample", lambda logits, *_: torch.full((len(logits),), eos))
    told = "the model ended it at token 1: "
    assert f"[no text: {told}try other words, or --temperature" in run("x").err
    said = run("--raw", "x", "y").err
    assert f"[no text for prompt 2: {told}without --raw a prompt is a message]" in said
    assert f"[no text: {told}" in run("--chat", stdin="hello\n").err
    drawn = iter([load_tokenizer(CKPT).encode("Tom")[-1], eos])
    monkeypatch.setattr("generate.sample", lambda logits, *_: torch.tensor([next(drawn)]))
    assert "[no text" not in run("x").err


def test_sampling_repeats_with_its_seed_and_greedy_ignores_it(report):
    def draw(*args):
        return report("--max-new-tokens", "12", *args, "Layers")["token_ids"]

    assert draw("--temperature", "1", "--seed", "1") == draw("--temperature", "1", "--seed", "1")
    assert draw("--temperature", "1", "--seed", "1") != draw("--temperature", "1", "--seed", "2")
    assert draw("--seed", "1") == draw("--seed", "2") == draw("--temperature", "1", "--top-p", "0.00001")


def test_a_trace_named_html_is_a_page(tmp_path, run):
    page = tmp_path / "trace.html"
    said = run(*SKIP, "--max-new-tokens", "3", "--compare", "--trace", str(page), "Layers 3 to")
    assert f"[trace written to {page}]" in said.err and "skipped: no token is past the warm-up]" in said.err
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("prompt", ["Layers 3 to 27 may skip: why?", "a  b\u00e9\u4e2d"])
def test_the_tokens_of_a_trace_make_the_text_again(prompt, tmp_path, run):
    """Also sentencepiece's, which drops the first space of what it decodes alone, and bytes of one character."""
    run(*SKIP, "--max-new-tokens", "3", "--trace", str(tmp_path / "t.csv"), prompt)
    rows = csv.DictReader((tmp_path / "t.csv").open(encoding="utf-8"))
    assert "".join(row["token"] for row in rows).startswith(prompt)


def test_skipping_is_reported_traced_and_compared(tmp_path, run, report):
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
    assert out["first_difference"] == next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    assert out["speedup_bound"] == pytest.approx(speedup_bound(load_model(CKPT), out["ffn_saved_ratio"])) and n > 3
    assert 2**26 < out["peak_memory_bytes"] < 2**36  # Python and PyTorch alone take more than 64 MiB
    text = run(*SKIP, "--max-new-tokens", "10", "--compare", "Layers 3 to")
    assert text.out.startswith("[dense]\n") and "\n[ffnskip]\n" in text.out and "x the speed of dense" in text.err
    picture = re.search(r"\[a dot is an FFN block .*\]\n  1 ([\u2800-\u28ff]+)\n\[dense: ", text.err)[1]
    assert sum((ord(char) & 0xFF).bit_count() for char in picture) == skipped


def test_the_first_difference_of_several_prompts_is_one_per_prompt(tmp_path, run, report):
    """And of each the trace has its own tokens, without the padding before a shorter one."""
    prompts, trace = ("Layers 3 to", "Once upon", "The quick brown"), tmp_path / "trace.csv"
    out = report(*SKIP, "--max-new-tokens", "10", "--compare", "--trace", str(trace), *prompts)
    rows = list(csv.DictReader(trace.open(encoding="utf-8")))
    for prompt, (n, new) in enumerate(zip(out["prompt_tokens"], out["new_tokens"])):
        index = [int(row["token_index"]) for row in rows if row["prompt"] == str(prompt)]
        assert index == list(range(-n, new - 1))
    for row, first in enumerate(out["first_difference"]):
        mine, dense = out["token_ids"][row], out["dense"]["token_ids"][row]
        assert mine == dense if first is None else mine[:first] == dense[:first] and mine[first:] != dense[first:]
    said = run(*SKIP, "--max-new-tokens", "10", "--compare", *prompts).err
    where = ", ".join("none" if first is None else f"at token {first}" for first in out["first_difference"])
    assert f"\n[first difference: {where}; decoding " in said


def test_an_infinite_threshold_writes_what_dense_writes(report):
    out = report(*SKIP, "--sim-threshold", "inf", "--max-new-tokens", "20", "--compare", "Once")
    assert out["first_difference"] is None and out["text"] == out["dense"]["text"] and out["ffn_skip_ratio"] == 0


def test_the_warm_up_index_is_that_of_any_policy(report):
    args = ["--policy", "random", "--skip", "0.5", "--max-new-tokens", "12", "Layers 3 to"]
    out = report(*args)
    assert out["ffn_skip_ratio"] is None and out["ffn_saved_ratio"] == 0  # eleven tokens end within its own, of 25
    out = report("--warm-up-index", "-1", *args)
    assert out["ffn_skip_ratio"] == out["ffn_saved_ratio"] > 0.2
    out = report("--warm-up-index", "6", *args)
    assert out["ffn_saved_ratio"] == pytest.approx(out["ffn_skip_ratio"] * 4 / 11) and out["ffn_skip_ratio"] > 0


def test_the_prompt_is_skipped_in_where_one_asks_for_it(tmp_path, run):
    trace = str(tmp_path / "trace.csv")
    for flags in [], ["--skip-prompt"]:
        run(*SKIP, *flags, "--max-new-tokens", "3", "--trace", trace, "Layers")
        rows = list(csv.DictReader(open(trace, encoding="utf-8")))
        assert (int(rows[0]["token_index"]) < 0) == (not flags)
        assert [row["layer_1"] == "skip" for row in rows] == [int(row["token_index"]) > 1 for row in rows]


def test_the_prompt_has_a_share_of_its_own_where_one_asks_for_it(tmp_path, report):
    trace, prompt, seen = str(tmp_path / "trace.csv"), " ".join(["Layers 3 to 5"] * 2), {}
    for flags in ["--skip", "0", "--prompt-skip", "0.6"], ["--skip", "0.6", "--prompt-skip", "0"], ["--skip", "0.6"]:
        flags += ["--policy", "static", "--warm-up-index", "3", "--max-new-tokens", "12", "--trace", trace]
        out = report(*flags, prompt)
        rows = list(csv.DictReader(open(trace, encoding="utf-8")))
        assert int(rows[0]["token_index"]) == -out["prompt_tokens"]
        for key, wanted in ("prompt", True), ("answer", False):
            counted = [row for row in rows if (int(row["token_index"]) < 0) == wanted]
            seen.setdefault(key, []).append(any("skip" in row.values() for row in counted[4:]))
            assert not any("skip" in row.values() for row in counted[:4])  # each has its own warm-up
        told = bool(out["prompt_ffn_skip_ratio"]), bool(out["ffn_skip_ratio"])
        assert told == (seen["prompt"][-1], seen["answer"][-1])
        assert out["settings"]["skip"].get("prompt_skip") == (float(flags[3]) if "--prompt-skip" in flags else None)
    assert seen == dict(prompt=[True, False, False], answer=[False, True, True])


def test_settings_in_the_folder_make_ffnskip_the_default(tmp_path, report, capsys):
    folder = tmp_path / "hf-gqa"
    shutil.copytree(CKPT, folder)
    settings = dict(model="hf-gqa", n_layers=2, cold_s=0, cold_e=2, sim_threshold=0.5, warm_up_index=0, k=1)
    (folder / "skip.json").write_text(json.dumps(settings))
    out = report("--max-new-tokens", "8", "x", ckpt=str(folder))
    assert out["policy"] == "ffnskip" and out["ffn_skip_ratio"] > 0 and out["settings"]["skip"]["k"] == 1
    assert report("--max-new-tokens", "8", "--policy", "dense", "x", ckpt=str(folder))["ffn_skip_ratio"] == 0
    (folder / "skip.json").write_text(json.dumps(settings | dict(n_layers=3)))
    assert "skip.json: made for a model of 3 layers" in mistake(capsys, main, "--ckpt", folder, "x")


SLOW = """
import time
from model import dense

def make(model, skip, warm_up_index=None, tokens=None, seed=0):
    def policy(layers, x, step):
        time.sleep(0.1)
        return dense(layers, x, step)
    return policy
"""


@pytest.mark.parametrize("script", ["generate.py", "calibrate.py", "load_weights.py", "experiments/evaluate.py"])
def test_ctrl_c_while_pytorch_is_imported_leaves_no_traceback(script, tmp_path):
    """A package of that name is interrupted in its first line."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise KeyboardInterrupt")
    process = start(script, stderr=subprocess.PIPE, env=dict(PYTHONPATH=str(tmp_path)))
    assert process.communicate()[1] == b"" and process.returncode


def test_ctrl_c_ends_with_the_summary(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    args = ["--ckpt", CKPT, "--policy", f"{tmp_path}/slow.py:make", "--skip", 0.1, "--max-new-tokens", 40, "Once"]
    process = start("generate.py", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)  # it has begun to write
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "Traceback" not in said
    assert 1 <= int(re.search(r"slow.py:make: (\d+) tokens, ", said)[1]) < 40


def test_ctrl_c_in_this_process_keeps_what_was_written(monkeypatch, capsys):
    """Certainly in the middle of the text, which the process of its own may have ended already."""
    calls = []

    def interrupted(self, real=Generation.advance):
        calls.append(self.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Generation, "advance", interrupted)
    assert main(["--ckpt", CKPT, "--max-new-tokens", "40", "--json", "Once"]) == 130
    printed = capsys.readouterr()
    assert json.loads(printed.out)["new_tokens"] == 3 and "[dense: 3 tokens, " in printed.err


WRONG = {
    "empty prompt": (["--ckpt", str(GOLDEN / "hf-theta"), ""], "the prompt is empty"),  # its tokenizer adds no BOS
    "temperature": (["--temperature", "-1", "x"], "--temperature -1.0"),
    "top-p": (["--top-p", "0", "x"], "--top-p 0.0"),
    "skip": (["--skip", "1", "x"], "--skip: 1 is not a share"),
    "both": (["--skip-prompt", "--prompt-skip", "0.1", "x"], "not allowed with argument --skip-prompt"),
    "densely": (["--policy", "dense", "--prompt-skip", "0.1", "x"], "--prompt-skip and --warm-up-index are not"),
    "seed": (["--seed", str(2**63), "x"], "is not a number from 0 to 2^63 - 1"),
    "no tokens": (["--max-new-tokens", "0", "x"], "0 is not a positive number"),
    "too long": (["word " * 80], "more than the model's max_seq_len 64"),
    "compare nothing": (["--compare", "x"], "--compare needs a policy"),
    "chat without a template": (["--chat", "--ckpt", str(GOLDEN / "hf-theta"), "x"], "no chat template"),
    "trace nowhere": ([*SKIP, "--trace", "/nosuch/trace.csv", "x"], "/nosuch/trace.csv"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(case, capsys):
    args, message = WRONG[case]
    if "hf-theta" in str(args):
        pytest.importorskip("tokenizers", reason="tokenizer.json needs the package tokenizers")
    assert message in mistake(capsys, main, "--ckpt", CKPT, *args)


def test_a_mistake_is_one_line_in_a_shell():
    process = start("generate.py", "--ckpt", "nosuch", "x", stderr=subprocess.PIPE, text=True)
    _, said = process.communicate()
    assert process.returncode == 1
    assert said.startswith("error: no checkpoint at nosuch") and said.count("\n") == 1


def test_help_reads_like_documentation(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    flags = "--max-new-tokens", "--policy", "--skip-config", "python generate.py"
    assert all(flag in text for flag in flags)


def test_the_demo_model_answers_about_plants(demo, run):
    assert "Plants" in run("--max-new-tokens", "12", ckpt=None).out


def test_the_demo_model_knows_its_end_of_text(demo, report):
    out = report("--chat", "--dtype", "float32", "What is 1 + 1? Answer with one number.", ckpt=None)
    assert out["token_ids"][-1] == 2 and out["new_tokens"] < 256 and "<|" not in out["text"]
    assert torch.tensor(out["token_ids"]).max() < 49152


def test_generation_begins_before_it_ends(demo):
    """Text streams: the first piece is there while later ones are still being computed. And the fit is found, from any
    folder, in a process of its own: nothing but its own path tells the program where its parts are."""
    args = ["--policy", "standins", "--skip", 0.15, "--max-new-tokens", 40]
    process = start("generate.py", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
    process.stdout.read(1)
    assert process.poll() is None
    text, said = process.communicate()
    skipped = float(re.search(r"\[standins: 40 tokens, .* skipped ([\d.]+)% \(planned 15.0%\)", said)[1])
    assert len(text) > 20 and 2 < skipped <= 100 * 7 / 30
