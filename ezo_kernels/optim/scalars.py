"""What a step takes of ``param_groups`` to the device."""

from __future__ import annotations

import torch

from .arguments import moved, number, rate


class Scalars:
    """The device scalars of :class:`ezo_kernels.ElasticZO`."""

    def _fill_scalars(self) -> None:
        group, *others = self.param_groups
        for other in others:
            if other.get("name") != "nodes" and other.get("lr") is not None and not torch.is_tensor(other["lr"]):
                rate(other["lr"], "lr of the head")
        if group["clip"] is not None:
            number(group["clip"], "clip", least=0.0, strict=True, held=False)
        for name, tensor in (("lr", self._lr), ("eps", self._eps)):
            if (held := moved(group, name, self._filled)) is not None:
                if name == "eps":
                    if self._micro:
                        raise ValueError(
                            f"eps was {self._filled[name]} for the losses accumulated so far, and is now {held}"
                        )
                    self._scaled_eps.fill(held)
                tensor.fill_(held)
                self._filled[name] = group[name]
        if self.nodes is not None:
            self.nodes.fill()
        if self.head_optimizer is not None:
            self.head_optimizer.fill()
