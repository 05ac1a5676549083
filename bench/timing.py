"""How a case is timed: wall time by pytest-benchmark, device time by CUDA events, weights that no cache holds."""

from __future__ import annotations

import gc
import itertools
import statistics
import time

import torch

from bench.memory import LiveBytes

#: Weights of a case on a GPU, over all its copies: an H100's or H200's L2 holds 50 MB.
ROTATION_BYTES = 200 << 20
#: The most copies of a weight: a graph has a call for each, and one of a few kilobytes would have some 90,000.
MOST_COPIES = 600
#: Seconds of device time that a figure is made of, and the fewest and most rounds.
SECONDS, FEWEST, MOST = 0.3, 5, 100


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def copies(tensor: torch.Tensor) -> int:
    """How many copies of ``tensor`` a case goes round."""
    if not tensor.is_cuda:
        return 1
    return min(MOST_COPIES, -(-ROTATION_BYTES // (tensor.numel() * tensor.element_size())))


class Rotation:
    """``run`` of the next of ``operands`` at each call, for ever; ``turns`` calls go round once."""

    def __init__(self, run, operands) -> None:
        self.run, self.turns, self._next = run, len(operands), itertools.cycle(operands)

    def __call__(self):
        return self.run(next(self._next))


def rotate(run, operands) -> Rotation:
    return Rotation(run, operands)


def time_case(benchmark, run, device: str, *, graph: bool = True, replay=None, **info) -> None:
    """Time ``run()``; ``info`` and, on a GPU, device time, peak memory and launches go into ``extra_info``.

    Wall time on a GPU includes the wait for it: it is what a loop of such calls cannot be faster than, launches included.

    Args:
        benchmark: pytest-benchmark's fixture.
        run: the case; a :class:`Rotation` takes other weights at each call.
        device: cpu or cuda.
        graph: also time it inside a CUDA graph. False for what changes state on the host at each call.
        replay: a CUDA graph of the case that was captured elsewhere.
        **info: goes into the record as it is.
    """
    benchmark.extra_info.update(info, device=device, torch=torch.__version__, threads=torch.get_num_threads())
    if device == "cpu":
        with LiveBytes() as live:
            run()
        benchmark.extra_info["peak_bytes_above_operands"] = live.peak
        benchmark(run)
        return
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    gc.collect()  # cycles of the case before, models among them, are not freed while this one is measured
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    benchmark.extra_info["peak_bytes_above_operands"] = torch.cuda.max_memory_allocated() - before
    benchmark.extra_info["launches"] = launches(run)
    benchmark.extra_info["device_us"] = device_time(run)
    if replay is not None:
        benchmark.extra_info["graph_us"] = device_time(replay)
    elif graph:
        benchmark.extra_info["graph_us"] = graph_time(run)

    def waited():
        run()
        torch.cuda.synchronize()

    benchmark.pedantic(waited, rounds=10, warmup_rounds=1)


def rounds_for(seconds: float) -> int:
    """How many calls of ``seconds`` each are timed."""
    return max(FEWEST, min(MOST, int(SECONDS / max(seconds, 1e-9))))


def device_time(run) -> float:
    """Median microseconds of ``run()`` on the device, in a row of calls."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    pairs = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds_for(time.perf_counter() - start))
    ]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def captured(run, turns: int = 1):
    """A CUDA graph of ``turns`` calls of ``run``, which has run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what is made on first use, a workspace of cuBLAS on this stream, say, is made before the capture
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(turns):
            run()
    return graph


def graph_time(run) -> float:
    """Microseconds of one call of ``run`` inside a CUDA graph that goes once round its weights."""
    turns = getattr(run, "turns", 1)
    return device_time(captured(run, turns).replay) / turns


def launches(run) -> int:
    """Kernels of one ``run()`` on the GPU, those inside a graph included; copies and fills by the driver do not count.

    Nor do the spans of torch's optimizers, which the profiler shows on the device, too.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in seen.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)
