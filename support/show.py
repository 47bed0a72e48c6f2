"""
What generate.py shows: text as it grows, two texts side by side or below each other, shaded; a line that sums up; a bar
of layers; a trace as CSV.
"""

import csv
import importlib.util
import sys
import time
from contextlib import contextmanager
from os.path import commonprefix

REDRAWS = 10  # per second, at most
PATIENCE = 1  # seconds of the prompt's pass without a bar


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
    """One line for people."""
    tokens = report["new_tokens"] if isinstance(report["new_tokens"], int) else sum(report["new_tokens"])
    gigabytes = report["peak_memory_bytes"] and report["peak_memory_bytes"] / 1e9
    skipped = f"FFN blocks skipped past the warm-up {number(report['ffn_skip_ratio'], '{:.1%}')}"
    if report["ffn_skip_ratio"] is None:
        skipped += " (no token is past it)"
    if report["planned_skip_ratio"] is not None:
        skipped += f" (planned {report['planned_skip_ratio']:.1%})"
    return (
        f"[{report['policy']}: {tokens} tokens; prefill {number(report['prefill_tokens_per_s'])} tokens/s, "
        f"decode {number(report['decode_tokens_per_s'])} tokens/s; {skipped}, of all tokens "
        f"{number(report['ffn_saved_ratio'], '{:.1%}')}; peak memory {number(gigabytes, '{:.2f} GB')}]"
    )


def comparison_summary(extra):
    differences = extra["first_difference"]
    if not isinstance(differences, list):
        differences = [differences]
    where = ", ".join("none" if token is None else f"at token {token}" for token in differences)
    speed = number(extra["speedup"], "{:.2f}x the speed of dense")
    return f"[first difference: {where}; decoding {speed}, {extra['speedup_bound']:.2f}x by the bytes not read]"


def print_texts(generations, prompts, colour):
    for row, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"> {prompt}")
        for generation in generations:
            if len(generations) > 1:
                print(f"[{generation.name}]")
            print(shaded(generation, row) if colour else generation.text(row))
            if len(prompts) > 1 or len(generations) > 1:
                print()


def write_trace(path, generation):
    """The trace as CSV, one row per token: for each layer the cosine where it was measured, else "run" or "skip"."""
    trace, prompts, decode = generation.trace, generation.prompts, generation.tokenizer.decode
    ran, cosine, token_index = trace.ran, trace.cosine, trace.token_index
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        layers = [f"layer_{i}" for i in range(len(ran))]
        out.writerow(["prompt", "token_index", "token_id", "token", "ffn_skipped", *layers])
        for row, (prompt, ids) in enumerate(zip(prompts, generation.ids)):
            forwarded = prompt + ids[:-1]  # the last token is written, and never read
            padding = max(map(len, prompts)) - len(prompt)
            for column, token in enumerate(forwarded, start=padding):
                cells = ["run" if r else "skip" for r in ran[:, row, column].tolist()]
                for layer, value in enumerate(cosine[:, row, column].tolist()):
                    if value == value:  # it is not NaN
                        cells[layer] = f"{value:.4f}"
                text = decode([token]).replace("\n", "\\n")
                out.writerow([row, token_index[row, column].item(), token, text, cells.count("skip"), *cells])


def shaded(generation, row):
    """The text of a row for a terminal of 256 colours, a token the bluer, the more of its FFN blocks were skipped."""
    ran = generation.trace.ran[:, row, max(map(len, generation.prompts)) :]  # (layer, new token)
    skipped = (~ran).sum(0).tolist() + [0, 0]  # the last token was not forwarded; after it comes the rest of the text
    most = max(skipped)
    text = ""
    for piece, n in zip(generation.pieces[row], skipped):
        if n and piece.strip():
            colour = 16 + (5 * n + most - 1) // most  # the palette's blues, 17 to 21
            piece = f"\x1b[48;5;{colour}m\x1b[38;5;231m{piece}\x1b[0m"
        text += piece
    if not most:
        return text
    return text + f"\n[shade: FFN blocks skipped for the token, 1 to {most} of {len(ran)}]"
