"""
How a policy is measured: on windows of text, by its cosines and its skip ratio, against the dense model; and how it is
brought to a ratio. A window is (ids, prompt_len): a list of token ids, of which the first prompt_len are prompt.
"""

import json
import math
from pathlib import Path
from statistics import NormalDist

import numpy
import torch

from model import KVCache, dense
from skip import FULL, FFNSkip
from support.common import check_finite, check_ids, first_line, import_optional, progress, read_utf8, table
from support.tracing import Trace


def read_jsonl(path, *keys):
    """The records of a JSON Lines file, each with at least one of `keys`. Raises ValueError("FILE:LINE: ...")."""
    return [record for _, record in numbered_jsonl(path, *keys)]


def numbered_jsonl(path, *keys):
    """The same, as (line number, record). A record whose value is an empty text counts as an empty line."""
    expected = f"expected an object with {' or '.join(map(repr, keys))}"
    records, problem = [], "no record in it"
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{path}:{number}: half of a surrogate pair, which no tokenizer can read") from None
        except (ValueError, RecursionError):
            raise ValueError(f"{path}:{number}: not a line of JSON") from None
        if not isinstance(record, dict) or all(record.get(key) is None for key in keys):
            raise ValueError(f"{path}:{number}: {expected}")
        if any(record.get(key) for key in keys):
            records.append((number, record))
        else:
            problem = expected
    if not records:
        raise ValueError(f"{path}:1: {problem}")
    return records


def read_parquet(path, *keys):
    """What numbered_jsonl gives, of a Parquet file, as the Hugging Face hub keeps data sets; needs pyarrow."""
    parquet = import_optional("pyarrow.parquet", f"{path}: a Parquet file", "pip install pyarrow")
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a Parquet file: {first_line(error)}") from None
    records = [(number, row) for number, row in enumerate(rows, start=1) if any(row.get(key) for key in keys)]
    if not records:
        raise ValueError(f"{path}:1: no row in it with {' or '.join(map(repr, keys))}")
    return records


def read_text(files):
    """The text of the files, one after the other: records with a key "text", or plain (as WikiText is)."""
    texts = []
    for file in map(Path, files):
        if file.suffix in (".jsonl", ".json", ".parquet"):
            read = read_parquet if file.suffix == ".parquet" else numbered_jsonl
            for number, record in read(file, "text"):
                if not isinstance(record["text"], str):
                    raise ValueError(f"{file}:{number}: expected a text as the value of 'text'")
                texts.append(record["text"])
        else:
            texts.append(read_utf8(file))
    return "\n\n".join(texts)


def read_cosines(file):
    """(tokens, n_layers) of a CSV file, one row per token and one column per layer, with or without a header."""
    rows = []
    for number, line in enumerate(read_utf8(file).split("\n"), 1):
        values = [to_cosine(cell) for cell in line.split(",")]
        if not line.strip() or number == 1 and values == [None] * len(values):
            continue  # an empty line, or a header
        if None in values:
            raise ValueError(f"{file}:{number}: not a row of cosines")
        if rows and len(values) != len(rows[0]):
            before = f"and the rows before have {len(rows[0])}"
            raise ValueError(f"{file}:{number}: {len(values)} columns, {before}")
        rows.append(values)
    if not rows:
        raise ValueError(f"{file}: no cosines in it: expected one row per token and one column per layer")
    return torch.tensor(rows)


def to_cosine(cell):
    """The number in a cell if it is a cosine, else None."""
    try:
        return float(cell) if -1.01 <= float(cell) <= 1.01 else None
    except ValueError:
        return None


def cut(ids, size, begin=()):
    """The list of ids in windows of `size`, each of which begins with the ids `begin`; the last one may be shorter."""
    step = size - len(begin)
    return [[*begin, *ids[i : i + step]] for i in range(0, len(ids), step)]


def as_windows(tokens):
    """Windows (ids, prompt_len 0) of tokens, (batch, seq)."""
    return [(ids, 0) for ids in tokens.tolist()]


def text_windows(tokenizer, text, n_tokens, size=512):
    """Windows (ids, prompt_len 0) of the first n_tokens of text, each begun as the tokenizer begins a text."""
    ids = tokenizer.encode(text[: 12 * n_tokens], bos=False)[:n_tokens]
    return [(window, 0) for window in cut(ids, size, begin=tokenizer.encode(""))]


def as_tokens(model, ids):
    """A list of ids as (1, seq) on the model's device."""
    check_ids(model, ids)
    return torch.tensor([ids], device=model.tok_embeddings.weight.device)


