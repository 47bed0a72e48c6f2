"""
What was skipped, as one self-contained web page: trace_page.html with runs of generate.py in it, and with cosines over
which the page replays Algorithm 1. docs/explore.html is the same page, built by experiments/explore.py.
"""

import re
from dataclasses import asdict
from pathlib import Path

from fast import parallel
from skip import FFNSkip
from support import common
from support.measuring import cold_regions, measure
from support.tokenizer import TextStream

PLACE = "PAGE_AS_JSON"  # where the data goes in trace_page.html
SCALE = 10_000  # the page replays cosines that are rounded to whole numbers of 1 / SCALE, which are shorter
TOY = dict(
    name="a toy of six layers", about="Cosines made up by hand, for the walkthrough.", model=None, bytes=None,
    command="python generate.py", counted=True, run=None, row=None,
    settings=asdict(FFNSkip(cold_s=1, cold_e=5, sim_threshold=0.95, warm_up_index=0)),
    cosines=[[1000, 9000, 9600, 9700, 9400, 5000], [1000, 9000, 9600, 9700, 9400, 5000],
             [1200, 9600, 9300, 9500, 9600, 5200], [800, 8900, 9200, 9300, 9400, 4800]],
)  # fmt: skip


def write_page(path, generations, prompts, model_name, command, ckpt=None):
    """
    Write the runs, a list of generate.Generation, side by side as an HTML page. `prompts` are headings, one text per
    prompt, and `command` is what made the page from `ckpt`. The dense model reads each text once more, for its cosines;
    not in several processes, of which one alone writes the page. Raises ValueError where the file cannot be written.
    """
    sources = [TOY]
    if parallel.size == 1:
        for row, prompt in enumerate(prompts):
            for run, generation in enumerate(generations):
                where = f"{model_name}, the text of {generation.name}: {prompt}"
                source = describe_source(generations, run, row, ckpt)
                if source:
                    sources.append(source | dict(name=where, model=model_name))
    runs = [describe_run(generation) for generation in generations]
    differences = [first_words(generations, row) for row in range(len(prompts))]
    page = dict(tab="compare", source=len(sources) - 1, lines=printed_lines(), scale=SCALE, sources=sources)
    page |= dict(model=model_name, made_by=command, prompts=prompts, runs=runs, differences=differences)
    write_data(path, page)


