"""As much of Gluon as the kernels use, in numpy: partitions as threads, barriers, TMA, wgmma, shared memory full of NaN.

:func:`launcher` takes the place of a kernel. It runs the kernel's own Python functions, and every ``jit`` function that they
call, with ``gl``, ``tl``, ``hopper``, ``mbarrier``, ``barrier`` and ``copy_tile`` replaced by what is here. Layouts mean
nothing. What hardware leaves open is decided by a seeded generator, mostly for the worse:

- one partition runs at a time, and any may be next whenever one waits, arrives or copies;
- a copy leaves NaN where it goes, and its data comes at any time before somebody cannot go on without it;
- a product may read shared memory at any time until it is waited for: what has changed meanwhile is an error;
- warps of a partition are one thread here: what they need among themselves is for the machine code to show;
- what threads store is an error for the tensor core to read until their partition has made a fence.

All partitions waiting is a deadlock, and an error; so is an arrival too many.
"""

from __future__ import annotations

import random
import threading
import types

import numpy as np
import torch
import triton


class Fault(AssertionError):
    """The kernel broke the rules."""


class Dtype:
    """bf16 is held as the fp32 of the same value."""

    def __init__(self, name: str, holds):
        self.name, self.holds = name, np.dtype(holds)

    def of(self, values):
        values = np.asarray(values)
        if self.name == "bfloat16":
            values = torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().float().numpy()
        return values.astype(self.holds).view(Tensor)


_KINDS = ("int8", "int16", "int32", "int64", "uint32", "uint64", "float16", "float32")
DTYPES = {**{name: Dtype(name, name) for name in _KINDS}, "bfloat16": Dtype("bfloat16", "float32")}


class Tensor(np.ndarray):
    type = types.SimpleNamespace(layout=None)

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return np.asarray(array).view(Tensor)

    def to(self, dtype, bitcast=False):
        return self.view(dtype.holds) if bitcast else dtype.of(self)


def _fma(a, b, c):
    # 64 bits of mantissa hold the product of two 24; the sum is rounded twice, which is off once in 2^40
    wide = np.longdouble
    return (np.asarray(a, wide) * np.asarray(b, wide) + np.asarray(c, wide)).astype(np.float32).view(Tensor)


