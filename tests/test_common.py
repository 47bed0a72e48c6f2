"""common.py and policies.py: settings and where they are found, policies by name, and mistakes told in one line."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_golden import GOLDEN
from tiny import mistake, random_ids, start, status, tiny_model

import support
from generate import choose_policy, generate, main, parse_args
from model import dense
from policies import add_skip_arguments, find_policy, find_settings, load_settings
from policies.baselines import POLICIES
from policies.checked import CheckedLayer
from skip import FFNSkip
from support import common
from support.common import first_difference, model_name, note

CKPT = str(GOLDEN / "hf-gqa")
SETTINGS = dict(model="tiny", n_layers=4, cold_s=1, cold_e=3, sim_threshold=0.9, k=2, curve=[1, 2], note="...")

# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_known_by_its_name_without_format_and_quantisation(tmp_path):
    folder = tmp_path / "Llama-2-7b-hf"
    folder.mkdir()
    assert model_name(folder) == model_name(tmp_path / "Llama-2-7B.Q4_1.gguf") == "llama-2-7b"
    for kind in ".Q4_1", "-BF16", "-IQ4_XS", ".F32", "":
        assert model_name(tmp_path / f"SmolLM2-135M-Instruct{kind}.gguf") == "smollm2-135m-instruct"


def options(*flags):
    parser = common.Parser("")
    add_skip_arguments(parser)
    return parser.parse_args(list(map(str, flags)))


def test_a_threshold_that_no_cosine_reaches_is_told_and_an_infinite_one_is_meant(tmp_path, capsys):
    for value, told in (95, True), (1, False), ("inf", False):
        note.cache_clear()
        find_settings(options("--sim-threshold", value), tmp_path, 4)
        assert ("no cosine is above 1" in capsys.readouterr().err) == told


def test_settings_come_from_the_folder_of_the_checkpoint_and_flags_override_them(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    assert find_settings(options(), folder, 4) == {}
    (folder / "skip.json").write_text(json.dumps(SETTINGS | dict(model="Tiny")))
    assert find_settings(options(), folder, 4) == dict(cold_s=1, cold_e=3, sim_threshold=0.9, k=2)
    found = find_settings(options("--cold-e", 4, "--k", 0), folder, 4)
    assert found == dict(cold_s=1, cold_e=4, sim_threshold=0.9, k=None)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(SETTINGS | dict(cold_s=2)))
    assert find_settings(options("--skip-config", other), folder, 4)["cold_s"] == 2
    (tmp_path / "tiny.skip.json").write_text(json.dumps(SETTINGS | dict(cold_s=0)))
    assert find_settings(options(), tmp_path / "tiny.gguf", 4)["cold_s"] == 0


def test_settings_in_the_folder_come_before_those_in_config(tmp_path):
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    shipped = json.loads((common.HERE / "config" / "llama-2-7b.json").read_text())
    assert find_settings(options(), folder, 32)["cold_s"] == shipped["cold_s"]
    (folder / "skip.json").write_text(json.dumps(dict(cold_s=9, cold_e=20, sim_threshold=0.9)))
    assert find_settings(options(), folder, 32) == dict(cold_s=9, cold_e=20, sim_threshold=0.9)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a file of skip settings"),
        ("[1]", "not a file of skip settings"),
        (json.dumps(SETTINGS | dict(n_layers=32)), "a model of 32 layers, and tiny has 4"),
        (json.dumps(SETTINGS | dict(model="llama-2-7b")), "made for llama-2-7b, and this is tiny"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_an_error_that_names_the_file(tmp_path, text, message):
    path = tmp_path / "skip.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"skip.json.*{message}"):
        load_settings(path, "tiny", 4)


def test_the_shipped_settings_fit_the_models_they_name():
    for path in sorted((common.HERE / "config").glob("*.json")):
        raw = json.loads(path.read_text())
        assert raw["model"] == path.stem.removesuffix(".teal")
        if "quantiles" in raw:  # which test_teal.py reads
            continue
        settings = load_settings(path, path.stem, raw["n_layers"])
        settings.pop("ratios", None)
        settings.pop("made_for", None)
        FFNSkip(**settings).check(raw["n_layers"])


# --- policies by name -------------------------------------------------------------------------------------------------


MINE = """\
class make:
    def __init__(self, model, skip, warm_up_index=None, tokens=None, seed=0):
        self.skip, self.warm_up_index, self.tokens, self.seed = skip, warm_up_index, tokens, seed

    def __call__(self, layers, x, step):
        return x
