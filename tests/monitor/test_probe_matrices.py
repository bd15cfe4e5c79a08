"""The probe measures weights that are no nn.Linear like float64 by hand: Conv1D, convolutions, and packed experts."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lwadamw import AdamW, Matrix, Monitor, Probe, param_groups
from lwadamw.monitor.probe import STATISTICS
from tests import zoo
from tests.monitor.test_probe import _by_hand, _measure

EXPERTS, IN, OUT = 4, 8, 12
ROWS_ARE_OUTPUTS = (
    "linear",
    "linear of a cast",
    "matmul with the transpose",
    "matmul from the left",
    "bmm with the transpose",
)
CHOSEN = (0, 1, 1, 3, 3, 3, 3, 0, 1)  # the expert of each token; no token goes to expert 2


def _rows(found, index):
    return [found[key][index] for key in STATISTICS]


def test_a_conv1d_of_gpt2_is_measured_as_the_transposed_matrix_that_it_is(backend, device):
    model = zoo.GPT2(8).to(device)
    optimizer = AdamW(param_groups(model, 8, width=8), lr=1e-2, weight_decay=0.3, backend=backend)
    batch = torch.randint(11, (3, 7), device=device)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, zoo.Conv1D):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))

    def loss(model):
        x = model.wte(batch) + model.wpe(torch.arange(7, device=device))
        block = model.h[0]
        return block["c_proj"](block["c_fc"](block["ln_1"](x))).square().sum() + block["c_attn"](x).square().sum()

    probe = Probe(optimizer, model, batch, lambda model, _: loss(model))
    found, before, after = _measure(model, optimizer, probe, loss)
    names = optimizer.norm_names()
    matrices = [f"h.0.{name}.weight" for name in ("c_attn", "c_fc", "c_proj")]
    for name in names:
        row = _rows(found, names.index(name))
        if name in matrices:
            x = inputs[name.removesuffix(".weight")].flatten(0, 1)
            np.testing.assert_allclose(row, _by_hand(x, before[name].mT, after[name].mT), rtol=2e-5, err_msg=name)
        else:
            assert np.isnan(row).all(), name


_CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(3, 4, 5, stride=2, padding=3, dilation=2), (2, 3, 20)),
    "1d same": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=3), (2, 3, 20)),
    "1d valid, without a batch": (lambda: nn.Conv1d(3, 4, 4, padding="valid"), (3, 20)),
    "1d circular": (lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 20)),
    "2d": (lambda: nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (2, 3, 7, 8)),
    "2d same": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same"), (2, 3, 7, 8)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", _CONVOLUTIONS)
def test_a_convolution_is_a_matrix_of_its_patches(kind):
    """The gain is that of the output, and the change of the output is that of the step, both by running the convolution."""
    make, shape = _CONVOLUTIONS[kind]
    model, batch = make(), torch.randn(shape)
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    probe = Probe(optimizer, model, batch, max_rows=10**6)
    found, before, after = _measure(model, optimizer, probe, lambda m: m(batch).square().sum())

    def output(weight):
        model.double().weight.data, model.bias.data = weight.double(), torch.zeros(4).double()
        return model(batch.double()).detach()

    y = output(before["weight"])
    dy = output(after["weight"].double() - before["weight"].double())
    row = dict(zip(STATISTICS, _rows(found, 0), strict=True))
    assert row["representation_change"] == pytest.approx((dy.norm() / y.norm()).item(), rel=1e-5)
    squares = batch.double().square()
    model.weight.data = torch.ones_like(model.weight)  # adds up each patch
    x = model(squares).detach()[..., :1, :, :] if model.weight.ndim == 4 else model(squares).detach()[..., :1, :]
    fan_in = before["weight"][0].numel()
    gain = (y.square().mean() / (x.mean() / fan_in)).sqrt().item()
    assert row["gain"] == pytest.approx(gain, rel=1e-5)
    rms = before["weight"].double().square().mean().sqrt().item()
    assert row["gain"] == pytest.approx(row["weight_alignment"] * rms * fan_in, rel=1e-5)


def test_a_convolution_with_groups_is_not_a_matrix():
    model, batch = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3)), torch.randn(2, 4, 9)
    optimizer = AdamW(model.named_parameters())
    found, _, _ = _measure(model, optimizer, Probe(optimizer, model, batch), lambda m: m(batch).sum())
    index = [optimizer.norm_names().index(f"{i}.weight") for i in (0, 1)]
    assert np.isnan(found["gain"][index]).tolist() == [True, False]


class _Experts(nn.Module):
    """Packed experts, multiplied in one of the ways that models use."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        shape = (EXPERTS, OUT, IN) if way in ROWS_ARE_OUTPUTS else (EXPERTS, IN, OUT)
        self.experts = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        chosen, w = torch.tensor(CHOSEN, device=x.device), self.experts
        order = chosen.argsort(stable=True)
        if self.way == "linear":
            parts = [functional.linear(x[chosen == e], w[e]) for e in chosen.unique()]
        elif self.way == "linear of a cast":
            w, wide = w.double(), x.double()
            parts = [functional.linear(wide[chosen == e], w[e]) for e in range(EXPERTS)]
        elif self.way == "linear of the transpose":
            parts = [functional.linear(x[chosen == e], w[e].T) for e in range(EXPERTS)]
        elif self.way == "matmul with the transpose":
            parts = [x[chosen == e] @ w[e].mT for e in range(EXPERTS)]
        elif self.way == "matmul from the left":
            parts = [(w[e] @ x[chosen == e].mT).mT for e in range(EXPERTS)]
        elif self.way == "bmm with the transpose":
            return torch.bmm(torch.stack([x * (chosen == e)[:, None] for e in range(EXPERTS)]), w.transpose(1, 2))
        elif self.way == "matmul":
            parts = [x[chosen == e] @ w[e] for e in range(EXPERTS)]
        elif self.way == "bmm":
            return torch.bmm(torch.stack([x * (chosen == e)[:, None] for e in range(EXPERTS)]), w)
        else:
            ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).int()
            return torch._grouped_mm(x[order], w, offs=ends)
        return torch.cat(parts)


