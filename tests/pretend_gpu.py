"""A GPU that is not there: tensors that say they live on `cuda` and compute on the CPU. What a GPU forbids fails here too: an operation on tensors of both kinds, a draw on it from a
generator of the CPU, `.numpy()` of a tensor on it, operands of two types under autocast; and, in a step that is recorded, any look at a number and any copy to or from the CPU. It says nothing about speed or rounding."""
import contextlib
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

CUDA, CPU, aten = torch.device("cuda", 0), torch.device("cpu"), torch.ops.aten
CROSSING = {aten.copy_, aten._to_copy, aten._foreach_copy_}                         # take tensors of both devices
PLACES = {aten.index, aten.index_put, aten.index_put_}                              # may have places from the CPU
JOINING = {aten.cat, aten.stack}                                                    # not even numbers, tensors without dimensions, from the CPU
LOOKS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select}              # need numbers on the CPU: forbidden while recording
INNER = {F.one_hot, torch._C._nn.pad_sequence, torch.quantile, torch.Tensor.quantile}                      # inside, C++ makes tensors on the device that it sees

class Recording:
    "Whether a step is being recorded."
    on = False
    @classmethod
    @contextlib.contextmanager
    def set(cls, on):
        before, cls.on = cls.on, on
        try: yield
        finally: cls.on = before

def forbidden(what): raise RuntimeError(f"expected a step that leaves its numbers on the GPU while it is recorded, found {what}")

class Pretended(torch.Tensor):
    "`inner`, a tensor on the CPU, dressed as one on a GPU. Python sees a GPU, torch's C++ the CPU."
    device, is_cuda = property(lambda self: CUDA), property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        out = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=CPU)
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return compute(func, args, kwargs or {})
    def __format__(self, how): return format(self.item() if self.ndim == 0 else str(self), how)
    def __repr__(self):
        if Recording.on: forbidden("a tensor written as text")
        return f"pretended {self.inner!r}"

def has(kind, *trees): return any(isinstance(x, kind) for x in tree_flatten(trees)[0])

def stranger(func, args, kwargs, leaves):
    "Of all tensors that a GPU is given (`leaves`), the first of the CPU that it would not take beside its own."
    if func.overloadpacket in CROSSING: return None
    if func.overloadpacket in PLACES and isinstance(args[0], Pretended): leaves = tree_flatten((args[0], *args[2:], kwargs))[0]
    return next((x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Pretended) and (x.ndim or func.overloadpacket in JOINING)), None)

def crosses(args, kwargs):
    "Whether an operation takes tensors of both devices, or takes one to the other."
    kinds = {isinstance(x, Pretended) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor) and x.ndim}
    return len(kinds) > 1 or kinds == {False} and "cuda" in str(kwargs.get("device"))

def compute(func, args, kwargs):
    "One operation, on the inner tensors; what it makes is pretended where an operand is, or where `device` says so."
    leaves, tree = tree_flatten((args, kwargs))
    inside = any(isinstance(x, Pretended) for x in leaves)
    if inside and (other := stranger(func, args, kwargs, leaves)) is not None: raise RuntimeError(f"expected tensors on one device, found cuda and cpu {tuple(other.shape)} in {func}")
    if Recording.on and (func.overloadpacket in LOOKS or func.overloadpacket in CROSSING and crosses(args, kwargs)): forbidden(func)
    cuda = inside or "cuda" in str(kwargs.get("device"))      # beside a pretended one, C++ writes "cpu" and means its device
    for g in leaves:
        if isinstance(g, torch.Generator) and cuda: raise RuntimeError(f"expected a generator of cuda, found one of {g.device} in {func}")
    plain, named = tree_unflatten([x.inner if isinstance(x, Pretended) else x for x in leaves], tree)
    out = func(*plain, **{k: CPU if k == "device" and v is not None else v for k, v in named.items() if k != "pin_memory"})
    if func._schema.name.endswith("_") or "out" in kwargs: return kwargs.get("out", args[0]) if isinstance(out, torch.Tensor) else out
    return tree_map_only(torch.Tensor, Pretended, out) if cuda else out

class Sent(TorchDispatchMode):
    "Sends what is made on `cuda` to `compute`."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): return compute(func, args, kwargs or {})

class Leave(torch.autograd.Function):
    "From the pretended GPU to the CPU."
    @staticmethod
    def forward(ctx, x): return x.inner.clone()
    @staticmethod
    def backward(ctx, grad): return Pretended(grad)

def to(x, *args, dtype=None, device=None, **kind):
    "`Tensor.to` by the devices that Python sees."
    for a in args:
        if isinstance(a, torch.Tensor): device, dtype = a.device, a.dtype
        elif isinstance(a, torch.dtype): dtype = a
        elif isinstance(a, (str, torch.device)): device = torch.device(a)
    device, dtype = x.device if device is None else torch.device(device), dtype or x.dtype
    if device.type == x.device.type: return x if dtype == x.dtype and not kind.get("copy") else aten._to_copy(x, dtype=dtype)
    if device.type == "cuda" or not isinstance(x, Pretended): return aten._to_copy(x, dtype=dtype, device=device)          # to the GPU, or between others: "meta" has no numbers
    return Leave.apply(x).to(dtype)

class Rewritten(TorchFunctionMode):
    "What C++ would decide by the device that it sees."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to: return to(*args, **kwargs)
        if func is torch.Tensor.cpu: return to(args[0], CPU)
        if func is torch.Tensor.tolist: return to(args[0], CPU).tolist()
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None: return to(func(*args, **kwargs | {"device": None}), kwargs["device"])
        if func in INNER and has(Pretended, args):
            with Recording.set(False): return Pretended(func(*tree_map_only(Pretended, lambda x: x.inner, args), **kwargs))       # on a GPU it does not look
        return func(*args, **kwargs)

def captured(step):
    "A recorded step that is run each time, as strictly as it would be recorded."
    def play():
        with Recording.set(True): return step()
    return play

class Stream:
    "A queue that is no other than the one there is."
    def wait_stream(self, other): pass

@contextlib.contextmanager
def pretend_gpu(monkeypatch):
    "A `cuda` for all that runs inside."
    from disdiff_tutorial.diffusion import training
    monkeypatch.setattr(training, "captured", captured); monkeypatch.setattr(training, "aside", lambda step: step())
    quiet = dict(_lazy_init=lambda: None, is_available=lambda: True, get_device_name=lambda *a: "pretended", synchronize=lambda *a: None, empty_cache=lambda: None, reset_peak_memory_stats=lambda: None, max_memory_allocated=lambda: 0,
                 get_rng_state=lambda *a: torch.zeros(16, dtype=torch.uint8), set_rng_state=lambda *a: None, manual_seed_all=lambda seed: None, manual_seed=lambda seed: None, Stream=Stream, current_stream=Stream, stream=lambda s: contextlib.nullcontext())
    for name, value in quiet.items(): monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
    cast = torch.autocast                                                       # in half precision a CPU is forty times slower
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype=None, enabled=True: cast(kind, dtype=dtype, enabled=enabled and dtype is not torch.float16))
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)             # a parameter that moves becomes another one: they can't change their clothes
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu" if kind == "cuda" else kind, *args, **kwargs))
    with Sent(), Rewritten(): yield
