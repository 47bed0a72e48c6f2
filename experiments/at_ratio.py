"""
The policy of a row of evaluate.py, brought to the wanted share of FFN blocks by its own knob, on text that the task
does not score.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tasks import WRITTEN, count_blocks, ratios, with_shared_prefix

import policies
from calibrate import cold_regions
from model import dense
from skip import FFNSkip
from support import common
from support.measuring import bring_to, measure, skip_ratio
from support.tracing import Trace

NEAREST = "authors", "printed", "shuffled", "attention_drop"  # they have looked for the nearest ratio themselves


@dataclass
class Calibration:
    """What policies are brought to a ratio on."""

    tokens: torch.Tensor  # (batch, seq) ids of text, from which some policies are made
    cosines: torch.Tensor  # (tokens, n_layers) of the dense model, past the largest warm-up of all rows; maybe none
    ratio_of: Callable  # policy -> its ffn_skip_ratio in texts such as the task's
    target_len: int  # tokens of such a text, without its prompt


def on_text(model, tokens, prompt_len, warm_up_index, target_len, rows=1):
    """A Calibration on tokens (batch, seq), windows of text of which the first prompt_len tokens are prompt."""
    windows = [(ids, prompt_len) for ids in tokens.tolist()]
    cosines = torch.empty(0, model.args.n_layers)
    if tokens.size(1) - prompt_len > warm_up_index + 1:
        cosines = measure(model, windows, warm_up_index).cpu()
    return Calibration(tokens, cosines, partial(skip_ratio, model, windows=windows, rows=rows), target_len)


def prompts_ratio(model, policy, prompts, context):
    """The ffn_skip_ratio in what the prompts (lists of ids) do not share, past the policy's warm-up."""
    counts = []
    for _, tokens, cache in with_shared_prefix(model, policy, prompts, 0, context):
        trace = Trace()
        model(tokens, cache, policy, trace=trace, last_only=True)
        counts.append(count_blocks(trace.read, trace.token_index, policy, context))
    return ratios(counts)["ffn_skip_ratio"]


def make_policy(name, model, skip, calibration, settings, warm_up_index, seed, options):
    """(policy, its ratio on the calibration text) of a row; where skip is None, the settings as they stand."""
    if name == "dense":
        return dense, 0.0
    if name not in ("ffnskip", "printed") or name == "printed" and skip is not None:
        return at_ratio(name, model, skip, calibration, settings, warm_up_index, seed, options)
    if not len(calibration.cosines):
        raise ValueError("the texts to calibrate on end within the largest warm-up")
    if name == "printed":  # with the threshold given, and cold regions by rule, whatever the settings have
        base = FFNSkip(*cold_regions(calibration.cosines.mean(0)), options.sim_threshold, warm_up_index)
    else:
        settings = dict(sim_threshold=1.0) | settings
        settings.pop("ratios", None)  # --skip is reached on the calibration text instead
        base = policies.find_policy("ffnskip", model, settings, warm_up_index=warm_up_index)
    return at_ratio_ffnskip(base, model, skip, calibration)


def at_ratio_ffnskip(base, model, skip, calibration):
    """(policy, its ratio): an FFNSkip with thresholds shifted until it skips the share `skip` of the FFN blocks."""
    if skip is None:
        return base, calibration.ratio_of(base)
    thresholds = torch.tensor(base.thresholds(model.args.n_layers))
    base = policies.shifted(base, -thresholds[0].item())  # one per layer keep their distances from the first

    def at(threshold):
        policy = policies.shifted(base, threshold)
        return policy, calibration.ratio_of(policy)

    cosines = calibration.cosines - (thresholds - thresholds[0])
    cosines = cosines[:, base.cold_s : base.cold_e].flatten().sort().values  # the threshold lies among them
    return bring_to(at, cosines[len(cosines) // 50].item(), cosines[-1].item() + 1e-3, skip)


def at_ratio(name, model, skip, calibration, settings, warm_up_index, seed, options):
    """(policy, its ratio): a baseline or a policy of a file, brought as near to `skip` of the FFN blocks as it goes."""
    factory, own = policies.find_factory(name), {}  # own: arguments of four policies alone
    if policies.takes_fit(factory):
        own["fitted"] = policies.fit_of(factory, policies.find_fitted(options, common.find_checkpoint(options.ckpt)))
    if name == "skipdecode":
        own["target_len"] = calibration.target_len
    if name == "static":
        own = {key: settings[key] for key in ("cold_s", "cold_e") if key in settings}
    if name == "shuffled" and settings:
        own["settings"] = {key: value for key, value in settings.items() if key not in ("ratios", "made_for")}
    if name == "standins" and options.task in WRITTEN:
        return factory(model, skip, warm_up_index, **own), skip  # as planned for text that the model writes itself

    def at(negative):  # of the share to ask for, since bring_to wants a ratio that falls
        policy = factory(model, -negative, warm_up_index, tokens=calibration.tokens, seed=seed, **own)
        if hasattr(policy, "as_blocks"):  # it leaves out no block, but as many bytes as this share of them has
            return policy, policy.as_blocks
        return policy, calibration.ratio_of(policy)

    def shifted(shift):
        return policy.shifted(shift), calibration.ratio_of(policy.shifted(shift))

    policy, ratio = at(-skip)
    if abs(ratio - skip) <= 0.005 or name in NEAREST:
        return policy, ratio
    if hasattr(policy, "shifted"):  # a knob, and no need to make it anew
        return bring_to(shifted, -4.0, 4.0, skip, tolerance=0.005, first=0.0)
    try:  # to ask for more or less than is wanted
        near, near_ratio = bring_to(at, -min(0.99, skip + 0.1), 0.0, skip, tolerance=0.005, tries=6)
    except ValueError:  # some share on the way cannot be had
        return policy, ratio
    if abs(near_ratio - skip) < abs(ratio - skip):
        return near, near_ratio
    return policy, ratio


def describe(policy):
    """A policy's settings in a few words, for the table."""
    shown = []
    for key, value in sorted(vars(policy).items()):
        if key in ("seed", "warm_up_index") or not isinstance(value, (int, float, list, set, type(None))):
            continue
        if isinstance(value, list) and value and max(value) - min(value) < 1e-9:
            value = value[0]
        if isinstance(value, list):
            value = [round(each, 5) for each in value]
        elif isinstance(value, float):
            value = round(value, 5)
        shown.append(f"{key}={value}".replace(" ", ""))
    return " ".join(shown)
