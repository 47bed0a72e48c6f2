"""
Tables as CSV files. evaluate.py fills a Table over as many runs as it takes; plot.py reads its rows, those of bench.py,
and the scores that a judge gave each answer: judge.py's, and those in the logs of the paper's authors.
"""

import contextlib
import csv
import io
import json
import math
import os
import platform
import sys
from operator import itemgetter
from pathlib import Path
from statistics import mean

import numpy
import torch

from support import common
from support.measuring import mean_interval, paired_interval

UNSAID = dict(temperature=0.0, rows=1, margin=None, prompt_skip=None, windows="in a row")  # if not in a table
FEWEST = 5  # items that get an interval: a bootstrap of fewer says nothing
AUTHORS = {"no_prune": "dense", "cosine_False": "ffnskip", "baseline_False": "static"}  # by log, inferred; else random


class Table:
    """
    A CSV that grows row by row and is never started over, of as many runs as add rows to it, also at once. The command,
    the versions and what was not yet said of the settings stand before the rows that they made. items/NAME.jsonl beside
    NAME.csv keeps the scores of each item (question, window, text) that a row averages.
    """

    def __init__(self, path, settings):
        self.path, self.settings = Path(path), settings
        self.name = self.path.name.removesuffix(".csv")
        self.items = self.path.parent / "items" / f"{self.name}.jsonl"
        packages = f"python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}"
        versions = f"{packages}, {torch.get_num_threads()} threads on {platform.machine()}"
        command = " ".join(["python", *sys.orig_argv[1:]])
        self.command = f"# command: {command}\n# versions: {versions}\n"
        self.read()

    def read(self):
        """Read the rows that are there, and the scores of their items. ValueError if they have other settings."""
        self.text, kept = whole_lines(self.path), {}
        if self.path.exists() and self.path.stat().st_size and "\n# settings: " not in self.text:
            raise ValueError(f"{self.path}: not a table of evaluate.py: give another --output")
        for line in self.text.split("\n"):
            if line.startswith("# settings: "):
                kept |= json.loads(line.removeprefix("# settings: "))
        folder = self.path.parent / self.name  # of answers, which the task may have left
        also = f" and {folder}" if folder.is_dir() else ""
        check_settings(self.path, kept, self.settings, f"give another --output, or delete it{also}")
        self.head = self.command  # to be written before the next row
        if not as_json(self.settings).items() <= kept.items():
            self.head += f"# settings: {common.to_json(self.settings, sort_keys=True)}\n"
        elif self.text[self.text.rindex("# command: ") :].startswith(self.command):
            self.head = ""  # the last rows are of the same command
        reader = csv.DictReader(data_lines(io.StringIO(self.text)))
        self.rows, self.columns = list(reader), reader.fieldnames
        self.scores = []
        for record in read_records(self.items):
            if self.find({key: value for key, value in record.items() if key != "scores"}):
                self.scores.append(record)  # else a run ended before it wrote the row

    def find(self, key):
        """The row, a dict of text, that begins with this key, or None."""
        wanted = as_cells(key).items()
        for row in self.rows:
            if wanted <= row.items():
                return row
        return None

    def dense_scores(self):
        """{column: [the score of each item]} of the dense model; {} if it has no row."""
        found = {}
        for record in self.scores:
            if record["policy"] == "dense":
                found = record["scores"]
        return found

    def add(self, key, row, scores):
        """Append a row, which begins with its key, and the scores of its items, if no other run has added it."""
        self.items.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.path.parent):
            self.read()
            if self.find(key):
                return
            out, cells = io.StringIO(), as_cells(key | row)
            names = self.columns or list(cells)
            writer = csv.DictWriter(out, names, restval="", extrasaction="ignore", lineterminator="\n")
            if self.columns is None:
                writer.writeheader()
            writer.writerow(cells)
            lines = [common.to_json(record) + "\n" for record in [*self.scores, key | dict(scores=scores)]]
            common.write_whole(self.items, "".join(lines))
            common.write_whole(self.path, self.text + self.head + out.getvalue())
            self.read()


def as_json(value):
    """The value as it comes back from a file of JSON."""
    return json.loads(common.to_json(value))


