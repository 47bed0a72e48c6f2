"""
The files of a checkpoint: which of them hold weights, which of these belong together, what kind each is, and the errors
of whatever reads them.
"""

import contextlib
import fnmatch
import re
from pathlib import Path

import torch
from safetensors import safe_open

from model import ModelArgs
from support.common import LoadError, first_bytes, first_line, foreign, is_gguf, read_json

ORDER = (  # in which weights are preferred, by the names of their files
    "model.safetensors", "model-*.safetensors", "consolidated*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin",
    "consolidated*.pth", "*.safetensors", "*.bin", "*.pth",
)  # fmt: skip
# what a trainer, or a fit, leaves beside the weights of a model
OTHERS = r"adapter|optim|sched|training_args|rng_state|random_states|pytorch_lora|(.*\.)?standins\."
MERGE = "first merge it (peft has merge_and_unload) into"
# tables and masks that real files carry, and that model.py computes
BUFFERS = r"rope\.freqs|inv_freq|freqs_(cis|cos|sin)|(cos|sin)_cached|position_ids|(^|[._])mask|masked_bias"


@contextlib.contextmanager
def load_errors(*where):
    """Turn whatever a library raises inside into a LoadError; where: the file, and what is wrong with it."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:  # the packages tokenizers and gguf raise anything
        why = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise LoadError(": ".join([*map(str, where), foreign(where[0]) or why])) from error


def file_kind(file):
    """gguf, safetensors, zip (PyTorch's) or pickle (PyTorch's of before 1.6); None for any other file."""
    head = first_bytes(file)
    if head.startswith(b"GGUF"):
        return "gguf"
    if head[6:9] == b"\0\0{":  # the length of a header in JSON, which may begin like any other kind, and the header
        return "safetensors"
    for begin, kind in (b"PK", "zip"), (b"\x80", "pickle"):
        if head.startswith(begin):
            return kind
    return None


def weight_files(folder, more=()):
    """The names of files in a folder, and of `more`, that say that weights of a model are in them, in ORDER."""
    names, found = {file.name for file in folder.iterdir()}, []
    for pattern in ORDER:
        for name in sorted(fnmatch.filter(names.union(more), pattern)):
            if name not in found and not re.match(OTHERS, name):
                found.append(name)
    return found


def locate(path):
    """
    The GGUF file or the folder that a path means. GGUF is told by its first bytes. A folder with params.json or
    config.json and weights is itself; else the only GGUF file in it is meant. Raises LoadError.
    """
    path = Path(path)
    if not path.exists():
        raise LoadError(f"{path}: no such file or folder")
    if path.suffix == ".gguf" or is_gguf(path):
        return path
    folder = path if path.is_dir() else path.parent
    config = (folder / "params.json").exists() or (folder / "config.json").exists()
    if config and weight_files(folder):
        return folder
    files = sorted(file for file in folder.iterdir() if is_gguf(file))
    if len(files) == 1 or (files and "-00001-of-" in files[0].name):  # of a split one, which is refused, the first
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise LoadError(f"{folder}: there are several GGUF files: give the path of one: {names}")
    if not weight_files(folder) and any(folder.glob("adapter*")):
        about = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").exists() else {}
        base = about.get("base_model_name_or_path") or "the model that it was trained on"
        raise LoadError(f"{folder}: an adapter ({about.get('peft_type', 'LoRA')}) and no model: {MERGE} {base}")
    if not config:
        expected = "params.json (Meta's layout), config.json (Hugging Face's) or a GGUF file"
        raise LoadError(f"{folder}: no checkpoint: expected {expected}")
    return folder


def weight_sets(folder, path):
    """
    {name: files} for every set of weights in a folder, in ORDER; for a path to one of the files only its set. Shards
    are a set, and where there is an index, those that it names, whether they are there or not.
    """
    indexed = {}  # the name of a file -> that of its set
    for index in folder.glob("*.index.json"):
        with load_errors(index, "its weight_map names no files"):
            names = sorted({str(Path(name)) for name in read_json(index).get("weight_map", {}).values()})
        for name in names:
            indexed[name] = set_name(names[0])
    sets = {}
    for name in weight_files(folder, more=indexed):
        sets.setdefault(indexed.get(name) or set_name(name), []).append(folder / name)
    if path.is_file():
        for name, files in sets.items():
            if folder / path.name in files:
                return {name: files}
        if file_kind(path):
            return {path.name: [path]}
    return sets


def set_name(name):
    """model-*-of-00003.safetensors, the name of the set that model-00001-of-00003.safetensors is one file of."""
    return re.sub(r"(?<=-)\d+(?=-of-)|(?<=consolidated\.)\d+(?=\.)", "*", name)


def read_shards(folder, name, files):
    """What read_tensors gives of each of the files of a set of weights. Raises LoadError if one is not there."""
    for file in files:
        if not file.exists():
            raise LoadError(f"{file}: no such file, and an index names it: the download is not complete")
    count = re.search(r"-of-0*(\d+)", name)
    if count and len(files) < int(count[1]):
        there = f"{len(files)} of {count[1]} files {name} are there"
        raise LoadError(f"{folder}: {there}: the download is not complete")
    return [read_tensors(file) for file in files]


def read_tensors(file):
    """{name: tensor mapped from the file}, safetensors or PyTorch's, which its first bytes tell. Raises LoadError."""
    kind = file_kind(file)
    if kind == "pickle":
        raise LoadError(f"{file}: written in PyTorch's format of before 1.6, which cannot be mapped: rewrite it with "
                        "torch.save(torch.load(path, weights_only=True), path)")
    with load_errors(file, "cannot be read, it may be cut short or of another kind"):
        if kind == "zip":
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        elif kind or file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        else:
            raise ValueError("not a PyTorch file")
    if not isinstance(tensors, dict) or not all(is_plain(*item) for item in tensors.items()):
        raise LoadError(f"{file}: not a dictionary of tensors")
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(COLUMNS) and tensor.dim() == 2:  # of load_weights.py --columns
            found[name.removesuffix(COLUMNS)] = tensor.t()
        elif not re.search(f"({BUFFERS})$", name):
            found[name] = tensor
    return found


