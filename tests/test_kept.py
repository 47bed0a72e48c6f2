"""What is kept from run to run: it is known to belong to what is there now, and is never there by half."""

import functools
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import evaluate
import fit_standins
import pytest
import table
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from table import Table, add_record, read_records
from test_golden import GOLDEN
from test_standins import random_fit, write_fit
from tiny import STORY, mistake, status, tiny_model, write_jsonl

import calibrate
import generate
import load_weights
import policies
from policies import standins
from support import common
from support.common import fingerprint, write_whole

# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["wq", "wv", "wo", "w1", "w2", "w3", "attention_norm", "output", "tok_embeddings"])
def test_a_fingerprint_tells_what_training_changes(part):
    """Any part alone, as a merged LoRA of q_proj and v_proj, in one layer only; and it does not ask for the dtype."""
    model = tiny_model(dtype=torch.bfloat16)
    before = fingerprint(model)
    assert fingerprint(tiny_model(dtype=torch.bfloat16).float()) == before
    name = [name for name in model.state_dict() if f".{part}.weight" in f".{name}"][-1]
    model.state_dict()[name].mul_(1.01)
    assert fingerprint(model) != before
    if part == "attention_norm":
        wide = tiny_model(dim=64)
        narrow = fingerprint(wide)
        wide.state_dict()["norm.weight"][3] = 2.0  # a single number of a vector
        assert fingerprint(wide) != narrow
    half = fingerprint(tiny_model(dtype=torch.float16))
    assert half.split()[0] != before.split()[0]  # of which it cannot be told


def checkpoint(folder, scale=None):
    """A copy of a tiny checkpoint; with a scale another one of the same name and sizes, trained in one matrix."""
    if not folder.exists():
        shutil.copytree(GOLDEN / "hf-gqa", folder)
    if scale:
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] *= scale
        save_file(weights, folder / "model.safetensors")
    return folder


def test_a_fit_of_other_weights_is_refused(tmp_path):
    model = tiny_model()
    file = write_fit(tmp_path / "f.safetensors", model, random_fit(model), [[0.1, -9.0], [0.3, 0.0]])
    standins.make(model, 0.2, fitted=file)
    for part in "w1", "w2":
        merged = tiny_model()
        weight = merged.layers[2].feed_forward.state_dict()[f"{part}.weight"]
        weight += 0.01 * torch.outer(torch.randn(weight.size(0)), torch.randn(weight.size(1)))  # W + B A
        with pytest.raises(ValueError, match="f.safetensors: fitted for other weights, those of tiny: fit these anew"):
            standins.make(merged, 0.2, fitted=file)


@pytest.mark.parametrize("about, dtype", [({}, torch.float32), (None, torch.float16)])
def test_a_fit_that_cannot_be_compared_is_used_with_a_line(about, dtype, tmp_path, capsys):
    """One of before there were checksums, and one made in another dtype."""
    model, file = tiny_model(), tmp_path / f"{dtype}.safetensors"
    write_fit(file, model, random_fit(model), [[0.1, -9.0], [0.3, 0.0]])
    if about is not None:
        with safe_open(file, "pt") as opened:
            about = {key: value for key, value in opened.metadata().items() if key != "weights_checksum"}
        save_file(load_file(file), file, about)
    standins.make(model.to(dtype), 0.2, fitted=file)
    assert capsys.readouterr().err == f"[{file}: holds no checksum of weights in this dtype, so it may be for others]\n"


def test_settings_say_when_the_weights_are_others(tmp_path, capsys):
    """As calibrate.py has made them there is nothing to say; nor where they come from cosines alone."""
    ckpt, text = checkpoint(tmp_path / "m"), GOLDEN / "text.txt"
    args = ["--ckpt", ckpt, "--text", text, "--skip", "0.3", "--warm-up-index", "2", "--max-tokens", "256"]
    assert not status(calibrate.main, *args)
    settings = json.loads((ckpt / "skip.json").read_text())

    def said():
        capsys.readouterr()
        generate.main(["--ckpt", str(ckpt), "--max-new-tokens", "2", "Once"])
        return [line for line in capsys.readouterr().err.splitlines() if "skip.json" in line]

    assert said() == []
    checkpoint(ckpt, scale=1.1)
    assert said() == [f"[{ckpt}/skip.json: made for other weights than these: python calibrate.py --ckpt ... makes "
                      "settings for them]"]  # fmt: skip
    (ckpt / "skip.json").write_text(json.dumps(settings | dict(weights_checksum=None)))
    assert said() == []
    del settings["weights_checksum"]
    (ckpt / "skip.json").write_text(json.dumps(settings))
    assert said()[0].startswith(f"[{ckpt}/skip.json: does not say for which weights it was made")


