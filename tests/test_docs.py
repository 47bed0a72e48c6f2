"""What README.md and its fellows say of the code, its commands and its figures is so; the fork guide works."""

import csv
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from test_golden import GOLDEN

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT / "experiments"))

import evaluate
import plot

import generate

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "experiments/README.md"]
for file in sorted((ROOT / "docs").glob("*.md")):
    PAGES.append(f"docs/{file.name}")
PROGRAMS = "generate.py", "calibrate.py", "load_weights.py"
PYTHON = {*PROGRAMS, "experiments/evaluate.py", "experiments/bench.py", "experiments/plot.py",
          "experiments/fit_standins.py", "experiments/judge.py", "experiments/lm_eval_model.py",
          "experiments/explore.py"}
OF_A_USER = {"checkpoints", "data", "out"}  # folders that are no part of the repository


def read(page):
    return (ROOT / page).read_text()


def commands(page):
    """Every command that begins with `python` or `torchrun`, in a block or in the text, as lists of words."""
    text = read(page).replace("\\\n", " ")
    start = r"(?:python|torchrun --nproc-per-node \d+)"
    found = re.findall(rf"^(?:\$ )?{start} (.*?)(?:  +#.*)?$", text, re.MULTILINE)
    found += re.findall(rf"`{start} ([^`\n]+)`", text)
    return [shlex.split(command) for command in found]


