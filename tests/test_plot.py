"""experiments/plot.py: what it prints, to the letter, what it draws, and what it says of files that it cannot use."""

import csv
import json
import re
import shutil
import sys

import evaluate
import plot
import pytest
from test_golden import GOLDEN
from tiny import mistake

from support.measuring import mean_interval, paired_interval

STORY = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "
TRACE = '''\
prompt,token_index,token_id,token,ffn_skipped,layer_0,layer_1,layer_2
0,-1,5,a,0,run,run,run
0,0,6,"b,""",1,run,0.9876,skip
0,1,7,c,0,run,0.5,0.25
1,2,8,d,0,run,run,run
'''
EVALUATED = """\
# command: x
policy,skip,match,ffn_skip_ratio,bytes_saved,kl
dense,,ffn,0,0,0
random,0.05,ffn,0.051,0.03,1.23456
random,0.15,ffn,0.149,0.09,1000.4
shortgpt,0.15,ffn,0.133,0.105,2
shortgpt,0.15,ffn,0.167,0.132,4
shortgpt,0.05,bytes,0.033,0.026,3
"""
BENCHED = """\
commit,device,threads,dtype,model,batch,variant,columns,decode_tokens_per_s,ffn_skip_ratio,speedup,speedup_bound,\
share_of_saving,versions,read_gb_per_s
abc,CPU,2,bfloat16,Some-7B,1,dense,148,11.34,0,1,1,,torch 2,40.6
abc,CPU,2,bfloat16,Some-7B,1,ffnskip,148,13.66,0.3,1.2047,1.213,1.004,torch 2,40.6
abc,CPU,2,bfloat16,Some-7B,16,dense,148,11,0,1,1,,torch 2,40.6
abc,CPU,2,bfloat16,Some-7B,16,ffnskip,148,99,0.5,9,9,9,torch 2,40.6
abc,Other,2,bfloat16,Some-7B,1,dense,148,20,0,1,1,,torch 2,40.6
def,GPU,,bfloat16,other,1,dense,148,99,0,1,1,,torch 2,40.6
def,GPU,,bfloat16,other,1,ffnskip,148,99,0.2,0.9,1.1,-1.72,torch 2,40.6
"""


@pytest.fixture
def folder(tmp_path):
    """One CSV of each kind, and some that are none."""
    (tmp_path / "t.csv").write_text(TRACE)
    (tmp_path / "x.csv").write_text(EVALUATED)
    (tmp_path / "b.csv").write_text(BENCHED)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "page.md").write_text("# A page\n\nwith a, b\nc\nd, e, f\n")
    return tmp_path


def printed(capsys, *argv):
    plot.main([str(word) for word in argv])
    return capsys.readouterr().out.splitlines()


def test_one_token_is_walked(folder, capsys):
    """What generate.py --trace writes."""
    assert printed(capsys, folder / "t.csv", "0") == [
        "token_index 0, token 'b,\"': 1 of 3 FFN blocks skipped",
        "    0  attention, feed_forward",
        "    1  attention, feed_forward, cosine 0.9876",
        "    2  attention",
    ]
    assert printed(capsys, folder / "t.csv", "-1")[0] == "token_index -1, token 'a': 0 of 3 FFN blocks skipped"
    with pytest.raises(ValueError, match="no token with token_index 2 in it"):  # that is another prompt's
        plot.main([str(folder / "t.csv"), "2"])


def test_a_column_is_a_table_of_policies_by_wanted_ratios(folder, capsys):
    assert printed(capsys, folder / "x.csv", "kl") == [
        "| policy | 5% | 15% |",
        "| --- | --- | --- |",
        "| dense | 0 at 0.0% |  |",
        "| random | 1.23 at 5.1% | 1000 at 14.9% |",
        "| shortgpt | - | 2 at 13.3%; 4 at 16.7% |",
    ]
    assert printed(capsys, folder / "x.csv", "kl", "--bytes")[2:] == [
        "| dense | 0 at 0.0% |  |",
        "| random | 1.23 at 3.0% | 1000 at 9.0% |",
        "| shortgpt | 3 at 2.6% | - |",
    ]