COLUMNS = ".columns"  # at the end of the name of a matrix (out, in) that is stored as (in, out)


def is_plain(name, tensor):
    """Whether an entry of a file is a name and a tensor with all its numbers in memory, one after the other."""
    return isinstance(name, str) and torch.is_tensor(tensor) and tensor.layout == torch.strided and not tensor.is_meta


LARGEST = dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "head_dim"), 2**20)
LARGEST |= dict(vocab_size=2**31, max_seq_len=2**31, norm_eps=1e30, rope_theta=1e30)  # more is a mistake


def model_args(names=None, **sizes):
    """
    The ModelArgs of these sizes, of which n_kv_heads and head_dim may be None. names: {size: its key in the file}.
    Raises ValueError if one is no such number, or if they divide attention into no such heads.
    """
    keys = {size: size for size in LARGEST} | (names or {})
    for size, value in sizes.items():
        if size in LARGEST and (value is not None or size not in ("n_kv_heads", "head_dim")):
            check_number(keys[size], value, LARGEST[size], whole=size not in ("norm_eps", "rope_theta"))
    args = ModelArgs(**sizes)
    if args.n_heads % args.n_kv_heads:
        groups = f"{keys['n_kv_heads']} {args.n_kv_heads}"
        raise ValueError(f"{keys['n_heads']} {args.n_heads} is not a multiple of {groups}")
    if sizes.get("head_dim") is None and args.dim % args.n_heads:
        raise ValueError(f"{keys['dim']} {args.dim} is not a multiple of {keys['n_heads']} {args.n_heads}")
    if args.head_dim % 2:
        raise ValueError(f"{keys['head_dim']} {args.head_dim} is odd, and rotary embeddings turn pairs")
    return args


def check_number(key, value, largest=1e30, whole=False):
    """The value of a key in a file, if it is a number above 0 and no larger than that. Raises ValueError."""
    if value is None:
        raise ValueError(f"{key!r} is missing")
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not 0 < value <= largest:
        raise ValueError(f"{key!r} is {value!r:.40}, expected a {'whole ' * whole}number above 0, up to {largest:,}")
    return value


def check_layers(file, key, n_layers, names):
    """Raise LoadError unless there are tensors of so many layers, before a model of so many is built."""
    found = {re.match(r"(layers\.\d+\.)?", name)[0] for name in names}
    for i in range(n_layers):
        if f"layers.{i}." not in found:
            raise LoadError(f"{file}: {key!r} is {n_layers}, and every tensor of layer {i} is missing")


def check_tensor(file, name, tensor, shape):
    """Raise LoadError unless the tensor has this shape and is floating point of at least 16 bits."""
    if tensor.shape != shape:
        raise LoadError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise LoadError(f"{file}: tensor {name} is in {tensor.dtype}: quantised weights are not supported")
