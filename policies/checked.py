"""
A policy from a user's file. What it hands to the layers is looked at, so that a mistake is told with its line in that
file, before it becomes an error in another one, or a text that is wrong without an error.
"""

import sys

import torch

from policies.baselines import attended_missing
from support.common import note, policy_files


class Checked:
    """
    The policy called `name`, with its attributes, for model(..., policy=...). Its layers check what they get until a
    token that is decoded alone has skipped a block; then the policy has shown what it does, and gets the layers
    themselves. Raises ValueError for what is no policy's; what is odd, and may be meant, is told once.
    """

    def __init__(self, policy, name):
        self.policy, self.name = policy, name
        self.told, self.skipped, self.trusted = set(), False, False

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def __call__(self, layers, x, step):
        self.tell_missing(step.cache)
        if not self.trusted:
            layers = [CheckedLayer(layer, self) for layer in layers]
        out = self.policy(layers, x, step)
        if out is None:
            raise ValueError(f"{self.place()}: the policy returned nothing: it must return x")
        if describe(out) != describe(x):
            raise ValueError(f"{self.place()}: the policy returned {describe(out)}: it must return x, {describe(x)}")
        self.trusted = self.trusted or (self.skipped and x.size(1) == 1)
        return out

    def place(self):
        """The file and line that is calling the layers; else that in which the policy begins."""
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_filename not in policy_files:
            frame = frame.f_back
        if frame is not None:
            return f"{frame.f_code.co_filename}, line {frame.f_lineno}"
        function = self.policy if hasattr(self.policy, "__code__") else type(self.policy).__call__
        code = getattr(function, "__code__", None)  # a partial has none
        return f"{code.co_filename}, line {code.co_firstlineno}" if code else self.name

    def tell(self, kind, line):
        """A line about one kind of what is odd, the first time."""
        if kind not in self.told:
            self.told.add(kind)
            note(f"[{self.place()}: {line}]")

    def tell_missing(self, cache):
        """Say so if tokens before have read a cache entry that is missing."""
        if "missing" in self.told or cache.complete():
            return
        found = attended_missing(cache).nonzero().tolist()
        if found:
            self.tell("missing", f"in layer {found[0][0]} a token reads a cache entry that one before it did not "
                      "write, and gets zeros: each token must run add_attention, or attention.write_kv")


class CheckedLayer:
    """A layer that checks `active`, and whether what it is called for makes sense."""

    def __init__(self, layer, checked):
        self.layer, self.checked = layer, checked

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def __call__(self, x, step):
        return self.layer(x, step)

    def add_attention(self, x, step, active=None):
        self.check(active, step)
        return self.layer.add_attention(x, step, active)

    def add_feed_forward(self, h, step, active=None):
        self.check(active, step)
        start, n_tokens = step.cache.length, step.token_index.size(1)
        runs = active is None or active.any()
        if runs and not step.cache.written[self.layer_id, :, start : start + n_tokens].any():
            self.checked.tell("attention", f"layer {self.layer_id} runs add_feed_forward, and not add_attention")
        if active is not None and not active.all():
            self.checked.skipped = True
            real = torch.arange(start, start + n_tokens) >= step.cache.pad[:, None]  # (batch, seq): no padding
            if (real & (step.token_index < 0) & ~active).any():
                self.checked.tell("prompt", "the prompt is skipped in: active must be True where a block runs")
        return self.layer.add_feed_forward(h, step, active)

    def check(self, active, step):
        """Raise ValueError if `active` is given, and not (batch, seq) bool on the host."""
        if active is None:
            return
        right = torch.is_tensor(active) and active.dtype == torch.bool and active.device.type == "cpu"
        if not right or active.shape != step.token_index.shape:
            expected = f"torch.bool of {list(step.token_index.shape)} on cpu"
            raise ValueError(f"{self.checked.place()}: active is {describe(active)}: it must be {expected}")


def describe(value):
    """A value's dtype, shape and device, or for what is no tensor its type."""
    if not torch.is_tensor(value):
        return f"a {type(value).__module__}.{type(value).__name__}"
    return f"{value.dtype} of {list(value.shape)} on {value.device}"
