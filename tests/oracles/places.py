"""Pretended devices: tensors on the CPU that carry the name of another one, and refuse to be mixed as there."""

import functools
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bmoe_lightning.laplace import predictive

_CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "full", "arange", "eye", "tensor", "as_tensor", "rand", "randn", "randint")
_NEW = ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")
_LIKE = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like")
# Operations with indices, which may be on the CPU whatever they point into.
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
_ANSWERS = ("tolist", "item", "__bool__", "__float__", "__int__")


class PretendedDevices(TorchDispatchMode):
    """While it is entered, tensors may be on `cuda:0`, `cuda:1`, ...: `.to` takes them there, `.device` says so.

    An operation on tensors of different devices raises, as CUDA has it: tensors without dimensions on the CPU, indices
    on the CPU and `copy_` are exempt. `.numpy()` is refused elsewhere than on the CPU. Gradients cross where `.to` did.

    Attributes:
        waits: how often an answer was taken from a device.
    """

    def __init__(self):
        super().__init__()
        self.waits = 0
        self._places = {}
        self._kept = []  # storages, so that no address is used twice
        self._patches = []
        self._device_of = torch.Tensor.device.__get__

    def place(self, tensor):
        """Where a tensor is."""
        return self._places.get(tensor.untyped_storage()._cdata, _CPU)

    def put(self, tensor, device):
        """Say where a tensor, a parameter for instance, is from now on."""
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        self._places[storage._cdata] = torch.device(device)
        return tensor

    def put_module(self, module, device):
        """Say where a module's parameters and buffers are; what enters it is sent there, as accelerate does it."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.put(tensor, device)

        def sent(_module, args, kwargs):
            args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), (args, kwargs))
            return args, kwargs

        return module.register_forward_pre_hook(sent, with_kwargs=True, prepend=True)

    def __enter__(self):
        predictive._noise_cache.clear()  # the place of a tensor from an earlier context is unknown here
        self._patch(torch.Tensor, "device", property(self.place))
        self._patch(torch.Tensor, "to", self._to(torch.Tensor.to))
        self._patch(torch.Tensor, "cpu", lambda tensor: self.moved(tensor, _CPU))
        self._patch(torch.Tensor, "cuda", lambda tensor, index=0: self.moved(tensor, torch.device("cuda", index)))
        self._patch(torch.Tensor, "numpy", self._only_on_cpu(torch.Tensor.numpy))
        self._patch(torch, "Generator", self._generator(torch.Generator))
        for owner, names in ((torch, _FACTORIES + _LIKE), (torch.Tensor, _NEW)):
            for name in names:
                self._patch(owner, name, self._made(getattr(owner, name)))
        return super().__enter__()

    def __exit__(self, *error):
        result = super().__exit__(*error)
        while self._patches:
            self._patches.pop().stop()
        return result

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        result = function(*args, **(kwargs or {}))
        if name == "_local_scalar_dense":
            self.waits += self.place(args[0]) != _CPU
            return result
        device = self._common(name, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._places:
                self.put(tensor, device)
        return result

    def _common(self, name, args, kwargs):
        indices = set()
        if name in _INDEXED:
            indices = {id(x) for x in tree_leaves(args[1])}
        if name == "copy_":
            return self.place(args[0])
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        places = [
            (self.place(x), x) for x in tensors if not (self.place(x) == _CPU and (x.dim() == 0 or id(x) in indices))
        ]
        found = {place for place, _ in places}
        if len(found) > 1:
            listed = ", ".join(f"{place} {tuple(x.shape)}" for place, x in places)
            raise RuntimeError(f"expected all tensors of aten.{name} to be on the same device, but found {listed}")
        return found.pop() if found else _CPU

    def moved(self, tensor, device):
        """A tensor on another device; the same one if it is there."""
        return tensor if self.place(tensor) == device else _Moved.apply(tensor, device, self)

    def _patch(self, owner, name, value):
        patch = mock.patch.object(owner, name, value)
        patch.start()
        self._patches.append(patch)

    def _to(self, own):
        @functools.wraps(own)
        def to(tensor, *args, **kwargs):
            device = kwargs.pop("device", None)
            args = list(args)
            if args and isinstance(args[0], torch.Tensor):
                like = args.pop(0)
                device, args = self.place(like), [like.dtype, *args]
            elif args and (args[0] is None or isinstance(args[0], (str, torch.device))):
                device = args.pop(0)
            moved = tensor if device is None else self.moved(tensor, torch.device(device))
            return own(moved, *args, **kwargs) if args or kwargs.get("dtype") else moved

        return to

    def _made(self, own):
        @functools.wraps(own)
        def make(*args, device=None, **kwargs):
            made = own(*args, **kwargs)
            return made if device is None else self.put(made, device)

        return make

    def _only_on_cpu(self, own):
        @functools.wraps(own)
        def numpy(tensor, *args, **kwargs):
            if self.place(tensor) != _CPU:
                raise TypeError(f"cannot convert a tensor on {self.place(tensor)} to numpy; copy it to the CPU first")
            return own(tensor, *args, **kwargs)

        return numpy

    @staticmethod
    def _generator(own):
        return lambda device="cpu": own("cpu")


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, device, devices):
        ctx.source, ctx.devices = devices.place(tensor), devices
        devices.waits += device == _CPU
        return devices.put(tensor.detach().clone(), device)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.devices.put(gradient.clone(), ctx.source), None, None
