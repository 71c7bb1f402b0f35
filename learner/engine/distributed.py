"""The processes that share a round: who they are, what they add up, and what they tell each other.

torchrun starts several; started plainly there is one, and every function here hands back what it was given. Numbers of
a step go over `add_up` and `mean`, decisions over `gather`, so that all ranks decide alike. Knows no loss and no image.
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

# Others wait here while rank 0 packs plates, scores or exports; a rank that dies is noticed at once by torchrun and by
# its closed connections, so the limit only ends a hang, and may be longer than any night.
LONGEST_WAIT = timedelta(hours=24)
POLL_S = 0.05
SET_PDEATHSIG = 1  # of prctl(2)

Plain = TypeVar("Plain")
_alone = False


class Ended(Exception):
    """Another rank can't or mustn't go on: `state` and `reason` are its last word, and now this rank's too."""

    def __init__(self, state: str, reason: str) -> None:
        super().__init__(reason)
        self.state, self.reason = state, reason


def launched() -> bool:
    """Whether torchrun started this process, watches it, and takes every exit code but 0 for a crash."""
    return "RANK" in os.environ


def local() -> tuple[int, int]:
    """This process's place among those of its machine, and how many they are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started: gloo for decisions and the CPU, nccl for tensors on CUDA."""
    if not launched():
        yield
        return
    ctypes.CDLL(None).prctl(
        SET_PDEATHSIG, signal.SIGTERM
    )  # torchrun killed: checkpoint and leave, as the agent expects
    store, place, count = next(iter(rendezvous("env://", timeout=LONGEST_WAIT)))
    store = PrefixStore(_fresh_name(store, place, count), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT, store=store, rank=place, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _fresh_name(store: Store, place: int, count: int) -> str:
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


def world() -> int:
    """How many ranks share the round."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Whether this rank writes the files: the lock, checkpoints, metrics, exports and the result."""
    return rank() == 0


def share(count: int) -> slice:
    """This rank's part of `count` things in order; the parts differ by one at most, and may be empty."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


# -- numbers


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in one exchange; all ranks give the same shapes and one dtype."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def mean(rows: Tensor) -> Tensor:
    """float64 mean over the rows (n, ...) of all ranks; a rank may have none."""
    total = rows.sum(0, dtype=torch.float64)
    count = total.new_tensor(len(rows))
    add_up([total, count])
    return total / count


def all_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """The rows (n, ...) of all ranks, in the order of ranks, and where this rank's lie; a rank may have none."""
    counts = gather(len(rows))
    mine = slice(sum(counts[: rank()]), sum(counts[: rank() + 1]))
    table = rows.new_zeros(sum(counts), *rows.shape[1:])
    table[mine] = rows
    add_up([table])
    return table, mine


def same(tensors: Iterable[Tensor]) -> None:
    """Every rank takes rank 0's values."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


# -- decisions


def gather(value: Plain) -> list[Plain]:
    """The plain values that the ranks gave, by rank, on every rank: also a barrier. Raises Ended (see `last_word`)."""
    said = _exchange((None, value))
    for ending, _ in said:
        if ending:
            raise Ended(*ending)
    return [given for _, given in said]


def last_word(state: str, reason: str) -> tuple[str, str]:
    """Tell the other ranks, at whatever `gather` they wait, that this one leaves; the lowest rank's word, which holds."""
    return next(ending for ending, _ in _exchange(((state, reason), None)) if ending)


def _exchange(value: tuple) -> list[Any]:
    if world() == 1:
        return [value]
    said: list[Any] = [None] * world()
    dist.all_gather_object(said, value)
    return said


def by_first(work: Callable[[], Plain]) -> Plain:
    """What `work` gives on rank 0, a plain value, on every rank; the others wait.

    Within `work` rank 0 is alone: feeds hand out whole batches and nothing is exchanged, as in a plain process.
    """
    global _alone
    given: Any = None
    if is_first():
        before, _alone = _alone, True
        try:
            given = work()
        finally:
            _alone = before
    return gather(given)[0]