"""


def test_a_policy_is_found_by_name_or_in_a_file(tmp_path):
    model, file = tiny_model(), tmp_path / "mine.py"
    file.write_text(MINE)
    assert find_policy("dense", model) is dense
    assert find_policy("ffnskip", model, dict(cold_s=1, cold_e=3, sim_threshold=0.9)) == FFNSkip(1, 3, 0.9)
    assert type(find_policy("random", model, skip=0.25)) is POLICIES["random"]  # one class, however it is found
    found = find_policy(f"{file}:make", model, skip=0.25, seed=7)
    assert vars(found.policy) == dict(skip=0.25, warm_up_index=None, tokens=None, seed=7)
    for name, message in [
        ("nosuch", "no policy nosuch"),
        (f"{file}:nosuch", "no policy"),
        ("no.py:make", "no policy file no.py"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_policy(name, model, skip=0.25)
    with pytest.raises(ValueError, match="needs --skip"):
        find_policy(f"{file}:make", model)
    with pytest.raises(ValueError, match="calibrate.py"):
        find_policy("ffnskip", model, {})
    with pytest.raises(ValueError, match="cold_e 9 lies above"):
        find_policy("ffnskip", model, dict(cold_s=1, cold_e=9, sim_threshold=0.9))


@pytest.mark.parametrize("name, near", [("printd", "printed"), ("shortgtp", "shortgpt"), ("mine.py", "mine.py:make")])
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(name, near):
    with pytest.raises(ValueError, match=f"no policy {name}: is it {near}[?] choose from"):
        find_policy(name, tiny_model(), skip=0.2)


@pytest.mark.parametrize("name", ["nosuch", "factory", "uniform", "run_active", "EarlyExit"])
def test_what_is_no_policy_is_answered_with_the_names_of_those_that_are(name, monkeypatch, capsys):
    """Also where something in baselines.py is called so."""
    error = mistake(capsys, main, "--ckpt", CKPT, "--policy", name, "--skip", "0.25", "x")
    monkeypatch.setattr("generate.load", None)  # it is told before anything is loaded
    near = "is it earlyexit? " if name == "EarlyExit" else ""
    assert error.startswith(f"error: no policy {name}: {near}choose from dense, ffnskip, ")
    assert all(f" {known}," in error for known in POLICIES) and error.endswith("FILE.py:FACTORY")


@pytest.mark.parametrize("name", ["ffnskip", *POLICIES, "FILE.py"])
def test_the_warm_up_index_reaches_every_policy(name, tmp_path, monkeypatch):
    monkeypatch.setattr("policies.baselines.written_text", lambda *args: torch.tensor([random_ids(36)]))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "tiny.skip.json").write_text(json.dumps(SETTINGS | dict(ratios=[[0.1, 0.1], [0, 0.5]])))
    name = f"{tmp_path}/mine.py:make" if name == "FILE.py" else name
    flags = ["--policy", name, "--skip", "0.25", "x"]
    own = 13 if name == "authors" else 25  # and it needs eleven layers
    model = tiny_model(n_layers=11) if name == "authors" else tiny_model()
    for index in None, 3, 0, -1:
        more, expected = ([], own) if index is None else (["--warm-up-index", str(index)], index)
        found, policy, _, _ = choose_policy(parse_args([*more, *flags]), tmp_path / "tiny.gguf", model)
        if name.endswith(":make") and not more:
            expected = None  # its own choice
        assert found == name and policy.warm_up_index == expected


def test_dense_takes_no_warm_up_index_and_no_ratio(capsys):
    for flag in ["--warm-up-index", "3"], ["--skip", "0.25"]:
        assert "are not for policy dense" in mistake(capsys, main, "--ckpt", CKPT, "--policy", "dense", *flag, "x")


# --- --skip for ffnskip -----------------------------------------------------------------------------------------------

RATIOS = [[-0.03, 0.4], [0.05, 0.1], [0.01, 0.2]]  # threshold shift, ratio; in any order


@pytest.mark.parametrize("skip, shift", [(0.1, 0.05), (0.15, 0.03), (0.2, 0.01), (0.3, -0.01), (0.4, -0.03)])
def test_a_ratio_of_ffnskip_is_interpolated_between_those_in_the_settings(skip, shift):
    model, settings = tiny_model(), dict(cold_s=1, cold_e=3, sim_threshold=0.9, k=1, ratios=RATIOS)
    policy = find_policy("ffnskip", model, settings, skip)
    assert policy.sim_threshold == pytest.approx(0.9 + shift, abs=1e-12)
    assert (policy.cold_s, policy.cold_e, policy.k) == (1, 3, 1)
    each = [2.0, 0.9, 0.8, 2.0]
    policy = find_policy("ffnskip", model, settings | dict(sim_threshold=each), skip)
    assert policy.sim_threshold == pytest.approx([threshold + shift for threshold in each], abs=1e-12)
    assert find_policy("ffnskip", model, settings).sim_threshold == 0.9  # without --skip, the settings as they are


@given(st.floats(0.1, 0.4), st.floats(0.1, 0.4))
def test_a_higher_ratio_has_a_lower_threshold(a, b):
    settings = dict(cold_s=1, cold_e=3, sim_threshold=0.9, ratios=RATIOS)
    low, high = (find_policy("ffnskip", tiny_model(), settings, skip).sim_threshold for skip in (min(a, b), max(a, b)))
    assert low >= high


@pytest.fixture
def config(tmp_path):
    """Flags for settings with ratios, for the checkpoint CKPT."""
    settings = dict(cold_s=0, cold_e=2, sim_threshold=0.5, warm_up_index=0, k=1, ratios=RATIOS)
    (tmp_path / "skip.json").write_text(json.dumps(settings))
    return ["--ckpt", CKPT, "--skip-config", str(tmp_path / "skip.json")]


def test_the_summary_says_what_was_planned(config, capsys):
    main([*config, "--max-new-tokens", "4", "--skip", "0.15", "Once"])
    assert "(planned 15.0%)" in capsys.readouterr().err
    main([*config, "--max-new-tokens", "4", "Once"])
    assert "planned" not in capsys.readouterr().err
    main([*config, "--max-new-tokens", "4", "--skip", "0.15", "--compare", "--json", "Once"])
    printed = capsys.readouterr()
    out = json.loads(printed.out)
    assert out["planned_skip_ratio"] == 0.15 and out["dense"]["planned_skip_ratio"] is None
    assert out["settings"]["skip"]["sim_threshold"] == pytest.approx(0.53)
    assert ["planned" in line for line in printed.err.splitlines()[:2]] == [False, True]
    flags = ["--policy", "random", "--skip", "0.3", "--warm-up-index", "-1"]
    main(["--ckpt", CKPT, "--max-new-tokens", "4", *flags, "Once"])
    assert "(planned 30.0%)" in capsys.readouterr().err


def test_a_ratio_that_the_settings_do_not_know_is_one_line_that_names_the_command(config, capsys):
    for skip in "0.05", "0.45":
        error = mistake(capsys, main, *config, "--skip", skip, "x")
        assert "these settings reach 0.100 to 0.400" in error
        assert f"python calibrate.py --ckpt ... --skip {skip}" in error
    for flag in ["--k", "2"], ["--sim-threshold", "0.9"], ["--cold-s", "1"]:
        error = mistake(capsys, main, *config, *flag, "--skip", "0.2", "x")  # the ratios are of other settings
        assert "do not tell thresholds from ratios" in error and "python calibrate.py --ckpt ... --skip 0.2" in error
    main([*config, "--warm-up-index", "3", "--skip", "0.2", "--max-new-tokens", "2", "x"])  # past any warm-up the same


def test_a_flag_drops_the_ratios(tmp_path):
    (tmp_path / "tiny.skip.json").write_text(json.dumps(SETTINGS | dict(ratios=RATIOS)))
    assert find_settings(options(), tmp_path / "tiny.gguf", 4)["ratios"] == RATIOS
    for flag in ["--k", "0"], ["--cold-e", "4"]:
        assert "ratios" not in find_settings(options(*flag), tmp_path / "tiny.gguf", 4)


# --- mistakes ---------------------------------------------------------------------------------------------------------

SKIP = ["--policy", "ffnskip", "--cold-s", "0", "--cold-e", "2", "--sim-threshold", "0.5"]
WRONG = {
    "no such checkpoint": (["--ckpt", "nosuch", "x"], "no checkpoint at nosuch"),
    "no settings": (["--policy", "ffnskip", "x"], "calibrate.py"),
    "half of the settings": (["--cold-s", "1", "x"], "no cold_e, sim_threshold"),
    "wrong setting": ([*SKIP, "--cold-e", "3", "x"], "cold_e 3 lies above the model's n_layers 2"),
    "not a number": (["--sim-threshold", "high", "x"], "invalid float value: 'high'"),
    "no such policy": (["--policy", "nosuch", "--skip", "0.2", "x"], "no policy nosuch"),
    "device": (["--device", "nosuch", "x"], "device nosuch is not available"),
    "no settings file": (["--skip-config", "nosuch.json", "x"], "nosuch.json: not a file of skip settings"),
    "skip for ffnskip": ([*SKIP, "--skip", "0.3", "x"], "these settings do not tell thresholds from ratios"),
    "no such flag": (["--bogus", "x"], "unrecognized arguments: --bogus"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line(case, capsys):
    args, message = WRONG[case]
    assert message in mistake(capsys, main, "--ckpt", CKPT, *args)


@pytest.mark.parametrize(
    "code, message",
    [
        ("def make(model, skip, warm_up_index=None, tokens=None, seed=0)\n    pass\n", "mine.py, line 1: SyntaxError"),
        ("def make(*args, **kwargs):\n    raise KeyError(args[1])\n", "mine.py, line 2: KeyError: 0.2"),
        (
            "def make(*args, **kwargs):\n    return lambda layers, x, step:\\\n        nosuch(x)\n",
            "mine.py, line 3: NameError",
        ),
        ("def make(*args, **kwargs):\n    return lambda layers, x, step: None\n", "the policy returned nothing"),
        ("import nosuch\n", "mine.py, line 1: ModuleNotFoundError: No module named 'nosuch'"),
    ],
)
def test_a_mistake_in_a_policy_file_is_reported_with_its_line(code, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(code)
    error = mistake(capsys, main, "--ckpt", CKPT, "--policy", f"{tmp_path}/mine.py:make", "--skip", "0.2", "x")
    assert message in error


MAKE = """\
import torch