def check_settings(path, kept, settings, advice):
    """Raise ValueError if a setting differs from what is kept, a dict; {}: nothing is kept yet."""
    if kept:
        kept = {key: UNSAID[key] for key in UNSAID if key in settings} | kept
    differ = [key for key, value in as_json(settings).items() if key in kept and kept[key] != value]
    if differ:
        raise ValueError(f"{path}: made with other settings ({', '.join(differ)}): {advice}")
    if kept and "weights_checksum" not in kept and "weights_checksum" in settings:
        common.note(f"[{path}: holds no checksums, so it may be of other weights and data]")


@contextlib.contextmanager
def alone(folder):
    """Within it, no other process is within it for the same folder, where the system can tell."""
    descriptor = None
    with contextlib.suppress(ImportError, OSError):  # Windows; file systems on a network
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def whole_lines(path):
    """The text of a file up to its last line break, past which an earlier run was cut off; "" if there is no file."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].decode()


def read_records(path):
    """The records of a file, one JSON object per line; what a run that was cut off left at its end goes. ValueError."""
    records, text = [], whole_lines(path)
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}:{number}: not a line of JSON: delete the line, or the file") from None
    if path.exists() and path.stat().st_size > len(text.encode()):
        os.truncate(path, len(text.encode()))
    return records


def add_record(path, records, record):
    """Append a record to the list and to its file, which then has all of it or, after a ValueError, nothing."""
    records.append(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    end = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(common.to_json(record) + "\n")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, end)
        raise ValueError(f"{path}: cannot be written: {common.first_line(error)}") from None


def as_cells(row):
    return {name: cell(value) for name, value in row.items()}


def cell(value):
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value).replace("\n", "\\n").replace("\r", "\\r")


def columns(name, values, articles=None):
    """
    The columns of a list of scores, one per item (question, window, text): NAME is the mean, NAME_low and NAME_high are
    the ends of its 95 % interval by bootstrap over the items, or over the articles that they are of. The scores of a
    perplexity are mean log-likelihoods.
    """
    found = mean_interval(values, articles) if values else (None, None, None)
    if values and name.startswith("perplexity"):
        found = map(math.exp, found)
    return with_ends(name, found, len(set(articles or range(len(values)))))


def with_ends(name, found, n):
    """The columns of found, (mean, low, high) over n items, of which fewer than FEWEST have no interval."""
    middle, low, high = found
    if n < FEWEST:
        low = high = None
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def data_lines(lines):
    return [line for line in lines if not line.startswith("#")]


def read(path):
    """The rows of a CSV as dicts, with its numbers as floats, over_seeds. ValueError if rows differ in length."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(data_lines(file)))
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{path}: not a CSV: rows of different lengths")
        for name, text in row.items():
            try:
                row[name] = float(text)
            except ValueError:
                pass  # a text it is
    return over_seeds(rows)


def grouped(rows, *columns):
    """{the column's value, or a tuple of those of several: the list of the rows that have it}"""
    groups, key = {}, itemgetter(*columns)
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def over_seeds(rows):
    """
    evaluate.py's rows, with those that differ only in their seed as one: the means of their numbers, and intervals that
    reach from the lowest end of theirs to the highest. Other rows as they are.
    """
    if not rows or "seed" not in rows[0]:
        return rows
    merged = []
    for group in grouped(rows, "policy", "skip", "match", "warm_up_index").values():
        merged.append(dict(group[0]))
        for name in group[0]:
            values = [row[name] for row in group if isinstance(row[name], float)]
            if values:
                pick = {"low": min, "high": max}.get(name.rpartition("_")[2], mean)
                merged[-1][name] = pick(values)
    return merged