def test_a_column_minus_that_of_a_policy_at_as_many_bytes(tmp_path, capsys):
    """On the line between its two nearest rows; paired by item, which are drawn by their articles."""
    shared = dict(match="ffn", warm_up_index=25, seed=0)
    rows, items = [], []
    for policy, skip, saved, kl in [
        ("dense", None, 0.0, [0.0, 0, 0, 0, 0, 0]),
        ("ffnskip", 0.1, 0.1, [1.0, 2, 3, 4, 5, 6]),
        ("ffnskip", 0.2, 0.2, [3.0, 4, 5, 6, 7, 9]),
        ("fixed", 0.1, 0.15, [2.5, 3.5, 4.5, 5.5, 6.5, 9]),
        ("fixed", 0.3, 0.3, [9.0] * 6),
    ]:
        key = dict(policy=policy, skip=skip, **shared)
        row = dict(skip="" if skip is None else skip, ffn_skip_ratio=saved, bytes_saved=saved, kl=sum(kl) / 6)
        rows.append(key | row)
        items.append(key | dict(scores=dict(kl=kl, article=[0, 0, 1, 2, 3, 4])))
    write(tmp_path / "x.csv", rows)
    with pytest.raises(ValueError, match="x.csv: no scores of kl in items/ beside it for dense and ffnskip"):
        plot.main([str(tmp_path / "x.csv"), "kl", "--minus", "ffnskip"])
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in items))
    ends = paired_interval([0.5, 0.5, 0.5, 0.5, 0.5, 1.5], [0.0] * 6, [0, 0, 1, 2, 3, 4])
    middle, low, high = (f"{value:.3g}" for value in ends)
    assert printed(capsys, tmp_path / "x.csv", "kl", "--minus", "ffnskip")[2:] == [
        "| dense | - |  |  |",
        "| ffnskip | 0 at 10.0% | 0 at 20.0% | - |",
        f"| fixed | {middle} [{low}, {high}] at 15.0% | - | - |",
    ]


