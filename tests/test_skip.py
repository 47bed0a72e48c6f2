"""
Start here: Algorithm 1, the smallest tests first.

The first ones draw what is skipped, one character per layer, counted by hand; then the paper's printed lines are laid
beside skip.py. After that come whole models, random but for their size: against the paper's lines in plain Python, and
against the claims of the paper and the README, each in the docstring of its test.

Read on in test_model.py (the dense model below it), test_cache.py (what it remembers), test_generate.py (the loop
around it), test_measuring.py and test_calibrate.py (where the settings come from), and test_baselines.py (what it is
compared with). tiny.py has what they share.
"""

import copy
import dataclasses
import inspect
import io
import math
import tokenize
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import (
    DTYPES,
    NaiveLlama,
    SetCosine,
    add,
    chunkings,
    close,
    dot,
    is_real,
    models,
    poisoned_cache,
    run,
    texts,
    tiny_model,
    walk,
)

import skip as skip_py
from fast.one_row import Squares
from model import dense
from policies.baselines import authors_settings
from skip import FFNSkip
from support.tracing import Trace

# --- by hand ----------------------------------------------------------------------------------------------------------

HIGH, LOW = 0.97, 0.5


def drawn(trace):
    """For each token its layers from the first to the last: # where the FFN block ran, . where it was skipped."""
    return ["".join("#" if ran else "." for ran in token) for token in trace.ran[:, 0].T.tolist()]


@pytest.mark.parametrize(
    "knobs, cosine, expected",
    [
        # ten layers, of which 2 to 7 are warm; ^ is a cosine above the threshold, # a block that ran, . one skipped
        (dict(), "__^_______", "###.....##"),  # layer 2 reaches it, and the warm layers after it are skipped
        (dict(), "__________", "##########"),
        (dict(), "^^______^^", "##########"),  # cold layers trigger nothing
        (dict(), "^^^^^^^^^^", "###.....##"),
        (dict(), "____^_____", "#####...##"),
        (dict(), "______^___", "#######.##"),
        (dict(), "_______^__", "##########"),  # the last warm layer: none is left to skip
        (dict(k=1), "^^^^^^^^^^", "###.#.#.##"),
        (dict(k=2), "^^^^^^^^^^", "###..#..##"),
        (dict(k=3), "^^^^^^^^^^", "###...#.##"),
        (dict(k=5), "^^^^^^^^^^", "###.....##"),
        (dict(k=9), "^^^^^^^^^^", "###.....##"),
        (dict(k=1), "__^__^____", "###.##.###"),
        (dict(k=1), "__^^______", "###.######"),  # a skipped layer's cosine is not looked at
        (dict(k=2), "__^_______", "###..#####"),
        (dict(k=1, recheck=False), "^^^^^^^^^^", "###.######"),
        (dict(k=2, recheck=False), "^^^^^^^^^^", "###..#####"),
        (dict(k=9, recheck=False), "^^^^^^^^^^", "###.....##"),
        (dict(k=2, recheck=False), "____^__^__", "#####..###"),
        (dict(recheck=False), "____^_____", "#####...##"),
        (dict(cold_s=0, cold_e=10), "^^^^^^^^^^", "#........."),
        (dict(cold_s=0, cold_e=10, k=1), "^^^^^^^^^^", "#.#.#.#.#."),
        (dict(cold_s=4, cold_e=5), "^^^^^^^^^^", "##########"),
        (dict(cold_s=4, cold_e=6), "^^^^^^^^^^", "#####.####"),
        (dict(sim_threshold=[0.99] * 4 + [0.9] * 6), "^^^^^^^^^^", "#####...##"),  # one threshold for each layer
        (dict(sim_threshold=(0.99,) * 4 + (0.9,) * 6), "^^^^^^^^^^", "#####...##"),
        (dict(sim_threshold=[0.9] * 4 + [0.99] * 6), "___^______", "####....##"),
        (dict(sim_threshold=[0.4] + [0.99] * 9), "^_________", "##########"),
    ],
)
def test_skips_counted_by_hand(knobs, cosine, expected):
    """Section 3.2: once the threshold is reached, k FFN blocks are skipped greedily; cold regions are left intact."""
    skip = FFNSkip(**dict(cold_s=2, cold_e=8, sim_threshold=0.9, warm_up_index=-1) | knobs)
    trace = walk(skip, [[HIGH if char == "^" else LOW] for char in cosine], token_index=[0])
    assert drawn(trace) == [expected]
    assert trace.ffn_skip_ratio(-1) == trace.ffn_saved_ratio() == expected.count(".") / 10


