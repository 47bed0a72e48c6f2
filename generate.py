"""
Generate text with a LLaMA checkpoint, dense or with feed-forward skipping (FFN-SkipLLM).

    python generate.py                                             the demo model answers a question
    python generate.py --ckpt llama-2-7b "The meaning of life is"  a folder, or a name under checkpoints/
    python generate.py --chat --compare "Why is the sky blue?"     the same prompt dense and skipped, side by side
    python generate.py --chat                                      a conversation
"""

import functools
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict

import torch

from support import common
from support.common import check_finite, check_ids
from fast import parallel
import policies
from fast.graphs import add_graphs
from load_weights import load
from model import KVCache, dense
from fast.processes import from_first
from support.chat import converse, first_messages
from support.show import TextStream, comparison_summary, layer_bar, print_texts, screen, summary, write, write_trace
from support.tracing import Trace
from support.trace_page import write_page

QUESTION = "What are the most famous sights of Paris?"


def sample(logits, temperature=0.0, top_p=1.0, generator=None):
    """
    Token ids (batch,), on the host, drawn from fp32 logits (batch, vocab); temperature 0 takes the likeliest. Raises
    ValueError if the likeliest is not finite.
    """
    most, likeliest = logits.max(-1, keepdim=True)  # (batch, 1)
    check_finite(most)
    if temperature == 0:
        return likeliest.squeeze(1).cpu()
    probs = torch.softmax((logits - most).cpu() / max(temperature, 1e-30), dim=-1)  # near 0 it is greedy too
    if top_p < 1:
        probs, index = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(-1) - probs  # what the likelier tokens hold (Holtzman et al. 2020)
        before[..., 0] = 0  # rounding must not leave out the likeliest
        probs[before >= max(top_p, 1e-30)] = 0
        probs = torch.zeros_like(probs).scatter(-1, index, probs)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def generate(
    model, tokens, max_new_tokens, policy=None, temperature=0.0, top_p=1.0, seed=0, eos_ids=(),
    prompt_len=None, trace=None, cache=None,
):
    """
    Continue `tokens`, and yield token by token: an int for one prompt (a list of ids); for several (a list of lists) a
    list of one id per prompt, None once that prompt's text has ended. Ends with end-of-text (which is yielded), after
    max_new_tokens, or when the model's max_seq_len is full.

    policy      as in Transformer.forward; None: dense
    prompt_len  tokens of each prompt that count as prompt and run in full; None: all; 0: skip in the prompt as well
    cache       a KVCache of the first cache.length tokens of each prompt, which are not forwarded again: what it holds
                stays as it was written, under whatever policy. rewind() it to what it shares with `tokens` before.
    Raises ValueError for an empty prompt, one longer than the model's max_seq_len, an id without a row in the model, or
    a cache that leaves no token to forward.
    """
    tokens = tokens.tolist() if torch.is_tensor(tokens) else tokens
    single = not tokens or isinstance(tokens[0], int)
    prompts = [tokens] if single else tokens
    longest, limit = max(map(len, prompts)), model.args.max_seq_len
    if not all(prompts):
        raise ValueError("the prompt is empty: there is nothing to continue")
    if longest > limit:
        raise ValueError(f"the prompt has {longest} tokens, more than the model's max_seq_len {limit}")
    check_ids(model, *prompts)
    weight = model.tok_embeddings.weight
    if cache is None:
        cache = KVCache(model.args, len(prompts), min(longest + max_new_tokens, limit), weight.dtype, weight.device)
    if max_new_tokens > 16:  # fewer take less time than recording
        add_graphs(model, cache)
    if cache.length >= longest:
        raise ValueError(f"the cache holds {cache.length} tokens, and the prompt has {longest}: rewind it at least to "
                         "the last of them, whose logits are needed")
    generator = torch.Generator().manual_seed(seed)

    # Shorter prompts get padding at the left, so that all of them end in the same column.
    pad = [longest - len(prompt) for prompt in prompts]
    columns = torch.tensor([[0] * n + prompt for n, prompt in zip(pad, prompts)])  # (batch, longest)
    next_ids = columns[:, cache.length :]
    prompt_len = [len(prompt) if prompt_len is None else prompt_len for prompt in prompts]
    ended = [False] * len(prompts)
    for _ in range(max_new_tokens):
        if cache.length + next_ids.size(1) > cache.max_seq_len:
            return
        logits = model(next_ids.to(weight.device), cache, policy, prompt_len, pad, trace, last_only=True)[:, -1]
        next_ids = sample(logits, temperature, top_p, generator)[:, None]  # (batch, 1)
        ids = next_ids[:, 0].tolist()
        for row, token in enumerate(ids):
            if ended[row]:
                ids[row] = None
            elif token in eos_ids:
                ended[row] = True
                # The row still runs beside the others; as prompt it is neither skipped nor counted.
                prompt_len[row] = limit
        yield ids[0] if single else ids
        if all(ended):
            return


