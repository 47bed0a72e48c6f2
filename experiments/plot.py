"""
Draw what was measured, each picture beside its CSV:

    python experiments/plot.py                       all of experiments/results/, and the cosine curves of config/
    python experiments/plot.py FOLDER                the CSVs of evaluate.py and bench.py in a folder of yours
    python experiments/plot.py TRACE.csv             which blocks `generate.py --trace TRACE.csv` skipped, token by token

or print it:

    python experiments/plot.py TRACE.csv 30          the token with token_index 30, layer by layer
    python experiments/plot.py perplexity.csv kl     a column of evaluate.py's CSV as a Markdown table
    python experiments/plot.py bench.csv 7B          bench.py's rows for the models of that name, as one
"""

import argparse
import csv
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CURVES = "smollm2-135m-instruct", "llama-2-7b"  # in config/, where calibrate.py's settings keep the curve

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
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path}: not a CSV: rows of different lengths")
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
                  color=COLOURS.get(name.removesuffix("_cosine"), "#555555"))  # fmt: skip


def finish(axes, x, y, log=False):
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # 20, not 2 x 10^1
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")
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
            if row["policy"] == "dense" and (row[y] > 1e-6 or not log):  # KL from itself is 0
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


def speed(figure, rows):
    """Speed-up over the share of FFN blocks skipped, a panel for each model and dtype, with the bound by bytes."""
    kinds = list(dict.fromkeys((row["model"], row["dtype"], row["device"]) for row in rows if row["ffn_skip_ratio"]))
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        some = [row for row in rows if (row["model"], row["dtype"], row["device"]) == kind]
        some = [row for row in some if row["batch"] == 1 and row["compile"] == "False"]
        for name, colour in dict(fixed="#999999", ffnskip=COLOURS["ffnskip"]).items():
            points = sorted((row["ffn_skip_ratio"], row["speedup"]) for row in some if row["variant"] in (name, "dense"))
            axes.plot(*zip(*points), "o", color=colour, markersize=4, label=name)
        bound = sorted((row["ffn_skip_ratio"], row["speedup_bound"]) for row in some if row["variant"] in ("dense", "ffnskip"))
        axes.plot(*zip(*bound), color="black", linestyle="--", linewidth=1, label="bound by bytes")
        axes.set_title(", ".join(kind), fontsize=9)
        finish(axes, "share of FFN blocks skipped", "decoding speed over dense")


def cosine_curves(figure, models):
    """Figure 2: the mean cosine before and after each FFN block, and the cold regions, a panel a model."""
    for axes, settings in zip(figure.subplots(1, len(models), sharey=True), models):
        n_layers, cold_s, cold_e = settings["n_layers"], settings["cold_s"], settings["cold_e"]
        axes.axvspan(-0.5, cold_s - 0.5, color="red", alpha=0.15, label="cold")
        axes.axvspan(cold_e - 0.5, n_layers - 0.5, color="red", alpha=0.15)
        axes.plot(settings["curve"], marker=".", color="black", label="mean cosine")
        axes.set(xlim=(-0.5, n_layers - 0.5), ylim=(0.65, 1))
        for layer, value in enumerate(settings["curve"]):
            if value < 0.65:
                axes.annotate(f"{value:.2f}", (layer, 0.65), xytext=(layer + 0.4, 0.66), fontsize=8)
        axes.set_title(f"{settings['model']}, {settings['tokens']} tokens of {settings['corpus']}", fontsize=9)
        finish(axes, "layer", "cosine before and after the FFN block")
        axes.label_outer()


def layers_of(rows):
    """The rows of a CSV that generate.py wrote with --trace, and its columns of layers: for each token a cell a layer."""
    return rows, [column for column in rows[0] if column.startswith("layer_")]


def heat_map(figure, rows, layers):
    """Generated tokens from left to right, layers from the bottom up: the cosine where measured, else run or skipped."""
    rows = [row for row in rows if row["prompt"] == 0 and row["token_index"] >= 0]
    axes = figure.subplots()
    cells = [[row[layer] for row in rows] for layer in layers]
    values = [[cell if isinstance(cell, float) else float("nan") for cell in line] for line in cells]
    axes.imshow([[[0, 0, 0] if cell == "skip" else [0.93] * 3 for cell in line] for line in cells], origin="lower", aspect="auto")
    image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=0.9, vmax=1)
    figure.colorbar(image, label="cosine, where measured")
    axes.set(xlabel="token_index (black: FFN block skipped, grey: run unmeasured)", ylabel="layer")


