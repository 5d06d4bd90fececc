"""A virtual device: it computes on the CPU, bit for bit, and is as strict as CUDA about what lies where; see `gpu`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "virtual"
aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_}  # the operations that cross from one device to the other
INDEXED = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
NO_SCALARS = {aten.cat, aten.stack, aten._fused_sgd_, aten._fused_adam_}  # refuse even a scalar of the CPU
SYNCS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten.repeat_interleave,
         aten._unique2, aten.unique_dim, aten.unique_consecutive}  # the host waits for the result, or for its shape


class VirtualTensor(Tensor):
    """A tensor of the virtual device; `inner`, on the CPU, holds its numbers."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "VirtualTensor":
        outer = Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                              dtype=inner.dtype, device=torch.device(NAME, 0))
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: the virtual device is switched off")

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.cpu().__reduce_ex__(protocol)  # in a file, numbers are numbers


class VirtualDevice(TorchDispatchMode):
    """The device while it is on. Its events: "sync" where the host waited for it, "upload" for what it uploaded."""

    active = None

    def __init__(self) -> None:
        super().__init__()
        self.name, self.events = torch.device(NAME, 0), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, tensors = dict(kwargs or {}), []

        def unwrap(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor.inner if isinstance(tensor, VirtualTensor) else tensor

        inner, named = _changed(unwrap, args), {name: _changed(unwrap, value) for name, value in kwargs.items()}
        ours = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, VirtualTensor)}
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"]).type == NAME  # is the result
            named["device"] = torch.device("cpu") if here else kwargs["device"]
        else:
            here = isinstance(args[0], VirtualTensor) if func.overloadpacket in COPIES else bool(ours)
        if here or ours:
            self.check(func, args, kwargs, tensors, here)
        result = func(*inner, **named)
        # an operation in place gives the tensor that it was given
        return _changed(lambda tensor: ours.get(id(tensor), VirtualTensor(tensor)), result) if here else result

    def check(self, func, args: tuple, kwargs: dict, tensors: list[Tensor], here: bool) -> None:
        """Raise what CUDA would raise, else note whether the host waits."""
        packet, theirs = func.overloadpacket, [one for one in tensors if not isinstance(one, VirtualTensor)]
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
        if packet in COPIES:
            if here != isinstance(args[packet is aten.copy_], VirtualTensor):  # the source
                self.events.append("upload" if here else "sync")
            return
        if packet in INDEXED:  # by indices of either device, if it is not the CPU's
            for index in (index for index in args[1] if index is not None):
                if not isinstance(index, VirtualTensor):
                    self.events.append("upload")
                elif index.dtype in (torch.bool, torch.uint8):
                    self.events.append("sync")
                theirs = [one for one in theirs if one is not index]
        changed = args[0] if args and func._schema.is_mutable else None
        if len(theirs) < len(tensors) and any(one.dim() or one is changed or packet in NO_SCALARS for one in theirs):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {packet.__name__} found at least "
                               f"two devices, {NAME}:0 and cpu!")
        if packet in SYNCS:
            self.events.append("sync")


def _changed(change: Callable, item: object) -> object:
    """What an operation takes or gives, with each of its tensors changed."""
    if isinstance(item, (list, tuple)):
        return type(item)(_changed(change, part) for part in item)
    return change(item) if isinstance(item, Tensor) else item


if not torch.cuda.is_available():  # known to torch from the import on: autograd counts devices at its first pass
    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]  # torch.autocast asks, even if not enabled
    LIBRARY = torch.library.Library("aten", "IMPL")
    for kernel in (aten.empty_strided.default, aten.copy_.default):  # by which torch.tensor uploads, without a mode
        LIBRARY.impl(kernel, lambda *args, kernel=kernel, **kwargs: VirtualDevice.active.__torch_dispatch__(
            kernel, (), args, kwargs), "PrivateUse1")


@contextmanager
def gpu() -> Iterator[VirtualDevice]:
    """Switch the device on, as the one that the project finds best; its tensors are of no use afterwards."""
    with (torch.autograd.set_multithreading_enabled(False), VirtualDevice() as device,  # backward stays in this thread
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(VirtualDevice, "active", device)
        for name, module in list(sys.modules.items()):
            if name.startswith("src.") and hasattr(module, "best_device"):
                patch.setattr(module, "best_device", lambda: device.name)
        yield device