def written_windows(model, prompts, n_new, seed, temperature=1.0, eos_ids=()):
    """Windows (ids, prompt_len) of prompts, lists of ids, each with up to n_new tokens that the model draws for it."""
    loop, windows = generate(model, prompts, n_new, temperature=temperature, seed=seed, eos_ids=eos_ids), []
    steps = [step for step, _ in zip(loop, common.progress(range(n_new), "writing"))]
    for row, prompt in enumerate(prompts):
        written = [step[row] for step in steps if step[row] is not None]
        windows.append((prompt + written, len(prompt)))
    return windows


class Generation:
    """
    One policy at work on all prompts (lists of ids): what it has written so far, and how long that took. cache: as in
    generate().
    """

    def __init__(self, name, policy, model, tokenizer, prompts, options, cache=None):
        self.name, self.policy, self.model, self.tokenizer, self.prompts = name, policy, model, tokenizer, prompts
        self.planned = options.skip if policy is not dense else None
        self.trace, self.times = Trace(cosines=options.trace is not None), []
        self.held = 0 if cache is None else cache.length  # tokens of a prompt that are not forwarded
        self.ids = [[] for _ in prompts]
        self.pieces = [[] for _ in prompts]  # the text of each token
        self.streams = [TextStream(tokenizer, prompt) for prompt in prompts]
        sampling = options.temperature, options.top_p, options.seed, tokenizer.eos_ids
        prompt_len = 0 if options.skip_prompt else None
        self.loop = generate(model, prompts, options.max_new_tokens, policy, *sampling, prompt_len, self.trace, cache)

    def advance(self):
        """One more token for every row; False when there is none."""
        begin = time.perf_counter()
        if self.times:
            ids = next(self.loop, None)
        else:
            with layer_bar(self.model, "reading the prompt"):
                ids = next(self.loop, None)
        if ids is None:
            return False
        self.times.append(time.perf_counter() - begin)
        for row, token in enumerate(ids):
            if token is not None:
                self.ids[row].append(token)
                piece = "" if token in self.tokenizer.eos_ids else self.streams[row].add(token)
                self.pieces[row].append(piece)
        return True

    def finish(self):
        """Add the text that was held back, waiting for the rest of a character."""
        for pieces, stream in zip(self.pieces, self.streams):
            pieces.append(stream.rest())

    def text(self, row=0):
        return "".join(self.pieces[row])

    def decode_speed(self):
        """Tokens per second over all rows, without the first, which is the prefill's; None if there is no other."""
        decode = sum(self.times[1:])
        return sum(max(len(ids) - 1, 0) for ids in self.ids) / decode if decode else None

    def skipped(self):
        """The ffn_saved_ratio so far of one text: quicker than the trace's, to be asked for again and again."""
        passes = self.trace.passes[1:]  # over one token each, in which only blocks that ran are recorded
        blocks = sum(one.n_layers for one in passes)
        return 1 - sum(len(one.ran) for one in passes) / blocks if blocks else 0.0

    def report(self):
        """What --json prints: lists over the prompts where there are several."""
        n_prompt = [len(prompt) for prompt in self.prompts]
        n_new = [len(ids) for ids in self.ids]
        text = [self.text(row) for row in range(len(self.prompts))]
        report = dict(text=text, prompt_tokens=n_prompt, new_tokens=n_new, token_ids=self.ids)
        if len(self.prompts) == 1:
            report = {key: value[0] for key, value in report.items()}
        prefill, read = sum(self.times[:1]), sum(n - self.held for n in n_prompt)
        return report | dict(
            prefill_tokens_per_s=read / prefill if prefill else None,
            decode_tokens_per_s=self.decode_speed(),
            ffn_skip_ratio=self.trace.ffn_skip_ratio(getattr(self.policy, "warm_up_index", -1)),
            ffn_saved_ratio=self.trace.ffn_saved_ratio(),
            planned_skip_ratio=self.planned,
            peak_memory_bytes=peak_memory(self.model.tok_embeddings.weight.device),
            policy=self.name,
        )


