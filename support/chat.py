"""
A conversation with a checkpoint: python generate.py --chat

Its history stays in the key-value cache. For each message the whole conversation is put into the chat template again;
the cache is rewound to what it shares with that, and only the rest is forwarded. So an answer's keys and values stay as
its policy has written them.
"""

import argparse
import math
import sys

from support.cache import fork, rewind
from support.common import describe_error, first_difference, model_name
from model import KVCache
from fast.processes import from_first
from support.show import screen, summary, write

COMMANDS = "/reset begins anew, /policy NAME [R] takes another policy, Ctrl-C stops an answer, Ctrl-D ends"


def first_messages(options):
    """What stands in a chat before the user's first message."""
    return [] if options.system is None else [dict(role="system", content=options.system)]


class Conversation:
    """Messages, and a KVCache in whose columns are the ids `held`."""

    def __init__(self, model, tokenizer, options, start):
        self.model, self.tokenizer, self.options, self.start = model, tokenizer, options, start
        weight = model.tok_embeddings.weight
        room = min(1024, model.args.max_seq_len)  # at first
        self.cache = KVCache(model.args, 1, room, weight.dtype, weight.device)
        self.held = []
        self.reset()

    def reset(self):
        """Forget all but what --system says."""
        self.messages = first_messages(self.options)

    def answer(self, text, name, policy):
        """Stream the answer to a message, and sum it up. Nothing is said if the conversation fills the context."""
        limit, n_new = self.model.args.max_seq_len, self.options.max_new_tokens
        full = f"[the conversation fills the model's context of {limit} tokens: /reset begins another]"
        user = dict(role="user", content=text)
        ids = self.tokenizer.chat([*self.messages, user])
        if len(ids) >= limit:
            note(full)
            return
        self.make_room(ids, min(len(ids) + n_new, limit))
        generation = self.start(name, policy, self.model, self.tokenizer, [ids], self.options, self.cache)
        if not write([generation], screen([generation]), range(n_new)):
            # The pass that was interrupted may have written beyond `length`.
            length, self.cache.length = self.cache.length, self.cache.max_seq_len
            rewind(self.cache, length)
        self.held = (ids + generation.ids[0])[: self.cache.length]
        if generation.text():  # else it was interrupted before it began, and the message is as if not said
            self.messages += [user, dict(role="assistant", content=generation.text())]
        note(summary(generation.report()))
        if len(ids) + len(generation.ids[0]) > limit:
            note(full)

    def make_room(self, ids, room):
        """Rewind the cache to what it shares with ids, short of the last; make it large enough for `room` columns."""
        rewind(self.cache, min(first_difference(self.held, ids), len(ids) - 1))
        if room > self.cache.max_seq_len:
            self.cache = fork(self.cache, 1, min(2 * room, self.model.args.max_seq_len))


def note(line):
    print(line, file=sys.stderr)


def read_line():
    """The next line of standard input, after a prompt on a terminal; shown where nobody has typed it."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input("> ")
    line = input()
    print(f"> {line}")
    return line


def change_policy(words, options, choose):
    """What choose(options) returns for the words NAME [R] after /policy. Raises what it raises."""
    if len(words) not in (1, 2):
        raise ValueError("expected /policy NAME [R], R being the share of feed-forward blocks to skip")
    name, skip = words[0], None
    if len(words) > 1:
        try:
            skip = float(words[1])
        except ValueError:
            skip = math.nan
        if not 0 <= skip < 1:
            raise ValueError(f"/policy {name} {words[1]}: expected a share of at least 0 and below 1, such as 0.1")
    elif name not in ("dense", "ffnskip"):
        raise ValueError(f"expected /policy {name} R, R being the share of feed-forward blocks to skip")
    changed = dict(vars(options), policy=name, skip=skip)
    if name == "dense":
        changed["warm_up_index"] = None
    return argparse.Namespace(**changed), choose(argparse.Namespace(**changed))


def converse(options, ckpt, tokenizer, model, choose, start):
    """
    Answer line by line of standard input, until it ends; the exit status. choose(options) gives a policy's name, it and
    its settings; start(name, policy, model, ...) a generate.Generation.
    """
    try:
        import readline  # noqa: F401, so that input() has a history and the arrow keys
    except ImportError:  # Windows
        pass
    name, policy, _ = choose(options)
    tokenizer.chat([*first_messages(options), dict(role="user", content="")])  # where it cannot, it says so now
    conversation = Conversation(model, tokenizer, options, start)
    note(f"[{model_name(ckpt)}, {name}: {COMMANDS}]")
    while True:
        try:
            line = from_first(read_line)
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError:
            note("[not UTF-8 text]")
            continue
        command, *words = line.split() or [""]
        if command == "/reset":
            conversation.reset()
        elif command == "/policy":
            try:
                conversation.options, (name, policy, _) = change_policy(words, options, choose)
                note(f"[policy {' '.join(words)}]")
            except Exception as error:  # also of somebody's own policy
                note(f"error: {describe_error(error)}")
        elif command.startswith("/"):
            note(f"[no command {command}: {COMMANDS}]")
        elif command:
            conversation.answer(line, name, policy)
