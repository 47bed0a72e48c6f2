"""trace_page.py: the page holds what the trace holds, whatever the text is, and replays Algorithm 1 as skip.py does."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
import torch
from test_skip import ALGORITHM_1
from test_standins import random_fit
from tiny import Bytes, tiny_model, walk

from generate import parse_args, start
from model import dense
from policies import find_policy, load_settings, shifted
from policies.standins import StandIns, ready
from skip import FFNSkip
from support import trace_page
from support.measuring import measure, replay
from support.trace_page import SCALE, TOY, printed_lines, shorten, write_page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import explore

PROMPTS = ["Once </script><script>document.body.remove()</script> <!--", "\"&'\\ \n\t", "a"]
THRESHOLDS = [0.9, 0.7, float("inf"), 0.5, 0.9, 0.9]
SKIP = FFNSkip(1, 5, THRESHOLDS, warm_up_index=1, k=1)
BROWSERS = "chromium", "chromium-browser", "google-chrome"
SHIPPED = explore.read_page(ROOT / "docs" / "explore.html")
TEMPLATE = (ROOT / "support" / "trace_page.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """What stands in a page: its elements, as (tag, attributes), and the text of the one whose id is data."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.data = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][1].get("id") == "data":
            self.data += data


def generations(model, *policies, prompts=PROMPTS, arguments=("--max-new-tokens", "12", "--trace", "x.html")):
    """A finished Generation per policy."""
    tokenizer, options = Bytes(), parse_args(list(arguments))
    done = []
    for policy in policies:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        done.append(start(options, model, tokenizer, type(policy).__name__, policy, ids))
        while done[-1].advance():
            pass
        done[-1].finish()
    return done


