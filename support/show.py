"""
What generate.py shows: a Generation, which is one policy at work; text as it grows, two texts side by side or below
each other; lines that sum up; a picture of what was skipped; the JSON; a trace as CSV; a bar of layers.
"""

import csv
import importlib.util
import io
import shlex
import sys
import time
from contextlib import contextmanager
from os.path import commonprefix

import torch

from support import common
from support.tokenizer import TextStream
from support.trace_page import write_page
from support.tracing import skip_ratio

REDRAWS = 10  # per second, at most
PATIENCE = 1  # seconds of the prompt's pass without a bar
EMPTY = "try other words, or --temperature 0.7"  # where a text ended before it began


def note(line):
    print(line, file=sys.stderr)


def messages(system, *prompts):
    """The messages of a chat template: what --system says, if anything, and the user's prompts."""
    found = [] if system is None else [dict(role="system", content=system)]
    return found + [dict(role="user", content=prompt) for prompt in prompts]


class Generation:
    """
    One policy at work on all prompts (lists of ids): what it has written so far, and how long that took. `loop` is
    generate.generate_batch() with this trace and cache; `planned` is the ratio that was asked for; in_prompt: a policy
    of its own for the prompt.
    """

    def __init__(self, name, policy, model, tokenizer, prompts, loop, trace, planned=None, cache=None, in_prompt=None):
        self.name, self.policy, self.model, self.tokenizer, self.prompts = name, policy, model, tokenizer, prompts
        self.loop, self.trace, self.planned, self.in_prompt, self.times = loop, trace, planned, in_prompt, []
        self.held = 0 if cache is None else cache.length  # tokens of a prompt that are not forwarded
        self.ids = [[] for _ in prompts]
        self.pieces = [[] for _ in prompts]  # the text of each token
        self.streams = [TextStream(tokenizer, prompt) for prompt in prompts]

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
        """What was not read so far of one text's blocks: quicker than the trace's, to be asked for again and again."""
        passes = self.trace.passes[1:]  # over one token each, in which only blocks that ran are recorded
        blocks = sum(one.n_layers for one in passes)
        read = 0.0
        for one in passes:
            read += len(one.ran) - sum(float(share) for _, share, _ in one.feed_forward)
        return 1 - read / blocks if blocks else 0.0

    def report(self):
        """What --json prints: lists over the prompts where there are several."""
        n_prompt = [len(prompt) for prompt in self.prompts]
        n_new = [len(ids) for ids in self.ids]
        text = [self.text(row) for row in range(len(self.prompts))]
        report = dict(text=text, prompt_tokens=n_prompt, new_tokens=n_new, token_ids=self.ids)
        if len(self.prompts) == 1:
            report = {key: value[0] for key, value in report.items()}
        prefill, read = sum(self.times[:1]), sum(n_prompt) - self.held * len(n_prompt)
        report["prefill_tokens_per_s"] = read / prefill if prefill else None
        report["decode_tokens_per_s"] = self.decode_speed()
        report |= self.ratios()
        report["planned_skip_ratio"] = self.planned
        report["peak_memory_bytes"] = common.peak_memory(self.model.tok_embeddings.weight.device)
        report["policy"] = self.name
        return report

    def ratios(self):
        """
        ffn_skip_ratio and ffn_saved_ratio of what was decoded, prompt_ffn_skip_ratio of the prompt's pass; ffn_unread:
        the share of the blocks' weights that tokens past the warm-up did not need; blocks_saved and attention_saved:
        of the weights of a decoding pass, that which no row needed, so that it was not read.
        """
        names = "ffn_skip_ratio", "ffn_saved_ratio", "prompt_ffn_skip_ratio", "ffn_unread"
        found = dict.fromkeys([*names, "blocks_saved", "attention_saved"])
        if not self.times:
            return found  # interrupted within the first pass, whose record is not complete
        ran, token_index = self.trace.ran, self.trace.token_index
        begin = self.trace.passes[0].token_index.size(1)  # the first column that was decoded
        read, warm_up_index = self.trace.read, getattr(self.policy, "warm_up_index", -1)
        decoded = ran[:, :, begin:], token_index[:, begin:]
        found["ffn_skip_ratio"] = skip_ratio(*decoded, warm_up_index)
        found["ffn_saved_ratio"] = skip_ratio(*decoded, -1)
        may_skip = token_index[:, :begin] > warm_up_index  # (batch, tokens of the prompt)
        if self.in_prompt is not None:  # for which tokens count from the prompt's beginning
            positions = token_index[:, :begin] + torch.tensor([[len(prompt)] for prompt in self.prompts])
            may_skip = positions > getattr(self.in_prompt, "warm_up_index", -1)
        if may_skip.any():
            found["prompt_ffn_skip_ratio"] = 1 - read[:, :, :begin][:, may_skip].mean().item()
        if ran.size(2) > begin:
            read, past = read[:, :, begin:], decoded[1] > warm_up_index  # (layer, batch, token)
            found["ffn_unread"] = 1 - read[:, past].mean().item() if past.any() else None
            found["blocks_saved"] = 1 - read.amax(1).mean().item()
            found["attention_saved"] = self.trace.unread("attention")[:, :, begin:].amin(1).mean().item()
        return found


