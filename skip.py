"""
FFN-SkipLLM: Algorithm 1 of "FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping"
(Jaiswal et al., EMNLP 2024, https://arxiv.org/abs/2404.03865), as a policy for model.Transformer.

Where the printed pseudocode is silent or misprinted, this file reads it so:
- `past_start` is a misprint for `past_state`; the norms before attention and feed_forward are not printed, but run.
- The cosine is between the residual stream before the feed-forward block, h, and after it, temp = h + FFN(norm(h)).
- cold_s and cold_e are zero-based and half-open: the layers in [0, cold_s) and [cold_e, n_layers) always run in full.
- token_index counts generated tokens from 0; it is negative in the prompt, which therefore runs in full.
- "Once reached, greedily skip k" (section 3.2) is `k`. Algorithm 1 as printed skips up to cold_e: k=None.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import dense


@dataclass
class FFNSkip:
    """
    The policy `model(tokens, ..., policy=FFNSkip(...))`. Its arguments, those of Algorithm 1 first:

    cold_s, cold_e  layers outside [cold_s, cold_e) are cold: never skipped, their similarity never looked at
    sim_threshold   cosine from which on FFN blocks are skipped, one for all layers or one for each; inf: dense
    warm_up_index   tokens with token_index <= warm_up_index run in full; -1: no warm-up (section 5.1: 25 to 30)
    k               how many FFN blocks to skip once the threshold is reached; None: all up to cold_e
    recheck         after k blocks, compare again; False: the rest of the token runs in full
    full_every      past the warm-up, every full_every-th token runs in full; None: none does

    Raises ValueError if a setting makes no sense, or (when called) does not fit the number of layers.
    """

    cold_s: int
    cold_e: int
    sim_threshold: float | list
    warm_up_index: int = 25
    k: int | None = None
    recheck: bool = True
    full_every: int | None = None

    def __post_init__(self):
        for name, least, none in ("cold_s", 0, 0), ("cold_e", 0, 0), ("warm_up_index", -1, 0), ("k", 1, 1), ("full_every", 1, 1):
            value = getattr(self, name)
            if not (value is None and none) and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}{' or None' * none}, not {value!r}")
        if self.cold_s > self.cold_e:
            raise ValueError(f"cold_s {self.cold_s} lies above cold_e {self.cold_e}")
        if type(self.recheck) is not bool:
            raise ValueError(f"recheck must be true or false, not {self.recheck!r}")
        for value in self.sim_threshold if isinstance(self.sim_threshold, (list, tuple)) else [self.sim_threshold]:
            if not isinstance(value, (int, float)) or math.isnan(value):
                raise ValueError(f"sim_threshold must be a number, or one for each layer, not {value!r}")

    def check(self, n_layers):
        """Raise ValueError if these settings are not for a model of n_layers layers."""
        if self.cold_e > n_layers:
            raise ValueError(f"cold_e {self.cold_e} lies above the model's n_layers {n_layers}")
        if isinstance(self.sim_threshold, (list, tuple)) and len(self.sim_threshold) != n_layers:
            raise ValueError(f"sim_threshold has {len(self.sim_threshold)} values for a model of {n_layers} layers")

    @classmethod
    def authors(cls, n_layers, k):
        """The settings in the authors' public code (https://github.com/Ajay1994/layer-skip), which tests > and not >=."""
        above = math.nextafter(0.95, 1)
        return cls(cold_s=4, cold_e=n_layers - 5, sim_threshold=above, k=k, recheck=False, full_every=6)

    def __call__(self, layers, input_state, step):
        """Algorithm 1 for input_state, (batch, seq, dim): for each of its tokens on its own, and for all at once."""
        self.check(len(layers))
        full = step.token_index <= self.warm_up_index  # (batch, seq): if token_index <= warm_up_index
        if self.full_every is not None:
            full = full | ((step.token_index - self.warm_up_index) % self.full_every == 0)
        if full.all():
            return dense(layers, input_state, step)  # generate_with_full_model
        return self.generate_with_skip_model(layers, input_state, step, watch=~full)

    def generate_with_skip_model(self, layers, input_state, step, watch):
        """
        The printed lines stand at the right. `watch`, (batch, seq), names the tokens that may skip; the others run in full,
        unmeasured. What is decided stands in lists on the host, an entry a token: one read-back a monitored layer, none
        once every token skips.
        """
        shape, watch, k = watch.shape, watch.flatten().tolist(), self.k or len(layers)
        tokens = range(len(watch))
        past_state = input_state  #                              past_state <- input_state
        for layer in layers[: self.cold_s]:  #                   for <0 ... cold_s> do
            past_state = layer(past_state, step)  #                  attention, feed_forward
        skip_state = [False for _ in tokens]  #                  skip_state <- False
        left = [0 for _ in tokens]  # FFN blocks still to skip
        for layer in layers[self.cold_s : self.cold_e]:  #       for <cold_s ... cold_e> do
            h = layer.attend(past_state, step)  #                    h <- past_state + attention(past_state)
            mixed = any(skip_state) and not all(skip_state)
            rows = ~torch.tensor(skip_state).view(shape) if mixed else None
            temp = h if all(skip_state) else layer.feed(h, step, rows)  # if not skip_state: temp <- h + feed_forward(h)
            measured = [watch[i] and not skip_state[i] for i in tokens]
            sim_score = self.cosine(h, temp, layer, step, measured)  # sim_score <- cosine(h, temp)
            sim_threshold = self.threshold(layer)
            for i in tokens:
                if skip_state[i]:
                    left[i] -= 1
                    skip_state[i] = left[i] > 0
                    watch[i] = skip_state[i] or self.recheck
                elif measured[i] and sim_score[i] >= sim_threshold:  # if sim_score >= sim_threshold then
                    skip_state[i], left[i] = True, k  #                  skip_state <- True
            past_state = temp  #                                     past_state <- temp; where skipped, h
        for layer in layers[self.cold_e :]:  #                   for <cold_e ... num_layers> do
            past_state = layer(past_state, step)  #                  attention, feed_forward
        return past_state

    def cosine(self, h, temp, layer, step, measured):
        """
        Cosine of h and temp, (batch, seq, dim), as a list with an entry a token; None if no token is `measured`. In
        float32 always: next to 1 bfloat16 has steps of 0.004, coarser than the thresholds in use.
        """
        if not any(measured):
            return None
        sim_score = F.cosine_similarity(h.float(), temp.float(), dim=-1)  # (batch, seq, dim) -> (batch, seq)
        if step.trace is not None:
            step.trace.record_cosine(layer.layer_id, sim_score, measured)
        return sim_score.flatten().tolist()

    def threshold(self, layer):
        each = isinstance(self.sim_threshold, (list, tuple))
        return self.sim_threshold[layer.layer_id] if each else self.sim_threshold