def test_a_fit_beside_a_checkpoint_is_no_set_of_its_weights(tmp_path, capsys):
    ckpt, model = checkpoint(tmp_path / "m"), tiny_model()
    for name in "standins.safetensors", "mine.standins.safetensors":
        write_fit(ckpt / name, model, random_fit(model), [[0.1, -9.0]])
    load_weights.load_model(ckpt)
    assert not capsys.readouterr().err
    (ckpt / "model.safetensors").unlink()
    with pytest.raises(common.LoadError, match="no weights"):
        load_weights.load_model(ckpt)


# --- rows and answers -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, capsys):
    """run(task, *flags): evaluate.py on a checkpoint m, text.txt and question.jsonl; returns what it says, if wrong."""
    config = checkpoint(tmp_path / "m") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(max_position_embeddings=512)))
    (tmp_path / "text.txt").write_text(STORY * 20)
    (tmp_path / "other.txt").write_text(STORY.upper() * 20)
    write_jsonl(tmp_path / "question.jsonl", *(dict(question_id=i, turns=["Say it."]) for i in range(2)))
    policies.load_module.cache_clear()

    def call(task, *flags):
        data = "text.txt" if task in evaluate.TEXT_TASKS else "question.jsonl"
        args = [task, "--data", tmp_path / data, "--ckpt", tmp_path / "m", "--window=64", "--limit=128", "--match=ffn"]
        args += ["--warm-up-index=3", "--skip=0.5", "--calibration", tmp_path / "other.txt", "--max-new-tokens=8"]
        args += ["--calibration-tokens=256", "--device=cpu", "--output", tmp_path / "t.csv", *flags]
        if len(flags) > 1 and flags[-1] == "wrong":
            return mistake(capsys, evaluate.main, *args[:-1])
        policies.load_module.cache_clear()  # another run is another process
        evaluate.main(list(map(str, args)))
        return table.read(tmp_path / "t.csv")

    return call


def test_rows_belong_to_the_weights_and_the_texts_that_are_there(run, tmp_path):
    run("perplexity", "--policies=dense")
    before = (tmp_path / "t.csv").read_text()
    for name in "text.txt", "other.txt":
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + "More of it.")
        key = "data_checksum" if name == "text.txt" else "calibration_checksum"
        said = run("perplexity", "--policies=dense,random", "wrong")
        assert f"t.csv: made with other settings ({key}): give another --output, or delete it" in said
        (tmp_path / name).write_text(text)
    checkpoint(tmp_path / "m", scale=1.1)
    assert "t.csv: made with other settings (weights_checksum)" in run("perplexity", "--policies=dense,random", "wrong")
    assert (tmp_path / "t.csv").read_text() == before
    (tmp_path / "m" / "model.safetensors").unlink()
    shutil.copy(GOLDEN / "hf-gqa" / "model.safetensors", tmp_path / "m")
    assert run("perplexity", "--policies=dense,random")[1]["difference"] != ""


def test_rows_of_a_table_compare_the_same_tokens(run):
    """A later warm-up leaves fewer: the dense row that is there is of others."""
    run("perplexity", "--policies=dense")
    said = run("perplexity", "--policies=dense,random", "--warm-up-index=3,9", "wrong")
    assert "made with other settings (first)" in said


def test_a_policy_with_settings_may_join_a_table_and_keeps_them(run, tmp_path):
    """Dense needs no settings, not even those of another model; what joins later is held to what it joined with."""
    (tmp_path / "m" / "skip.json").write_text(json.dumps(dict(model="llama-2-7b", cold_s=0)))
    run("perplexity", "--policies=dense,printed")
    assert "made for llama-2-7b" in run("perplexity", "--policies=ffnskip", "wrong")
    (tmp_path / "m" / "skip.json").unlink()
    flags = "--policies=ffnskip", "--cold-s=0", "--cold-e=2", "--k=1"
    assert [row["policy"] for row in run("perplexity", *flags)] == ["dense", "printed", "ffnskip"]
    assert "made with other settings (skip)" in run("perplexity", *flags, "--cold-e=1", "wrong")


