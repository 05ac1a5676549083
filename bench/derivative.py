"""How well the pair of a layer measures its derivative along z, by strategy: a cosine beside every time.

    (y+ - y-) / (2 eps)   against   the layer of z alone, in fp64

at the eps of the benchmark, on some rows, of one x for both signs. What is lost is lost in rounding: of W + eps z to 16 bits,
which two products do not make, and of y.
"""

from __future__ import annotations

import torch


def cosine(pair: torch.Tensor, want: torch.Tensor) -> float:
    """Of what is measured and what is right.

    Args:
        pair: [2 * B, ...], the outputs at +eps and -eps of the same x.
        want: fp64 [b, ...] with b <= B, the layer with z for its weight on the first b rows.
    """
    plus, minus = (half[: want.shape[0]].double() for half in pair.chunk(2))
    return torch.nn.functional.cosine_similarity((plus - minus).flatten(), want.flatten(), dim=0).item()
