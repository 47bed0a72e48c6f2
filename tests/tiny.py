"""
What several test files share: tiny random models and ways to run them, a LLaMA in plain Python floats to check them
against, stand-ins for layers and tokenizers, small files of data, and ways to run a program as its user does.
"""

import cmath
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import strategies as st

from fast import accelerate
from model import KVCache, ModelArgs, Transformer
from support.common import run_command
from support.tracing import Trace

ROOT = Path(__file__).parent.parent


def in_repository(paths):
    """Those of the paths that git has in this repository: what a user has saved among them is not ours. No git: all."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    except FileNotFoundError:
        listed = ""
    known = set()
    for line in listed.splitlines():
        known |= {ROOT / line, *(ROOT / line).parents}
    return [path for path in paths if path in known or not known]


# --- models and texts -------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def tiny_model(seed=0, dtype=torch.float32, **sizes):
    """A random model whose feed-forward blocks matter: nine of ten cosines lie between 0.47 and 1."""
    sizes = dict(dim=16, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=31, hidden_dim=24, max_seq_len=64) | sizes
    model = Transformer(ModelArgs(**sizes))
    random = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.data = torch.randn(weight.shape, generator=random)
        if weight.dim() == 1:
            weight.data = 1 + 0.2 * weight.data  # the norms
        elif name != "tok_embeddings.weight":
            weight.data *= weight.size(1) ** -0.5
        if name.endswith("w2.weight"):
            weight.data *= 4 * torch.rand((), generator=random)  # a different weight for each layer's block
    return accelerate(model.to(dtype)) if os.environ.get("FAST") else model.to(dtype)


@st.composite
def models(draw, n_layers=st.integers(1, 6), dtype=torch.float32):
    """Multi-head, grouped-query and multi-query attention, tied or not, any head_dim."""
    n_heads, n_kv_heads = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1), (6, 3), (6, 2)]))
    return tiny_model(
        seed=draw(st.integers(0, 2**31)),
        dtype=dtype,
        n_layers=draw(n_layers),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        dim=12 if n_heads == 6 else 16,
        head_dim=draw(st.sampled_from([None, 6])) if n_heads > 1 else None,
        hidden_dim=draw(st.sampled_from([8, 21])),
        rope_theta=draw(st.sampled_from([10000.0, 100.0])),
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def texts(draw, model, max_batch=3, max_seq=12):
    """dict(tokens, pad, prompt_len): a batch of token ids whose rows have their own left padding and prompt."""
    batch, seq = draw(st.integers(1, max_batch)), draw(st.sampled_from([max_seq, max_seq // 2, 3, 2, 1]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens = torch.randint(model.args.vocab_size, (batch, seq), generator=random)
    each = st.lists(st.integers(0, seq // 2), min_size=batch, max_size=batch).map(torch.tensor)
    return dict(tokens=tokens, pad=draw(st.none() | each), prompt_len=draw(st.just(0) | each))


def random_ids(n, seed=0, vocab_size=31):
    """A list of n token ids."""
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@st.composite
def chunkings(draw, seq):
    """Lengths that sum to seq: all at once, one by one, or anything between."""
    cuts = draw(st.just(set()) | st.just(set(range(1, seq))) | st.sets(st.integers(1, max(1, seq - 1))))
    cuts = [0, *sorted(cut for cut in cuts if cut < seq), seq]
    return [b - a for a, b in zip(cuts, cuts[1:])]


def new_cache(model, batch, max_seq_len=None):
    return KVCache(model.args, batch, max_seq_len or model.args.max_seq_len, model.tok_embeddings.weight.dtype)


def poisoned_cache(model, batch, max_seq_len=None):
    """A cache of NaN: whatever is read before it is written shows. `.writes` counts how often each slot was written."""
    cache = new_cache(model, batch, max_seq_len)
    cache.k.fill_(math.nan)
    cache.v.fill_(math.nan)
    cache.writes = torch.zeros_like(cache.written, dtype=torch.long)
    write = cache.write

    def counted(layer_id, k, v, active=None):
        columns = slice(cache.length, cache.length + k.size(2))
        cache.writes[layer_id, :, columns] += 1 if active is None else active.long()
        return write(layer_id, k, v, active)

    cache.write = counted
    return cache


def run(model, tokens, chunks=None, cache=None, pad=None, **kwargs):
    """Logits of tokens forwarded chunk by chunk through one cache, poisoned unless given."""
    cache = poisoned_cache(model, len(tokens)) if cache is None else cache
    logits = []
    for part in tokens.split(chunks or [tokens.size(1)], dim=1):
        logits.append(model(part, cache, pad=pad, **kwargs))
        pad = None  # which the cache keeps
    return torch.cat(logits, dim=1)


def is_real(tokens, pad=None):
    """(batch, seq): this column is no padding."""
    return torch.arange(tokens.size(1)) >= torch.zeros(len(tokens), 1) + (0 if pad is None else pad[:, None])


def close(a, b, tolerance=1e-5):
    """Equal to fp32 rounding: the error is within `tolerance` of the largest magnitude."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1))


