"""Data-parallel training on several ranks (processes): sums over ranks, shared decisions, work for rank 0 alone.

torchrun starts several ranks; without torchrun there is one, and the functions return their input. Numbers of a step go
through `sum_over_ranks` and `mean_over_ranks`, decisions through `gather_values`, so that all ranks decide the same.
"""

import ctypes
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from learner.errors import OtherRankExited

# The other ranks wait while rank 0 packs plates, scores or exports. torchrun and the closed connections report a dead
# rank at once, so this timeout only ends a hang; it is longer than any learning window.
TIMEOUT = timedelta(hours=24)
POLL_S = 0.05
PR_SET_PDEATHSIG = 1  # option of prctl(2): signal this process when its parent dies

Plain = TypeVar("Plain")
_rank_zero_only = False  # True on rank 0 while `on_rank_zero` works


def under_torchrun() -> bool:
    """Whether torchrun started this process; torchrun treats every exit code but 0 as a crash."""
    return "RANK" in os.environ


def local_rank_and_size() -> tuple[int, int]:
    """Return this process's rank on its machine, and the number of ranks there."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of torchrun, if any: gloo for objects and CPU tensors, nccl for CUDA tensors."""
    if not under_torchrun():
        yield
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # when torchrun is killed: write a checkpoint and exit
    store, rank_, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    store = PrefixStore(_agree_on_prefix(store, rank_, size), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank_, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _agree_on_prefix(store: Store, rank_: int, size: int) -> str:
    """Return a key prefix that rank 0 chooses for this start of the workers; all ranks have it when this returns.

    torchrun keeps its store when it restarts the workers, with the addresses of dead ones in it, and its restart count
    differs between machines. So each rank sends a random token and accepts only the answer to that token.
    """
    token = uuid.uuid4().hex
    if rank_:
        store.set(f"hello {rank_}", token)
        answer = ["", ""]
        while answer[0] != token:
            time.sleep(POLL_S)
            if store.check([f"welcome {rank_}"]):
                answer = store.get(f"welcome {rank_}").decode().split()
        store.set(f"{answer[1]} has {rank_}", "")
        return answer[1]
    waiting = set(range(1, size))
    while waiting:
        for peer in waiting:
            if store.check([f"hello {peer}"]):
                store.set(f"welcome {peer}", f"{store.get(f'hello {peer}').decode()} {token}")
        time.sleep(POLL_S)
        waiting = {peer for peer in waiting if not store.check([f"{token} has {peer}"])}
    return token


def world_size() -> int:
    """Return the number of ranks; 1 without torchrun and during `on_rank_zero`."""
    return dist.get_world_size() if dist.is_initialized() and not _rank_zero_only else 1


def rank() -> int:
    """Return this process's rank, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Whether this is the rank that writes files: lock, checkpoints, metrics, exports and result."""
    return rank() == 0


def rank_slice(count: int) -> slice:
    """Return this rank's slice of `count` items; slices differ in length by at most one and may be empty."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


# -- numbers


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in one all-reduce; all ranks pass the same shapes and one dtype."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def mean_over_ranks(rows: Tensor) -> Tensor:
    """Return the float64 mean over the rows (n, ...) of all ranks; n may be 0 on a rank."""
    total = rows.sum(0, dtype=torch.float64)
    count = total.new_tensor(len(rows))
    sum_over_ranks([total, count])
    return total / count


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """Return the rows (n, ...) of all ranks in the order of ranks, and the slice of this rank's; n may be 0 on a rank."""
    counts = gather_values(len(rows))
    mine = slice(sum(counts[: rank()]), sum(counts[: rank() + 1]))
    table = rows.new_zeros(sum(counts), *rows.shape[1:])
    table[mine] = rows
    sum_over_ranks([table])
    return table, mine


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


# -- decisions


def gather_values(value: Plain) -> list[Plain]:
    """Return the picklable values of all ranks, in the order of ranks; also a barrier. Raises OtherRankExited."""
    messages = _exchange((None, value))
    for exit_, _ in messages:
        if exit_:
            raise OtherRankExited(*exit_)
    return [sent for _, sent in messages]


def announce_exit(state: str, reason: str) -> tuple[str, str]:
    """Send state and reason to the other ranks, whose `gather_values` raises; return those of the lowest exiting rank."""
    return next(exit_ for exit_, _ in _exchange(((state, reason), None)) if exit_)


def _exchange(message: tuple) -> list[Any]:
    """Return the messages (exit or None, value) of all ranks."""
    if world_size() == 1:
        return [message]
    messages: list[Any] = [None] * world_size()
    dist.all_gather_object(messages, message)
    return messages


def on_rank_zero(work: Callable[[], Plain]) -> Plain:
    """Run `work` on rank 0 and return its picklable result on every rank; the other ranks wait.

    During `work`, world_size() is 1 on rank 0: feeds return whole batches and nothing is exchanged.
    """
    global _rank_zero_only
    value: Any = None
    if is_rank_zero():
        before, _rank_zero_only = _rank_zero_only, True
        try:
            value = work()
        finally:
            _rank_zero_only = before
    return gather_values(value)[0]
