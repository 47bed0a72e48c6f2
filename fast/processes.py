"""
The processes that torchrun starts, from their meeting to their end; parallel.py has what they compute together. Where
one fails or is interrupted, torchrun ends the others.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from fast import parallel
from fast.one_row import way_of_one

FOREVER = timedelta(days=365)  # processes may wait for the first one, which may wait for its user


@contextlib.contextmanager
def together(allowed):
    """
    Around a program: join the processes that torchrun has started, if there are several. Only the first one prints, and
    of those that fail the one of the lowest rank says why. Raises ValueError if the program is not `allowed` to run so,
    or if the processes may round differently.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        if os.environ.get("WORLD_SIZE", "1") != "1":  # a batch system's or an earlier shell's, which nobody here meant
            print("[WORLD_SIZE is set, but torchrun did not start this program: it runs alone]", file=sys.stderr)
        yield
        return
    join()
    try:
        if not allowed:
            raise ValueError("this program runs in one process: start it with python, not with torchrun")
        check_alike()
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            dist.barrier()
            dist.destroy_process_group()
            raise
        time.sleep(0.5 + parallel.rank)  # if this is only because another has failed, torchrun ends us meanwhile
        sys.stdout.flush()
        sys.stderr = sys.__stderr__
        atexit.register(os._exit, 1)  # without the destructors, which may wait for processes that are no more
        raise


def join():
    """Meet the other processes; a GPU becomes this one's."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=FOREVER)
    parallel.rank, parallel.size = dist.get_rank(), dist.get_world_size()
    if parallel.rank:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, even inside an all-reduce
        sys.stdout = sys.stderr = open(os.devnull, "w")


def check_alike():
    """Raise ValueError if two processes share a GPU, or may round differently."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < gpus < here:
        raise ValueError(f"{here} processes and {gpus} GPUs: each needs its own (with CUDA_VISIBLE_DEVICES= none does)")
    device = torch.cuda.get_device_name() if gpus else torch.backends.cpu.get_cpu_capability()
    product = way_of_one(torch.bfloat16)  # differs between CPUs
    kinds = [None] * parallel.size
    kind = f"{device} ({product}), torch {torch.__version__}, {torch.get_num_threads()} threads"
    dist.all_gather_object(kinds, kind)
    if len(set(kinds)) > 1:
        raise ValueError(f"the processes differ, and may decide differently: {'; '.join(sorted(set(kinds)))}")


def from_first(function):
    """What function() returns or raises in the first process, in every one. Ctrl-C meanwhile ends them all."""
    if parallel.size == 1:
        return function()
    result = [None, None]
    if parallel.rank == 0:
        try:
            result[0] = function()
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            result[1] = error
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]
