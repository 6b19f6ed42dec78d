"""Pretended graphics cards: tensors that say they lie on `cuda:0` or `cuda:1` and compute on the CPU.

    with PretendedCards() as cards:
        model = move(model, 0)
        loss = model(x.to("cuda:0")).sum()
        loss.backward()
    print(cards.synchronisations)

Three things can be seen in this way without a card: an operation that mixes devices (it raises, as
CUDA does), a value that lands on the wrong device, and a step in which the CPU waits for a card.
The values are real, so branches that depend on them and results are those of the CPU.

What cannot be seen: kernels that a card has not got, memory, time, and rounding.
"""

from collections import Counter

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")

# Operations whose result depends on values, so that the CPU has to wait for the card.
WAITING = {
    "aten::_local_scalar_dense",  # item(), bool(), int(), float()
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}
INDEXING = {
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}
COPYING = {"aten::_to_copy", "aten::copy_", "aten::copy", "aten::_copy_from"}
# Operations that accept no number on the CPU beside tensors on a card.
STRICT = {"aten::cat", "aten::stack", "aten::mm", "aten::addmm", "aten::bmm"}


def card(index=0):
    "The device of a pretended card."
    return torch.device("cuda", index)


# A torch that was built for the CPU alone has no code for devices of the type `cuda`. Inside of
# torch, card 1 is therefore `meta:1`, a device that computes nothing; Python is shown `cuda:1`.
# Placeholders of accelerate lie on `meta`, without an index, and stay what they are.


def _shown(device):
    "The device as Python is to see it."
    device = torch.device(device)
    if device.type == "meta" and device.index is not None:
        return card(device.index)
    return card(0) if device == torch.device("cuda") else device


class PretendedTensor(torch.Tensor):
    "A tensor that says it lies on a card; `values` is the tensor on the CPU that it stands for."

    values: torch.Tensor
    # results are what `PretendedCards` makes of them, and no subclass by themselves
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values, device):
        pretended = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device("meta", device.index),
        )
        pretended.values = values
        return pretended

    def __repr__(self):
        return f"PretendedTensor({self.values}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError("use pretended tensors inside of `with PretendedCards()`")

    @property
    def device(self):
        return _shown(torch.Tensor.device.__get__(self))

    @property
    def is_cuda(self):
        return True

    @property
    def is_meta(self):
        return False

    def get_device(self):
        return self.device.index

    def tolist(self):
        return self.cpu().tolist()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        # torch's own setter would exchange the outside alone, and not `values`
        if not isinstance(new, PretendedTensor) or new.device != self.device:
            raise RuntimeError(
                f"data on {self.device} replaced by data on {new.device}"
            )
        torch.Tensor.data.__set__(self, new)
        self.values = new.values

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone()
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]


def _is_number(tensor):
    "Whether CUDA takes this tensor as a plain number: no axes, and on the CPU."
    return tensor.dim() == 0 and tensor.device == CPU


def _check_devices(name, args, tensors):
    "Raise what CUDA raises for tensors of several devices."
    if name in COPYING:
        return
    if name in INDEXING:
        home = args[0].device
        indices = [index for index in args[1] if index is not None]
        found = {index.device for index in indices} - {home, CPU}
        if found:
            raise RuntimeError(
                f"{name}: indices should be either on cpu or on the same device as the "
                f"indexed tensor ({home}), found {sorted(map(str, found))}"
            )
        tensors = [t for t in tensors if not any(t is index for index in indices)]
    if name not in STRICT:
        tensors = [tensor for tensor in tensors if not _is_number(tensor)]
    found = {str(tensor.device) for tensor in tensors}
    if len(found) > 1:
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, but found "
            f"{sorted(found)}"
        )


def _reason_to_wait(name, args, result_device):
    "Why the CPU waits for a card in this operation; None if it does not."
    if name in WAITING:
        return name
    if name in INDEXING:
        fills = len(args) > 2 and _is_number(args[2])  # becomes a masked_fill
        indices = [index for index in args[1] if index is not None]
        chosen_by_mask = any(index.dtype == torch.bool for index in indices)
        return f"{name} by a mask" if chosen_by_mask and not fills else None
    if name in COPYING and result_device == CPU:
        return "copied from a card"
    return None


def _result_device(args, kwargs, name, pretended):
    "Where the result of an operation lies."
    if kwargs.get("device") is not None:
        return _shown(kwargs["device"])
    if name == "aten::copy_":
        return args[0].device
    return pretended[0].device if pretended else CPU


def _values(value):
    return value.values if isinstance(value, PretendedTensor) else value


def _number_or_same(value):
    return value.item() if isinstance(value, PretendedTensor) else value


