"""The same parameters on pretended devices and on the CPU. The kernels update both, so every bit has to be the same."""

import contextlib

import torch

from lwadamw import AdamW
from lwadamw.step.loss_scaling import _backwards, _Scaled
from tests.cases import set_grads

SHAPES = ((40,), (3, 5), (7,))


@contextlib.contextmanager
def scaled_backward(scale):
    """Gradients that are released inside count as those of a backward of a scaled loss."""
    scale = torch.full((), scale).to("cuda:0")
    _backwards[torch._C._current_graph_task_id()] = _Scaled(torch.amp.GradScaler("cpu"), scale)
    try:
        yield
    finally:
        _backwards.clear()


class Twins:
    """Parameters on pretended devices with their optimizer, and equal parameters on the CPU with theirs.

    Args:
        driver: the pretended driver.
        indices: the devices. Each of them gets a parameter for each shape.
        shapes: shapes of the parameters.
        backend: the backend of both optimizers.
        dtype: dtype of the parameters.
        options: other arguments of both optimizers.
    """

    def __init__(self, driver, indices=(0,), shapes=SHAPES, backend="triton", dtype=torch.float32, **options):
        self.driver = driver
        self.expected = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for _ in indices for shape in shapes]
        places = [f"cuda:{i}" for i in indices for _ in shapes]
        pairs = zip(self.expected, places, strict=True)
        self.params = [torch.nn.Parameter(p.detach().to(place)) for p, place in pairs]
        self.optimizer = AdamW(self.params, backend=backend, **options)
        self.twin = AdamW(self.expected, backend=backend, **options)

    def give_grads(self, scale=1.0):
        """Give both the same new random gradients, in new tensors."""
        set_grads(self.expected, scale=scale)
        for p, q in zip(self.params, self.expected, strict=True):
            p.grad = q.grad.to(p.device)

    def release(self):
        """Release the gradients of both. Return three streams, one for each shape."""
        for optimizer in (self.optimizer, self.twin):
            optimizer.release_gradients()
        return [self.driver.current_stream(0), self.driver.new_stream(0), self.driver.new_stream(0)]

    def set(self, **values):
        """Assign hyperparameters of both."""
        for optimizer in (self.optimizer, self.twin):
            optimizer.param_groups[0].update(values)

    def step(self):
        """Take a step of both."""
        self.optimizer.step()
        self.twin.step()

    def assert_equal(self, order="first"):
        """Let the devices execute everything, and compare."""
        self.driver.run(order)
        for p, q in zip(self.params, self.expected, strict=True):
            assert torch.equal(p.detach().raw, q), (p.device, tuple(p.shape))
