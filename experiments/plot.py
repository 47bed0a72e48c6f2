"""
Draw what was measured, into the folder out/, or print it:

    python experiments/plot.py                       draws all of experiments/results/, and the cosines in config/
    python experiments/plot.py FOLDER                draws the CSVs in a folder of yours
    python experiments/plot.py TRACE.csv             draws which blocks `generate.py --trace TRACE.csv` skipped
    python experiments/plot.py TRACE.csv 30          prints the token with token_index 30, layer by layer
    python experiments/plot.py perplexity.csv kl     prints a column of evaluate.py's CSV as a Markdown table
    python experiments/plot.py bench.csv 7B          prints bench.py's rows for the models of that name as one
    python experiments/plot.py JUDGED.csv lost       prints how many points policies lost to the dense model; or their
                                                     `score`, or how far they are `behind` ffnskip at the same ratio
"""

import sys
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)
from table import by_panel, grouped, interval, logs, read
from support import common

# One colour per policy in all pictures (Okabe and Ito's, which the colour-blind can tell apart), the rest grey.
COLOURS = dict(
    ffnskip="#0072B2", printed="#56B4E9", random="#999999", fixed="#999999", static="#E69F00", shortgpt="#D55E00",
    skipdecode="#CC79A7", statecopy="#009E73", earlyexit="#8B0000", checkerboard="#7B3FF2", standins="#117733",
    authors="#332288",
)  # fmt: skip
TITLES = dict(  # of the axes that show these columns
    ffn_skip_ratio="share of FFN blocks skipped",
    bytes_saved="share of bytes not read per token",
    warm_up_index="warm_up_index",
    perplexity_past_warm_up="perplexity past the warm-up",
    kl="KL from dense, nats per token",
    lost="points lost to dense",
)
NOTHING = """nothing to draw: pictures are made of generate.py's traces, bench.py's CSVs, the judged answers, and \
evaluate.py's perplexity at two ratios or warm-ups; of others, name a column to print"""


def panel(axes, rows, x, y, log=False):
    """Column y of the rows over column x, with intervals: a curve per policy, the dense model as a dashed line."""
    policies = grouped([row for row in rows if row[x] != "" and row[y] != ""], "policy")
    dense, colours = policies.pop("dense", []), []
    for policy, points in policies.items():
        points.sort(key=itemgetter(x))
        xs, ys = zip(*map(itemgetter(x, y), points))
        lows, highs = zip(*[interval(row, y) for row in points])
        colour = COLOURS.get(policy.split()[0].removesuffix("_cosine"), "#555555")
        style = dict(color=colour, alpha=0.75 ** colours.count(colour))  # a shade each
        axes.plot(xs, ys, "o-", markersize=4, label=policy, linewidth=2.5 if policy == "ffnskip" else 1.3, **style)
        axes.vlines(xs, lows, highs, linewidth=1, **style)
        colours.append(colour)
    if dense and (dense[0][y] > 1e-6 or not log):  # KL from itself is 0
        axes.axhline(dense[0][y], color="black", linestyle="--", linewidth=1, label="dense")
        axes.axhspan(*interval(dense[0], y), color="black", alpha=0.08, linewidth=0)
    finish(axes, TITLES[x], TITLES[y])
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # 20, not 2 x 10^1
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")


