"""What generate.py shows: text as it grows, texts below each other, shaded; a line that sums up; a trace as CSV."""

import csv


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


def number(value, form="{:.1f}"):
    return "-" if value is None else form.format(value)


def summary(report):
    """One line for people."""
    tokens = report["new_tokens"] if isinstance(report["new_tokens"], int) else sum(report["new_tokens"])
    gigabytes = report["peak_memory_bytes"] and report["peak_memory_bytes"] / 1e9
    skipped = f"FFN blocks skipped past the warm-up {number(report['ffn_skip_ratio'], '{:.1%}')}"
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
    return f"[first difference: {where}; decoding {speed}, at most {extra['speedup_bound']:.2f}x by the bytes not read]"


def print_texts(generations, prompts, colour):
    for row, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"> {prompt}")
        for generation in generations:
            if len(generations) > 1:
                print(f"[{generation.name}]")
            print(shaded(generation, row) if colour else "".join(generation.pieces[row]))
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