def write_data(path, page):
    """Write the HTML page that shows `page`, a dict of what JSON knows. Raises ValueError."""
    data = common.to_json(page, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # "</script>" in a text would end the element that holds the data
    template = common.read_utf8(Path(__file__).with_name("trace_page.html"))
    common.write_whole(path, template.replace(PLACE, data))


def printed_lines():
    """The lines of Algorithm 1, indented as in the column at the right of skip.py."""
    return re.findall("^.{72}# (.+)$", common.read_utf8(common.HERE / "skip.py"), re.MULTILINE)


def whole_numbers(cosines):
    """(tokens, n_layers) as lists of whole numbers, in units of 1 / SCALE."""
    return (cosines.double() * SCALE).round().long().tolist()


def read_ids(generation, row):
    """The ids that the model has read, without the last, which is written only; and how many of them are prompt."""
    trace, prompts = generation.trace, generation.prompts
    padding = max(map(len, prompts)) - len(prompts[row])
    return prompts[row] + generation.ids[row][:-1], -trace.token_index[row, padding].item()


def describe_source(generations, run, row, ckpt):
    """The cosines of the dense model over a text, for the page to replay; None if nothing was generated from."""
    generation = generations[run]
    if not generation.ids[row]:
        return None  # interrupted within the first pass
    ids, prompt_len = read_ids(generation, row)
    if len(ids) == prompt_len:
        return None
    model = generation.model
    cosines = measure(model, [(ids, prompt_len)], warm_up_index=-1)  # (tokens, n_layers)
    cold_s, cold_e = cold_regions(cosines.mean(0))
    threshold = round(cosines[:, cold_s:cold_e].mean().item(), 3)
    settings = FFNSkip(cold_s, cold_e, threshold, getattr(generation.policy, "warm_up_index", 25))
    for other in generations:  # Algorithm 1's own settings, also over the text of the dense model
        if isinstance(other.policy, FFNSkip):
            settings = other.policy
    command = f"python generate.py --ckpt {ckpt}" if ckpt else "python generate.py"
    about = "Cosines of the dense model, which read this text once more."
    weights = common.weight_bytes(model)
    weights = dict(all=sum(weights.values()), feed_forward=weights["feed_forward"])
    source = dict(about=about, command=command, bytes=weights, settings=asdict(settings), counted=True)
    return source | dict(run=run, row=row, cosines=whole_numbers(cosines))


def first_words(generations, row):
    """
    Where the texts of two runs part: dict(at=, top=), the token's index among those generated, and per run the five
    [text, probability] that it held for likeliest there. None if they do not part.
    """
    if len(generations) != 2:
        return None
    a, b = generations[0].ids[row], generations[1].ids[row]
    at, top = common.first_difference(a, b), []
    if at == min(len(a), len(b)):
        return None
    for generation in generations:
        words = []
        for token, chance in generation.trace.likeliest[at][row]:
            stream = TextStream(generation.tokenizer, generation.prompts[row] + generation.ids[row][:at])
            words.append([stream.add(token) + stream.rest() or f"[{token}]", round(chance, 4)])
        top.append(words)
    return dict(at=at, top=top)


def describe_run(generation):
    """
    What the page shows of one run, as a dict. A policy's cold layers and thresholds are known where it has FFNSkip's
    cold_s, cold_e and thresholds(n_layers). What another policy leaves in trace.cosine is called what its attribute
    `measures` says, or else "value"; `most` is its cap of skipped blocks per token, `also_skips` what else a skip
    leaves out.
    """
    policy, n_layers = generation.policy, generation.model.args.n_layers
    warm_up_index = getattr(policy, "warm_up_index", -1)
    ran = cosine = token_index = None
    if any(generation.ids):  # else it was interrupted within its first pass, whose record is not complete
        ran, cosine, token_index = generation.trace.ran, generation.trace.cosine, generation.trace.token_index
    thresholds = [None] * n_layers
    if hasattr(policy, "thresholds"):
        thresholds = policy.thresholds(n_layers)
    printed, label = isinstance(policy, FFNSkip), "cosine"
    if not printed and cosine is not None and not cosine.isnan().all():
        label = getattr(policy, "measures", "value")
    run = dict(
        name=generation.name,
        settings=asdict(policy) if printed else None,
        ffn_skip_ratio=generation.trace.ffn_skip_ratio(warm_up_index),
        n_layers=n_layers,
        cold_s=getattr(policy, "cold_s", 0),
        cold_e=getattr(policy, "cold_e", n_layers),
        warm_up_index=warm_up_index,
        label=label,
        thresholds=thresholds,
        most=getattr(policy, "most", None) if hasattr(policy, "measures") else None,
        skips_attention=any(name.startswith("attention") for name in getattr(policy, "also_skips", ())),
    )
    rows = range(len(generation.prompts))
    run["texts"] = [describe_text(generation, row, ran, cosine, token_index, thresholds) for row in rows]
    return run


def describe_text(generation, row, ran, cosine, token_index, thresholds):
    """One dict per token of a prompt and its answer. Those that the model has not read have no index and no layers."""
    prompt, ids = generation.prompts[row], generation.ids[row]
    padding = max(map(len, generation.prompts)) - len(prompt)
    n_read = len(prompt) + len(ids) - 1 if ids else 0  # the last token is written, and never read
    stream = TextStream(generation.tokenizer, [])
    pieces = [stream.add(token) for token in prompt]
    pieces[-1] += stream.rest()
    pieces += generation.pieces[row]
    tokens = []
    for position, (token, text) in enumerate(zip(prompt + ids, pieces)):
        described = dict(id=token, text=text, prompt=position < len(prompt))
        if position < n_read:
            column = padding + position
            described["index"] = token_index[row, column].item()
            described["skipped"] = (~ran[:, row, column]).nonzero().flatten().tolist()
            values = cosine[:, row, column]
            if not values.isnan().all():
                described["values"] = [shorten(*pair) for pair in zip(values.tolist(), thresholds)]
        tokens.append(described)
    tokens[-1]["text"] += "".join(pieces[len(tokens) :])  # which Generation.finish has found
    return tokens


def shorten(value, threshold):
    """A number of at least four digits, and of as many as it takes to lie on the same side of the threshold."""
    for digits in range(4, 17):
        short = float(f"{value:.{digits}g}")
        if threshold is None or (short >= threshold) == (value >= threshold):
            return short
    return value
