"""experiments/bench.py: what it counts is right and what it runs is the model; how fast it is, no test says."""

import csv
import math
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import bench
import peers
import pytest
import torch
from test_golden import GOLDEN
from tiny import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fast import one_row
from load_weights import load_model
from model import KVCache, ModelArgs
from support.show import speedup_bound
from support.tracing import Trace

ROOT = Path(__file__).parent.parent
CKPT = str(GOLDEN / "hf-gqa")


def written(model, policy, trace=None, batch=1, prompt=5, steps=6):
    """Logits (steps, batch, vocab) of decoding as bench.py does it."""
    runner = bench.Variant("", model, policy, batch, prompt, prompt + steps)
    runner.rewind()
    runner.trace = trace
    tokens = torch.randint(model.args.vocab_size, (batch, prompt + steps), generator=torch.Generator().manual_seed(1))
    runner.forward(tokens[:, :prompt])
    return torch.stack([runner.forward(token) for token in tokens[:, prompt:].split(1, dim=1)])


@pytest.mark.parametrize("skip", [0.05, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("n_layers, batch", [(4, 1), (30, 1), (32, 1), (30, 16)])
def test_a_plan_leaves_out_exactly_the_share_and_never_two_blocks_in_a_row(skip, n_layers, batch):
    plan = bench.make_plan(n_layers, skip, tokens=20, batch=batch)  # (step, layer, batch)
    assert plan.sum().item() == round(skip * plan.numel())
    assert not plan[:, 0].any() and not (plan[:, 1:] & plan[:, :-1]).any()
    assert batch == 1 or skip == 0.5 or (plan != plan[..., :1]).any()  # rows disagree where there is a choice


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variants_compute_what_they_say(batch, dtype):
    model = tiny_model(dtype=dtype, n_layers=6)
    plan = bench.make_plan(6, 0.25, tokens=6, batch=batch)
    traces = Trace(), Trace()
    fixed = written(model, bench.Planned(plan, monitored=False), traces[0], batch)
    planned = written(model, bench.Planned(plan, monitored=True), traces[1], batch)
    assert torch.equal(fixed, planned)  # the same blocks, through the same kernels
    left_out = plan.permute(1, 2, 0)  # (step, layer, batch) -> (layer, batch, step)
    for trace in traces:
        assert torch.equal(~trace.ran[:, :, 5:], left_out) and trace.ran[:, :, :5].all()
    assert traces[0].cosine.isnan().all()
    assert torch.equal(traces[1].cosine[:, :, 5:].isnan(), left_out)  # every block that ran was measured
    monitor = bench.FFNSkip(0, 6, math.inf, warm_up_index=-1)
    assert torch.equal(written(model, monitor, batch=batch), written(model, None, batch=batch))
    assert not torch.equal(fixed, written(model, None, batch=batch))
    stand_ins = bench.PlannedStandIns(plan, model, n=2, rank=4)
    trace = Trace()
    assert torch.equal(written(model, stand_ins, trace, batch), fixed)  # a map of zeros adds nothing
    assert torch.equal(~trace.ran[:, :, 5:], left_out)


@pytest.mark.parametrize("batch", [1, 3])
def test_in_a_prompt_variants_skip_what_their_plan_says(batch):
    model = tiny_model(n_layers=6)
    plan = bench.make_plan(6, 0.25, tokens=9, batch=batch)
    left_out = plan.permute(1, 2, 0)  # (token, layer, batch) -> (layer, batch, token)
    tokens = torch.randint(model.args.vocab_size, (batch, 9), generator=torch.Generator().manual_seed(1))
    logits = []
    for policy in bench.Planned(plan, False), bench.Planned(plan, True), bench.PlannedStandIns(plan, model, 2, 4):
        runner = bench.Variant("", model, policy, batch, prompt_len=0, columns=9)
        runner.rewind()
        runner.forward(tokens[:, :5])
        logits.append(torch.stack([runner.forward(token) for token in tokens[:, 5:].split(1, dim=1)]))
        assert torch.equal(~runner.trace.ran, left_out)
        torch.testing.assert_close(logits[-1], logits[0])


def test_operations_of_a_prompt_are_those_that_pytorch_counts():
    model = tiny_model(n_layers=4)
    args, tokens = model.args, torch.randint(model.args.vocab_size, (1, 7))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, last_only=True)
    unseen = 7 * 6 / 2  # pairs of a token and a later one, which this kernel computes and masks
    scores = 2 * 2 * args.n_layers * args.n_heads * args.head_dim * unseen
    assert bench.prompt_flops(args, 7) == counter.get_total_flops() - scores
    block = 2 * 3 * args.dim * args.hidden_dim
    assert bench.prompt_flops(args, 7) - bench.prompt_flops(args, 7, 0.25) == 7 * block  # of 7 x 4 blocks


def test_bytes_of_stand_ins_are_all_probes_and_the_maps_of_what_does_not_run():
    model = tiny_model(dtype=torch.bfloat16, n_layers=6)
    stand_ins, dim = bench.PlannedStandIns([], model, n=5, rank=4), model.args.dim
    assert stand_ins.bytes_read(ffn_run=1.0) == 6 * 4 * dim
    assert stand_ins.bytes_read(ffn_run=0.5) == 6 * 4 * dim + 3 * (5 * 4 * dim + 2 * (2 * 4 * dim + dim))


def test_flops_are_those_of_table_4():
    args = ModelArgs(**bench.SIZES["7B"])
    saved = {skip: math.floor(bench.flops_saved(args, skip) / 1e8) / 10 for skip in (0.1, 0.2, 0.3, 0.5)}
    assert saved == {0.1: 0.8, 0.2: 1.7, 0.3: 2.5, 0.5: 4.3}


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_the_weights_and_the_cache(tied):
    model = tiny_model(dtype=torch.bfloat16, head_dim=6, tie_word_embeddings=tied)
    cache = KVCache(model.args, 3, 10, torch.bfloat16)
    needed = bench.bytes_needed(model, cache, columns=0)
    embedding = 0 if tied else model.tok_embeddings.weight.nbytes
    assert needed == sum(weight.nbytes for weight in model.parameters()) - embedding
    half = bench.bytes_needed(model, cache, columns=0, ffn_read=0.5)
    assert needed / half == pytest.approx(speedup_bound(model, 0.5))
    assert bench.bytes_needed(model, cache, columns=10) - needed == cache.k.nbytes + cache.v.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch, columns, ffn_run", [(1, 138.5, 1.0), (1, 138.5, 0.7), (3, 20, 0.25)])
def test_bytes_are_those_that_the_sizes_of_the_model_say(dtype, batch, columns, ffn_run):
    """The formula by which the rows in results/bench.csv were counted, term by term."""
    model = tiny_model(dtype=dtype, head_dim=6)
    args = model.args
    attention = args.dim * args.head_dim * (2 * args.n_heads + 2 * args.n_kv_heads)
    layer = attention + ffn_run * 3 * args.dim * args.hidden_dim + 2 * args.dim  # with 2 norms
    kv = batch * columns * 2 * args.n_kv_heads * args.head_dim
    numbers = args.n_layers * (layer + kv) + args.dim + args.vocab_size * args.dim
    needed = bench.bytes_needed(model, KVCache(args, batch, 64, dtype), columns, ffn_run)
    assert needed == pytest.approx(dtype.itemsize * numbers, rel=1e-12)


@pytest.mark.parametrize("tied, dtype", [(False, torch.bfloat16), (True, torch.float16), (True, torch.float32)])
def test_the_gguf_file_for_llama_cpp_holds_the_same_weights(tmp_path, tied, dtype):
    pytest.importorskip("gguf")
    model = tiny_model(dtype=dtype, dim=32, hidden_dim=64, tie_word_embeddings=tied)
    peers.write_gguf(model, tmp_path / "model.gguf")
    back = load_model(tmp_path / "model.gguf", dtype=dtype)
    model.args.norm_eps = pytest.approx(model.args.norm_eps)  # float32 in the file
    assert asdict(back.args) == asdict(model.args)
    for name, weight in model.state_dict().items():
        same = weight.float() if dtype == torch.float16 and weight.dim() == 1 else weight
        assert torch.equal(back.state_dict()[name], same.to(dtype)), name


@pytest.mark.parametrize("peer", ["transformers", "llama_cpp"])
def test_peers_compute_the_same_where_they_are_installed(tmp_path, peer):
    make, packages = dict(
        transformers=(peers.Transformers, ["transformers"]), llama_cpp=(peers.LlamaCpp, ["llama_cpp", "gguf"])
    )[peer]  # fmt: skip
    for package in packages:
        if not find_spec(package):
            pytest.skip(f"{package} is not installed")
    model = tiny_model(dim=64, hidden_dim=64)
    other = make(model, 16, tmp_path)
    other.rewind()
    tokens = torch.arange(10)[None]
    logits = [other.forward(chunk).clone() for chunk in tokens.split([8, 1, 1], dim=1)]
    assert torch.allclose(torch.cat(logits), model(tokens)[0, 7:], atol=1e-2, rtol=1e-2)


def test_a_peer_that_computes_something_else_is_no_peer(monkeypatch):
    class Other:
        name = "other"

        def __init__(self, model, columns, folder):
            self.model = tiny_model(seed=1)

        def rewind(self):
            pass

        def forward(self, tokens):
            return self.model(tokens)[:, -1]

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda package: package == "transformers")
    monkeypatch.setattr(peers, "Transformers", Other)
    monkeypatch.setattr(peers.LlamaCpp, "__init__", None)  # not installed: never made
    variant, prompt = bench.Variant("dense", tiny_model(), None, 1, 5, 8), torch.arange(5)[None]
    with pytest.raises(ValueError, match="other computes something else"):
        list(peers.make_peers(variant, prompt, 8, "folder"))
    variant.model = tiny_model(seed=1)
    assert [peer.name for peer in peers.make_peers(variant, prompt, 8, "folder")] == ["other"]