def cells(line):
    """The cells of a row of a Markdown table."""
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def table_rows(text):
    """The lines of all tables in a page, without their headers and the rulers below them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rulers = [line for line in lines if re.fullmatch(r"[|\s-]+", line)]
    return len(lines) - 2 * len(rulers)


def results(name):
    """The rows of a CSV in experiments/results, as dicts of texts."""
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_the_program_takes(page):
    for script, *words in commands(page):
        if script == "gen_judgment.py":
            continue  # FastChat's
        assert script in PYTHON
        importlib.import_module(Path(script).stem).parse_args(words)  # exits where it does not understand


def test_the_commands_are_found():
    counts = {page: len(commands(page)) for page in PAGES}
    assert counts["README.md"] > 7 and counts["docs/walkthrough.md"] > 7 and counts["docs/results.md"] > 15
    assert counts["experiments/README.md"] > 3 and counts["docs/checkpoints.md"] > 2


def test_the_commands_of_the_tables_are_ones_that_evaluate_takes():
    import evaluate

    found = re.findall(r"`((?:%s) --[^`]*)`" % "|".join(evaluate.TASKS), read("docs/results.md"))
    assert len(found) > 6
    for command in found:
        evaluate.parse_args(shlex.split(command))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_heading_it_links_to_is_there(page):
    text, here = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), (ROOT / page).parent
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = here / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        assert (ROOT / name).exists() or (here / name).exists() or name == "mine.py", name


def test_the_makefile_has_the_targets_it_names():
    rules = read("Makefile")
    named = []
    for page in PAGES:
        named += re.findall(r"^make (\w+)", read(page), re.MULTILINE) + re.findall(r"`make (\w+)", read(page))
    assert {"demo", "test", "eval"} <= set(named)
    for target in named:
        assert f"\n{target}:" in rules, target


def test_the_readme_is_two_screens():
    lines, rows = len(README.splitlines()), table_rows(README)
    assert lines <= 130, f"README.md has {lines} lines"
    assert rows <= 20, f"the tables of README.md have {rows} rows"


def test_the_guide_to_the_experiments_is_one_screen():
    assert len(read("experiments/README.md").splitlines()) <= 45


def test_the_five_files_are_as_long_as_the_readme_says():
    said = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.MULTILINE)
    found = [(name, str(len(read(name).splitlines()))) for name, _ in said]
    assert [name for name, _ in said] == ["model.py", "skip.py", *PROGRAMS]
    assert said == found, f"the lines are {', '.join(f'{name} {lines}' for name, lines in found)}"


def test_every_file_and_folder_at_the_top_is_explained():
    files = {file.name for file in ROOT.glob("*.py")}
    assert files == set(re.findall(r"^\| \[(\w+\.py)\]", README, re.MULTILINE))
    for folder in ROOT.iterdir():
        if folder.is_dir() and not folder.name.startswith((".", "__")) and folder.name not in OF_A_USER:
            assert f"`{folder.name}/`" in README, f"README.md does not explain {folder.name}/"


def test_every_program_in_experiments_is_explained():
    table = "".join(re.findall(r"^\| `.*\|$", read("experiments/README.md"), re.MULTILINE))
    assert {file.name for file in (ROOT / "experiments").glob("*.py")} == set(re.findall(r"`(\w+\.py)`", table))


@pytest.mark.parametrize("page", PAGES)
def test_a_percent_sign_follows_its_number(page):
    assert re.findall(r".*\d %.*", read(page)) == []


def test_the_table_of_settings_is_that_of_config():
    pattern = r"^\| `config/([\w.-]+\.json)` \| (.*) \| (.*) \| (.*) \| (.*) \|$"
    rows = re.findall(pattern, read("docs/checkpoints.md"), re.MULTILINE)
    assert {name for name, *_ in rows} == {file.name for file in (ROOT / "config").glob("*.json")}
    for name, cold, k, skip, measured in rows:
        settings = json.loads(read(f"config/{name}"))
        assert cold == f"[0, {settings['cold_s']}), [{settings['cold_e']}, {settings['n_layers']})"
        assert k == str(settings["k"])
        assert skip == f"{settings['achieved_skip'] or settings['predicted_skip']:.1%}"
        assert measured == ("measured" if settings["achieved_skip"] else "planned")


def test_what_calibrate_compared_is_what_the_settings_keep():
    settings = json.loads(read("config/smollm2-135m-instruct.json"))
    expected = {f"{settings['chosen']} (chosen)": settings["quality"]} | settings["over"]
    section = read("docs/results.md").split("## Settings that calibrate.py compares")[1].split("\n## ")[0]
    rows = [cells(line) for line in section.splitlines() if line.startswith("|")][2:]
    assert {name for name, *_ in rows} == set(expected)
    for name, skipped, perplexity, kl, top1 in rows:
        found = expected[name]
        assert (skipped, top1) == (f"{found['ffn_skip_ratio']:.1%}", f"{found['top1']:.1%}")
        assert (perplexity, kl) == (f"{found['perplexity']:.1f}", f"{found['kl']:.3f}")


def test_the_table_of_warm_ups_is_that_of_the_results():
    lines = re.findall(r"^\| (warm_up_index|after a prompt|without a prompt) \| (.*)$", read("docs/results.md"), re.M)
    (_, header), *rows = lines
    for (_, line), file in zip(rows, ["warmup.csv", "warmup_no_prompt.csv"], strict=True):
        found = {}
        for row in results(file):
            if row["policy"] == "ffnskip" and row["skip"] == "0.15":
                numbers = [float(row[f"perplexity_past_warm_up{end}"]) for end in ("", "_low", "_high")]
                found[row["warm_up_index"]] = "{:.1f} [{:.1f}, {:.1f}]".format(*numbers)
        assert dict(zip(cells(header), cells(line))) == {index: found.get(index, "-") for index in cells(header)}


def test_what_to_expect_is_what_was_measured():
    """The one table of README.md: perplexities to three digits, and speed-ups of one run with their bounds."""
    section = README.split("## What to expect")[1]
    header, _, *rows = [cells(line) for line in section.splitlines() if line.startswith("|")]
    wanted = [f"{float(skip.removesuffix('%')) / 100:g}" for skip in header[1:]]
    perplexities, speeds = results("perplexity.csv"), results("bench.csv")
    seen = set()
    for label, *found in rows:
        policy = re.search(r"`(\w+)`", label)[1]
        if "LLaMA" in label or "H200" in label:
            device = "NVIDIA H200" if "H200" in label else "AMD EPYC"
            runs = {}  # {(command, how fast memory was): {wanted ratio: speed-up (bound)}}
            for row in speeds:
                if (row["device"], row["variant"], row["model"]) == (device, policy, "7B with 32 layers, random"):
                    run = runs.setdefault((row["command"], row["read_gb_per_s"]), {})
                    speed = f"{float(row['speedup']):.2f} ({float(row['speedup_bound']):.2f})"
                    run[f"{round(float(row['ffn_skip_ratio']), 2):g}"] = speed
            said = {skip: cell for skip, cell in zip(wanted, found) if cell}
            assert said and any(said.items() <= run.items() for run in runs.values()), (label, runs)
            seen.add(device)
            continue
        for skip, cell in zip(wanted, found):
            same = [row for row in perplexities if (row["policy"], row["skip"], row["match"]) == (policy, skip, "ffn")]
            mean = sum(float(row["perplexity"]) for row in same) / len(same)
            assert cell == (f"{mean:.3g}" if mean < 1000 else f"{mean:.0f}"), (policy, skip)
        seen.add(policy)
    (dense,) = [row for row in perplexities if row["policy"] == "dense"]
    assert f"dense: {float(dense['perplexity']):.3g}" in section
    assert {"ffnskip", "printed", "random", "AMD EPYC", "NVIDIA H200"} <= seen


def printed_tables(text):
    """Tables with the command that a page says has printed them: (command, line above the table, its lines)."""
    found, command, above, lines = [], None, "", []
    for line in [*text.splitlines(), ""]:
        named = re.findall(r"`python experiments/plot\.py (experiments/results/[^`]+)`", line)
        if named:
            command = named[-1]
        if line.startswith("|"):
            lines.append(line)
            continue
        if lines and command:
            found.append((command, above, lines))
            command = None
        lines = []
        above = line or above
    return found


def as_dicts(lines):
    """The rows of a table, each as {header: cell} of what is not empty."""
    header, _, *rows = [cells(line) for line in lines]
    found = []
    for row in rows:
        found.append({name: cell for name, cell in zip(header, row) if cell not in ("", "-")})
    return found


@pytest.mark.parametrize("page, least", [("docs/results.md", 14), ("docs/speed.md", 8), ("docs/standins.md", 10)])
def test_the_figures_are_those_of_the_results(page, least, capsys, monkeypatch):
    """A page may leave out rows, and columns that are empty in those it shows."""
    monkeypatch.chdir(ROOT)
    found = printed_tables(read(page))
    assert len(found) >= least
    for command, above, lines in found:
        plot.main(command.split())
        parts = capsys.readouterr().out.split("\n\n")
        tables = [part.strip().splitlines() for part in parts]
        if lines[0].startswith("| variant"):  # bench.py's: the caption is printed before each table
            assert above in parts, (command, above)
            tables = [table for caption, table in zip(parts, tables[1:]) if caption == above]
        printed = [as_dicts(table) for table in tables if table[0].startswith("|")]
        assert any(all(row in rows for row in as_dicts(lines)) for rows in printed), (command, above)


def test_the_fork_guide_works_as_it_stands(tmp_path, monkeypatch, capsys):
    """Its file, and its two commands to the letter, but for the checkpoint, which has no settings of its own."""
    guide = README.split("## Write your own policy")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    commands = re.findall(r"^python .*$", guide, re.MULTILINE)
    (tmp_path / "mine.py").write_text(code)
    assert len(commands) == 2 and len(code.splitlines()) <= 15
    more = ["--ckpt", str(GOLDEN / "hf-gqa"), "--device", "cpu"]
    flags = ["--cold-s", "0", "--cold-e", "2", "--sim-threshold", "0.5", "--warm-up-index", "2"]
    monkeypatch.chdir(tmp_path)
    for program, command, extra in zip((generate, evaluate), commands, ([], ["--output", "out.csv", *flags])):
        script, *words = shlex.split(command)[1:]
        assert (ROOT / script).samefile(program.__file__)
        assert not program.main([*words, *more, *extra])
        assert "mine.py:make" in capsys.readouterr().err
    rows = list(csv.DictReader(line for line in (tmp_path / "out.csv").read_text().splitlines() if line[0] != "#"))
    assert {row["policy"].split("@")[0] for row in rows} >= {"mine.py:make"}
    assert abs(float(next(row for row in rows if "mine" in row["policy"])["ffn_skip_ratio"]) - 0.25) < 0.1
