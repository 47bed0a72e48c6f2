"""
The exercises of docs/exercises.md, to be filled in. Copy this file, and let the tests look at your copy:

    cp tests/exercises/blank.py out/answers.py
    pytest tests/exercises --mine out/answers.py
"""

# 1. Which layers skip their feed-forward block? Lists of layer numbers, such as [3, 4].
SKIPPED = {"as printed": None, "k = 1": None, "k = 2": None, "k = 2, recheck off": None}

# 5. The distance between 1 and the next smaller number in bfloat16.
STEP = None


def forget(layers, x, step):
    """2. A policy: the dense model, but the token with token_index 5 takes no part in layer 2, attention included."""
    raise NotImplementedError


def lost(model, tokens):
    """2. The columns of tokens, (1, seq), at which some logit under `forget` is more than 0.001 off the dense one."""
    raise NotImplementedError


class Baseline1:
    """3. The paper's first baseline: past the warm-up each FFN block is skipped by a coin, with probability `skip`."""

    def __init__(self, model, skip, warm_up_index=25, tokens=None, seed=0):
        raise NotImplementedError

    def __call__(self, layers, x, step):
        raise NotImplementedError


def skipped_layers(cosines, cold_s, cold_e, threshold, k):
    """4. The layers whose FFN block one token skips, from its cosine at each layer; k None: all up to cold_e."""
    raise NotImplementedError


def cosine(h, temp):
    """5. The cosine of h and temp, (tokens, dim) in bfloat16, per token: (tokens,) float32, right to 1e-5."""
    raise NotImplementedError


def most_harmful(model, tokens):
    """6. The layer whose skipped FFN block moves the predictions for tokens, (1, seq), most: by mean KL from dense."""
    raise NotImplementedError


class Better:
    """7. A policy that skips the share `skip` of all FFN blocks, and stays nearer to dense than checkerboard does."""

    def __init__(self, model, skip, warm_up_index=25, tokens=None, seed=0):
        raise NotImplementedError

    def __call__(self, layers, x, step):
        raise NotImplementedError


class SkipInPrompt:
    """8. Another policy at work from position `first` of a text on, wherever its prompt ends."""

    def __init__(self, policy, first):
        raise NotImplementedError

    def __call__(self, layers, x, step):
        raise NotImplementedError
