"""torch's CUDA graphs, as much of them as a captured step needs, and what is to be undone of a capture that failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


class CudaGraphs:
    """torch's CUDA graphs, as much of them as :class:`CapturedStep` needs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []

    def __getstate__(self) -> dict:
        return {"device": self.device, "_stream": None, "_failed": []}

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Run on the capture stream, after what the current one was given and before what it will be."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of ``run()``, which is not carried out; waits for the device."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        before = torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.device(self.device), self._capture(graph, pool):
                run()
        except BaseException:
            torch.cuda.set_stream(before)  # torch leaves the capture stream current if ending the capture fails, too
            self._recover(graph, pool)
            raise
        return graph

    def _capture(self, graph, pool):
        # thread_local: the threads of a DataLoader may go on allocating pinned memory.
        return torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local")

    def _recover(self, graph, pool) -> None:
        """Undo what torch (up to 2.11) leaves of a capture that it could not end: an allocator that goes on capturing, so that
        empty_cache() and with it any other capture fail an assertion, and a generator from which nothing can be drawn.
        """
        with contextlib.suppress(RuntimeError, AttributeError):  # it was ended
            torch._C._cuda_endAllocateToPool(self.device.index, pool)
            # the allocator of pinned memory, which nothing here reaches, goes on asking the graph which memory is its own
            self._failed.append(graph)
            torch._C._cuda_releasePool(self.device.index, pool)
        with contextlib.suppress(RuntimeError):  # of a device that is lost; the first error is the one to see
            one = torch.zeros(1, device=self.device)
            before = torch.cuda.current_stream(self.device)
            try:
                with (
                    torch.cuda.device(self.device),
                    self._capture(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()),
                ):
                    one.zero_()  # a capture that ends: the generator leaves its own with it
            finally:
                torch.cuda.set_stream(before)

    def drop(self, graph: torch.cuda.CUDAGraph) -> None:
        """Give the graph's memory back once nothing on the device uses it."""
        torch.cuda.synchronize(self.device)
        graph.reset()