def test_a_table_without_checksums_goes_on_with_a_line(run, tmp_path, capsys):
    run("perplexity", "--policies=dense")
    text = (tmp_path / "t.csv").read_text().replace("weights_checksum", "unknown")
    (tmp_path / "t.csv").write_text(text)
    assert len(run("perplexity", "--policies=dense,random")) == 2
    assert f"[{tmp_path}/t.csv: holds no checksums, so it may be of other weights and data]" in capsys.readouterr().err
    checkpoint(tmp_path / "m", scale=1.1)
    assert "(weights_checksum)" in run("perplexity", "--policies=static", "wrong")  # which the new rows have said


MINE = """
def make(model, skip, warm_up_index=None, tokens=None, seed=0):
    def policy(layers, x, step):
        for layer in layers:
            h = layer.add_attention(x, step)
            x = layer.add_feed_forward(h, step, active=(step.token_index < 0) | (layer.layer_id != {}))
        return x
    policy.warm_up_index = -1
    return policy
"""


def turns(folder):
    """{file: [what it answers]} of a folder of answers."""
    found = {}
    for file in folder.glob("*.jsonl"):
        found[file.name] = [record["choices"][0]["turns"] for record in read_records(file)]
    return found


def test_every_version_of_a_policy_has_answers_of_its_own(run, tmp_path):
    (tmp_path / "mine.py").write_text(MINE.format(0))
    flags = f"--policies={tmp_path}/mine.py:make", "--warm-up-index=-1"
    run("mtbench", *flags)
    (tmp_path / "mine.py").write_text(MINE.format(1))
    assert len(run("mtbench", *flags)) == 2
    first, second = turns(tmp_path / "t").values()
    assert first != second and len(first) == len(second) == 2


def test_every_warm_up_has_answers_of_its_own(run, tmp_path):
    code = MINE.format(0).replace("warm_up_index = -1", "warm_up_index = warm_up_index")
    (tmp_path / "mine.py").write_text(code.replace("step.token_index < 0", "step.token_index <= warm_up_index"))
    run("mtbench", f"--policies={tmp_path}/mine.py:make", "--warm-up-index=-1,2")
    first, second = turns(tmp_path / "t").values()
    assert first != second


def test_answers_of_another_model_are_refused(run, tmp_path):
    """Also where the table has been deleted, as it says; the advice names the folder."""
    run("mtbench", "--policies=dense")
    (tmp_path / "t.csv").unlink()
    run("mtbench", "--policies=dense")  # of the same model they count
    checkpoint(tmp_path / "m", scale=3)
    before = turns(tmp_path / "t")
    assert f"or delete it and {tmp_path}/t" in run("mtbench", "--policies=dense", "wrong")
    (tmp_path / "t.csv").unlink()
    said = run("mtbench", "--policies=dense", "wrong")
    assert f"{tmp_path}/t: made with other settings (weights_checksum): give another --output, or delete the f" in said
    assert turns(tmp_path / "t") == before
    shutil.rmtree(tmp_path / "t")
    run("mtbench", "--policies=dense")
    assert turns(tmp_path / "t").keys() == before.keys() and turns(tmp_path / "t") != before


# --- tables of several runs, and of runs that ended -------------------------------------------------------------------


def add(table, policy, kl=0.5):
    table.add(dict(policy=policy, skip=None), dict(kl=kl), dict(kl=[kl]))


def test_two_runs_fill_one_table(tmp_path):
    """Each sees the other's rows, one header stands above all, and no row is there twice."""
    one, two = (Table(tmp_path / "t.csv", dict(task="x")) for _ in range(2))
    for each, policy in (one, "dense"), (two, "dense"), (two, "a"), (one, "b"), (two, "b"), (one, "c"):
        add(each, policy)
    assert [row["policy"] for row in table.read(tmp_path / "t.csv")] == ["dense", "a", "b", "c"]
    assert (tmp_path / "t.csv").read_text().count("policy,skip") == 1
    assert [record["policy"] for record in read_records(one.items)] == ["dense", "a", "b", "c"]
    two.settings = dict(task="y")
    with pytest.raises(ValueError, match=r"t.csv: made with other settings \(task\)"):
        add(two, "d")


