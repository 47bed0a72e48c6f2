"""
Draw what evaluate.py measured: a picture beside each CSV in a folder; or print a column of one as a Markdown table.

    python experiments/plot.py                       experiments/results/*.csv -> experiments/results/*.png
    python experiments/plot.py FOLDER
    python experiments/plot.py FILE.csv COLUMN
"""

import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# One colour a policy in all pictures (Okabe and Ito's, which the colour-blind can tell apart), the rest grey.
COLOURS = dict(dense="#000000", ffnskip="#0072B2", printed="#56B4E9", random="#999999", static="#E69F00",
               shortgpt="#D55E00", skipdecode="#CC79A7", statecopy="#009E73", earlyexit="#8B0000",
               yours="#7B3FF2")  # fmt: skip

# task: a panel for each (column, title of its axis, whether it is logarithmic), against the achieved ratio
PANELS = {
    "perplexity": [("perplexity_past_warm_up", "perplexity", True), ("kl", "KL from dense, nats a token", True)],
    "factoid": [("exact_match", "exact match", False), ("answer_within", "a right answer within", False)],
    "mmlu": [("all", "accuracy, all subjects", False)],
    "summarize": [("rouge_l", "ROUGE-L", False)],
    "collapse": [
        ("looping", "texts with a loop of 32 tokens", False),
        ("parts_from_dense", "first token that differs", False),
    ],
}


def read(path):
    """The rows of a CSV by evaluate.py, numbers as floats."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return [{key: number(value) for key, value in row.items()} for row in rows]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def policies(rows):
    return list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != "dense"))


def curve(axes, rows, x, y, name):
    points = sorted((row[x], row[y]) for row in rows if row["policy"] == name and row[x] != "" and row[y] != "")
    if points:
        axes.plot(*zip(*points), marker="o", markersize=4, linewidth=2.5 if name == "ffnskip" else 1.3, label=name,
                  color=COLOURS.get(name, "#555555"))  # fmt: skip


def finish(axes, x, y, log=False):
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # 20, not 2 x 10^1
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def against_ratio(figure, rows, panels):
    """Each panel against the share of FFN blocks skipped; the first again against bytes, where layers were skipped."""
    matches = [("ffn", "ffn_skip_ratio", "share of FFN blocks skipped, past the warm-up", column) for column in panels]
    if any(row["match"] == "bytes" for row in rows):
        # what skips no more than FFN blocks has one row for both comparisons
        matches.append(("bytes", "bytes_saved", "share of bytes not read a token", panels[0]))
    for axes, (match, x, title, (y, name, log)) in zip(figure.subplots(1, len(matches), squeeze=False)[0], matches):
        layers = {row["policy"] for row in rows if row["match"] == "bytes"}
        shown = [row for row in rows if row["match"] == match or row["policy"] not in layers]
        for policy in policies(rows):
            curve(axes, shown, x, y, policy)
        for row in rows:
            if row["policy"] == "dense":
                axes.axhline(row[y], color="black", linestyle="--", linewidth=1, label="dense")
        finish(axes, title, name, log)


def against_warm_up(figure, rows):
    """Figure 5: a curve for each ratio."""
    axes = figure.subplots()
    kinds = dict.fromkeys((row["policy"], row["skip"]) for row in rows if row["policy"] != "dense")
    for i, (policy, skip) in enumerate(kinds):
        points = sorted((row["warm_up_index"], row["perplexity_past_warm_up"]) for row in rows
                        if (row["policy"], row["skip"]) == (policy, skip))  # fmt: skip
        axes.plot(*zip(*points), marker="o", markersize=4, label=f"{policy} {skip}",
                  color=COLOURS.get(policy, "#555555"), alpha=1 - 0.25 * (i % 3))  # fmt: skip
    for row in [row for row in rows if row["policy"] == "dense"][:1]:
        axes.axhline(row["perplexity_past_warm_up"], color="black", linestyle="--", linewidth=1, label="dense")
    finish(axes, "warm_up_index", "perplexity past the largest warm-up", log=True)


def by_position(figure, rows):
    """Table 6: the share of tokens that skip nothing, by how far into the text they are."""
    axes = figure.subplots()
    edges = [column for column in rows[0] if column.startswith("never_below_")]
    kinds = [row for row in rows if row["policy"] != "dense"]
    for i, row in enumerate(kinds):
        places = [j + 0.8 * i / len(kinds) for j in range(len(edges))]
        skip = row["skip"] if row["skip"] != "" else "threshold " + row["setting"].split("sim_threshold=")[-1]
        label = f"{row['policy']} {skip}"
        axes.bar(places, [row[edge] or 0 for edge in edges], width=0.8 / len(kinds), align="edge", label=label,
                 color=COLOURS.get(row["policy"], "#555555"), alpha=1 - 0.2 * (i % 4))  # fmt: skip
    axes.set_xticks([j + 0.4 for j in range(len(edges))], [f"below {edge.split('_')[-1]}" for edge in edges])
    finish(axes, "token_index", "share of tokens that skip nothing")


def draw(path, plt):
    """The picture for one CSV, as a file beside it; returns its path, or None if there is nothing to draw."""
    rows, task = read(path), path.stem.split("_")[0]
    if task not in (*PANELS, "warmup", "worstcase") or not policies(rows):
        return None
    wide = len(PANELS.get(task, [0])) + any(row["match"] == "bytes" for row in rows) * (task in PANELS)
    figure = plt.figure(figsize=(5 * wide + 1.5, 4), layout="constrained")
    if task == "warmup":
        against_warm_up(figure, rows)
    elif task == "worstcase":
        by_position(figure, rows)
    else:
        against_ratio(figure, rows, PANELS[task])
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
    return path.with_suffix(".png")


def table(rows, column):
    """Policies by wanted ratios, each cell the column's value and, if another ratio was achieved, that, as Markdown."""
    skips = sorted({row["skip"] for row in rows if row["skip"] != ""})
    lines = [["policy", *(f"{skip:.0%}" for skip in skips)], ["---"] * (len(skips) + 1)]
    for policy, match in dict.fromkeys((row["policy"], row["match"]) for row in rows):
        line = [policy + " (equal bytes)" * (match == "bytes")]
        for skip in skips if policy != "dense" else [""]:
            found = [row for row in rows if (row["policy"], row["match"], row["skip"]) == (policy, match, skip)]
            line.append("; ".join(f"{row[column]:.3g} at {row['ffn_skip_ratio']:.1%}" for row in found) or "-")
        lines.append(line + [""] * (len(skips) + 1 - len(line)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv):
    if len(argv) == 2:
        return print(table(read(Path(argv[0])), argv[1]))
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: pictures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(argv[0]) if argv else HERE / "results"
    for path in sorted(folder.glob("*.csv")):
        if picture := draw(path, plt):
            print(picture)


if __name__ == "__main__":
    main(sys.argv[1:])