def finish(axes, x_title, y_title):
    axes.set(xlabel=x_title, ylabel=y_title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def skip_layers(rows):
    """The policies that skip whole layers: they alone have rows at equal bytes."""
    return {row["policy"] for row in rows if row["match"] == "bytes"}


def against_ratio(figure, rows):
    """Perplexity and KL over the share of FFN blocks skipped; perplexity over bytes too, if layers are skipped."""
    layer_skippers = skip_layers(rows)
    panels = [("ffn", "ffn_skip_ratio", "perplexity_past_warm_up"), ("ffn", "ffn_skip_ratio", "kl")]
    if layer_skippers:
        panels.append(("bytes", "bytes_saved", "perplexity_past_warm_up"))
    figure.set_size_inches(5 * len(panels) + 1.5, 4)
    for axes, (match, x, y) in zip(figure.subplots(1, len(panels)), panels):
        # What skips no more than FFN blocks has one row for both comparisons.
        panel(axes, [row for row in rows if row["match"] == match or row["policy"] not in layer_skippers], x, y, True)


def against_warm_up(figure, rows):
    """Figure 5: one curve per policy and ratio."""
    for row in rows:
        if row["policy"] != "dense":
            row["policy"] += f" {row['skip']}"
    panel(figure.subplots(), rows, "warm_up_index", "perplexity_past_warm_up", log=True)


def machine(row):
    """What a row of bench.py ran on; on a GPU no number of threads matters."""
    if row["threads"] == "":
        return row["device"]
    return f"{row['threads']:g} {'thread' if row['threads'] == 1 else 'threads'} of {row['device']}"


def speed(figure, rows):
    """Speed-up over the share of blocks skipped; a panel per model, machine and length of the cache."""
    kinds = grouped([row for row in rows if row["batch"] == 1], "model", "dtype", "device", "threads", "columns")
    kinds = [own for own in kinds.values() if any(row["ffn_skip_ratio"] for row in own)]
    figure.set_size_inches(4 * len(kinds) + 1.5, 3.8)
    for axes, own in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        variants = grouped(own, "variant")
        for name in "standins", "fixed", "ffnskip":
            shown = sorted([*variants["dense"], *variants.get(name, [])], key=itemgetter("ffn_skip_ratio"))
            x, y, bound = zip(*map(itemgetter("ffn_skip_ratio", "speedup", "speedup_bound"), shown))
            axes.plot(x, y, "o", color=COLOURS[name], markersize=4, label=name)
        axes.plot(x, bound, color="black", linestyle="--", linewidth=1, label="bound by bytes")
        title = "{model}\n{dtype}, {machine}\na context of {columns:g} tokens"
        axes.set_title(title.format(**own[0], machine=machine(own[0])), fontsize=9)
        finish(axes, TITLES["ffn_skip_ratio"], "decoding speed over dense")


def points_lost(figure, rows):
    """Figures 3 and 4: what policies lost to the dense model, one panel per category, or per length and criterion."""
    panels = by_panel(rows)
    figure.set_size_inches(11, 7)
    grid = figure.subplots((len(panels) + 3) // 4, 4, sharex=True, sharey=True, squeeze=False)
    for axes, (title, shown) in zip(grid.flat, panels.items()):
        shown.insert(0, dict(policy="dense", ffn_skip_ratio=0.0, lost=0.0))
        panel(axes, shown, "ffn_skip_ratio", "lost")
        axes.set_title(title, fontsize=9)
        axes.set_xlim(left=0)
        axes.label_outer()


def cosine_curves(figure, models):
    """Figure 2: the mean cosine before and after each FFN block, and the cold regions, one panel per model."""
    figure.set_size_inches(10, 3.4)
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


def layers_of(row):
    return [column for column in row if column.startswith("layer_")]


def heat_map(figure, rows):
    """Generated tokens from left to right, layers from the bottom up: the cosine where measured, else run or not."""
    layers = layers_of(rows[0])
    rows = [row for row in rows if row["prompt"] == 0 and row["token_index"] >= 0]
    shades, cosines = [], []  # (layer, token, red green blue), (layer, token)
    for layer in layers:
        shades.append([[0.0 if row[layer] == "skip" else 0.93] * 3 for row in rows])
        cosines.append([row[layer] if isinstance(row[layer], float) else float("nan") for row in rows])
    figure.set_size_inches(10, 4)
    axes = figure.subplots()
    axes.imshow(shades, origin="lower", aspect="auto")
    image = axes.imshow(cosines, origin="lower", aspect="auto", cmap="viridis", vmin=0.9, vmax=1)
    figure.colorbar(image, label="cosine, where measured")
    axes.set(xlabel="token_index (black: FFN block skipped, grey: run unmeasured)", ylabel="layer")


def draw(rows, path):
    """Draw the rows of one CSV, by its columns, as a PNG; return whether there is something to show."""
    first = rows[0] if rows else {}
    if "layer_0" in first:
        fill = heat_map
    elif "variant" in first:
        fill = speed
    elif "log" in first:
        fill = points_lost
    elif "perplexity_past_warm_up" in first and len(grouped(rows, "warm_up_index")) > 1:
        fill = against_warm_up
    elif "perplexity_past_warm_up" in first and len(grouped(rows, "skip").keys() - {""}) > 1:
        fill = against_ratio
    else:
        return False
    picture(path, fill, rows)
    return True


def picture(path, fill, rows):
    """Save what fill(figure, rows) draws as a PNG, with one legend for all panels."""
    common.import_optional("matplotlib", "pictures")
    from matplotlib.figure import Figure

    figure = Figure((6.5, 4), layout="constrained")
    fill(figure, rows)
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles[label] = handle
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(path)


def walk(rows, token_index):
    """Print one token's way through the layers. Raises ValueError if there is no such token."""
    tokens = {f"{row['token_index']:.0f}": row for row in rows if row["prompt"] == 0}
    if token_index not in tokens:
        raise ValueError(f"no token with token_index {token_index} in it")
    row = tokens[token_index]
    layers = layers_of(row)
    skipped = f"{row['ffn_skipped']:g} of {len(layers)} FFN blocks skipped"
    print(f"token_index {token_index}, token {row['token']!r}: {skipped}")
    ran = {"run": "attention, feed_forward", "skip": "attention"}
    for layer in layers:
        text = ran.get(row[layer]) or f"attention, feed_forward, cosine {row[layer]:.4f}"
        print(f"{layer.removeprefix('layer_'):>5}  {text}")


def print_heading(cells):
    print("| " + " | ".join(cells) + " |")
    print("|" + " --- |" * len(cells))


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
        layers = skip_layers(rows)
    skips = sorted(grouped(rows, "skip").keys() - {""})
    print_heading(["policy", *[f"{skip:.0%}" for skip in skips]])
    for policy, own in grouped(rows, "policy").items():
        lines = grouped([row for row in own if (row["match"] == "bytes") == (policy in layers)], "skip")
        cells, nothing, asked = [], "-", skips
        if "" in lines:  # the dense model, which has no wanted ratio
            nothing, asked = "", ["", *skips[1:]]
        for skip in asked:
            found = [cell(row, column, ratio) for row in lines.get(skip, [])]
            cells.append("; ".join(found) or nothing)
        print(f"| {policy} | " + " | ".join(cells) + " |")


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


def print_speed(rows):
    """Print bench.py's rows as Markdown tables, one per run."""
    before = None
    for row in rows:
        caption = "{model}: {dtype}, {machine}, a context of {columns:g} tokens".format(**row, machine=machine(row))
        if caption != before or row["variant"] == "dense":  # which comes first in every run
            print(f"{caption}:\n" if before is None else f"\n{caption}:\n")
            print_heading(["variant", "skipped", "tokens/s", "speed-up", "bound by bytes", "of the saving"])
        before = caption
        saving = f"{row['share_of_saving']:.0%}" if row["share_of_saving"] not in ("", None) else ""
        line = "| {variant} | {ffn_skip_ratio:.0%} | {decode_tokens_per_s:.1f} | {speedup:.2f} | {speedup_bound:.2f} |"
        print(line.format(**row), saving, "|")


def show(path, what, by_bytes):
    """Print what was asked for of one CSV."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder: give the path of a CSV in it")
    rows = read(path)
    if not rows:
        raise ValueError(f"{path}: no row in it")
    if "log" in rows[0]:
        rows = logs(rows)
    if "layer_0" in rows[0]:
        walk(rows, what)
    elif "variant" in rows[0]:
        print_speed([row for row in rows if what.lower() in row["model"].lower() and row["batch"] == 1])
    elif any(isinstance(row.get(what), float) for row in rows):
        table(rows, what, by_bytes)
    else:
        raise ValueError(f"{path}: no column of numbers {what}: choose from {', '.join(rows[0])}")


def parse_args(argv):
    parser = common.Parser(__doc__)
    parser.add_argument("path", nargs="?", type=Path, help="a CSV, or a folder of them")
    parser.add_argument("what", nargs="?", help="what to print of a CSV: a column, a model's name, or a token_index")
    parser.add_argument("--bytes", action="store_true", help="a column beside the bytes not read, not the FFN blocks")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where pictures go (default out)")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_args(argv)
    path = options.path or ROOT / "experiments" / "results"
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if options.what is not None:
        return show(path, options.what, options.bytes)
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if options.path is None:
        models = "smollm2-135m-instruct", "llama-2-7b"
        settings = [common.read_json(ROOT / "config" / f"{model}.json") for model in models]
        picture(options.out / "curve.png", cosine_curves, settings)
        files += sorted((path / "authors_logs").glob("*.csv"))
    drawn = 0
    for file in files:
        drawn += draw(read(file), options.out / f"{file.name.removesuffix('.csv')}.png")
    if not drawn:
        raise ValueError(f"{path}: {NOTHING}")


if __name__ == "__main__":
    common.run_command(main)
