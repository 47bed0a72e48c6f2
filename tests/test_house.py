"""The house: which file imports which, how long each is, and that model.py and skip.py need no other."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import in_repository

ROOT = Path(__file__).parent.parent
FLOORS = [  # what a file may import lies on a floor before its own, or in its own folder
    {"model"},
    {"skip", "fast"},
    {"support"},
    {"load_weights", "policies"},
    {"generate"},
    {"calibrate"},
    {"experiments"},
]
FOLDERS = "fast", "support", "policies", "experiments"
LIMITS = {  # lines
    "model.py": 260,
    "skip.py": 135,
    "generate.py": 250,
    "calibrate.py": 310,
    "load_weights.py": 420,
}
ALL_SOURCES = 9682


def sources():
    files = sorted(ROOT.glob("*.py"))
    for folder in FOLDERS:
        files += sorted((ROOT / folder).glob("*.py"))
    return in_repository(files)


def module(file):
    """support.common of support/common.py, policies of policies/__init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


OURS = {module(file): file for file in sources()}


def imports(file):
    """The names of all modules that a file imports, inside functions too; of ours as in OURS."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [node.module]
            for alias in node.names:  # from fast import parallel
                if f"{node.module}.{alias.name}" in OURS:
                    names.append(f"{node.module}.{alias.name}")
        for name in names:
            beside = f"experiments.{name}"  # the programs there find each other by name
            found.add(beside if file.parent.name == "experiments" and beside in OURS else name)
    return found - {module(file)}


def floor(name):
    for i, places in enumerate(FLOORS):
        if name.split(".")[0] in places:
            return i
    raise AssertionError(f"{name} has no place in the house")


@pytest.mark.parametrize("name", OURS)
def test_imports_go_one_way(name):
    for other in imports(OURS[name]) & set(OURS):
        same_folder = "." in name and name.split(".")[0] == other.split(".")[0]
        within_package = "." not in name and other.startswith(f"{name}.")  # __init__.py and the files of its folder
        assert floor(other) < floor(name) or same_folder or within_package, f"{name} imports {other}"


def test_no_imports_form_a_circle():
    graph = {}
    for name, file in OURS.items():
        others = imports(file) & set(OURS)
        graph[name] = {other for other in others if not name.startswith(f"{other}.")}  # than its own __init__.py
    while graph:
        leaves = [name for name, others in graph.items() if not others & set(graph)]
        assert leaves, f"a circle among {', '.join(sorted(graph))}"
        for name in leaves:
            del graph[name]


def test_model_and_skip_import_torch_and_each_other():
    known = {"torch", *sys.stdlib_module_names}
    for name, ours in ("model", set()), ("skip", {"model"}):
        for other in imports(OURS[name]):
            assert other.split(".")[0] in known | ours, f"{name}.py imports {other}"


def test_only_a_policy_file_is_opened_by_its_path():
    """And experiments/ puts the folder above on sys.path; nothing else changes where imports look."""
    by_path = {}
    for name, file in OURS.items():
        text = file.read_text(encoding="utf-8")
        for word in "spec_from_file_location", "sys.path", "run_path", "exec(", "__import__":
            if word in text:
                by_path.setdefault(word, []).append(name)
    assert by_path.pop("spec_from_file_location") == ["policies"]
    assert all(name.startswith("experiments.") for name in by_path.pop("sys.path"))
    assert not by_path


ALONE = """
import math
import torch
from model import ModelArgs, Transformer
from skip import FFNSkip

torch.manual_seed(0)
model = Transformer(ModelArgs(dim=16, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=31, hidden_dim=24))
tokens = torch.randint(31, (2, 20))
never, often = FFNSkip(0, 4, math.inf, warm_up_index=-1), FFNSkip(0, 4, 0.0, warm_up_index=-1, k=1)
assert torch.equal(model(tokens, policy=never), model(tokens))
assert not torch.equal(model(tokens, policy=often), model(tokens))
print("both ran")
"""


def test_model_and_skip_run_alone(tmp_path):
    for name in "model.py", "skip.py":
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "alone.py").write_text(ALONE)
    command = [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.'); import alone"]  # -I: no PYTHONPATH
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "both ran\n", done.stderr


@pytest.mark.parametrize("name", LIMITS)
def test_a_file_is_as_short_as_its_reader_may_hope(name):
    n_lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert n_lines <= LIMITS[name]


def test_all_sources_together_are_small():
    n_lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in sources())
    assert n_lines <= ALL_SOURCES
