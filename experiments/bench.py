"""
How fast it is: prefill and decode, dense and skipped, beside the bytes that memory must deliver (Table 4 of the paper).

    python experiments/bench.py                                     the demo model
    python experiments/bench.py --ckpt llama-2-7b --skip 0.2,0.3    a checkpoint, as for generate.py
    python experiments/bench.py --shape 7B --layers 4               random weights: no file, and the speed of real ones
    python experiments/bench.py --peers                             and transformers and llama.cpp, where installed
    python experiments/bench.py --shape 7B --layers 4 --skip 0.3 --context 2048    cost of a token by cache length

variants:
  dense     every block runs
  monitor   Algorithm 1 with sim_threshold=inf and no cold layers: the most that watching can cost
  fixed     blocks chosen in advance are left out: what skipping alone gives
  ffnskip   Algorithm 1 with k=1 and no cold layers, at exactly the ratio asked for: cosines are measured and read back
            as ever, but then a plan drawn by chance, the same as in `fixed`, says which of them reach the threshold. It
            differs from token to token, and with --batch from row to row
All are timed token by token in turn, in one process, each with its own cache and the same tokens; peers follow in each
repeat. A variant's time for a token is its median over the repeats, and the table has the mean of that over the tokens.

columns:
  prefill, decode  tokens/s, of all rows together; the prompt always runs in full
  +-               interquartile range over the repeats, in % of the median
  GB/s             bytes a decoding step needs (weights of what ran, keys and values of the cache) by its time
  of read          the same as a share of the bandwidth at which this run sums one large tensor (CUDA: copies one)
  speed-up, bound  over dense, and the most that the bytes not needed allow
  of saving        share of the time which that bound says can be saved, that was saved
  FLOPs saved      a token, as in Table 4: 2 for each weight of the feed-forward blocks left out
  memory           peak of the process (CUDA: of its tensors) before any peer is loaded
"""

import argparse
import csv
import json
import platform
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from peers import make_peers

import load_weights
import model as llama
from generate import find_checkpoint, find_device, model_name, peak_memory, positive
from model import KVCache, ModelArgs, Transformer, dense
from skip import FFNSkip, Trace

VARIANTS = ("dense", "monitor", "fixed", "ffnskip")


