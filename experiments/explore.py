"""
Build docs/explore.html, the page of a run of generate.py with the recorded cosines of other models before it:

    python generate.py --chat --dtype float32 --compare --cold-s 12 --cold-e 20 --sim-threshold 0.98 --k 0 \
        --max-new-tokens 128 --trace out/run.html "What are the most famous sights of Paris?"
    python experiments/explore.py out/run.html llama-2-7b.c4.csv llama-2-13b.c4.csv

A CSV of cosines has one row per token and one column per layer, and begins with the name of a model in config/.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)
import torch

from bench import SIZES
from model import ModelArgs, Transformer
from support import common
from support.measuring import read_cosines
from support.trace_page import printed_lines, whole_numbers, write_data

FIELDS = "cold_s", "cold_e", "sim_threshold", "warm_up_index", "k", "recheck", "full_every"


def read_page(path):
    """The data in a page that generate.py --trace has written. Raises ValueError."""
    found = re.search('id="data">(.*?)</script>', common.read_utf8(path), re.DOTALL)
    if found is None:
        raise ValueError(f"{path}: no page that generate.py --trace FILE.html has written")
    return json.loads(found[1])


def recorded(path):
    """A source of the page: the cosines in a CSV, and what config/ has for the model that its name begins with."""
    model, corpus = path.stem.split(".", 1) if "." in path.stem else (path.stem, "a text")
    file, size = ROOT / "config" / f"{model}.json", model.rpartition("-")[2].upper()
    if not file.exists() or size not in SIZES:
        raise ValueError(f"{path}: its name begins with no model of LLaMA-2's in config/")
    cosines, settings = read_cosines(path), common.read_json(file)
    if torch.equal(cosines[::2], cosines[1::2]):
        cosines = cosines[::2]  # the log of LLaMA-2-13B holds each token twice
    with torch.device("meta"):
        weights = common.weight_bytes(Transformer(ModelArgs(**SIZES[size])))
    about = (f"Cosines of {len(cosines)} tokens after prompts of {corpus.upper()}, logged by the paper's authors. The "
             "log does not say where a text begins, so all count as past the warm-up.")
    source = dict(name=f"{model}, {len(cosines)} tokens", model=model, about=about, counted=False, run=None, row=None)
    source["bytes"] = dict(all=sum(weights.values()), feed_forward=weights["feed_forward"])
    settings = {name: settings[name] for name in FIELDS}
    settings["sim_threshold"] = round(settings["sim_threshold"], 3)  # as the page's slider has it
    source |= dict(command=f"python generate.py --ckpt {model}", settings=settings)
    return source | dict(cosines=whole_numbers(cosines))


def parse_args(argv):
    parser = common.Parser(__doc__)
    parser.add_argument("page", type=Path, help="the page of a run, by generate.py --trace")
    parser.add_argument("cosines", nargs="+", type=Path, help="CSVs, as calibrate.py --save-cosines writes them too")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "explore.html", metavar="FILE")
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_args(argv)
    page = read_page(options.page)
    sources = [recorded(path) for path in options.cosines]
    page |= dict(tab="ask", source=0, sources=sources + page["sources"], lines=printed_lines())
    for source in page["sources"][len(sources) :]:  # a run's place in the list does not change
        source["name"] = source["name"].replace("smollm2-135m-instruct", "demo model")
    write_data(options.out, page)
    print(options.out)


if __name__ == "__main__":
    common.run_command(main)
