"""
Generate text with a LLaMA checkpoint, dense or with feed-forward skipping (FFN-SkipLLM).

    python generate.py                                             the demo model answers a question
    python generate.py --ckpt llama-2-7b "The meaning of life is"  a folder, or a name under checkpoints/
    python generate.py --chat --compare "Why is the sky blue?"     the same prompt dense and skipped, side by side
"""

import argparse
import csv
import importlib.util
import json
import re
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch

import load_weights
from model import KVCache, dense
from skip import FFNSkip, Trace

HERE = Path(__file__).resolve().parent
QUESTION = "What are the most famous sights of Paris?"


def sample(logits, temperature=0.0, top_p=1.0, generator=None):
    """Token ids (batch,), on the host, drawn from fp32 logits (batch, vocab); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1).cpu()
    probs = torch.softmax(logits.cpu() / temperature, dim=-1)
    if top_p < 1:
        probs, index = probs.sort(dim=-1, descending=True)
        probs[probs.cumsum(-1) - probs >= top_p] = 0  # the tokens before it hold top_p already (Holtzman et al. 2020)
        probs = torch.zeros_like(probs).scatter(-1, index, probs)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def generate(model, tokens, max_new_tokens, policy=None, temperature=0.0, top_p=1.0, seed=0, eos_ids=(),
             prompt_len=None, trace=None):  # fmt: skip
    """
    Continue `tokens`, and yield token by token: an int for one prompt (a list of ids), a list with one id a prompt, None
    once that prompt's text has ended, for several (a list of lists). Ends with end-of-text (which is yielded), after
    max_new_tokens, or when the model's max_seq_len is full.

    policy      as in Transformer.forward; None: dense
    prompt_len  tokens of each prompt that count as prompt and run in full; None: all; 0: skip in the prompt as well
    Raises ValueError for an empty prompt or one longer than the model's max_seq_len.
    """
    tokens = tokens.tolist() if torch.is_tensor(tokens) else tokens
    single = not tokens or isinstance(tokens[0], int)
    prompts = [tokens] if single else tokens
    longest, limit = max(map(len, prompts)), model.args.max_seq_len
    if not all(prompts):
        raise ValueError("the prompt is empty: there is nothing to continue")
    if longest > limit:
        raise ValueError(f"the prompt has {longest} tokens, more than the model's max_seq_len {limit}")
    weight = model.tok_embeddings.weight
    max_seq_len = min(longest + max_new_tokens, limit)
    cache = KVCache(model.args, len(prompts), max_seq_len, weight.dtype, weight.device)
    pad = [longest - len(prompt) for prompt in prompts]
    prompt_len = [len(prompt) if prompt_len is None else prompt_len for prompt in prompts]
    generator = torch.Generator().manual_seed(seed)
    ended = [False] * len(prompts)
    new = torch.tensor([[0] * n + prompt for n, prompt in zip(pad, prompts)])  # (batch, longest)
    for _ in range(max_new_tokens):
        if cache.length + new.size(1) > max_seq_len:
            return
        logits = model(new.to(weight.device), cache, policy, prompt_len, pad, trace, last_only=True)[:, -1]
        new = sample(logits, temperature, top_p, generator)[:, None]  # (batch, 1)
        ids = [None if end else i for end, i in zip(ended, new[:, 0].tolist())]
        yield ids[0] if single else ids
        ended = [end or i in eos_ids for end, i in zip(ended, ids)]
        if all(ended):
            return
        # what is forwarded after a row's end is nobody's text: as prompt it is neither skipped nor counted
        prompt_len = [limit if end else n for end, n in zip(ended, prompt_len)]


class TextStream:
    """Text of a growing list of ids, piece by piece. A piece is "" while the bytes of a character are not all there."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer = tokenizer
        self.ids = list(prompt[-8:])  # whether a word begins with a space depends on what stands before it
        self.start, self.read = 0, len(self.ids)

    def add(self, token):
        """The text that is certain now that `token` has come."""
        self.ids.append(token)
        return self.rest(certain=True)

    def rest(self, certain=False):
        """The text not given yet; at the end, what is left of an unfinished character too."""
        before = self.tokenizer.decode(self.ids[self.start : self.read])
        text = self.tokenizer.decode(self.ids[self.start :])
        if certain and text.endswith("\ufffd"):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return text[len(before) :]


