"""
Draw what was measured, into the folder out/, or print it:

    python experiments/plot.py                       draws all of experiments/results/, and the cosines in config/
    python experiments/plot.py FOLDER                draws the CSVs in a folder of yours
    python experiments/plot.py SKIP.json             draws the cosines and thresholds that calibrate.py wrote there
    python experiments/plot.py TRACE.csv             draws which blocks `generate.py --trace TRACE.csv` skipped
    python experiments/plot.py TRACE.csv 30          prints the token with token_index 30, layer by layer
    python experiments/plot.py perplexity.csv kl     prints a column of evaluate.py's CSV as a Markdown table
    python experiments/plot.py perplexity.csv kl --minus ffnskip    prints how much more than ffnskip's
    python experiments/plot.py bench.csv 7B          prints bench.py's rows for the models of that name as one
    python experiments/plot.py JUDGED.csv lost       prints how many points policies lost to the dense model; or their
                                                     `score`, or how far they are `behind` ffnskip at the same ratio
"""

import json
import re
import shutil
import sys
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)
from table import by_panel, grouped, interval, logs, minus, read
from support import common

# One colour per kind of policy in all pictures (Okabe and Ito's, which the colour-blind can tell apart), the rest grey.
COLOURS = dict(
    ffnskip="#0072B2", printed="#56B4E9", random="#999999", fixed="#999999", static="#E69F00", shortgpt="#D55E00",
    skipdecode="#CC79A7", statecopy="#009E73", earlyexit="#8B0000", checkerboard="#7B3FF2", standins="#117733",
    authors="#332288", teal="#CC3311", teal_all="#CC3311", teal_standins="#CC3311", cats="#EE7733",
)  # fmt: skip
LINES = "-", "--", ":", "-."  # of policies of one colour
WIDTH = 10  # inches, of every picture: as wide as a page shows it
TITLES = dict(  # of the axes that show these columns
    ffn_skip_ratio="share of FFN blocks skipped",
    bytes_saved="share of bytes not read per token",
    warm_up_index="warm_up_index, the last generated token that runs in full",
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
        colour = COLOURS.get(re.split("[ _@:]", policy)[0], "#555555")
        line = LINES[colours.count(colour) % len(LINES)]
        width = 2.5 if policy.startswith("ffnskip") else 1.3
        axes.plot(xs, ys, marker="o", markersize=4, label=policy, color=colour, linestyle=line, linewidth=width)
        axes.vlines(xs, lows, highs, linewidth=1, color=colour)
        colours.append(colour)
    if dense and (dense[0][y] > 1e-6 or not log):  # KL from itself is 0
        axes.axhline(dense[0][y], color="black", linestyle="--", linewidth=1, label="dense")
        axes.axhspan(*interval(dense[0], y), color="black", alpha=0.08, linewidth=0)
    finish(axes, TITLES[x], TITLES[y])
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,.7g}")  # 20, not 2 x 10^1
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")


def finish(axes, x_title, y_title):
    axes.set(xlabel=x_title, ylabel=y_title)
    if x_title.startswith("share"):
        axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def skip_layers(rows):
    """The policies that skip whole layers: they alone have rows at equal bytes."""
    return {row["policy"] for row in rows if row["match"] == "bytes"}


def against_ratio(figure, rows):
    """Perplexity and KL over the share of bytes not read, since some policies skip no blocks."""
    figure.set_size_inches(WIDTH, 5)
    for axes, y in zip(figure.subplots(1, 2), ["perplexity_past_warm_up", "kl"]):
        panel(axes, [row for row in rows if row["match"] == "ffn"], "bytes_saved", y, True)


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


def decoding(rows):
    """bench.py's rows of single texts, in a list per model, machine and length of the cache, if one of them skips."""
    single = [row for row in rows if row["batch"] == 1 and not row.get("prompt_skip_ratio")]
    kinds = grouped(single, "model", "dtype", "device", "threads", "columns")
    return [own for own in kinds.values() if any(row["ffn_skip_ratio"] for row in own)]


def speed(figure, rows):
    """Speed-up over the share of blocks skipped; a panel per list of decoding(), at one scale."""
    kinds = decoding(rows)
    for axes, own in zip(panels(figure, len(kinds), 3), kinds):
        variants = grouped(own, "variant")
        for name in "standins", "fixed", "ffnskip":
            shown = sorted([*variants["dense"], *variants.get(name, [])], key=itemgetter("ffn_skip_ratio"))
            x, y, bound = zip(*map(itemgetter("ffn_skip_ratio", "speedup", "speedup_bound"), shown))
            axes.plot(x, y, "o", color=COLOURS[name], markersize=5, label=name)
        axes.plot(x, bound, color="black", linestyle="--", linewidth=1, label="bound by bytes")
        axes.axhline(1, color="black", linewidth=0.8, label="dense")
        title = "{model}\n{dtype}, {machine}\na context of {columns:g} tokens"
        axes.set_title(title.format(**own[0], machine=machine(own[0])), fontsize=9)
        finish(axes, TITLES["ffn_skip_ratio"], "decoding speed over dense")


