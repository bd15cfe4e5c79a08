"""A step runs on the current CUDA stream, whichever it was before."""

import pytest
import torch

from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS
from tests.company.storages import COLUMNS, gradient, options_of, weights


@pytest.mark.gpu
@pytest.mark.parametrize("column", COLUMNS)
def test_a_step_on_another_stream_is_followed(column, backend):
    """Every second step is taken on a stream of its own. All steps equal the bits of steps on one stream."""
    c = COMBINATIONS[COLUMNS[column]]
    start = weights((64, 64), c.param).cuda()
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a, b = (AdamW([("w", p)], lr=0.01, backend=backend, **options_of(COLUMNS[column])) for p in (ours, theirs))
    main, other = torch.cuda.current_stream(), torch.cuda.Stream()
    for step in range(4):
        grad = gradient((64, 64), c.grad).cuda()
        stream = other if step % 2 else main
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            ours.grad = grad.clone()
            a.step()
        main.wait_stream(stream)
        theirs.grad = grad
        b.step()
        assert torch.equal(ours, theirs)