@pytest.mark.parametrize("batch", [1, 2])
def test_peers_that_cannot_run_are_left_out_and_it_is_said_why(monkeypatch, capsys, batch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda package: batch == 2 and package != "transformers")
    monkeypatch.setattr(peers.LlamaCpp, "__init__", None)
    variant = bench.Variant("dense", tiny_model(), None, batch, 5, 8)
    assert list(peers.make_peers(variant, torch.ones(batch, 5, dtype=torch.long), 8, "folder")) == []
    why = "llama_cpp is not installed" if batch == 1 else "it runs on the CPU with --batch 1 here"
    said = ["[transformers is left out: transformers is not installed]", f"[llama.cpp is left out: {why}]"]
    assert capsys.readouterr().err.splitlines() == said


@pytest.mark.parametrize("size", ["7B", "13B"])
def test_random_weights_of_a_named_size_with_fewer_layers(monkeypatch, tmp_path, capsys, size):
    small = dict(dim=16, n_heads=2, hidden_dim=24, vocab_size=31, max_seq_len=64)
    monkeypatch.setitem(bench.SIZES, size, bench.SIZES[size] | small)
    out = ["--out", str(tmp_path / "x.csv"), "--device", "cpu", "--variants", "dense"]
    bench.main(["--shape", size, "--layers", "2", "--prompt", "4", "--tokens", "3", "--repeats", "1", *out])
    (row,) = csv.DictReader((tmp_path / "x.csv").open())
    assert row["model"] == f"{size} with 2 layers, random" and row["dtype"] == "bfloat16"
    options = bench.parse_args(["--shape", size, "--layers", "3", "--dtype", "float32"])
    model, _ = bench.random_model(options, torch.device("cpu"))
    assert len(model.layers) == 3 and model.output.weight.dtype == torch.float32
    x = torch.randn(1, 1000, 16)
    assert 0.5 < model.layers[0].attention.wv(x).std() < 2 and (model.norm.weight == 1).all()


