"""
How fast it is: prefill and decode, dense and skipped, beside the bytes that memory must deliver (Table 4 of the paper).

    python experiments/bench.py                                     the demo model
    python experiments/bench.py --ckpt llama-2-7b --skip 0.2,0.3    a checkpoint, as for generate.py
    python experiments/bench.py --shape 7B --layers 4               random weights: no file, and the speed of real ones
    python experiments/bench.py --peers                             and transformers and llama.cpp, where installed
    python experiments/bench.py --products                          the ways to multiply one row, on this CPU

variants, each with its own cache and the same tokens; they take turns at every token, in an order drawn anew for each,
and peers follow in each repeat:
  dense     every block runs
  monitor   Algorithm 1 with sim_threshold=1.0005 and no cold layers: every layer is monitored, and nothing is skipped
  fixed     blocks chosen in advance are skipped, and nothing is measured: what skipping alone gives
  ffnskip   Algorithm 1 with k=1 and no cold layers, at exactly the ratio asked for: cosines are measured and read back
            as ever, but then a plan drawn at random, the same as in `fixed`, says which of them reach the threshold. It
            differs from token to token, and with --batch from row to row
  teal      of each input of w1, w3 and w2 the share --skip is left out (policies/teal.py); teal_all: of every matrix of
            the layers. Where these are not by columns, a copy of the model by columns is made. Not among the default
            variants
  standins  the stand-ins of policies/standins.py with one of --maps maps of rank --rank for what the same plan skips:
            every layer's harm is predicted and read back. The maps count in GB/s and in the bound. Not among the
            default variants
The time of a token is its median over the repeats, and the table has the mean of that over the tokens. With
--skip-prompt the table is of the prompt: the median over the repeats of dense's time by the variant's, and the bound
by arithmetic, without that of cosines and maps.

The table shows tokens/s, the speed-up over dense, the most that the bytes not needed allow (bound), and how much of the
time which that bound says can be saved was saved. The CSV has more: of_llama_cpp and of_transformers, decoding by the
peer's; spread, the interquartile range over the repeats by the median; gb_per_s, the bytes a decoding step needs by its
time, and share_of_read, the same by the bandwidth at which this run sums one large tensor (CUDA: copies one);
gflops_saved per token, as in Table 4; and the peak memory of the process (CUDA: of its tensors) before any peer is
loaded. Under torchrun bytes and memory are those of the first process, FLOPs of all.
"""

import copy
import csv
import io
import math
import platform
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)
import torch
import plot
from peers import make_peers

from fast import accelerate, one_row, parallel
from fast.graphs import add_graphs
from load_weights import load_model
from model import KVCache, ModelArgs, Transformer
from policies import teal
from policies.standins import PARTS, StandIns, ready
from skip import FFNSkip
from support import common
from support.cache import rewind
from support.tracing import Trace

TEAL = "teal", "teal_all"
SIZES = {  # of the published LLaMA-2: ModelArgs(**SIZES["13B"])
    "7B": dict(),
    "13B": dict(dim=5120, n_layers=40, n_heads=40, hidden_dim=13824),
    "70B": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672),
}
VARIANTS = ["dense", "monitor", "fixed", "ffnskip", "standins", *TEAL]
COLUMNS = """variant ffn_skip_ratio columns prefill_tokens_per_s decode_tokens_per_s spread ms_per_step gb_per_s
share_of_read speedup speedup_bound share_of_saving of_llama_cpp of_transformers gflops_saved prompt_skip_ratio
prefill_speedup prefill_bound""".split()
FIELDS = """commit device threads dtype model batch prompt steps repeats read_gb_per_s peak_memory_bytes readback_us
versions command""".split() + COLUMNS
WAYS = ["linear", "native linear", "mv", "native mv", "columns"]  # native: without oneDNN; see fast/one_row.py