def test_a_terminal_that_is_too_narrow_gets_a_row_for_each_ratio(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    wide = printed(capsys, folder / "x.csv", "kl")
    assert wide[0] == "| policy | 5% | 15% |"  # which fits
    monkeypatch.setenv("COLUMNS", "40")
    assert printed(capsys, folder / "x.csv", "kl")[:3] == [
        "policy                  ffn_skip_ratio    kl",
        "dense                                0     0",
        "random                           0.051  1.23",
    ]
    lines = printed(capsys, plot.ROOT / "experiments" / "results" / "perplexity_more.csv", "perplexity_past_warm_up")
    assert lines[0].split() == ["policy", "ffn_skip_ratio", "perplexity_past_warm_up", "kl", "top1_agreement"]
    assert max(map(len, lines)) <= 100 and any(line.startswith("shortgpt (equal bytes) ") for line in lines)


def test_intervals_are_printed_where_a_row_has_one_and_seeds_are_one_row(tmp_path, capsys):
    """Of several seeds the mean is printed, and the lowest and the highest end of their intervals."""
    dense = dict(policy="dense", skip="", match="ffn", warm_up_index=25, seed="", ffn_skip_ratio=0, kl=0, kl_low="")
    ffnskip = dense | dict(policy="ffnskip", skip=0.05, ffn_skip_ratio=0.048, kl=44.21, kl_low=42.12, kl_high=1046.4)
    seeds = [dict(seed=seed, kl=seed, kl_low=seed - 1, kl_high=seed + 0.5) for seed in (2, 3, 7)]
    random = [ffnskip | dict(policy="random") | values for values in seeds]
    ffnskip |= dict(difference=0.5, difference_low=-0.25, difference_high=1)
    unknown = ffnskip | dict(policy="static", ffn_skip_ratio="")  # where all texts end within the warm-up
    columns = dense | dict(kl_high="", difference="", difference_low="", difference_high="")
    write(tmp_path / "x.csv", [columns, ffnskip, *random, unknown])
    assert printed(capsys, tmp_path / "x.csv", "kl")[2:] == [
        "| dense | 0 at 0.0% |",
        "| ffnskip | 44.2 [42.1, 1046] at 4.8% |",
        "| random | 4 [1, 7.5] at 4.8% |",
        "| static | - |",
    ]
    lines = printed(capsys, tmp_path / "x.csv", "difference")[2:]  # of dense from itself there is none
    assert lines[:3] == ["| dense | - |", "| ffnskip | 0.5 [-0.25, 1] at 4.8% |", "| random | - |"]


def authors_logs():
    """Rows as in results/authors_logs/, in which the judge's reply about question 3 could not be read."""
    scores = {"no_prune": [9, 8, 7, 6, 9, 5], "cosine_pattern_5_False": [9, 6, "", 6, 7, 5]}
    scores |= {"baseline_pattern_5_False": [1, 6, 7, 5, 7, 2], "cosine_pattern_4_True": [1, 1, 3, 3, "", ""]}
    rows = []
    for log, values in scores.items():
        ratio = "" if log == "no_prune" else 10.4
        for number, score in reversed(list(enumerate(values, 1))):
            rows.append(dict(log=log, question_id=number, category="fermi", skip_ratio_percent=ratio, score=score))
    return rows


def cell(interval, ratio, n):
    return "{:.3g} [{:.3g}, {:.3g}] at {} (n {})".format(*[round(value, 2) for value in interval], ratio, n)


def test_the_authors_logs_are_compared_by_question(tmp_path, capsys):
    """Mean scores, and those of dense and of ffnskip minus them, over the questions that both have a score for."""
    path = tmp_path / "judged.csv"
    write(path, authors_logs())
    ours = [5, 7, 6, 6, 9]  # of questions 6, 5, 4, 2, 1
    assert printed(capsys, path, "score") == [
        "| policy | 10% |",
        "| --- | --- |",
        f"| dense | {cell(mean_interval([5, 9, 6, 7, 8, 9]), '0.0%', 6)} |",
        f"| ffnskip | {cell(mean_interval(ours), '10.4%', 5)} |",
        "| random | 2 at 10.4% (n 4) |",  # too few for an interval
        f"| static | {cell(mean_interval([2, 7, 5, 7, 6, 1]), '10.4%', 6)} |",
    ]
    lost = printed(capsys, path, "lost")
    assert lost[3] == f"| ffnskip | {cell(paired_interval([5, 9, 6, 8, 9], ours), '10.4%', 5)} |"
    behind = printed(capsys, path, "behind")
    assert behind[5] == f"| static | {cell(paired_interval(ours, [2, 7, 5, 6, 1]), '10.4%', 5)} |"


def test_summaries_have_a_dense_score_in_each_row_and_the_mean_of_their_criteria(tmp_path, capsys):
    rows = []
    for question in range(1, 7):
        for criterion, better in ("fluency", 1), ("relevance", question):
            row = dict(log="cosine_pattern_25per_False", question_id=question, length="small", criterion=criterion)
            rows.append(row | dict(skip_ratio_percent=24.7, score_dense=3 + better, score=3))
    write(tmp_path / "judged.csv", rows)
    expected = cell(mean_interval([1, 1.5, 2, 2.5, 3, 3.5]), "24.7%", 6)
    assert printed(capsys, tmp_path / "judged.csv", "lost")[2:] == [f"| ffnskip | {expected} |"]


def test_the_results_show_all_that_is_printed_of_the_authors_logs(capsys, monkeypatch):
    monkeypatch.chdir(plot.ROOT)
    page = (plot.ROOT / "docs" / "results.md").read_text()
    found = re.findall(r"`python experiments/plot.py (\S*/authors_logs/\S+) (\w+)`[^|]*\n\n((?:\|.*\n)+)", page)
    assert len(found) > 3
    for path, column, lines in found:
        assert printed(capsys, path, column) == lines.splitlines()


def test_speeds_are_a_table_of_the_models_of_that_name(folder, capsys):
    assert printed(capsys, folder / "b.csv", "7b") == [
        "Some-7B: bfloat16, 2 threads of CPU, a context of 148 tokens:",
        "",
        "| variant | skipped | tokens/s | speed-up | bound by bytes | of the saving |",
        "| --- | --- | --- | --- | --- | --- |",
        "| dense | 0% | 11.3 | 1.00 | 1.00 |  |",
        "| ffnskip | 30% | 13.7 | 1.20 | 1.21 | 100% |",
        "",
        "Some-7B: bfloat16, 2 threads of CPU, 16 rows, a context of 148 tokens:",
        "",
        "| variant | skipped | tokens/s | speed-up | bound by bytes | of the saving |",
        "| --- | --- | --- | --- | --- | --- |",
        "| dense | 0% | 11.0 | 1.00 | 1.00 |  |",
        "| ffnskip | 50% | 99.0 | 9.00 | 9.00 | 900% |",
        "",
        "Some-7B: bfloat16, 2 threads of Other, a context of 148 tokens:",
        "",
        "| variant | skipped | tokens/s | speed-up | bound by bytes | of the saving |",
        "| --- | --- | --- | --- | --- | --- |",
        "| dense | 0% | 20.0 | 1.00 | 1.00 |  |",
    ]


def test_a_run_of_prompts_is_a_table_of_its_own_and_a_line_of_one_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    header, dense, ffnskip, *_ = BENCHED.splitlines()
    header += ",prompt,prompt_skip_ratio,prefill_tokens_per_s,prefill_speedup,prefill_bound"
    lines = [header, f"{dense},512,0,100,1,1", f"{ffnskip},512,0.25,117.2,1.153,1.2"]
    (tmp_path / "b.csv").write_text("\n".join(lines) + "\n")
    assert printed(capsys, tmp_path / "b.csv", "7b") == [
        "Some-7B: bfloat16, 2 threads of CPU, a prompt of 512 tokens:",
        "",
        "| variant | skipped | tokens/s | speed-up | bound by arithmetic |",
        "| --- | --- | --- | --- | --- |",
        "| dense | 0% | 100 | 1.00 | 1.00 |",
        "| ffnskip | 25% | 117 | 1.15 | 1.20 |",
    ]
    pays = tmp_path / "when-it-pays.png"
    assert printed(capsys, tmp_path / "b.csv", "--out", tmp_path) == [str(pays)] and pays.stat().st_size > 5000
    name = "Some-7B: bfloat16, 2 threads of CPU, a prompt of 512 tokens"
    assert plot.a_quarter(plot.read(tmp_path / "b.csv")) == [(name, 1.153, 1.2)]


@pytest.mark.parametrize("argv, message", [
    (["x.csv", "nosuch"], "x.csv: no column of numbers nosuch: choose from policy, skip"),
    (["b.csv", "llama"], "b.csv: no model llama in it: choose from Some-7B"),
    (["x.csv", "policy"], "x.csv: no column of numbers policy"),
    (["other.csv"], "other.csv: nothing to draw: pictures are made of generate.py's traces"),
    (["empty.csv", "kl"], "empty.csv: no row in it"),
    (["nosuch.csv"], "nosuch.csv: no such file"),
    ([".", "kl"], "a folder: give the path of a CSV"),
    (["page.md"], "not a CSV"),
    (["t.csv", "abc"], "no token with token_index abc"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_one_line(folder, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(folder)
    assert message in mistake(capsys, plot.main, *argv)


def test_a_folder_without_anything_to_draw_says_so(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.main([str(tmp_path)])
    with pytest.raises(ValueError, match="no table of evaluate.py: it has no column ffn_skip_ratio or match"):
        plot.main([str(tmp_path / "other.csv"), "a"])


def test_pictures_need_matplotlib_and_tables_do_not(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import raises ImportError
    with pytest.raises(ValueError, match="pictures.*pip install matplotlib"):
        plot.main([str(folder / "t.csv")])
    assert len(printed(capsys, folder / "x.csv", "kl")) == 5


def write(path, rows):
    """A CSV as evaluate.py writes it, whose rows are dicts."""
    with open(path, "w", newline="") as file:
        file.write("# command: x\n")
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)


def evaluated(warm_ups=(25,)):
    """Rows of evaluate.py: the dense model, one policy that skips FFN blocks and one that skips layers."""
    dense = dict(policy="dense", skip="", match="ffn", warm_up_index=25, ffn_skip_ratio=0, bytes_saved=0)
    dense |= dict(perplexity_past_warm_up=30, kl=0)
    rows = [dense]
    for policy, match in ("random", "ffn"), ("shortgpt", "ffn"), ("shortgpt", "bytes"):
        for skip in 0.1, 0.2:
            for warm_up_index in warm_ups:
                row = dense | dict(policy=policy, skip=skip, match=match, warm_up_index=warm_up_index, kl=skip)
                row |= dict(ffn_skip_ratio=skip, perplexity_past_warm_up=30 * (1 + skip))
                rows.append(row | dict(bytes_saved=skip / 2 if match == "bytes" else skip / 4))
    return rows


def figure_of(monkeypatch, path):
    """The figure that is drawn for a CSV."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    plot.main([str(path), "--out", str(path.parent / "out")])
    figure = figures[0]  # before that of all speeds
    assert (path.parent / "out" / f"{path.stem}.png").stat().st_size > 5000
    return figure


def curves_of(axes):
    """{label: its points}"""
    return {line.get_label(): list(zip(*map(list, line.get_data()))) for line in axes.lines}


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_perplexity_and_kl_are_drawn_against_the_bytes_not_read(monkeypatch, tmp_path):
    write(tmp_path / "llama-3.1.csv", evaluated())
    figure = figure_of(monkeypatch, tmp_path / "llama-3.1.csv")
    titles = ["perplexity past the warm-up", "KL from dense, nats per token"]
    assert [axes.get_ylabel() for axes in figure.axes] == titles and labels(figure) == ["random", "shortgpt", "dense"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 2
    first = curves_of(figure.axes[0])
    assert [x for x, _ in first["shortgpt"]] == pytest.approx([0.025, 0.05])  # its rows at equal blocks
    assert first["random"][0][1] == pytest.approx(33) and first["dense"][0][1] == 30
    assert "dense" not in curves_of(figure.axes[1])  # its KL from itself is 0, which no logarithmic axis has


def test_a_title_names_the_model_and_the_task(monkeypatch, tmp_path):
    write(tmp_path / "x.csv", evaluated())
    text = (tmp_path / "x.csv").read_text()
    for settings, title in [
        (dict(ckpt=None, task="perplexity", data="a/wiki.raw"), "SmolLM2-135M-Instruct, perplexity, wiki.raw"),
        (dict(ckpt="b/llama-2-7b", task="warmup", data=None), "llama-2-7b, warmup, text of its own"),
    ]:
        (tmp_path / "x.csv").write_text(f"# settings: {json.dumps(settings)}\n{text}")
        assert figure_of(monkeypatch, tmp_path / "x.csv").get_suptitle() == title


def test_intervals_are_drawn_as_bars_and_that_of_dense_as_a_band(monkeypatch, tmp_path):
    rows = evaluated()
    rows[0] |= dict(perplexity_past_warm_up_low=28, perplexity_past_warm_up_high=31)
    rows[1] |= dict(perplexity_past_warm_up_low=20, perplexity_past_warm_up_high=40)
    write(tmp_path / "x.csv", rows)
    axes = figure_of(monkeypatch, tmp_path / "x.csv").axes[0]
    bars = [segment.tolist() for collection in axes.collections for segment in collection.get_segments()]
    assert bars[0] == [[0.025, 20], [0.025, 40]]
    assert all(start == end for start, end in bars[1:])  # rows without one
    (band,) = axes.patches
    assert {y for _, y in band.get_path().vertices * [1, band.get_height()] + [0, band.get_y()]} == {28, 31}


def test_the_authors_logs_are_drawn_by_category(monkeypatch, tmp_path):
    few = [row | dict(category="coding") for row in authors_logs() if row["question_id"] in (1, 4)]
    write(tmp_path / "judged.csv", authors_logs() + few)
    figure = figure_of(monkeypatch, tmp_path / "judged.csv")
    fermi, coding = figure.axes[:2]
    assert fermi.get_title() == "fermi (n 4 to 6)" and coding.get_title() == "coding (n 2)"
    assert labels(figure) == ["ffnskip", "random", "static", "dense"]
    curves = curves_of(fermi)
    assert curves["ffnskip"][0] == pytest.approx((0.104, 0.8)) and curves["dense"][0][1] == 0
    mean, low, high = paired_interval([5, 9, 6, 8, 9], [5, 7, 6, 6, 9])
    assert fermi.collections[0].get_segments()[0][:, 1] == pytest.approx([low, high], abs=0.005)


def test_warm_up_is_drawn_by_policy_and_ratio(monkeypatch, tmp_path):
    write(tmp_path / "warmup.csv", evaluated((5, 25)))
    figure = figure_of(monkeypatch, tmp_path / "warmup.csv")
    assert labels(figure) == ["random 0.1", "random 0.2", "shortgpt 0.1", "shortgpt 0.2", "dense"]
    assert [x for x, _ in curves_of(figure.axes[0])["random 0.1"]] == [5, 25]
    lines = [line for line in figure.axes[0].lines if line.get_label().startswith("random")]
    assert [line.get_linestyle() for line in lines] == ["-", "--"]  # ratios of one policy have its colour
    assert lines[0].get_color() == lines[1].get_color() == plot.COLOURS["random"]


def test_speed_is_drawn_for_each_model_with_the_bound(monkeypatch, folder):
    figure = figure_of(monkeypatch, folder / "b.csv")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "Some-7B\nbfloat16, 2 threads of CPU\na context of 148 tokens", "other\nbfloat16, GPU\na context of 148 tokens"
    ]  # fmt: skip
    curves = curves_of(figure.axes[0])
    assert curves["dense"] == [(0, 1), (1, 1)]  # a line from edge to edge
    assert curves["ffnskip"] == [(0, 1), (0.3, 1.2047)] and curves["bound by bytes"] == [(0, 1), (0.3, 1.213)]


def test_every_kind_of_run_in_the_shipped_speeds_has_a_panel_at_the_same_scale(monkeypatch, tmp_path):
    shutil.copy(plot.ROOT / "experiments" / "results" / "bench.csv", tmp_path)
    kinds = set()
    for row in csv.DictReader((tmp_path / "bench.csv").open(newline="")):
        if row["batch"] == "1" and float(row["ffn_skip_ratio"] or 0) > 0:
            kinds.add(tuple(row[name] for name in ("model", "dtype", "device", "threads", "columns")))
    axes = figure_of(monkeypatch, tmp_path / "bench.csv").axes
    assert len(axes) == len(kinds) > 3 and len({one.get_title() for one in axes}) == len(kinds)
    assert len({one.get_ylim() for one in axes}) == len({one.get_xlim() for one in axes}) == 1
    below = [bool(one.get_xlabel()) for one in axes]
    assert below == [False] * (len(axes) - 3) + [True] * 3  # the last of each column, also above an empty place


def test_settings_are_drawn_with_the_cosines_that_they_were_chosen_by(monkeypatch, tmp_path, capsys):
    settings = json.loads((plot.ROOT / "config" / "smollm2-135m-instruct.json").read_text())
    (tmp_path / "skip.json").write_text(json.dumps(settings))
    (axes,) = figure_of(monkeypatch, tmp_path / "skip.json").axes
    cold_s, cold_e = settings["cold_s"], settings["cold_e"]
    curves = curves_of(axes)
    assert [y for _, y in curves["mean cosine"]] == settings["curve"]
    assert curves["sim_threshold"] == list(zip(range(cold_s, cold_e), settings["sim_threshold"][cold_s:cold_e]))
    assert f"k=1, {settings['achieved_skip']:.1%} of the FFN blocks skipped" in axes.get_title()
    (tmp_path / "bare.json").write_text(json.dumps(dict(cold_s=1)))
    assert "bare.json: no curve in it" in mistake(capsys, plot.main, tmp_path / "bare.json")


def test_a_trace_is_drawn_with_its_cosines_and_what_was_skipped(monkeypatch, folder):
    axes = figure_of(monkeypatch, folder / "t.csv").axes[0]
    shades, cosines = (image.get_array() for image in axes.images)
    assert shades.shape == (3, 2, 3)  # layers, generated tokens of the first prompt, colours
    assert (shades[2, 0] == 0).all() and (shades[2, 1] > 0.8).all()
    assert cosines[1].tolist() == [0.9876, 0.5] and cosines.mask[0].all() and cosines.mask[2].tolist() == [True, False]


def test_a_folder_is_drawn_as_far_as_there_is_something_to_draw(folder, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    write(folder / "p.csv", evaluated())
    write(folder / "perplexity_few.csv", evaluated()[:2])  # two wanted ratios with dense's, so no curve
    write(folder / "perplexity_dense.csv", evaluated()[:1])
    assert printed(capsys, folder) == ["out/b.png", "out/p.png", "out/t.png"]
    assert sorted(path.name for path in folder.rglob("*.png")) == ["b.png", "p.png", "t.png"]


def test_without_a_path_all_results_and_the_cosines_of_config_are_drawn(monkeypatch, tmp_path, capsys):
    """Into a folder of the user's, and never beside the results that are shipped."""
    pytest.importorskip("matplotlib")
    results = tmp_path / "experiments" / "results"
    (results / "authors_logs").mkdir(parents=True)
    write(results / "p.csv", evaluated())
    write(results / "authors_logs" / "judged.csv", authors_logs())
    shutil.copytree(plot.ROOT / "config", tmp_path / "config")
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert printed(capsys) == ["out/curve.png", "out/p.png", "out/judged.png"]
    assert not list(results.rglob("*.png"))
    assert printed(capsys, results, "--out", tmp_path / "mine") == [str(tmp_path / "mine" / "p.png")]


def test_what_evaluate_writes_is_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.raw").write_text(STORY * 12)
    args = ["warmup", "--ckpt", str(GOLDEN / "hf-gqa"), "--device", "cpu", "--policies", "dense,random,shortgpt"]
    args += ["--window", "64", "--data", "text.raw", "--limit", "128", "--warm-up-index=-1,8", "--prompt-tokens", "8"]
    evaluate.main(args)
    assert "[written to out/warmup.csv;" in capsys.readouterr().err
    plot.main([str(tmp_path / "out"), "--out", str(tmp_path)])
    assert (tmp_path / "warmup.png").stat().st_size > 10000