def as_batch(model, windows):
    """The ids of windows of equal length as (rows, seq) on the model's device."""
    return torch.cat([as_tokens(model, ids) for ids, _ in windows])


def measure(model, windows, warm_up_index, policy=None):
    """
    (tokens, n_layers) fp32: the cosine before and after each FFN block of the dense model, past the warm-up; or what
    another policy records for every layer instead. Raises ValueError if no window is that long.
    """
    if policy is None:
        policy = FFNSkip(0, model.args.n_layers, math.inf, warm_up_index)  # measures every layer, skips none
    cosines = []
    for ids, prompt_len in progress(windows, "measuring"):
        trace = Trace(cosines=True)
        model(as_tokens(model, ids), policy=policy, prompt_len=prompt_len, trace=trace, last_only=True)
        cosines.append(trace.cosine[:, 0, trace.token_index[0] > warm_up_index].T)
        check_finite(cosines[-1])
    cosines = torch.cat(cosines)
    check_past_warm_up(len(cosines), windows, warm_up_index)
    return cosines


def check_past_warm_up(n, windows, warm_up_index):
    """Raise ValueError if n, what was found in windows past the warm-up, is nothing."""
    if not n:
        size = len(windows[-1][0])
        raise ValueError(f"no text in windows of {size} tokens lies past the warm-up of {warm_up_index + 1} tokens")


def skip_ratio(model, policy, windows, rows=1):
    """
    The ffn_skip_ratio of the policy over windows (ids, prompt_len), `rows` of equal length at a time as one batch.
    ValueError if all end within its warm-up.
    """
    skipped, blocks, warm_up_index = 0, 0, getattr(policy, "warm_up_index", -1)
    for group in cut(windows, rows):
        trace = Trace()
        model(as_batch(model, group), policy=policy, prompt_len=group[0][1], trace=trace, last_only=True)
        counts = trace.counts(warm_up_index)
        skipped, blocks = skipped + counts[0], blocks + counts[1]
    check_past_warm_up(blocks, windows, warm_up_index)
    return skipped / blocks


def compare_with_dense(model, windows, policy, reference, decode=False, label="comparing", rows=1):
    """
    For each window (ids, prompt_len) yield scores (3, seq - 1) of the policy's predictions: the negative log-likelihood
    of the next token, the KL divergence from the dense model (both in nats), and 1 where the likeliest token is the
    dense model's; then the Trace and the KVCache. The prompt is one parallel pass and the rest another, or with
    `decode` token by token. reference is a dict that keeps the dense model's states for the next call. With `rows`, so
    many windows of equal length are one batch, and their Trace and KVCache are those of the batch.
    """
    weight = model.tok_embeddings.weight
    for number, group in enumerate(progress(cut(windows, rows), label)):
        tokens, prompt_len = as_batch(model, group), group[0][1]
        if number not in reference:
            reference[number] = dense_state(model, tokens)
        cache, trace = KVCache(model.args, *tokens.shape, weight.dtype, weight.device), Trace()
        logits = []
        for part in tokens[:, :prompt_len], *tokens[:, prompt_len:].split(1 if decode else tokens.size(1), dim=1):
            if part.numel():
                logits.append(model(part, cache, policy, prompt_len, trace=trace))
        logits = torch.cat(logits, dim=1)  # (rows, seq, vocab)
        for row, ids in enumerate(tokens):
            dense_logits = model.logits(reference[number][row : row + 1])[0]  # (seq, vocab)
            yield score(logits[row], dense_logits, ids), trace, cache


def dense_state(model, tokens):
    """(batch, seq, dim): what the dense model gives its norm and output head for tokens (batch, seq)."""
    states = []

    def keep(layers, x, step):
        states.append(dense(layers, x, step))
        return states[0]

    model(tokens, policy=keep, last_only=True)
    return states[0]


def score(logits, dense_logits, tokens):
    """The scores (3, seq - 1) of compare_with_dense from two logits (seq, vocab) of tokens (seq,)."""
    scores = []
    # few enough rows at a time for the processor's caches
    for ours, theirs, next_ids in zip(logits[:-1].split(32), dense_logits[:-1].split(32), tokens[1:].split(32)):
        log_p, log_dense = ours.log_softmax(-1), theirs.log_softmax(-1)  # (32, vocab)
        nll = -log_p.gather(1, next_ids[:, None])[:, 0]
        kl = (log_dense.exp() * (log_dense - log_p)).sum(-1)
        scores.append(torch.stack((nll, kl, (log_p.argmax(-1) == log_dense.argmax(-1)).float())))
    scores = torch.cat(scores, dim=1)
    check_finite(scores)
    return scores


