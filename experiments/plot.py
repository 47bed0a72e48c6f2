"""
Draw what was measured, each picture beside its CSV, or print it:

    python experiments/plot.py                       draws all of experiments/results/, and the cosines in config/
    python experiments/plot.py FOLDER                draws the CSVs in a folder of yours
    python experiments/plot.py TRACE.csv             draws which blocks `generate.py --trace TRACE.csv` skipped
    python experiments/plot.py TRACE.csv 30          prints the token with token_index 30, layer by layer
    python experiments/plot.py perplexity.csv kl     prints a column of evaluate.py's CSV as a Markdown table
    python experiments/plot.py bench.csv 7B          prints bench.py's rows for the models of that name as one
    python experiments/plot.py JUDGED.csv lost       prints what policies lost to the dense model in a judge's eyes; or
                                                     their `score`, or what they are `behind` ffnskip at the same ratio
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rows import by_panel, interval, logs, read

from support import common

# One colour per policy in all pictures (Okabe and Ito's, which the colour-blind can tell apart), the rest grey.
COLOURS = dict(
    ffnskip="#0072B2", printed="#56B4E9", random="#999999", fixed="#999999", static="#E69F00", shortgpt="#D55E00",
    skipdecode="#CC79A7", statecopy="#009E73", earlyexit="#8B0000", checkerboard="#7B3FF2", standins="#117733",
    authors="#332288",
)  # fmt: skip
PANELS = {  # task: one panel per column, {column: title of its axis}, against the achieved ratio
    "perplexity": {"perplexity_past_warm_up": "perplexity", "kl": "KL from dense, nats per token"},
    "factoid": {"exact_match": "exact match", "answer_within": "a right answer within"},
    "mmlu": {"all": "accuracy, all subjects"},
    "summarize": {"rouge_l": "ROUGE-L"},
    "collapse": {"looping": "texts with a loop of 32 tokens", "parts_from_dense": "first token that differs"},
}
NOTHING = f"""nothing to draw: pictures are made of generate.py's traces, bench.py's CSVs, the authors' logs, and \
evaluate.py's CSVs named {", ".join(PANELS)} (of two ratios), warmup or worstcase; of others, name a column to print"""


def panel(axes, rows, x, x_title, y, y_title, log=False):
    """Column y of the rows over column x, with intervals: a curve per policy, the dense model as a dashed line."""
    rows, colours = [row for row in rows if "" not in (row[x], row[y])], []
    for policy in dict.fromkeys(row["policy"] for row in rows if row["policy"] != "dense"):
        points = sorted((row[x], row[y], *interval(row, y)) for row in rows if row["policy"] == policy)
        xs, ys, lows, highs = zip(*points)
        colour = COLOURS.get(policy.split()[0].removesuffix("_cosine"), "#555555")
        style = dict(color=colour, alpha=0.75 ** colours.count(colour))
        axes.plot(xs, ys, "o-", markersize=4, label=policy, linewidth=2.5 if policy == "ffnskip" else 1.3, **style)
        axes.vlines(xs, lows, highs, linewidth=1, **style)
        colours.append(colour)
    for value, low, high in {(row[y], *interval(row, y)) for row in rows if row["policy"] == "dense"}:
        if value > 1e-6 or not log:  # KL from itself is 0
            axes.axhline(value, color="black", linestyle="--", linewidth=1, label="dense")
            axes.axhspan(low, high, color="black", alpha=0.08, linewidth=0)
    finish(axes, x_title, y_title, log)


def finish(axes, x_title, y_title, log=False):
    axes.set(xlabel=x_title, ylabel=y_title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # 20, not 2 x 10^1
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")


def against_ratio(figure, rows, titles, log):
    """Each column of `titles` over the share of FFN blocks skipped; the first over bytes too, if layers are skipped."""
    layer_skippers = {row["policy"] for row in rows if row["match"] == "bytes"}
    panels = [("ffn", "ffn_skip_ratio", "share of FFN blocks skipped, past the warm-up", y) for y in titles]
    if layer_skippers:
        panels.append(("bytes", "bytes_saved", "share of bytes not read per token", list(titles)[0]))
    for axes, (match, x, x_title, y) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        # What skips no more than FFN blocks has one row for both comparisons.
        shown = [row for row in rows if row["match"] == match or row["policy"] not in layer_skippers]
        panel(axes, shown, x, x_title, y, titles[y], log)


def against_warm_up(figure, rows):
    """Figure 5: one curve per policy and ratio."""
    for row in rows:
        if row["policy"] != "dense":
            row["policy"] += f" {row['skip']}"
    y, y_title = "perplexity_past_warm_up", "perplexity past the largest warm-up"
    panel(figure.subplots(), rows, "warm_up_index", "warm_up_index", y, y_title, log=True)


def by_position(figure, rows):
    """Table 6: the share of tokens that skip nothing, by how far into the text they are."""
    axes = figure.subplots()
    edges = [column for column in rows[0] if column.startswith("never_below_") and column[-1].isdigit()]
    rows = [row for row in rows if row["policy"] != "dense"]
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        skip = row["skip"] or "threshold " + row["setting"].split("sim_threshold=")[-1]
        style = dict(color=COLOURS.get(row["policy"], "#555555"), alpha=1 - 0.2 * (i % 4))
        for j, edge in enumerate(edges):
            x, ends = j - 0.4 + (i + 0.5) * width, [end or 0 for end in interval(row, edge)]
            axes.bar(x, row[edge] or 0, width, label=f"{row['policy']} {skip}", **style)
            axes.vlines(x, *ends, color="black", linewidth=1)
    axes.set_xticks(range(len(edges)), ["below " + edge.split("_")[-1] for edge in edges])
    finish(axes, "token_index", "share of tokens that skip nothing")


def machine(row):
    """What a row of bench.py ran on; on a GPU no number of threads matters."""
    return row["device"] if row["threads"] == "" else f"{row['threads']:g} threads of {row['device']}"


def speed(figure, rows):
    """Speed-up over the share of blocks skipped, as last measured on each device; a panel per model and machine."""
    last = {row["device"]: row["commit"] for row in rows}
    rows = [row for row in rows if row["batch"] == 1 and row["commit"] == last[row["device"]]]
    for row in rows:
        row["kind"] = f"{row['model']}\n{row['dtype']}, {machine(row)}\n{row['columns']:g} columns of cache"
    kinds = dict.fromkeys(row["kind"] for row in rows if row["ffn_skip_ratio"])
    measured = {(row["kind"], row["variant"]) for row in rows}
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        for name in [name for name in ("standins", "fixed", "ffnskip") if (kind, name) in measured]:
            shown = [row for row in rows if row["kind"] == kind and row["variant"] in ("dense", name)]
            x, y, bound = zip(*sorted((row["ffn_skip_ratio"], row["speedup"], row["speedup_bound"]) for row in shown))
            axes.plot(x, y, "o", color=COLOURS[name], markersize=4, label=name)
        axes.plot(x, bound, color="black", linestyle="--", linewidth=1, label="bound by bytes")
        axes.set_title(kind, fontsize=9)
        finish(axes, "share of FFN blocks skipped", "decoding speed over dense")


def points_lost(figure, rows):
    """Figures 3 and 4: what policies lost to the dense model, one panel per category, or per length and criterion."""
    panels = by_panel(rows)
    grid = figure.subplots((len(panels) + 3) // 4, 4, sharex=True, sharey=True, squeeze=False)
    for axes, (title, shown) in zip(grid.flat, panels.items()):
        shown.append(dict(policy="dense", ffn_skip_ratio=0.0, lost=0.0))
        panel(axes, shown, "ffn_skip_ratio", "share of FFN blocks skipped", "lost", "points lost to dense")
        axes.set_title(title, fontsize=9)
        axes.set_xlim(left=0)
        axes.label_outer()


def cosine_curves(figure, models):
    """Figure 2: the mean cosine before and after each FFN block, and the cold regions, one panel per model."""
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


def heat_map(figure, rows):
    """Generated tokens from left to right, layers from the bottom up: the cosine where measured, else run or not."""
    layers = [column for column in rows[0] if column.startswith("layer_")]
    rows = [row for row in rows if row["prompt"] == 0 and row["token_index"] >= 0]
    shades, cosines = [], []  # (layer, token, red green blue), (layer, token)
    for layer in layers:
        shades.append([[0.0] * 3 if row[layer] == "skip" else [0.93] * 3 for row in rows])
        cosines.append([row[layer] if isinstance(row[layer], float) else float("nan") for row in rows])
    axes = figure.subplots()
    axes.imshow(shades, origin="lower", aspect="auto")
    image = axes.imshow(cosines, origin="lower", aspect="auto", cmap="viridis", vmin=0.9, vmax=1)
    figure.colorbar(image, label="cosine, where measured")
    axes.set(xlabel="token_index (black: FFN block skipped, grey: run unmeasured)", ylabel="layer")


def walk(rows, token_index):
    """Print one token's way through the layers. Raises ValueError if there is no such token."""
    layers = [column for column in rows[0] if column.startswith("layer_")]
    found = [row for row in rows if row["prompt"] == 0 and f"{row['token_index']:.0f}" == token_index]
    if not found:
        raise ValueError(f"no token with token_index {token_index} in it")
    token, skipped = found[0]["token"], found[0]["ffn_skipped"]
    print(f"token_index {token_index}, token {token!r}: {skipped:g} of {len(layers)} FFN blocks skipped")
    ran = {"run": "attention, feed_forward", "skip": "attention"}
    for layer in layers:
        cell = found[0][layer]
        text = ran[cell] if cell in ran else f"attention, feed_forward, cosine {cell:.4f}"
        print(f"{layer.removeprefix('layer_'):>5}  {text}")