def write(generations, screen, steps):
    """
    All the texts, token by token in turn, so that their speeds compare; `screen` draws between the tokens. `steps` are
    as many items as there may be tokens. False if Ctrl-C ended it.
    """
    finished = True
    with screen as draw:
        try:
            running = list(generations)
            for _ in steps:
                running = [generation for generation in running if generation.advance()]
                draw()
                if not running:
                    break
        except KeyboardInterrupt:
            finished = False
        for generation in generations:
            generation.finish()
        draw()
    return finished


def screen(generations):
    """
    What shows one text of each generation while it is written, as a context manager that gives draw(), to be called
    after every token: two columns on a terminal, if the package rich is installed; else one text after the other.
    """
    if len(generations) == 2 and sys.stdout.isatty() and importlib.util.find_spec("rich"):
        return side_by_side(generations)
    return below_each_other(generations)


@contextmanager
def below_each_other(generations):
    """The first text as it grows, and then the others, below their names if there are any."""
    first, *others = generations
    shown = 0  # pieces

    def draw():
        nonlocal shown
        pieces = first.pieces[0][shown:]
        shown += len(pieces)
        print("".join(pieces), end="", flush=True)

    if others:
        print(f"[{first.name}]")
    yield draw
    print()
    for generation in others:
        print(f"\n[{generation.name}]\n{generation.text()}")


