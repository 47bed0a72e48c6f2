"""
FFN-SkipLLM: Algorithm 1 of "FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward Skipping"
(Jaiswal et al., EMNLP 2024, https://arxiv.org/abs/2404.03865), as a policy for model.Transformer.

Where the printed pseudocode is silent or misprinted, this file reads it so:
- `past_start` is a misprint for `past_state`; the norms before attention and feed_forward run, and are not printed.
- The cosine is between the residual stream before the feed-forward block, h, and after it, temp = h + FFN(norm(h)).
- cold_s and cold_e are zero-based and half-open: the layers in [0, cold_s) and [cold_e, n_layers) always run in full.
- token_index counts generated tokens from 0; it is negative in the prompt, which therefore runs in full.
- "Once reached, greedily skip k" (section 3.2) is `k`. Algorithm 1 as printed skips up to cold_e: k=None.
"""

import math
from dataclasses import dataclass

import torch

from model import dense

FULL = -1  # the skip_state of a token that runs in full, and is not compared


@dataclass
class FFNSkip:
    """
    The policy `model(tokens, ..., policy=FFNSkip(...))`. Raises ValueError for settings that make no sense or, when
    called, do not fit the number of layers. These are, Algorithm 1's first:

    cold_s, cold_e  layers outside [cold_s, cold_e) are cold: never skipped, their similarity never looked at
    sim_threshold   cosine from which on FFN blocks are skipped, one number or a list of one per layer; inf: dense
    warm_up_index   tokens with token_index <= warm_up_index run in full; -1: no warm-up (section 5.1: 25 to 30)
    k               how many FFN blocks to skip once the threshold is reached; None: all up to cold_e
    recheck         after k blocks, compare again; False: the rest of the token runs in full
    full_every      past the warm-up, every full_every-th token runs in full; None: none does
    """

    cold_s: int
    cold_e: int
    sim_threshold: float | list
    warm_up_index: int = 25
    k: int | None = None
    recheck: bool = True
    full_every: int | None = None

    def __post_init__(self):
        for name, least in dict(cold_s=0, cold_e=0, warm_up_index=-1, k=1, full_every=1).items():
            value = getattr(self, name)
            optional = value is None and name in ("k", "full_every")
            if not optional and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
        if self.cold_s > self.cold_e:
            raise ValueError(f"cold_s {self.cold_s} lies above cold_e {self.cold_e}")
        if type(self.recheck) is not bool:
            raise ValueError(f"recheck must be true or false, not {self.recheck!r}")
        self.sim_threshold = list(self.sim_threshold) if isinstance(self.sim_threshold, tuple) else self.sim_threshold
        for value in self.thresholds(n_layers=1):
            if not isinstance(value, (int, float)) or math.isnan(value):
                raise ValueError(f"sim_threshold must be a number, or a list of one per layer, not {value!r}")

    def check(self, n_layers):
        """Raise ValueError if these settings are not for a model of n_layers layers."""
        if self.cold_e > n_layers:
            raise ValueError(f"cold_e {self.cold_e} lies above the model's n_layers {n_layers}")
        if len(self.thresholds(n_layers)) != n_layers:
            raise ValueError(f"sim_threshold has {len(self.sim_threshold)} values for a model of {n_layers} layers")

    def thresholds(self, n_layers):
        """sim_threshold as one number per layer."""
        return self.sim_threshold if isinstance(self.sim_threshold, list) else [self.sim_threshold] * n_layers

    def threshold(self, layer):
        return self.sim_threshold[layer.layer_id] if isinstance(self.sim_threshold, list) else self.sim_threshold

    def __call__(self, layers, input_state, step):
        """Algorithm 1, printed at the right, for each token of input_state, (batch, seq, dim), on its own."""
        self.check(len(layers))
        full = step.token_index <= self.warm_up_index                   # if token_index <= warm_up_index then
        if self.full_every is not None:                                 # (not printed: in the authors' code)
            full |= (step.token_index - self.warm_up_index) % self.full_every == 0
        if full.all():                                                  #     generate_with_full_model
            return dense(layers, input_state, step)                     #     (token_index, input_state)
                                                                        # else
                                                                        #     generate_with_skip_model
                                                                        #     (token_index, input_state, cold_s, cold_e)
        return self.generate_with_skip_model(layers, input_state, step, full)

                                                                        # def generate_with_skip_model
                                                                        # (token_index, input_state, cold_s, cold_e):
    def generate_with_skip_model(self, layers, input_state, step, full):
        """
        The pseudocode is for one token; here it is applied to each of (batch, seq). Tokens in `full` skip nothing.
        skip_state is a list with one number per token: how many FFN blocks it still skips. 0 is the paper's False.
        """
        k = self.k or len(layers)                                       # (None: skip up to cold_e)
        past_state = input_state                                        # past_state <- input_state
        for layer in layers[: self.cold_s]:                             # for <0 ... cold_s> do
            h = layer.add_attention(past_state, step)                   #     h <- past_state + attention(past_state)
            past_state = layer.add_feed_forward(h, step)                #     past_state <- h + feed_forward(h)
        skip_state = (full.int() * FULL).flatten().tolist()             # skip_state <- False
        for layer in layers[self.cold_s : self.cold_e]:                 # for <cold_s ... cold_e> do
            h = layer.add_attention(past_state, step)                   #     h <- past_state + attention(past_state)
            active = self.active(skip_state, full.shape)                #     if skip_state == False then
            temp = layer.add_feed_forward(h, step, active)              #         temp <- h + feed_forward(h)
            sim_score = self.cosine(h, temp, layer, step, skip_state)   #         sim_score <- cosine(h, temp)
            for i, n in enumerate(skip_state):
                if n > 0:                                               #             (section 3.2: greedily skip k)
                    skip_state[i] = n - 1
                    if n == 1 and not self.recheck:                     #             (the rest of it runs in full)
                        skip_state[i] = FULL
                elif n == 0 and sim_score[i] >= self.threshold(layer):  #         if sim_score >= sim_threshold then
                    skip_state[i] = k                                   #             skip_state <- True
            past_state = temp                                           #         past_state <- temp
                                                                        #     else
                                                                        #         past_state <- h
        for layer in layers[self.cold_e :]:                             # for <cold_e ... num_layers> do
            h = layer.add_attention(past_state, step)                   #     h <- past_state + attention(past_state)
            past_state = layer.add_feed_forward(h, step)                #     past_state <- h + feed_forward(h)
        return past_state

    def active(self, skip_state, shape):
        """(batch, seq) bool: the tokens whose FFN block runs, and whose temp is not h; None for all."""
        return None if max(skip_state) <= 0 else torch.tensor([n <= 0 for n in skip_state]).view(shape)

    def cosine(self, h, temp, layer, step, skip_state):
        """
        The cosine of h and temp, (batch, seq, dim), per token, as a list; in float32: next to 1 bfloat16 has steps of
        0.004. Not computed where no token is compared, or none can reach the threshold and no trace asks for it.
        """
        asked = step.trace is not None and step.trace.cosines
        if 0 not in skip_state or (self.threshold(layer) > 1.001 and not asked):
            return [-math.inf] * len(skip_state)
        sim_score = layer.cosine(h, temp)
        if step.trace is not None:
            step.trace.record_cosine(layer.layer_id, sim_score, [n == 0 for n in skip_state])
        return sim_score
