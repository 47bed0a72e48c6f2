"""What the README and its fellows say of the code, its commands and its figures is so; the fork guide works."""

import csv
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_golden import GOLDEN

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import plot

PAGES = "README.md", "docs/walkthrough.md", "experiments/README.md"
README = (ROOT / "README.md").read_text()
PROGRAMS = "generate.py", "calibrate.py", "load_weights.py"
PYTHON = {*PROGRAMS, "experiments/evaluate.py", "experiments/bench.py", "experiments/plot.py",
          "experiments/standins.py", "experiments/judge.py", "experiments/lm_eval_model.py"}


def commands(page):
    """Every command that begins with `python`, in a block or in the text, as lists of words."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    found = re.findall(r"^(?:\$ )?(python .*?)(?:  +#.*)?$", text, re.MULTILINE)
    found += re.findall(r"`(python [^`\n]+)`", text)
    return [shlex.split(command)[1:] for command in found]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_the_program_takes(page):
    assert len(commands(page)) > 3
    for script, *words in commands(page):
        if script == "gen_judgment.py":
            continue  # FastChat's
        assert script in PYTHON
        importlib.import_module(Path(script).stem).parse_args(words)  # exits where it does not understand


def test_the_commands_of_the_tables_are_ones_that_evaluate_takes():
    import evaluate

    table = (ROOT / "experiments" / "README.md").read_text()
    found = re.findall(r"`((?:%s) --[^`]*)`" % "|".join(evaluate.TASKS), table)
    assert len(found) > 6
    for command in found:
        evaluate.parse_args(shlex.split(command))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_links_to_is_there(page):
    text, here = (ROOT / page).read_text(), (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (here / link).exists(), link
    for name in re.findall(r"`((?:experiments/|tests/|config/|docs/)?\w+\.py)`", text):
        assert (ROOT / name).exists() or (here / name).exists() or name == "mine.py", name


def test_the_makefile_has_the_targets_it_names():
    rules = (ROOT / "Makefile").read_text()
    named = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert len(named) > 1 and all(f"\n{target}:" in rules for target in named)


def test_every_file_at_the_top_is_explained():
    table = "".join(re.findall(r"^\| `\w+\.py`.*\|$", README, re.MULTILINE))
    assert {file.name for file in ROOT.glob("*.py")} == set(re.findall(r"`(\w+\.py)`", table))


def test_the_table_of_settings_is_that_of_config():
    rows = re.findall(r"^\| `config/([\w.-]+\.json)` \| (.*) \| (.*) \| (.*) \| (.*) \|$", README, re.MULTILINE)
    assert {name for name, *_ in rows} == {file.name for file in (ROOT / "config").glob("*.json")}
    for name, cold, k, skip, measured in rows:
        settings = json.loads((ROOT / "config" / name).read_text())
        assert cold == f"[0, {settings['cold_s']}), [{settings['cold_e']}, {settings['n_layers']})"
        assert k == str(settings["k"])
        ratio = settings["achieved_skip"] or settings["predicted_skip"]
        assert skip == f"{ratio:.1%}".replace("%", " %")
        assert measured == ("measured" if settings["achieved_skip"] else "planned")


def tables(text):
    """{command that printed it: the lines of the table after it}"""
    found = re.findall(r"`python (experiments/plot\.py experiments/results/[^`]+)`[^|]*\n\n((?:\|.*\n)+)", text)
    return {command: lines.splitlines() for command, lines in found}


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md", "docs/standins.md"])
def test_the_figures_are_those_of_the_results(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = tables((ROOT / page).read_text())
    assert found
    for command, lines in found.items():
        plot.main(command.split()[1:])
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line not in printed] == [], command


def test_the_fork_guide_works_as_it_stands(tmp_path):
    """Its file, and its two commands to the letter, but for the checkpoint, which has no settings of its own."""
    guide = README.split("## Write your own policy")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    commands = re.findall(r"^python .*$", guide, re.MULTILINE)
    (tmp_path / "mine.py").write_text(code)
    assert len(commands) == 2 and len(code.splitlines()) <= 15
    more = ["--ckpt", str(GOLDEN / "hf-gqa"), "--device", "cpu"]
    flags = ["--cold-s", "0", "--cold-e", "2", "--sim-threshold", "0.5", "--warm-up-index", "2"]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    outs = []
    for command, extra in zip(commands, [[], ["--output", str(tmp_path / "out.csv"), *flags]]):
        script, *words = shlex.split(command)[1:]
        words = [sys.executable, ROOT / script, *words, *more, *extra]
        out = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert out.returncode == 0, out.stderr
        outs.append(out)
    assert "mine.py:make" in outs[0].stderr
    rows = list(csv.DictReader(line for line in (tmp_path / "out.csv").read_text().splitlines() if line[0] != "#"))
    assert {row["policy"].split("@")[0] for row in rows} >= {"mine.py:make"}
    assert abs(float(next(row for row in rows if "mine" in row["policy"])["ffn_skip_ratio"]) - 0.25) < 0.1