def test_tokens_are_told_apart():
    """One walk, four tokens, four decisions: skip_state belongs to a token."""
    cosine = [[HIGH if char == "^" else LOW for char in row] for row in ("____", "^___", "_^__", "^_^_", "____")]
    trace = walk(FFNSkip(0, 5, 0.9, -1, k=2), cosine, token_index=[0, 1, 2, 3])
    assert drawn(trace) == ["##..#", "###..", "####.", "#####"]
    trace = walk(FFNSkip(0, 5, 0.9, -1, k=1), cosine, token_index=[0, 1, 2, 3])
    assert drawn(trace) == ["##.#.", "###.#", "####.", "#####"]


@pytest.mark.parametrize(
    "warm_up_index, full_every, full",
    [
        (-1, None, []),
        (0, None, [0]),
        (2, None, [0, 1, 2]),
        (9, None, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (-1, 1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (-1, 2, [1, 3, 5, 7, 9]),
        (-1, 3, [2, 5, 8]),
        (0, 4, [0, 4, 8]),
        (2, 2, [0, 1, 2, 4, 6, 8]),
        (2, 3, [0, 1, 2, 5, 8]),
    ],
)
def test_tokens_in_full_counted_by_hand(warm_up_index, full_every, full):
    """Algorithm 1, first line: token_index <= warm_up_index runs in full, as do the prompt and every full_every-th."""
    skip = FFNSkip(1, 4, 0.9, warm_up_index, full_every=full_every)
    trace = walk(skip, [[HIGH]] * 5, token_index=list(range(-2, 10)))
    assert drawn(trace) == ["#####" if t < 0 or t in full else "##..#" for t in range(-2, 10)]
    assert trace.cosine[1, 0].isnan().tolist() == [t < 0 or t in full for t in range(-2, 10)]
    past = [t for t in range(10) if t > warm_up_index]
    skipped = 2 * (10 - len(full))
    assert trace.ffn_skip_ratio(warm_up_index) == (skipped / (5 * len(past)) if past else None)
    assert trace.ffn_saved_ratio() == skipped / 50


# --- the paper's lines ------------------------------------------------------------------------------------------------

# Algorithm 1 as printed, without its inputs: wrapped lines are joined, and past_start, a misprint, is past_state.
ALGORITHM_1 = """\
if token_index <= warm_up_index then
    generate_with_full_model(token_index, input_state)
else
    generate_with_skip_model(token_index, input_state, cold_s, cold_e)
def generate_with_skip_model(token_index, input_state, cold_s, cold_e):
    past_state <- input_state
    for <0 ... cold_s> do
        h <- past_state + attention(past_state)
        past_state <- h + feed_forward(h)
    skip_state <- False
    for <cold_s ... cold_e> do
        h <- past_state + attention(past_state)
        if skip_state == False then
            temp <- h + feed_forward(h)
            sim_score <- cosine(h, temp)
            if sim_score >= sim_threshold then
                skip_state <- True
            past_state <- temp
        else
            past_state <- h
    for <cold_e ... num_layers> do
        h <- past_state + attention(past_state)
        past_state <- h + feed_forward(h)
"""


def comment_column():
    """
    [column, indented text, code beside it] of each comment in the two functions of skip.py that are Algorithm 1. Those
    in brackets are ours and left out, but "(token_index, ..." goes on with the line before it, as in the paper.
    """
    source = inspect.getsource(skip_py)
    source = source[source.index("    def __call__") : source.index("    def active")]
    comments = []
    for token in tokenize.generate_tokens(io.StringIO("class FFNSkip:\n" + source).readline):
        if token.type != tokenize.COMMENT:
            continue
        column, text, code = token.start[1], token.string.removeprefix("# "), token.line[: token.start[1]].strip()
        if text.strip().startswith("(token_index"):
            comments[-1][1] += text.strip()
        elif not text.strip().startswith("("):
            comments.append([column, text, code])
    return comments


def test_the_comment_column_is_the_printed_algorithm_line_for_line():
    """README: Algorithm 1, line for line, each line indented within its function as it is in the paper."""
    printed = ALGORITHM_1.splitlines()
    body = 1 + next(number for number, line in enumerate(printed) if line.startswith("def "))
    printed[body:] = [line.removeprefix("    ") for line in printed[body:]]  # our comments begin anew within a function
    found = comment_column()
    assert [text for _, text, _ in found] == printed
    assert len({column for column, _, _ in found}) == 1
    for _, text, code in found:
        name, assigned, _ = text.strip().partition(" <- ")
        assert not (assigned and code) or code.startswith((f"{name} =", f"{name}[i] =")), (text, code)


# --- whole models: the strategies -------------------------------------------------------------------------------------


def cosines(model, **text):
    """(layer, batch, token): the cosines of the dense model, NaN for padding and prompt."""
    trace = Trace(cosines=True)
    model(**text, policy=FFNSkip(0, model.args.n_layers, math.inf, warm_up_index=-1), trace=trace)
    return trace.cosine


@st.composite
def skips(draw, model, text):
    """Any settings, with thresholds among the cosines of the text, so that some tokens reach them and some do not."""
    n_layers = model.args.n_layers
    cold_s = draw(st.sampled_from([0, 1, 2]))
    cold_e = max(cold_s, n_layers - draw(st.sampled_from([0, 1, 2])))
    measured = cosines(model, **text | dict(prompt_len=0))

    def threshold(quantile):
        return measured.nanquantile(quantile).item() + 3e-5  # most likely not within 1e-5 of a cosine

    thresholds = st.sampled_from([0.5, 0.3, 0.7, 0.1, 0.9]).map(threshold) | st.just(-math.inf)
    return FFNSkip(
        cold_s,
        cold_e,
        sim_threshold=draw(thresholds | st.lists(thresholds, min_size=n_layers, max_size=n_layers)),
        warm_up_index=draw(st.sampled_from([-1, 0, 1, 3])),
        k=draw(st.sampled_from([None, 1, 2, 3])),
        recheck=draw(st.booleans()),
        full_every=draw(st.sampled_from([None, 3, 2])),
    )


@st.composite
def cases(draw, dtype=torch.float32, **sizes):
    """A model, a text, chunks and settings."""
    model = draw(models(st.sampled_from([4, 6, 5, 3, 2]), dtype))
    text = draw(texts(model, **sizes))
    return model, text, draw(chunkings(text["tokens"].size(1))), draw(skips(model, text))


def clear(skip, *traces):
    """No cosine lies so near to its threshold that rounding may decide."""
    for cosine in (trace.cosine for trace in traces):
        threshold = torch.tensor(skip.sim_threshold).expand(cosine.size(0))[:, None, None]
        assume(not ((cosine - threshold).abs() < 1e-5).any())


CASES = DTYPES.flatmap(cases)  # in float32 or bfloat16


def algorithm_1(model, tokens, prompt_len, skip):
    """Logits, and {(layer, token): cosine or None} of the blocks that ran: the paper's lines, one token at a time."""
    llama, n_layers, logits, ran = NaiveLlama(model), model.args.n_layers, [], {}

    def attention(x):
        return llama.attention(layer, x, position)

    def feed_forward(h):
        ran[layer, position] = None
        return llama.feed_forward(layer, h)

    def cosine(a, b):
        return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))

    for position, token in enumerate(tokens):
        token_index, past_state = position - prompt_len, llama.embed(token)
        in_full = token_index <= skip.warm_up_index
        if not in_full and skip.full_every:
            in_full = (token_index - skip.warm_up_index) % skip.full_every == 0
        if in_full:
            for layer in range(n_layers):
                h = add(past_state, attention(past_state))
                past_state = add(h, feed_forward(h))
        else:
            for layer in range(0, skip.cold_s):
                h = add(past_state, attention(past_state))
                past_state = add(h, feed_forward(h))
            skip_state, skipped, compare = False, 0, True
            for layer in range(skip.cold_s, skip.cold_e):
                h = add(past_state, attention(past_state))
                if skip_state == False:  # noqa: E712, as printed
                    temp = add(h, feed_forward(h))
                    if compare:
                        sim_score = ran[layer, position] = cosine(h, temp)
                        threshold = skip.sim_threshold
                        if sim_score >= (threshold[layer] if isinstance(threshold, list) else threshold):
                            skip_state = True
                            compare = skip.recheck
                    past_state = temp
                else:
                    past_state = h
                    skipped += 1
                    if skipped == skip.k:
                        skip_state, skipped = False, 0
            for layer in range(skip.cold_e, n_layers):
                h = add(past_state, attention(past_state))
                past_state = add(h, feed_forward(h))
        logits.append(llama.logits(past_state))
    return logits, ran