class Trace:
    """
    What ran: give one to `model(..., trace=trace)`, over as many forward passes as you like.

    .ran          (layer, batch, token) bool: the FFN block was executed; written where it is executed
    .cosine       (layer, batch, token) fp32: cosine before and after it, NaN where it was not measured
    .token_index  (batch, token): position - prompt_len, negative in the prompt and in padding
    """

    def __init__(self):
        self.passes = []

    def begin(self, n_layers, token_index, real):
        """A forward pass begins, over tokens (batch, seq) of which `real` are no padding."""
        self.passes.append((n_layers, token_index, real, [], []))

    def record_ran(self, layer_id, rows):
        self.passes[-1][3].append((layer_id, rows))

    def record_cosine(self, layer_id, sim_score, measured):
        self.passes[-1][4].append((layer_id, sim_score, measured))  # on the device until someone asks for it

    @property
    def token_index(self):
        return torch.cat([token_index for _, token_index, *_ in self.passes], dim=1)

    @property
    def ran(self):
        ran = [torch.zeros(n_layers, *real.shape, dtype=torch.bool) for n_layers, _, real, *_ in self.passes]
        for one, (_, _, real, executed, _) in zip(ran, self.passes):
            for layer_id, rows in executed:
                one[layer_id] |= real if rows is None else rows & real
        return torch.cat(ran, dim=2)

    @property
    def cosine(self):
        cosine = [torch.full((n_layers, *real.shape), math.nan) for n_layers, _, real, *_ in self.passes]
        for one, (_, _, real, _, measurements) in zip(cosine, self.passes):
            for layer_id, sim_score, measured in measurements:
                where = torch.tensor(measured).view(real.shape) & real
                one[layer_id] = torch.where(where, sim_score.cpu(), math.nan)
        return torch.cat(cosine, dim=2)

    def ffn_skip_ratio(self, warm_up_index):
        """FFN executions saved / those of the dense model, over tokens past the warm-up; None if there are none."""
        if not self.passes:
            return None
        ran = self.ran[:, self.token_index > warm_up_index]  # (layer, tokens past the warm-up)
        return (~ran).sum().item() / ran.numel() if ran.numel() else None

    def ffn_saved_ratio(self):
        """The same over all generated tokens that were forwarded: what the clock sees."""
        return self.ffn_skip_ratio(-1)
