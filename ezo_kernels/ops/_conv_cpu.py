"""What follows a convolution on the CPU (numba): torch's own operators take two passes over it for the pooling alone."""

from __future__ import annotations

import numpy as np

from ._jit import kept


@kept
def pool_2x2(x, relu, out):
    """out [planes, h, w]: the largest of each whole 2 x 2 window of x [planes, H, W]; with ``relu`` not below 0. NaN stays."""
    planes, height, width = out.shape
    for i in range(planes):
        for y in range(height):
            top, bottom, line = x[i, 2 * y], x[i, 2 * y + 1], out[i, y]
            for c in range(width):
                p, q, r, s = top[2 * c], top[2 * c + 1], bottom[2 * c], bottom[2 * c + 1]
                p = p if (p > q or p != p) else q
                r = r if (r > s or r != r) else s
                p = p if (p > r or p != p) else r
                line[c] = np.float32(0.0) if (relu and p < 0) else p
