"""
Policies by their names, and what belongs to a checkpoint for them: the skip settings that calibrate.py writes, and the
fits that experiments/fit_standins.py and fit_teal.py write.
"""

import difflib
import functools
import importlib.util
import inspect
import math
from dataclasses import fields
from pathlib import Path

import numpy

from model import dense
from policies import baselines, ledger, standins, teal
from policies.baselines import shifted
from policies.checked import Checked
from skip import FFNSkip
from support.common import HERE, LoadError, beside, first_line, made_for, model_name, note, policy_files, read_json

FACTORIES = {"standins": standins.make, **teal.POLICIES, **baselines.POLICIES, **ledger.LEDGER}
FITS = standins.make.fit, teal.make.fit


def add_skip_arguments(parser):
    """The flags that find_settings and find_fitted read; returns the group."""
    group = parser.add_argument_group(
        "skipping", "Settings come from --skip-config, else from skip.json in the checkpoint's folder (STEM.skip.json "
        "beside a GGUF file), else from config/; each flag overrides one of them.")
    add = group.add_argument
    add("--skip-config", metavar="FILE", help="settings for ffnskip, as calibrate.py writes them")
    add("--sim-threshold", type=float, metavar="C", help="cosine before and after an FFN block from which on to skip")
    add("--cold-s", type=int, metavar="L", help="layers below L always run in full")
    add("--cold-e", type=int, metavar="L", help="layers from L on always run in full")
    add("--k", type=int, help="skip K blocks at a time; 0: all up to --cold-e, as Algorithm 1 is printed")
    add("--agree", type=float, metavar="Q", help="in a batch, skip a block for all rows where at least a share Q of "
        "them would, else for none")
    add("--standins", metavar="FILE", help="the fit of experiments/fit_standins.py, for standins and teal_standins")
    return group


def find_policy(name, model, settings=None, skip=None, warm_up_index=None, tokens=None, seed=0, fitted=None):
    """
    The policy called `name`: dense, ffnskip (from its settings), one of FACTORIES, or FILE.py:FACTORY. skip,
    warm_up_index: None for what the settings or the policy say. `fitted`, from find_fitted, is for a factory that has
    an argument of that name. Raises ValueError.
    """
    if name == "dense" and (skip, warm_up_index) != (None, None):
        raise ValueError("--skip, --prompt-skip and --warm-up-index are not for policy dense, which skips nothing")
    if name == "dense" or skip == 0:
        return dense
    if name == "ffnskip":
        settings = dict(settings or {})
        file, weights = settings.pop("made_for", (None, None))
        if file and not made_for(model, file, weights):
            note(f"[{file}: made for other weights than these: python calibrate.py --ckpt ... makes settings for them]")
        if warm_up_index is not None:
            settings["warm_up_index"] = warm_up_index
        return find_ffnskip(settings, skip, model.args.n_layers)
    make = find_factory(name)
    if skip is None:
        raise ValueError(f"policy {name} needs --skip, the share of feed-forward blocks to skip")
    arguments = dict(tokens=tokens, seed=seed)
    if warm_up_index is not None:
        arguments["warm_up_index"] = warm_up_index
    try:
        if takes_fit(make):
            arguments["fitted"] = fit_of(make, fitted or {})
        inspect.signature(make).bind(model, skip, **arguments)
    except TypeError as error:
        signature = "(model, skip, warm_up_index=None, tokens=None, seed=0)"
        raise ValueError(f"policy {name} must take {signature}: {first_line(error)}") from None
    policy = make(model, skip, **arguments)
    if not callable(policy) or hasattr(policy, "parameters"):  # a model is no policy
        raise ValueError(f"policy {name} makes {type(policy).__name__}: expected a policy(layers, x, step)")
    return Checked(policy, name) if ":" in name else policy


def find_ffnskip(settings, skip, n_layers):
    """FFNSkip with these settings; with `skip`, its thresholds moved to where they are planned to skip that share."""
    ratios = settings.pop("ratios", None)
    missing = [key for key in ("cold_s", "cold_e", "sim_threshold") if key not in settings]
    if missing:
        raise ValueError(f"policy ffnskip has no {', '.join(missing)} for this checkpoint: python calibrate.py "
                         "--ckpt ... finds them, or give --cold-s, --cold-e and --sim-threshold")
    policy = ledger.Together(**settings) if "agree" in settings else FFNSkip(**settings)
    policy.check(n_layers)
    if skip is None:
        return policy
    command = f"python calibrate.py --ckpt ... --skip {skip}"
    if not ratios:
        raise ValueError(f"a share of {skip}: these settings do not tell thresholds from ratios (a flag beside them "
                         f"makes others of them); {command} finds out")
    try:
        pairs = sorted((float(ratio), float(shift)) for shift, ratio in ratios)
    except (TypeError, ValueError):
        raise ValueError(f"ratios in the settings: not a list of [shift, ratio] pairs; {command} makes them") from None
    least, most = pairs[0][0], pairs[-1][0]
    if not least <= skip <= most:
        raise ValueError(f"a share of {skip}: these settings reach {least:.3f} to {most:.3f}; {command} finds others")
    return shifted(policy, float(numpy.interp(skip, *zip(*pairs))))


