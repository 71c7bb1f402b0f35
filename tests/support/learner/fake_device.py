"""A device apart: tensors that refuse to meet those of the host, as a GPU's do, on a machine without a GPU.

`python -m tests.support.learner.fake_device ROUND...` learns rounds on it, the first with its bundle, in a process of its own, since a process has one such backend. Its
numbers are computed on the host; streams, nccl, half precision and CUDA's own kernels are not looked at.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import learner.training.run
from learner.__main__ import main
from learner.data.augment import normalise, resize_matrix, to_image
from learner.engine.device import prepare_device
from learner.errors import LearnerError
from learner.explain import saliency
from learner.round.manifest import load
from learner.training.export import probe_plates
from learner.training.run import Run
from tests.support.learner.recipe_rounds import phases_of

INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"}  # by the host's integers too
BETWEEN = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"}  # what may cross
JOINED = {"aten::cat", "aten::stack"}  # take no number of the host


class Backend:
    """What torch asks of a backend's module."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float32])
    _is_in_bad_fork = staticmethod(lambda: False)


_setup_privateuseone_for_python_backend("apart", backend_module=Backend())
DEVICE = torch.device("apart", 0)


class Apart(torch.Tensor):
    """A tensor of the device, around one of the host."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Apart":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self) -> list:
        return self.inner.tolist()  # torch has none for subclasses

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> "Apart":
        return Apart(torch.tensor(data, dtype=dtype or self.dtype))


class Made(TorchDispatchMode):
    """Tensors that are made on the device, or sent there from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there = torch.device((kwargs or {}).get("device") or "cpu").type == DEVICE.type
        return run(func, args, kwargs) if there and kwargs else func(*args, **(kwargs or {}))


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operation, on the tensors inside; RuntimeError where it would mix host and device."""
    check(func._schema, args, kwargs)
    wrapped, there = {}, False

    def inside(value: Any) -> Any:
        nonlocal there
        if not isinstance(value, Apart):
            return value
        there, wrapped[id(value.inner)] = True, value
        return value.inner

    plain, named = tree_map(inside, args), tree_map(inside, kwargs)
    if (device := kwargs.get("device")) is not None:
        there, named["device"] = torch.device(device).type == DEVICE.type, torch.device("cpu")
    if func._schema.name == "aten::copy_":
        func(*plain, **named)
        return args[0]

    def outside(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if (known := wrapped.get(id(value))) is not None:
            return known  # written in place
        return Apart(value) if there else value

    return tree_map(outside, func(*plain, **named))


def check(schema: Any, args: tuple, kwargs: dict) -> None:
    """The rule of a GPU: an operand of the host may be a single number, or the integers of an index."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    host = [value for value in tensors if not isinstance(value, Apart)]
    if len(host) in (0, len(tensors)) or schema.name in BETWEEN:
        return
    changed = schema.is_mutable and args[0] is host[0]
    wrong = [value for value in host if value.dim() or schema.name in JOINED or changed]
    if schema.name in INDEXED and isinstance(args[0], Apart):
        wrong = [value for value in wrong if value.is_floating_point()]
    if wrong:
        raise RuntimeError(
            f"{schema.name}: tensors of the host, {[tuple(v.shape) for v in wrong]}, beside the device's"
        )


def refused(work: Callable[[], object]) -> bool:
    try:
        work()
    except (RuntimeError, TypeError):
        return True
    return False


def device_refuses() -> None:
    """It would be no test if the device took everything."""
    there, here = torch.ones(3, device=DEVICE), torch.ones(3)
    assert torch.equal((there * torch.tensor(2.0) + 1).cpu(), here * 3)
    mixed = (
        lambda: there + here, lambda: torch.stack([there[0], here[0]]), lambda: here[there.long()],
        lambda: here.add_(there), lambda: np.asarray(there), lambda: torch.where(here > 0, there, there),
    )  # fmt: skip
    assert all(map(refused, mixed))


def explained(folder: Path) -> None:
    """Every map of a round's network, made on the device."""
    work = Run(load(folder))
    try:
        recipe = work.recipe
        network = work.new_network().eval()
        images = normalise(
            to_image(torch.from_numpy(probe_plates())[:2], resize_matrix(512, recipe.image_size)), recipe
        )
        for method in saliency.METHODS:
            try:
                made, _ = saliency.explain(network, recipe, images.to(DEVICE), 0, method)
            except LearnerError as error:
                assert "ReLU" in str(error) or "attention" in str(error), error
            else:
                assert made.device == DEVICE, method
    finally:
        work.progress.close()


if __name__ == "__main__":
    learner.training.run.prepare_device = lambda recipe: (prepare_device(recipe), (DEVICE, None))[1]
    with Made():
        device_refuses()
        first, *others = map(Path, sys.argv[1:])
        assert main([str(first)]) == 0
        explained(first)
        for one in others:
            phases_of(one)
