"""A CSV that evaluate.py fills row by row, over as many runs as it takes."""

import csv
import io
import platform
import sys
from pathlib import Path

import torch

import common


class Table:
    """A CSV with the command and the versions in its first lines, which grows row by row and is never started over."""

    def __init__(self, path, settings):
        self.path, self.columns, self.rows = Path(path), None, []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        head = f"# settings: {common.to_json(settings, sort_keys=True)}\n"
        if text and "\n# settings: " not in text:
            raise ValueError(f"{path}: not a table of evaluate.py: give another --output")
        if text and head not in text:
            raise ValueError(f"{path}:3: made with other settings: give another --output, or delete it")
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]  # the last run was cut off within a row
            self.path.write_text(text, encoding="utf-8")
        command = f"# command: {' '.join(['python', *sys.orig_argv[1:]])}\n"
        if command not in text:  # a new table, or one that another command goes on with
            self.append(f"{command}# versions: {versions()}\n")
        if not text:
            self.append(head)
        lines = [line for line in text.split("\n") if line and not line.startswith("#")]
        if lines:
            reader = csv.DictReader(lines)
            self.rows, self.columns = list(reader), reader.fieldnames

    def append(self, text):
        with open(self.path, "a", encoding="utf-8") as file:  # in one write, so that a row is there or not
            file.write(text)

    def has(self, key):
        key = {name: cell(value) for name, value in key.items()}
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, row):
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        if self.columns is None:
            self.columns = list(row)
            writer.writerow(self.columns)
        self.rows.append({name: cell(value) for name, value in row.items()})
        writer.writerow([self.rows[-1].get(name, "") for name in self.columns])
        self.append(out.getvalue())

    def __str__(self):
        names = [name for name in self.columns or [] if name not in ("setting", "example")]
        cells = [[row.get(name) or "-" for name in names] for row in self.rows]
        return "\n".join(common.table([names, *cells]))


def cell(value):
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value).replace("\n", "\\n")


def versions():
    import numpy

    packages = f"python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}"
    return f"{packages}, {torch.get_num_threads()} threads on {platform.machine()}"