def check_name(name):
    """Raise ValueError if there is no policy of that name, before minutes of loading; None is one for the settings."""
    if name not in (None, "dense", "ffnskip"):
        find_factory(name)


def find_factory(name):
    """The factory called `name`, as baselines.py describes them. Raises ValueError."""
    file, _, factory = name.rpartition(":")
    if not file:
        if name not in FACTORIES:
            known = ["dense", "ffnskip", *FACTORIES]
            near = difflib.get_close_matches(name, known, n=1)
            if name.endswith(".py"):
                near = [f"{name}:make"]
            hint = f"is it {near[0]}? " if near else ""
            raise ValueError(f"no policy {name}: {hint}choose from {', '.join(known)}, or FILE.py:FACTORY")
        return FACTORIES[name]
    make = getattr(load_module(Path(file)), factory, None)
    if not callable(make):
        raise ValueError(f"no policy {name}: {file} defines no function or class {factory}")
    return make


@functools.lru_cache  # a second look gives the same classes
def load_module(path):
    """The module in a Python file, for policies that are not part of this folder."""
    if not path.is_file():
        raise ValueError(f"no policy file {path}")
    policy_files.add(str(path.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None:
        raise ValueError(f"{path}: not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def takes_fit(factory):
    """Whether a policy's factory has a parameter `fitted`, the path of a file that belongs to the checkpoint."""
    return "fitted" in inspect.signature(factory).parameters


def fit_of(factory, fitted):
    """The file of find_fitted's that a factory wants, stand-ins unless its `fit` says what; a dict of several."""
    kind = getattr(factory, "fit", standins.make.fit)
    if isinstance(kind, tuple):
        return {each: fitted.get(each) for each in kind}
    return fitted.get(kind)


def find_settings(options, ckpt, n_layers):
    """FFNSkip's arguments from --skip-config, the checkpoint's folder or config/, and from the flags; {} if none."""
    name, settings = model_name(ckpt), {}
    path = options.skip_config or find_file(settings_path(ckpt), f"{name}.json")
    if path:
        settings = load_settings(path, name, n_layers)
    for setting in "sim_threshold", "cold_s", "cold_e", "k", "agree":
        value = getattr(options, setting)
        if value is not None:
            settings[setting] = value
            settings.pop("ratios", None)  # which were measured without that flag
    if options.k == 0:
        settings["k"] = None
    if 1 < (options.sim_threshold or 0) < math.inf:
        note(f"[--sim-threshold {options.sim_threshold}: no cosine is above 1, so nothing is skipped]")
    return settings


def load_settings(path, name, n_layers):
    """
    The arguments of FFNSkip in a settings file, its `ratios`, and as `made_for` its path and the checksum of weights in
    it, for find_policy. Raises ValueError if they are another model's.
    """
    try:
        settings = read_json(Path(path))
    except LoadError as error:
        raise ValueError(f"{path}: not a file of skip settings: {error}") from None
    if not isinstance(settings.get("model", ""), str) or not isinstance(settings.get("n_layers", 0), int):
        raise ValueError(f"{path}: not a file of skip settings: model must be a text, n_layers a whole number")
    if settings.get("n_layers", n_layers) != n_layers:
        raise ValueError(f"{path}: made for a model of {settings['n_layers']} layers, and {name} has {n_layers}")
    if settings.get("model", name).lower() != name:
        raise ValueError(f"{path}: made for {settings['model']}, and this is {name}: calibrate.py makes settings, "
                         'or, if it is the same model, change "model" in the file')
    known = [field.name for field in fields(FFNSkip)] + ["ratios"]
    if "weights_checksum" not in settings:
        note(f"[{path}: does not say for which weights it was made: calibrate.py makes settings that do]")
    weights = settings.get("weights_checksum")  # None: planned from cosines alone
    settings = {key: settings[key] for key in known if key in settings}
    if weights is not None:
        settings["made_for"] = str(path), weights
    threshold = settings.get("sim_threshold")
    if isinstance(threshold, list):
        settings["sim_threshold"] = [from_json(value) for value in threshold]
    elif threshold is not None:
        settings["sim_threshold"] = from_json(threshold)
    return settings


def from_json(value):
    """A number that to_json has written."""
    return float(value) if value in ("inf", "-inf") else value


def settings_path(ckpt):
    """Where calibrate.py leaves a checkpoint's skip settings."""
    return beside(ckpt, "skip.json")


def default_out(given, path):
    """Where to write what belongs at path, beside a checkpoint; for the demo model, which was not given, in out/."""
    if given:
        return path
    Path("out").mkdir(exist_ok=True)
    return Path("out", path.name)


def find_fitted(options, ckpt):
    """{kind: the file of that kind beside the checkpoint or under config/, or that --standins names; None for none}."""
    found = {}
    for kind in FITS:
        found[kind] = find_file(beside(ckpt, kind), f"{model_name(ckpt)}.{kind}")
    if options.standins:
        found[standins.make.fit] = options.standins
    return found


def find_file(path, shipped):
    """The path, if it exists; else the file called `shipped` in config/; None if there is neither."""
    for file in path, HERE / "config" / shipped:
        if file.exists():
            return file
    return None