@settings(max_examples=100)
@given(cases(max_batch=1, max_seq=10))
def test_agrees_with_a_naive_transcription(case):
    """README: skip.py is Algorithm 1, line for line. In logits, cosines and decisions."""
    model, text, chunks, skip = case
    tokens, prompt_len, trace = text["tokens"], int(text["prompt_len"]), Trace()
    logits = run(model, tokens, chunks, policy=skip, prompt_len=prompt_len, trace=trace)
    clear(skip, trace)
    expected, ran = algorithm_1(model, tokens[0].tolist(), prompt_len, skip)
    assert close(logits, torch.tensor([expected]))
    assert {(layer, token) for layer, _, token in trace.ran.nonzero().tolist()} == set(ran)
    for (layer, token), cosine in ran.items():
        got = trace.cosine[layer, 0, token].item()
        assert math.isnan(got) if cosine is None else abs(got - cosine) < 1e-5
    assert trace.cosine[~trace.ran].isnan().all()


# --- whole models: the claims -----------------------------------------------------------------------------------------


@st.composite
def cases_that_never_skip(draw):
    model, text, chunks, skip = draw(CASES)
    never = [
        dict(sim_threshold=math.inf),
        dict(sim_threshold=[math.inf] * model.args.n_layers),
        dict(warm_up_index=text["tokens"].size(1)),
        dict(cold_e=skip.cold_s),
        dict(full_every=1),
    ]
    return model, text, chunks, dataclasses.replace(skip, **draw(st.sampled_from(never)))