@pytest.mark.parametrize("way", [*ROWS_ARE_OUTPUTS, "linear of the transpose", "matmul", "bmm", "grouped_mm"])
@pytest.mark.parametrize("split", [True, False])
def test_packed_experts_are_measured_each_with_its_own_tokens(way, split, backend, device):
    if way == "grouped_mm" and (not hasattr(torch, "_grouped_mm") or torch.device(device).type != "cpu"):
        pytest.skip("torch multiplies groups of this dtype on the CPU only, and not before 2.9")
    model = _Experts(way).to(device)
    sizes = {"segments": {"experts": EXPERTS}} if split else {}
    groups = param_groups(
        model, IN, width=IN, roles={"experts": Matrix(fan_in=-1 if way in ROWS_ARE_OUTPUTS else -2)}, **sizes
    )
    optimizer = AdamW(groups, lr=1e-2, weight_decay=0.3, backend=backend)
    batch = torch.randn(len(CHOSEN), IN, device=device)
    found, before, after = _measure(model, optimizer, Probe(optimizer, model, batch), lambda m: m(batch).pow(3).sum())
    b, a = (w["experts"] if way in ROWS_ARE_OUTPUTS else w["experts"].mT for w in (before, after))
    chosen = torch.tensor(CHOSEN, device=device)
    tokens = [batch[chosen == e] for e in range(EXPERTS)]
    used = [e for e in range(EXPERTS) if len(tokens[e])]
    if split:
        assert optimizer.norm_names() == [f"experts[{e}]" for e in range(EXPERTS)]
        for e in range(EXPERTS):
            if e in used:
                rtol = 1e-4 if way.startswith("bmm") else 2e-5
                np.testing.assert_allclose(_rows(found, e), _by_hand(tokens[e], b[e], a[e]), rtol=rtol)
            elif not way.startswith("bmm"):
                assert np.isnan(_rows(found, e)).all()
        return
    x2, y2, dy2 = (
        sum(t.double().square().sum() for t in some)
        for some in (
            tokens,
            [tokens[e].double() @ b[e].double().T for e in used],
            [tokens[e].double() @ (a[e].double() - b[e].double()).T for e in used],
        )
    )
    gain = (y2 / x2 * IN / OUT).sqrt().item()
    assert _rows(found, 0)[0] == pytest.approx(gain, rel=2e-5)
    assert _rows(found, 0)[4] == pytest.approx((dy2 / y2).sqrt().item(), rel=2e-5)
    if not way.startswith("bmm"):
        rms = b[used].double().square().mean().sqrt().item()
        assert _rows(found, 0)[1] == pytest.approx(gain / rms / IN, rel=2e-5)


def test_the_rows_of_a_conv1d_are_inputs_so_its_segments_have_no_gain():
    model = zoo.Conv1D(12, 8)
    groups = param_groups(model, 8, width=8, roles={"weight": "matrix", "bias": "vector"}, segments={"weight": 2})
    optimizer = AdamW(groups)
    batch = torch.randn(5, 8)
    found, _, _ = _measure(model, optimizer, Probe(optimizer, model, batch), lambda m: m(batch).square().sum())
    assert np.isnan(found["gain"]).all()


def test_a_monitor_has_the_gain_of_experts_next_to_their_norms(backend, device):
    model = _Experts("linear").to(device)
    groups = param_groups(model, IN, width=IN, roles={"experts": Matrix(fan_in=-1)}, segments={"experts": EXPERTS})
    optimizer = AdamW(groups, lr=1e-2, weight_decay=0.3, backend=backend)
    batch = torch.randn(len(CHOSEN), IN, device=device)
    with Monitor(optimizer, model, every=1, spectrum_every=1, probe=batch) as monitor:
        model(batch).pow(2).sum().backward()
        optimizer.step()
    columns = monitor.latest.columns
    assert np.isnan(columns["gain"]).tolist() == [False, False, True, False]
    top = torch.linalg.matrix_norm(model.experts.detach(), ord=2).tolist()
    np.testing.assert_allclose(columns["top"], top, rtol=0.01)
