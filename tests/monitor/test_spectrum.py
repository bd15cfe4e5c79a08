"""Power iteration finds the top singular values of a full SVD to 1 %, and the bulk ends where its noise ends."""

import numpy as np
import pytest
import torch

import lwadamw
from lwadamw.lab.data import batches, standard_library
from lwadamw.lab.model import ModelConfig, Transformer
from lwadamw.monitor import spectrum
from lwadamw.monitor.spectra import Spectrum
from lwadamw.monitor.spectrum import bulk_edge, matrix_view, top_singular_values


def _spiked(rows, cols, size):
    u, v = torch.randn(rows), torch.randn(cols)
    return torch.outer(u / u.norm(), v / v.norm()) * size


MATRICES = {
    "gaussian": lambda: torch.randn(200, 200),
    "tall": lambda: torch.randn(500, 60),
    "wide": lambda: torch.randn(60, 500),
    "spike on noise": lambda: torch.randn(150, 100) + _spiked(150, 100, 60.0),
    "rank one": lambda: _spiked(80, 120, 3.0),
    "row": lambda: torch.randn(1, 300),
    "column": lambda: torch.randn(300, 1),
    "tiny": lambda: torch.randn(2, 3),
    "power law": lambda: torch.linalg.qr(torch.randn(120, 120))[0] * torch.arange(1, 121) ** -0.5,
    "two equal": lambda: torch.diag(torch.tensor([2.0, 2.0, 1.0, 0.5])),
    "zero": lambda: torch.zeros(20, 30),
    "float64": lambda: torch.randn(40, 50, dtype=torch.float64),
    "bfloat16": lambda: torch.randn(64, 48).bfloat16(),
}


def _exact(matrix, count=2):
    values = torch.linalg.svdvals(matrix.detach().double()).cpu().numpy()
    return np.pad(values, (0, count))[:count]


@pytest.mark.parametrize("kind", MATRICES)
def test_the_two_largest_singular_values_equal_those_of_an_svd(kind, device):
    matrix = MATRICES[kind]().to(device)
    values, (vectors,) = top_singular_values([matrix], [None])
    first, second = _exact(matrix)
    assert values[0, 0] == pytest.approx(first, rel=0.01, abs=1e-12)
    assert values[0, 1] == pytest.approx(second, rel=0.02, abs=1e-6 * first)
    assert vectors.shape == (min(matrix.shape), min(spectrum.VECTORS, *matrix.shape))


def test_many_matrices_at_once_keep_their_places(device):
    shapes = [(30, 20), (40, 40), (20, 30), (40, 40), (30, 20), (1, 5)]
    matrices = [torch.randn(shape, device=device) * (i + 1) for i, shape in enumerate(shapes)]
    values, _ = top_singular_values(matrices, [None] * len(matrices))
    np.testing.assert_allclose(values[:, 0], [_exact(m)[0] for m in matrices], rtol=0.01)


def test_a_batch_has_a_limited_number_of_elements(monkeypatch):
    monkeypatch.setattr(spectrum, "BATCH", 2500)
    matrices = [torch.randn(30, 40) for _ in range(5)]
    assert [len(indices) for indices in spectrum._batches(matrices)] == [2, 2, 1]
    values, _ = top_singular_values(matrices, [None] * 5)
    np.testing.assert_allclose(values[:, 0], [_exact(m)[0] for m in matrices], rtol=0.01)


def test_the_singular_values_of_trained_weights_equal_those_of_an_svd(device):
    model = Transformer(ModelConfig(width=64, depth=1, context=16), seed=0).to(device)
    groups = lwadamw.param_groups(model, base_width=64)
    optimizer = lwadamw.AdamW(groups, lr=1e-2, weight_decay=2.5, betas=(0.9, 0.95))
    source = batches(standard_library().train, 4, 16, seed=0)
    monitor = lwadamw.Monitor(optimizer, every=20, spectrum_every=40)
    for _ in range(40):
        model.loss(next(source).to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    columns = monitor.latest.columns
    row = {name: i for i, name in enumerate(monitor.latest.names)}
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name}
    assert len(matrices) == 6
    for name, p in matrices.items():
        first, second = _exact(p)
        assert columns["top"][row[name]] == pytest.approx(first, rel=0.01), name
        assert columns["second"][row[name]] == pytest.approx(second, rel=0.02), name
    assert np.isnan(columns["top"][row["embedding.weight"]])
    assert np.isnan(columns["top"][row["norm.weight"]])