def table(rows, column, by_bytes):
    """
    Print policies by wanted ratios as Markdown; each cell has the column's value, its interval and the share of FFN
    blocks skipped, or by_bytes of bytes not read, for which policies of whole layers have rows of their own.
    """
    ratio, layers = "bytes_saved" if by_bytes else "ffn_skip_ratio", set()
    missing = {"policy", "skip", "match", ratio} - rows[0].keys()
    if missing:
        raise ValueError(f"no table of evaluate.py: it has no column {' or '.join(sorted(missing))}")
    if by_bytes:
        layers = {row["policy"] for row in rows if row["match"] == "bytes"}
    skips = sorted({row["skip"] for row in rows if row["skip"] != ""})
    print("| policy |", *[f"{skip:.0%} |" for skip in skips])
    print("|" + " --- |" * (len(skips) + 1))
    lines = {}  # {policy: {wanted ratio: what was measured}}
    for row in rows:
        if (row["match"] == "bytes") == (row["policy"] in layers):
            lines.setdefault(row["policy"], {}).setdefault(row["skip"], []).append(cell(row, column, ratio))
    for name, line in lines.items():
        cells = ["; ".join(line.get(skip, ["-"])) for skip in skips]
        if name == "dense":  # which has no wanted ratio
            cells = ["; ".join(line[""])] + [""] * (len(skips) - 1)
        print("| " + " | ".join([name, *cells]) + " |")


