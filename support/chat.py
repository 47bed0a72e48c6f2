"""
A conversation with a checkpoint: python generate.py --chat

Its history stays in the key-value cache. For each message the whole conversation is put into the chat template again;
the cache is rewound to what it shares with that, and only the rest is forwarded. So an answer's keys and values stay as
its policy has written them.
"""

import sys

from fast.processes import from_first
from model import KVCache
from support.cache import fork, rewind
from support.common import first_difference
from support.show import messages, note, screen, summary, tell_empty, write

COMMANDS = "/reset begins anew, Ctrl-C stops an answer, /exit or Ctrl-D ends"


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
        self.messages = messages(self.options.system)

    def answer(self, text):
        """Stream the answer to a message, and sum it up. Nothing is said if the conversation fills the context."""
        limit, n_new = self.model.args.max_seq_len, self.options.max_new_tokens
        full = f"[the conversation fills the model's context of {limit} tokens: /reset begins another]"
        user = dict(role="user", content=text)
        ids = self.tokenizer.chat([*self.messages, user])
        if len(ids) >= limit:
            note(full)
            return
        self.make_room(ids, min(len(ids) + n_new, limit))
        generation = self.start([ids], self.cache)
        if not write([generation], screen([generation]), range(n_new)):
            # The pass that was interrupted may have written beyond `length`.
            length, self.cache.length = self.cache.length, self.cache.max_seq_len
            rewind(self.cache, length)
        self.held = (ids + generation.ids[0])[: self.cache.length]
        if generation.text():  # else it ended before it began, and the message is as if not said
            self.messages += [user, dict(role="assistant", content=generation.text())]
        note(summary(generation.report()))
        tell_empty(generation)
        if len(ids) + len(generation.ids[0]) > limit:
            note(full)

    def make_room(self, ids, room):
        """Rewind the cache to what it shares with ids, short of the last; make it large enough for `room` columns."""
        rewind(self.cache, min(first_difference(self.held, ids), len(ids) - 1))
        if room > self.cache.max_seq_len:
            self.cache = fork(self.cache, 1, min(2 * room, self.model.args.max_seq_len))


def read_line():
    """The next line of standard input, after a prompt on a terminal; shown where nobody has typed it."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input("> ")
    line = input()
    print(f"> {line}")
    return line


def converse(model, tokenizer, options, title, start):
    """
    Answer line by line of standard input, until it ends; the exit status. start(prompts, cache) gives a
    show.Generation.
    """
    try:
        import readline  # noqa: F401, so that input() has a history and the arrow keys
    except ImportError:  # Windows
        pass
    tokenizer.chat(messages(options.system, ""))  # where it cannot, it says so now
    conversation = Conversation(model, tokenizer, options, start)
    note(f"[{title}: {COMMANDS}]")
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
        command = line.strip()
        if command == "/exit":
            return 0
        if command == "/reset":
            conversation.reset()
            note("[begun anew]")
        elif command.startswith("/"):
            note(f"[no command {command.split()[0]}: {COMMANDS}]")
        elif command:
            conversation.answer(line)