def test_a_table_waits_while_another_run_adds_its_row(tmp_path):
    pytest.importorskip("fcntl", reason="Windows has no flock")
    code = "import sys, table\nwith table.alone(sys.argv[1]):\n    print('alone', flush=True)\n    sys.stdin.read()"
    path = os.pathsep.join([str(common.HERE), str(common.HERE / "experiments")])
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | dict(PYTHONPATH=path))
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "alone\n"
        entered = threading.Event()

        def enter():
            with table.alone(tmp_path):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
        other.stdin.close()
        assert entered.wait(60)
        thread.join()


def test_a_run_that_ended_between_the_items_and_their_row_leaves_nothing(tmp_path, monkeypatch):
    one = Table(tmp_path / "t.csv", dict(task="x"))
    add(one, "a")
    before = one.path.read_text()
    monkeypatch.setattr(common, "write_whole", functools.partial(fail_at, 2, KeyboardInterrupt, [0], write_whole))
    with pytest.raises(KeyboardInterrupt):
        add(one, "dense")
    monkeypatch.undo()
    assert one.path.read_text() == before and len(read_records(one.items)) == 2
    again = Table(tmp_path / "t.csv", dict(task="x"))
    assert again.dense_scores() == {}
    add(again, "dense")
    assert [record["policy"] for record in read_records(one.items)] == ["a", "dense"]


def fail_at(n, error, calls, function, *args):
    """function(*args), but in the n-th call an error; calls is a list of the number of calls."""
    calls[0] += 1
    if calls[0] == n:
        raise error
    return function(*args)


def test_a_start_changes_no_file(tmp_path):
    """Not even a table that is cut within a row; within a character, too."""
    one = Table(tmp_path / "t.csv", dict(task="x"))
    add(one, "a")
    add(one, "\u00e9")
    data = one.path.read_bytes()
    for end in len(data) - 1, data.rindex("\u00e9".encode()) + 1:
        one.path.write_bytes(data[:end])
        again = Table(tmp_path / "t.csv", dict(task="x"))
        assert [row["policy"] for row in again.rows] == ["a"] and one.path.read_bytes() == data[:end]
    add(again, "\u00e9")
    assert one.path.read_bytes() == data