def walk(rows, layers, token_index):
    """One token through the layers, for people."""
    row = next((row for row in rows if row["prompt"] == 0 and row["token_index"] == number(token_index)), None)
    if row is None:
        raise ValueError(f"no token with token_index {token_index} in it")
    lines = [f"token_index {token_index}, token {row['token']!r}: {row['ffn_skipped']:g} of {len(layers)} FFN blocks skipped"]
    for layer in layers:
        cell = row[layer]
        said = f"attention, feed_forward, cosine {cell:.4f}" if isinstance(cell, float) else \
            "attention" if cell == "skip" else "attention, feed_forward"  # fmt: skip
        lines.append(f"{layer.removeprefix('layer_'):>5}  {said}")
    return "\n".join(lines)


def draw(path, plt):
    """The picture for one CSV, as a file beside it; returns its path, or None if there is nothing to draw."""
    rows, task = read(path), path.stem.split("_")[0]
    if rows and "variant" in rows[0]:
        return picture(plt, path, lambda figure: speed(figure, rows), (9, 3.8))
    if task not in (*PANELS, "warmup", "worstcase") or not policies(rows):
        return None
    if task == "warmup":
        return picture(plt, path, lambda figure: against_warm_up(figure, rows))
    if task == "worstcase":
        if not any(row["never"] for row in rows):
            return None  # every token skipped something
        return picture(plt, path, lambda figure: by_position(figure, rows))
    if len({row["skip"] for row in rows}) < 3:  # that of dense is empty
        return None
    wide = len(PANELS[task]) + any(row["match"] == "bytes" for row in rows)
    return picture(plt, path, lambda figure: against_ratio(figure, rows, PANELS[task]), (5 * wide + 1.5, 4))


def picture(plt, path, fill, size=(6.5, 4)):
    """What `fill` puts on a figure, as a PNG beside `path`, with one legend; returns the path."""
    figure = plt.figure(figsize=size, layout="constrained")
    fill(figure)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    if handles:
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
            value = lambda row: f"{row[column]:.3g}" if row[column] < 1000 else f"{row[column]:.0f}"
            line.append("; ".join(f"{value(row)} at {row['ffn_skip_ratio']:.1%}" for row in found) or "-")
        lines.append(line + [""] * (len(skips) + 1 - len(line)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_table(rows, name):
    """bench.py's rows for models with `name` in theirs, batch 1 and not compiled, as Markdown."""
    lines = ["| model | variant | skipped | tokens/s | speed-up | bound by bytes | of the saving |", "| --- " * 7 + "|"]
    for row in rows:
        if name.lower() in row["model"].lower() and row["batch"] == 1 and row["compile"] == "False":
            saving = "" if row["share_of_saving"] == "" else f"{row['share_of_saving']:.0%}"
            model = f"{row['model']}, {row['dtype']}, {row['threads']:g} threads, {row['columns']:g} columns"
            lines.append(f"| {model} | {row['variant']} | {row['ffn_skip_ratio']:.0%} | {row['decode_tokens_per_s']:.1f} "
                         f"| {row['speedup']:.2f} | {row['speedup_bound']:.2f} | {saving} |")  # fmt: skip
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")
    parser.add_argument("path", nargs="?", type=Path, help="a CSV, or a folder of them")
    parser.add_argument("what", nargs="?", help="what to print of a CSV: a column, a model's name, or a token_index")
    options = parser.parse_args(argv)
    path, what = options.path or HERE / "results", options.what
    rows = read(path) if path.is_file() else None
    if not path.exists() or rows == []:
        raise ValueError(f"{path}: {'no row in it' if path.exists() else 'no such file or folder'}")
    trace = rows and "layer_0" in rows[0]
    if what is not None:
        if not rows:
            raise ValueError(f"{path}: a folder: give the path of a CSV in it")
        if trace:
            return print(walk(*layers_of(rows), what))
        if "variant" in rows[0]:
            return print(speed_table(rows, what))
        if not all(isinstance(row.get(what), (float, int)) for row in rows):
            raise ValueError(f"{path}: no column of numbers {what}: choose from {', '.join(rows[0])}")
        return print(table(rows, what))
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if trace:
        return print(picture(plt, path, lambda figure: heat_map(figure, *layers_of(rows)), (10, 4)))
    if options.path is None:
        models = [json.loads((HERE.parent / "config" / f"{name}.json").read_text()) for name in CURVES]
        print(picture(plt, path / "curve", lambda figure: cosine_curves(figure, models), (10, 3.4)))
    for file in [path] if rows else sorted(path.glob("*.csv")):
        if drawn := draw(file, plt):
            print(drawn)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
