"""What users have, beside checkpoints and tokenizers: caches, terminals, text files, numbers that are not finite."""

import io
import json
import math
import shutil
from types import SimpleNamespace

import bench
import evaluate
import pytest
import tasks
import torch
from safetensors.torch import load_file, save_file
from test_golden import GOLDEN
from tiny import Bytes, mistake, start, status, tiny_model
from torch.torch_version import TorchVersion

import calibrate
import generate
from fast.one_row import Squares
from model import dense
from policies import load_settings, settings_path
from skip import FFNSkip
from support import common, measuring
from support.common import find_checkpoint, model_name, read_utf8, to_json
from support.measuring import measure, read_cosines, read_jsonl, read_text

CKPT = str(GOLDEN / "hf-gqa")


def strict(text):
    """The value of a JSON text, by the standard: no Infinity, no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# --- the Hugging Face cache -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache with one model, whose files are links into blobs/, as huggingface_hub lays it."""
    model = tmp_path / "hub" / "models--meta-llama--Llama-2-7b-hf"
    snapshot, blobs = model / "snapshots" / "01c7f73d", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (GOLDEN / "hf-gqa").iterdir():
        shutil.copy(file, blobs / f"blob-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-of-{file.name}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_model_in_the_cache_has_its_own_name(hub):
    snapshot = hub / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "01c7f73d"
    for path in snapshot, snapshot / "model.safetensors", snapshot / "config.json":
        assert model_name(path) == "llama-2-7b"
    assert settings_path(snapshot / "model.safetensors") == snapshot / "skip.json"
    shutil.copy(GOLDEN / "gqa-f16.gguf", snapshot.parents[1] / "blobs" / "g")
    (snapshot / "Some-Model.Q4_1.gguf").symlink_to("../../blobs/g")
    assert model_name(snapshot / "Some-Model.Q4_1.gguf") == "some-model"
    assert settings_path(snapshot / "Some-Model.Q4_1.gguf") == snapshot / "Some-Model.Q4_1.skip.json"


def test_a_model_is_found_in_the_cache_by_its_name(hub, monkeypatch, tmp_path, capsys):
    model = hub / "models--meta-llama--Llama-2-7b-hf"
    only = model / "snapshots" / "01c7f73d"
    assert find_checkpoint("meta-llama/Llama-2-7b-hf") == find_checkpoint(str(model)) == only
    args = ["--ckpt", "meta-llama/Llama-2-7b-hf", "--max-new-tokens", "2", "Once"]
    assert "config/llama-2-7b.json: made for a model of 32 layers" in mistake(capsys, generate.main, *args)
    generate.main([*args, "--policy", "dense"])  # which needs no settings
    second = model / "snapshots" / "ffff0000"
    shutil.copytree(only, second)
    with pytest.raises(ValueError, match="refs/main names no snapshot.*01c7f73d, ffff0000"):
        find_checkpoint("meta-llama/Llama-2-7b-hf")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("ffff0000\n")
    assert find_checkpoint("meta-llama/Llama-2-7b-hf") == second
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert find_checkpoint("meta-llama/Llama-2-7b-hf") == second
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg" / "huggingface").mkdir(parents=True)
    (tmp_path / "xdg" / "huggingface" / "hub").symlink_to(hub)
    assert find_checkpoint("meta-llama/Llama-2-7b-hf").resolve() == second.resolve()
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", "$PLACE/hub")  # its old name
    assert find_checkpoint("meta-llama/Llama-2-7b-hf") == second
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta-llama" / "Llama-2-7b-hf").mkdir(parents=True)  # an existing path comes first
    assert find_checkpoint("meta-llama/Llama-2-7b-hf") == common.Path("meta-llama/Llama-2-7b-hf")
    with pytest.raises(ValueError, match="no checkpoint at nobody/nothing.*Hugging Face cache"):
        find_checkpoint("nobody/nothing")


def test_gguf_is_told_by_its_first_bytes(tmp_path):
    shutil.copy(GOLDEN / "gqa-f16.gguf", tmp_path / "sha256-0123abcd")
    assert model_name(tmp_path / "sha256-0123abcd") == "sha256-0123abcd"
    assert settings_path(tmp_path / "sha256-0123abcd").name == "sha256-0123abcd.skip.json"
    assert find_checkpoint(str(tmp_path)) == tmp_path / "sha256-0123abcd"  # the only one in a folder
    shutil.copy(GOLDEN / "gqa-f16.gguf", tmp_path / "b.gguf")
    assert find_checkpoint(str(tmp_path)) == tmp_path


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_a_line_feed_ends_a_line(inside, tmp_path):
    text = f"one{inside}two"
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert [record["text"] for record in read_jsonl(tmp_path / "t.jsonl", "text")] == [text]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "p.txt").write_text("Once\nTom\n", encoding="utf-8-sig")
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n', encoding="utf-8-sig")
    (tmp_path / "c.csv").write_text("0.5,0.25\n", encoding="utf-8-sig")
    (tmp_path / "s.json").write_text(json.dumps(dict(cold_s=1, model="x")), encoding="utf-8-sig")
    assert read_utf8(tmp_path / "p.txt") == "Once\nTom\n" and read_text([tmp_path / "t.jsonl"]) == "a"
    assert read_cosines(tmp_path / "c.csv").tolist() == [[0.5, 0.25]]
    assert load_settings(tmp_path / "s.json", "x", 2) == dict(cold_s=1)


