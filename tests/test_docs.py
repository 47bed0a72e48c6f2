"""What README.md and its fellows say of the code, its commands and its figures is so; the fork guide works."""

import csv
import functools
import importlib
import json
import re
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy
import pytest
import torch
from test_golden import GOLDEN
from tiny import in_repository

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT / "experiments"))

import evaluate
import plot

import generate
from policies import teal
from skip import FFNSkip
from support.measuring import cold_regions, decisions, paired_interval, plan, saved_in_batches, variance_shares

README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "experiments/README.md"]
for file in sorted((ROOT / "docs").glob("*.md")):
    PAGES.append(f"docs/{file.name}")
PROGRAMS = "generate.py", "calibrate.py", "load_weights.py"
PYTHON = {*PROGRAMS, "experiments/evaluate.py", "experiments/bench.py", "experiments/plot.py",
          "experiments/fit_standins.py", "experiments/judge.py", "experiments/lm_eval_model.py",
          "experiments/explore.py", "experiments/fit_teal.py"}
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


MADE = {"mine.py:make", "mine.py", "trace.csv", "trace.html", "standins-64.safetensors"}  # by the reader, or before


@pytest.mark.parametrize("page", PAGES)
def test_every_file_in_a_command_is_here_or_in_the_page_of_the_data(page):
    """So that a command starts in a fresh clone with the data that docs/data.md names; the rest is written by it."""
    words = [word for command in commands(page) for part in command for word in part.split(",")]
    if page == "docs/results.md":
        words += re.findall(r"--data (\S+)", read(page))
    named = [Path(path).name for path in re.findall(r"[\w/*.-]+\.\w+", read("docs/data.md"))]
    for word in words:
        top = word.split("/")[0]
        if not re.search(r"\.(py|csv|jsonl?|txt|raw|html|safetensors)(:\w+)?$", word) or word in MADE or top == "out":
            continue
        if top not in OF_A_USER and (ROOT / word).exists() or word == "gen_judgment.py":
            continue
        names = Path(word).name, Path(word).with_suffix(".json").name  # "x.json or .txt"
        assert any(fnmatch(name, pattern) for name in names for pattern in named), (page, word)


def test_the_commands_are_found():
    counts = {page: len(commands(page)) for page in PAGES}
    assert counts["README.md"] > 6 and counts["docs/walkthrough.md"] > 7 and counts["docs/results.md"] > 15
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
    files = {file.name for file in in_repository(ROOT.glob("*.py"))}
    assert files == set(re.findall(r"^\| \[(\w+\.py)\]", README, re.MULTILINE))
    for folder in in_repository(ROOT.iterdir()):
        if folder.is_dir() and not folder.name.startswith((".", "__")) and folder.name not in OF_A_USER:
            assert f"`{folder.name}/`" in README, f"README.md does not explain {folder.name}/"


def test_every_program_in_experiments_is_explained():
    table = "".join(re.findall(r"^\| `.*\|$", read("experiments/README.md"), re.MULTILINE))
    programs = in_repository((ROOT / "experiments").glob("*.py"))
    assert {file.name for file in programs} == set(re.findall(r"`(\w+\.py)`", table))


@pytest.mark.parametrize("page", PAGES)
def test_a_percent_sign_follows_its_number(page):
    assert re.findall(r".*\d %.*", read(page)) == []