def quality(model, windows, policy, reference):
    """Means over the tokens past the warm-up: ffn_skip_ratio, perplexity, kl and top1 agreement with dense, a dict."""
    scores, counts = [], []
    for score, trace, _ in compare_with_dense(model, windows, policy, reference):
        scores.append(score[:, trace.token_index[0, :-1] > policy.warm_up_index])
        counts.append(trace.counts(policy.warm_up_index))
    check_past_warm_up(sum(score.size(1) for score in scores), windows, policy.warm_up_index)
    nll, kl, top1 = torch.cat(scores, dim=1).cpu().double().mean(1).tolist()
    skipped, blocks = map(sum, zip(*counts))
    return dict(ffn_skip_ratio=skipped / blocks, perplexity=math.exp(nll), kl=kl, top1=top1)


def quality_table(qualities):
    """Lines for people of {name: what `quality` returns}."""
    rows = [["on text held out:", "skipped", "perplexity", "KL", "top-1 as dense"]]
    for name, q in qualities.items():
        cells = f"{q['ffn_skip_ratio']:.3f}", f"{q['perplexity']:.2f}", f"{q['kl']:.3f}", f"{q['top1']:.1%}"
        rows.append([name, *cells])
    return table(rows)


def cold_regions(curve):
    """
    (cold_s, cold_e) from the mean cosine of each layer. In Figure 2 the curve falls over the first layers, rises, and
    falls over the last ones; the rising part is not cold. The paper gives no rule, this one is the project's own:
    - Layers at either end that lie lower than the middle half of the layers by more than its whole range are cold.
    - Of the rest, smoothed over three layers, the first half is cold up to the last layer that lies within a sixth of
      the curve's range of its lowest, since where the curve is flat one low layer says little.
    - The end is cold after the last layer that lies, itself, as near to the highest of the last quarter.
    It gives [10, 30) for LLaMA-2-7B and [10, 38) for 13B, on C4. In the authors' Figure 2 what is not red is [10, 29)
    and [10, 35); the code for their baselines has [10, 28) and [10, 35), and that for the method [5, n_layers - 5).
    """
    curve = torch.as_tensor(curve, dtype=torch.float64)
    quarter = max(1, len(curve) // 4)
    middle = curve[quarter:-quarter] if len(curve) > 2 * quarter else curve
    inside = (curve >= 2 * middle.min() - middle.max()).nonzero()
    start, rest = inside[0].item(), curve[inside[0] : inside[-1] + 1]
    smooth = torch.stack([rest[max(0, i - 1) : i + 2].mean() for i in range(len(rest))])
    near = (smooth.max() - smooth.min()) / 6
    rising = 0
    for i in range(len(rest) // 2):
        if smooth[i] < smooth.min() + near:
            rising = i + 1
    falling = rising
    for i in range(rising, len(rest)):
        if rest[i] >= smooth[-quarter:].max() - near:
            falling = i + 1
    return start + rising, start + falling


def mean_interval(values, blocks=None, resamples=1000, seed=0):
    """
    (mean, low, high): the mean of a list of numbers and the 95% interval of it by bootstrap (Efron 1979) over blocks:
    values of the same block (of one article, say) are drawn together; None: each is a block. The interval of few blocks
    is wider than the quantiles of the means, as Student's t is than the normal distribution (Hesterberg 2015).
    """
    values = numpy.asarray(values, dtype=float)
    _, number = numpy.unique(range(len(values)) if blocks is None else blocks, return_inverse=True)
    sums, sizes = numpy.bincount(number, values), numpy.bincount(number)
    n = len(sums)
    drawn = numpy.random.default_rng(seed).integers(n, size=(resamples, n))
    z, freedom = 1.95996, max(1, n - 1)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)  # by Cornish and Fisher
    tail = NormalDist().cdf(-t * math.sqrt(n / freedom))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return values.mean().item(), low.item(), high.item()


def paired_interval(ours, theirs, blocks=None, resamples=1000, seed=0):
    """mean_interval of ours - theirs, two lists of one number per item (question, window, prompt) in the same order."""
    return mean_interval(numpy.subtract(ours, theirs, dtype=float), blocks, resamples, seed)


def bring_to(at, most, least, wanted, tolerance=0.003, tries=14, first=None):
    """
    What at(value) = (policy, ratio) gives where the ratio is within `tolerance` of the wanted one, or else the nearest
    of so many tries. `most`, `least`: the values at which most and least is skipped; `first`: the one to begin with.
    """
    ratio_most, ratio_least = 1.0, 0.0  # as far as we know yet
    best, miss = None, math.inf
    for i in range(tries):
        # bisection, which always ends, in turn with a straight line between the ends, which is mostly faster
        share = 0.5
        if i % 2 and ratio_most > wanted > ratio_least:
            share = min(max((ratio_most - wanted) / (ratio_most - ratio_least), 0.05), 0.95)
        value = most + (least - most) * share
        if i == 0 and first is not None:
            value = first
        policy, ratio = at(value)
        if abs(ratio - wanted) < miss:
            best, miss = (policy, ratio), abs(ratio - wanted)
        if miss <= tolerance:
            break
        if ratio > wanted:
            most, ratio_most = value, ratio
        else:
            least, ratio_least = value, ratio
    return best


def written_text(model, batch, seq, seed=0, begin=None):
    """(batch, seq) ids that the dense model draws at temperature 1, after the token `begin` or a random one per row."""
    weight, draw = model.tok_embeddings.weight, torch.Generator().manual_seed(seed)
    seq = min(seq, model.args.max_seq_len)
    tokens = torch.randint(model.args.vocab_size, (batch, 1), generator=draw)
    if begin is not None:
        tokens.fill_(begin)
    draw, cache = torch.Generator().manual_seed(seed), KVCache(model.args, batch, seq, weight.dtype, weight.device)
    written = []
    for _ in progress(range(seq), "writing"):
        logits = model(tokens.to(weight.device), cache, last_only=True)[:, -1]
        check_finite(logits.max(-1).values)
        tokens = torch.multinomial((logits - logits.max(-1, keepdim=True).values).cpu().softmax(-1), 1, generator=draw)
        written.append(tokens)
    return torch.cat(written, dim=1).to(weight.device)


def replay(cosines, policy):
    """The ffn_skip_ratio of an FFNSkip over recorded cosines (tokens, n_layers): the mean of its decisions."""
    return decisions(cosines, policy).double().mean().item()


def decisions(cosines, policy):
    """
    (tokens, n_layers) bool: what an FFNSkip skips by recorded cosines (tokens, n_layers) past the warm-up, without
    full_every: a prediction, as what is skipped changes later cosines. The walk of skip.py, a layer's tokens at once.
    """
    n_layers = cosines.size(1)
    thresholds = policy.thresholds(n_layers)
    skip_state = torch.zeros(len(cosines), dtype=torch.long)  # as in skip.py, one number per token
    skipped = torch.zeros(cosines.shape, dtype=torch.bool)
    for i in range(policy.cold_s, policy.cold_e):
        skips = skip_state > 0
        skipped[:, i] = skips
        reached = (skip_state == 0) & (cosines[:, i].double() >= thresholds[i])  # in double, as Python compares
        after = skip_state - skips.long()
        if not policy.recheck:
            after[skips & (after == 0)] = FULL
        skip_state = torch.where(reached, policy.k or n_layers, after)
    return skipped


def plan(cosines, make, wanted):
    """(policy, predicted ratio) of make(threshold) whose replay skips the wanted share; (None, most) if none does."""

    def at(threshold):
        policy = make(threshold)
        return policy, replay(cosines, policy)

    most = at(-1.01)[1]
    if most < wanted:
        return None, most
    return bring_to(at, -1.01, 1.01, wanted, tolerance=0.0002, tries=30)


def saved_in_batches(skipped, rows):
    """
    For each n of rows the share of blocks that none of n tokens needs: skipped (tokens, n_layers) bool, as decisions()
    has it, of which the n that one batch decodes are drawn.
    """
    random, saved = torch.Generator().manual_seed(0), []
    for n in rows:
        drawn = torch.randint(len(skipped), (4000, n), generator=random)
        saved.append(skipped[drawn].all(1).double().mean().item())  # (4000, n, n_layers) -> (4000, n_layers)
    return saved


def variance_shares(cosines):
    """(share of the layers' means, share of the tokens' means) of the variance of cosines, (tokens, n_layers)."""
    cosines = cosines.double()
    layers, tokens = cosines.mean(0).var(unbiased=False), cosines.mean(1).var(unbiased=False)
    return (layers / cosines.var(unbiased=False)).item(), (tokens / cosines.var(unbiased=False)).item()