class Run:
    """One policy at work on all prompts (lists of ids): what it has written so far, and how long that took."""

    def __init__(self, name, policy, model, tokenizer, prompts, options):
        self.name, self.policy, self.model, self.tokenizer, self.prompts = name, policy, model, tokenizer, prompts
        self.trace, self.times, self.ids = Trace(), [], [[] for _ in prompts]
        self.pieces = [[] for _ in prompts]  # the text of each token
        self.streams = [TextStream(tokenizer, prompt) for prompt in prompts]
        self.loop = generate(
            model, prompts, options.max_new_tokens, policy, options.temperature, options.top_p, options.seed,
            tokenizer.eos_ids, prompt_len=0 if options.skip_prompt else None, trace=self.trace,
        )  # fmt: skip

    def advance(self, on_text=lambda text: None):
        """One more token for every row; False when there is none."""
        begin = time.perf_counter()
        new = next(self.loop, None)
        if new is None:
            return False
        self.times.append(time.perf_counter() - begin)
        for i, ids, pieces, stream in zip(new, self.ids, self.pieces, self.streams):
            if i is not None:
                ids.append(i)
                pieces.append("" if i in self.tokenizer.eos_ids else stream.add(i))
                on_text(pieces[-1])
        return True

    def finish(self, on_text=lambda text: None):
        for pieces, stream in zip(self.pieces, self.streams):
            pieces.append(stream.rest())
            on_text(pieces[-1])

    def report(self):
        """What --json prints: lists over the prompts where there are several."""
        n_prompt, n_new = [len(prompt) for prompt in self.prompts], [len(ids) for ids in self.ids]
        prefill, decode = sum(self.times[:1]), sum(self.times[1:])
        rows = dict(
            text=["".join(pieces) for pieces in self.pieces], prompt_tokens=n_prompt, new_tokens=n_new, token_ids=self.ids
        )
        return dict(
            **(rows if len(self.prompts) > 1 else {key: value[0] for key, value in rows.items()}),
            prefill_tokens_per_s=sum(n_prompt) / prefill if prefill else None,
            decode_tokens_per_s=sum(max(n - 1, 0) for n in n_new) / decode if decode else None,
            ffn_skip_ratio=self.trace.ffn_skip_ratio(getattr(self.policy, "warm_up_index", -1)),
            ffn_saved_ratio=self.trace.ffn_saved_ratio(),
            peak_memory_bytes=peak_memory(self.model.tok_embeddings.weight.device),
            policy=self.name,
        )


def peak_memory(device):
    """Bytes: of the device's allocator on CUDA, of the whole process elsewhere; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def speedup_bound(model, saved):
    """How many times faster than dense decoding can be at most, if it is bound by reading weights: bytes / bytes left."""
    nbytes = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())  # noqa: E731
    read = nbytes(model) - (0 if model.output is None else nbytes(model.tok_embeddings))
    ffn = sum(nbytes(layer.feed_forward) for layer in model.layers)
    return read / (read - saved * ffn)


def find_device(name):
    """The torch.device asked for; for None the fastest there is. Raises ValueError if it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name} is not available: {str(error).splitlines()[0]}") from None


def find_checkpoint(ckpt):
    """A path as given, a name under checkpoints/, or for None the demo model."""
    if ckpt is None:
        return Path(load_weights.demo_path())
    for path in Path(ckpt).expanduser(), Path("checkpoints", ckpt), HERE / "checkpoints" / ckpt:
        if path.exists():
            return path
    raise ValueError(f"no checkpoint at {ckpt} or checkpoints/{ckpt}: give --ckpt the path of a folder or a file")


def model_name(path):
    """The name settings are kept under: SmolLM2-135M-Instruct.Q4_1.gguf and a folder SmolLM2-135M-Instruct share one."""
    path = Path(path).resolve()
    name = path.stem if path.suffix == ".gguf" else path.name if path.is_dir() else path.parent.name
    return re.sub(r"[.-](I?Q\d\w*|B?F16|F32)$|-hf$", "", name, flags=re.IGNORECASE).lower()


def settings_path(ckpt):
    """Where calibrate.py leaves the skip settings of a checkpoint: skip.json in its folder, STEM.skip.json beside a GGUF."""
    ckpt = Path(ckpt)
    return (ckpt if ckpt.is_dir() else ckpt.parent) / ("skip.json" if ckpt.suffix != ".gguf" else ckpt.stem + ".skip.json")