@contextmanager
def side_by_side(generations):
    """Live columns on a terminal. While they grow, their last lines are shown, as many as it has; then all of them."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    live = Live(console=console, auto_refresh=False, transient=True)
    drawn = 0.0  # when

    def draw():
        nonlocal drawn
        if time.perf_counter() - drawn > 1 / REDRAWS:
            live.start()  # only now, since the bars of loading and of the prompt have gone
            live.update(columns(console, generations, max(1, console.height - 6)), refresh=True)
            drawn = time.perf_counter()

    try:
        yield draw
    finally:
        live.stop()
    console.print(columns(console, generations))


def columns(console, generations, n_lines=0):
    """
    A table for rich: name, speed, what was skipped, and the last n_lines of the text (0: all) of each generation; bold
    from where the texts differ.
    """
    from rich.table import Table
    from rich.text import Text

    table, cells = Table(), []
    same = len(commonprefix([generation.text() for generation in generations]))
    width = console.width // len(generations) - 4  # a frame and a space at either side
    for generation in generations:
        speed = number(generation.decode_speed(), "{:.1f} tokens/s")
        table.add_column(f"{generation.name}\n{speed}, {generation.skipped():.1%} skipped", width=width)
        text = Text(generation.text().rstrip())
        text.stylize("bold", same)
        lines = text.wrap(console, width)
        cells.append(Text("\n").join(lines[-n_lines:]))
    table.add_row(*cells)
    return table


@contextmanager
def layer_bar(model, label):
    """A bar of the layers that the model walks through, if that takes longer than PATIENCE, on a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield
        return

    def count(module, args, out):
        bar.update()

    with tqdm(total=len(model.layers), desc=label, leave=False, disable=None, delay=PATIENCE) as bar:
        hooks = [layer.attention.register_forward_hook(count) for layer in model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def number(value, form="{:.1f}"):
    return "-" if value is None else form.format(value)


def summary(report):
    """One line for people, which fits 100 columns."""
    tokens = report["new_tokens"] if isinstance(report["new_tokens"], int) else sum(report["new_tokens"])
    line = f"{report['policy']}: {tokens} tokens, {number(report['decode_tokens_per_s'])} tokens/s"
    skipped, saved = report["ffn_skip_ratio"], number(report["ffn_saved_ratio"], "{:.1%}")
    unread = report["ffn_unread"] or 0.0
    if report["prompt_ffn_skip_ratio"]:
        line += f", in the prompt {report['prompt_ffn_skip_ratio']:.1%} of the FFN skipped"
    if skipped == unread == 0 and not report["planned_skip_ratio"]:
        return f"[{line}]"
    if skipped is None:
        none = "in the answer none" if report["prompt_ffn_skip_ratio"] else "no FFN block skipped"
        return f"[{line}, {none}: no token is past the warm-up]"
    if unread > skipped + 1e-6:  # blocks that ran have left out inputs
        return f"[{line}, {unread:.1%} of FFN weights not read, {skipped:.1%} as whole blocks]"
    planned = number(report["planned_skip_ratio"], " (planned {:.1%})").removeprefix("-")
    return f"[{line}, FFN blocks skipped {skipped:.1%}{planned}, in all {saved}]"


def speedup_bound(model, saved, attention_saved=0.0):
    """The most that decoding can be faster than dense, if it is bound by reading weights: bytes / bytes left."""
    weights = common.weight_bytes(model)
    read = sum(weights.values())
    return read / (read - saved * weights["feed_forward"] - attention_saved * weights["attention"])


def comparison(generations, reports):
    """What --compare adds to the JSON, dense first; first_difference is None where both texts are the same."""
    differences = []
    for a, b in zip(generations[0].ids, generations[1].ids):
        differences.append(None if a == b else common.first_difference(a, b))
    dense_report, report = reports
    speed, dense_speed = report["decode_tokens_per_s"], dense_report["decode_tokens_per_s"]
    return dict(
        first_difference=differences if len(differences) > 1 else differences[0],
        speedup=speed / dense_speed if speed and dense_speed else None,
        speedup_bound=speedup_bound(
            generations[0].model, report["blocks_saved"] or 0.0, report["attention_saved"] or 0.0),
    )


def comparison_summary(extra):
    differences = extra["first_difference"]
    if not isinstance(differences, list):
        differences = [differences]
    where = ", ".join("none" if token is None else f"at token {token}" for token in differences)
    speed = number(extra["speedup"], "{:.2f}x the speed of dense")
    line = f"[first difference: {where}; decoding {speed}, {extra['speedup_bound']:.2f}x by the bytes not read]"
    if extra["speedup"] and extra["speedup"] < 1.02 < extra["speedup_bound"]:
        line += "\n[deciding costs what is saved here]"
    return line


def blocks_picture(ran, columns=96):
    """
    Lines of a picture of ran, (layer, token) bool, the last layer at the top: a dot is a feed-forward block that was
    skipped. A character of Braille has 2 x 4 dots, so that 30 layers of 192 tokens take 8 lines of 96 columns.
    """
    dots = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]]  # of a character, from the top; U+2800 has none
    skipped = (~ran.flip(0)[:, : 2 * columns]).tolist()
    for top in range(0, len(skipped), 4):
        line = []
        for left in range(0, len(skipped[0]), 2):
            bits = 0
            for y, row in enumerate(skipped[top : top + 4]):
                for x, skips in enumerate(row[left : left + 2]):
                    bits += dots[y][x] * skips
            line.append(chr(0x2800 + bits))
        yield "".join(line)


def show_blocks(generation):
    """Print what was skipped of one text, as far as it fits a line."""
    trace = generation.trace
    ran = trace.ran[:, 0, trace.token_index[0] >= 0]  # (layer, generated token)
    if ran.all():
        return
    note("[a dot is an FFN block that was skipped; layers from the bottom up, generated tokens from left to right]")
    for i, line in enumerate(blocks_picture(ran)):
        note(f"{len(ran) - 1 - 4 * i:3} {line}")  # the topmost of its four layers