def minus(path, rows, column, policy):
    """
    The rows of evaluate.py's CSV at path with the column as the difference from what `policy` has on the same items, at
    as many bytes not read: its scores lie on the line between its two nearest rows, the dense model's among them. The
    interval is paired, over articles where the items have them. No number where `policy` has no row at so many bytes.
    """
    keys, found = ("policy", "skip", "match", "warm_up_index"), {}
    for record in read_records(Path(path).parent / "items" / f"{Path(path).name.removesuffix('.csv')}.jsonl"):
        key = tuple("" if record[name] is None else record[name] for name in keys)
        found.setdefault(key, []).append(record["scores"])  # one per seed
    knots = {}  # bytes not read: the scores of each item
    for row in rows:
        own = found.get(itemgetter(*keys)(row), [{}])
        if row["policy"] in (policy, "dense") and row["match"] == "ffn" and column in own[0]:
            knots[row["bytes_saved"]] = numpy.mean([scores[column] for scores in own], axis=0)
    if len(knots) < 2:
        raise ValueError(f"{path}: no scores of {column} in items/ beside it for dense and {policy}")
    at, theirs = zip(*sorted(knots.items(), key=itemgetter(0)))
    for row in rows:
        own = found.get(itemgetter(*keys)(row), [])
        row |= {column: "", f"{column}_low": "", f"{column}_high": ""}
        if own and row["policy"] != "dense" and row["bytes_saved"] <= at[-1] + 0.005:
            place = numpy.interp(row["bytes_saved"], at, range(len(at)))
            below, share = int(place), place % 1
            other = (1 - share) * theirs[below] + share * theirs[min(below + 1, len(at) - 1)]
            ours = numpy.mean([scores[column] for scores in own], axis=0)
            ends = paired_interval(ours, other, own[0].get("article"))
            row |= dict(zip([column, f"{column}_low", f"{column}_high"], ends))
    return rows


def interval(row, column):
    """(low, high), the 95 % interval of a row's column, or its value twice if it has none."""
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    return (row[column], row[column]) if low in ("", None) else (low, high)


def logs(rows):
    """
    The rows of the authors' logs, or of judge.py, as one row per log, with the columns that evaluate.py's have and,
    each with its 95 % interval and number n of questions: `score`, `lost` (the dense model's score minus it) and
    `behind` (ffnskip's at the same ratio minus it). The score of a question is the mean over its criteria; questions
    without a score do not count.
    """
    found, dense, adaptive = [], {}, {}
    for log, own in grouped(rows, "log").items():
        parts = log.split("_")
        policy = own[0].get("policy") or AUTHORS.get(f"{parts[0]}_{parts[-1]}", "random")
        ratio = mean(row["skip_ratio_percent"] or 0 for row in own) / 100  # the dense model's is empty
        row = dict(policy=policy, log=log, skip=round(20 * ratio) / 20 or "", match="ffn", ffn_skip_ratio=ratio)
        found.append(row | dict(scores=scores(own, "score"), beside=scores(own, "score_dense")))
        if policy == "dense":
            dense = found[-1]["scores"]
        if policy == "ffnskip":
            adaptive[row["skip"]] = found[-1]["scores"]
    for row in found:
        own = row["scores"]
        row |= difference("score", own, dict.fromkeys(own, 0))
        row |= difference("lost", row["beside"] or dense, own)
        row |= difference("behind", adaptive.get(row["skip"], {}), own)
    return sorted(found, key=itemgetter("policy", "ffn_skip_ratio"))


def scores(rows, column):
    """{question: mean over its criteria}, of the questions that have one."""
    found = {}
    for row in rows:
        if row.get(column, "") != "":
            found.setdefault(row["question_id"], []).append(row[column])
    return {question: mean(values) for question, values in found.items()}


def difference(name, first, minus):
    """The columns of the mean of first minus minus, two {question: score}, over the questions in both."""
    ours, theirs = [], []
    for question, score in first.items():
        if question in minus:
            ours.append(score)
            theirs.append(minus[question])
    if not ours:
        return {name: ""}
    middle, low, high = paired_interval(ours, theirs)
    ends = round(middle, 2), round(low, 2), round(high, 2)
    return with_ends(name, ends, len(ours)) | {f"{name}_n": len(ours)}


def by_panel(rows):
    """{category, or length and criterion, with the number of questions: the logs of the rows for it}"""
    panels = {}
    for title, own in grouped(rows, *["category"] if "category" in rows[0] else ["length", "criterion"]).items():
        found, numbers = [], []
        for log in logs(own):
            if log["lost"] != "":
                found.append(log)
                if log["policy"] != "dense":
                    numbers.append(log["lost_n"])
        if numbers:  # else the judge gave no score in this category
            few, many = min(numbers), max(numbers)
            title = title if isinstance(title, str) else ", ".join(title)
            panels[f"{title} (n {few})" if few == many else f"{title} (n {few} to {many})"] = found
    return panels