def load_settings(path, name, n_layers):
    """The arguments of FFNSkip in a settings file. Raises ValueError if the file was made for another model."""
    try:
        settings = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a file of skip settings ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: not a file of skip settings: expected one JSON object")
    if settings.get("n_layers", n_layers) != n_layers:
        raise ValueError(f"{path}: made for a model of {settings['n_layers']} layers, and {name} has {n_layers}")
    if settings.get("model", name).lower() != name:
        raise ValueError(f"{path}: made for {settings['model']}, and this is {name}: "
                         'calibrate.py makes settings for it; if it is the same model, change "model" in the file')  # fmt: skip
    return {field.name: settings[field.name] for field in fields(FFNSkip) if field.name in settings}


def find_settings(options, ckpt, n_layers):
    """FFNSkip's arguments from --skip-config, the checkpoint's folder or config/, each flag overriding one; {} if none."""
    name = model_name(ckpt)
    places = [options.skip_config] if options.skip_config else [settings_path(ckpt), HERE / "config" / f"{name}.json"]
    found = next((path for path in places if options.skip_config or path.exists()), None)
    settings = load_settings(found, name, n_layers) if found else {}
    flags = {field.name: getattr(options, field.name) for field in fields(FFNSkip)}
    settings.update({name: value for name, value in flags.items() if value is not None})
    settings.update({name: None for name in ("k", "full_every") if settings.get(name) == 0})
    return settings


def find_policy(name, model, settings=None, skip=None, tokens=None, seed=0):
    """
    The policy called `name`: dense, ffnskip (from its settings), one of experiments/baselines.py or FILE.py:FACTORY, a
    function make(model, skip, tokens=None, seed=0) that returns a policy. Raises ValueError if there is none.
    """
    if name == "dense":
        return dense
    if name == "ffnskip":
        missing = [key for key in ("cold_s", "cold_e", "sim_threshold") if key not in (settings or {})]
        if missing:
            raise ValueError(f"policy ffnskip has no {', '.join(missing)} for this checkpoint: python calibrate.py "
                             "--ckpt ... finds them, or give --cold-s, --cold-e and --sim-threshold")  # fmt: skip
        policy = FFNSkip(**settings)
        policy.check(model.args.n_layers)
        return policy
    file, _, factory = name.rpartition(":")
    path = Path(file) if file else HERE / "experiments" / "baselines.py"
    factory = getattr(load_module(path), factory, None)
    if not callable(factory):
        raise ValueError(f"no policy {name}: choose dense, ffnskip, one of experiments/baselines.py, or FILE.py:FACTORY")
    if skip is None:
        raise ValueError(f"policy {name} needs --skip, the share of feed-forward blocks to skip")
    return factory(model, skip, tokens=tokens, seed=seed)


def load_module(path):
    """The module in a Python file, for policies that are not part of this folder."""
    if not path.is_file():
        raise ValueError(f"no policy file {path}")
    sys.path.insert(0, str(HERE))  # so that a policy file, wherever it lies, can import model and skip
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_trace(path, run):
    """The trace as CSV, a row a token: for each layer the cosine where measured, else "run" or "skip"."""
    trace, decode = run.trace, run.tokenizer.decode
    ran, cosine, token_index = trace.ran, trace.cosine, trace.token_index
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["prompt", "token_index", "token_id", "token", "ffn_skipped"] + [f"layer_{i}" for i in range(len(ran))])
        for row, (prompt, ids) in enumerate(zip(run.prompts, run.ids)):
            forwarded = prompt + ids[:-1]  # the last token is written, and never read
            first = max(map(len, run.prompts)) - len(prompt)  # columns of padding
            for column, token in enumerate(forwarded, start=first):
                cells = [f"{c:.4f}" if c == c else "run" if r else "skip"
                         for c, r in zip(cosine[:, row, column].tolist(), ran[:, row, column].tolist())]  # fmt: skip
                text = decode([token]).replace("\n", "\\n")
                out.writerow([row, token_index[row, column].item(), token, text, cells.count("skip"), *cells])