@settings(max_examples=100)
@given(cases_that_never_skip())
def test_no_skipping_is_the_dense_model_bit_for_bit(case):
    """README: sim_threshold=inf, a warm-up longer than the text, or no warm layer: the logits of the dense model."""
    model, text, chunks, skip = case
    trace, real = Trace(), is_real(text["tokens"], text["pad"])
    logits = run(model, **text, chunks=chunks, policy=skip, trace=trace)
    assert torch.equal(logits, run(model, **text, chunks=chunks))
    assert torch.equal(trace.ran, real.expand_as(trace.ran))


@given(CASES)
def test_the_cache_is_complete_whatever_was_skipped(case):
    """Paper, section 1: skipping FFN blocks only circumvents the key-value cache problem of skipping layers."""
    model, text, chunks, skip = case
    batch, seq = text["tokens"].shape
    cache = poisoned_cache(model, batch)
    logits = run(model, **text, chunks=chunks, cache=cache, policy=skip)
    assert logits.isfinite().all() and cache.length == seq and cache.complete()
    assert (cache.writes[:, :, :seq] == 1).all() and not cache.writes[:, :, seq:].any()
    for slots in cache.k, cache.v:
        assert slots[:, :, :, :seq].isfinite().all() and slots[:, :, :, seq:].isnan().all()


