"""
Several processes compute what one does, each from its share of the weights; they decide alike, and end together. They
run this file, `python tests/test_parallel.py FOLDER CHECKPOINT ...`, and leave what they have seen in the folder.
"""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = str(HERE.parent), str(HERE.parent / "experiments"), str(HERE)

from tiny import tiny_model

import generate
from fast import parallel
from fast.processes import from_first
from load_weights import HUGGING_FACE, load_model
from model import KVCache
from skip import FFNSkip
from support import common
from support.tracing import Trace

GOLDEN = HERE / "golden"
LAYOUTS = "hf-gqa", "hf-mha", "hf-tied", "hf-llama3", "meta-gqa", "meta-mha", "gqa-f16.gguf", "gqa-q8_0.gguf"
FLAGS = "--ckpt", GOLDEN / "hf-gqa", "--device", "cpu", "--dtype", "float32"
SKIP = "--cold-s", 0, "--cold-e", 2, "--sim-threshold", 0.7, "--k", 1, "--warm-up-index", -1


def look(path):
    """What a process sees of a checkpoint: logits of two rows and of a text that it writes, decisions, and traffic."""
    model, sums, add_up = load_model(path, dtype=torch.float32), [], parallel.dist.all_reduce
    model(torch.tensor([[3]]))  # whose first row is compared with what the fast layers make of it
    parallel.dist.all_reduce = lambda out: sums.append(add_up(out))
    policy, trace = FFNSkip(0, model.args.n_layers, 0.7, warm_up_index=-1, k=1), Trace(cosines=True)
    tokens = torch.arange(3, 19).view(2, 8)  # two rows, which disagree about what to skip
    cache = KVCache(model.args, 2, 8)
    parts = [model(part, cache, policy, prompt_len=2, trace=trace) for part in tokens.split([4, 1, 1, 2], dim=1)]
    ids = list(generate.generate(model, [3, 4, 5], 12, policy, temperature=1.0, seed=1, trace=trace))
    parallel.dist.all_reduce = add_up
    ran = [(one.n_layers, len(one.ran)) for one in trace.passes]
    weights = {name: weight.shape for name, weight in model.named_parameters()}
    return dict(
        logits=torch.cat(parts, dim=1), ids=ids, ran=[one.ran for one in trace.passes], sums=len(sums),
        cosine=[one.cosine for one in trace.passes], blocks=sum(map(sum, ran)), skipped=any(a > b for a, b in ran),
        weights=weights, fingerprint=common.fingerprint(model), complete=cache.complete(), cache=tuple(cache.k.shape),
    )


def main(argv=None):
    folder, *paths = map(Path, argv or sys.argv[1:])
    seen = {path.name: look(path) for path in paths}
    if parallel.size == 2:
        import bench

        import calibrate

        with pytest.raises(KeyError, match="what the first one lacks"):  # all of them end, and none waits
            from_first(lambda: {}["what the first one lacks"])
        with pytest.raises(ValueError, match="n_heads 4, n_kv_heads 1 and hidden_dim 64: .* as 1 does"):
            load_model(GOLDEN / "hf-mqa")
        generate.main([*map(str, FLAGS + SKIP), "--json", "--max-new-tokens", "9", "a b c"])
        text = "--text", GOLDEN / "text.txt", "--skip", 0.3, "--warm-up-index", 2, "--out", folder / "skip.json"
        calibrate.main([*map(str, FLAGS + text), "--max-tokens", "256", "--save-cosines", str(folder / "cosines.csv")])
        sizes = "--skip", 0.3, "--prompt", 4, "--tokens", 5, "--repeats", 1, "--out", folder / "bench.csv"
        bench.main([*map(str, FLAGS + sizes)])
    torch.save(seen, folder / f"{parallel.rank}.pt")
    parallel.dist.barrier()
    print("ready", flush=True)
    if parallel.size == 2 and parallel.rank == 1:
        raise ValueError("a mistake of one process")
    model = load_model(paths[0])
    while True:
        model(torch.ones(1, 4, dtype=torch.long))


