"""What is not followed or refused yet. A test that shows it is expected to fail, and the state machine leaves it out."""

PENDING = {
    "remainder zero": "a parameter with a remainder that is set to 0 becomes NaN",
    "data write": "the kernels do not see a write through .data to a parameter with an fp32 master weight",
    "same address": "a parameter that is cut or viewed in another way at the same address is not noticed",
    "names": "names do not follow group['params'] when it is edited alone",
    "list in place": "a list that is edited in place inside a group is not noticed",
    "fp16 torch": "the torch backend computes plain float16 parameters in float16",
    "main_grad shape": "a gradient of another shape in main_grad is not refused",
    "companion dtype": "a companion that does not fit the dtype of its parameter is not noticed",
    "duplicates": "a parameter that stands in a group twice steps twice, one in two groups is not refused",
    "grad_dtype": "grad_dtype that is set after a step is not followed",
    "default device": "state is created on the default device",
    "packed layout": "the torch backend mixes up the elements of a packed parameter whose memory layout changes",
    "checks on torch": "the torch backend does not check state again, and advances step before torch refuses",
    "new companion": "convert_state() and the torch backend need a companion that a group has only just asked for",
    "stale norms": "the torch backend shows old norms of a parameter that was packed at an earlier step",
    "norms without state": "the torch backend raises KeyError: 'step' for norms of a parameter whose state was cleared",
}