@settings(max_examples=100)
@given(cases())
def test_one_parallel_pass_decides_as_token_by_token_decoding_does(case):
    """README: perplexity under skipping needs one parallel pass; in logits and in every decision, for any chunks."""
    model, text, chunks, skip = case
    at_once, one_by_one, in_chunks = Trace(), Trace(), Trace()
    logits = run(model, **text, policy=skip, trace=at_once)
    single = run(model, **text, policy=skip, trace=one_by_one, chunks=[1] * text["tokens"].size(1))
    chunked = run(model, **text, policy=skip, trace=in_chunks, chunks=chunks)
    clear(skip, at_once, one_by_one, in_chunks)
    assert close(single, logits) and close(chunked, logits)
    for trace in one_by_one, in_chunks:
        assert torch.equal(trace.ran, at_once.ran) and torch.equal(trace.token_index, at_once.token_index)
        assert torch.allclose(trace.cosine, at_once.cosine, rtol=0, atol=1e-5, equal_nan=True)


@settings(max_examples=100)
@given(cases())
def test_a_batch_decides_row_by_row_as_each_row_alone(case):
    """README: one code path serves a batch whose rows disagree; padded rows get what they get alone."""
    model, text, chunks, skip = case
    tokens, pad, prompt_len = text["tokens"], text["pad"], text["prompt_len"]
    together = Trace()
    logits = run(model, **text, chunks=chunks, policy=skip, trace=together)
    clear(skip, together)
    for row in range(len(tokens)):
        alone, start = Trace(), 0 if pad is None else pad[row]
        own_prompt = prompt_len if isinstance(prompt_len, int) else prompt_len[row]
        expected = model(tokens[row : row + 1, start:], policy=skip, prompt_len=own_prompt, trace=alone)
        clear(skip, alone)
        assert close(logits[row, start:], expected[0])
        assert torch.equal(together.ran[:, row, start:], alone.ran[:, 0])
        assert torch.equal(together.token_index[row, start:], alone.token_index[0])
        assert not together.ran[:, row, :start].any() and together.cosine[:, row, :start].isnan().all()


@given(CASES)
def test_threshold_of_minus_infinity_skips_all_warm_layers_but_the_first(case):
    """Algorithm 1: after the warm-up, each token's layers cold_s + 1 to cold_e - 1 are skipped, those and no others."""
    model, text, chunks, skip = case
    skip = dataclasses.replace(skip, sim_threshold=-math.inf, k=None, full_every=None)
    trace, layer = Trace(), torch.arange(model.args.n_layers)[:, None, None]
    run(model, **text, chunks=chunks, policy=skip, trace=trace)
    skipped = (trace.token_index > skip.warm_up_index) & (skip.cold_s < layer) & (layer < skip.cold_e)
    assert torch.equal(trace.ran, ~skipped & is_real(text["tokens"], text["pad"]))
    first = (trace.token_index > skip.warm_up_index) & (layer == skip.cold_s) & (layer < skip.cold_e)
    assert torch.equal(~trace.cosine.isnan(), first)  # and nothing else is measured


@settings(max_examples=60)
@given(CASES)
def test_blocks_that_ran_are_those_counted(case):
    """README: skipped blocks really do not run. Rows entering the modules = the trace = the reported ratio."""
    model, text, chunks, skip = case
    rows = torch.zeros(model.args.n_layers, dtype=torch.long)
    for layer in model.layers:

        def count(module, inputs, out, layer_id=layer.layer_id):
            rows[layer_id] += inputs[0].shape[:-1].numel()

        layer.feed_forward.register_forward_hook(count)
    trace, padding = Trace(), ~is_real(text["tokens"], text["pad"])
    run(model, **text, chunks=chunks, policy=skip, trace=trace)
    assert torch.equal(trace.ran.sum(dim=(1, 2)), rows - padding.sum())
    counted = trace.token_index > skip.warm_up_index
    full = trace.token_index[~padding] <= skip.warm_up_index  # these run every block
    blocks = counted.sum() * model.args.n_layers
    ran = rows.sum() - (padding.sum() + full.sum()) * model.args.n_layers
    ratio = trace.ffn_skip_ratio(skip.warm_up_index)
    assert ratio is None if not blocks else math.isclose(ratio, 1 - ran / blocks, abs_tol=1e-6)