@pytest.mark.parametrize("text", ["cut \ud83d", "\udc00", {"inner": ["\udfff"]}])
def test_half_a_surrogate_pair_in_a_record_is_named_with_its_line(text, tmp_path):
    lines = [json.dumps(dict(text="\U0001f600")), json.dumps(dict(text=text)), json.dumps(dict(text="b"))]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="t.jsonl:2: half of a surrogate pair"):
        read_jsonl(tmp_path / "t.jsonl", "text")


def test_text_that_is_not_utf_8_is_named(tmp_path, capsys):
    (tmp_path / "p.txt").write_bytes(b"caf\xe9\n")
    args = ["--ckpt", CKPT, "--max-new-tokens", "1"]
    with pytest.raises(ValueError, match="p.txt: not UTF-8 text"):
        read_text([tmp_path / "p.txt"])
    assert "prompt 2, 'caf\\udce9': not UTF-8 text" in mistake(capsys, generate.main, *args, "x", "caf\udce9")
    process = start("generate.py", *args, "-", stdin=-1, stdout=-1, stderr=-1)
    _, err = process.communicate(b"caf\xe9")
    assert process.returncode == 1 and b"prompt 1, '-': not UTF-8 text" in err and err.count(b"error") == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_cannot_show_a_character_loses_nothing_else(encoding, tmp_path, monkeypatch):
    """The curve is drawn with bars, and a text may hold anything: calibrate.py writes its settings all the same."""
    rows = "\n".join("0.9,0.95" if i % 2 else "0.5,0.9" for i in range(40))
    (tmp_path / "c.csv").write_text(rows)
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding=encoding))
    args = ["--cosines", tmp_path / "c.csv", "--skip", "0.25", "--out", tmp_path / "o.json"]
    assert status(calibrate.main, *args) == 0
    assert ("\u2588".encode() if encoding == "utf-8" else b"?") in out.getvalue()
    assert strict((tmp_path / "o.json").read_text())


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """A checkpoint with one weight that is not a number."""
    shutil.copytree(CKPT, tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, tmp_path / "damaged" / "model.safetensors")
    return str(tmp_path / "damaged")


@pytest.mark.parametrize("temperature", ["0", "1", "1e-38"])
def test_logits_that_are_not_finite_are_an_error_at_any_temperature(damaged, temperature, capsys):
    args = ["--ckpt", damaged, "--temperature", temperature, "Once"]
    assert "not finite: try --dtype float32" in mistake(capsys, generate.main, *args)


