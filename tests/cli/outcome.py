"""What a command line came to."""

from __future__ import annotations

import torch


def refused(result, *said):
    """One line on stderr that says all of ``said``, exit code 2, nothing on stdout."""
    code, out, err = result
    assert code == 2 and out == ""
    assert err.startswith("ezo: error: ") and err.count("\n") == 1 and "Traceback" not in err
    for text in said:
        assert str(text) in err
    return True


def same_state(a, b):
    """Whether two nests of dicts, lists and tensors are equal bit for bit (seconds of the history aside)."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) if a.is_floating_point() else torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(k == "seconds" or same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b
