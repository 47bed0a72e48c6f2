"""policies/ledger.py on tiny random models: who chooses what is skipped, by definition."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_baselines import ran, text
from tiny import close, new_cache, run, tiny_model

from model import dense
from policies import find_policy, ledger
from policies.baselines import attended_missing
from policies.ledger import AdaSkip, AttentionDrop, Fixed, InPrompt, Together
from skip import FFNSkip
from support.cache import rewind
from support.measuring import as_windows, compare_with_dense, measure, quality, replay, skip_ratio
from support.tracing import Trace


def test_fixed_skips_the_same_blocks_of_every_token_and_the_last_of_them_of_a_share():
    model = tiny_model(n_layers=8)
    trace, _ = ran(model, Fixed(model, 0.3125, -1, [5, 2, 6, 1]), text(model, 1, 64))  # two and a half blocks
    share = (~trace.ran[:, 0]).double().mean(1)
    assert share[[5, 2]].eq(1).all() and abs(share[6] - 0.5) < 0.15 and share.sum() == 2 + share[6]
    with pytest.raises(ValueError, match="a share of 0.75 cannot be skipped: only 4 layers"):
        Fixed(model, 0.75, -1, [5, 2, 6, 1])


def test_the_greedy_order_adds_the_block_that_does_least_harm():
    model, tokens = tiny_model(n_layers=6), text(tiny_model(), 4, 40)
    order = ledger.fixed(model, 0.5, 4, tokens).order
    windows, reference, chosen = as_windows(tokens), {}, []

    def harm(layer_id):
        policy = Fixed(model, (len(chosen) + 1) / 6, 4, [*chosen, layer_id])
        return quality(model, windows, policy, reference)["kl"]

    for _ in range(3):  # of six layers all are tried in each round
        chosen.append(min(set(range(6)) - set(chosen), key=harm))
    assert order == chosen
    assert ledger.fixed(model, 1 / 6, 4, tokens).order == chosen[:1]


def test_a_fixed_run_is_the_one_of_the_highest_cosines():
    model, tokens = tiny_model(n_layers=8), text(tiny_model(), 4, 40)
    cosines = measure(model, as_windows(tokens), 4).mean(0)
    means = [cosines[start : start + 3].mean().item() for start in range(6)]
    start = means.index(max(means))
    order = ledger.fixed_run(model, 3 / 8, 4, tokens).order
    assert sorted(order) == [start, start + 1, start + 2]
    assert cosines[order[-1]] == cosines[start : start + 3].min()  # which a share of the tokens skips, if it is a part


def test_shuffled_decisions_are_ffnskips_of_other_tokens():
    model, tokens = tiny_model(n_layers=8), text(tiny_model(), 4, 60)
    settings = dict(cold_s=1, cold_e=7, sim_threshold=[0.9, 0.8, 0.9, 0.7, 0.9, 0.9, 0.8, 0.9], k=1)
    policy = ledger.shuffled(model, 0.2, 4, tokens, settings=settings)
    one, _ = ran(model, policy, text(model, 1, 60, seed=1))
    two, _ = ran(model, policy, text(model, 1, 60, seed=2))
    assert torch.equal(one.ran, two.ran)  # the token itself has no say
    known = {tuple(row) for row in policy.ran.tolist()}
    found = {tuple(row) for row in one.ran[:, 0, 5:].T.tolist()}
    assert found <= known and len(found) > 3
    assert abs((~policy.ran).double().mean() - 0.2) < 0.01 and policy.ran[:, [0, 1, 7]].all()
    assert not ((~policy.ran[:, 1:]) & (~policy.ran[:, :-1])).any()  # k=1: no two in a row


def test_adaskip_skips_what_changed_the_prompt_least():
    model = tiny_model(n_layers=8)
    policy = AdaSkip(model, 0.25, 3, text(model, 4, seed=9))
    tokens, prompt_len = text(model, 2, 40), torch.tensor([12, 20])
    trace, logits = ran(model, policy, tokens, prompt_len=prompt_len)
    watch = Trace(cosines=True)
    model(tokens, policy=FFNSkip(0, 8, 2.0, warm_up_index=-1), trace=watch)
    chosen = []
    for row, n in enumerate(prompt_len.tolist()):
        cosines = policy.before + watch.cosine[:, row, : n + 4].sum(1)  # the prompt, and tokens 0 to 3
        chosen.append(set(cosines.topk(2).indices.tolist()))
        skipped = ~trace.ran[:, row, n + 4 :]
        assert {layer for layer in range(8) if skipped[layer].all()} == chosen[-1] and skipped.sum() == 2 * (36 - n)
    by_token = Trace()
    cache = new_cache(model, 2)
    slowly = run(model, tokens, chunks=1, cache=cache, policy=policy, prompt_len=prompt_len, trace=by_token)
    assert torch.equal(by_token.ran, trace.ran) and close(slowly, logits, 1e-4) and cache.complete()
    policy = AdaSkip(model, 0.5, -1, text(model, 4, seed=9))
    other, _ = ran(model, policy, text(model, 20, 40, seed=5), prompt_len=2)
    assert len({tuple(row) for row in other.ran[:, :, -1].T.tolist()}) > 1  # each text has its own


def test_what_adaskip_knows_is_of_this_text_alone():
    """Neither padding counts, nor a text that was in the cache before."""
    model, tokens = tiny_model(n_layers=8), text(tiny_model(), 2, 30)
    policy = AdaSkip(model, 0.4, -1, text(model, 4, seed=9))
    cache, both = new_cache(model, 1), new_cache(model, 2)
    alone, _ = ran(model, policy, tokens[1:, 12:], prompt_len=3, cache=cache)
    known = cache.cosines[1]
    padded, _ = ran(model, policy, tokens, prompt_len=torch.tensor([9, 3]), pad=torch.tensor([0, 12]), cache=both)
    assert torch.equal(padded.ran[:, 1, 12:], alone.ran[:, 0]) and close(both.cosines[1][:, 1:], known)
    cache = new_cache(model, 1)
    model(tokens[:1], cache, policy, prompt_len=20)
    rewind(cache)
    again = Trace()
    model(tokens[1:, 12:], cache, policy, prompt_len=3, trace=again)
    assert torch.equal(again.ran, alone.ran) and close(cache.cosines[1], known)


def test_without_its_attention_a_layer_passes_the_state_on():
    model, tokens = tiny_model(n_layers=5), text(tiny_model(), 2, 20)
    policy = AttentionDrop([1, 3], -1)
    step, x = model.prepare(tokens, new_cache(model, 2), 0, None), model.tok_embeddings(tokens)
    for layer in model.layers:
        h = x if layer.layer_id in (1, 3) else layer.add_attention(x, step)
        x = layer.add_feed_forward(h, step)
    assert close(model.logits(x), model(tokens, policy=policy))


def test_no_token_reads_what_dropped_attention_does_not_write():
    model, tokens = tiny_model(n_layers=5), text(tiny_model(), 2, 20)
    policy, prompt_len = AttentionDrop([1, 3], 2), torch.tensor([4, 9])
    expected = model(tokens, policy=policy, prompt_len=prompt_len)
    assert close(expected[0, :7], model(tokens)[0, :7]) and not close(expected[0, 7:], model(tokens)[0, 7:])
    cache = new_cache(model, 2)
    assert close(run(model, tokens, chunks=1, cache=cache, policy=policy, prompt_len=prompt_len), expected)
    assert not cache.complete() and not attended_missing(cache).any()
    assert not cache.written[1, 0, 7:20].any() and cache.written[[0, 2, 4], :, :20].all()


def test_attention_is_dropped_by_the_bytes_of_blocks():
    model, tokens = tiny_model(n_layers=6), text(tiny_model(), 2, 40)
    attention = sum(weight.numel() for weight in model.layers[0].attention.parameters())
    block = sum(weight.numel() for weight in model.layers[0].feed_forward.parameters())
    policy = ledger.attention_drop(model, 0.25, 4, tokens)
    assert len(policy.dropped) == round(0.25 * 6 * block / attention)
    assert policy.as_blocks == pytest.approx(len(policy.dropped) * attention / block / 6)
    alone = [quality(model, as_windows(tokens), AttentionDrop([i], 4), {})["kl"] for i in range(6)]
    assert policy.dropped[0] == alone.index(min(alone))
    with pytest.raises(ValueError, match="attention_drop cannot save 0.9 of the feed-forward bytes"):
        ledger.attention_drop(model, 0.9, 4, tokens)


@pytest.mark.parametrize("agree", [0.3, 0.5, 1.0])
def test_the_rows_of_a_batch_decide_together(agree):
    """By hand from the cosines of the run itself: whoever would skip votes, and a row in full has a veto."""
    model, tokens = tiny_model(n_layers=8), text(tiny_model(), 4, 30)
    policy, prompt_len = Together(1, 7, 0.85, warm_up_index=2, k=1, agree=agree), torch.tensor([0, 3, 6, 9])
    trace, _ = ran(model, policy, tokens, prompt_len=prompt_len)
    assert (trace.ran == trace.ran[:, :1]).all() and trace.ran[:, :, :12].all()  # the last row's warm-up ends at 12
    would = (trace.cosine >= 0.85) & trace.ran  # (layer, row, token)
    voted = would.double().mean(1) >= agree  # (layer, token)
    for layer in range(1, 6):
        first = trace.ran[layer, 0] & trace.ran[layer - 1, 0]  # nobody skips a block here of an earlier vote
        expected = voted[layer] & first
        expected[:12] = False
        assert torch.equal(~trace.ran[layer + 1, 0][first], expected[first])
    assert not trace.ran.all()


def test_one_row_decides_as_ever_and_the_knob_is_a_flag():
    model, tokens = tiny_model(n_layers=8), text(tiny_model(), 1, 30)
    settings = dict(cold_s=1, cold_e=7, sim_threshold=0.85, warm_up_index=2, k=1)
    together = find_policy("ffnskip", model, settings | dict(agree=1.0))
    assert isinstance(together, Together) and together.agree == 1.0
    assert torch.equal(model(tokens, policy=together), model(tokens, policy=FFNSkip(**settings)))
    with pytest.raises(ValueError, match="--agree 0 is not a share"):
        find_policy("ffnskip", model, settings | dict(agree=0))


def test_the_rows_of_a_batch_are_measured_together():
    model, windows = tiny_model(n_layers=8), as_windows(text(tiny_model(), 4, 30))
    policy = Together(1, 7, 0.85, warm_up_index=2, k=1, agree=0.5)
    trace, logits = ran(model, policy, text(tiny_model(), 4, 30))
    assert skip_ratio(model, policy, windows, rows=4) == trace.ffn_skip_ratio(2) != skip_ratio(model, policy, windows)
    found = list(compare_with_dense(model, windows, policy, {}, rows=4))
    for row, (scores, got, _) in enumerate(found):
        assert torch.equal(got.ran, trace.ran)
        nll = -logits[row, :-1].log_softmax(-1).gather(1, torch.tensor(windows[row][0])[1:, None])[:, 0]
        assert close(scores[0], nll)
    assert len(found) == 4


def test_the_prompt_and_the_rest_have_policies_of_their_own():
    model, tokens = tiny_model(n_layers=8), text(tiny_model(), 2, 30)
    one, two = (FFNSkip(1, 7, threshold, warm_up_index=3, k=1) for threshold in (0.7, 0.9))
    cache, trace = new_cache(model, 2), Trace()
    for part, policy, prompt_len in (tokens[:, :12], one, 0), (tokens[:, 12:], two, 12):
        model(part, cache, policy, prompt_len, trace=trace)
    for prompt, after, expected in (one, two, trace.ran), (dense, two, None), (one, dense, None):
        got = Trace()
        run(model, tokens, chunks=[12, 18], cache=new_cache(model, 2), policy=InPrompt(prompt, after), prompt_len=12,
            trace=got)
        if expected is not None:
            assert torch.equal(got.ran, expected)
        assert got.ran[:, :, :12].all() == (prompt is dense) and got.ran[:, :, 12:].all() == (after is dense)
    assert replay(torch.ones(3, 8), one) > 0  # the settings skip


def test_a_block_that_did_not_run_says_nothing_of_the_next(model):
    """A row that would have run it, and was outvoted, has a cosine of 1 there, which must not reach a threshold."""
    policy = Together(0, 4, 0.9, warm_up_index=-1, k=1, agree=0.5)
    step = SimpleNamespace(token_index=torch.zeros(2, 1, dtype=torch.long), trace=None)
    h = torch.randn(2, 1, model.args.dim)
    assert policy.cosine(h, h, model.layers[1], step, [1, 0]) == [-math.inf] * 2
    assert policy.cosine(h, h, model.layers[1], step, [0, 0]) == pytest.approx([1.0, 1.0])
