"""A run of zeroth order as what it was made of: the seed, and of each step a few numbers a direction.

    w_{t+1} = w_t - (lr_t / queries) sum over q of g[t, q] z(seed, t, q)          floats, ops/update.py
    w_{t+1} = w_t - round(sum over q of g[t, q] z(seed, t, q) / 2^shift_t)        integers, ops/int8_update.py

z is made again from the seed, so g and lr of each step are the whole of what the trunk learned: 4 bytes, and 4 a direction,
whatever the size of the model (of integers 20 and 1). MeZO says that a run can be stored so (Malladi et al., arXiv 2305.17333,
section 2.1). :meth:`SeedLog.replay_` makes the weights of any step again, with the bits of the run, several steps in one pass
over them. What the steps do not say, the head's parameters and the buffers, is kept as it is at the end.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from .._files import read_saved, replacing
from ..nn import trunk_parameters
from ..ops.int8_pass import sparse_noise
from ..ops.noise import check_index
from .elastic_zo import ElasticZO
from .elastic_zo_int8 import ElasticZOInt8
from .replay import digests, manifest, replay_floats, replay_integers, require_fit, rest, rest_to_write

FORMAT = "ezo-seed-log-1"
#: Steps whose numbers stay on the device before the host waits for them.
_HELD = 1024
_DTYPES = {"step": torch.int64, "lr": torch.float32, "shift": torch.int32}
#: What all steps of a log have alike.
_ALIKE = ("integer", "rng_version", "seed", "queries", "noise", "scales", "rounding", "manifest")


def _alike(optimizer) -> dict:
    """:data:`_ALIKE` of the next step."""
    integer = isinstance(optimizer, ElasticZOInt8)
    noise = sparse_noise(optimizer.rounds) if integer else optimizer.noise
    return {
        "integer": integer,
        "rng_version": optimizer.rng_version,
        "seed": int(optimizer._seed.item()),
        "queries": optimizer.queries,
        "noise": {"name": noise.name, "rounds": noise.rounds, "p_zero": noise.p_zero},
        "scales": {} if integer else {int(site): float(value) for site, value in optimizer.scales.items()},
        "rounding": optimizer.rounding if integer else bool(optimizer.stochastic_rounding),
        "manifest": manifest(optimizer.model),
    }


def _check_note(note) -> None:
    """ValueError unless :meth:`SeedLog.load` reads it back: it takes no objects, those of numpy among them."""
    kept = io.BytesIO()
    try:
        torch.save(note, kept)
        kept.seek(0)
        torch.load(kept, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"note is to hold plain values, which load() takes back, got {note!r:.200}") from error


class SeedLog:
    """Records the steps of an optimizer, saves them, and makes the weights again.

    Args:
        optimizer: :class:`ezo_kernels.ElasticZO` or :class:`ezo_kernels.ElasticZOInt8`, captured or not. Its weights as they
            are now are what the steps begin at.

    Call :meth:`observe` after each step; nothing waits for the device but every 1,024th call::

        log = ezo.SeedLog(opt)
        for x, y in loader:
            opt.train_step(x, y)
            log.observe()
        log.save("run.seeds")

        again = ezo.convert_(build_the_model_as_it_began(), head=["fc3"])
        ezo.SeedLog.load("run.seeds").replay_(again)

    Raises:
        TypeError: another optimizer.
        NotImplementedError: ``node_perturbation``, whose steps are of each row; ``gaussian_fast``, whose bits are one GPU's.
        ValueError: no trunk: nothing is made of seeds.
    """

    def __init__(self, optimizer: ElasticZO | ElasticZOInt8) -> None:
        if not isinstance(optimizer, (ElasticZO, ElasticZOInt8)):
            raise TypeError(f"a SeedLog is of ElasticZO or ElasticZOInt8, got {type(optimizer).__name__}")
        problems = []
        if getattr(optimizer, "nodes", None) is not None:
            problems.append("node_perturbation makes its steps of each row of a batch, not of a few numbers")
        if not isinstance(optimizer, ElasticZOInt8) and not optimizer.noise.portable:
            problems.append(f"the bits of noise {optimizer.noise.name!r} are those of one family of GPUs")
        if problems:
            raise NotImplementedError("SeedLog: " + "; ".join(problems))
        if not optimizer.trunk:
            raise ValueError(
                "the model has no trunk: all of it learns by backpropagation, and nothing is made of seeds"
            )
        self._header = {
            "format": FORMAT,
            **_alike(optimizer),
            "begin": {"step": int(optimizer.step_count.item()), "digests": digests(optimizer.trunk)},
        }
        self.note: dict = {}
        self._parts: list[dict[str, torch.Tensor]] = []
        self._follow(optimizer)

    def _follow(self, optimizer) -> None:
        self._optimizer = optimizer
        g = torch.int8 if self._header["integer"] else torch.float32
        names = ("step", "shift") if self._header["integer"] else ("step", "lr")
        self._device = {name: torch.zeros(_HELD, dtype=_DTYPES[name], device=optimizer.device) for name in names}
        self._device["g"] = torch.zeros(_HELD, optimizer.queries, dtype=g, device=optimizer.device)
        self._host: list[tuple[float, int]] = []  # p_zero and r_max, which the host has
        self._count, self._loads = 0, optimizer.states_loaded
        self._end: dict | None = None

    # -------------------------------------------------------------------------------------------------------- recording

    @torch.no_grad()
    def observe(self) -> None:
        """Note the step just taken; one that was skipped, or noted before, leaves no trace.

        Raises:
            ValueError: the optimizer has loaded a state since: its steps are another log's.
        """
        opt = self._require_optimizer()
        self._require_own(opt)
        if self._count == _HELD:
            self._flush()
        at, own = self._count, self._device
        own["step"][at : at + 1].copy_(opt.step_count)
        own["g"][at].copy_(opt.g)
        if self._header["integer"]:
            own["shift"][at : at + 1].copy_(opt._shift)
            noise = opt._filled.get("noise") or sparse_noise(opt.rounds)  # none before a first step
            self._host.append((noise.p_zero, noise.r_max))
        else:
            own["lr"][at : at + 1].copy_(opt._lr)
        self._count += 1

    def _require_optimizer(self):
        if self._optimizer is None:
            raise ValueError("this log was loaded: resume(optimizer) goes on with it")
        return self._optimizer

    def _require_own(self, opt) -> None:
        if opt.states_loaded != self._loads:
            raise ValueError("the optimizer has loaded a state since this log was begun or resumed: begin another log")

    def _ending(self) -> dict:
        """What a log that goes on would end with now; ValueError where steps are missing, or one was of another run."""
        opt = self._require_optimizer()
        self._require_own(opt)
        self._flush()
        if (taken := int(opt.step_count.item())) != self._last:
            raise ValueError(
                f"the optimizer is at step {taken} and the log at step {self._last}: observe() is to follow each step"
            )
        now = _alike(opt)
        if differ := [name for name in _ALIKE if now[name] != self._header[name]]:
            raise ValueError(f"{', '.join(differ)} changed while the log went on: no steps of it lead to these weights")
        return {"digests": digests(opt.trunk), "rest": {n: t.cpu().clone() for n, t in rest(opt.model).items()}}

    def _flush(self) -> None:
        """Take what the device holds to the host, without steps that did not count.

        Raises:
            ValueError: a step that counted was not observed.
        """
        if not self._count and self._parts:
            return
        part = {name: t[: self._count].cpu().clone() for name, t in self._device.items()}
        if self._header["integer"]:
            part["p_zero"] = torch.tensor([p for p, _ in self._host], dtype=torch.float64, device="cpu")
            part["r_max"] = torch.tensor([r for _, r in self._host], dtype=torch.int64, device="cpu")
        # on the host, whatever torch.set_default_device says
        before = torch.cat([torch.tensor([self._last], device="cpu"), part["step"]])[: self._count]
        moved = part["step"] - before
        for at in ((moved != 0) & (moved != 1)).nonzero().flatten().tolist():
            raise ValueError(
                f"after step {before[at]} the log came to step {part['step'][at]}: observe() is to follow each step, and a "
                "state that is loaded begins another log"
            )
        del part["step"]
        self._parts.append({name: t[moved == 1] for name, t in part.items()})
        self._host, self._count = [], 0

    @property
    def _last(self) -> int:
        """The step that what is on the host ends at."""
        return self._header["begin"]["step"] + sum(len(part["g"]) for part in self._parts)

    @property
    def steps(self) -> tuple[int, int]:
        """The step counts that the log begins and ends at; waits for the device."""
        if self._optimizer is not None:
            self._flush()
        return self._header["begin"]["step"], self._last

    def __len__(self) -> int:
        """Steps that are in it; waits for the device."""
        begin, end = self.steps
        return end - begin

    def save(self, path, note: dict | None = None) -> None:
        """Write the log, with the head's parameters and the buffers as they are now; ``path`` has all of it or what it had.

        Args:
            path: the file.
            note: plain values to keep beside it, in :attr:`note` of a log that is loaded: how to build the model, say. That of
                a log that was resumed by default.

        Raises:
            ValueError: the optimizer took a step that was not observed, or loaded a state; its noise, its rounding or the
                model's dtypes have changed; a note that could not be loaded.
        """
        note = self.note if note is None else note
        _check_note(note)
        end = self._ending()
        joined = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        with replacing(Path(path)) as temporary:
            torch.save({**self._header, "columns": joined, "end": end, "note": note}, temporary)

    # ---------------------------------------------------------------------------------------------------------- reading

    @classmethod
    def load(cls, path) -> SeedLog:
        """The log in a file, of tensors and plain values.

        Raises:
            FileNotFoundError: there is none.
            ValueError: corrupt, or no log; names the file.
        """
        contents = read_saved(Path(path), "seed log")
        try:
            if contents["format"] != FORMAT:
                raise ValueError(f"its format is {contents['format']!r}, not {FORMAT!r}")
            self = cls.__new__(cls)
            self._optimizer, self._end, self.note = None, contents.pop("end"), contents.pop("note")
            self._parts, self._header = [contents.pop("columns")], contents
            self._check()
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: corrupt or no seed log: {error}") from None
        return self

    def _check(self) -> None:
        header, columns = self._header, self._parts[0]
        n = len(columns["g"])
        wanted = ("g", "shift", "p_zero", "r_max") if header["integer"] else ("g", "lr")
        if set(columns) != set(wanted) or any(len(t) != n for t in columns.values()):
            raise ValueError(f"it holds {', '.join(sorted(columns))} of {n} steps")
        if columns["g"].shape != (n, header["queries"]):
            raise ValueError(f"g is {tuple(columns['g'].shape)} for {n} steps of {header['queries']} directions")
        if not len(header["manifest"]) == len(header["begin"]["digests"]) == len(self._end["digests"]):
            raise ValueError("its digests are not of its parameters")

    def resume(self, optimizer) -> None:
        """Go on recording: ``optimizer`` is at the step and has the weights that this log ends with.

        Raises:
            ValueError: it is not the same run, naming what differs.
        """
        begun = SeedLog(optimizer)
        if self._optimizer is not None:
            self._flush()  # of the optimizer that it followed so far
        for name in _ALIKE:
            if begun._header[name] != self._header[name]:
                raise ValueError(f"the log is of another run: {name} differs")
        start = begun._header["begin"]
        if start["step"] != self._last:
            raise ValueError(f"the log ends at step {self._last}, the optimizer is at step {start['step']}")
        if self._end is not None and start["digests"] != self._end["digests"]:
            raise ValueError("the model does not have the weights that the log ends with")
        self._follow(optimizer)

    @torch.no_grad()
    def replay_(self, model, step: int | None = None, verify: bool = True) -> None:
        """Give ``model`` the weights of the run after ``step``; of the last one its head and its buffers, too.

        Args:
            model: converted as the run's was, with the weights that the log begins at; on any device.
            step: a step count, from the first to the last of :attr:`steps`; the last by default.
            verify: compare the weights with the digests of the log, before and after: nothing is written where they differ.
                Without it a log may be tried on other weights, or on bits of another device.

        Raises:
            ValueError: another model or head, another contract of noise, a step that is not in the log, weights that differ.
        """
        header, (begin, last) = self._header, self.steps
        step = last if step is None else check_index(step, "step", 1 << 63)
        if not begin <= step <= last:
            raise ValueError(f"step is {step}: the log has {begin} to {last}")
        whole = step == last
        end = self._ending() if whole and self._optimizer is not None else self._end
        require_fit(header, model)
        others = rest_to_write(model, end["rest"]) if end is not None else []
        params = trunk_parameters(model)
        if verify and (differ := self._unlike(params, header["begin"]["digests"])):
            raise ValueError(f"the model does not have the weights that the log begins at: {differ}")
        made = [p.detach().clone(memory_format=torch.contiguous_format) for p in params]
        columns = {name: torch.cat([part[name] for part in self._parts])[: step - begin] for name in self._parts[0]}
        (replay_integers if header["integer"] else replay_floats)(header, columns, made)
        if verify and whole and (differ := self._unlike(made, end["digests"])):
            raise ValueError(f"the steps do not lead to the weights that the run ended with: {differ}")
        for p, value in (*zip(params, made, strict=True), *(others if whole else [])):
            p.copy_(value)

    def _unlike(self, tensors, theirs: list[int]) -> str:
        names = [row[1][0] for row in self._header["manifest"]]
        found = [n for n, own, wanted in zip(names, digests(tensors), theirs, strict=True) if own != wanted]
        return ", ".join(map(repr, found))
