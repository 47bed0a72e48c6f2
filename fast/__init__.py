"""
Speed, and nothing else: model.py needs nothing of this folder, and gives the same numbers up to rounding without it.

    model = accelerate(model)      what load_weights.load_model does last; plain(model) undoes it

A policy walks over layers, so speed is other layers for the same policy, with the same methods and layer_id (but they
are other objects, and no modules; states inside a walk are inference tensors):

one_row.py   a layer for one row on a CPU: vectors for (1, 1, dim), no modules, and the product that is fastest there
graphs.py    a layer for one token per row on a GPU: each half recorded once, and replayed with one call

Long texts go through model.py's own layers, of which two modules do with fewer operations (one_row.RMSNorm, Attention).
"""

import torch

import model as plain_model
from fast import one_row


class Transformer(plain_model.Transformer):
    """model.Transformer, whose policies get the faster layers where there are some."""

    def forward(self, tokens, cache=None, policy=None, *args, **kwargs):
        def walk(layers, x, step):
            graphs = getattr(step.cache, "graphs", None)
            if graphs and graphs.replays(self, step):
                layers = graphs.begin(step)
            elif one_row.way():
                layers = one_row.faster(layers, step.cache)
            if one_row.needs_no_mask(step, x):
                step.mask = None
            with torch.inference_mode():  # less bookkeeping than no_grad; the logits, outside, remain plain tensors
                x = (policy or plain_model.dense)(layers, x, step)
            if x is None:
                raise ValueError("the policy returned nothing: it must return x")
            return x

        with one_row.products(tokens, self.tok_embeddings.weight):
            return super().forward(tokens, cache, walk, *args, **kwargs)

    def logits(self, x):
        row, head = one_row.as_row(x), self.output or self.tok_embeddings
        if row.dim() > 1 or not (one_row.is_plain(self.norm) and one_row.is_plain(head)):
            return super().logits(x)
        normed = one_row.Squares().norm(row, self.norm.weight, self.norm.eps)
        return one_row.linear(normed, head.weight).view(1, 1, -1).float()  # (576,) -> (49152,) -> (1, 1, 49152)


FAST = {
    plain_model.RMSNorm: one_row.RMSNorm,
    plain_model.Attention: one_row.Attention,
    plain_model.Transformer: Transformer,
}
PLAIN = {fast: plain for plain, fast in FAST.items()}


def accelerate(model):
    """The model itself, faster from now on: its weights, their names and its hooks stay."""
    for module in model.modules():
        module.__class__ = FAST.get(type(module), type(module))
    return model


def compare(model):
    """The model itself. What one_row.py asks at its first row is asked now, so that no token's time contains it."""
    if model.tok_embeddings.weight.device.type == "cpu":
        with torch.no_grad():
            one_row.are_known(list(model.layers), model.args)
    return model


def plain(model):
    """The model itself, as model.py has it again."""
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return model