def test_an_answer_is_there_or_not(tmp_path, monkeypatch):
    file, records = tmp_path / "a.jsonl", []
    add_record(file, records, dict(i=1))
    file.write_text(file.read_text() + '{"i": ')  # a run was killed there
    assert read_records(file) == [dict(i=1)] and file.read_text() == '{"i": 1}\n'

    def full(value):
        with open(file, "a") as other:
            other.write('{"i')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, "to_json", full)
    with pytest.raises(ValueError, match="a.jsonl: cannot be written: No space left on device"):
        add_record(file, records, dict(i=2))
    assert file.read_text() == '{"i": 1}\n'
    file.write_text('{"i": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="a.jsonl:2: not a line of JSON"):
        read_records(file)


# --- files that are written whole -------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file, umask = tmp_path / "f.txt", os.umask(0o027)
    try:
        write_whole(file, "old\r\n")
        assert file.read_bytes() == b"old\r\n" and stat.S_IMODE(file.stat().st_mode) == 0o640
        tensors = dict(a=torch.ones(2))
        write_whole(tmp_path / "f.safetensors", lambda path: save_file(tensors, path))
        assert stat.S_IMODE((tmp_path / "f.safetensors").stat().st_mode) == 0o640  # not for its owner alone
    finally:
        os.umask(umask)
    for error, raised in (OSError(28, "No space left on device"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt):

        def fail(path, error=error):
            Path(path).write_text("ne")
            raise error

        with pytest.raises(raised) as caught:
            write_whole(file, fail)
        assert file.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 2
        assert raised is KeyboardInterrupt or str(caught.value) == f"{file}: cannot be written: No space left on device"
    (tmp_path / "link").symlink_to(file)
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and file.read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "any")
    assert os.read(reader, 9) == b"any" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


FOLDER = GOLDEN / "hf-gqa"
TEXT = ["--text", GOLDEN / "text.txt", "--skip", "0.3", "--warm-up-index", "2", "--max-tokens", "256"]
SKIP = ["--cold-s", 0, "--cold-e", 2, "--sim-threshold", 0.7, "--max-new-tokens", 4, "a b c"]
WRITERS = {  # what a program writes -> the program and its arguments, without the name of the file
    "skip.json": (calibrate.main, [*TEXT, "--out"]),
    "cosines.csv": (calibrate.main, [*TEXT, "--out", "OUR/settings.json", "--save-cosines"]),
    "trace.csv": (generate.main, [*SKIP, "--trace"]),
    "trace.html": (generate.main, [*SKIP, "--trace"]),
    "out/params.json": (load_weights.main, [FOLDER, "--out"]),
    "rows.csv": (evaluate.main, ["perplexity", "--data", GOLDEN / "text.txt", "--window", 32, "--warm-up-index", 5,
                                 "--policies", "dense", "--limit", 64, "--output"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_that_names_the_file_and_destroys_nothing(name, tmp_path, monkeypatch, capsys):
    main, args = WRITERS[name]
    args, file = [str(arg).replace("OUR", str(tmp_path)) for arg in args], tmp_path / name
    if file.parent != tmp_path:
        target = file.parent
    else:
        target = file
        if name != "rows.csv":
            file.write_text("precious")
    if main is not load_weights.main:
        args = ["--ckpt", FOLDER, *args]
        args = args[2:3] + args[:2] + args[3:] if main is evaluate.main else args
    replace = os.replace

    def full(source, place):
        if Path(place) == file:
            raise OSError(28, "No space left on device", place)
        replace(source, place)

    monkeypatch.setattr(os, "replace", full)
    said = mistake(capsys, main, *args, target)
    assert said == f"error: {file}: cannot be written: No space left on device"
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".part"]
    assert file.read_text() == "precious" if target == file and name != "rows.csv" else not file.exists()


def test_of_a_checkpoint_the_weights_are_written_last(tmp_path, monkeypatch):
    """So that a folder with weights is complete, and a run after one that was killed does its work."""
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(Path(b).name), replace(a, b)))
    load_weights.main([str(FOLDER), "--out", str(tmp_path / "out")])
    assert names[-1] == "model.safetensors" and len(set(names)) == len(names) > 4
    assert fingerprint(load_weights.load_model(tmp_path / "out")) == fingerprint(load_weights.load_model(FOLDER))


def test_a_fit_is_saved_before_it_is_measured(tmp_path, monkeypatch, capsys):
    model = tiny_model(vocab_size=128, max_seq_len=256)
    fitted = random_fit(model)
    windows = [(list(range(60)), 0)] * 12
    monkeypatch.setattr(common, "find_checkpoint", lambda ckpt: tmp_path / "tiny.gguf")
    monkeypatch.setattr(fit_standins, "load", lambda *_: (None, model))
    monkeypatch.setattr(fit_standins, "gather", lambda *_: (windows, windows, windows))
    monkeypatch.setattr(fit_standins, "fit_twice", lambda *_: fitted)

    def damaged(*args):
        raise ValueError("the weights are damaged")

    monkeypatch.setattr(fit_standins, "quality", damaged)
    args = ["--text", "x", "--rank", "3", "--maps", "4", "--out", tmp_path / "f.safetensors"]
    assert "the weights are damaged" in mistake(capsys, fit_standins.main, *args)
    assert standins.make(model, 0.1, fitted=tmp_path / "f.safetensors").most == 1


@pytest.mark.parametrize("place", ["folder", "file"])
def test_what_may_not_be_written_is_known_before_the_work(place, tmp_path, monkeypatch):
    """A folder in which no file can be made beside it, and a file that its owner has protected."""
    file = tmp_path / "f.json"
    file.write_text("precious")
    protected = file if place == "file" else tmp_path
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != protected)
    with pytest.raises(ValueError, match="f.json: cannot be written: no permission"):
        common.check_outputs(file)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path("/dev"))
    common.check_outputs("/dev/null", file)
