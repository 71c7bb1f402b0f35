"""A fake device: its tensors cannot be mixed with CPU tensors, as on a GPU; for machines without a GPU.

`python -m tests.support.learner.fake_device ROUND...` trains rounds on it, the first with its exports. It needs its own
process, because a process can have only one such backend. Numbers are computed on the CPU; streams, nccl, half precision
and CUDA kernels are not covered.
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
from learner.data.augment import normalise, to_image
from learner.engine.device import prepare_device
from learner.errors import LearnerError
from learner.explain import saliency
from learner.networks.pooling import resize_matrix
from learner.round.manifest import load
from learner.training.export import probe_plates
from learner.training.run import Run
from tests.support.learner.recipe_rounds import phases_of

INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"}  # CPU integers may be the index
TRANSFERS = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"}  # between CPU and device
JOINED = {"aten::cat", "aten::stack"}  # do not take CPU scalars


class Backend:
    """The functions that torch calls of a backend's module."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float32])
    _is_in_bad_fork = staticmethod(lambda: False)


_setup_privateuseone_for_python_backend("fake", backend_module=Backend())
DEVICE = torch.device("fake", 0)


class DeviceTensor(torch.Tensor):
    """A tensor of the device, around a CPU tensor."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "DeviceTensor":
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

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> "DeviceTensor":
        return DeviceTensor(torch.tensor(data, dtype=dtype or self.dtype))


class CreationMode(TorchDispatchMode):
    """Makes tensors on the device, and sends CPU tensors there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there = torch.device((kwargs or {}).get("device") or "cpu").type == DEVICE.type
        return run(func, args, kwargs) if there and kwargs else func(*args, **(kwargs or {}))


def run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run one operation on the inner tensors. Raises RuntimeError where it mixes CPU and device."""
    check(func._schema, args, kwargs)
    wrapped, there = {}, False

    def inside(value: Any) -> Any:
        nonlocal there
        if not isinstance(value, DeviceTensor):
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
        return DeviceTensor(value) if there else value

    return tree_map(outside, func(*plain, **named))


def check(schema: Any, args: tuple, kwargs: dict) -> None:
    """Raise RuntimeError unless CPU operands are single numbers or integer indices: the rule of a GPU."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    host = [value for value in tensors if not isinstance(value, DeviceTensor)]
    if len(host) in (0, len(tensors)) or schema.name in TRANSFERS:
        return
    changed = schema.is_mutable and args[0] is host[0]
    wrong = [value for value in host if value.dim() or schema.name in JOINED or changed]
    if schema.name in INDEXED and isinstance(args[0], DeviceTensor):
        wrong = [value for value in wrong if value.is_floating_point()]
    if wrong:
        raise RuntimeError(
            f"{schema.name}: CPU tensors {[tuple(v.shape) for v in wrong]} mixed with tensors of the device"
        )


def raises(work: Callable[[], object]) -> bool:
    try:
        work()
    except (RuntimeError, TypeError):
        return True
    return False


def check_mixed_operands() -> None:
    """Check that the device rejects mixed operands."""
    there, here = torch.ones(3, device=DEVICE), torch.ones(3)
    assert torch.equal((there * torch.tensor(2.0) + 1).cpu(), here * 3)
    mixed = (
        lambda: there + here, lambda: torch.stack([there[0], here[0]]), lambda: here[there.long()],
        lambda: here.add_(there), lambda: np.asarray(there), lambda: torch.where(here > 0, there, there),
    )  # fmt: skip
    assert all(map(raises, mixed))


def check_saliency(folder: Path) -> None:
    """Make every saliency map of a round's network on the device."""
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
    with CreationMode():
        check_mixed_operands()
        first, *others = map(Path, sys.argv[1:])
        assert main([str(first)]) == 0
        check_saliency(first)
        for folder in others:
            phases_of(folder)