def make_plan(n_layers, skip, tokens, batch=1, seed=0):
    """
    plan, (token, layer, row) bool: True where that row of the batch skips that feed-forward block. These are the share
    `skip` of all blocks, as nearly as whole blocks allow. With k=1 the block before is measured, so that none is layer
    0's and no two follow each other. Raises ValueError if the share is too large for that.
    """
    order, blocks = random.Random(seed), 0  # blocks skipped so far
    plan = torch.zeros(tokens, n_layers, batch, dtype=torch.bool)
    for i in range(tokens * batch):
        n = round((i + 1) * skip * n_layers) - blocks  # the running total is right after every token
        if n > n_layers // 2:
            raise ValueError(f"--skip {skip}: of {n_layers} layers at most {n_layers // 2}, each after one that runs")
        blocks += n
        # Draw n places, then widen each to two layers, of which the second is skipped: no two of these are neighbours
        for before, place in enumerate(sorted(order.sample(range(n_layers - n), n))):
            plan[i // batch, 1 + place + before, i % batch] = True
    return plan


def of_tokens(plan, token_index):
    """What the plan (token, layer, row) says of the tokens (batch, seq) of a pass: a flat list for each layer."""
    rows = torch.arange(plan.size(2))[:, None]
    return plan[token_index, :, rows].flatten(0, 1).T.tolist()  # (batch, seq, layer) -> (layer, batch * seq)


class Planned(FFNSkip):
    """Algorithm 1, except that the plan, not the cosine, decides. `monitored`: cosines are computed and read back."""

    def __init__(self, plan, monitored):
        super().__init__(0, plan.size(1), sim_threshold=0.5, warm_up_index=-1, k=1)
        self.monitored = monitored
        self.plan = torch.cat((plan[:, 1:], torch.zeros_like(plan[:, :1])), dim=1)  # True before a skipped block

    def generate_with_skip_model(self, layers, input_state, step, full):
        self.scores = of_tokens(self.plan, step.token_index)
        return super().generate_with_skip_model(layers, input_state, step, full)

    def cosine(self, h, temp, layer, step, skip_state):
        """One score per token, which reaches the threshold where the plan skips the next block."""
        if self.monitored:
            super().cosine(h, temp, layer, step, skip_state)
        return self.scores[layer.layer_id]


class PlannedStandIns(StandIns):
    """Maps of zeros, which take as long as others; harm is predicted and read back, but the plan decides."""

    def __init__(self, plan, model, n, rank):
        n_layers, dim = model.args.n_layers, model.args.dim
        weight, self.plan = model.layers[0].feed_forward.w1.weight, plan
        shapes = dict(down=(n, rank, dim), up=(n, dim, rank), mean=(n, dim), probe=(dim,), bias=())
        fitted = {name: torch.zeros(n_layers, *shape, device=weight.device) for name, shape in shapes.items()}
        fitted["centre"] = torch.randn(n_layers, n, dim).to(weight.device)  # so that tokens choose different ones
        super().__init__(ready(fitted, weight.dtype), 0.0, n_layers, warm_up_index=-1)

    def __call__(self, layers, x, step):
        self.skips = of_tokens(self.plan, step.token_index.clamp(min=0))  # below 0, in the prompt, nothing is skipped
        return super().__call__(layers, x, step)

    def decide(self, h, layer, step, remaining):
        decided = super().decide(h, layer, step, remaining)
        return self.skips[layer.layer_id] if any(remaining) else decided

    def bytes_read(self, ffn_run):
        """Of a step that runs the share ffn_run of the feed-forward blocks: all probes, and of the rest the
        centres and one map."""
        sizes = {name: sum(part.nbytes for part in self.fitted[name]) for name in PARTS[:-1]}
        probes, centres, n = sizes.pop("probe"), sizes.pop("centre"), len(self.fitted["centre"][0])
        return probes + (1 - ffn_run) * (centres + sum(sizes.values()) / n)


class Variant:
    """The model under one policy, with its own cache: call `rewind`, then `forward` with the prompt and each token."""

    def __init__(self, name, model, policy, batch, prompt_len, columns):
        self.name, self.model, self.policy, self.prompt_len = name, model, policy, prompt_len
        weight = model.tok_embeddings.weight
        self.cache = KVCache(model.args, batch, columns, weight.dtype, weight.device)
        add_graphs(model, self.cache)

    def rewind(self):
        rewind(self.cache)
        self.trace = Trace()

    def forward(self, tokens):
        """The last token's logits (batch, vocab) of tokens (batch, seq) on the host; the likeliest is found as well."""
        tokens = tokens.to(self.cache.k.device)
        logits = self.model(tokens, self.cache, self.policy, self.prompt_len, trace=self.trace, last_only=True)[:, -1]
        logits.argmax(-1).cpu()  # waits for the device too
        return logits


def make_variants(model, options):
    """The variants that the command line asks for, dense first."""
    n_layers, columns = model.args.n_layers, options.prompt + options.tokens
    prompt_len, planned = options.prompt, options.tokens
    if options.skip_prompt:
        prompt_len, planned = 0, columns
    policies = [("dense", None), ("monitor", FFNSkip(0, n_layers, sim_threshold=1.0005, warm_up_index=-1))]
    for skip in options.skip:
        if skip > 0:
            plan = make_plan(n_layers, skip, planned, options.batch, options.seed)
            policies += [("fixed", Planned(plan, monitored=False)), ("ffnskip", Planned(plan, monitored=True))]
            if "standins" in options.variants:  # whose maps take memory
                policies.append(("standins", PlannedStandIns(plan, model, options.maps, options.rank)))
    variants = []
    for name, policy in policies:
        if name in ("dense", *options.variants):
            variants.append(Variant(name, model, policy, options.batch, prompt_len, columns))
    if set(TEAL) & set(options.variants):
        by_columns = model
        if not all(one_row.is_by_columns(weight) for weight in model.layers[0].feed_forward.parameters()):
            by_columns = copy.deepcopy(model)  # which the policy stores so
        tokens = torch.randint(model.args.vocab_size, (1, min(128, model.args.max_seq_len)))
        for name, skip in product(TEAL, options.skip):
            if name in options.variants and skip > 0:
                policy = teal.POLICIES[name](by_columns, skip, warm_up_index=-1, tokens=tokens)
                variants.append(Variant(name, by_columns, policy, options.batch, prompt_len, columns))
    return variants


def random_model(options, device):
    """A model of LLaMA-2's shape whose activations stay of the size of 1, made where it runs; and its name."""
    args = ModelArgs(**SIZES[options.shape])
    args.n_layers = options.layers or args.n_layers
    with torch.device("meta"):
        model = parallel.connect(Transformer(parallel.local(args))).to(getattr(torch, options.dtype or "bfloat16"))
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.fill_(1)  # norms
        if weight.dim() > 1:
            weight.uniform_(-1, 1).mul_((3 / weight.size(1)) ** 0.5)
        weight.data = one_row.stored(name, weight.data, device, weight.dtype)
    return accelerate(model), f"{options.shape} with {args.n_layers} layers, random"


def bytes_needed(model, cache, columns, ffn_read=1.0, attention_read=1.0):
    """Bytes that one step reads: weights, these shares of the layers' parts, and `columns` of the cache."""
    weights = common.weight_bytes(model)
    weights["feed_forward"] *= ffn_read
    weights["attention"] *= attention_read
    return sum(weights.values()) + columns * 2 * cache.k[..., 0, :].nbytes


def flops_saved(args, skip):
    """
    Per token: 2, a multiplication and an addition, for each weight of the feed-forward blocks that are skipped. Table
    4 has these numbers, cut after the first decimal, except for its 0.3B at 5 %, which would be 0.4B.
    """
    return 2 * 3 * args.dim * args.hidden_dim * args.n_layers * skip


def prompt_flops(args, prompt, skip=0.0):
    """Operations of a pass over so many tokens, where the share `skip` of their feed-forward blocks does not run."""
    attention = args.dim * args.head_dim * (2 * args.n_heads + 2 * args.n_kv_heads)  # weights of a layer
    scores = args.n_heads * args.head_dim * (prompt + 1)  # each token sees half of the others, twice
    per_token = args.n_layers * (attention + scores + (1 - skip) * 3 * args.dim * args.hidden_dim)
    return 2 * (prompt * per_token + args.dim * args.vocab_size)  # logits of the last token alone


def timed(function, *args):
    """Seconds that function(*args) takes."""
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def plain_read(big):
    """Bytes/s at which the large tensor `big` is summed; on CUDA copied, which reads and writes it."""
    begin = time.perf_counter()
    out = big.clone() if big.is_cuda else big.sum()
    out.view(-1)[0].item()  # waits for the device
    return big.nbytes * (1 + big.is_cuda) / (time.perf_counter() - begin)


def measure(variants, peers, prompt, tokens, repeats, big):
    """
    Time prompt, (batch, seq), for all in turn, and tokens, (batch, steps), one by one: variants take turns at every
    token, a peer decodes alone. Leaves seconds in their `prefill`, (repeats,), and `decode`, (repeats, steps); returns
    plain_read's median.
    """
    for runner in [*variants, *peers]:
        runner.prefill, runner.decode = torch.empty(repeats), torch.empty(repeats, tokens.size(1))
    bandwidth = []
    for repeat in range(repeats):
        for runner in random.sample([*variants, *peers], len(variants) + len(peers)):
            runner.rewind()
            time.sleep(0.05)  # the threads of the one before spin for a while, waiting for work
            runner.prefill[repeat] = timed(runner.forward, prompt)
        for group in [variants, *([peer] for peer in peers)]:
            time.sleep(0.05)
            for i, token in enumerate(tokens.split(1, dim=1)):
                for runner in random.sample(group, len(group)):  # a fixed order moves results by several percent
                    runner.decode[repeat, i] = timed(runner.forward, token)
                if group is variants:
                    bandwidth.append(plain_read(big))
    return torch.tensor(bandwidth).median().item()


def make_row(runner, base, bandwidth, options):
    """The COLUMNS about a runner that has been measured; `base` is dense."""
    batch, prompt, steps = options.batch, options.prompt, options.tokens
    seconds = runner.decode.quantile(0.5, dim=0).mean().item()  # (repeats, steps) -> of one step
    base_seconds = base.decode.quantile(0.5, dim=0).mean().item()
    spread = None
    if len(runner.decode) > 1:
        low, high = runner.decode.mean(1).quantile(torch.tensor([0.25, 0.75])).tolist()
        spread = (high - low) / seconds
    skipped, ffn_run, attention_read, in_prompt = 0.0, 1.0, 1.0, 0.0
    if isinstance(runner, Variant):
        read = runner.trace.read[:, :, prompt:].double()  # (layer, batch, step)
        skipped = 1 - read.mean().item()
        in_prompt = 1 - runner.trace.read[:, :, :prompt].double().mean().item()
        ffn_run = read.amax(1).mean().item()  # the weights of a block are read if any row needs them
        attention_read = 1 - runner.trace.unread("attention")[:, :, prompt:].amin(1).mean().item()
    attended = prompt + (steps + 1) / 2  # columns, by the mean step
    needed = bytes_needed(base.model, base.cache, attended, ffn_run, attention_read)
    if isinstance(runner, Variant) and isinstance(runner.policy, PlannedStandIns):
        needed += runner.policy.bytes_read(ffn_run)
    bound = bytes_needed(base.model, base.cache, attended) / needed
    possible = base_seconds * (1 - 1 / bound)  # seconds that can be saved
    args = base.model.args
    return dict(
        variant=runner.name, ffn_skip_ratio=skipped, columns=prompt + steps,
        prefill_tokens_per_s=batch * prompt / runner.prefill.quantile(0.5).item(),
        decode_tokens_per_s=batch / seconds, spread=spread, ms_per_step=seconds * 1e3,
        gb_per_s=needed / seconds / 1e9, share_of_read=needed / seconds / bandwidth,
        speedup=base_seconds / seconds, speedup_bound=bound,
        share_of_saving=(base_seconds - seconds) / possible if bound > 1.001 else None,
        gflops_saved=parallel.size * flops_saved(args, skipped) / 1e9,
        prompt_skip_ratio=in_prompt, prefill_speedup=(base.prefill / runner.prefill).quantile(0.5).item(),
        prefill_bound=prompt_flops(args, prompt) / prompt_flops(args, prompt, in_prompt),
    )  # fmt: skip


def add_peer_ratios(rows):
    """Fill the columns that compare the rows, dicts of COLUMNS, with the peers among them."""
    speeds = {row["variant"]: row["decode_tokens_per_s"] for row in rows}
    for peer, column in ("llama.cpp", "of_llama_cpp"), ("transformers", "of_transformers"):
        for row in rows:
            row[column] = row["decode_tokens_per_s"] / speeds[peer] if peer in speeds else None


def multiply(way, x, weight):
    """A weight by x, (dim,), in one of the WAYS; for "columns" it must be stored so."""
    if way == "columns":
        parts = math.gcd(torch.get_num_threads(), len(weight))
        return one_row.sum_of_columns(one_row.with_columns(x, parts), one_row.table_of(weight, parts))
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, not way.startswith("native")
    out = torch.mv(weight, x) if way.endswith("mv") else torch.nn.functional.linear(x, weight)
    torch.backends.mkldnn.enabled = before
    return out


def time_products(model, repeats=5):
    """
    Print, per shape of a matrix, the milliseconds that all products of a token with such matrices take in each way, and
    which one fast/one_row.py takes.
    """
    weights = {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and (weight is not model.tok_embeddings.weight or model.output is None):
            weights.setdefault((*weight.shape, one_row.is_by_columns(weight)), []).append(weight)
    print(f"{'matrices':>22}" + "".join(f"{way:>15}" for way in WAYS) + "  taken")
    for (rows, columns, by_columns), some in weights.items():
        best = dict.fromkeys(WAYS, math.inf)
        for way in WAYS:
            for weight in some:  # one layout after the other, so that there is no second copy
                weight.data = one_row.by_columns(weight) if way == "columns" else weight.contiguous()
            for _ in range(repeats):
                x = torch.ones(columns, dtype=some[0].dtype)
                best[way] = min(best[way], sum(timed(multiply, way, x, weight) for weight in some))
        taken = "columns" if by_columns else one_row.way_of_one(some[0].dtype)
        title = f"{len(some)} of {rows} x {columns}"
        print(f"{title:>22}" + "".join(f"{1e3 * best[way]:12.2f} ms" for way in WAYS) + f"  {taken}")


def check_out(path):
    """Raises ValueError, before hours of measuring, if rows cannot be appended to the CSV."""
    if path.exists() and path.read_text().split("\n")[0].split(",") != FIELDS:
        raise ValueError(f"{path}: has other columns than this version of bench.py writes: move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    common.check_outputs(path)


def save(path, rows):
    """Appends rows, dicts with the keys FIELDS, to the CSV."""
    out, before = io.StringIO(), common.read_utf8(path) if path.exists() else ""
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    if not before:
        writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})
    common.write_whole(path, before + out.getvalue())


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def commit():
    """The first seven digits of the commit that is measured, with a + if code was changed since; "" outside git."""
    head = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, cwd=HERE)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], cwd=HERE.parent, capture_output=True)
    return head.stdout.strip() + "+" * (changed.returncode == 1)


