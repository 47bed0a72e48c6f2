"""What was skipped, as one self-contained web page: trace_page.html with one or two runs of generate.py in it."""

from pathlib import Path

from skip import FFNSkip
from support import common
from support.tokenizer import TextStream

PLACE = "TRACE_AS_JSON"  # where the data goes in trace_page.html


def write_page(path, generations, prompts):
    """
    Write the runs, a list of generate.Generation, side by side as an HTML page: each token shaded by the share of its
    FFN blocks that were skipped, and the layers of the token that is pointed at. `prompts` are headings, one text per
    prompt. Raises ValueError where the file cannot be written.
    """
    runs = [describe_run(generation) for generation in generations]
    data = common.to_json(dict(prompts=prompts, runs=runs))
    data = data.replace("<", "\\u003c")  # "</script>" in a text would end the element that holds the data
    template = common.read_utf8(Path(__file__).with_name("trace_page.html"))
    common.write_whole(path, template.replace(PLACE, data))


def describe_run(generation):
    """
    What the page shows of one run, as a dict. A policy's cold layers and thresholds are known where it has FFNSkip's
    cold_s, cold_e and thresholds(n_layers). What other policies than FFNSkip leave in trace.cosine may be another
    number, such as a predicted harm, and is called "value".
    """
    policy, n_layers = generation.policy, generation.model.args.n_layers
    warm_up_index = getattr(policy, "warm_up_index", -1)
    ran = cosine = token_index = None
    thresholds = mean = [None] * n_layers
    if any(generation.ids):  # else it was interrupted within its first pass, whose record is not complete
        ran, cosine, token_index = generation.trace.ran, generation.trace.cosine, generation.trace.token_index
        mean = cosine.flatten(1).nanmean(1).tolist()
    if hasattr(policy, "thresholds"):
        thresholds = policy.thresholds(n_layers)
    return dict(
        name=generation.name,
        ffn_skip_ratio=generation.trace.ffn_skip_ratio(warm_up_index),
        n_layers=n_layers,
        cold_s=getattr(policy, "cold_s", 0),
        cold_e=getattr(policy, "cold_e", n_layers),
        warm_up_index=warm_up_index,
        label="cosine" if isinstance(policy, FFNSkip) else "value",
        thresholds=thresholds,
        mean=mean,
        texts=[describe_text(generation, row, ran, cosine, token_index) for row in range(len(generation.prompts))],
    )


def describe_text(generation, row, ran, cosine, token_index):
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
                described["values"] = values.tolist()
        tokens.append(described)
    tokens[-1]["text"] += "".join(pieces[len(tokens) :])  # which Generation.finish has found
    return tokens