def test_no_program_measures_what_is_not_finite(damaged, tmp_path, capsys):
    text = str(GOLDEN / "text.txt")
    args = ["--ckpt", damaged, "--text", text, "--warm-up-index", "5", "--out", tmp_path / "o.json"]
    assert "not finite" in mistake(capsys, calibrate.main, *args)
    args = ["perplexity", "--ckpt", damaged, "--data", text, "--window", "32", "--policies", "dense"]
    assert "not finite" in mistake(capsys, evaluate.main, *args, "--output", tmp_path / "t.csv")
    args = ["--ckpt", damaged, "--prompt", "4", "--tokens", "3", "--out", tmp_path / "b.csv"]
    assert "not finite" in mistake(capsys, bench.main, *args)
    assert not (tmp_path / "o.json").exists() and not (tmp_path / "b.csv").exists()


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-300, 1e-6])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -90.0, -6.0]])
    assert generate.sample(logits, temperature, 1.0, torch.Generator()).tolist() == [1, 0]


def test_a_token_without_a_row_is_an_error_that_names_it():


    model = tiny_model()
    with pytest.raises(ValueError, match=r"token 31 of the tokenizer has no row in tok_embeddings \(31 rows\)"):
        next(generate.generate(model, [1, 31], 3))
    with pytest.raises(ValueError, match="token 99 of the tokenizer has no row"):
        measure(model, [([1, 99], 0)], -1)


def test_json_is_valid_and_comes_back(tmp_path, capsys):
    skip = ["--policy", "ffnskip", "--cold-s", "0", "--cold-e", "2", "--sim-threshold", "inf"]
    generate.main(["--ckpt", CKPT, "--json", "--max-new-tokens", "3", *skip, "Once"])
    assert strict(capsys.readouterr().out)["settings"]["skip"]["sim_threshold"] == "inf"
    values = dict(a=math.inf, b=[-math.inf, math.nan, 1.5], c=dict(d=(math.inf,)), e="inf")
    assert strict(to_json(values)) == dict(a="inf", b=["-inf", None, 1.5], c=dict(d=["inf"]), e="inf")
    for threshold in math.inf, [math.inf, 0.5]:
        (tmp_path / "s.json").write_text(to_json(dict(model="x", cold_s=0, cold_e=2, sim_threshold=threshold)))
        assert FFNSkip(**load_settings(tmp_path / "s.json", "x", 2)).sim_threshold == threshold


def test_an_empty_prompt_is_a_text_where_the_tokenizer_begins_one(capsys):
    for prompt in "", "\n", "   ":
        generate.main(["--ckpt", CKPT, "--json", "--max-new-tokens", "3", prompt])
        report = strict(capsys.readouterr().out)
        assert report["prompt_tokens"] >= 1 and report["new_tokens"] == 3