def make_plan(n_layers, skip, tokens, batch=1, seed=0):
    """
    plan[token][layer]: a list of bool, one a row: that feed-forward block is left out. The share `skip` of them all, as
    near as whole blocks come, none in layer 0 and never two in a row: with k=1 the one before is measured.
    """
    order, blocks = random.Random(seed), 0
    plan = [[[False] * batch for _ in range(n_layers)] for _ in range(tokens)]
    for i in range(tokens * batch):
        n = round((i + 1) * skip * n_layers) - blocks  # the running total is right after every token
        if n > n_layers // 2:
            raise ValueError(f"--skip {skip}: of {n_layers} layers at most {n_layers // 2}, each after one that runs")
        blocks += n
        for before, slot in enumerate(sorted(order.sample(range(n_layers - n), n))):
            plan[i // batch][1 + slot + before][i % batch] = True
    return plan


class Fixed:
    """Leaves out what the plan says, and looks at nothing."""

    def __init__(self, plan):
        self.plan = plan

    def __call__(self, layers, x, step):
        now = int(step.token_index[0, 0])
        if now < 0:
            return dense(layers, x, step)
        for layer, skipped in zip(layers, self.plan[now]):
            h = layer.attend(x, step)
            rows = ~torch.tensor(skipped)[:, None] if any(skipped) else None  # (batch, 1)
            x = h if all(skipped) else layer.feed(h, step, rows)
        return x


class Planned(FFNSkip):
    """Algorithm 1, all of it, but for the scores it compares: those make it skip what the plan says."""

    def __init__(self, plan):
        super().__init__(0, len(plan[0]), sim_threshold=0.0, warm_up_index=-1, k=1)
        nothing = [[False] * len(plan[0][0])]  # comes after the last layer
        self.scores = [[[1.0 if s else -1.0 for s in after] for after in token[1:] + nothing] for token in plan]

    def cosine(self, h, temp, layer, step, measured):
        score = super().cosine(h, temp, layer, step, measured)
        return score and self.scores[int(step.token_index[0, 0])][layer.layer_id]


class Ours:
    """One variant at work: `rewind`, then `forward` the prompt, then token by token."""

    def __init__(self, name, model, policy, batch, prompt_len, columns):
        self.name, self.model, self.policy, self.prompt_len = name, model, policy, prompt_len
        weight = model.tok_embeddings.weight
        self.cache = KVCache(model.args, batch, columns, weight.dtype, weight.device)

    def rewind(self):
        self.cache.length, self.trace = 0, Trace()

    def forward(self, tokens):
        """The last token's logits (batch, vocab) of tokens (batch, seq) on the host; the likeliest is found as well."""
        tokens = tokens.to(self.cache.k.device)
        logits = self.model(tokens, self.cache, self.policy, self.prompt_len, trace=self.trace, last_only=True)[:, -1]
        logits.argmax(-1).cpu()  # waits for the device too
        return logits


def compile_blocks():
    """
    torch.compile for what runs between the matrix products, each once for all layers: norms, rotary embedding, SwiGLU. Not
    for attend and feed whole: with its layer's number as a constant each layer's would be compiled again, and with that
    number as a variable Inductor of PyTorch 2.13 fills the cache with wrong keys.
    """
    for owner, name in (llama, "rotate"), (llama.RMSNorm, "forward"), (llama.FeedForward, "forward"):
        setattr(owner, name, torch.compile(getattr(owner, name), dynamic=True))


def random_model(args, dtype, device):
    """A model whose activations stay of the size of 1, made where it runs."""
    with torch.device("meta"):
        model = Transformer(args)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.fill_(1) if weight.dim() == 1 else weight.uniform_(-1, 1).mul_((3 / weight.size(1)) ** 0.5)
    return model


def reader(device):
    """A function that sums (CUDA: copies) one large tensor, and returns bytes/s."""
    big = torch.ones(2**13, 2**13, device=device)  # 256 MiB of float32
    other = torch.empty_like(big) if device.type == "cuda" else None

    def read():
        begin = time.perf_counter()
        out = big.sum() if other is None else other.copy_(big)[0, 0]
        out.item()  # waits for the device
        return big.nbytes * (1 if other is None else 2) / (time.perf_counter() - begin)

    return read


def bytes_needed(args, itemsize, batch, columns, ffn_run=1.0):
    """Of one decoding step: the weights without the embedding's other rows, and `columns` of keys and values a row."""
    attention = args.dim * args.head_dim * (2 * args.n_heads + 2 * args.n_kv_heads)
    layer = attention + ffn_run * 3 * args.dim * args.hidden_dim + 2 * args.dim  # 2 norms
    cache = batch * columns * 2 * args.n_kv_heads * args.head_dim
    return itemsize * (args.n_layers * (layer + cache) + args.dim + args.vocab_size * args.dim)


def flops_saved(args, skip):
    """
    A token: two, a multiplication and an addition, for each weight of the feed-forward blocks left out. Table 4 has
    these, cut after the first decimal, but for its 0.3B at 5 %, which would be 0.4B.
    """
    return 2 * 3 * args.dim * args.hidden_dim * args.n_layers * skip


def read_back(device):
    """Seconds to bring one number from the device to the host: what each monitored layer costs beside its kernels."""
    x = torch.ones(1, device=device)
    return statistics.median(timed(x.tolist) for _ in range(101))


def versions(peers):
    names = ["torch"] + [peer.package for peer in peers]
    return f"python {platform.python_version()}, " + ", ".join(f"{name} {metadata.version(name)}" for name in names)


def timed(function, *args):
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def measure(runners, peers, prompt, tokens, repeats, read):
    """Seconds of prefill {runner: (repeats,)} and of decoding {runner: (repeats, tokens)}; bytes/s of plain reading."""
    prefill, decode, bandwidth = {}, {}, []
    for _ in range(repeats):
        for group in [runners, *([peer] for peer in peers)]:
            time.sleep(0.05)  # the threads of the one before spin for a while, waiting for work
            for runner in group:
                runner.rewind()
                prefill.setdefault(runner, []).append(timed(runner.forward, prompt))
            for token in tokens.split(1, dim=1):
                for runner in group:
                    decode.setdefault(runner, []).append(timed(runner.forward, token))
                if group is runners:
                    bandwidth.append(read())
    decode = {runner: torch.tensor(times).view(repeats, -1) for runner, times in decode.items()}
    return {r: torch.tensor(times) for r, times in prefill.items()}, decode, torch.tensor(bandwidth).median().item()


def row(runner, base, times, first, last, args, options, itemsize, bandwidth):
    """What is said of a runner's decoding steps [first, last), in which its cache grew; `base` is dense."""
    prefill, decode, _ = times
    middle = {r: decode[r].quantile(0.5, dim=0)[first:last] for r in (runner, base)}  # (steps,)
    seconds, dense_seconds = middle[runner].mean().item(), middle[base].mean().item()
    by_repeat = decode[runner][:, first:last].mean(1)  # (repeats,)
    low, high = by_repeat.quantile(0.25).item(), by_repeat.quantile(0.75).item()
    batch, trace = options.batch, getattr(runner, "trace", None)
    ran = trace.ran[:, :, options.prompt :] if trace else torch.ones(1, 1, last, dtype=torch.bool)
    ran = ran[:, :, first:last]  # (layer, batch, step)
    columns = options.prompt + (first + last + 1) / 2  # that the mean step attends to
    needed = bytes_needed(args, itemsize, batch, columns, ran.any(1).double().mean().item())
    bound = bytes_needed(args, itemsize, batch, columns) / needed
    skipped = (~ran).sum().item() / ran.numel()
    return dict(
        variant=runner.name,
        ffn_skip_ratio=skipped,
        columns=options.prompt + last,
        prefill_tokens_per_s=batch * options.prompt / prefill[runner].quantile(0.5).item(),
        decode_tokens_per_s=batch / seconds,
        spread=(high - low) / seconds if len(by_repeat) > 1 else None,
        ms_per_step=seconds * 1e3,
        gb_per_s=needed / seconds / 1e9,
        share_of_read=needed / seconds / bandwidth,
        speedup=dense_seconds / seconds,
        speedup_bound=bound,
        share_of_saving=(dense_seconds - seconds) / (dense_seconds * (1 - 1 / bound)) if bound > 1 else None,
        gflops_saved=flops_saved(args, skipped) / 1e9,
    )


COLUMNS = dict(
    variant=("variant", "{}"), ffn_skip_ratio=("skipped", "{:.1%}"), columns=("columns", "{}"),
    prefill_tokens_per_s=("prefill", "{:.1f}"), decode_tokens_per_s=("decode", "{:.2f}"), spread=("+-", "{:.1%}"),
    ms_per_step=("ms/step", "{:.2f}"), gb_per_s=("GB/s", "{:.2f}"), share_of_read=("of read", "{:.1%}"),
    speedup=("speed-up", "{:.3f}"), speedup_bound=("bound", "{:.3f}"), share_of_saving=("of saving", "{:.0%}"),
    gflops_saved=("FLOPs saved", "{:.2f} G"),
)  # fmt: skip
FIELDS = """device threads dtype model batch prompt steps repeats compile read_gb_per_s peak_memory_bytes readback_us
versions command""".split() + list(COLUMNS)


def table(rows):
    """Lines for people."""
    cells = [[heading for heading, _ in COLUMNS.values()]]
    cells += [["-" if r[key] is None else form.format(r[key]) for key, (_, form) in COLUMNS.items()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in cells]


def check_out(path):
    """Raise ValueError, before hours of measuring, if rows cannot be appended to the CSV."""
    if path.exists() and path.read_text().split("\n")[0].split(",") != FIELDS:
        raise ValueError(f"{path}: has other columns than this version of bench.py writes: move it away")
    path.parent.mkdir(parents=True, exist_ok=True)


def save(path, rows):
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in r.items()} for r in rows)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")  # one line

    def listed(kind):
        return lambda text: [kind(part) for part in text.split(",") if part]

    add = parser.add_argument
    add("--ckpt", help="a checkpoint, as for generate.py; default: the demo model")
    add("--shape", choices=llama.SIZES, help="instead: random weights of that size of LLaMA-2")
    add("--layers", type=positive, metavar="N", help="with --shape: so many layers, and the whole head")
    add("--skip", type=listed(float), default=[0.05, 0.1, 0.2, 0.3, 0.5], metavar="R,R",
        help="shares of FFN blocks to leave out, up to 0.5; 0 is dense (default 0.05,0.1,0.2,0.3,0.5)")  # fmt: skip
    add("--variants", type=listed(str), default=VARIANTS, help=f"default {','.join(VARIANTS)}; dense always runs")
    add("--peers", action="store_true", help="also transformers and llama.cpp (CPU, --batch 1), where installed")
    add("--prompt", type=positive, default=128, metavar="N", help="tokens of the prompt (default 128)")
    add("--tokens", type=positive, default=20, metavar="N", help="tokens to decode (default 20)")
    add("--repeats", type=positive, metavar="N", help="how often, prompt and all (default 5, with --context 1)")
    add("--context", type=positive, metavar="N", help="decode to N columns of cache, a row for each doubling")
    add("--batch", type=positive, default=1, metavar="N", help="rows, which disagree about what to skip (default 1)")
    add("--device", help="default: cuda or mps where there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's; bfloat16 with --shape")
    add("--compile", action="store_true", help="torch.compile for norms, rotary embedding and SwiGLU; slow to start")
    add("--out", type=Path, default=HERE / "results" / "bench.csv", metavar="FILE",
        help="CSV to append to (default experiments/results/bench.csv)")  # fmt: skip
    options = parser.parse_args(argv)
    for skip in options.skip:
        if not 0 <= skip <= 0.5:
            parser.error(f"--skip {skip} is not between 0 and 0.5: with k=1 one block runs before each left out")
    for variant in options.variants:
        if variant not in VARIANTS:
            parser.error(f"no variant {variant}: choose from {', '.join(VARIANTS)}")
    if options.ckpt and options.shape:
        parser.error("--ckpt and --shape exclude each other")
    if options.layers and not options.shape:
        parser.error("--layers goes with --shape")
    if options.context and options.context <= options.prompt:
        parser.error(f"--context {options.context} leaves nothing to decode after --prompt {options.prompt}")
    return options


