"""generate.py as a library: the loop, the sampling, the stream of text. tests/test_cli.py runs it as a user does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Bytes, Words, models, new_cache, random_ids, tiny_model

from generate import generate, generate_batch, sample
from model import KVCache, ModelArgs, Transformer, dense
from skip import FFNSkip
from support.cache import rewind
from support.show import speedup_bound
from support.tokenizer import TextStream
from support.tracing import Trace


@given(models(), st.lists(st.integers(0, 30), min_size=1, max_size=6))
@settings(max_examples=10)
def test_greedy_text_is_the_argmax_of_an_uncached_pass_over_all_before_it(model, ids):
    for token in generate(model, ids, max_new_tokens=8):
        assert token == model(torch.tensor([ids]))[0, -1].argmax()
        ids = ids + [token]


def uneven(policy):
    """A model, prompts, and ends of text such that greedy texts end at different lengths."""
    model, prompts = tiny_model(seed=3), [[1, 2, 3, 4, 5, 6], [7], [8, 9]]
    free = [list(generate(model, prompt, 12, policy)) for prompt in prompts]
    return model, prompts, {free[0][3], free[1][6]}


def test_each_prompt_of_a_batch_continues_as_it_does_alone():
    """With greedy decoding and end-of-text anywhere: rows end on their own, and yield None from then on."""
    policy = FFNSkip(1, 4, 0.9, warm_up_index=1)
    model, prompts, eos_ids = uneven(policy)
    alone = [list(generate(model, prompt, 12, policy, eos_ids=eos_ids)) for prompt in prompts]
    assert len({len(ids) for ids in alone}) > 1  # else the test shows nothing
    steps = list(generate_batch(model, prompts, 12, policy, eos_ids=eos_ids))
    for row, ids in enumerate(alone):
        assert [step[row] for step in steps] == ids + [None] * (len(steps) - len(ids))


def test_what_is_forwarded_after_the_end_of_a_row_counts_in_no_ratio():
    """ffn_saved_ratio is over the n - 1 tokens that are forwarded of a text of n, for each row."""
    policy, trace = FFNSkip(0, 4, -math.inf, warm_up_index=-1), Trace()
    model, prompts, eos_ids = uneven(policy)
    steps = list(generate_batch(model, prompts, 12, policy, eos_ids=eos_ids, trace=trace))
    lengths = [sum(step[row] is not None for step in steps) for row in range(3)]
    assert (trace.token_index >= 0).sum(1).tolist() == [n - 1 for n in lengths]
    assert trace.ffn_saved_ratio() == pytest.approx(3 / 4)  # all but layer 0, whose similarity is looked at


def test_generation_ends_after_end_of_text_after_max_new_tokens_and_with_the_context():
    model = tiny_model()
    free = list(generate(model, [1, 2], 20))
    assert len(free) == 20
    assert list(generate(model, [1, 2], 20, eos_ids={free[3]})) == free[: free.index(free[3]) + 1]
    assert len(list(generate(model, [1] * 60, 20))) == 64 - 60 + 1  # the last token needs no place in the cache
    assert len(list(generate(model, [1] * 64, 20))) == 1


SKIP = FFNSkip(1, 4, 0.9, warm_up_index=1)


@given(models(n_layers=st.integers(4, 6)), st.sampled_from([dense, SKIP]), st.integers(0, 14))
@settings(max_examples=10)
def test_an_answer_in_a_conversation_is_the_one_to_the_whole_of_it(model, policy, keep):
    """What the cache holds is not forwarded again; what it shares with the conversation may end anywhere in it."""
    cache, first = new_cache(model, 1), random_ids(6)
    said = first + list(generate(model, first, 9, dense, cache=cache))
    assert cache.length == 14  # the last token was written, and never read
    then = said[: keep] + random_ids(5, seed=1)
    rewind(cache, keep)
    traces = Trace(), Trace()
    answer = list(generate(model, then, 9, policy, trace=traces[0], cache=cache))
    assert answer == list(generate(model, then, 9, policy, trace=traces[1]))
    assert traces[0].token_index[0].tolist() == list(range(-5, 8))  # it counts from 0 in each answer
    assert torch.equal(traces[0].ran, traces[1].ran[:, :, keep :])


def test_what_was_written_while_skipping_stays_in_the_cache_and_is_complete():
    """The next answer is that of a pass over the conversation in which the first answer was skipped in as well."""
    model, prompt, cache = tiny_model(seed=5), random_ids(6), new_cache(tiny_model(), 1)
    trace = Trace()
    said = prompt + list(generate(model, prompt, 12, SKIP, trace=trace, cache=cache))
    assert trace.ffn_saved_ratio() > 0 and cache.complete()
    then = said[: cache.length] + random_ids(4, seed=1)
    answer = list(generate(model, then, 12, SKIP, cache=cache))
    again = new_cache(model, 1)
    model(torch.tensor([said[:-1]]), again, SKIP, prompt_len=len(prompt))
    assert cache.complete() and answer == list(generate(model, then, 12, SKIP, cache=again))
    assert answer != list(generate(model, then, 12, SKIP))  # which forgets that the first answer was skipped in


def test_a_cache_that_leaves_nothing_to_forward_is_an_error_and_a_small_one_ends_the_text():
    model = tiny_model()
    cache = KVCache(model.args, 1, 10)
    assert len(list(generate(model, [1, 2], 20, cache=cache))) == 9
    with pytest.raises(ValueError, match="the cache holds 10 tokens, and the prompt has 10: rewind"):
        next(generate(model, [1] * 10, 5, cache=cache))


@pytest.mark.parametrize(
    "prompts, message", [([[]], "empty"), ([[1], []], "empty"), ([[1] * 65], "65 tokens.*max_seq_len 64")]
)
def test_a_prompt_that_cannot_be_continued_is_an_error(prompts, message):
    with pytest.raises(ValueError, match=message):
        next(generate_batch(tiny_model(), prompts, 5))
    if len(prompts) == 1:
        with pytest.raises(ValueError, match=message):
            next(generate(tiny_model(), prompts[0], 5))


def test_the_output_head_runs_once_a_token():
    """Generation computes logits only where one is needed: for the last column."""
    model, rows = tiny_model(), []
    model.output.register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    list(generate(model, [1, 2, 3, 4], 3))
    assert rows == [1, 1, 1]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(0.01, 1), st.integers(0, 9))
def test_top_p_draws_only_from_the_smallest_set_that_holds_p(logits, top_p, seed):
    logits = torch.tensor([logits])
    token = sample(logits, 1.0, top_p, torch.Generator().manual_seed(seed)).item()
    probs = logits.softmax(-1)[0]
    likelier = probs[probs > probs[token]].sum()
    assert likelier < top_p + 1e-6


def test_sampling_follows_the_probabilities_and_the_seed():
    logits = torch.tensor([[0.0, math.log(3.0)]]).expand(4000, 2)

    def draw(seed):
        return sample(logits, 1.0, 1.0, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert sample(logits, 0.0)[0] == 1 and sample(logits, 1e-3, 1.0, torch.Generator())[0] == 1


@given(st.text(max_size=20), st.text(max_size=20), st.booleans())
def test_streamed_pieces_are_the_text_and_never_half_a_character(prompt, text, cut):
    """No broken UTF-8 on the way; what is left of a character at the end is shown as such."""
    prompt, ids = list(prompt.replace("\0", "").encode()), list(text.replace("\0", "").encode())
    ids = ids[:-1] if cut else ids
    stream = TextStream(Bytes(), prompt)
    pieces = [stream.add(i) for i in ids]
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)
    whole = bytes(prompt + ids).decode(errors="replace")
    assert "".join(pieces) + stream.rest() == whole[len(bytes(prompt).decode()) :]


def test_a_stream_keeps_the_space_before_its_first_word():
    stream = TextStream(Words(), list(map(ord, "ab")))
    assert "".join(stream.add(ord(c)) for c in "cd") == " c d"


def test_the_bound_on_the_speed_up_is_that_of_llama_2_7b():
    """The figures of the README and of Table 4's neighbourhood: 1.15 at 20 %, 1.24 at 30 %, 1.49 at 50 %."""
    with torch.device("meta"):
        model = Transformer(ModelArgs())
    assert [round(speedup_bound(model, saved), 2) for saved in (0, 0.2, 0.3, 0.5)] == [1, 1.15, 1.24, 1.49]
