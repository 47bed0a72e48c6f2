"""
A checkpoint's chat template: where it is, and its text for a list of messages [{"role": ..., "content": ...}]; and the
special tokens that it and other files name.
"""

import json
import re
from datetime import datetime

from support.common import LoadError, first_line, read_utf8


def find_template(folder, stated):
    """
    The chat template in a folder, or {name: template} of several, from files, which count before what
    tokenizer_config.json has stated: a text, or a list of named ones. None if there is none.
    """
    files = {"default": folder / "chat_template.jinja"}
    for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
        files[file.stem] = file
    named = {name: read_utf8(file) for name, file in files.items() if file.exists()}
    if not named and isinstance(stated, list):
        named = {one["name"]: one["template"] for one in stated}
    return named or stated or None


def render(template, messages, bos_token=None, eos_token=None, **special):
    """
    The text of a chat by a jinja2 template, or by the default one of {name: template}, in the environment that
    transformers gives it; special: the texts of other special tokens by name. Raises LoadError.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, around what a model is trained on, means nothing here."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja2's is for web pages
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form):
        return datetime.now().strftime(form)

    def raise_exception(message):
        raise TemplateError(message)

    if isinstance(template, dict):
        if "default" not in template:
            raise LoadError(f"this checkpoint's chat templates are named {', '.join(template)}, and none default: copy "
                            "the one to use to chat_template.jinja beside its tokenizer, or use --raw")
        template = template["default"]
    names = dict(messages=messages, tools=None, documents=None, add_generation_prompt=True)
    for name, text in dict(special, bos_token=bos_token, eos_token=eos_token).items():
        if text:  # a template may ask whether a token is defined
            names[name] = text
    extensions = ["jinja2.ext.loopcontrols", Generation]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    env.filters["tojson"] = tojson
    env.globals |= dict(raise_exception=raise_exception, strftime_now=strftime_now)
    try:
        return env.from_string(template).render(names)  # somebody else's program, hence the sandbox
    except Exception as error:
        raise LoadError(f"the checkpoint's chat template failed: {first_line(error)}; --raw does without it") from error


def llama_2_turns(messages):
    """
    [(text of one turn, whether the answer in it ends)], in LLaMA-2's format, each of them between its own beginning and
    end of text: https://github.com/meta-llama/llama/blob/main/llama/generation.py, chat_completion.
    """
    turns, text, system = [], "", ""
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            system = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            text, system = f"[INST] {(system + content).strip()} [/INST]", ""
        else:
            turns.append((f"{text} {content.strip()} ", True))
            text = ""
    return turns + [(text, False)] * bool(text)


def llama_2_warning(where, names):
    """A line for a model that has no template and gets LLaMA-2's format, though its names do not say LLaMA-2."""
    if re.search("llama[-_ ]?2", names, re.IGNORECASE):
        return None
    return f"[{where}: no chat template: LLaMA-2's format is used, and this model may expect another]"


FLAGS = "content", "special", "lstrip", "rstrip", "single_word", "normalized"  # of a token that was added


def added_tokens(stated, named, find, size):
    """
    {id: token} of what files beside the tokenizer's own define: `stated` with an id, and the texts `named`. Those of
    them that it does not find among its `size` tokens get the next ids, as transformers gives them.
    """
    added = {}
    for i, token in stated.items():
        added[int(i)] = {flag: token[flag] for flag in FLAGS if flag in token}
        added[int(i)]["special"] = token.get("special", False) or token["content"] in named
    texts = {token["content"] for token in added.values()}
    for text in named:
        if text not in texts:
            i = find(text)
            if i is None:
                i = max([size - 1, *added]) + 1
            added[i] = dict(content=text, special=True)
            texts.add(text)
    return added


def token_pattern(content, lstrip=False, rstrip=False, single_word=False, **_):
    """A regular expression, with one group, that finds an added token in a text."""
    text = f"({re.escape(content)})"
    if single_word:
        text = rf"(?<!\w){text}(?!\w)"
    return r"\s*" * lstrip + text + r"\s*" * rstrip


def content(token):
    """The text of a special token, which is written alone or with how it is matched."""
    if isinstance(token, dict):
        return token["content"]
    return token


def more_tokens(config):
    """The texts of special tokens that have no name."""
    tokens = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
    if isinstance(tokens, dict):
        tokens = tokens.values()
    return [content(token) for token in tokens]