def test_the_trace_counts_where_the_block_runs():
    """README: any policy can be traced, since a block is counted where it executes and not where it is decided."""
    model, tokens, trace = tiny_model(), torch.arange(6)[None], Trace()
    even = torch.arange(6)[None] % 2 == 0

    def every_second_token(layers, x, step):
        for layer in layers:
            x = layer.add_feed_forward(layer.add_attention(x, step), step, even)
        return x

    model(tokens, policy=every_second_token, trace=trace)
    assert torch.equal(trace.ran, even.expand(4, 1, 6)) and trace.ffn_skip_ratio(-1) == 0.5

    def one_half_then_the_other(layers, x, step):
        for layer in layers:
            x = layer.add_feed_forward(layer.add_feed_forward(layer.add_attention(x, step), step, even), step, ~even)
        return x

    trace = Trace()
    model(tokens, policy=one_half_then_the_other, trace=trace)
    assert trace.ran.all()
    trace = Trace()
    model(tokens, trace=trace)
    assert trace.ran.all() and trace.ffn_skip_ratio(-1) == 0 and trace.cosine.isnan().all()


@settings(max_examples=60)
@given(CASES, st.booleans())
def test_the_weights_of_skipped_blocks_are_never_used(case, single):
    """README: a skipped block's weights are not read. Set to NaN wherever no token runs them, they change nothing."""
    model, text, chunks, skip = case
    if single:  # one row and one token at a time, every skipped block is skipped by all
        chunks, text["pad"] = [1] * text["tokens"].size(1), None
        text["tokens"], text["prompt_len"] = text["tokens"][:1], 0
    trace = Trace()
    logits = run(model, **text, chunks=chunks, policy=skip, trace=trace)
    whole = copy.deepcopy(model.state_dict())
    # padding runs every block, so only a chunk without any leaves blocks unused
    used = trace.ran | ~is_real(text["tokens"], text["pad"])
    used_in = iter([part.any(dim=2).any(dim=1).tolist() for part in used.split(chunks, dim=2)])

    def poison(layers, x, step):
        model.load_state_dict(whole)
        for layer, is_used in zip(layers, next(used_in)):
            for weight in () if is_used else layer.feed_forward.parameters():
                weight.fill_(math.nan)
        return skip(layers, x, step)

    assert torch.equal(run(model, **text, chunks=chunks, policy=poison), logits)


def test_ratios_of_several_passes_and_rows():
    """README: the skip ratio is over tokens past the warm-up, the saved ratio over all generated ones."""
    assert Trace().ffn_skip_ratio(-1) is None and Trace().ffn_saved_ratio() is None
    model, trace, skip = tiny_model(n_layers=4), Trace(), FFNSkip(0, 4, -math.inf, warm_up_index=2)
    tokens, pad = torch.arange(16).view(2, 8), torch.tensor([0, 3])
    cache = poisoned_cache(model, 2)
    args = dict(policy=skip, prompt_len=torch.tensor([4, 1]), trace=trace)
    # columns 0-3, 4, 5-7; token_index of row 0: -4 to 3, of row 1: padding three times, then -1 to 3
    model(tokens[:, :4], cache, pad=pad, **args)
    assert trace.ffn_skip_ratio(2) is None and trace.ffn_saved_ratio() is None
    model(tokens[:, 4:5], cache, **args)
    assert trace.ffn_skip_ratio(2) is None and trace.ffn_saved_ratio() == 0
    model(tokens[:, 5:], cache, **args)
    assert trace.ran.shape == trace.cosine.shape == (4, 2, 8) and trace.token_index.shape == (2, 8)
    assert trace.token_index[0].tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert trace.token_index[1, 3:].tolist() == [-1, 0, 1, 2, 3] and (trace.token_index[1, :3] < 0).all()
    assert trace.ffn_skip_ratio(2) == 6 / 8  # one token a row, three of its four blocks skipped
    assert trace.ffn_saved_ratio() == 6 / 32  # of four generated tokens a row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cosine_is_that_of_the_residual_stream_in_float32(dtype):
    """Section 3.1: of the tensor entering the FFN block and exiting it, the residual stream; in float32 always."""
    model, tokens, trace, seen = tiny_model(dtype=dtype), torch.arange(20)[None], Trace(), []
    for layer in model.layers:

        def add_feed_forward(h, step, active=None, feed=layer.add_feed_forward):
            seen.append((h, feed(h, step, active)))
            return seen[-1][1]

        layer.add_feed_forward = add_feed_forward
    threshold = cosines(model, tokens=tokens).median().item() + 3e-5
    seen.clear()
    model(tokens, policy=FFNSkip(0, 4, threshold, warm_up_index=-1), trace=trace)
    measured = ~trace.cosine.isnan()
    exact = torch.stack([F.cosine_similarity(h.double(), temp.double(), dim=-1) for h, temp in seen])
    assert torch.equal(measured, trace.ran) and measured.any(dim=2).all()
    assert ((trace.cosine - exact)[measured].abs() < 1e-6).all()
    reached = (trace.cosine >= threshold).cumsum(dim=0) > 0  # and what the trace says is what was decided
    assert torch.equal(trace.ran[1:], ~reached[:-1]) and reached.any() and not reached.all()