def test_the_vectors_of_the_last_time_make_the_iteration_shorter(monkeypatch):
    seen = []
    ritz = spectrum._ritz
    monkeypatch.setattr(spectrum, "_ritz", lambda y: seen.append(len(y)) or ritz(y))
    matrix = torch.randn(300, 300)
    _, vectors = top_singular_values([matrix], [None])
    cold = len(seen)
    seen.clear()
    values, _ = top_singular_values([matrix + 1e-3 * torch.randn_like(matrix)], vectors)
    assert len(seen) == 2 < cold
    assert values[0, 0] == pytest.approx(_exact(matrix)[0], rel=0.01)


def test_vectors_of_another_shape_are_not_used():
    _, vectors = top_singular_values([torch.randn(30, 20)], [None])
    matrix = torch.randn(30, 25)
    values, _ = top_singular_values([matrix], vectors)
    assert values[0, 0] == pytest.approx(_exact(matrix)[0], rel=0.01)


def test_a_matrix_that_is_not_finite_does_not_change_the_others():
    good, bad = torch.randn(30, 30), torch.randn(30, 30)
    bad[3, 4] = float("inf")
    values, _ = top_singular_values([bad, good], [None, None])
    assert np.isnan(values[0]).all()
    assert values[1, 0] == pytest.approx(_exact(good)[0], rel=0.01)
    known = Spectrum()
    for matrix in (bad, good):
        known.measure({"w": matrix}, {"w": 1.0}, step=1)
    assert known.columns(["w"], np.ones(1))["top"][0] == pytest.approx(_exact(good)[0], rel=0.01)


def test_the_random_numbers_of_training_stay_the_same():
    state = torch.get_rng_state()
    top_singular_values([torch.zeros(9, 9) + torch.eye(9)], [None])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(300, 300), (400, 100), (64, 256)])
def test_the_bulk_of_noise_ends_at_its_largest_singular_value(shape):
    noise = torch.randn(shape)
    values, _ = top_singular_values([noise], [None])
    assert bulk_edge(values[0], float(noise.norm()), *shape) == pytest.approx(_exact(noise)[0], rel=0.03)


def test_spikes_above_the_bulk_do_not_change_the_bulk():
    noise = torch.randn(200, 100)
    matrix = noise + _spiked(200, 100, 80.0) + _spiked(200, 100, 50.0)
    values, _ = top_singular_values([matrix], [None])
    edge = bulk_edge(values[0], float(matrix.norm()), 200, 100)
    assert edge == pytest.approx(200**0.5 + 100**0.5, rel=0.03)
    assert bulk_edge([80.0], float(matrix.norm()), 200, 100) > 1.05 * edge, (
        "with only one of the two spikes removed, the bulk is larger"
    )


@pytest.mark.parametrize(("value", "shape"), [(3.0, (5, 7)), (1e-3, (40, 30)), (0.0, (4, 4))])
def test_a_matrix_of_rank_one_has_no_bulk(value, shape):
    assert bulk_edge([value], value, *shape) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "fan_in", "expected"),
    [
        ((8, 5), 5, (8, 5)),
        ((8, 5), None, (8, 5)),
        ((8, 3, 2, 2), 12, (8, 12)),
        ((8, 3, 2, 2), None, None),
        ((1, 6, 5), 5, (6, 5)),
        ((1, 5, 6), 5, (5, 6)),
        ((4, 6, 5), 5, None),
        ((7,), None, None),
        ((), None, None),
        ((0, 5), 5, None),
    ],
)
def test_matrix_view_returns_the_matrix_that_a_parameter_multiplies_with(shape, fan_in, expected):
    p = torch.randn(shape)
    view = matrix_view(p, fan_in)
    assert (None if view is None else tuple(view.shape)) == expected
    assert view is None or view.data_ptr() == p.data_ptr()
