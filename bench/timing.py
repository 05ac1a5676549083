"""How a case is timed: wall time by pytest-benchmark, device time by CUDA events, weights that no cache holds."""

from __future__ import annotations

import itertools
import statistics

import torch

#: Weights of a case on a GPU, over all its copies: an H100's L2 holds 50 MB.
ROTATION_BYTES = 200 << 20


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def copies(tensor: torch.Tensor) -> int:
    """How many copies of ``tensor`` a case goes round."""
    return -(-ROTATION_BYTES // (tensor.numel() * tensor.element_size())) if tensor.is_cuda else 1


def rotate(run, operands):
    """``run`` of the next of ``operands`` at each call, for ever."""
    turn = itertools.cycle(operands)
    return lambda: run(next(turn))


def time_case(benchmark, run, device: str, **info) -> None:
    """Time ``run()``; ``info`` and, on a GPU, device time and peak memory go into ``extra_info``.

    Wall time on a GPU includes the wait for it: it is what a loop of such calls cannot be faster than, launches included.
    """
    benchmark.extra_info.update(info, device=device, torch=torch.__version__, threads=torch.get_num_threads())
    if device == "cpu":
        benchmark(run)
        return
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    benchmark.extra_info["peak_bytes_above_operands"] = torch.cuda.max_memory_allocated() - before
    benchmark.extra_info["gpu"] = torch.cuda.get_device_name()
    benchmark.extra_info["device_us"] = device_time(run)

    def waited():
        run()
        torch.cuda.synchronize()

    benchmark.pedantic(waited, rounds=20, warmup_rounds=3)


def device_time(run, rounds: int = 50) -> float:
    """Median microseconds of ``run()`` on the device."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    torch.cuda.synchronize()
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs)