def tell(generations, prompts, options, settings):
    """What is told when all is written: JSON or the texts that were not streamed, the trace, the lines that sum up."""
    reports = [generation.report() for generation in generations]
    extra = comparison(generations, reports) if options.compare else {}
    if options.json:
        used = {key: getattr(options, key) for key in ("max_new_tokens", "temperature", "top_p", "seed")}
        weight = generations[0].model.tok_embeddings.weight
        used |= dict(device=str(weight.device), dtype=str(weight.dtype).removeprefix("torch."))
        report = reports[-1] | dict(settings=used | settings)
        if options.compare:
            report |= dict(dense=reports[0], **extra)
        print(common.to_json(report))
    elif len(prompts) > 1:
        print_texts(generations, prompts)
    if options.trace:  # after the answer, which a full disk must not lose
        sys.stdout.flush()
        write_trace(options, generations, prompts, settings["ckpt"])
        note(f"[trace written to {options.trace}]")
    if options.compare and len(prompts) == 1 and not options.json:
        show_blocks(generations[-1])
    for generation, report in zip(generations, reports):
        note(summary(report))
        if generation.in_prompt is not None and report["prompt_ffn_skip_ratio"] is None:
            note("[nothing is skipped in the prompt: none of its tokens is past the warm-up]")
        tell_empty(generation, "without --raw a prompt is a message" if options.raw else EMPTY)
    if extra:
        note(comparison_summary(extra))


def tell_empty(generation, advice=EMPTY):
    """Say of which prompts the text ended before it began, which looks as if nothing had been done."""
    for row, ids in enumerate(generation.ids):
        if ids and ids[-1] in generation.tokenizer.eos_ids and not generation.text(row).strip():
            prompt = f" for prompt {row + 1}" if len(generation.ids) > 1 else ""
            note(f"[no text{prompt}: the model ended it at token {len(ids)}: {advice}]")


def print_texts(generations, prompts):
    for row, prompt in enumerate(prompts):
        print(f"> {prompt}")
        for generation in generations:
            if len(generations) > 1:
                print(f"[{generation.name}]")
            print(f"{generation.text(row)}\n")


def write_trace(options, generations, prompts, ckpt):
    """The runs as a page for the browser, if the file's name ends in .html; else the last one as CSV."""
    if options.trace.endswith((".html", ".htm")):
        command = shlex.join(["python", *sys.argv])
        write_page(options.trace, generations, prompts, common.model_name(ckpt), command, options.ckpt)
    else:
        write_csv(options.trace, generations[-1])


def write_csv(path, generation):
    """
    The trace as CSV, one row per token: for each layer the cosine where it was measured, else "run", "skip" or, of a
    block that ran without some inputs, the share of its weights that was "not read".
    """
    trace, prompts = generation.trace, generation.prompts
    ran, cosine, unread, token_index = trace.ran, trace.cosine, trace.unread("feed_forward"), trace.token_index
    file = io.StringIO()
    out = csv.writer(file)
    layers = [f"layer_{i}" for i in range(len(ran))]
    out.writerow(["prompt", "token_index", "token_id", "token", "ffn_skipped", *layers])
    for row, (prompt, ids) in enumerate(zip(prompts, generation.ids)):
        forwarded = prompt + ids[:-1]  # the last token is written, and never read
        padding, stream = max(map(len, prompts)) - len(prompt), TextStream(generation.tokenizer, [])
        for column, token in enumerate(forwarded, start=padding):
            cells = ["run" if r else "skip" for r in ran[:, row, column].tolist()]
            for layer, value in enumerate(cosine[:, row, column].tolist()):
                if value == value:  # it is not NaN
                    cells[layer] = f"{value:.4f}"
                elif unread[layer, row, column] > 0:
                    cells[layer] = f"{unread[layer, row, column]:.1%} not read"
            text = stream.add(token).replace("\n", "\\n")
            skipped = (~ran[:, row, column]).sum().item()
            out.writerow([row, token_index[row, column].item(), token, text, skipped, *cells])
    common.write_whole(path, file.getvalue())