class Pointer:
    def __init__(self, tensor: torch.Tensor, at=0):
        self.tensor, self.at = tensor, at
        self.dtype = types.SimpleNamespace(element_ty=DTYPES[str(tensor.dtype).removeprefix("torch.")])

    def __add__(self, more):
        return Pointer(self.tensor, self.at + more)

    def _flat(self):
        return self.tensor.as_strided((self.tensor.untyped_storage().nbytes() // self.tensor.element_size(),), (1,), 0)

    def _where(self, mask):
        at = np.asarray(self.at) + self.tensor.storage_offset()
        return np.broadcast_to(at, np.shape(mask)) if mask is not None else at

    def load(self, mask=None, other=0.0):
        at = self._where(mask)
        inside = np.ones(np.shape(at), bool) if mask is None else np.asarray(mask)
        values = self._flat()[torch.from_numpy(np.where(inside, at, 0).astype(np.int64))]
        values = (values.float() if values.is_floating_point() else values).numpy()
        return self.dtype.element_ty.of(np.where(inside, values, other))

    def store(self, value, mask):
        at = torch.from_numpy(self._where(mask)[mask].astype(np.int64))
        self._flat()[at] = torch.from_numpy(np.asarray(value)[mask]).to(self.tensor.dtype)


class Descriptor:
    """A matrix that TMA copies tiles from."""

    def __init__(self, host):
        self.values = Pointer(host.base).dtype.element_ty.of(host.base.float().numpy())
        self.block, self.layout = tuple(host.block_shape), None
        self.block_type = types.SimpleNamespace(nbytes=2 * int(np.prod(self.block)))

    def tile(self, row, column):
        out = np.zeros(self.block, np.float32)
        part = self.values[row : row + self.block[0], column : column + self.block[1]]
        out[: part.shape[0], : part.shape[1]] = part
        return out


class Shared:
    """A buffer or a part of it. ``unfenced`` is of the whole: what threads have stored and not fenced, by its address."""

    def __init__(self, dtype, array, unfenced=None):
        self.dtype, self.array = dtype, array
        self.unfenced = {} if unfenced is None else unfenced

    @property
    def key(self):
        return self.array.__array_interface__["data"][0]

    def _part(self, array):
        return Shared(self.dtype, array, self.unfenced)

    def index(self, i):
        assert 0 <= i < len(self.array)
        return self.array[i] if self.array.dtype == object else self._part(self.array[i])

    def slice(self, start, length):
        return self._part(self.array[start : start + length])

    def permute(self, order):
        return self._part(self.array.transpose(order))

    def load(self, layout):
        return self.array.copy().view(Tensor)

    def store(self, value):
        if value.shape != self.array.shape or not np.array_equal(self.dtype.of(value), value, equal_nan=True):
            raise Fault(f"a tile of {value.shape} that is not {self.dtype.name} is stored in {self.array.shape}")
        self.array[...] = value
        _current().unfenced.append((self.unfenced, self.key))
        self.unfenced[self.key] = self.array.size


class Barrier:
    def __init__(self):
        self.count = self.pending = self.bytes = self.phase = 0

    def arrive(self, count=0, more_bytes=0):
        self.pending -= count
        self.bytes += more_bytes
        if self.pending < 0:
            raise Fault("an arrival too many")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class Product:
    """An accumulator and the products that run."""

    def __init__(self, value, running):
        self.value, self.running = value, running


class Partition(threading.Thread):
    def __init__(self, program, fn, args):
        super().__init__(daemon=True)
        self.program, self.fn, self.args = program, fn, args
        self.go, self.ready, self.unfenced, self.error, self.done = threading.Semaphore(0), None, [], None, False

    def run(self):
        self.go.acquire()
        try:
            if not self.program.stopped:
                self.fn(*self.args)
        except BaseException as error:  # it is raised where the program was started
            self.error = error
        self.done = True
        self.program.back.release()

    def pause(self, ready=None):
        """Let others run, and go on when ``ready()``."""
        self.ready = ready
        self.program.back.release()
        self.go.acquire()
        if self.program.stopped:
            raise Fault("stopped")


def _current() -> Partition:
    return threading.current_thread()


class Program:
    """One program of a grid: what its partitions do, in an order drawn from ``seed``."""

    def __init__(self, seed):
        self.draw, self.back, self.copies, self.stopped = random.Random(seed), threading.Semaphore(0), [], False

    def specialize(self, partitions, warps, registers):
        threads = [Partition(self, fn, args) for fn, args in partitions]
        for thread in threads:
            thread.start()
        try:
            while alive := [t for t in threads if not t.done]:
                able = [t for t in alive if t.ready is None or t.ready()]
                if not able and not self.copies:
                    raise Fault("deadlock: every partition waits")
                chosen = self.draw.choice(able + self.copies)
                if chosen in self.copies:
                    self.copies.remove(chosen)
                    chosen()
                    continue
                chosen.go.release()
                self.back.acquire()
                if chosen.error is not None:
                    raise chosen.error
        finally:
            self.stopped = True
            for thread in threads:
                thread.go.release()


def _wait(barrier, phase):
    _current().pause(lambda: barrier.phase & 1 != phase)


def _arrive(barrier, count=1, pred=True):
    _current().pause()
    if pred:
        barrier.arrive(count)


def _init(barrier, count):
    barrier.count = barrier.pending = count


def _expect(barrier, nbytes):
    _current().pause()
    barrier.arrive(1, nbytes)


def _copy(desc, at, barrier, to):
    _current().pause()
    tile, to.array[...] = desc.tile(*map(int, at)), np.nan

    def land():
        to.array[...] = tile
        barrier.arrive(0, -desc.block_type.nbytes)

    _current().program.copies.append(land)


def _fence():
    # by the thread that starts the program, for barriers alone
    for unfenced, key in getattr(_current(), "unfenced", ()):
        unfenced.pop(key, None)
    if isinstance(_current(), Partition):
        _current().unfenced.clear()


def _mma(a, b, acc, is_async):
    for operand in (a, b):
        first = operand.key
        if any(first <= key < first + operand.array.nbytes for key in operand.unfenced):
            raise Fault("the tensor core reads what no fence has passed")
    value, running = (acc.value, acc.running) if isinstance(acc, Product) else (acc, [])
    return Product(value, [*running, (a.array, b.array, a.array.copy(), b.array.copy())])


def _mma_wait(outstanding, deps):
    (product,) = deps
    _current().pause()
    value, running = product.value, list(product.running)
    while len(running) > outstanding:
        a, b, *before = running.pop(0)
        if not all(np.array_equal(now, then, equal_nan=True) for now, then in zip((a, b), before, strict=True)):
            raise Fault("what the tensor core reads changed while it ran")
        value = (value + (a @ b).view(np.ndarray)).astype(np.float32)
    return Product(value.view(Tensor), running) if running else value.view(Tensor)


def _shared(dtype, shape, layout):
    if dtype is DTYPES["int64"]:
        ring = np.empty(shape[0], object)
        ring[:] = [Barrier() for _ in range(shape[0])]
        return Shared(dtype, ring)
    return Shared(dtype, np.full(shape, np.nan, np.float32))


def _language(program, index):
    def to_tensor(value):
        return np.asarray(value).view(Tensor)

    def join(a, b):
        return to_tensor(np.stack(np.broadcast_arrays(a, b), axis=-1))

    def nothing(*_):
        return None

    own = dict(
        static_range=range, constexpr=None, fma=_fma, join=join,
        where=lambda c, a, b: to_tensor(np.where(c, a, b)),
        reshape=lambda x, shape: x.reshape(shape), permute=lambda x, order: x.transpose(order),
        split=lambda x: (x[..., 0], x[..., 1]),
        arange=lambda first, last, layout=None: to_tensor(np.arange(first, last, dtype=np.int32)),
        zeros=lambda shape, dtype, layout=None: dtype.of(np.zeros(shape)),
        full=lambda shape, value, dtype, layout=None: dtype.of(np.full(shape, value)),
        load=lambda pointer, mask=None, other=0.0: pointer.load(mask, other),
        store=lambda pointer, value, mask: pointer.store(value, mask),
        program_id=lambda axis: to_tensor(np.int32(index)),
        allocate_shared_memory=_shared, warp_specialize=program.specialize,
        BlockedLayout=nothing, SliceLayout=nothing, NVMMADistributedLayout=nothing, SwizzledSharedLayout=nothing, **DTYPES,
    )  # fmt: skip
    language = types.SimpleNamespace(**own)
    hopper = types.SimpleNamespace(fence_async_shared=_fence, warpgroup_mma=_mma, warpgroup_mma_wait=_mma_wait)
    mbarrier = types.SimpleNamespace(init=_init, wait=_wait, arrive=_arrive, expect=_expect, MBarrierLayout=nothing)
    waiting = dict(barrier=lambda: _current().pause(), copy_tile=_copy)
    return dict(gl=language, tl=language, hopper=hopper, mbarrier=mbarrier, **waiting)


def _rebuilt(function, modules, done):
    """The Python function of a ``jit`` function, in this world."""
    if function in done:
        return done[function]
    fn = function.fn
    known = dict(fn.__globals__) | modules
    done[function] = types.FunctionType(fn.__code__, known, fn.__name__, fn.__defaults__)
    for name in fn.__code__.co_names:
        value = known.get(name)
        if isinstance(value, triton.runtime.jit.JITFunction):
            known[name] = _rebuilt(value, modules, done)
        elif isinstance(value, triton.language.constexpr):
            known[name] = value.value
    return done[function]


def _argument(value, name, integers):
    if isinstance(value, torch.Tensor):
        return Pointer(value)
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    return np.asarray(value, np.int32).view(Tensor) if name in integers else value


#: What the kernel asks for a type of its own.
INTEGERS = ("site", "bias_site", "query")


class launcher:
    """``kernel[grid](...)`` on CPU tensors."""

    def __init__(self, kernel, seed: int = 0):
        self.kernel, self.seed, self.programs = kernel, seed, 0

    def __getitem__(self, grid):
        def launch(*args, num_warps, enable_fp_fusion, **kwargs):
            assert not enable_fp_fusion
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs | {"ASM": False}
            given = {name: _argument(value, name, INTEGERS) for name, value in given.items()}
            for index in range(grid[0]):
                program = Program(f"{self.seed} {index}")
                _rebuilt(self.kernel, _language(program, index), {})(**given)
                self.programs += 1

        return launch
