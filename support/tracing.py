"""What ran: the record of a forward pass, or of many, that `model(..., trace=Trace())` leaves behind."""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Pass:
    """One forward pass over tokens (batch, seq). The two lists hold (layer_id, value, which tokens or None for all)."""

    n_layers: int
    token_index: torch.Tensor  # (batch, seq)
    real: torch.Tensor  # (batch, seq) bool: the tokens that are no padding
    ran: list = field(default_factory=list)
    cosine: list = field(default_factory=list)
    attention: list = field(default_factory=list)
    feed_forward: list = field(default_factory=list)


class Trace:
    """
    What ran: give one to `model(..., trace=trace)`, over as many forward passes as you like. Trace(cosines=True) asks
    for the cosine also where it decides nothing, since no cosine reaches the threshold.

    .ran          (layer, batch, token) bool: the FFN block was executed; recorded where it is executed
    .cosine       (layer, batch, token) fp32: cosine before and after it, NaN where it was not measured
    .token_index  (batch, token): position - prompt_len, negative in the prompt and in padding
    """

    def __init__(self, cosines=False):
        self.cosines = cosines
        self.passes = []

    def begin(self, n_layers, token_index, real):
        """A forward pass begins over tokens (batch, seq), of which `real` are no padding."""
        self.passes.append(Pass(n_layers, token_index, real))

    def record_ran(self, layer_id, active):
        self.passes[-1].ran.append((layer_id, True, active))

    def record_cosine(self, layer_id, sim_score, compared):
        self.passes[-1].cosine.append((layer_id, sim_score, compared))

    def record_unread(self, layer_id, part, shares, active=None):
        """Which share of the weights of a part, "attention" or "feed_forward", each token left out though it ran."""
        getattr(self.passes[-1], part).append((layer_id, shares, active))

    def unread(self, part):
        """(layer, batch, token) fp32: that share; 0 where nothing was left out, or the whole part did not run."""
        return self.collect(part, nothing=0.0)

    @property
    def read(self):
        """(layer, batch, token) fp32: the share of each FFN block's weights that a token needed, 0 of one skipped."""
        return self.ran * (1 - self.unread("feed_forward"))

    @property
    def token_index(self):
        return torch.cat([one.token_index for one in self.passes], dim=1)

    @property
    def ran(self):
        return self.collect("ran", nothing=False)

    @property
    def cosine(self):
        return self.collect("cosine", nothing=math.nan)

    def collect(self, name, nothing):
        """(layer, batch, token): what was recorded under that name, `nothing` for padding and where nothing was."""
        passes = []
        for one in self.passes:
            values = torch.full((one.n_layers, *one.real.shape), nothing)
            for layer_id, value, where in getattr(one, name):
                where = one.real if where is None else one.real & torch.as_tensor(where).view(one.real.shape)
                value = torch.as_tensor(value).expand(one.real.numel()).view(one.real.shape)
                values[layer_id] = torch.where(where, value, values[layer_id])
            passes.append(values)
        return torch.cat(passes, dim=2)

    def counts(self, warm_up_index):
        """(FFN executions saved, those of the dense model) over the tokens with token_index > warm_up_index."""
        if not self.passes:
            return 0, 0
        return saved_blocks(self.ran, self.token_index, warm_up_index)

    def ffn_skip_ratio(self, warm_up_index):
        """The share of FFN executions saved, over tokens past the warm-up; None if there are none."""
        return skip_ratio(self.ran, self.token_index, warm_up_index) if self.passes else None

    def ffn_saved_ratio(self):
        """The same over all generated tokens that were forwarded; it determines speed."""
        return self.ffn_skip_ratio(-1)


def saved_blocks(ran, token_index, warm_up_index):
    """(FFN executions saved, those of the dense model) past the warm-up, from ran, (layer, ..., token)."""
    ran = ran[:, token_index > warm_up_index]  # (layer, tokens past the warm-up)
    return (~ran).sum().item(), ran.numel()


def skip_ratio(ran, token_index, warm_up_index):
    """Their quotient; None if no token is past the warm-up."""
    saved, dense_model = saved_blocks(ran, token_index, warm_up_index)
    return saved / dense_model if dense_model else None
