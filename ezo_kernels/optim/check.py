"""What a first step checks: every trunk parameter is perturbed wherever it is used, nothing else is random, rows are apart.

What it cannot accept it names, before anything has changed. A step is a first one again where modules have gone from train to
eval or back, and for the rows where a batch has other shapes.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections import Counter

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

#: Tensor methods that give a tensor without reading the values of the one they are called on.
SHAPE_ONLY = {
    "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided", "empty_like", "zeros_like",
    "ones_like", "full_like", "rand_like", "randn_like",
}  # fmt: skip


class Checks:
    """What has been looked at: a model in which modes of its modules, and stacked batches of which shapes.

    Attributes:
        off: nothing is looked at any more.
    """

    def __init__(self, model: nn.Module) -> None:
        self.off = False
        self._modules = list(model.modules())
        self._modes: tuple[bool, ...] = ()
        self._known: dict[tuple, tuple] = {}  # each once, however many batches refer to it
        self._forwards: set[tuple] = set()
        self._batch: tuple = ()
        self._drawn: tuple = ()
        self._rows: set[tuple] = set()
        self._apart: set[tuple] = set()
        self._shared: dict[tuple, list] = {}
        self._copied: set[tuple] = set()
        self._compiled = False

    def begin(self) -> None:
        """A step begins."""
        modes = tuple(module.training for module in self._modules)
        self._modes = self._known.setdefault(modes, modes)
        self._drawn = ()

    def stacked(self, batch, groups: int) -> None:
        """Its batch runs as one, ``groups`` times."""
        self._batch = self._kind(batch, groups)
        if self.rows_are_new:
            self._compiled |= any(map(_is_compiled, self._modules))

    @property
    def may_share(self) -> bool:
        """Whether all groups may be given one batch of this kind, for all that is known; compiled code is not heard."""
        return self._batch not in self._copied and not self._compiled

    def shares(self, asked: list) -> None:
        """A pass whose groups were given one batch of this kind is right; its layers ``asked`` this."""
        self._shared[self._batch] = asked

    def as_before(self, zo) -> bool:
        """Whether the layers of such a pass asked what those of the first one did."""
        self._compiled |= zo.unheard
        return not zo.unheard and (self._batch not in self._shared or zo.asked == self._shared[self._batch])

    def copy(self) -> None:
        """Each group has its own copy of such a batch from now on."""
        self._copied.add(self._batch)

    def drawn(self, batch) -> None:
        """Its rows are drawn of this batch."""
        self._drawn = self._kind(batch, 0)

    def _kind(self, batch, groups: int) -> tuple:
        leaves = pytree.tree_leaves(batch)
        shapes = tuple(leaf.shape if isinstance(leaf, torch.Tensor) else None for leaf in leaves)
        return groups, shapes, self._modes

    @property
    def forward_is_new(self) -> bool:
        """Whether no step has checked the model as it is now."""
        return not self.off and self._modes not in self._forwards

    @property
    def rows_are_new(self) -> bool:
        """Whether no stacked pass of such a batch has been compared with its groups one by one."""
        return not self.off and (not self._batch or self._batch not in self._rows)

    @property
    def draws_are_new(self) -> bool:
        """Whether no rows that were drawn of such a batch have been compared with themselves among the others."""
        return not self.off and bool(self._drawn) and self._drawn not in self._rows

    @property
    def apart_is_new(self) -> bool:
        """Whether no batch of the model as it is now has been compared with a part of itself."""
        return not self.off and self._modes not in self._apart

    def apart_passed(self) -> None:
        self._apart.add(self._modes)

    def forward_passed(self) -> None:
        self._forwards.add(self._modes)

    def rows_passed(self) -> None:
        self._rows.add(self._batch)

    def draws_passed(self) -> None:
        self._rows.add(self._drawn)


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was told of it."""
    return module._compiled_call_impl is not None or "_torchdynamo_orig_callable" in vars(module)