# --- LLaMA in plain Python --------------------------------------------------------------------------------------------


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def add(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


class NaiveLlama:
    """LLaMA-2 for one text, one token and one head at a time, in Python's 64-bit floats; written from the papers."""

    def __init__(self, model):
        self.args = model.args
        self.weights = {name: weight.double().tolist() for name, weight in model.state_dict().items()}
        self.keys, self.values = {}, {}  # (layer, position, head) -> head_dim floats

    def linear(self, name, x):
        return [dot(row, x) for row in self.weights[name + ".weight"]]

    def norm(self, name, x):
        root_mean_square = math.sqrt(dot(x, x) / len(x) + self.args.norm_eps)
        return [gain * value / root_mean_square for gain, value in zip(self.weights[name + ".weight"], x)]

    def heads(self, x):
        return [x[start : start + self.args.head_dim] for start in range(0, len(x), self.args.head_dim)]

    def turn(self, head, position):
        """Each pair of a head is a complex number, turned by position * theta^(-2i / head_dim) (RoFormer, eq. 13)."""
        turned = []
        for i in range(0, len(head), 2):
            angle = position * self.args.rope_theta ** (-i / len(head))
            pair = complex(head[i], head[i + 1]) * cmath.exp(1j * angle)
            turned += [pair.real, pair.imag]
        return turned

    def embed(self, token):
        return self.weights["tok_embeddings.weight"][token]

    def attention(self, layer, x, position):
        x = self.norm(f"layers.{layer}.attention_norm", x)
        q, k, v = (self.heads(self.linear(f"layers.{layer}.attention.w{name}", x)) for name in "qkv")
        for head in range(self.args.n_kv_heads):
            self.keys[layer, position, head] = self.turn(k[head], position)
            self.values[layer, position, head] = v[head]
        out = []
        for head in range(self.args.n_heads):
            shared = head // (self.args.n_heads // self.args.n_kv_heads)
            query = self.turn(q[head], position)
            missing = [0.0] * self.args.head_dim
            keys = [self.keys.get((layer, p, shared), missing) for p in range(position + 1)]
            values = [self.values.get((layer, p, shared), missing) for p in range(position + 1)]
            weights = [math.exp(dot(query, key) / math.sqrt(self.args.head_dim)) for key in keys]
            out += [dot(weights, column) / sum(weights) for column in zip(*values)]
        return self.linear(f"layers.{layer}.attention.wo", out)

    def feed_forward(self, layer, h):
        h, name = self.norm(f"layers.{layer}.ffn_norm", h), f"layers.{layer}.feed_forward."
        gate = [a / (1 + math.exp(-a)) for a in self.linear(name + "w1", h)]
        return self.linear(name + "w2", [a * b for a, b in zip(gate, self.linear(name + "w3", h))])

    def logits(self, x):
        return self.linear("tok_embeddings" if self.args.tie_word_embeddings else "output", self.norm("norm", x))


# --- stand-ins --------------------------------------------------------------------------------------------------------


class SetCosine:
    """A layer for a policy alone: its block turns h = (1, 0) by the angle of a given cosine, one per token."""

    def __init__(self, layer_id, cosine):
        self.layer_id, self.temp = layer_id, torch.stack((cosine, (1 - cosine**2).sqrt()), dim=-1)[None]

    def add_attention(self, x, step):
        return torch.tensor([1.0, 0.0]).expand(self.temp.shape)  # (1, tokens, 2), whatever was skipped before

    def add_feed_forward(self, h, step, active=None):
        step.trace.record_ran(self.layer_id, active)
        return self.temp if active is None else torch.where(active[..., None], self.temp, h)

    def cosine(self, h, temp):
        return torch.nn.functional.cosine_similarity(h.float(), temp.float(), dim=-1).flatten().tolist()

    def __call__(self, x, step):
        return self.add_feed_forward(self.add_attention(x, step), step)


def walk(policy, cosines, token_index):
    """The Trace of one row of tokens, whose cosines are (layer, token), or (layer, 1) for all tokens alike."""
    cosines = torch.as_tensor(cosines, dtype=torch.float64).expand(-1, len(token_index))
    token_index, trace = torch.tensor([token_index]), Trace()
    trace.begin(len(cosines), token_index, real=torch.ones_like(token_index, dtype=torch.bool))
    layers = [SetCosine(layer_id, row) for layer_id, row in enumerate(cosines)]
    policy(layers, None, SimpleNamespace(token_index=token_index, trace=trace))
    return trace


class Bytes:
    """A tokenizer whose ids are bytes, so that a character is up to four tokens; 0 is end-of-text, and has no text."""

    bos_id, eos_ids = None, {0}

    def encode(self, text, bos=None):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i).decode("utf-8", errors="replace")

    def chat(self, messages):
        return self.encode("".join(f"[{m['role']}] {m['content']}\n" for m in messages))