def test_a_threshold_is_reached_by_the_very_same_number():
    """Algorithm 1 tests >=. The authors' code tests >, which is >= the next number of a Python float."""
    first = walk(FFNSkip(0, 3, 1.0, -1), [[0.95], [LOW], [LOW]], token_index=[0])
    cosine = first.cosine[0].item()
    for threshold, expected in (cosine, "#.."), (math.nextafter(cosine, 0), "#.."), (math.nextafter(cosine, 1), "###"):
        assert drawn(walk(FFNSkip(0, 3, threshold, -1), [[0.95], [LOW], [LOW]], token_index=[0])) == [expected]


def test_nothing_is_compared_once_every_token_skips():
    """README: one comparison a monitored layer; none in the warm-up, in cold layers, or once all tokens skip."""
    rows = "__", "__", "^_", "__", "_^", "^^", "__", "__"
    cosine = [[HIGH if char == "^" else LOW for char in row] for row in rows]
    for warm_up_index, compared in (-1, 4), (0, 4), (1, 0):  # layers 1 to 4 of the warm layers 1 to 6, token 1's last
        with mock.patch.object(SetCosine, "cosine", autospec=True, side_effect=SetCosine.cosine) as compared_here:
            walk(FFNSkip(1, 7, 0.9, warm_up_index), cosine, token_index=[0, 1])
        assert compared_here.call_count == compared


def test_what_no_cosine_can_reach_is_not_measured_unless_a_trace_asks():
    """README: watching costs nothing where it decides nothing; a trace may want the cosine all the same."""
    model, tokens = tiny_model(n_layers=4), torch.arange(5)[None]
    skip = FFNSkip(0, 4, [2.0, 1.0, math.inf, 1.0005], warm_up_index=-1)
    for chunks in [5], [1] * 5:
        trace, asked = Trace(), Trace(cosines=True)
        logits = run(model, tokens, chunks, policy=skip, trace=trace)
        assert torch.equal(logits, run(model, tokens, chunks, policy=skip, trace=asked))
        assert torch.equal(logits, run(model, tokens, chunks))
        assert trace.cosine[[0, 2]].isnan().all() and trace.cosine[[1, 3]].isfinite().all()
        assert torch.equal(asked.cosine[[1, 3]], trace.cosine[[1, 3]]) and asked.cosine.isfinite().all()