class Places:
    """Where a model keeps some of its parameters, to see at each step that they are still its own.

    Those of the ``trunk`` (by all their names) must be what their layers read, too: a weight that is computed from one (pruned,
    parametrized) would be perturbed in its place. The ``head`` learns by autograd, through whatever is computed.
    """

    _trunk: dict[str, nn.Parameter] = {}  # noqa: RUF012 - of one that was pickled before it was kept

    def __init__(self, model: nn.Module, trunk: dict[str, nn.Parameter], head: dict[str, nn.Parameter]) -> None:
        slots, names = {}, {**trunk, **head}
        self._trunk = trunk
        for name, p in names.items():
            module, (*path, leaf) = model, name.split(".")
            for part in path:
                slots[id(module), part] = module._modules, part, module._modules[part]
                module = module._modules[part]
            slots[id(module), leaf] = module._parameters, leaf, p
        self._names, self._slots = names, list(slots.values())

    def require(self, model: nn.Module, whose: str) -> None:
        """Refuse a model that has another parameter in the place of one."""
        if all(table.get(name) is held for table, name, held in self._slots):
            return
        now = dict(model.named_parameters(remove_duplicate=False))
        own = {id(p) for p in now.values()}  # it may have another name: of a module that was wrapped
        for name, p in self._names.items():
            if id(p) not in own or (name in self._trunk and now.get(name, p) is not p):
                raise ValueError(f"{name!r} was replaced by another Parameter: make a new {whose}")
        read, reads = _leaves(now), _leaves(self._trunk)
        for name, p in self._trunk.items():
            leaf = id(p), name.rpartition(".")[2]
            if read[leaf] < reads[leaf]:
                raise ValueError(
                    f"a layer of {name!r} was pruned, parametrized or taken out since convert_, and what is computed of it "
                    "would be perturbed in its place: undo that, or unconvert_ the model and convert_ it anew, as it is now"
                )


def _leaves(names: dict[str, nn.Parameter]) -> Counter:
    """How often each parameter is held under each last part of a name."""
    return Counter((id(p), name.rpartition(".")[2]) for name, p in names.items())


def eagerly(now: bool):
    """A context in which nothing is compiled, if ``now``: a check looks at Python calls, and its groups must run alike."""
    if not now or "torch._dynamo" not in sys.modules:  # nobody has compiled anything
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def quiet_fakes():
    """A forward of fake tensors that may fail: torch logs that as an error of its own."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class RawReads(TorchFunctionMode):
    """Collects trunk parameters that some torch function reads as they are, unperturbed, and draws from a user's generator.

    To make a view reads nothing: the view stands for its parameter from then on (a Conv1d's weight seen as a Conv2d's).
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = dict(names)
        self.found: dict[str, str] = {}
        self.generators: dict[int, tuple[torch.Generator, str]] = {}
        self.views: list[torch.Tensor] = []  # alive, so that no other tensor gets their id

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if getattr(func, "namespace", None) == "ezo":
            return out
        name = getattr(func, "__name__", str(func))
        if (generator := kwargs.get("generator")) is not None:
            self.generators[id(generator)] = generator, f"torch's {name} with a generator of its own"
        if name in SHAPE_ONLY or not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(out)):
            return out
        for leaf in pytree.tree_leaves((args, kwargs)):
            if id(leaf) not in self.names:
                continue
            if _is_view(out, leaf):
                self.views.append(out)
                self.names[id(out)] = self.names[id(leaf)]
            else:
                self.found.setdefault(self.names[id(leaf)], name)
        return out

    def drawn(self) -> list[str]:
        """Draws from generators that somebody keeps: one that was made in this forward will be made alike in the next."""
        found = []
        while self.generators:
            _, (generator, what) = self.generators.popitem()
            if sys.getrefcount(generator) > 2:  # the name here, and the argument
                found.append(what)
        return found


def _is_view(out, of: torch.Tensor) -> bool:
    """Whether ``out`` is another tensor over the memory of ``of``; a tensor written in place is none."""
    return (
        isinstance(out, torch.Tensor)
        and out is not of
        and out.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()
    )