class PretendedCards(TorchDispatchMode):
    """While it is open, `.to("cuda:1")` and `device="cuda:1"` give pretended tensors.

    `synchronisations` counts by reason how often the CPU waited for a card, and `uploads` how
    many tensors were copied from the CPU to a card.
    """

    def __enter__(self):
        self._lazy_init = torch.cuda._lazy_init
        torch.cuda._lazy_init = lambda: None  # else torch looks for a driver
        self._tensor = torch.tensor
        torch.tensor = self._tensor_of_numbers
        self._capability = torch.cuda.get_device_capability
        torch.cuda.get_device_capability = lambda device=None: (7, 0)  # no grouped_mm
        self._memory = torch.cuda.mem_get_info
        torch.cuda.mem_get_info = lambda device=None: (10**12, 10**12)  # free, all
        # `torch.tensor(…, device="cuda")` makes a tensor on the CPU, and then moves it
        torch._C._set_only_lift_cpu_tensors(True)
        self.reset()
        return super().__enter__()

    def __exit__(self, *error):
        torch.cuda._lazy_init = self._lazy_init
        torch.tensor = self._tensor
        torch.cuda.get_device_capability = self._capability
        torch.cuda.mem_get_info = self._memory
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def _tensor_of_numbers(self, data, **options):
        "`torch.tensor`, which asks for the numbers of tensors in a list past all modes."
        if isinstance(data, list):
            data = tree_map(_number_or_same, data)
        return self._tensor(data, **options)

    def reset(self):
        "Begin to count anew."
        self.synchronisations = Counter()
        self.uploads = 0

    @property
    def waits(self):
        "How often the CPU waited for a card."
        return self.synchronisations.total()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        leaves, _ = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        pretended = [t for t in tensors if isinstance(t, PretendedTensor)]
        device = _result_device(args, kwargs, name, pretended)
        if pretended:
            _check_devices(name, args, tensors)
            reason = _reason_to_wait(name, args, device)
            if reason is not None:
                self.synchronisations[reason] += 1
        if name in COPYING and device != CPU:
            self.uploads += any(t.device == CPU and t.dim() > 0 for t in tensors)

        on_cpu = tree_map(_values, kwargs)
        if device.type == "cuda" and kwargs.get("device") is not None:
            on_cpu["device"] = CPU
        if on_cpu.get("pin_memory"):
            on_cpu["pin_memory"] = False
        values = tree_map(_values, args)
        if name == "aten::histc" and not values[0].is_floating_point():
            # a card counts whole numbers, a CPU does not
            result = function(values[0].float(), *values[1:], **on_cpu).to(values[0])
        else:
            result = function(*values, **on_cpu)

        # An operation in place, or with `out=`, returns the tensor that it was given.
        given = {id(tensor.values): tensor for tensor in pretended}

        def as_on_card(value):
            if not isinstance(value, torch.Tensor) or device.type != "cuda":
                return value
            return given.get(id(value), PretendedTensor(value, device))

        return tree_map(as_on_card, result)


def place(model, index_of):
    """Move the parameters and buffers of a model to pretended cards, and return the model.

    `index_of(name of the module)` is the index of its card. Tied weights stay tied. Call it
    inside of `with PretendedCards()`.
    """
    moved = {}  # parameter → the same on a card
    for name, module in model.named_modules():
        device = card(index_of(name))
        for key, weight in module._parameters.items():
            if weight is None:
                continue
            if weight not in moved:
                new = weight.detach().clone().to(device)
                moved[weight] = nn.Parameter(new, weight.requires_grad)
            module._parameters[key] = moved[weight]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.clone().to(device)
    return model


def move(model, index=0):
    "Move a whole model to one card."
    return place(model, lambda name: index)


def spread(model, second):
    """Put the named modules on card 1 and the rest on card 0, as `device_map` does it.

    The hooks are accelerate's: a module on card 1 gets its inputs there, and its output comes
    back to the card that its input came from.
    """
    inside = tuple(f"{name}." for name in second)

    def index_of(name):
        return int(f"{name}.".startswith(inside))

    place(model, index_of)
    for name in second:
        hook = AlignDevicesHook(execution_device=card(1), io_same_device=True)
        add_hook_to_module(model.get_submodule(name), hook)
    top = AlignDevicesHook(execution_device=card(0), io_same_device=True)
    add_hook_to_module(model, top)
    model.hf_device_map = {"": 0} | dict.fromkeys(second, 1)
    return model


def values_of(model):
    "The state of a model on the CPU, by name."
    return {name: _values(tensor) for name, tensor in model.state_dict().items()}
