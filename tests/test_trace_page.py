"""trace_page.py: the page holds what the trace holds, whatever the text is, and shows it in a browser."""

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from tiny import Bytes, tiny_model

from generate import parse_args, start
from model import dense
from policies import find_policy
from skip import FFNSkip
from support.trace_page import write_page

PROMPTS = ["Once </script><script>document.body.remove()</script> <!--", "\"&'\\ \n\t", "a"]
THRESHOLDS = [0.9, 0.7, float("inf"), 0.5, 0.9, 0.9]
SKIP = FFNSkip(1, 5, THRESHOLDS, warm_up_index=1, k=1)
BROWSERS = "chromium", "chromium-browser", "google-chrome"


class Page(HTMLParser):
    """What stands in a page: its elements, as (tag, attributes), and the text of its last script with an id."""

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
    write_page(path, runs, prompts)
    page = Page(path.read_text(encoding="utf-8"))
    return page, json.loads(page.data, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


def test_the_page_holds_the_trace_of_each_run(tmp_path, model):
    runs = generations(model, dense, SKIP)
    _, data = page_of(tmp_path / "x.html", runs)
    assert data["prompts"] == PROMPTS and [run["name"] for run in data["runs"]] == ["function", "FFNSkip"]
    assert "values" not in data["runs"][0]["texts"][0][0] and data["runs"][0]["mean"] == [None] * 6
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
                torch.testing.assert_close(torch.tensor(values), trace.cosine[:, row, column], equal_nan=True)
                skipped += len(token["skipped"])
    assert skipped > 5


def test_the_page_knows_the_settings_of_a_policy_where_it_has_some(tmp_path, model):
    (run,) = page_of(tmp_path / "x.html", generations(model, SKIP))[1]["runs"]
    assert (run["cold_s"], run["cold_e"], run["warm_up_index"], run["label"]) == (1, 5, 1, "cosine")
    assert run["thresholds"] == [0.9, 0.7, "inf", 0.5, 0.9, 0.9] and run["mean"][0] is None and run["mean"][1] < 1
    other = find_policy("random", model, skip=0.5, warm_up_index=3)
    (run,) = page_of(tmp_path / "x.html", generations(model, other))[1]["runs"]
    assert (run["cold_s"], run["cold_e"], run["warm_up_index"], run["label"]) == (0, 6, 3, "value")
    assert run["thresholds"] == [None] * 6


def test_a_run_that_was_interrupted_in_its_first_pass_has_no_layers(tmp_path, model):
    runs = generations(model, dense) + generations(model, SKIP, arguments=["--max-new-tokens", "1", "--trace", "x"])
    runs[1].ids, runs[1].pieces = [[] for _ in PROMPTS], [[""] for _ in PROMPTS]
    _, data = page_of(tmp_path / "x.html", runs)
    for tokens, prompt in zip(data["runs"][1]["texts"], PROMPTS):
        assert "".join(token["text"] for token in tokens) == prompt
        assert not any("skipped" in token for token in tokens)


def test_a_character_of_several_tokens_is_the_text_of_its_last(tmp_path):
    (run,) = generations(tiny_model(vocab_size=256), dense, prompts=["é€œ"])
    _, data = page_of(tmp_path / "x.html", [run], ["é€œ"])
    texts = [token["text"] for token in data["runs"][0]["texts"][0]]
    assert texts[:7] == ["", "é", "", "", "€", "", "œ"] and "".join(texts[7:]) == "".join(run.pieces[0])


def test_the_page_is_self_contained_whatever_the_text_is(tmp_path, model):
    page, _ = page_of(tmp_path / "x.html", generations(model, dense, SKIP))
    assert [tag for tag, _ in page.elements].count("script") == 2  # the data and the program, and none of the prompt's
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe") and not {"src", "href"} & set(attributes)
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert not any(word in text for word in ("http://", "https://", "@import", "url(", "fetch(", "import("))


# Run in the browser: what the panel shows of each token, and to which tokens keys and pointer lead from the first.
IN_BROWSER = """<script>
const focus = HTMLElement.prototype.focus;
HTMLElement.prototype.focus = function () {  // a window that is not active yet moves its focus and tells nobody
  focus.call(this);
  if (!document.hasFocus()) this.dispatchEvent(new FocusEvent("focusin", {bubbles: true}));
};
const tokens = [...document.querySelectorAll(".text span")], panels = [], ways = [];
for (const token of tokens) {
  token.focus();
  const rows = [...document.querySelectorAll("#layers tr")].map(row => [...row.cells].map(cell => cell.innerText));
  panels.push({which: byId("which").innerText, rows, dots: document.querySelectorAll("circle").length});
}
tokens[0].focus();
for (const key of ["ArrowLeft", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowDown", "Home"]) {
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  ways.push(tokens.indexOf(shown));
}
tokens[5].dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
ways.push(tokens.indexOf(shown));
document.body.innerHTML = "<p id=data></p>";
byId("data").innerText = JSON.stringify({panels, ways});
</script>"""


def rows_of(token, run):
    """The table that the browser is to show of a token: layer, state, value, threshold."""
    rows = [["layer", "FFN", run["label"], "threshold"]] if "skipped" in token else []
    for layer in range(6) if rows else []:
        cold = not run["cold_s"] <= layer < run["cold_e"]
        state = "skipped" if layer in token["skipped"] else "cold" if cold else "run"
        value, threshold, sign = token.get("values", [None] * 6)[layer], run["thresholds"][layer], ""
        if value is not None:
            sign = "≥ " if value >= float(threshold) else "< "
        shown = "" if cold or threshold is None else threshold if threshold == "inf" else f"{threshold:.4f}"
        rows.append([str(layer), state, "" if value is None else f"{value:.4f}", sign + shown])
    return rows


def test_a_browser_shows_the_layers_of_each_token(tmp_path, model):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no browser")
    path, runs = tmp_path / "x.html", generations(model, dense, SKIP)
    reached = runs[1].trace.cosine[1].nan_to_num(-1).max().item()  # by the very same number
    runs[1].policy = replace(SKIP, sim_threshold=[0.9, reached, *THRESHOLDS[2:]])
    _, data = page_of(path, runs)
    path.write_text(path.read_text(encoding="utf-8") + IN_BROWSER, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom", path.as_uri()]
    dom = subprocess.run([browser, *flags], capture_output=True, encoding="utf-8", timeout=120).stdout
    found = json.loads(Page(dom).data)
    panels = iter(found["panels"])
    for row in range(len(PROMPTS)):
        for run in data["runs"]:
            for token in run["texts"][row]:
                panel = next(panels)
                assert panel["which"].endswith(f" in {run['name']}") and panel["rows"] == rows_of(token, run)
                assert panel["dots"] == sum(value is not None for value in token.get("values", []))
    assert next(panels, None) is None
    last = len(data["runs"][0]["texts"][0]) - 1
    assert found["ways"] == [0, 1, 2, 1, last, last, 0, 5]
