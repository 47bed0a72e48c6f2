"""What is right and what is not in the answers to docs/exercises.md: one test or two per exercise, on tiny models."""

import ast
from pathlib import Path

import pytest
import torch
from tiny import close, new_cache, random_ids, run, tiny_model, walk

from model import dense
from policies.baselines import Checkerboard
from skip import FFNSkip
from support.measuring import compare_with_dense, skip_ratio
from support.tracing import Trace

HERE = Path(__file__).parent
TRACE = [0.41, 0.93, 0.952, 0.961, 0.948, 0.957, 0.955, 0.944, 0.958, 0.71]  # as docs/exercises.md prints it
SETTINGS = {
    "as printed": FFNSkip(2, 9, 0.95, -1),
    "k = 1": FFNSkip(2, 9, 0.95, -1, k=1),
    "k = 2": FFNSkip(2, 9, 0.95, -1, k=2),
    "k = 2, recheck off": FFNSkip(2, 9, 0.95, -1, k=2, recheck=False),
}


def given(value):
    """An answer that is a constant; None stands for one that is still blank."""
    if value is None:
        raise NotImplementedError
    return value


def ids(n, seed=0):
    """Token ids (1, n)."""
    return torch.tensor([random_ids(n, seed)])


def skipped_by(policy, cosines):
    """The layers whose block skip.py itself skips for a token with these cosines."""
    return (~walk(policy, torch.tensor(cosines)[:, None], [0]).ran[:, 0, 0]).nonzero().flatten().tolist()


@pytest.mark.parametrize("name", SETTINGS)
def test_1_count_the_skips(name, answers):
    assert given(answers.SKIPPED[name]) == skipped_by(SETTINGS[name], TRACE)


def test_2_break_the_cache(answers):
    model, tokens = tiny_model(n_layers=5), ids(12)
    cache = new_cache(model, 1)
    model(tokens, cache, answers.forget)
    missing = (~cache.written[:, 0, :12]).nonzero().tolist()
    assert missing == [[2, 5]], "only the entry of layer 2 for token 5 may be missing: [layer, token]"


def test_2_what_later_tokens_lose(answers):
    model, tokens = tiny_model(n_layers=5), ids(12)
    found = answers.lost(model, tokens)
    assert 4 not in found and {5, 6} <= set(found), "no token before it reads it"
    off = (model(tokens, policy=answers.forget) - model(tokens)).abs().amax(-1)[0]
    assert found == [column for column in range(12) if off[column] > 0.001]


@pytest.mark.parametrize("skip", [0.1, 0.4])
def test_3_baseline_1_skips_the_share(skip, answers):
    model = tiny_model(n_layers=12, max_seq_len=512)
    ratio = skip_ratio(model, answers.Baseline1(model, skip, warm_up_index=25), [(random_ids(400), 0)])
    assert abs(ratio - skip) < 0.03


def test_3_baseline_1_draws_the_same_coins_however_the_text_is_cut(answers):
    """Token by token, as generate.py decodes, and in one pass, as evaluate.py measures; another seed, other coins."""
    model, tokens, traces = tiny_model(n_layers=6), ids(30), []
    for chunks, seed in ([30], 1), ([1] * 30, 1), ([30], 2):
        policy, trace = answers.Baseline1(model, 0.5, warm_up_index=4, seed=seed), Trace()
        run(model, tokens, chunks, cache=new_cache(model, 1), policy=policy, trace=trace)
        traces.append(trace.ran)
    assert torch.equal(traces[0], traces[1]) and not torch.equal(traces[0], traces[2])
    assert traces[0][:, :, :5].all() and not traces[0][:, :, 5:].all()
    assert (traces[0][:, 0, 5:].sum(0).unique()).numel() > 1, "each token has coins of its own"


def test_4_k(answers):
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        cosines = (0.9 + 0.1 * torch.rand(16, generator=random)).tolist()
        cold_s, length, k = torch.randint(5, (3,), generator=random).tolist()
        cold_e, k = 16 - length, k or None
        threshold = 0.9 + 0.1 * torch.rand((), generator=random).item()
        expected = skipped_by(FFNSkip(cold_s, cold_e, threshold, -1, k), cosines)
        found = answers.skipped_layers(cosines, cold_s, cold_e, threshold, k)
        assert found == expected, (cosines, cold_s, cold_e, threshold, k)


