"""
What evaluate.py fills over as many runs as it takes: a CSV row by row, and files of JSON lines. NAME.items.jsonl beside
NAME.csv keeps the scores of each item (question, window, text) that a row is the mean of.
"""

import csv
import io
import json
import math
import platform
import sys
from pathlib import Path

import torch

from support import common
from support.measuring import mean_interval

FEWEST = 5  # items that get an interval: a bootstrap of fewer says nothing


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
        self.items = self.path.with_suffix(".items.jsonl")
        if not text:
            self.append(head)
            self.items.write_text("", encoding="utf-8")
        self.scores = read_records(self.items)
        lines = [line for line in text.split("\n") if line and not line.startswith("#")]
        if lines:
            reader = csv.DictReader(lines)
            self.rows, self.columns = list(reader), reader.fieldnames

    def append(self, text):
        with open(self.path, "a", encoding="utf-8") as file:  # in one write, so that a row is there or not
            file.write(text)

    def find(self, key):
        """The row, a dict of text, that begins with this key, or None."""
        key = {name: cell(value) for name, value in key.items()}
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def dense_scores(self):
        """{column: [the score of each item]} of the dense model; {} if it has no row."""
        found = [record["scores"] for record in self.scores if record["policy"] == "dense"]
        return found[-1] if found else {}

    def add(self, key, row, scores):
        """Append a row, which begins with its key, and the scores of its items."""
        add_record(self.items, self.scores, key | dict(scores=scores))
        row, out = key | row, io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        if self.columns is None:
            self.columns = list(row)
            writer.writerow(self.columns)
        self.rows.append({name: cell(value) for name, value in row.items()})
        writer.writerow([self.rows[-1].get(name, "") for name in self.columns])
        self.append(out.getvalue())

    def __str__(self):
        """For people: an interval stands in the cell of its mean."""
        ends = "_low", "_high"
        names = [name for name in self.columns or [] if name not in ("setting", "example") and not name.endswith(ends)]
        lines = [names]
        for row in self.rows:
            line = []
            for name in names:
                low, high = (row.get(name + end) for end in ends)
                line.append((row.get(name) or "-") + (f" [{low}, {high}]" if low else ""))
            lines.append(line)
        return "\n".join(common.table(lines))


def read_records(path):
    """The records in a file, one JSON object per line, of an earlier run that was cut off, perhaps within a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return [json.loads(line) for line in lines]


def add_record(path, records, record):
    """Append a record to the list and to its file."""
    records.append(record)
    with open(path, "a", encoding="utf-8") as file:
        file.write(common.to_json(record) + "\n")


def cell(value):
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value).replace("\n", "\\n")


def columns(name, values):
    """
    The columns of a list of scores, one per item (question, window, text): NAME is the mean, NAME_low and NAME_high are
    the ends of its 95 % interval by bootstrap over the items. The scores of a perplexity are mean log-likelihoods.
    """
    ends = mean_interval(values) if values else (None, None, None)
    if len(values) < FEWEST:
        ends = ends[0], None, None
    if name.startswith("perplexity"):
        ends = [end and math.exp(end) for end in ends]
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends))


def versions():
    import numpy

    packages = f"python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}"
    return f"{packages}, {torch.get_num_threads()} threads on {platform.machine()}"
