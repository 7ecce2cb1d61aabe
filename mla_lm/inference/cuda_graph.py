"""A step of decoding as a CUDA graph: the GPU gets all of its kernels at once, and Python none of its time."""

from collections.abc import Callable

import torch


def can_capture(device: torch.device) -> bool:
    """Whether steps on this device can be captured."""
    return device.type == "cuda"


class CapturedStep:
    """A function that is captured as a CUDA graph (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).

    The first call runs the function as it is, which loads kernels and compiles: a capture can do neither. The second
    call captures it, which runs nothing. From then on, also in the second call, each call replays the graph. So a call
    does the same each time, and no call is extra.

    Args:
        step: reads and writes the same tensors at each call, and does not wait for the GPU
        device: a CUDA device
        generator: the one that `step` draws from, besides the default one
    """

    def __init__(self, step: Callable[[], None], device: torch.device, generator: torch.Generator | None = None):
        self.step, self.device, self.generator = step, device, generator
        self.stream = torch.cuda.Stream(device)  # the libraries' room on it is there once the step has run on it
        self.graph: torch.cuda.CUDAGraph | None = None
        self.has_run = False

    def __call__(self) -> None:
        if not self.has_run:
            self._run_once()
            return
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _run_once(self) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), self._autocast():
            self.step()
        current.wait_stream(self.stream)
        self.has_run = True

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None and torch.__version__ < "2.14":  # later ones find the generator themselves
            graph.register_generator_state(self.generator)
        # Other threads, such as those of a server, may use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"), self._autocast():
            self.step()
        return graph

    def _autocast(self) -> torch.autocast:
        """The present autocast without its cache: what is cast in there is freed, where a graph would still read it."""
        kind = self.device.type
        return torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