def page_of(path, runs, prompts=PROMPTS):
    write_page(path, runs, prompts, "tiny", "python generate.py --trace x.html", "tiny.gguf")
    page = Page(path.read_text(encoding="utf-8"))
    return page, json.loads(page.data, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


# --- what the page holds ----------------------------------------------------------------------------------------------


def test_the_page_holds_the_trace_of_each_run(tmp_path, model):
    runs = generations(model, dense, SKIP)
    _, data = page_of(tmp_path / "x.html", runs)
    assert data["prompts"] == PROMPTS and [run["name"] for run in data["runs"]] == ["function", "FFNSkip"]
    assert "values" not in data["runs"][0]["texts"][0][0]
    skipped = 0
    for generation, run in zip(runs, data["runs"]):
        trace = generation.trace
        for row, tokens in enumerate(run["texts"]):
            prompt, ids = generation.prompts[row], generation.ids[row]
            assert [token["id"] for token in tokens] == prompt + ids
            assert "".join(token["text"] for token in tokens) == PROMPTS[row] + "".join(generation.pieces[row])
            assert [token["prompt"] for token in tokens] == [True] * len(prompt) + [False] * len(ids)
            assert "index" not in tokens[-1] and "skipped" not in tokens[-1]  # which was not read
            padding = max(map(len, generation.prompts)) - len(prompt)
            for column, token in enumerate(tokens[:-1], start=padding):
                assert token["index"] == column - padding - len(prompt)
                ran = [layer not in token["skipped"] for layer in range(6)]
                assert ran == trace.ran[:, row, column].tolist()
                values = [float("nan") if value is None else value for value in token.get("values", [None] * 6)]
                exact = trace.cosine[:, row, column]
                torch.testing.assert_close(torch.tensor(values), exact, equal_nan=True, rtol=0, atol=1e-4)
                for value, cosine, threshold in zip(values, exact.tolist(), THRESHOLDS):
                    assert (value >= threshold) == (cosine >= threshold)
                skipped += len(token["skipped"])
    assert skipped > 5


def test_a_number_is_shortened_on_its_side_of_the_threshold():
    assert shorten(0.97996, 0.5) == shorten(0.97996, None) == 0.98 and shorten(0.00123456, None) == 0.001235
    assert shorten(0.97996, 0.98) == 0.97996 and shorten(0.98, 0.98) == 0.98
    assert math.isnan(shorten(float("nan"), 0.5))


def test_the_page_knows_the_settings_of_a_policy_where_it_has_some(tmp_path, model):
    (run,) = page_of(tmp_path / "x.html", generations(model, SKIP))[1]["runs"]
    assert (run["cold_s"], run["cold_e"], run["warm_up_index"], run["label"]) == (1, 5, 1, "cosine")
    assert run["thresholds"] == run["settings"]["sim_threshold"] == [0.9, 0.7, "inf", 0.5, 0.9, 0.9]
    other = find_policy("random", model, skip=0.5, warm_up_index=3)
    (run,) = page_of(tmp_path / "x.html", generations(model, other))[1]["runs"]
    assert (run["cold_s"], run["cold_e"], run["warm_up_index"], run["label"]) == (0, 6, 3, "cosine")
    assert run["thresholds"] == [None] * 6 and run["settings"] is run["most"] is None and not run["skips_attention"]


@pytest.mark.parametrize("name", ["shortgpt", "skipdecode", "earlyexit", "statecopy", "random", "static"])
def test_the_page_says_who_leaves_out_attention(name, tmp_path, model):
    other = find_policy(name, model, skip=0.3, warm_up_index=3)
    (run,) = page_of(tmp_path / "x.html", generations(model, other))[1]["runs"]
    assert run["skips_attention"] == (name not in ("random", "static"))


def test_the_page_calls_harm_by_its_name_and_knows_the_cap(tmp_path, model):
    standins = StandIns(ready(random_fit(model), torch.float32), log_budget=-1.0, most=2, warm_up_index=1)
    (run,) = page_of(tmp_path / "x.html", generations(model, standins))[1]["runs"]
    assert (run["label"], run["most"]) == ("harm", 2) and run["thresholds"] == [math.exp(-1.0)] * 6


def test_a_run_that_was_interrupted_in_its_first_pass_has_no_layers(tmp_path, model):
    runs = generations(model, dense) + generations(model, SKIP, arguments=["--max-new-tokens", "1", "--trace", "x"])
    runs[1].ids, runs[1].pieces = [[] for _ in PROMPTS], [[""] for _ in PROMPTS]
    _, data = page_of(tmp_path / "x.html", runs)
    for tokens, prompt in zip(data["runs"][1]["texts"], PROMPTS):
        assert "".join(token["text"] for token in tokens) == prompt
        assert not any("skipped" in token for token in tokens)
    assert [source["run"] for source in data["sources"]] == [None, 0, 0, 0] and data["differences"] == [None] * 3


def test_a_character_of_several_tokens_is_the_text_of_its_last(tmp_path):
    (run,) = generations(tiny_model(vocab_size=256), dense, prompts=["é€œ"])
    _, data = page_of(tmp_path / "x.html", [run], ["é€œ"])
    texts = [token["text"] for token in data["runs"][0]["texts"][0]]
    assert texts[:7] == ["", "é", "", "", "€", "", "œ"] and "".join(texts[7:]) == "".join(run.pieces[0])


def test_the_page_is_self_contained_whatever_the_text_is(tmp_path, model):
    page, _ = page_of(tmp_path / "x.html", generations(model, dense, SKIP))
    assert [tag for tag, _ in page.elements].count("script") == 3  # the data and the program, and none of the prompt's
    links = [attributes for _, attributes in page.elements if {"src", "href"} & set(attributes)]
    assert links == [dict(href="https://arxiv.org/abs/2404.03865")]  # which is followed only by a reader
    for tag, _ in page.elements:
        assert tag not in ("link", "img", "iframe")
    assert not any(word in TEMPLATE for word in ("http://", "@import", "url(", "fetch(", "import("))


@pytest.mark.parametrize("flags", [[], ["--skip-prompt"]])
def test_the_page_replays_the_dense_models_cosines_on_every_text(flags, tmp_path, model):
    runs = generations(model, dense, SKIP, arguments=["--max-new-tokens", "12", "--trace", "x.html", *flags])
    _, data = page_of(tmp_path / "x.html", runs)
    toy, *sources = data["sources"]
    assert toy == json.loads(json.dumps(TOY))
    assert [(source["row"], source["run"]) for source in sources] == [(row, run) for row in range(3) for run in (0, 1)]
    for source in sources:
        generation = runs[source["run"]]
        prompt, ids = generation.prompts[source["row"]], generation.ids[source["row"]]
        exact = measure(model, [(prompt + ids[:-1], 0 if flags else len(prompt))], -1)
        assert len(exact) == len(ids) - 1 + len(prompt) * bool(flags)  # one row per token with token_index 0 and more
        torch.testing.assert_close(torch.tensor(source["cosines"]) / SCALE, exact, rtol=0, atol=0.51 / SCALE)
        assert source["settings"]["cold_e"] == 5 and source["command"].endswith("--ckpt tiny.gguf")


def test_another_policy_is_asked_about_with_settings_of_algorithm_1(tmp_path, model):
    _, data = page_of(tmp_path / "x.html", generations(model, find_policy("random", model, skip=0.5, warm_up_index=3)))
    settings = FFNSkip(**data["sources"][1]["settings"])
    settings.check(6)
    assert settings.warm_up_index == 3


def test_where_two_texts_part_the_page_knows_what_either_would_have_said(tmp_path, model):
    runs = generations(model, dense, SKIP)
    _, data = page_of(tmp_path / "x.html", runs)
    parted = 0
    for row, difference in enumerate(data["differences"]):
        a, b = (run.ids[row] for run in runs)
        if difference is None:
            assert a == b
            continue
        at = difference["at"]
        assert a[:at] == b[:at] and a[at] != b[at]
        for run, words in zip(runs, difference["top"]):
            token = run.ids[row][at]
            assert words[0][0] == (chr(token) if token else "[0]") and len(words) == 5
            chances = [chance for _, chance in words]
            assert chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1.001
        parted += 1
    assert parted


def test_several_processes_write_a_page_without_a_second_look(tmp_path, model, monkeypatch):
    """Of which only the first comes here, so that a pass of the model would wait for the others."""
    runs = generations(model, dense, SKIP)
    monkeypatch.setattr(trace_page.parallel, "size", 2)
    _, data = page_of(tmp_path / "x.html", runs)
    assert len(data["sources"]) == 1 and any(data["differences"]) and len(data["runs"]) == 2


# --- the shipped page -------------------------------------------------------------------------------------------------


def test_the_shipped_page_is_the_template_with_its_data():
    text = (ROOT / "docs" / "explore.html").read_text(encoding="utf-8")
    before, after = TEMPLATE.split(trace_page.PLACE)
    assert text.startswith(before) and text.endswith(after), "python experiments/explore.py builds docs/explore.html"
    assert len(text.encode()) < 400_000


def test_the_lines_are_those_of_the_paper_and_of_skip_py():
    assert SHIPPED["lines"] == printed_lines()
    printed = [line for line in printed_lines() if not re.match(r" *\((?!token_index)", line)]
    assert re.sub(r"\s", "", "".join(printed)) == re.sub(r"\s", "", ALGORITHM_1)


def test_the_shipped_cosines_are_the_recorded_ones():
    golden = numpy.load(ROOT / "tests" / "golden" / "cosines.npz")
    for source, name in zip(SHIPPED["sources"], ["llama-2-7b.c4", "llama-2-13b.c4"]):
        assert source["name"].startswith(source["model"]) and name.startswith(source["model"]) and not source["counted"]
        thousandths = golden[name].astype(int)
        if name == "llama-2-13b.c4":
            assert (thousandths[::2] == thousandths[1::2]).all()  # the log holds each token twice
            thousandths = thousandths[::2]
        assert (numpy.array(source["cosines"]) == thousandths * (SCALE // 1000)).all()
        assert f"{len(thousandths)} tokens" in source["name"] and f"{len(thousandths)} tokens" in source["about"]
    assert SHIPPED["sources"][2] == json.loads(json.dumps(TOY)) and len(SHIPPED["sources"]) == 5


def test_the_shipped_run_has_one_threshold_as_the_paper_has():
    dense_run, run = SHIPPED["runs"]
    assert dense_run["settings"] is None and run["settings"]["k"] is None and len(set(run["thresholds"])) == 1
    assert run["ffn_skip_ratio"] > 0.05 and SHIPPED["differences"][0]["at"] > 25


# --- the page at work -------------------------------------------------------------------------------------------------


def in_node(script, tmp_path):
    """What the script prints, after the page's logic alone."""
    if shutil.which("node") is None:
        pytest.skip("no browser, nor node")
    logic = re.search('<script id="logic">(.*?)</script>', TEMPLATE, re.DOTALL)[1]
    (tmp_path / "run.js").write_text(f"{logic}\nconsole.log(JSON.stringify((() => {{ {script} }})()));")
    done = subprocess.run(["node", tmp_path / "run.js"], capture_output=True, encoding="utf-8", timeout=120)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def in_browser(script, tmp_path, page=ROOT / "docs" / "explore.html"):
    """What the script returns within a page, as a browser runs it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no browser")
    path = tmp_path / "tried.html"
    answer = f"<script>const answer = (() => {{ {script} }})();</script>"
    answer += '<script>document.body.innerHTML = "<p id=data></p>"; '
    answer += 'document.getElementById("data").innerText = JSON.stringify(answer);</script>'
    path.write_text(page.read_text(encoding="utf-8") + answer, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--window-size=1024,768"]
    command = [browser, *flags, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    return json.loads(Page(done.stdout).data)


ENGINES = dict(node=in_node, browser=in_browser)


def drawn_settings(source, random):
    """FFNSkip's settings for a source; every third threshold is a cosine of the source itself."""
    n_layers = len(source["cosines"][0])
    cold_s = random.randint(0, n_layers)
    cold_e = random.randint(cold_s, n_layers)
    recorded = random.choice(random.choice(source["cosines"])) / SCALE
    threshold = random.choice([recorded, round(random.uniform(0.85, 1), 3), math.inf, -1.0, recorded])
    if random.random() < 0.3:
        threshold = [round(random.uniform(0.9, 1), 4) for _ in range(n_layers)]
    k = random.choice([None, 1, 2, 3, random.randint(1, n_layers)])
    return FFNSkip(cold_s, cold_e, threshold, random.randint(-1, 30), k, random.random() < 0.6)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_replays_as_the_project_does_to_the_last_block(engine, tmp_path):
    draw, sources, cases, expected = random.Random(0), SHIPPED["sources"], [], []
    cosines = [torch.tensor(source["cosines"], dtype=torch.float64) / SCALE for source in sources]
    for _ in range(200):
        i = draw.randrange(len(sources))
        policy = drawn_settings(sources[i], draw)
        past = cosines[i][policy.warm_up_index + 1 :] if sources[i]["counted"] else cosines[i]
        settings = json.loads(trace_page.common.to_json(vars(policy)))
        if isinstance(policy.sim_threshold, list):  # which the page's slider moves together, as --skip does
            settings["shift"] = round(draw.uniform(-0.02, 0.02), 3)
            policy = shifted(policy, settings["shift"])
        expected.append([replay(past, policy) if len(past) else None, past.numel()])
        cases.append([i, settings])
    script = f"""
        const sources = {json.dumps(sources)}.map(source => prepare(source, {SCALE}));
        return {json.dumps(cases)}.map(([i, settings]) => {{
            const {{skipped, blocks}} = replay(sources[i], settings);
            return [blocks ? skipped / blocks : null, blocks];
        }});"""
    assert ENGINES[engine](script, tmp_path) == expected
    ratios = [ratio for ratio, _ in expected if ratio]
    assert len(ratios) > 90 and len(set(ratios)) > 70


def test_each_block_is_what_skip_py_makes_of_it(tmp_path):
    """Over LLaMA-2-7B's cosines, at thresholds between them: skip.py here walks over angles, which round."""
    source, draw = SHIPPED["sources"][0] | dict(counted=True), random.Random(1)
    cosines, cases, expected = torch.tensor(source["cosines"]) / SCALE, [], []
    for full_every in None, 4, None, 3:
        threshold = draw.randrange(900, 970) / 1000 + 0.0005
        policy = FFNSkip(4, 29, threshold, 20, draw.choice([None, 1, 2, 5]), draw.random() < 0.5, full_every)
        expected.append((~walk(policy, cosines.T, list(range(len(cosines)))).ran[:, 0].T).int().flatten().tolist())
        cases.append(vars(policy))
    script = f"""
        const source = prepare({json.dumps(source)}, {SCALE});
        const skips = settings => Array.from(replay(source, settings).states, one => Number(one === SKIPPED));
        return {json.dumps(cases)}.map(skips);"""
    assert in_node(script, tmp_path) == expected and sum(map(sum, expected)) > 1000


def test_stepping_leaves_what_the_replay_leaves_and_lights_every_line(tmp_path):
    """For each token of the toy, and some of the others, under several settings; the states as the steps tell them."""
    script = f"""
        const lines = {json.dumps(SHIPPED["lines"])}, wrong = [], lit = new Set();
        for (const given of {json.dumps(SHIPPED["sources"])}) {{
            const source = prepare(given, {SCALE}), n = source.n_layers;
            const cases = [[null, true, null], [1, true, null], [2, false, null], [3, true, 5]];
            for (const [k, recheck, full_every] of cases) {{
                const settings = {{...source.settings, k, recheck, full_every}}, {{states}} = replay(source, settings);
                const codes = {{skipped: SKIPPED, cold: COLD, ffn: RAN, cosine: COMPARED, reached: REACHED}};
                for (let token = 0; token < Math.min(60, source.n_tokens); token++) {{
                    const told = Array(n).fill(-1), seen = Array(n).fill(false);
                    for (const {{line, layer, part}} of walk(source, settings, token, lines)) {{
                        lit.add(line);
                        if (k === null && lines[line].includes("3.2")) wrong.push([source.name, "no k", token]);
                        if (part === "attention") seen[layer] = true;
                        if (part in codes) told[layer] = codes[part];
                        if (part === "full") {{ told.fill(FULL); seen.fill(true); }}
                    }}
                    const is = states.slice(token * n, token * n + n).join();
                    if (told.join() !== is || seen.includes(false)) wrong.push([source.name, k, token, told, is]);
                }}
            }}
        }}
        return {{wrong, dark: lines.filter((_, line) => !lit.has(line))}};"""
    found = in_node(script, tmp_path)
    assert found["wrong"] == []
    assert [line.strip() for line in found["dark"]] == [
        "(token_index, input_state)", "else", "(token_index, input_state, cold_s, cold_e)",
        "def generate_with_skip_model", "(token_index, input_state, cold_s, cold_e):",
        "(None: skip up to cold_e)", "else",
    ]  # fmt: skip


def table_of(token, run, dense_cosines):
    """The table that the browser is to show of a token: layer, attention, block, value, against the threshold."""
    rows = []
    for layer in range(6) if "skipped" in token else []:
        cold = not run["cold_s"] <= layer < run["cold_e"]
        state = "skipped" if layer in token["skipped"] else "cold" if cold else "run"
        value, threshold, sign = token.get("values", [None] * 6)[layer], run["thresholds"][layer], ""
        if value is not None:
            sign = "≥ " if value >= float(threshold) else "< "
        text = "" if cold or threshold is None else threshold if threshold == "inf" else f"{threshold:.4f}"
        shown = "" if value is None else f"{value:.4f}"
        if value is None and token["index"] >= 0:
            shown = f"({dense_cosines[token['index']][layer] / SCALE:.4f})"
        rows.append([str(layer), "run", state, shown, (sign + text).strip()])
    return rows


COMPARE = """
    open("compare");
    const focus = HTMLElement.prototype.focus;
    HTMLElement.prototype.focus = function () {  // a window that is not active yet moves its focus and tells nobody
        focus.call(this);
        if (!document.hasFocus()) this.dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
    };
    document.querySelectorAll("details").forEach(one => one.open = true);
    const words = [...document.querySelectorAll(".text span")], panels = [], ways = [];
    for (const word of words) {
        word.focus();
        const rows = [...document.querySelectorAll("#layers tr")].slice(1);
        const cells = rows.map(row => [...row.cells].map(cell => cell.innerText.trim()));
        panels.push({which: byId("which").innerText, rows: cells, token: word.token, run: data.runs.indexOf(word.run),
                     row: word.row, ties: document.querySelectorAll("#layers .silences").length});
    }
    const first = words.findIndex(word => !word.token.prompt);
    words[first].focus();
    for (const key of ["ArrowLeft", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowDown", "Home"]) {
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        ways.push(words.indexOf(shown) - first);
    }
    words[first + 5].dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
    ways.push(words.indexOf(shown) - first);
    const marked = [...document.querySelectorAll(".first")].map(word => [data.runs.indexOf(word.run), word.row,
                    [...word.parentNode.children].indexOf(word)]);
    return {panels, ways, marked, tops: byId("texts").innerText.includes("part at")};
"""


def test_a_browser_shows_the_recorded_layers_of_each_token(tmp_path, model):
    path, runs = tmp_path / "x.html", generations(model, dense, SKIP)
    reached = runs[1].trace.cosine[3].nan_to_num(-1).max().item()  # by the very same number
    runs[1].policy = replace(SKIP, sim_threshold=[*THRESHOLDS[:3], reached, *THRESHOLDS[4:]])
    _, data = page_of(path, runs)
    found = in_browser(COMPARE, tmp_path, path)
    cosines = {(source["run"], source["row"]): source["cosines"] for source in data["sources"]}
    skips = 0
    for panel in found["panels"]:
        run, token = data["runs"][panel["run"]], panel["token"]
        assert f" in {run['name']}" in panel["which"]
        assert panel["rows"] == table_of(token, run, cosines[panel["run"], panel["row"]]), panel
        ties = 0
        for layer in token.get("skipped", []):
            ties += layer - 1 not in token["skipped"] and token["values"][layer - 1] is not None
        assert panel["ties"] == ties
        skips += ties
    assert skips and len(found["panels"]) == sum(len(run["texts"][row]) for run in data["runs"] for row in range(3)) - \
        sum(map(len, runs[0].prompts))  # the prompt stands there once
    last = len(runs[0].ids[0]) - 1
    assert found["ways"] == [0, 1, 2, 1, last, last, 0, 5]
    parted = [(row, one["at"]) for row, one in enumerate(data["differences"]) if one]
    assert found["marked"] == [[run, row, at] for row, at in parted for run in (0, 1)] and parted and found["tops"]


WORK = """
    const told = {};
    const key = (id, key) => byId(id).dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    open("ask");
    told.ask = byId("skipped").innerText;
    byId("sim_threshold").value = "0.94";
    byId("sim_threshold").dispatchEvent(new Event("input"));
    draw();
    told.moved = byId("skipped").innerText;
    byId("k").value = 2;
    byId("k").dispatchEvent(new Event("input"));
    byId("cold_s").value = 31;
    byId("cold_s").dispatchEvent(new Event("input"));
    draw();
    told.json = byId("json").value;
    told.command = byId("command").value;
    ["End", "ArrowLeft", "ArrowLeft", "PageUp", "ArrowRight"].forEach(name => key("grid", name));
    draw();
    told.token = byId("grid").getAttribute("aria-valuenow");
    setSource(2);
    open("step");
    told.steps = [];
    byId("next-token").click();
    for (const id of ["next", "next-layer", "next-layer", "next-layer", "next-token", "back"]) {
        byId(id).click();
        told.steps.push([byId("code").querySelector(".lit").innerText.trim(), byId("which").innerText.split(":")[0]]);
    }
    setSource(4);
    open("ask");
    told.measured = byId("measured").innerText;
    told.wide = document.documentElement.scrollWidth - innerWidth;
    return told;
"""


def test_a_browser_moves_the_sliders_and_steps(tmp_path):
    found = in_browser(WORK, tmp_path)
    seven, demo, run = SHIPPED["sources"][0], SHIPPED["sources"][4], SHIPPED["runs"][1]
    cosines = torch.tensor(seven["cosines"], dtype=torch.float64) / SCALE
    settings = FFNSkip(**seven["settings"])
    for name, threshold in ("ask", settings.sim_threshold), ("moved", 0.94):
        share = replay(cosines, replace(settings, sim_threshold=threshold))
        bound = seven["bytes"]["all"] / (seven["bytes"]["all"] - share * seven["bytes"]["feed_forward"])
        assert found[name] == (f"{share:.1%} of the FFN blocks skipped past the warm-up; decoding at most {bound:.2f} "
                               "times as fast, by bytes read.")
    (tmp_path / "settings.json").write_text(found["json"])
    kept = load_settings(tmp_path / "settings.json", "llama-2-7b", 32)
    assert FFNSkip(**kept) == replace(settings, sim_threshold=0.94, k=2, cold_s=31, cold_e=31)
    options = parse_args(found["command"].removeprefix("python generate.py ").replace('"', "").split())
    assert options.ckpt == "llama-2-7b" and options.skip_config == "settings.json"
    assert found["token"] == str(279 - 1 - 2 - 10 + 1)
    assert found["steps"] == [
        ["generate_with_skip_model", "Token 1"], ["for <0 ... cold_s> do", "Token 1"],
        ["for <cold_s ... cold_e> do", "Token 1"], ["for <cold_s ... cold_e> do", "Token 1"],
        ["if token_index <= warm_up_index then", "Token 2"], ["if token_index <= warm_up_index then", "Token 2"],
    ]  # fmt: skip
    past = torch.tensor(demo["cosines"], dtype=torch.float64)[run["warm_up_index"] + 1 :] / SCALE
    predicted = replay(past, FFNSkip(**demo["settings"]))
    assert f"{predicted:.1%}" in found["measured"] and f"{run['ffn_skip_ratio']:.1%} were measured" in found["measured"]
    assert found["wide"] <= 0


def test_explore_builds_the_page_and_says_what_it_cannot_read(tmp_path, model, capsys):
    page_of(tmp_path / "run.html", generations(model, dense, SKIP))
    (tmp_path / "llama-2-7b.c4.csv").write_text("".join(",".join(["0.95"] * 32) + "\n" for _ in range(3)))
    names = "run.html", "llama-2-7b.c4.csv", "--out", "e.html"
    explore.main([name if name == "--out" else str(tmp_path / name) for name in names])
    page = explore.read_page(tmp_path / "e.html")
    assert page["sources"][0]["cosines"] == [[9500] * 32] * 3 and page["sources"][0]["bytes"]["all"] > 2**33
    assert len(page["sources"]) == 8 and page["tab"] == "ask"
    with pytest.raises(ValueError, match="no page that generate.py"):
        explore.read_page(ROOT / "LICENSE")
    with pytest.raises(ValueError, match="begins with no model"):
        explore.recorded(tmp_path / "mine.csv")


# --- what the pages beside it say -------------------------------------------------------------------------------------


def table_rows(name, heading):
    """{first cell: the other cells} of the first table below a heading, or other words, of a page in docs/."""
    table = (ROOT / "docs" / name).read_text().split(heading)[1].split("\n\n|")[1].split("\n\n")[0]
    rows = {}
    for line in table.splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[first] = cells
    return rows


def test_the_walkthroughs_toy_is_the_pages_and_is_done_as_skip_py_does_it():
    rows = table_rows("walkthrough.md", "## Six layers by hand")
    cosines = [float(cell) for cell in rows["cosine"]]
    assert [round(one * SCALE) for one in cosines] == TOY["cosines"][1]
    for name, k in {"as printed": None, "k = 1": 1, "k = 2": 2}.items():
        policy = replace(FFNSkip(**TOY["settings"]), k=k)
        ran = walk(policy, torch.tensor(cosines)[:, None], [1]).ran[:, 0, 0].tolist()
        cold = ["cold" if layer in (0, 5) else "run" for layer in range(6)]
        assert rows[name] == [one if runs else "skipped" for one, runs in zip(cold, ran)]


def test_the_numbers_that_the_walkthrough_and_the_lesson_name_are_those_of_the_page():
    seven, demo, run = SHIPPED["sources"][0], SHIPPED["sources"][4], SHIPPED["runs"][1]
    text = " ".join((ROOT / "docs" / "walkthrough.md").read_text().split())
    cosines = torch.tensor(seven["cosines"], dtype=torch.float64) / SCALE

    def share(threshold, k=None):
        return replay(cosines, replace(FFNSkip(**seven["settings"]), sim_threshold=threshold, k=k))

    assert f"at 0.97 {share(0.97):.1%} of all FFN blocks are skipped, at 0.95 {share(0.95):.1%}" in text
    assert f"{share(0.959):.0%} {share(0.909, 1):.0%}" == "25% 25%"
    lesson = (ROOT / "docs" / "lesson.md").read_text()
    assert "threshold for 25% (0.959), then does it with `k` 1 (0.909)" in lesson
    past = torch.tensor(demo["cosines"], dtype=torch.float64)[run["warm_up_index"] + 1 :] / SCALE
    predicted = replay(past, FFNSkip(**demo["settings"]))
    assert f"it predicts {predicted:.1%} and {run['ffn_skip_ratio']:.1%} were measured" in text
    (first, chance), (other, its) = SHIPPED["differences"][0]["top"][0][0], SHIPPED["differences"][0]["top"][1][0]
    held = f'at generated token {SHIPPED["differences"][0]["at"]}: the dense model held "{first.strip()}" for likeliest'
    assert f'{held} ({chance:.1%}), the skipping one "{other.strip()}" ({its:.1%})' in text
    (paris,) = [token for token in run["texts"][0] if token.get("index") == 28]
    assert (paris["text"], paris["values"][12], paris["skipped"]) == (" Paris", 0.9866, list(range(13, 20)))
