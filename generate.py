"""
Generate text with a LLaMA checkpoint, dense or with feed-forward skipping (FFN-SkipLLM).

    python generate.py                                             the demo model answers a question
    python generate.py --ckpt llama-2-7b "The meaning of life is"  a folder, or a name under checkpoints/
    python generate.py --compare "Why is the sky blue?"            the same prompt dense and skipped, side by side
    python generate.py --chat                                      a conversation

Where the checkpoint has a chat template a prompt is a message, which is answered; elsewhere it is continued.
"""

import support  # noqa: I001, F401 (before PyTorch: Ctrl-C)
import functools
import sys
from contextlib import nullcontext
from dataclasses import asdict

import torch

import policies
from fast import parallel
from fast.graphs import add_graphs
from fast.processes import from_first
from load_weights import load
from model import KVCache, dense
from policies.ledger import InPrompt
from support import common, show
from support.chat import converse
from support.tracing import Trace

QUESTION = "How do plants make food from sunlight?"


def sample(logits, temperature=0.0, top_p=1.0, generator=None):
    """
    Token ids (batch,), on the host, drawn from fp32 logits (batch, vocab); temperature 0 takes the likeliest. Raises
    ValueError if the likeliest is not finite.
    """
    most, likeliest = logits.max(-1, keepdim=True)  # (batch, 1)
    common.check_finite(most)
    if temperature == 0:
        return likeliest.squeeze(1).cpu()
    probs = torch.softmax((logits - most).cpu() / max(temperature, 1e-30), dim=-1)  # near 0 it is greedy too
    if top_p < 1:
        probs, index = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(-1) - probs  # what the likelier tokens hold (Holtzman et al. 2020)
        probs[before >= max(top_p, 1e-30)] = 0
        probs = torch.zeros_like(probs).scatter(-1, index, probs)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


def generate(model, tokens, max_new_tokens, policy=None, **options):
    """
    Continue one prompt, a list of ids, and yield the ids that follow, one by one. It ends with end-of-text (which is
    yielded), after max_new_tokens, or when the model's max_seq_len is full. Options and errors: see generate_batch.
    """
    for ids in generate_batch(model, [tokens], max_new_tokens, policy, **options):
        yield ids[0]


def generate_batch(
    model, prompts, max_new_tokens, policy=None, temperature=0.0, top_p=1.0, seed=0, eos_ids=(),
    prompt_len=None, trace=None, cache=None,
):
    """
    Continue several prompts, lists of ids, and yield a list of one id per prompt at each step; None for a prompt whose
    text has ended.

    policy      as in Transformer.forward; None: dense
    prompt_len  tokens of each prompt that count as prompt and run in full; None: all; 0: skip in the prompt as well
    cache       a KVCache of the first cache.length tokens of each prompt, which are not forwarded again: what it holds
                stays as it was written, under whatever policy. support.cache.rewind() it first to what it shares with
                the prompts.
    Raises ValueError for an empty prompt, one longer than the model's max_seq_len, an id without a row in the model, or
    a cache that leaves no token to forward.
    """
    prompts = [prompt.tolist() if torch.is_tensor(prompt) else prompt for prompt in prompts]
    longest, limit = max(map(len, prompts)), model.args.max_seq_len
    if not all(prompts):
        raise ValueError("the prompt is empty: there is nothing to continue")
    if longest > limit:
        raise ValueError(f"the prompt has {longest} tokens, more than the model's max_seq_len {limit}")
    common.check_ids(model, *prompts)
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
        if trace is not None and trace.cosines:
            trace.record_likeliest(logits)
        next_ids = sample(logits, temperature, top_p, generator)[:, None]  # (batch, 1)
        ids = next_ids[:, 0].tolist()
        for row, token in enumerate(ids):
            if ended[row]:
                ids[row] = None
            elif token in eos_ids:
                ended[row] = True
                # The row still runs beside the others; counted as prompt, it is neither skipped nor part of a ratio.
                prompt_len[row] = limit
        yield ids
        if all(ended):
            return


def parse_args(argv):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("prompt", nargs="*", help='message or text; several run as one batch; "-" reads one from standard input')
    form = parser.add_mutually_exclusive_group().add_argument
    form("--chat", action="store_true", help="each prompt is a message, with or without a chat template; without a "
         "prompt it is a conversation, of standard input")
    form("--raw", action="store_true", help="each prompt is a text to continue as it stands")
    add("--system", metavar="TEXT", help="what the model is told before the first message")
    add("--max-new-tokens", type=common.positive, default=256, metavar="N", help="stop after N tokens (default 256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens, which add up to P")
    common.add_model_arguments(parser)
    add("--compare", action="store_true", help="run dense too, in turn: both texts and speeds, and what was skipped")
    add("--json", action="store_true", help="print one JSON object and nothing else on standard output")
    add("--trace", metavar="FILE", help="write what was skipped: a page for the browser if FILE ends in .html, else "
        "CSV, one row per token")
    add = policies.add_skip_arguments(parser).add_argument
    add("--policy", help="dense, ffnskip (the default where there are settings), another of policies/, which "
        "docs/results.md lists, or FILE.py:FACTORY")
    add("--skip", type=common.share, metavar="R", help="share of all FFN blocks to skip past the warm-up")
    add("--warm-up-index", type=int, metavar="N", help="generated tokens 0 to N run in full; -1: none do")
    place = parser.add_mutually_exclusive_group().add_argument
    place("--skip-prompt", action="store_true", help="skip in the prompt as well, past its own warm-up")
    place("--prompt-skip", type=common.share, metavar="R", help="the same, this share; with --skip 0 in it alone")
    options = parser.parse_args(argv)
    if not 0 <= options.temperature < float("inf"):
        parser.error(f"--temperature {options.temperature} is not a number of at least 0")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p {options.top_p} is not above 0 and at most 1")
    if options.prompt.count("-") > 1:
        parser.error('"-" reads standard input, which can be read once')
    if options.system is not None and options.raw:
        parser.error("--system is for messages, and --raw continues a text")
    if options.chat and not options.prompt and (options.json or options.compare or options.trace):
        parser.error("--json, --compare and --trace need a prompt: --chat without one is a conversation")
    return options


