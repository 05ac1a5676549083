"""A scale a layer: how far, beside eps, each parameter of the trunk is perturbed.

A site of scale s is perturbed by eps s z and updated by coef s z (docs/rng.md, Scaled sites), which is zeroth order in the
coordinates w / s: the estimate E[g s z] is s^2 times the gradient, so lr s^2 is the layer's own learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..nn.cut import in_head
from ..ops.update import check_scale
from .arguments import number


def resolve_scales(scales, manifest, fused) -> dict[int, float]:
    """Site -> scale, of those sites whose scale is not 1.

    Args:
        scales: name of a module or parameter of the trunk -> scale, for everything below it; the longest name counts. Or None.
        manifest: the trunk's sites.
        fused: names of fused layers, whose weight and bias a kernel perturbs alike.

    Raises:
        TypeError: no mapping of strings to numbers.
        ValueError: a scale that is not above 0 or that fp32 does not hold, a name with nothing of the trunk below it, two
            scales for one tied parameter or within one fused layer.
    """
    if scales is None:
        return {}
    if not isinstance(scales, Mapping):
        raise TypeError(f"scales must map names to numbers, got {type(scales).__name__}")
    names = [name for site in manifest for name in site.names]
    chosen = {}
    for prefix, scale in scales.items():
        if not isinstance(prefix, str):
            raise TypeError(f"a name in scales must be a string, got {type(prefix).__name__}")
        if not prefix or not any(in_head(name, (prefix,)) for name in names):
            layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
            raise ValueError(f"scales: the trunk has nothing named {prefix!r}; its layers are: {layers}")
        chosen[prefix] = number(scale, f"scales[{prefix!r}]", least=0.0, strict=True)
        check_scale(chosen[prefix], f"scales[{prefix!r}]")

    def scale_of(name: str) -> float:
        return chosen[max(above, key=len)] if (above := [p for p in chosen if in_head(name, (p,))]) else 1.0

    out, by_name = {}, {}
    for site in manifest:
        own = {name: scale_of(name) for name in site.names}
        if len(set(own.values())) > 1:
            raise ValueError(f"scales: one parameter, tied, would have several: {own}; name all of its layers")
        scale = own[site.names[0]]
        by_name |= dict.fromkeys(site.names, scale)
        if scale != 1.0:
            out[site.site] = scale
    for layer in fused:
        own = {name: by_name[name] for leaf in ("weight", "bias") if (name := f"{layer}.{leaf}".lstrip(".")) in by_name}
        if len(set(own.values())) > 1:
            raise ValueError(
                f"scales: a fused layer perturbs its weight and its bias alike, got {own}; "
                + (f"name {layer!r}" if layer else "name both")
            )
    return out


class ScaledEps:
    """eps of the scaled sites, on the device: a tensor for each scale, filled when eps moves."""

    def __init__(self, scales: dict[int, float], eps: float, device: torch.device) -> None:
        self._tensors = {s: torch.empty(1, dtype=torch.float32, device=device) for s in sorted(set(scales.values()))}
        self.of_site = {site: {"eps": self._tensors[s]} for site, s in scales.items()}
        self.fill(eps)

    def fill(self, eps: float) -> None:
        """Take another eps.

        Raises:
            ValueError: a product with a scale that fp32 does not hold; nothing is changed then.
        """
        for scale in self._tensors:
            check_scale(eps * scale, f"eps {eps} times the scale {scale}")
        for scale, tensor in self._tensors.items():
            tensor.fill_(eps * scale)