def test_the_results_have_the_columns_that_are_written():
    with open(ROOT / "experiments" / "results" / "bench.csv") as file:
        assert next(csv.reader(file)) == bench.FIELDS


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--ckpt", CKPT, "--skip", "0,0.25", "--prompt", "8", "--tokens", "8", "--repeats", "2", "--device", "cpu"]
    for batch in "1", "2":
        bench.main([*args, "--batch", batch])
        lines = capsys.readouterr().out.splitlines()
        assert lines[2].startswith("| variant | skipped |") and lines[4].startswith("| dense | 0% |")
        assert len(lines) == 9 and lines[-1] == "written to out/bench.csv"
    rows = list(csv.DictReader(open("out/bench.csv")))
    assert [r["batch"] for r in rows] == ["1"] * 4 + ["2"] * 4
    assert rows[0]["command"].startswith("python experiments/bench.py --ckpt")
    for own in rows[:4], rows[4:]:
        assert [r["variant"] for r in own] == ["dense", "monitor", "fixed", "ffnskip"]
        assert [r["ffn_skip_ratio"] for r in own] == ["0", "0", "0.25", "0.25"]
        assert all(float(r["gb_per_s"]) > 0 and float(r["decode_tokens_per_s"]) > 0 for r in own)
        assert own[0]["speedup"] == own[0]["speedup_bound"] == "1" and own[0]["columns"] == "16"
        # of two rows only one skips a block: it is read, and nothing but arithmetic is saved
        assert (float(own[3]["speedup_bound"]) > 1) == (own[0]["batch"] == "1")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--skip", "0.6"], "not between 0 and 0.5"),
        (["--skip", "many"], "invalid"),
        (["--variants", "dense,best"], "no variant best"),
        (["--ckpt", "nowhere"], "no checkpoint at nowhere"),
        (["--shape", "7B", "--ckpt", CKPT], "exclude each other"),
        (["--layers", "2"], "goes with --shape"),
        (["--ckpt", CKPT, "--tokens", "1000000"], "max_seq_len"),
        (["--ckpt", CKPT, "--out", str(GOLDEN / "text.txt")], "has other columns"),
    ],
)
def test_errors_are_one_line(args, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        bench.main(["--device", "cpu", "--tokens", "2", "--prompt", "4", *args])
    said = capsys.readouterr().err or str(error.value)  # common.run_command prints a ValueError as one line
    assert message in said and len(said.splitlines()) == 1


def test_a_command_that_fails_says_so():
    command = [sys.executable, str(ROOT / "experiments" / "bench.py"), "--ckpt", "nowhere"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: no checkpoint at nowhere") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_show_every_way_and_the_one_that_is_taken(dtype, capsys, monkeypatch):
    """The rule goes by dtype, capability and shape alone; every way computes the same."""
    monkeypatch.setattr(one_row, "AMX", True)
    bench.main(["--products", "--ckpt", CKPT, "--dtype", dtype])
    title, *lines = capsys.readouterr().out.splitlines()
    assert [title.index(way) for way in bench.WAYS] == sorted(title.index(way) for way in bench.WAYS)
    taken = {line.split()[-1] for line in lines}
    assert taken == ({"columns", "mv"} if dtype == "bfloat16" else {"linear"})  # mv: the head, whatever its size
    x, weight = torch.randn(24).to(getattr(torch, dtype)), torch.randn(16, 24).to(getattr(torch, dtype))
    for way in bench.WAYS:
        laid = one_row.by_columns(weight) if way == "columns" else weight
        assert torch.allclose(bench.multiply(way, x, laid).float(), weight.float() @ x.float(), rtol=0.02, atol=0.02)


def test_rows_are_compared_with_the_peers_that_ran():
    rows = [dict(variant="dense", decode_tokens_per_s=30.0), dict(variant="llama.cpp", decode_tokens_per_s=40.0)]
    bench.add_peer_ratios(rows)
    assert [row["of_llama_cpp"] for row in rows] == [0.75, 1.0]
    assert [row["of_transformers"] for row in rows] == [None] * 2


@pytest.mark.parametrize("by_columns", [True, False])
def test_what_teal_leaves_out_counts_as_bytes_not_read(by_columns, tmp_path, monkeypatch):
    """Whether the model lies by columns or a copy of it must; the bound of teal_all counts attention too."""
    monkeypatch.setattr(one_row, "SMALL", 2**20 if by_columns else 0)
    args = ["--ckpt", CKPT, "--variants", "teal,teal_all", "--skip", "0.4", "--tokens", "3", "--prompt", "4"]
    bench.main([*args, "--repeats", "1", "--out", str(tmp_path / "b.csv")])
    dense, teal, everything = csv.DictReader(open(tmp_path / "b.csv"))
    for row in teal, everything:
        assert float(row["ffn_skip_ratio"]) == pytest.approx(0.4, abs=0.15)
    assert 1 == float(dense["speedup_bound"]) < float(teal["speedup_bound"]) < float(everything["speedup_bound"])
