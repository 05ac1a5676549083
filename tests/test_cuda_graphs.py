"""A capture that fails, on a torch that is played here: its allocator and its generator capture on, as those up to 2.11 do."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ezo_kernels.optim.cuda_graphs import CudaGraphs


class Torch:
    """What torch has of a capture: pools whose allocations are captured, and a generator that is or is not captured."""

    def __init__(self, ends_itself: bool) -> None:
        self.ends_itself, self.pools, self.released, self.capturing, self.made = ends_itself, [], [], False, 0

    def graph_pool_handle(self):
        self.made += 1
        return (0, self.made)

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        self.empty_cache()
        self.pools.append(pool)
        self.capturing = True
        try:
            yield
        except BaseException as error:
            if self.ends_itself:
                self.pools.remove(pool)
            raise RuntimeError("operation failed due to a previous error during capture") from error
        self.pools.remove(pool)
        self.capturing = False

    def empty_cache(self) -> None:
        if self.pools:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def end(self, device, pool) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def release(self, device, pool) -> None:
        self.released.append(pool)


@pytest.mark.parametrize("ends_itself", [False, True])
def test_a_capture_that_fails_leaves_nothing_capturing(monkeypatch, ends_itself):
    own = Torch(ends_itself)
    for name in ("graph_pool_handle", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(own, name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current one")
    streams = []
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", own.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", own.release, raising=False)
    graphs = CudaGraphs(torch.device("cpu"))

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="previous error during capture"):
        graphs.record(waits)
    assert not own.pools and not own.capturing and set(streams) == {"the current one"}
    assert own.released == ([] if ends_itself else [(0, 1)]) and len(graphs._failed) == (not ends_itself)
    own.empty_cache()
    assert graphs.record(lambda: None) is not None