class make:
    def __init__(self, model, skip, warm_up_index=None, tokens=None, seed=0):
        self.warm_up_index = 2

    def __call__(self, layers, x, step):
        active = step.token_index <= self.warm_up_index
        for layer in layers:
            h = layer.add_attention(x, step)
            x = layer.add_feed_forward(h, step, active)
        return x
"""
ACTIVE, RESULT = "h, step, active", "return x"  # in MAKE
ONE = "active if len(active[0]) > 1 else active[0]"  # wrong for tokens decoded alone


@pytest.mark.parametrize("old, new, message", [
    (ACTIVE, "h, step, active.sum()", "line 11: active is torch.int64 of [] on cpu: it must be torch.bool of [1, "),
    (ACTIVE, "h, step, active[:, :1]", "line 11: active is torch.bool of [1, 1] on cpu: it must be"),
    (ACTIVE, "h, step, active.float()", "line 11: active is torch.float32 of [1, "),
    (ACTIVE, "h, step, active.numpy()", "line 11: active is a numpy.ndarray: it must be"),
    (ACTIVE, f"h, step, {ONE}", "line 11: active is torch.bool of [1] on cpu: it must be torch.bool of [1, 1] on cpu"),
    ("(x, step)\n", "(x, step, True)\n", "line 10: active is a builtins.bool"),
    (RESULT, "return x.numpy()", "line 7: the policy returned a numpy.ndarray: it must return x, torch.float16 of [1,"),
    (RESULT, "return x.float()", "line 7: the policy returned torch.float32 of [1, "),
    (RESULT, "return x[:, -1]", "line 7: the policy returned torch.float16 of [1, 32] on cpu: it must return x"),
    (RESULT, "pass", "line 7: the policy returned nothing"),
])  # fmt: skip
def test_what_a_policy_may_not_hand_over_is_an_error_with_its_line(old, new, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MAKE.replace(old, new))
    error = mistake(capsys, main, "--ckpt", CKPT, "--policy", f"{tmp_path}/mine.py:make", "--skip", "0.2", "xyz")
    assert error.startswith(f"error: {tmp_path}/mine.py, {message}")


PADDING = "active &= torch.arange(active.size(1)) >= step.cache.pad[:, None]"  # is skipped too
HOLES = "layer.add_attention(x, step, (step.token_index < 0) | (step.token_index % 3 > 0))"


@pytest.mark.parametrize("old, new, message", [
    ("token_index <=", "token_index >", "line 11: the prompt is skipped in: active must be True where a block runs"),
    ("layer.add_attention(x, step)", "x", "line 11: layer 0 runs add_feed_forward, and not add_attention"),
    ("layer.add_attention(x, step)", HOLES, "line 7: in layer 0 a token reads a cache entry that one before it did"),
    (RESULT, RESULT, None),
    ("self.warm_up_index\n        for", f"self.warm_up_index\n        {PADDING}\n        for", None),
])  # fmt: skip
def test_what_may_be_a_mistake_of_a_policy_is_told_once_with_its_line(old, new, message, tmp_path, capsys):
    """And a policy like any other is not: neither its prompt nor its padding is skipped in, and its cache is whole."""
    (tmp_path / "mine.py").write_text(MAKE.replace(old, new))
    policy = ["--ckpt", CKPT, "--policy", f"{tmp_path}/mine.py:make", "--skip", "0.2", "--max-new-tokens", "9"]
    for prompts in ["xyz"], ["xyz", "a longer one"]:
        note.cache_clear()
        main([*policy, *prompts])
        said = capsys.readouterr().err
        assert said.count(f"mine.py, {message}") == (message is not None) and said.count("mine.py, line") <= 2
        assert message or "mine.py, line" not in said


def test_a_policy_of_a_file_gets_the_layers_themselves_once_it_has_skipped(tmp_path):
    """So it is checked at its first tokens, at no cost for the others; the numbers are those of the policy itself."""
    model, seen = tiny_model(), []
    (tmp_path / "mine.py").write_text(MAKE)
    policy = find_policy(f"{tmp_path}/mine.py:make", model, skip=0.5)
    walk = type(policy.policy).__call__

    class Watched(type(policy.policy)):
        def __call__(self, layers, x, step):
            seen.append(isinstance(layers[0], CheckedLayer))
            return walk(self, layers, x, step)

    ids = list(generate(model, random_ids(5), 8, policy.policy))
    policy.policy.__class__ = Watched
    assert list(generate(model, random_ids(5), 8, policy)) == ids
    assert seen == [True] * 5 + [False] * 3  # the prompt, tokens 0 to 3, of which 3 is the first past the warm-up


def test_threads_wait_asleep_where_other_programs_run_and_the_user_has_not_chosen(monkeypatch):
    def chosen(seen, **environ):
        looks = iter(seen)
        monkeypatch.setattr(support, "running", lambda: next(looks))
        support.wait_asleep(environ)
        return environ

    assert support.running() >= 1
    assert chosen([2, 5, 2]) == dict(OMP_WAIT_POLICY="PASSIVE")
    assert chosen([1]) == chosen([2, 2, 1]) == {}  # at one look another one may run by chance
    assert chosen([9] * 3, GOMP_SPINCOUNT="1000") == dict(GOMP_SPINCOUNT="1000")
    assert chosen([9] * 3, OMP_WAIT_POLICY="ACTIVE") == dict(OMP_WAIT_POLICY="ACTIVE")


def test_a_python_without_pytorch_is_told_what_to_do(tmp_path):
    (tmp_path / "torch").mkdir()
    missing = "raise ModuleNotFoundError('No module named torch', name='torch')"
    (tmp_path / "torch" / "__init__.py").write_text(missing)
    process = start("generate.py", stderr=-1, text=True, env=dict(PYTHONPATH=str(tmp_path)))
    said = process.communicate()[1]
    assert process.returncode == 1 and said.startswith("error: PyTorch is not installed") and said.count("\n") == 1


@pytest.mark.parametrize(
    "raised, code, printed",
    [
        (ValueError("first\nsecond"), 1, "error: first\n"),
        (ValueError(), 1, "error: ValueError\n"),
        (MemoryError(), 1, "error: MemoryError\n"),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "error: a.txt: No such file\n"),
        (OSError("disk on fire"), 1, "error: disk on fire\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(3), 3, ""),
    ],
)
def test_how_a_program_ends(raised, code, printed, capsys):
    def ends(argv):
        raise raised

    assert status(ends) == code and capsys.readouterr().err == printed


def test_a_mistake_of_ours_says_where(capsys):
    def ends(argv):
        return [].pop()

    line = ends.__code__.co_firstlineno + 1
    assert status(ends) == 1
    assert capsys.readouterr().err == f"error: {__file__}, line {line}: IndexError: pop from empty list\n"
    assert status(lambda argv: 5) == 5 and status(lambda argv: None) == 0


def test_an_optional_package_that_is_missing_says_how_to_get_it():
    with pytest.raises(ValueError, match="--plot: needs the package nosuch: pip install nosuch"):
        common.import_optional("nosuch", "--plot")
    with pytest.raises(ValueError, match="judge.py: needs the package nosuch: make eval$"):
        common.import_optional("nosuch", "judge.py", "make eval")
    assert common.import_optional("json", "x") is json


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_path_or_a_name_under_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "mine").mkdir(parents=True)
    assert common.find_checkpoint("mine").resolve() == tmp_path / "checkpoints" / "mine"
    assert common.find_checkpoint(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.find_checkpoint("~/checkpoints/mine") == tmp_path / "checkpoints" / "mine"  # as --ckpt=~/... comes
    with pytest.raises(ValueError, match="no checkpoint at yours or checkpoints/yours"):
        common.find_checkpoint("yours")


def test_a_file_and_its_folder_have_to_be_writable(tmp_path, monkeypatch):
    """
    The folder, for what is renamed into it, and a file that is there already; of a device or a pipe nothing else. By a
    stand-in for os.access, which allows the superuser everything.
    """
    there, new, device = tmp_path / "there", tmp_path / "new", Path("/dev/null")
    there.touch()
    cases = ({tmp_path, there}, {there, new}), ({tmp_path}, {new}), ({there}, set()), ({device}, {device})
    for writable, fine in cases:
        monkeypatch.setattr("os.access", lambda path, mode: path in writable)
        common.check_outputs(*fine)
        for refused in {there, new, device} - fine:
            with pytest.raises(ValueError, match=f"{refused.name}: cannot be written: no permission"):
                common.check_outputs(refused)


def test_the_first_difference_by_hand():
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2 and first_difference([5], [6]) == 0
    assert first_difference([1, 2], [1, 2, 3]) == 2 and first_difference([1, 2, 3], [1]) == 1
    assert first_difference([], [1]) == 0 and first_difference([1, 2], [1, 2]) == 2


def test_a_table_has_its_first_column_at_the_left_and_the_others_at_the_right():
    assert common.table([["policy", "kl"], ["a", "10.25"], ["longer name", "1"]]) == [
        "policy          kl",
        "a            10.25",
        "longer name      1",
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_that_a_token_reads_are_all_weights_but_the_embeddings(tied):
    model = tiny_model(tie_word_embeddings=tied, dtype=torch.bfloat16)
    parts = common.weight_bytes(model)
    everything = 2 * sum(weight.numel() for weight in model.parameters())
    embeddings = 2 * 31 * 16  # read as the head where they are tied
    assert sum(parts.values()) == everything - (0 if tied else embeddings)
    assert parts["head"] == embeddings and parts["feed_forward"] == 2 * 4 * 3 * 16 * 24
    assert parts["attention"] == 2 * 4 * (2 * 16 * 16 + 2 * 16 * 8) and parts["norms"] == 2 * 9 * 16


def test_progress_gives_the_items():
    assert list(common.progress([1, 2, 3], "label")) == [1, 2, 3]