# --- files and policies of somebody's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["my notes\nprecious", "one line", "a,b\n1,2\n"])
def test_a_file_that_is_no_table_is_left_as_it_is(text, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text(text)
    args = ["perplexity", "--ckpt", CKPT, "--data", GOLDEN / "text.txt", "--window", "32", "--warm-up-index", "5"]
    args += ["--policies", "dense", "--limit", "64", "--output", tmp_path / "notes.txt"]
    assert "notes.txt: not a table of evaluate.py" in mistake(capsys, evaluate.main, *args)
    assert (tmp_path / "notes.txt").read_text() == text


def test_rows_made_with_other_skip_settings_are_not_taken_for_new_ones(tmp_path, capsys):
    args = ["perplexity", "--ckpt", CKPT, "--data", str(GOLDEN / "text.txt"), "--window", "32", "--warm-up-index", "5"]
    args += ["--policies", "ffnskip", "--limit", "64", "--output", str(tmp_path / "t.csv")]
    args += ["--cold-s", "0", "--cold-e", "2"]
    evaluate.main([*args, "--sim-threshold", "0.9"])
    evaluate.main([*args, "--sim-threshold", "0.9"])
    assert "made with other settings" in mistake(capsys, evaluate.main, *args, "--sim-threshold", "0.7")


POLICY_FILES = {
    "def make(*args, **more):\n    return None\n": "makes NoneType: expected a policy",
    "def make(model, skip):\n    return print\n": "must take (model, skip, warm_up_index=None, tokens=None, seed=0)",
    "def make(*args, **more):\n    raise ValueError('no')\n": "mine.py, line 2: ValueError: no",
    "def other():\n    pass\n": "mine.py defines no function or class make",
}


@pytest.mark.parametrize("code", POLICY_FILES)
def test_a_policy_that_is_none_is_one_line_that_says_what_is_expected(code, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(code)
    args = ["--ckpt", CKPT, "--policy", f"{tmp_path / 'mine.py'}:make", "--skip", "0.2", "x"]
    assert POLICY_FILES[code] in mistake(capsys, generate.main, *args)


@pytest.mark.parametrize("change, message", [
    (dict(model=5), "model must be a text"),
    (dict(n_layers="2"), "n_layers a whole number"),
    (dict(ratios=5), "not a list of [shift, ratio] pairs"),
    (dict(ratios=[[0.1]]), "not a list of [shift, ratio] pairs"),
    (dict(ratios=[0.1, 0.2]), "not a list of [shift, ratio] pairs"),
    (dict(sim_threshold=10**400), "int too large"),
])  # fmt: skip
def test_settings_of_a_wrong_kind_are_one_line(change, message, tmp_path, capsys):
    settings = dict(model="hf-gqa", cold_s=0, cold_e=2, sim_threshold=0.9, ratios=[[0.0, 0.1], [-0.1, 0.5]])
    (tmp_path / "s.json").write_text(json.dumps(settings | change))
    args = ["--ckpt", CKPT, "--skip-config", tmp_path / "s.json", "--skip", "0.2", "x"]
    assert message in mistake(capsys, generate.main, *args)


def test_a_plan_that_misses_the_share_is_an_error(tmp_path, capsys):
    (tmp_path / "c.csv").write_text("1.0,1.0,1.0\n" * 4)
    args = ["--cosines", tmp_path / "c.csv", "--skip", "0.1", "--out", tmp_path / "o.json"]
    assert "no setting comes within 0.01 of a share of 0.1" in mistake(capsys, calibrate.main, *args)
    assert not (tmp_path / "o.json").exists()


def test_the_likeliest_token_is_never_left_out_by_rounding():
    logits = torch.tensor([[0.1, 0.3, 0.2]])
    assert generate.sample(logits, 1.0, 1e-300, torch.Generator()).tolist() == [1]


def test_a_trace_that_cannot_be_written_is_known_before_the_work(tmp_path, capsys):
    args = ["--ckpt", CKPT, "--policy", "dense", "--trace", tmp_path, "x"]
    assert "cannot be written: it is a folder" in mistake(capsys, generate.main, *args)


def test_vectors_of_length_zero_have_the_cosine_zero():
    assert Squares().cosine(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)) == 0


# --- Macs, which nobody here has --------------------------------------------------------------------------------------


class OnMps(torch.Tensor):
    """A tensor that computes on the CPU and, like one on Apple's GPU, has no float64 before it is copied."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("work", ["quality", "perplexity", "likelihood"])
def test_nothing_is_computed_in_float64_on_the_device(work, monkeypatch):
    model = tiny_model(max_seq_len=32)
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: logits(x).as_subclass(OnMps))
    ids = list(range(20))
    if work == "quality":
        assert measuring.quality(model, [(ids, 0)] * 2, FFNSkip(0, 4, math.inf, 5), {})["kl"] == 0
    elif work == "perplexity":
        assert tasks.perplexity(model, Bytes(), dense, None, tasks.Context(first=5))["top1_agreement"] == 1
    else:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
        import lm_eval_model

        lm = lm_eval_model.SkipLM(model, Bytes(), dense, tasks.Context())
        assert lm._loglikelihood_tokens([(None, ids[:4], ids[4:6])])[0][0] < 0


def test_attention_on_apples_gpu_is_not_used_where_it_is_wrong(monkeypatch):
    """Before PyTorch 2.13 a token in 16 bits saw later ones there (pytorch/pytorch#195910), without an error."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    empty = torch.empty

    def on_a_mac(*size, device=None):
        return SimpleNamespace(device=torch.device("mps")) if device == "mps" else empty(*size, device=device)

    monkeypatch.setattr(torch, "empty", on_a_mac)
    for version, found in ("2.13.0", "mps"), ("2.14.1+cpu", "mps"), ("2.12.1", "cpu"), ("2.9.0", "cpu"):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        assert common.find_device(None).type == found
        if found == "mps":
            assert common.find_device("mps").type == "mps"
        else:
            with pytest.raises(ValueError, match="device mps is not available: .*before PyTorch 2.13: pip install -U"):
                common.find_device("mps")