@pytest.mark.parametrize("dim", [16, 576, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cosine_of_one_token_is_that_of_float64(dim, dtype):
    """One token is compared by dot products, which are nearer to the exact cosine than F.cosine_similarity."""
    draw = torch.Generator().manual_seed(dim)
    for scale in 0.01, 0.1, 1, 100:
        h = torch.randn(1, 1, dim, generator=draw).to(dtype)
        temp = h + scale * torch.randn(1, 1, dim, generator=draw).to(dtype)
        exact = F.cosine_similarity(h.double(), temp.double(), dim=-1).item()
        assert Squares().cosine(h, temp) == pytest.approx(exact, abs=5e-7)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("max_seq_len, warm_up_index", [(1024, 13), (4096, 61), (255, 0), (128, -1), (9, -1)])
def test_the_authors_public_code_is_a_setting(k, max_seq_len, warm_up_index):
    """
    README: the authors' public code is a setting of the same walk: > 0.95, k blocks once, every sixth in full. The
    warm-up is max_seq_len // 64 zeros of skip_plot, which generation.py begins to read at the third: token_index + 2.
    """
    skip = authors_settings(32, k, max_seq_len)
    assert skip == FFNSkip(4, 27, math.nextafter(0.95, 1), warm_up_index, k, recheck=False, full_every=6)
    skip.check(32)
    cosine = [[HIGH]] * 32
    at = warm_up_index + torch.tensor([0, 1, 5, 6, 7, 12])
    full, skipped = "#" * 32, "#" * 5 + "." * k + "#" * (27 - k)
    assert drawn(walk(skip, cosine, at.tolist())) == [full, skipped, skipped, full, skipped, full]
    assert authors_settings(32, k).warm_up_index == 13


def test_the_prompt_always_runs_in_full():
    """README: token_index counts generated tokens from 0; prefill never skips, even with no warm-up at all."""
    model, trace = tiny_model(), Trace()
    tokens = torch.arange(10)[None]
    logits = model(tokens, policy=FFNSkip(0, 4, -math.inf, warm_up_index=-1), prompt_len=10, trace=trace)
    assert trace.ran.all() and torch.equal(logits, model(tokens))
    assert FFNSkip(0, 4, 0.9).warm_up_index == 25  # section 5.1: 25 to 30


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cold_s=-1), "cold_s"),
        (dict(cold_s=5), "cold_s 5 lies above cold_e 3"),
        (dict(cold_s=1.0), "cold_s"),
        (dict(cold_e=None), "cold_e"),
        (dict(warm_up_index=-2), "warm_up_index"),
        (dict(warm_up_index=None), "warm_up_index"),
        (dict(k=0), "k must"),
        (dict(k=1.5), "k must"),
        (dict(k=True), "k must"),
        (dict(full_every=0), "full_every"),
        (dict(recheck=None), "recheck"),
        (dict(sim_threshold=math.nan), "sim_threshold"),
        (dict(sim_threshold=None), "sim_threshold"),
        (dict(sim_threshold="0.9"), "sim_threshold"),
        (dict(sim_threshold=[0.9, 0.9, 0.9, math.nan]), "sim_threshold"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    """README: errors say what is wrong."""
    with pytest.raises(ValueError, match=message):
        FFNSkip(**dict(cold_s=1, cold_e=3, sim_threshold=0.9) | change)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cold_e=5), "cold_e 5 lies above the model's n_layers 4"),
        (dict(sim_threshold=[0.9] * 3), "3 values for a model of 4 layers"),
        (dict(sim_threshold=[]), "0 values for a model of 4 layers"),
    ],
)
def test_settings_of_another_model_are_refused(change, message):
    """README: settings that do not fit the model are an error, before anything is written."""
    model = tiny_model(n_layers=4)
    cache, skip = poisoned_cache(model, 1), FFNSkip(**dict(cold_s=1, cold_e=4, sim_threshold=0.9) | change)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, dtype=torch.long), cache, policy=skip)
    assert not cache.writes.any() and cache.length == 0
    FFNSkip(0, 4, [0.9] * 4).check(4)


def test_settings_at_their_bounds_are_fine():
    """README: 0 <= cold_s <= cold_e <= n_layers, k >= 1."""
    model, tokens = tiny_model(n_layers=4), torch.arange(5)[None]
    for cold_s, cold_e in (0, 0), (0, 4), (4, 4), (3, 4), (0, 1):
        skip = FFNSkip(cold_s, cold_e, 1, warm_up_index=-1, k=1, full_every=1)
        assert torch.equal(model(tokens, policy=skip), model(tokens, policy=dense))