def cell(row, column, ratio):
    """A row's value, interval, ratio and, where known, number of items, as text."""
    if "" in (row[column], row[ratio]):
        return "-"
    texts = []
    for number in row[column], *interval(row, column):
        texts.append(f"{number:.3g}" if abs(number) < 1000 else f"{number:.0f}")
    value, low, high = texts
    ends = f" [{low}, {high}]" if low != high else ""
    count = f" (n {row[f'{column}_n']})" if f"{column}_n" in row else ""
    return f"{value}{ends} at {row[ratio]:.1%}{count}"


def speed_table(rows, name):
    """Print bench.py's rows for models with `name` in theirs, with batch 1, as Markdown tables."""
    before = None
    for row in rows:
        if name.lower() not in row["model"].lower() or row["batch"] != 1:
            continue
        caption = "{model}: {dtype}, {machine} that read {read_gb_per_s:.0f} GB/s, "
        caption += "{columns:g} columns of cache, commit {commit}, {versions}"
        caption = caption.format(**row, machine=machine(row))
        if caption != before or row["variant"] == "dense":  # which comes first in every run
            print(f"{caption}:\n" if before is None else f"\n{caption}:\n")
            print("| variant | skipped | tokens/s | speed-up | bound by bytes | of the saving |")
            print("|" + " --- |" * 6)
        before = caption
        saving = f"{row['share_of_saving']:.0%}" if row["share_of_saving"] != "" else ""
        line = "| {variant} | {ffn_skip_ratio:.0%} | {decode_tokens_per_s:.1f} | {speedup:.2f} | {speedup_bound:.2f} |"
        print(line.format(**row), saving, "|")