def a_quarter(rows):
    """(name, speed-up, bound) of each run of ffnskip at a quarter of the blocks: single texts, batches, prompts."""
    single, batches, prompts = [], [], []
    for row in rows:
        in_prompt = row.get("prompt_skip_ratio") or 0.0
        if row["variant"] != "ffnskip" or abs((in_prompt or row["ffn_skip_ratio"]) - 0.25) > 0.01:
            continue
        if in_prompt:
            name = f"{caption(row)}, a prompt of {row['prompt']:g} tokens"
            prompts.append((name, row["prefill_speedup"], row["prefill_bound"]))
        else:
            name = f"{caption(row)}, a context of {row['columns']:g} tokens"
            kind = single if row["batch"] == 1 else batches
            kind.append((name, row["speedup"], row["speedup_bound"]))
    return single + batches + prompts


def when_it_pays(figure, rows):
    """One line per situation: the bound, and what was measured."""
    names, speeds, bounds = zip(*a_quarter(rows))
    figure.set_size_inches(WIDTH, 1 + 0.25 * len(names))
    axes, lines = figure.subplots(), range(len(names), 0, -1)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.plot(bounds, lines, "|", color="black", markersize=10, label="bound")
    axes.plot(speeds, lines, "o", color=COLOURS["ffnskip"], markersize=6, label="measured")
    axes.set_yticks(lines, names, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("speed over dense")


def panels(figure, n, columns):
    """Yield the axes of n panels at one scale, in rows of so many columns, for their caller to fill and label."""
    columns = min(n, columns)
    rows = -(-n // columns)
    figure.set_size_inches(WIDTH, rows * WIDTH / columns + 0.5)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for i, axes in enumerate(grid):
        if i >= n:
            axes.remove()
            continue
        yield axes
        if i % columns:
            axes.set_ylabel("")
        if i + columns < n:
            axes.set_xlabel("")
        axes.xaxis.set_tick_params(labelbottom=i + columns >= n)


def points_lost(figure, rows):
    """Figures 3 and 4: what policies lost to the dense model, one panel per category, or per length and criterion."""
    found = by_panel(rows)
    for axes, (title, shown) in zip(panels(figure, len(found), 4), found.items()):
        shown.insert(0, dict(policy="dense", ffn_skip_ratio=0.0, lost=0.0))
        panel(axes, shown, "ffn_skip_ratio", "lost")
        axes.set_title(title, fontsize=9)
        axes.set_xlim(left=0)


def cosine_curves(figure, models):
    """Figure 2: the mean cosine before and after each FFN block, and what was chosen by it, one panel per model."""
    figure.set_size_inches(WIDTH, 4)
    for axes, settings in zip(figure.subplots(1, len(models), sharey=True, squeeze=False)[0], models):
        n_layers, cold_s, cold_e = settings["n_layers"], settings["cold_s"], settings["cold_e"]
        axes.axvspan(-0.5, cold_s - 0.5, color="red", alpha=0.15, label="cold")
        axes.axvspan(cold_e - 0.5, n_layers - 0.5, color="red", alpha=0.15)
        axes.plot(settings["curve"], marker=".", color="black", label="mean cosine")
        thresholds = settings["sim_threshold"]
        if not isinstance(thresholds, list):
            thresholds = [thresholds] * n_layers
        layers = range(cold_s, cold_e)
        axes.plot(layers, thresholds[cold_s:cold_e], "_", color=COLOURS["ffnskip"], markersize=9, label="sim_threshold")
        axes.set(xlim=(-0.5, n_layers - 0.5), ylim=(0.65, 1.005))
        for layer, value in enumerate(settings["curve"]):
            if value < 0.65:
                axes.annotate(f"{value:.2f}", (layer, 0.65), xytext=(layer + 0.8, 0.66), fontsize=9)
        skipped = settings["achieved_skip"] or settings["predicted_skip"]
        title = "{model}, {tokens} tokens of {corpus}\nk={k}, {skipped:.1%} of the FFN blocks skipped"
        axes.set_title(title.format(**settings, skipped=skipped), fontsize=9)
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
        shades.append([[0.0 if row[layer] == "skip" else 0.85] * 3 for row in rows])
        cosines.append([row[layer] if isinstance(row[layer], float) else float("nan") for row in rows])
    figure.set_size_inches(WIDTH, 4.2)
    axes = figure.subplots()
    axes.imshow(shades, origin="lower", aspect="auto")
    image = axes.imshow(cosines, origin="lower", aspect="auto", cmap="summer", vmin=0.9, vmax=1)  # none of it is dark
    figure.colorbar(image, label="cosine, where measured")
    axes.bar(0, 0, color="black", label="FFN block skipped")
    axes.bar(0, 0, color="0.85", label="run, and not measured")
    axes.set(xlabel="token_index, of generated tokens", ylabel="layer", xlim=(-0.5, len(rows) - 0.5))


def title_of(path, rows):
    """What a picture is of: the model and the task in the head of a CSV by evaluate.py, or what its rows have."""
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if line.startswith("# settings: "):
            settings = json.loads(line.removeprefix("# settings: "))
            data = Path(settings["data"]).name if settings["data"] else "text of its own"
            return f"{Path(settings['ckpt'] or 'SmolLM2-135M-Instruct').name}, {settings['task']}, {data}"
    if "layer_0" in rows[0]:
        skipped = [row["ffn_skipped"] for row in rows if row["prompt"] == 0 and row["token_index"] >= 0]
        share = sum(skipped) / max(1, len(skipped) * len(layers_of(rows[0])))
        return f"{path.stem}: {share:.1%} of the FFN blocks of {len(skipped)} generated tokens skipped"
    if "log" in rows[0]:
        return f"{path.stem}: points that the judge gave to the dense model, and not to the policy"
    return "Decoding one text with blocks skipped, over decoding it dense"


def draw(file, rows, out):
    """Draw a CSV's rows, by their columns, as a PNG in the folder out; return whether there is something to show."""
    first = rows[0] if rows else {}
    if "layer_0" in first:
        fill = heat_map
    elif "variant" in first and decoding(rows):
        fill = speed
    elif "log" in first:
        fill = points_lost
    elif "perplexity_past_warm_up" in first and len(grouped(rows, "warm_up_index")) > 1:
        fill = against_warm_up
    elif "perplexity_past_warm_up" in first and len(grouped(rows, "skip").keys() - {""}) > 1:
        fill = against_ratio
    else:
        return False
    picture(out / f"{file.name.removesuffix('.csv')}.png", title_of(file, rows), fill, rows)
    return True


def draw_settings(path, files):
    """Draw the cosines in files of skip settings, side by side, and what was chosen by them. Raises ValueError."""
    models = [common.read_json(file) for file in files]
    for file, settings in zip(files, models):
        if "curve" not in settings:
            raise ValueError(f"{file}: no curve in it: expected skip settings that calibrate.py wrote")
    picture(path, "Mean cosine by layer, and the skip settings chosen by it", cosine_curves, models)


def picture(path, title, fill, rows):
    """Save what fill(figure, rows) draws as a PNG, with one legend for all panels."""
    common.import_optional("matplotlib", "pictures")
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    fill(figure, rows)
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles[label] = handle
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
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
        cell = f"cosine {row[layer]:.4f}" if isinstance(row[layer], float) else row[layer]
        text = ran.get(row[layer], f"attention, feed_forward, {cell}")
        print(f"{layer.removeprefix('layer_'):>5}  {text}")


def heading(cells):
    """The two lines of Markdown that begin a table."""
    return ["| " + " | ".join(cells) + " |", "|" + " --- |" * len(cells)]


def table(rows, column, by_bytes):
    """
    Print policies by wanted ratios as Markdown; each cell has the column's value, its interval and the share of FFN
    blocks skipped, or by_bytes of bytes not read, for which policies of whole layers have rows of their own. On a
    terminal that is too narrow for it, print `narrow`.
    """
    ratio, layers = "bytes_saved" if by_bytes else "ffn_skip_ratio", set()
    missing = {"policy", "skip", "match", ratio} - rows[0].keys()
    if missing:
        raise ValueError(f"no table of evaluate.py: it has no column {' or '.join(sorted(missing))}")
    if by_bytes:
        layers = skip_layers(rows)
    skips = sorted(grouped(rows, "skip").keys() - {""})
    text = heading(["policy", *[f"{skip:.0%}" for skip in skips]])
    for policy, own in grouped(rows, "policy").items():
        lines = grouped([row for row in own if (row["match"] == "bytes") == (policy in layers)], "skip")
        cells, nothing, asked = [], "-", skips
        if "" in lines:  # the dense model, which has no wanted ratio
            nothing, asked = "", ["", *skips[1:]]
        for skip in asked:
            found = [cell(row, column, ratio) for row in lines.get(skip, [])]
            cells.append("; ".join(found) or nothing)
        text.append(f"| {policy} | " + " | ".join(cells) + " |")
    if sys.stdout.isatty() and max(map(len, text)) > shutil.get_terminal_size().columns:
        text = narrow(rows, column, ratio)
    print(*text, sep="\n")


def narrow(rows, column, ratio):
    """Lines of a table for people with a row for each policy and ratio: what was asked for, and what else matters."""
    names = [column] + [name for name in ("kl", "top1_agreement") if name in rows[0] and name != column]
    lines = [["policy", ratio, *names]]
    for row in rows:
        policy = row["policy"] + " (equal bytes)" * (row["match"] == "bytes")
        lines.append([policy, *[short(row[name]) for name in (ratio, *names)]])
    return common.table(lines)


def short(value):
    """A number to three digits; where there is none, a dash."""
    if not isinstance(value, float):
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def cell(row, column, ratio):
    """A row's value, interval, ratio and, where known, number of items, as text."""
    if "" in (row[column], row[ratio]):
        return "-"
    value, low, high = map(short, (row[column], *interval(row, column)))
    ends = f" [{low}, {high}]" if low != high else ""
    count = f" (n {row[f'{column}_n']})" if f"{column}_n" in row else ""
    return f"{value}{ends} at {row[ratio]:.1%}{count}"


def print_speed(rows):
    """Print bench.py's rows as Markdown tables, one per run."""
    runs = []
    for row in rows:
        if not runs or row["variant"] == "dense":  # which comes first in every run
            runs.append([])
        runs[-1].append(row)
    for number, run in enumerate(runs):
        if number > 0:
            print()
        if any(row.get("prompt_skip_ratio") for row in run):
            print_prefill(run)
        else:
            print_decoding(run)


def caption(row):
    batch = f", {row['batch']:g} rows" if row["batch"] > 1 else ""
    return f"{row['model']}: {row['dtype']}, {machine(row)}{batch}"


def print_prefill(run):
    """The table of a run that skips in the prompt."""
    print(f"{caption(run[0])}, a prompt of {run[0]['prompt']:g} tokens:\n")
    print(*heading(["variant", "skipped", "tokens/s", "speed-up", "bound by arithmetic"]), sep="\n")
    line = "| {variant} | {prompt_skip_ratio:.0%} | {prefill_tokens_per_s:.0f} | {prefill_speedup:.2f} |"
    for row in run:
        print(line.format(**row), f"{row['prefill_bound']:.2f} |")


def print_decoding(run):
    print(f"{caption(run[0])}, a context of {run[0]['columns']:g} tokens:\n")
    print(*heading(["variant", "skipped", "tokens/s", "speed-up", "bound by bytes", "of the saving"]), sep="\n")
    for row in run:
        saving = f"{row['share_of_saving']:.0%}" if row["share_of_saving"] not in ("", None) else ""
        line = "| {variant} | {ffn_skip_ratio:.0%} | {decode_tokens_per_s:.1f} | {speedup:.2f} | {speedup_bound:.2f} |"
        print(line.format(**row), saving, "|")


def show(path, what, by_bytes, other=None):
    """Print what was asked for of one CSV; a column as its difference from the `other` policy's, if one is named."""
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
        named = [row for row in rows if what.lower() in row["model"].lower()]
        if not named:
            raise ValueError(f"{path}: no model {what} in it: choose from {', '.join(grouped(rows, 'model'))}")
        print_speed(named)
    elif any(isinstance(row.get(what), float) for row in rows):
        table(minus(path, rows, what, other) if other else rows, what, by_bytes)
    else:
        raise ValueError(f"{path}: no column of numbers {what}: choose from {', '.join(rows[0])}")


def parse_args(argv):
    parser = common.Parser(__doc__)
    parser.add_argument("path", nargs="?", type=Path, help="a CSV, or a folder of them")
    parser.add_argument("what", nargs="?", help="what to print of a CSV: a column, a model's name, or a token_index")
    parser.add_argument("--bytes", action="store_true", help="a column beside the bytes not read, not the FFN blocks")
    parser.add_argument("--minus", metavar="POLICY", help="the column minus that policy's, at as many bytes not read")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="where pictures go (default out)")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_args(argv)
    path = options.path or ROOT / "experiments" / "results"
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if options.what is not None:
        return show(path, options.what, options.bytes, options.minus)
    if path.suffix == ".json":
        return draw_settings(options.out / f"{path.stem}.png", [path])
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if options.path is None:
        models = "smollm2-135m-instruct", "llama-2-7b"
        draw_settings(options.out / "curve.png", [ROOT / "config" / f"{model}.json" for model in models])
        files += sorted((path / "authors_logs").glob("*.csv"))
    drawn, speeds = 0, []
    for file in files:
        rows = read(file)
        drawn += draw(file, rows, options.out)
        speeds += [row for row in rows if "variant" in row]
    if a_quarter(speeds):
        title = "ffnskip with a quarter of the blocks skipped"
        picture(options.out / "when-it-pays.png", title, when_it_pays, speeds)
        drawn += 1
    if not drawn:
        raise ValueError(f"{path}: {NOTHING}")


if __name__ == "__main__":
    common.run_command(main)