def peak_memory(device):
    """Bytes: of the device's allocator on CUDA, of the whole process elsewhere; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def speedup_bound(model, saved):
    """The most that decoding can be faster than dense, if it is bound by reading weights: bytes / bytes left."""
    weights = common.weight_bytes(model)
    read = sum(weights.values())
    return read / (read - saved * weights["feed_forward"])


def comparison(generations, reports, model):
    """What --compare adds to the JSON, dense first; first_difference is None where both texts are the same."""
    differences = []
    for a, b in zip(*(generation.ids for generation in generations)):
        differences.append(None if a == b else common.first_difference(a, b))
    dense_report, report = reports
    speed, dense_speed = report["decode_tokens_per_s"], dense_report["decode_tokens_per_s"]
    return dict(
        first_difference=differences if len(differences) > 1 else differences[0],
        speedup=speed / dense_speed if speed and dense_speed else None,
        speedup_bound=speedup_bound(model, report["ffn_saved_ratio"] or 0.0),
    )


def parse_args(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help='what to continue; several run as one batch; "-" reads one from standard input')
    add("--prompts", metavar="FILE", help="more prompts, one per line")
    add("--chat", action="store_true", help="each prompt is a user's message, put into the checkpoint's chat template; "
        "without a prompt it is a conversation, of standard input")
    add("--system", metavar="TEXT", help="with --chat: what the model is told before the first message")
    add("--max-new-tokens", type=common.positive, default=256, metavar="N", help="stop after N tokens (default 256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens, which add up to P")
    common.add_model_arguments(parser)
    add("--json", action="store_true", help="print one JSON object and nothing else on standard output")
    add("--compare", action="store_true", help="run dense too, token by token in turn, and print both texts and speeds")
    add("--show-skips", action="store_true", help="shade each token by how many of its FFN blocks were skipped")
    add("--trace", metavar="FILE", help="write what was skipped: a page for the browser if FILE ends in .html, else "
        "CSV, one row per token")
    add = policies.add_skip_arguments(parser).add_argument
    add("--policy", help="dense, ffnskip (the default where there are settings), standins, one of "
        "experiments/baselines.py, or FILE.py:FACTORY")
    add("--skip", type=float, metavar="R", help="share of all FFN blocks to skip past the warm-up")
    add("--warm-up-index", type=int, metavar="N", help="generated tokens 0 to N run in full; -1: none do")
    add("--skip-prompt", action="store_true", help="skip in the prompt as well, past its own warm-up")
    options = parser.parse_args(argv)
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature {options.temperature} is not a number of at least 0")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p {options.top_p} is not above 0 and at most 1")
    if options.prompt.count("-") > 1:
        parser.error('"-" reads standard input, which can be read once')
    if options.skip is not None and not 0 <= options.skip < 1:
        parser.error(f"--skip {options.skip} is not a share of at least 0 and below 1")
    if options.system is not None and not options.chat:
        parser.error("--system is for --chat")
    for flag in "json", "compare", "show_skips", "trace":
        if options.chat and not options.prompt and not options.prompts and getattr(options, flag):
            parser.error(f"--{flag.replace('_', '-')} needs a prompt: --chat without one is a conversation")
    return options


def read_prompts(options):
    """The prompts on the command line, in --prompts and, for "-", on standard input; [] if none was given."""
    prompts = []
    for number, prompt in enumerate(options.prompt, start=1):
        try:
            text = from_first(sys.stdin.read).removesuffix("\n").removeprefix("\ufeff") if prompt == "-" else prompt
            prompts.append(text.encode("utf-8", "surrogateescape").decode("utf-8"))
        except UnicodeError:
            raise ValueError(f"prompt {number}, {prompt!r}: not UTF-8 text") from None
    if options.prompts:
        lines = [line for line in common.read_utf8(options.prompts).split("\n") if line.strip()]
        if not lines:
            raise ValueError(f"{options.prompts}: no prompt in it: expected one per line")
        prompts += lines
    return prompts


def choose_policy(options, ckpt, model):
    """The name, the policy and its settings that the command line asks for."""
    settings = {}
    if options.policy in (None, "ffnskip"):
        settings = policies.find_settings(options, ckpt, model.args.n_layers)
    name = options.policy or ("ffnskip" if settings or options.skip is not None else "dense")
    if options.standins and name != "standins" and ":" not in name:
        raise ValueError(f"--standins is for --policy standins, and the policy is {name}")
    if options.policy is None and name == "dense":
        command = "python calibrate.py" + (f" --ckpt {options.ckpt}" if options.ckpt else "")
        name_of_model = common.model_name(ckpt)
        print(f"[no skip settings for {name_of_model}, so nothing is skipped: {command} makes them]", file=sys.stderr)
    fitted = policies.find_fitted(options, ckpt)
    skip, warm_up_index, seed = options.skip, options.warm_up_index, options.seed
    policy = policies.find_policy(name, model, settings, skip, warm_up_index, seed=seed, fitted=fitted)
    if name == "ffnskip":
        return name, policy, asdict(policy)
    return name, policy, {} if name == "dense" else dict(skip=options.skip)


def main(argv=None):
    options = parse_args(argv)
    common.check_outputs(options.trace)
    prompts = read_prompts(options)
    ckpt = common.find_checkpoint(options.ckpt)
    tokenizer, model = load(ckpt, common.find_device(options.device), options.dtype)
    if options.chat and not prompts:
        choose = functools.partial(choose_policy, ckpt=ckpt, model=model)
        return converse(options, ckpt, tokenizer, model, choose, Generation)
    chat = options.chat or (not prompts and options.ckpt is None)
    prompts = prompts or [QUESTION]
    if chat:
        before = first_messages(options)
        ids = [tokenizer.chat([*before, dict(role="user", content=prompt)]) for prompt in prompts]
    else:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
    name, policy, settings = choose_policy(options, ckpt, model)
    generations = [Generation(name, policy, model, tokenizer, ids, options)]
    if options.compare:
        if policy is dense:
            raise ValueError("--compare needs a policy to compare with: --policy NAME, or settings from calibrate.py")
        generations.insert(0, Generation("dense", dense, model, tokenizer, ids, options))

    colour = options.show_skips and sys.stdout.isatty()
    as_written = not options.json and not colour and len(ids) == 1
    steps = range(options.max_new_tokens)
    if as_written:
        finished = write(generations, screen(generations), steps)
    else:
        finished = write(generations, nullcontext(lambda: None), common.progress(steps, "writing"))
    if parallel.rank > 0:
        return 0  # the first process tells what they have done together
    reports = [generation.report() for generation in generations]
    extra = comparison(generations, reports, model) if options.compare else {}
    if options.trace:
        if options.trace.endswith((".html", ".htm")):
            write_page(options.trace, generations, prompts)
        else:
            write_trace(options.trace, generations[-1])
        print(f"[trace written to {options.trace}]", file=sys.stderr)
    if options.json:
        used = {key: getattr(options, key) for key in ("max_new_tokens", "temperature", "top_p", "seed")}
        weight = model.tok_embeddings.weight
        used |= dict(ckpt=str(ckpt), device=str(weight.device), dtype=str(weight.dtype).removeprefix("torch."))
        report = reports[-1] | dict(settings=used | dict(skip=settings))
        if options.compare:
            report |= dict(dense=reports[0], **extra)
        print(common.to_json(report))
    elif not as_written:
        print_texts(generations, prompts, colour)
    for report in reports:
        print(summary(report), file=sys.stderr)
    if extra:
        print(comparison_summary(extra), file=sys.stderr)
    return 0 if finished else 130


if __name__ == "__main__":
    common.run_command(main, torchrun=True)