def draw(path, rows):
    """Draw one CSV by its columns and, if evaluate.py wrote it, its task; return whether there is something to show."""
    task, policies = path.stem.split("_")[0], {row.get("policy") for row in rows} - {"dense", None}
    if rows and "layer_0" in rows[0]:
        picture(path, heat_map, rows, size=(10, 4))
    elif rows and "variant" in rows[0]:
        picture(path, speed, rows, size=(16, 3.8))
    elif rows and "log" in rows[0]:
        picture(path, points_lost, rows, size=(11, 7))
    elif policies and task == "warmup":
        picture(path, against_warm_up, rows)
    elif policies and task == "worstcase" and any(row["never"] for row in rows):  # else every token skipped something
        picture(path, by_position, rows)
    elif policies and task in PANELS and len({row["skip"] for row in rows}) > 2:  # that of dense is empty
        wide = len(PANELS[task]) + any(row["match"] == "bytes" for row in rows)
        picture(path, against_ratio, rows, PANELS[task], task == "perplexity", size=(5 * wide + 1.5, 4))
    else:
        return False
    return True


def picture(path, fill, *args, size=(6.5, 4)):
    """Save what fill(figure, *args) draws as a PNG beside path, size in inches, with one legend for all panels."""
    common.import_optional("matplotlib", "pictures")
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    fill(figure, *args)
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(path.with_suffix(".png"))


def parse_args(argv):
    parser = common.Parser(__doc__)
    parser.add_argument("path", nargs="?", type=Path, help="a CSV, or a folder of them")
    parser.add_argument("what", nargs="?", help="what to print of a CSV: a column, a model's name, or a token_index")
    parser.add_argument("--bytes", action="store_true", help="a column beside the bytes not read, not the FFN blocks")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_args(argv)
    path, what = options.path or ROOT / "experiments" / "results", options.what
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir() and what is not None:
        raise ValueError(f"{path}: a folder: give the path of a CSV in it")
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if options.path is None:
        models = ROOT / "config" / "smollm2-135m-instruct.json", ROOT / "config" / "llama-2-7b.json"
        picture(path / "curve", cosine_curves, [common.read_json(file) for file in models], size=(10, 3.4))
        files += sorted((path / "authors_logs").glob("*.csv"))
    tables = {file: read(file) for file in files}
    rows = tables.get(path)
    if rows == []:
        raise ValueError(f"{path}: no row in it")
    if what is None:
        drawn = [draw(file, found) for file, found in tables.items()]
        if not any(drawn):
            raise ValueError(f"{path}: {NOTHING}")
        return
    if "log" in rows[0]:
        rows = logs(rows)
    if "layer_0" in rows[0]:
        walk(rows, what)
    elif "variant" in rows[0]:
        speed_table(rows, what)
    elif any(isinstance(row.get(what), float) for row in rows):
        table(rows, what, options.bytes)
    else:
        raise ValueError(f"{path}: no column of numbers {what}: choose from {', '.join(rows[0])}")


if __name__ == "__main__":
    common.run_command(main)