def start(n, folder, *paths):
    """torchrun with n processes, in a process group of its own, as a terminal has it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, __file__, folder]
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(list(map(str, [*command, *paths])), env=env, start_new_session=True, **pipes)


def finish(torchrun):
    """What the processes have printed, and the lines in which they say what is wrong, once all of them have ended."""
    try:
        out, err = torchrun.communicate(timeout=60)  # it comes back when nobody is left who could write
    finally:
        if torchrun.poll() is None:
            os.killpg(torchrun.pid, signal.SIGKILL)
    assert torchrun.returncode, err
    return out, [line for line in err.splitlines() if line.startswith("error: ")]


def check(folder, n, paths):
    """What n processes have seen of the checkpoints is what one sees."""
    seen = [torch.load(folder / f"{rank}.pt") for rank in range(n)]
    for path in paths:
        one, first = look(path), seen[0][path.name]
        assert one["skipped"] and first["complete"]
        assert (first["logits"] - one["logits"]).abs().max() <= 1e-5 * one["logits"].abs().max()
        assert str(first["ran"]) == str(one["ran"]) and first["ids"] == one["ids"]
        assert one["sums"] == 0 and first["sums"] == first["blocks"]  # no block that is skipped sends anything
        assert first["fingerprint"] == one["fingerprint"]
        assert first["cache"][2] == one["cache"][2] / n
        for name, shape in one["weights"].items():
            split = name.startswith("layers.") and len(shape) == 2
            assert first["weights"][name].numel() == shape.numel() / (n if split else 1), name
        for other in seen[1:]:
            assert torch.equal(first["logits"], other[path.name]["logits"])  # to the bit, and so are the decisions:
            assert all(str(first[key]) == str(other[path.name][key]) for key in first if key != "logits")


def test_two_processes_do_what_one_does_and_end_when_one_fails(tmp_path, capsys):
    paths = [GOLDEN / layout for layout in LAYOUTS]
    try:
        import gguf  # noqa: F401
    except ImportError:
        paths = [path for path in paths if path.suffix != ".gguf"]
    out, errors = finish(start(2, tmp_path, *paths))
    check(tmp_path, 2, paths)
    assert errors == ["error: a mistake of one process"]
    assert out.count("ready\n") == 1 and out.endswith("ready\n")  # only the first prints and writes
    generate.main([*map(str, FLAGS + SKIP), "--json", "--max-new-tokens", "9", "a b c"])
    one, first = json.loads(capsys.readouterr().out), json.loads(out.split("\n")[0])
    for key in "text", "token_ids", "ffn_skip_ratio", "ffn_saved_ratio":
        assert one[key] == first[key]
    rows = list(csv.DictReader((tmp_path / "bench.csv").open()))
    assert [row["variant"] for row in rows] == ["dense", "monitor", "fixed", "ffnskip"]
    assert {row["model"] for row in rows} == {"hf-gqa, 2 processes"}
    settings = json.loads((tmp_path / "skip.json").read_text())
    assert len((tmp_path / "cosines.csv").read_text().splitlines()) == settings["tokens"]


def test_sizes_left_over_by_a_batch_system_do_not_make_it_wait():
    """WORLD_SIZE alone, as in a pod or a SLURM script, starts nobody: only torchrun has started others."""
    env = os.environ | dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999", OMP_NUM_THREADS="1")
    command = [sys.executable, HERE.parent / "generate.py", *map(str, FLAGS), "--max-new-tokens", "1", "Once"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0 and done.stderr.startswith("[WORLD_SIZE is set, but torchrun did not start this")


def test_three_processes_do_what_one_does_and_end_when_interrupted(tmp_path):
    """6 heads, 3 key-value heads, width 96, in three layouts; Meta's has two files, across which the shares lie."""
    paths = write_checkpoints(tmp_path)
    torchrun = start(3, tmp_path, *paths)
    assert torchrun.stdout.readline() == "ready\n", torchrun.stderr.read()
    os.killpg(torchrun.pid, signal.SIGINT)
    assert finish(torchrun) == ("", [])
    check(tmp_path, 3, paths)


def write_checkpoints(folder):
    """One tiny model in Hugging Face's layout, as safetensors and as .bin, and as two of Meta's files."""
    model = tiny_model(dim=96, n_heads=6, n_kv_heads=3, hidden_dim=48)
    theirs, shards, names = {}, [{}, {}], {ours: name for name, ours in HUGGING_FACE.items()}
    for name, weight in model.state_dict().items():
        dim = 1 if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")) else 0
        for shard, piece in zip(shards, weight.chunk(2, dim)):
            shard[name] = weight if weight.dim() == 1 else piece.clone()
        if name.endswith(("wq.weight", "wk.weight")):  # to Hugging Face's order of rows within a head
            weight = weight.view(-1, 8, 2, 96).transpose(1, 2).reshape(weight.shape)
        *layer, rest = name.split(".", 2) if name.startswith("layers.") else [name]
        theirs[".".join(["model", *layer, names[rest]]) if layer else names[rest]] = weight
    args = model.args
    config = dict(
        model_type="llama", hidden_size=96, num_hidden_layers=args.n_layers, num_attention_heads=6, rms_norm_eps=1e-5,
        num_key_value_heads=3, vocab_size=args.vocab_size, intermediate_size=48, max_position_embeddings=64,
    )
    paths = [folder / "safetensors", folder / "bin", folder / "meta"]
    for path in paths:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
    save_file(theirs, paths[0] / "model.safetensors")
    torch.save(theirs, paths[1] / "pytorch_model.bin")
    (paths[2] / "params.json").write_text(json.dumps(asdict(args)))
    for i, shard in enumerate(shards):
        torch.save(shard, paths[2] / f"consolidated.0{i}.pth")
    return paths


if __name__ == "__main__":
    common.run_command(main, torchrun=True)
