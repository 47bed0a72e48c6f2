"""The processes that torchrun starts, from their meeting to their end. What they compute together is in parallel.py."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from fast import parallel
from fast.one_row import way_of_one

FOREVER = timedelta(days=365)  # processes may wait for the first one, which may wait for its user
interrupted = threading.Event()


@contextlib.contextmanager
def together(allowed):
    """
    Around a program: join the processes that torchrun has started, if there are several. Only the first one prints and
    is interrupted, except that of those that fail the first to do so says why; and where one fails, all end. Raises
    ValueError if the program is not `allowed` to run so, or if the processes may round differently.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    join()
    store = new_store()
    threading.Thread(target=watch, daemon=True).start()
    try:
        if not allowed:
            raise ValueError("this program runs in one process: start it with python, not with torchrun")
        check_alike()
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            dist.all_reduce(torch.zeros(1))  # wait for the others
            dist.destroy_process_group()
            raise
        with contextlib.suppress(RuntimeError):  # nobody is left to be asked
            sys.stderr = sys.__stderr__ if store.add("failed", 1) == 1 else open(os.devnull, "w")
        atexit.register(end, store)
        raise


def join():
    """Meet the other processes; a GPU becomes this one's."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=FOREVER)
    parallel.rank, parallel.size = dist.get_rank(), dist.get_world_size()
    if parallel.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    signal.signal(signal.SIGINT, signal.SIG_IGN if parallel.rank else interrupt)


def interrupt(number, frame):
    """Ctrl-C ends what the first process is at, once: torchrun sends another, and ends all in any case."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupted.set()
    raise KeyboardInterrupt


def new_store():
    """The dictionary that all processes see. A thread that waits for a key needs one of its own."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def watch():
    """End this process, a second after another has failed, even inside an all-reduce, where it would wait for ever."""
    with contextlib.suppress(RuntimeError):  # the store is gone, and so is the process that had it
        new_store().wait(["ended"], FOREVER)
    time.sleep(1)  # for a line of its own about the same mistake
    if dist.is_initialized():
        os._exit(1)


def end(store):
    """The last that a process does after it has failed: end the others, and not wait for them in a destructor."""
    with contextlib.suppress(RuntimeError):
        store.set("ended", "")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def check_alike():
    """Raise ValueError if two processes share a GPU, or may round differently."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < gpus < here:
        raise ValueError(f"{here} processes and {gpus} GPUs: each needs its own (with CUDA_VISIBLE_DEVICES= none does)")
    device = torch.cuda.get_device_name() if gpus else torch.backends.cpu.get_cpu_capability()
    product = way_of_one(torch.bfloat16)  # which is another one on another CPU
    kinds = [None] * parallel.size
    kind = f"{device} ({product}), torch {torch.__version__}, {torch.get_num_threads()} threads"
    dist.all_gather_object(kinds, kind)
    if len(set(kinds)) > 1:
        raise ValueError(f"the processes differ, and may decide differently: {'; '.join(sorted(set(kinds)))}")


def from_first(function):
    """What function() returns or raises in the first process, in every one. Ends the first if it was interrupted."""
    if parallel.size == 1:
        return function()
    if interrupted.is_set():
        sys.exit(130)
    result = [None, None]
    if parallel.rank == 0:
        try:
            result[0] = function()
        except Exception as error:
            result[1] = error
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]