def shaded(run, row):
    """The text of a row, each token the bluer (for a terminal of 256 colours) the more of its FFN blocks were skipped."""
    n_prompt = max(map(len, run.prompts))
    skipped = (~run.trace.ran[:, row, n_prompt:]).sum(0).tolist()  # one a forwarded token: all but the last
    most = max(skipped, default=0)
    text = ""
    for piece, n in zip(run.pieces[row], skipped + [0, 0]):
        colour = 16 + -(-5 * n // most) if n else None  # the palette's blues, 17 to 21
        text += f"\x1b[48;5;{colour}m\x1b[38;5;231m{piece}\x1b[0m" if n and piece.strip() else piece
    return text + f"\n[shade: FFN blocks skipped for the token, 1 to {most} of {len(run.trace.ran)}]" if most else text


def comparison(runs, model):
    """What --compare adds: dense and policy beside each other. `parts` is the first token in which the texts differ."""
    dense_run, other = runs
    reports = [run.report() for run in runs]
    parts = []
    for a, b in zip(dense_run.ids, other.ids):
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        parts.append(None if a == b else same)
    speeds = [report["decode_tokens_per_s"] for report in reports]
    saved = reports[1]["ffn_saved_ratio"]
    return dict(
        parts=parts if len(parts) > 1 else parts[0],
        speedup=speeds[1] / speeds[0] if all(speeds) else None,
        speedup_bound=speedup_bound(model, saved or 0.0),
    )


def number(value, form="{:.1f}"):
    return "-" if value is None else form.format(value)


def summary(report):
    """One line for people."""
    tokens = report["new_tokens"] if isinstance(report["new_tokens"], int) else sum(report["new_tokens"])
    return (
        f"[{report['policy']}: {tokens} tokens; prefill {number(report['prefill_tokens_per_s'])} tokens/s, "
        f"decode {number(report['decode_tokens_per_s'])} tokens/s; FFN blocks skipped past warm-up "
        f"{number(report['ffn_skip_ratio'], '{:.1%}')}, of all {number(report['ffn_saved_ratio'], '{:.1%}')}; "
        f"peak memory {number(report['peak_memory_bytes'] and report['peak_memory_bytes'] / 1e9, '{:.2f} GB')}]"
    )


def positive(value):
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return number


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")  # one line
    add = parser.add_argument
    add("prompt", nargs="*", help='what to continue; several run as one batch; "-" reads one from standard input')
    add("--prompts", metavar="FILE", help="more prompts, one a line")
    add("--ckpt", help="checkpoint: a folder or file in Meta's, Hugging Face's or GGUF layout, or a name under checkpoints/;"
        " default: the demo model SmolLM2-135M-Instruct")  # fmt: skip
    add("--chat", action="store_true", help="each prompt is a user's message, put into the checkpoint's chat template")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="stop after N tokens (default 256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that hold P of the probability")
    add("--seed", type=int, default=0, help="of all random choices (default 0)")
    add("--device", help="cpu, cuda, cuda:1, mps; default: cuda or mps where there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's; bfloat16 for GGUF")
    add("--json", action="store_true", help="print one JSON object and nothing else on standard output")
    group = parser.add_argument_group(
        "skipping", "Settings come from --skip-config, else from skip.json in the checkpoint's folder (STEM.skip.json beside "
        "a GGUF file), else from config/; each flag overrides one of them.")  # fmt: skip
    add = group.add_argument
    add("--policy", help="dense, ffnskip (the default where there are settings), a name in experiments/baselines.py, or"
        " FILE.py:FACTORY")  # fmt: skip
    add("--skip", type=float, metavar="R", help="share of FFN blocks to skip, for policies other than ffnskip")
    add("--skip-config", metavar="FILE", help="settings for ffnskip, as calibrate.py writes them")
    add("--sim-threshold", type=float, metavar="C", help="cosine before and after an FFN block from which on to skip")
    add("--cold-s", type=int, metavar="L", help="layers below L always run in full")
    add("--cold-e", type=int, metavar="L", help="layers from L on always run in full")
    add("--warm-up-index", type=int, metavar="N", help="generated tokens 0 to N run in full; -1: none does")
    add("--k", type=int, help="skip K blocks at a time; 0: all up to --cold-e, as Algorithm 1 is printed")
    add("--no-recheck", dest="recheck", action="store_false", default=None, help="after K blocks, run the rest in full")
    add("--full-every", type=int, metavar="N", help="run every Nth token in full; 0: none")
    add("--skip-prompt", action="store_true", help="skip in the prompt as well, past its own warm-up")
    add("--compare", action="store_true", help="run dense too, in turn, and print both texts and speeds")
    add("--show-skips", action="store_true", help="shade each token by how many of its FFN blocks were skipped")
    add("--trace", metavar="FILE", help="write what was skipped as CSV, a row a token")
    options = parser.parse_args(argv)
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature {options.temperature} is not a number of at least 0")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p {options.top_p} is not above 0 and at most 1")
    if options.skip is not None and not 0 <= options.skip < 1:
        parser.error(f"--skip {options.skip} is not a share of at least 0 and below 1")
    return options