def names(text):
    return [part for part in text.split(",") if part]


def shares(text):
    return list(map(float, names(text)))


def parse_args(argv):
    parser, positive = common.Parser(__doc__), common.positive
    common.add_model_arguments(parser)
    add = parser.add_argument
    add("--shape", choices=SIZES, help="instead: random weights of that size of LLaMA-2; default --dtype bfloat16")
    add("--layers", type=positive, metavar="N", help="with --shape: so many layers, and the whole head")
    add("--skip", type=shares, default="0.05,0.1,0.2,0.3,0.5", help="shares of FFN blocks (default %(default)s)")
    add("--variants", type=names, default=",".join(VARIANTS[:4]), help="default %(default)s; dense always runs")
    add("--maps", type=positive, default=16, metavar="N", help="of variant standins, to choose from (default 16)")
    add("--rank", type=positive, default=64, metavar="R", help="of these maps (default 64)")
    add("--peers", action="store_true", help="also transformers and llama.cpp (CPU, --batch 1), where installed")
    add("--prompt", type=positive, default=128, metavar="N", help="tokens of the prompt (default 128)")
    add("--skip-prompt", action="store_true", help="skip in the prompt too, and show how fast that is read instead")
    add("--tokens", type=positive, default=20, metavar="N", help="tokens to decode (default 20)")
    add("--repeats", type=positive, default=5, metavar="N", help="how often, prompt and all (default 5)")
    add("--batch", type=positive, default=1, metavar="N", help="rows, which disagree about what to skip (default 1)")
    add("--threads", type=positive, metavar="N", help="threads of the CPU; default: PyTorch's own choice")
    add("--products", action="store_true", help="time the ways to multiply one row instead")
    add("--out", type=Path, default=Path("out/bench.csv"), metavar="CSV", help="to append to (default %(default)s)")
    options = parser.parse_args(argv)
    for skip in options.skip:
        if not 0 <= skip <= 0.5:
            parser.error(f"--skip {skip} is not between 0 and 0.5: with k=1 a block runs before each that is skipped")
    for variant in options.variants:
        if variant not in VARIANTS:
            parser.error(f"no variant {variant}: choose from {', '.join(VARIANTS)}")
    if options.ckpt and options.shape:
        parser.error("--ckpt and --shape exclude each other")
    if options.peers and parallel.size > 1:
        parser.error("--peers run in one process")
    if options.skip_prompt and (set(TEAL) & set(options.variants) or not any(options.skip)):
        parser.error("--skip-prompt is for variants that skip blocks, which teal does not, and for a --skip above 0")
    if options.layers and not options.shape:
        parser.error("--layers goes with --shape")
    return options


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = parse_args(argv)
    torch.manual_seed(options.seed)
    random.seed(options.seed)  # under torchrun all processes take turns in one order
    torch.set_num_threads(options.threads or torch.get_num_threads())
    device = common.find_device("cpu" if options.products else options.device)
    if options.shape:
        model, name = random_model(options, device)
    else:
        ckpt = common.find_checkpoint(options.ckpt)
        model, name = load_model(ckpt, device, options.dtype), common.model_name(ckpt)
    if parallel.size > 1:
        name += f", {parallel.size} processes"
    if options.products:
        return time_products(model)
    check_out(options.out)
    columns = options.prompt + options.tokens  # of the cache
    if columns > model.args.max_seq_len:
        raise ValueError(f"{columns} tokens are more than the model's max_seq_len {model.args.max_seq_len}")
    variants = make_variants(model, options)
    prompt, tokens = torch.randint(model.args.vocab_size, (options.batch, columns)).tensor_split([options.prompt], 1)
    big = torch.ones(2**13, 2**13, device=device)  # 256 MiB of float32
    common.check_finite(model(prompt.to(device), last_only=True))
    measure(variants, [], prompt, tokens[:, :5], 1, big)  # warm-up
    memory, peers = common.peak_memory(device), []
    with tempfile.TemporaryDirectory() as folder:
        if options.peers:
            peers = list(make_peers(variants[0], prompt, columns, folder))
            measure([], peers, prompt, tokens[:, :5], 1, big)
        bandwidth = measure(variants, peers, prompt, tokens, options.repeats, big)
    if parallel.rank > 0:
        return  # the first process tells its own times and bytes

    read_back = sorted(timed(big[0, :1].tolist) for _ in range(101))[50]  # what a layer's monitoring costs at least
    dtype = model.tok_embeddings.weight.dtype
    versions = [f"python {platform.python_version()}", f"torch {torch.__version__}", *(peer.version for peer in peers)]
    about = dict(
        commit=commit(), device=device_name(device), threads=torch.get_num_threads() if device.type == "cpu" else "",
        dtype=str(dtype).removeprefix("torch."), model=name, batch=options.batch, prompt=options.prompt,
        steps=options.tokens, repeats=options.repeats, read_gb_per_s=bandwidth / 1e9, peak_memory_bytes=memory,
        readback_us=1e6 * read_back, versions=", ".join(versions),
        command=shlex.join(["python", "experiments/bench.py", *argv]),
    )  # fmt: skip
    rows = [about | make_row(runner, variants[0], bandwidth, options) for runner in [*variants, *peers]]
    add_peer_ratios(rows)
    save(options.out, rows)
    plot.print_speed(rows)
    print(f"written to {options.out}")


if __name__ == "__main__":
    common.run_command(main, torchrun=True)
