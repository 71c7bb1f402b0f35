"""The processes that share a round: who they are, what they add up, and what they tell each other.

torchrun starts several; started plainly there is one, and every function here hands back what it was given. Numbers of
a step go over `sum_over_ranks` and `mean_over_ranks`, decisions over `gather_values`, so that all ranks decide alike. Knows no loss and no image.
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

# Others wait here while rank 0 packs plates, scores or exports; a rank that dies is noticed at once by torchrun and by
# its closed connections, so the limit only ends a hang, and may be longer than any night.
LONGEST_WAIT = timedelta(hours=24)
POLL_S = 0.05
SET_PDEATHSIG = 1  # of prctl(2)

Plain = TypeVar("Plain")
_rank_zero_only = False


def under_torchrun() -> bool:
    """Whether torchrun started this process, watches it, and takes every exit code but 0 for a crash."""
    return "RANK" in os.environ


def local_rank_and_size() -> tuple[int, int]:
    """This process's place among those of its machine, and how many they are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def process_group() -> Iterator[None]:
    """Be one of the processes that torchrun started: gloo for decisions and the CPU, nccl for tensors on CUDA."""
    if not under_torchrun():
        yield
        return
    ctypes.CDLL(None).prctl(
        SET_PDEATHSIG, signal.SIGTERM
    )  # torchrun killed: checkpoint and leave, as the agent expects
    store, place, count = next(iter(rendezvous("env://", timeout=LONGEST_WAIT)))
    store = PrefixStore(_agree_on_prefix(store, place, count), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT, store=store, rank=place, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _agree_on_prefix(store: Store, place: int, count: int) -> str:
    """A name that rank 0 gives this start of the workers, known to all of them when this returns.

    torchrun keeps its store when it starts workers again, and in it the addresses of dead ones; its count of restarts
    differs between machines. So each rank greets with a word of its own and takes the answer to that word only.
    """
    mine = uuid.uuid4().hex
    if place:
        store.set(f"hello {place}", mine)
        answer = ["", ""]
        while answer[0] != mine:
            time.sleep(POLL_S)
            if store.check([f"welcome {place}"]):
                answer = store.get(f"welcome {place}").decode().split()
        store.set(f"{answer[1]} has {place}", "")
        return answer[1]
    missing = set(range(1, count))
    while missing:
        for other in missing:
            if store.check([f"hello {other}"]):
                store.set(f"welcome {other}", f"{store.get(f'hello {other}').decode()} {mine}")
        time.sleep(POLL_S)
        missing = {other for other in missing if not store.check([f"{mine} has {other}"])}
    return mine


def world_size() -> int:
    """How many ranks share the round."""
    return dist.get_world_size() if dist.is_initialized() and not _rank_zero_only else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_rank_zero() -> bool:
    """Whether this rank writes the files: the lock, checkpoints, metrics, exports and the result."""
    return rank() == 0


def rank_slice(count: int) -> slice:
    """This rank's part of `count` things in order; the parts differ by one at most, and may be empty."""
    return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())


# -- numbers


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in one exchange; all ranks give the same shapes and one dtype."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def mean_over_ranks(rows: Tensor) -> Tensor:
    """float64 mean over the rows (n, ...) of all ranks; a rank may have none."""
    total = rows.sum(0, dtype=torch.float64)
    count = total.new_tensor(len(rows))
    sum_over_ranks([total, count])
    return total / count


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """The rows (n, ...) of all ranks, in the order of ranks, and where this rank's lie; a rank may have none."""
    counts = gather_values(len(rows))
    mine = slice(sum(counts[: rank()]), sum(counts[: rank() + 1]))
    table = rows.new_zeros(sum(counts), *rows.shape[1:])
    table[mine] = rows
    sum_over_ranks([table])
    return table, mine


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Every rank takes rank 0's values."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


# -- decisions


def gather_values(value: Plain) -> list[Plain]:
    """The plain values that the ranks gave, by rank, on every rank: also a barrier. Raises OtherRankExited (see `announce_exit`)."""
    said = _exchange((None, value))
    for ending, _ in said:
        if ending:
            raise OtherRankExited(*ending)
    return [given for _, given in said]


def announce_exit(state: str, reason: str) -> tuple[str, str]:
    """Tell the other ranks, at whatever `gather_values` they wait, that this one leaves; the lowest rank's word, which holds."""
    return next(ending for ending, _ in _exchange(((state, reason), None)) if ending)


def _exchange(value: tuple) -> list[Any]:
    if world_size() == 1:
        return [value]
    said: list[Any] = [None] * world_size()
    dist.all_gather_object(said, value)
    return said


def on_rank_zero(work: Callable[[], Plain]) -> Plain:
    """What `work` gives on rank 0, a plain value, on every rank; the others wait.

    Within `work` rank 0 is alone: feeds hand out whole batches and nothing is exchanged, as in a plain process.
    """
    global _rank_zero_only
    given: Any = None
    if is_rank_zero():
        before, _rank_zero_only = _rank_zero_only, True
        try:
            given = work()
        finally:
            _rank_zero_only = before
    return gather_values(given)[0]