class Words:
    """Like sentencepiece: a word's token carries the space before it, and decoding drops the first space."""

    def decode(self, ids):
        return "".join(f" {chr(i)}" for i in ids)[1:]


# --- data -------------------------------------------------------------------------------------------------------------

STORY = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_csv(path, *rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_data(folder):
    """One small file for each task of evaluate.py, in the formats that its user has them in."""
    (folder / "text.raw").write_text(STORY * 12)
    write_jsonl(folder / "c4.jsonl", *(dict(text=f"{i} {STORY}") for i in range(3)))
    (folder / "questions.txt").write_text(
        "Which fox is quick? | brown\nWhich dog is lazy? | the dog\nWho minds? | nobody \n"
    )
    turns = [dict(question_id=i, category="writing", turns=[f"Say {i}.", "Say it again."]) for i in (81, 82)]
    write_jsonl(folder / "question.jsonl", *turns)
    stories = [["0", STORY * 2, "A fox jumps."], ["1", "word " * 500, "Words."], ["2", "w " * 800, "Ws."]]
    write_csv(folder / "stories.csv", ["", "text", "y"], *stories)


# --- programs ---------------------------------------------------------------------------------------------------------


def start(script, *args, env=(), **kwargs):
    """A program of this project in a process of its own, as its user starts it, with more of an environment."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.Popen(command, env=os.environ | dict(OMP_NUM_THREADS="1") | dict(env), **kwargs)


def status(main, *args):
    """The exit status of a program, run in this process by its main()."""
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([str(arg) for arg in args]))
    return end.value.code or 0


def mistake(capsys, main, *args):
    """The one line, "error: ...", that a program ends with; notes, in brackets, may stand before it."""
    capsys.readouterr()
    code = status(main, *args)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert code and len(lines) == 1 and lines[0].startswith("error: "), (code, lines)
    return lines[0]