def unvisited(zo, listed: dict[int, str]) -> str | None:
    """What to say of the sites ``listed`` that the last pass did not perturb, or None."""
    missing = sorted(name for site, name in listed.items() if site not in zo.visited)
    if not missing:
        return None
    return (
        f"not visited by the forward, so not perturbed: {', '.join(map(repr, missing))}. Freeze them "
        "(requires_grad_(False) before convert_), put them in the head, or call their module"
    )


@contextlib.contextmanager
def _randomness(model: nn.Module, found: list[str]):
    """Names (innermost first) of modules that draw from torch's, Python's or NumPy's generators while they run, then of what
    is around them.
    """
    names = {m: n for n, m in model.named_modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def state():
        devices = [torch.cuda.get_rng_state(device).tolist()] if device.type == "cuda" else []
        _, words, *place = np.random.get_state()
        return torch.get_rng_state().tolist(), devices, random.getstate(), words.tolist(), place

    entered: list = []

    def enter(module, _):
        entered.append(state())

    def leave(module, *_):
        if entered.pop() != state() and module in names:
            found.append(f"{names[module] or 'the model'} ({type(module).__name__})")

    hooks = []
    for module in names:
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave))
    before = state()
    try:
        yield
        if not found and before != state():
            found.append("the closure or the loss function, which had better draw before the step")
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def checked_forward(model: nn.Module, zo, names: dict[int, str], listed: dict[int, str]):
    """Run a trial forward inside; raise on leaving if the model cannot be trained as it is.

    Args:
        zo: the model's context.
        names: id of a trunk parameter -> its qualified name.
        listed: site -> qualified name, all that must be visited.

    Raises:
        ValueError: a parameter that is read unperturbed, or not at all; a random layer; a buffer written by the forward,
            which is put back.
    """
    held = {n: (b, b._version, b.clone()) for n, b in model.named_buffers()}
    try:
        with _checked(model, zo, names, listed, held):
            yield
    except BaseException:
        _put_back(model, held)
        raise


def _written(model: nn.Module, held: dict) -> list[str]:
    """Names of buffers that were written, or replaced by others."""
    now = dict(model.named_buffers())
    return sorted(n for n, (b, version, _) in held.items() if now.get(n) is not b or b._version != version)


@contextlib.contextmanager
def unwritten(model: nn.Module, now: bool):
    """Put back the buffers that the forward inside writes, if ``now``: the check of another one says which they are."""
    held = {n: (b, b._version, b.clone()) for n, b in model.named_buffers()} if now else {}
    try:
        yield
    finally:
        if held:
            _put_back(model, held)


@torch.no_grad()
def _put_back(model: nn.Module, held: dict) -> None:
    for name in _written(model, held):
        buffer, _, old = held[name]
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.copy_(old)


@contextlib.contextmanager
def _checked(model: nn.Module, zo, names: dict[int, str], listed: dict[int, str], held: dict):
    drawing: list[str] = []
    reads = RawReads(names)
    zo.visited = set()
    with _randomness(model, drawing), reads:
        yield
    drawing += reads.drawn()
    problems = []
    if reads.found:
        what = ", ".join(f"{n!r} (by {f})" for n, f in sorted(reads.found.items()))
        problems.append(
            f"read without being perturbed: {what}. Call the module that owns it (a tied nn.Linear instead of F.linear), "
            "put it in the head, or freeze it (requires_grad_(False))"
        )
    missing = unvisited(zo, listed)
    if missing:
        problems.append(missing)
    if drawing:
        problems.append(
            f"random in a way that would differ between the signs: {drawing[0]}. Use nn.Dropout modules (they are converted), "
            "set its rate to 0, or call eval() on it"
        )
    written = _written(model, held)
    if written:
        problems.append(
            f"buffers written by the forward: {', '.join(map(repr, written))}; only BatchNorm's are understood"
        )
    if problems:
        raise ValueError("this model cannot take a zeroth-order step: " + "; ".join(problems))