def test_5_the_step_of_bfloat16(answers):
    below_1 = torch.nextafter(torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(0.0, dtype=torch.bfloat16))
    assert given(answers.STEP) == 1 - below_1.item()


def test_5_the_cosine_of_bfloat16_vectors(answers):
    h = torch.randn(50, 576, generator=torch.Generator().manual_seed(0))
    temp = h + 0.2 * torch.randn(50, 576, generator=torch.Generator().manual_seed(1))
    h, temp = h.bfloat16(), temp.bfloat16()
    expected = torch.nn.functional.cosine_similarity(h.double(), temp.double(), dim=-1)
    found = answers.cosine(h, temp)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_6_the_layer_whose_skip_hurts_most(seed, answers):
    model, tokens = tiny_model(seed, n_layers=6), ids(40, seed)
    log_dense, divergences = model(tokens).log_softmax(-1), []
    for skipped in range(6):

        def policy(layers, x, step, skipped=skipped):
            for layer in layers:
                h = layer.add_attention(x, step)
                active = torch.full(h.shape[:2], layer.layer_id != skipped)
                x = layer.add_feed_forward(h, step, active)
            return x

        log_p = model(tokens, policy=policy).log_softmax(-1)
        divergences.append((log_dense.exp() * (log_dense - log_p)).sum(-1).mean().item())
    assert answers.most_harmful(model, tokens) == divergences.index(max(divergences)), divergences


def test_7_better_than_checkerboard(answers):
    """At 15% of the blocks, on text that neither has seen, in the mean over four models."""
    ratios, ours, theirs = [], 0.0, 0.0
    for seed in range(4):
        model = tiny_model(seed, n_layers=12, max_seq_len=256)
        window = [(random_ids(200, seed=100 + seed), 0)]
        better = answers.Better(model, 0.15, warm_up_index=25, tokens=ids(200, seed))
        checkerboard = Checkerboard(model, 0.15, warm_up_index=25, tokens=ids(200, seed))
        ratios.append(skip_ratio(model, better, window))
        for (scores, _, _), (other, _, _) in zip(
            compare_with_dense(model, window, better, {}), compare_with_dense(model, window, checkerboard, {})
        ):
            ours, theirs = ours + scores[1].mean().item() / 4, theirs + other[1].mean().item() / 4
    assert min(ratios) > 0.14, f"it skips {min(ratios):.1%}"
    assert ours < theirs, f"KL from dense: {ours:.4f} nats, and checkerboard's is {theirs:.4f}"


@pytest.mark.parametrize("first", [0, 4, 11])
def test_8_skip_in_the_prompt(first, answers):
    model, tokens = tiny_model(n_layers=6), ids(30)
    policy, traces = FFNSkip(1, 5, 0.7, warm_up_index=2, k=2), []
    for chosen, prompt_len in (answers.SkipInPrompt(policy, first), 20), (policy, first):
        trace = Trace()
        logits = model(tokens, policy=chosen, prompt_len=prompt_len, trace=trace)
        traces.append((trace.ran, logits))
    assert torch.equal(traces[0][0], traces[1][0]) and close(traces[0][1], traces[1][1])
    assert not traces[0][0][:, :, :20].all(), "nothing is skipped in the prompt"
    assert torch.equal(model(tokens, policy=answers.SkipInPrompt(dense, first)), model(tokens))


def names(file):
    """What a Python file defines at its top, without what it imports."""
    found = set()
    for node in ast.parse((HERE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            found.add(node.targets[0].id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
    return found


def test_the_page_prints_the_cosines_that_are_tested():
    page = (HERE.parent.parent / "docs" / "exercises.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| cosine |")]
    assert [float(cell) for cell in row.strip("|").split("|")[1:]] == TRACE


def test_the_blank_file_asks_for_what_is_tested():
    used = {node.attr for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "answers"}  # fmt: skip
    assert names("blank.py") == used <= names("solutions.py")