def read_prompts(options):
    """The prompts on the command line, in --prompts and, for "-", on standard input; [] if none was given."""
    prompts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in options.prompt]
    if options.prompts:
        lines = [line for line in Path(options.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{options.prompts}: no prompt in it: expected one a line")
        prompts += lines
    return prompts


def choose_policy(options, ckpt, model):
    """The name, the policy and its settings that the command line asks for."""
    settings = find_settings(options, ckpt, model.args.n_layers)
    name = options.policy or ("ffnskip" if settings else "dense")
    if options.policy is None and not settings:
        command = "python calibrate.py" + (f" --ckpt {options.ckpt}" if options.ckpt else "")
        print(f"[no skip settings for {model_name(ckpt)}, so nothing is skipped: {command} makes them]", file=sys.stderr)
    if name in ("dense", "ffnskip") and options.skip is not None:
        raise ValueError(f"--skip is not for policy {name}: calibrate.py --target-skip {options.skip} makes ffnskip's settings")
    policy = find_policy(name, model, settings, options.skip, seed=options.seed)
    return name, policy, asdict(policy) if name == "ffnskip" else {} if name == "dense" else dict(skip=options.skip)


def main(argv=None):
    options = parse_args(argv)
    prompts = read_prompts(options)
    ckpt = find_checkpoint(options.ckpt)
    device = find_device(options.device)
    tokenizer = load_weights.load_tokenizer(ckpt)
    model = load_weights.load_model(ckpt, device, options.dtype)
    chat = options.chat or (not prompts and options.ckpt is None)
    prompts = prompts or [QUESTION]
    ids = [tokenizer.chat([dict(role="user", content=p)]) if chat else tokenizer.encode(p) for p in prompts]
    if not all(p.strip() for p in prompts):
        raise ValueError("the prompt is empty: there is nothing to continue")
    name, policy, settings = choose_policy(options, ckpt, model)
    runs = [Run(name, policy, model, tokenizer, ids, options)]
    if options.compare:
        if name == "dense":
            raise ValueError("--compare needs a policy to compare with: --policy ffnskip, or settings from calibrate.py")
        runs.insert(0, Run("dense", dense, model, tokenizer, ids, options))

    plain = not options.json
    colour = options.show_skips and sys.stdout.isatty()
    stream = plain and len(ids) == 1 and not options.compare and not colour
    on_text = (lambda text: print(text, end="", flush=True)) if stream else (lambda text: None)
    interrupted = False
    try:
        alive = list(runs)
        while alive:  # in turn, so that their speeds compare
            alive = [run for run in alive if run.advance(on_text)]
    except KeyboardInterrupt:
        interrupted = True
    for run in runs:
        run.finish(on_text)
    reports = [run.report() for run in runs]
    extra = comparison(runs, model) if options.compare else {}
    if options.trace:
        write_trace(options.trace, runs[-1])
    if options.json:
        used = {key: getattr(options, key) for key in ("max_new_tokens", "temperature", "top_p", "seed")}
        weight = model.tok_embeddings.weight
        used.update(ckpt=str(ckpt), device=str(weight.device), dtype=str(weight.dtype).removeprefix("torch."), skip=settings)
        report = dict(reports[-1], settings=used)
        print(json.dumps(dict(report, dense=reports[0], **extra) if options.compare else report))
    elif stream:
        print()
    else:
        for row, prompt in enumerate(prompts):
            if len(prompts) > 1:
                print(f"> {prompt}")
            for run in runs:
                text = shaded(run, row) if colour else "".join(run.pieces[row])
                print((f"[{run.name}]\n" if options.compare else "") + text + "\n" * (len(prompts) > 1 or options.compare))
    for report in reports:
        print(summary(report), file=sys.stderr)
    if extra:
        parts = extra["parts"] if isinstance(extra["parts"], list) else [extra["parts"]]
        where = ", ".join("nowhere" if part is None else f"at token {part}" for part in parts)
        print(f"[the texts part {where}; decoding {number(extra['speedup'], '{:.2f}')} times as fast as dense, "
              f"of at most {extra['speedup_bound']:.2f} by the bytes not read]", file=sys.stderr)  # fmt: skip
    return 130 if interrupted else 0


if __name__ == "__main__":
    load_weights.run_command(main)