def read_prompts(options):
    """The prompts on the command line; without any, what was piped in. Raises ValueError."""
    prompts = options.prompt
    if not prompts and not options.chat and from_first(common.piped):
        prompts = ["-"]
    elif prompts and "-" not in prompts and from_first(common.piped) == "pipe":
        show.note('[standard input is not read: the prompt "-" reads it]')
    found = [read_prompt(number, prompt) for number, prompt in enumerate(prompts, start=1)]
    if prompts == ["-"] and not options.prompt and not found[0]:
        return []  # an empty file, such as /dev/null
    return found


def read_prompt(number, prompt):
    """The text of prompt `number` on the command line; "-" is standard input. Raises ValueError."""
    text = prompt
    try:
        if prompt == "-":
            text = from_first(sys.stdin.read).removesuffix("\n").removeprefix("\ufeff")
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ValueError(f"prompt {number}, {prompt!r}: not UTF-8 text") from None


def choose_policy(options, ckpt, model):
    """The name, the policy, that for the prompt or None, and the settings that the command line asks for."""
    settings = {}
    if options.policy in (None, "ffnskip"):
        settings = policies.find_settings(options, ckpt, model.args.n_layers)
    asked = settings or (options.skip, options.prompt_skip) != (None, None)
    name = options.policy or ("ffnskip" if asked else "dense")
    if options.standins and "standins" not in name and ":" not in name:
        raise ValueError(f"--standins is for policies standins and teal_standins, and the policy is {name}")
    if options.compare and name == "dense":
        raise ValueError("--compare needs a policy to compare with: --policy NAME, or settings from calibrate.py")
    if options.policy is None and name == "dense":
        command = f"python calibrate.py --ckpt {options.ckpt}" if options.ckpt else "python calibrate.py"
        show.note(f"[no skip settings for {common.model_name(ckpt)}, so nothing is skipped: {command} makes them]")
    others = dict(warm_up_index=options.warm_up_index, seed=options.seed, fitted=policies.find_fitted(options, ckpt))
    policy, in_prompt = policies.find_policy(name, model, settings, options.skip, **others), None
    used = asdict(policy) if name == "ffnskip" and policy is not dense else dict(skip=options.skip)
    if options.prompt_skip is not None:
        in_prompt = policies.find_policy(name, model, settings, options.prompt_skip, **others)
        used["prompt_skip"] = options.prompt_skip
    return name, policy, in_prompt, {} if name == "dense" else used


def start(options, model, tokenizer, name, policy, prompts, cache=None, in_prompt=None):
    """The Generation of a policy on prompts, lists of ids, that the command line asks for; nothing has run yet."""
    trace = Trace(cosines=options.trace is not None)
    walk = policy if in_prompt is None else InPrompt(in_prompt, policy)
    loop = generate_batch(
        model, prompts, options.max_new_tokens, walk, options.temperature, options.top_p, options.seed,
        tokenizer.eos_ids, 0 if options.skip_prompt else None, trace, cache,
    )  # fmt: skip
    planned = None if policy is dense else options.skip
    return show.Generation(name, policy, model, tokenizer, prompts, loop, trace, planned, cache, in_prompt)


def main(argv=None):
    options = parse_args(argv)
    common.check_outputs(options.trace)
    policies.check_name(options.policy)
    prompts = read_prompts(options)
    ckpt = common.find_checkpoint(options.ckpt)
    tokenizer, model = load(ckpt, common.find_device(options.device), options.dtype)
    name, policy, in_prompt, settings = choose_policy(options, ckpt, model)
    begin = functools.partial(start, options, model, tokenizer)
    if options.chat and not prompts:
        title = f"{common.model_name(ckpt)}, {name}"
        return converse(model, tokenizer, options, title, functools.partial(begin, name, policy, in_prompt=in_prompt))
    chat = options.chat or options.system is not None or (bool(tokenizer.template) and not options.raw)
    prompts = prompts or [QUESTION]
    if chat:
        ids = [tokenizer.chat(show.messages(options.system, prompt)) for prompt in prompts]
    else:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
    generations = [begin(name, policy, ids, in_prompt=in_prompt)]
    if options.compare:
        generations.insert(0, begin("dense", dense, ids))
    steps = range(options.max_new_tokens)
    if options.json or len(prompts) > 1:
        finished = show.write(generations, nullcontext(lambda: None), common.progress(steps, "writing"))
    else:
        finished = show.write(generations, show.screen(generations), steps)
    if parallel.rank == 0:  # the first process tells what they have done together
        show.tell(generations, prompts, options, dict(ckpt=str(ckpt), chat=chat, skip=settings))
    return 0 if finished else 130


if __name__ == "__main__":
    common.run_command(main, torchrun=True)