def make_runners(model, options, steps):
    """Our variants. Those that skip share one plan for each ratio."""
    n_layers, rest = model.args.n_layers, (options.batch, options.prompt, options.prompt + steps)
    runners = [Ours("dense", model, None, *rest)]
    if "monitor" in options.variants:
        runners.append(Ours("monitor", model, FFNSkip(0, n_layers, float("inf"), warm_up_index=-1), *rest))
    for skip in filter(None, options.skip):
        plan = make_plan(n_layers, skip, steps, options.batch)
        for name, policy in ("fixed", Fixed), ("ffnskip", Planned):
            if name in options.variants:
                runners.append(Ours(name, model, policy(plan), *rest))
    return runners


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = parse_args(argv)
    check_out(options.out)
    device = find_device(options.device)
    if options.shape:
        layers = dict(n_layers=options.layers) if options.layers else {}
        args = ModelArgs.named(options.shape, **layers)
        name = f"{options.shape} with {args.n_layers} layers, random"
        model = random_model(args, getattr(torch, options.dtype or "bfloat16"), device)
    else:
        ckpt = find_checkpoint(options.ckpt)
        name, model = model_name(ckpt), load_weights.load_model(ckpt, device, options.dtype)
    weight = model.tok_embeddings.weight
    steps = options.context - options.prompt if options.context else options.tokens
    repeats = options.repeats or (1 if options.context else 5)
    runners = make_runners(model, options, steps)
    if options.compile:
        compile_blocks()
    random_ids = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.args.vocab_size, (options.batch, options.prompt + steps), generator=random_ids)
    prompt, tokens = tokens[:, : options.prompt], tokens[:, options.prompt :]

    read = reader(device)
    measure(runners, [], prompt, tokens[:, :5], 1, read)  # warm-up
    memory = peak_memory(device)
    with tempfile.TemporaryDirectory() as folder:
        peers = list(make_peers(model, options.batch, options.prompt + steps, folder)) if options.peers else []
        runners[0].rewind()
        logits = runners[0].forward(prompt).cpu()
        for peer in peers:
            peer.rewind()
            if torch.cosine_similarity(peer.forward(prompt).cpu(), logits).min() < 0.99:
                raise ValueError(f"{peer.name} computes something else with these weights: no comparison")
        measure([], peers, prompt, tokens[:, :5], 1, read)
        times = measure(runners, peers, prompt, tokens, repeats, read)

    edges = [0, steps]
    while options.context and edges[1] + options.prompt > 2 * options.prompt:  # halves, from the longest cache down
        edges.insert(1, max((edges[1] + options.prompt) // 2 - options.prompt, 0))
    rows = [
        row(runner, runners[0], times, first, last, model.args, options, weight.element_size(), times[2])
        for runner in [*runners, *peers] for first, last in zip(edges, edges[1:]) if first < last
    ]  # fmt: skip
    about = dict(
        device=device_name(device), threads=torch.get_num_threads(), dtype=str(weight.dtype).removeprefix("torch."),
        model=name, batch=options.batch, prompt=options.prompt, steps=steps, repeats=repeats, compile=options.compile,
        read_gb_per_s=times[2] / 1e9, peak_memory_bytes=memory, readback_us=1e6 * read_back(device),
        versions=versions(peers), command=shlex.join(["python", "experiments/bench.py", *argv]),
    )  # fmt: skip
    print(*table(rows), sep="\n")
    print("{model}, {dtype}, batch {batch}, prompt {prompt}, {device}, {threads} threads".format(**about))
    print("plain read {read_gb_per_s:.1f} GB/s; one read-back {readback_us:.1f} us; ".format(**about)
          + ("peak memory unknown" if memory is None else f"peak memory {memory / 1e9:.2f} GB"))  # fmt: skip
    save(options.out, [about | r for r in rows])
    print(json.dumps(about | dict(rows=rows)))


if __name__ == "__main__":
    load_weights.run_command(main)
