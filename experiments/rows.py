"""
What plot.py draws and prints: the rows of a CSV, the seeds of a policy as one row, and the logs of the paper's authors
(GPT-4's scores of LLaMA-2-13B-chat's answers, results/authors_logs/) as one row per policy and ratio.
"""

import csv
from operator import itemgetter
from statistics import mean

from support.measuring import mean_interval, paired_interval

POLICIES = {"no_prune": "dense", "cosine_False": "ffnskip", "baseline_False": "static"}  # by log, inferred; else random
FEWEST = 5  # scores that get an interval: a bootstrap of fewer says nothing


def read(path):
    """The rows of a CSV as dicts, with its numbers as floats, over_seeds. ValueError if rows differ in length."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{path}: not a CSV: rows of different lengths")
        for key, value in row.items():
            try:
                row[key] = float(value)
            except ValueError:
                pass  # a text
    return over_seeds(rows)


def interval(row, column):
    """(low, high), the 95 % interval of a row's column, or its value twice if it has none."""
    ends = row.get(f"{column}_low", ""), row.get(f"{column}_high", "")
    return (row[column], row[column]) if "" in ends else ends


def over_seeds(rows):
    """
    evaluate.py's rows, with those that differ only in their seed as one: the means of their numbers, and intervals that
    reach from the lowest end of theirs to the highest.
    """
    groups = {}
    for number, row in enumerate(rows):
        key = number  # by which it stays alone
        if row.get("seed", "") != "":
            key = tuple(row.get(name) for name in ("policy", "skip", "match", "warm_up_index"))
        groups.setdefault(key, []).append(row)
    merged = []
    for group in groups.values():
        merged.append(dict(group[0]))
        for name in group[0]:
            values = [row[name] for row in group if isinstance(row[name], float)]
            if values:
                pick = {"low": min, "high": max}.get(name.split("_")[-1], mean)
                merged[-1][name] = pick(values)
    return merged


def by_panel(rows):
    """{category, or length and criterion, with the number of questions: the logs of the authors' rows for it}"""
    groups = {}
    for row in rows:
        title = row["category"] if "category" in row else f"{row['length']}, {row['criterion']}"
        groups.setdefault(title, []).append(row)
    panels = {}
    for title, own in groups.items():
        found = [log for log in logs(own) if log["lost"] != ""]
        numbers = [log["lost_n"] for log in found if log["policy"] != "dense"]
        if not numbers:
            continue  # the judge gave no score in this category
        few, many = min(numbers), max(numbers)
        panels[f"{title} (n {few})" if few == many else f"{title} (n {few} to {many})"] = found
    return panels


def policy_of(row):
    """The policy of a row: judge.py writes it, and the authors' logs have names."""
    parts = row["log"].split("_")
    return row.get("policy") or POLICIES.get(f"{parts[0]}_{parts[-1]}", "random")


def logs(rows):
    """
    The rows of the authors' logs, or of judge.py, as one row per log, with the columns that evaluate.py's have and,
    each with its 95 % interval and number n of questions: `score`, `lost` (the dense model's score minus it) and
    `behind` (ffnskip's at the same ratio minus it). The score of a question is the mean over its criteria; what the
    judge gave no score for is left out.
    """
    dense = scores([row for row in rows if policy_of(row) == "dense"], "score")
    found = []
    for name in dict.fromkeys(row["log"] for row in rows):
        log = [row for row in rows if row["log"] == name]
        ratio = mean(row["skip_ratio_percent"] or 0 for row in log) / 100  # the dense model's is empty
        row = dict(policy=policy_of(log[0]), log=name, match="ffn", ffn_skip_ratio=ratio)
        row["skip"] = round(20 * ratio) / 20 or ""
        row["scores"] = scores(log, "score")
        row |= with_interval("score", row["scores"])
        row |= with_interval("lost", scores(log, "score_dense") or dense, row["scores"])
        found.append(row)
    adaptive = {row["skip"]: row["scores"] for row in found if row["policy"] == "ffnskip"}
    for row in found:
        row |= with_interval("behind", adaptive.get(row["skip"], {}), row["scores"])
    return sorted(found, key=itemgetter("policy", "ffn_skip_ratio"))


def scores(rows, column):
    """{question: mean over its criteria}, of the questions that have one."""
    found = {}
    for row in rows:
        if row.get(column, "") != "":
            found.setdefault(row["question_id"], []).append(row[column])
    return {question: mean(values) for question, values in found.items()}


def with_interval(name, first, minus=None):
    """The columns of the mean of first, {question: score}, or of its difference from minus, where both have it."""
    shared = [question for question in first if minus is None or question in minus]
    if not shared:
        return {name: ""}
    values = [first[question] for question in shared]
    if minus is None:
        found = mean_interval(values)
    else:
        found = paired_interval(values, [minus[question] for question in shared])
    names = [name, f"{name}_low", f"{name}_high"] if len(shared) >= FEWEST else [name]
    return dict(zip(names, [round(value, 2) for value in found])) | {f"{name}_n": len(shared)}
