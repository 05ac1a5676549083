"""A whole training step as one CUDA graph: forwards, losses, g, clip, update, and the head's backward and optimiser.

A graph replays kernels with the addresses and host numbers of the capture, so each step the host compares all of them with what
the graph has (its key), brings the scalars that a schedule moves up to date, copies the batch in, and replays. A step with
another key, such as a short last batch, runs eagerly on the same kernels and the same stream; a key that comes
:data:`WARM_UP` times in a row is captured next. Those steps are steps of the run like any other.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .cuda_graphs import CudaGraphs

#: Eager steps with one key in a row before it is captured: the first checks the model, those after it load every kernel and
#: fill the allocator's caches.
WARM_UP = 3

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def may_be_left_out(hook: Callable) -> Callable:
    """Mark a hook that a replay, which calls none, may leave out: it does not keep a step from being captured."""
    hook.may_be_left_out = True
    return hook


def graphs_for(device: torch.device) -> CudaGraphs:
    """What captures on this device.

    Raises:
        ValueError: a device without CUDA graphs.
    """
    if device.type != "cuda":
        raise ValueError(
            f"capture=True makes a CUDA graph of the step, and the model is on {device.type!r}: leave it out"
        )
    return CudaGraphs(device)


class _Same:
    """Compares equal to one that holds the very same objects, at the same addresses where they are tensors."""

    def __init__(self, *objects) -> None:
        self.objects = objects
        self.places = tuple(o.data_ptr() if torch.is_tensor(o) else 0 for o in objects)

    def __eq__(self, other) -> bool:
        return (
            isinstance(other, _Same)
            and self.places == other.places
            and len(self.objects) == len(other.objects)
            and all(a is b for a, b in zip(self.objects, other.objects, strict=True))
        )

    __hash__ = None


def _settings(module: nn.Module) -> list:
    """What reads the numbers and words that a module of torch's or ours is set to, such as a dropout's p, and from where.

    A user's own module is left out, whatever class it runs as: what it counts would be another number at each step.
    """
    kind = getattr(type(module), "base", type(module))
    own = vars(module)
    names = [name for name, value in own.items() if name != "training" and name[0] != "_" and _is_setting(value)]
    if not names or not kind.__module__.startswith(("torch.nn.", "ezo_kernels.")):
        return []
    return [(operator.itemgetter(*names), own)]


def _is_setting(value) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_setting, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _read(settings: list) -> list:
    """What they are set to now; None if one of them is gone."""
    try:
        return [get(own) for get, own in settings]
    except KeyError:
        return [None]


def identity_of(loss_fn, problems: list[str]):
    """What tells one loss from another: its code, not the function object, which a loop may make anew each step."""
    if loss_fn is None:
        return None
    if isinstance(loss_fn, functools.partial):
        own = _Same(*loss_fn.args, *loss_fn.keywords.values())
        return identity_of(loss_fn.func, problems), tuple(loss_fn.keywords), own
    if isinstance(loss_fn, nn.Module):
        set_to = _read([setting for module in loss_fn.modules() for setting in _settings(module)])
        return _Same(loss_fn, *loss_fn.parameters(), *loss_fn.buffers()), loss_fn.training, set_to
    if isinstance(loss_fn, types.BuiltinFunctionType) and not isinstance(loss_fn.__self__, torch.Tensor):
        return _Same(loss_fn)
    if isinstance(loss_fn, types.FunctionType):
        if loss_fn.__closure__:
            names = ", ".join(loss_fn.__code__.co_freevars)
            problems.append(
                f"loss_fn closes over {names}, whose values a graph would keep for ever: pass them through "
                "functools.partial, or make it an nn.Module"
            )
        return loss_fn.__code__, _Same(*(loss_fn.__defaults__ or ()), *(loss_fn.__kwdefaults__ or {}).values())
    problems.append(
        f"loss_fn is a {type(loss_fn).__name__}, whose state on the host a replay would not see: pass a function "
        "or an nn.Module"
    )
    return _Same(loss_fn)


def refusals(opt) -> list[str]:
    """Why no step of this optimizer can be captured; empty if it can."""
    found = [] if getattr(opt, "head_optimizer", None) is None else opt.head_optimizer.refusals()
    for name, module in opt.model.named_modules():
        own = (hook for hooks in _HOOKS for hook in (getattr(module, hooks, None) or {}).values())
        if not all(getattr(hook, "may_be_left_out", False) for hook in own):
            found.append(f"{name or 'the model'!r} has hooks, which a replay would not call: remove them")
    for name, p in opt.model.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            found.append(f"{name!r} has gradient hooks, which a replay would not call: remove them")
    if torch.is_autocast_enabled(opt.device.type) and torch.is_autocast_cache_enabled():
        found.append("autocast keeps its casts of weights on the host: torch.autocast(..., cache_enabled=False)")
    return found


def refuse(problems: list[str]) -> None:
    """Raise NotImplementedError with all of ``problems``, if there are any."""
    if problems:
        raise NotImplementedError("this step cannot be captured: " + "; ".join(problems))


def _flatten(inputs: tuple, loss_fn) -> tuple[list, object]:
    """The leaves of a step's inputs, and what puts them together again.

    Of tensors, the loss and an empty dict, as most steps have, without torch's walk over the tree: a replay is short.
    """
    if all(type(i) is torch.Tensor or i is loss_fn or i is None or (type(i) is dict and not i) for i in inputs):
        return [i for i in inputs if type(i) is not dict], tuple(type(i) is dict for i in inputs)
    return pytree.tree_flatten(inputs)


def _unflatten(leaves: list, spec) -> list:
    if type(spec) is not tuple:
        return pytree.tree_unflatten(leaves, spec)
    rest = iter(leaves)
    return [{} if empty else next(rest) for empty in spec]


def _signature(leaf, problems: list[str]):
    if not torch.is_tensor(leaf):
        if leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
            return type(leaf), leaf
        problems.append(f"an argument is a {type(leaf).__name__}, whose state on the host a replay would not see")
        return _Same(leaf)
    return leaf.shape, leaf.dtype, leaf.stride(), leaf.device


@dataclass
class _Candidate:
    """A key on its way to being captured, with the inputs that its steps read."""

    key: tuple
    inputs: list
    steps: int = 0
    results: tuple = ()


#: Bytes between two results that lie together.
_GAP = 64


class _Results:
    """What a step leaves, in one piece of memory, so that one launch writes it and one copies it.

    Results that lie together already, as an integer step's do, stay where they are, which saves the first of these launches.

    Args:
        what: dtype and shape of each; where they are not all of one dtype, those of 8 bytes first.
    """

    def __init__(self, what: tuple, device: torch.device) -> None:
        dtypes = {dtype for dtype, _ in what}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
        self.what = what
        self.sizes = [torch.Size(shape).numel() * dtype.itemsize // self.dtype.itemsize for dtype, shape in what]
        self.memory = torch.empty(sum(self.sizes), dtype=self.dtype, device=device)
        self.places: list[slice] | None = None

    def write(self, results: tuple) -> None:
        if not self._stay(results):
            torch.cat([t.reshape(-1).view(self.dtype) for t in results], out=self.memory)

    def _stay(self, results: tuple) -> bool:
        """Whether the results lie together: then their memory is the one that is read."""
        starts = [t.storage_offset() * t.itemsize for t in results]
        first, last = min(starts), max(a + t.nbytes for a, t in zip(starts, results, strict=True))
        near = last - first <= sum(t.nbytes for t in results) + _GAP * len(results)
        whole = all(t.is_contiguous() and (a - first) % t.itemsize == 0 for a, t in zip(starts, results, strict=True))
        if not (near and whole and len({t.untyped_storage()._cdata for t in results}) == 1):
            return False
        self.dtype = torch.uint8
        self.memory = results[0].reshape(-1).view(torch.uint8).as_strided((last - first,), (1,), first)
        self.places = [slice(a - first, a - first + t.nbytes) for a, t in zip(starts, results, strict=True)]
        return True

    def read(self) -> list[torch.Tensor]:
        """A copy, so that a loss that the user keeps does not change with the next step."""
        memory = self.memory.clone()
        parts = memory.split_with_sizes(self.sizes) if self.places is None else [memory[at] for at in self.places]
        if self.dtype == torch.uint8:
            parts = [part.view(dtype) for part, (dtype, _) in zip(parts, self.what, strict=True)]
        return [
            part if len(shape) == 1 else part.view(shape) for part, (_, shape) in zip(parts, self.what, strict=True)
        ]


class CapturedStep:
    """Replays the step of one optimizer, which offers it:

    ``_eager(*inputs)`` the step; ``_fill_scalars()`` host numbers to device scalars; ``_baked()`` the host numbers and
    ``_held()`` the tensors beside the model's that a graph keeps; ``_looks()`` whether a step would look at values, as a check
    that has not passed yet does; ``_tables()`` what a step makes anew when parameters have
    moved, and a graph reads where it was; ``_results(loss)`` the tensors that a step leaves, 8-byte dtypes first;
    ``_took(results)`` takes them over.

    Attributes:
        captures, replays, eager_steps: how often each happened.
    """

    def __init__(self, graphs) -> None:
        self._graphs = graphs
        self.captures = self.replays = self.eager_steps = 0
        self._graph, self._key, self._inputs, self._out = None, None, [], None
        self._kept = None
        self._candidate: _Candidate | None = None
        self._slots: list | None = None
        self._modules: list = []
        self._settings: list = []

    def __getstate__(self) -> dict:
        return {"graphs": self._graphs}  # a copy has tensors of its own: it captures anew

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["graphs"])

    def counters(self) -> dict[str, int]:
        return {"captures": self.captures, "replays": self.replays, "eager_steps": self.eager_steps}

    def _where(self, opt) -> tuple:
        """Addresses of everything that lives longer than a step, read from where the modules keep it, and dtypes: a model that
        was cast twice may lie where it was. And what torch's modules and ours are set to.
        """
        if self._slots is None:
            self._modules = list(opt.model.modules())
            self._settings = [setting for m in self._modules for setting in _settings(m)]
            self._slots = [
                (table.get, n) for m in self._modules for table in (m._parameters, m._buffers) for n in table
            ]
        own = [None if (t := get(name)) is None else (t.data_ptr(), t.dtype) for get, name in self._slots]
        held = [t.data_ptr() for t in opt._held()]
        return own, held, [m.training for m in self._modules], _read(self._settings)

    def step(self, opt, loss_fn, *inputs) -> torch.Tensor:
        """The step ``opt._eager(*inputs)``, by replay if all is as it was captured.

        Raises:
            NotImplementedError: a step that cannot be captured, with every reason.
            RuntimeError: the capture failed, with torch's reason. Either way nothing has changed.
        """
        leaves, spec = _flatten(inputs, loss_fn)
        problems: list[str] = []
        cast = torch.is_autocast_enabled(opt.device.type), torch.get_autocast_dtype(opt.device.type)
        signatures = [_signature(leaf, problems) for leaf in leaves if leaf is not loss_fn]
        key = (spec, signatures, identity_of(loss_fn, problems), cast, opt._baked(), self._where(opt))
        if self._graph is not None and key == self._key:
            self._candidate = None
            return self._replay(opt, leaves)
        candidate = self._candidate
        if candidate is None or candidate.key != key:
            problems += refusals(opt)
            away = sorted({str(leaf.device) for leaf in leaves if torch.is_tensor(leaf) and leaf.device != opt.device})
            if away:
                problems.append(f"tensors of the batch are on {', '.join(away)} and the model on {opt.device}")
            refuse(problems)
            static = [leaf.detach().clone() if torch.is_tensor(leaf) else leaf for leaf in leaves]
            candidate = self._candidate = _Candidate(key, static)
        else:
            _copy(candidate.inputs, leaves)
        if candidate.steps < WARM_UP or opt._looks():
            with self._graphs.stream():
                loss = opt._eager(*_unflatten(candidate.inputs, spec))
            candidate.steps += 1
            candidate.results = tuple((t.dtype, tuple(t.shape)) for t in opt._results(loss))
            self.eager_steps += 1
            return loss
        refuse(refusals(opt))
        self._capture(opt, candidate, spec)
        return self._replay(opt, leaves)

    def _capture(self, opt, candidate: _Candidate, spec) -> None:
        self.drop()
        opt._fill_scalars()
        results = _Results(candidate.results, opt.device)
        held = opt._results(None)

        def run() -> None:
            results.write(opt._results(opt._eager(*_unflatten(candidate.inputs, spec))))

        try:
            self._graph = self._graphs.record(run)
        except Exception as error:
            self._candidate = None
            raise RuntimeError(
                f"the step could not be captured: {error}. Does the model or the loss wait for the device (.item(), "
                "printing, indexing by a mask)? capture=False runs it eagerly"
            ) from error
        finally:
            opt._took(held)  # tensors of the graph's own memory are not for users
        self._key, self._inputs, self._out = candidate.key, candidate.inputs, results
        self._candidate, self._kept = None, opt._tables()
        self.captures += 1

    def _replay(self, opt, leaves) -> torch.Tensor:
        opt._fill_scalars()
        _copy(self._inputs, leaves)
        with opt._phase("replay"):
            self._graph.replay()
        self.replays += 1
        results = self._out.read()
        opt._took(results)
        return results[0]

    def drop(self) -> None:
        """Forget the graph; its memory goes back."""
        if self._graph is not None:
            self._graphs.drop(self._graph)
        self._graph, self._key, self._inputs, self._out, self._kept = None, None, [], None, None


def _copy(static: list, leaves: list) -> None:
    with torch.no_grad():
        for mine, leaf in zip(static, leaves, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(leaf, non_blocking=True)