def test_the_table_of_settings_is_that_of_config():
    pattern = r"^\| `config/([\w.-]+\.json)` \| (.*) \| (.*) \| (.*) \| (.*) \|$"
    rows = re.findall(pattern, read("docs/checkpoints.md"), re.MULTILINE)
    files = {file.name for file in in_repository((ROOT / "config").glob("*.json"))}
    assert {name for name, *_ in rows} == {name for name in files if not name.endswith(".teal.json")}
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
    section = read("docs/results.md").split("## Warm-up")[1].split("\n## ")[0]
    header, _, *rows = [cells(line) for line in section.splitlines() if line.startswith("|")]
    items = {}  # {(ratio, warm-up): the log-perplexity of each window}
    for line in (RESULTS / "items" / "warmup.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["policy"] == "ffnskip":
            items[record["skip"], record["warm_up_index"]] = record["scores"]["perplexity_past_warm_up"]
    for (label, *found), skip in zip(rows[:2], (0.15, 0.25)):
        assert label == f"at {skip:.0%}"
        for warm_up, cell in zip(header[1:], found):
            numbers = paired_interval(items[skip, int(warm_up)], items[skip, 60])
            assert cell == "{:.3f} [{:.3f}, {:.3f}]".format(*numbers)
    for (_, *found), file in zip(rows[2:], ["warmup.csv", "warmup_no_prompt.csv"], strict=True):
        perplexities = {}
        for row in results(file):
            if row["policy"] == "ffnskip" and row["skip"] == "0.15":
                perplexities[row["warm_up_index"]] = f"{float(row['perplexity_past_warm_up']):.1f}"
        assert found == [perplexities.get(index, "-") for index in header[1:]]


def test_what_llama_2_would_save_in_batches_is_what_its_recorded_cosines_say():
    """Also how much of their variance is the layers' and the tokens', and how many tokens never reach 0.9."""
    recorded, page, seen = numpy.load(GOLDEN / "cosines.npz"), read("docs/results.md"), 0
    for name in recorded:
        cosines = torch.tensor(recorded[name] / 1000, dtype=torch.float32)
        cold_s, cold_e = cold_regions(cosines.mean(0))
        warm = cosines[:, cold_s:cold_e]
        by_layer, by_token = variance_shares(warm)
        never = (warm.amax(1) < 0.9).sum().item()
        assert f"| {name} | {len(cosines):,} | {by_layer:.0%} | {by_token:.0%} | {never} |" in page
        for label, k in ("as printed", None), ("k=1", 1):
            policy, _ = plan(cosines, functools.partial(FFNSkip, cold_s, cold_e, k=k), 0.25)
            shares = saved_in_batches(decisions(cosines, policy), [1, 2, 4, 8, 16])
            assert f"| {name} | {label} | " + " | ".join(f"{share:.1%}" for share in shares) + " |" in page
            if name == "llama-2-7b.c4":
                said = f"| {label}: no row needs | " + " | ".join(f"{share:.1%}" for share in shares) + " |"
                assert said in read("docs/when-it-pays.md")
        seen += len(cosines)
    assert seen == 2800 and "none of the 2,800 tokens" in page


SHAPES = {  # dim, layers, heads, heads of keys and values, width of the feed-forward block, vocabulary
    "SmolLM2-135M": (576, 30, 9, 3, 1536, 49152),
    "LLaMA-2-7B": (4096, 32, 32, 32, 11008, 32000),
    "LLaMA-2-13B": (5120, 40, 40, 40, 13824, 32000),
    "LLaMA-2-70B": (8192, 80, 64, 8, 28672, 32000),
}


def bound(model, skipped, columns, rows=1, bits=16.0):
    """(1) of docs/when-it-pays.md, in numbers of 16 bits."""
    dim, n_layers, heads, kv_heads, hidden, vocab = SHAPES[model]
    head_dim = dim // heads
    attention = 2 * dim * heads * head_dim + 2 * dim * kv_heads * head_dim
    cache = rows * columns * 2 * n_layers * kv_heads * head_dim
    always = (n_layers * attention + vocab * dim) * bits / 16 + cache
    blocks = n_layers * 3 * dim * hidden * bits / 16
    return (always + blocks) / (always + blocks * (1 - skipped))


def test_the_bounds_of_when_it_pays_are_those_of_the_bytes():
    page = read("docs/when-it-pays.md")
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) bits \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 2 * len(SHAPES)
    for model, bits, found in rows:
        assert cells(found) == [f"{bound(model, 0.25, n, bits=float(bits)):.2f}" for n in (0, 512, 2048, 4096)]
    in_batches = re.findall(r"^\| [^|]*rows?[^|]* \| (.*%) \|\n\| bound \| (.*) \|$", page, re.MULTILINE)
    assert len(in_batches) == 3
    for shares, found in in_batches:
        skipped = [float(share.strip().removesuffix("%")) / 100 for share in shares.split("|")]
        bounds = [bound("LLaMA-2-7B", share, 512, rows) for share, rows in zip(skipped, (1, 2, 4, 8, 16))]
        assert cells(found) == [f"{value:.2f}" for value in bounds]


def draft_speedup(accepted, cost, n):
    """(2) of docs/when-it-pays.md."""
    return (1 - accepted ** (n + 1)) / ((1 - accepted) * (n * cost + 1))


def test_no_policy_pays_as_a_draft_beyond_what_the_page_says():
    best = {True: 0.0, False: 0.0}  # of those that skip blocks, and of the others
    for row in results("perplexity.csv"):
        if row["policy"] != "dense":
            blocks, cost = row["policy"] not in teal.POLICIES, 1 - float(row["bytes_saved"])
            for n in range(1, 9):
                best[blocks] = max(best[blocks], draft_speedup(float(row["top1_agreement"]), cost, n))
    page = " ".join(read("docs/when-it-pays.md").split())
    assert f"the best of (2) is {max(best.values()):.2f}" in page
    assert f"of policies that skip blocks it is {best[True]:.2f}" in page and best[True] < 1.02
    assert f"{max(draft_speedup(0.9, 0.5, n) for n in range(1, 9)):.2f} at best" in page


def test_what_to_expect_is_what_was_measured():
    """The one table of README.md: perplexities to three digits, and speed-ups of one run with their bounds."""
    section = README.split("## What to expect")[1]
    header, _, *rows = [cells(line) for line in section.splitlines() if line.startswith("|")]
    wanted = [f"{float(skip.removesuffix('%')) / 100:g}" for skip in header[1:]]
    perplexities, speeds = results("perplexity_32k.csv"), results("bench.csv")
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
            if not cell:
                continue  # not measured
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


FIGURES = ("docs/results.md", 20), ("docs/speed.md", 8), ("docs/standins.md", 10), ("docs/teal.md", 5)


@pytest.mark.parametrize("page, least", FIGURES)
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


def test_the_python_of_the_readme_prints_cosines_and_a_text(demo, capsys):
    """As it stands, with the demo model: (token, layer) cosines, and 60 tokens that the policy writes."""
    (code,) = re.findall(r"```python\n(.*?)```", README.split("## Your own checkpoint")[0], re.DOTALL)
    assert len(code.splitlines()) <= 12
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("tensor([[") and len(names["ids"]) > 5
    cosines = names["measure"](names["model"], [(names["ids"], 0)], -1)
    assert cosines.shape == (len(names["ids"]), 30) and str(cosines) in printed
    assert printed.split("])")[-1].count(" ") > 20  # words


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
