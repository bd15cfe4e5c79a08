"""The demo, its model, the text on which the model is trained, and the command line of the demo."""

import math
import signal
import sys

import pytest
import torch

import lwadamw
from lwadamw.commands import main
from lwadamw.lab import data, training
from lwadamw.lab.model import ModelConfig, Transformer, rope, rotate

CONFIG = ModelConfig(width=32, depth=2, head_dim=8, context=16)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def model():
    """A model whose head is not zero, so that its logits depend on the input."""
    out = Transformer(CONFIG, seed=1)
    torch.nn.init.normal_(out.head.weight)
    return out


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_first_loss_is_that_of_a_uniform_guess_at_every_width():
    tokens = torch.randint(256, (2, 17))
    for width in (32, 64):
        out = Transformer(ModelConfig(width=width, depth=2, context=16))
        assert out(tokens[:, :-1]).shape == (2, 16, 256)
        assert out.loss(tokens).item() == pytest.approx(math.log(256), abs=1e-5)


def test_logits_do_not_see_later_tokens(model):
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-5)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-3


def test_rotary_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, CONFIG.head_dim).expand(2, 10, -1)
    cos, sin = rope(10, CONFIG, q.device)
    products = rotate(q, cos, sin) @ rotate(k, cos, sin).T
    for distance in range(-9, 10):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.1


def test_the_model_builds_on_meta_and_serves_as_base(model):
    with torch.device("meta"):
        base = Transformer(ModelConfig(width=16, depth=1, head_dim=8))
    assert {p.device.type for p in base.parameters()} == {"meta"}
    by_model, by_int = (lwadamw.summary(lwadamw.param_groups(model, width)) for width in (base, 16))
    assert [line.split()[:7] for line in by_model.splitlines()] == [line.split()[:7] for line in by_int.splitlines()]


def test_the_seed_decides_the_initial_weights():
    one, again, other = (Transformer(CONFIG, seed=seed).layers[0].ffn.up.weight for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_width_that_is_no_whole_number_of_heads_is_refused():
    with pytest.raises(ValueError, match=r"width=50 is not a whole number of heads.*head_dim=32"):
        ModelConfig(width=50)


def test_the_standard_library_reads_the_same_twice():
    one, again = data.standard_library(), data.standard_library()
    assert torch.equal(one.train, again.train)
    assert torch.equal(one.validation, again.validation)
    assert len(one.train) > 1_000_000


def test_training_and_validation_share_no_file():
    files = [bytes([i]) * (i + 1) for i in range(100)]
    train, validation = (set(part.tolist()) for part in data.split_files(files))
    assert train.isdisjoint(validation)
    assert train | validation == set(range(100))
    assert len(validation) == 6


def test_a_file_is_split_without_overlap(text):
    corpus = data.from_file(text)
    assert bytes(torch.cat([corpus.train, corpus.validation]).tolist()) == text.read_bytes()
    assert len(corpus.validation) == len(text.read_bytes()) // 16


def test_batches_are_windows_of_the_text_and_the_seed_decides_their_positions():
    numbers = torch.arange(200, dtype=torch.uint8)
    first, again, other = (next(data.batches(numbers, batch=64, context=9, seed=seed)) for seed in (3, 3, 4))
    assert first.shape == (64, 10)
    assert first.dtype == torch.int64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first - first[:, :1], torch.arange(10).expand(64, -1))
    assert first.max() <= 199


def test_validation_windows_do_not_overlap_and_reach_the_end():
    found = data.windows(torch.arange(105, dtype=torch.uint8), count=10, context=9)
    assert found.flatten().unique().numel() == 100
    assert found[-1, -1] == 104


def test_a_short_file_is_refused_with_the_length_it_needs(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(ValueError, match=r"short\.txt: 9 bytes for training do not hold one window of 128 \+ 1.*2064"):
        data.from_file(path).require(128)
    path.write_bytes(bytes(2064))
    assert data.from_file(path).require(128).source == "short.txt"


def test_quick_demo_prints_the_closing_table_and_writes_a_figure(tmp_path, capsys):
    """Without --data the demo trains on the standard library."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "demo.png"
    assert main(["demo", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    closing = printed[printed.rindex("\n\n") :]
    assert "standard library" in printed
    assert "width 32, m = 1" in closing
    assert "width 128, m = 4" in closing
    assert "0.01, 2.5" in closing  # lr, weight decay at the proxy
    assert "0.0025, 5" in closing  # lr/m, weight decay*sqrt(m)
    assert "never in this run: needs 240 steps" in closing
    assert "the relative update to change by x0.71" in " ".join(closing.split())
    assert out.read_bytes().startswith(PNG)


@pytest.mark.parametrize(("batch", "seen"), [(5, 1), (15, 2)], ids=["proxy", "target"])
def test_an_interrupted_demo_shows_the_results_so_far(batch, seen, text, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = 0

    def interrupting(*args):
        nonlocal drawn
        for windows in data.batches(*args):
            drawn += 1
            if drawn == batch:
                signal.raise_signal(signal.SIGINT)
            yield windows

    monkeypatch.setattr(training, "batches", interrupting)
    out = tmp_path / "demo.png"
    command = ["demo", "--quick", "--ratio", "2", "--device", "cpu", "--data", str(text), "--out", str(out)]
    assert main(command) == 130
    closing = capsys.readouterr().out.partition("interrupted")[2]
    assert closing.count(", m = ") == seen
    assert "4 of 10" in closing
    assert out.read_bytes().startswith(PNG)


def test_an_interrupt_before_the_first_step_says_so(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "batches", lambda *_: signal.raise_signal(signal.SIGINT))
    out = tmp_path / "demo.png"
    assert main(["demo", "--quick", "--device", "cpu", "--data", str(text), "--out", str(out)]) == 130
    assert "no step was recorded" in capsys.readouterr().out
    assert not out.exists()


def test_without_matplotlib_there_is_no_figure_and_a_line_says_how_to_install_it(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "demo.png"
    command = ["demo", "--quick", "--ratio", "2", "--steps", "2", "--device", "cpu", "--data", str(text)]
    assert main([*command, "--out", str(out)]) == 0
    assert 'pip install "lwadamw[lab]"' in capsys.readouterr().out
    assert not out.exists()


def test_a_record_compares_with_the_steady_state_of_the_effective_values(text):
    settings = training.Settings(base_width=32, depth=1, context=16, batch=2, steps=5, lr=1e-3, weight_decay=0.5)
    run = training.Run(settings, 64, data.from_file(text), torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in run.matrices.items()}
    (*_, last) = run.train()
    assert (last.step, len(run.matrices)) == (5, 5)
    lr, wd = 1e-3 / 2, 0.5 * 2**0.5
    assert run.steady.tau == pytest.approx(1 / (lr * wd))
    for ratio, (name, p) in zip(last.ratio, run.matrices.items(), strict=True):
        assert ratio == pytest.approx(p.detach().square().mean().sqrt().item() / math.sqrt(lr / (2 * wd)), rel=1e-5)
        assert not torch.equal(p, before[name])


def test_the_steady_step_counts_the_decay_of_the_warm_up(text):
    settings = training.Settings(base_width=32, depth=1, context=16, batch=2, steps=500, weight_decay=2.0)
    run = training.Run(settings, 32, data.from_file(text), torch.device("cpu"))
    decay = [run.steady.lr * run.steady.weight_decay * min(1, (t + 1) / settings.warmup) for t in range(500)]
    first = next(n for n in range(500) if sum(decay[:n]) >= training.STEADY_TAUS - 1e-9)
    assert first == math.ceil(run.steady_step) == 160


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: '0' is not a positive whole number"),
        (["--lr", "-1"], "--lr: '-1' is not a positive number"),
        (["--ratio", "1"], "--ratio: 1 gives one width only"),
        (["--base-width", "50"], "--base-width: ModelConfig: width=50"),
        (["--data", "no/such/file"], "--data: cannot read 'no/such/file'"),
        (["--out", "no/such/folder/x.png"], "--out: 'no/such/folder/x.png' is in a folder that does not exist"),
        (["--device", "tpu"], "--device: 'tpu' is no device"),
        (["--device", "meta"], "--device: the laboratory runs on cpu or cuda"),
        (["--rule", "none"], "--rule: unknown rule 'none'. Rules are standard"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_message_about_a_bad_argument_names_the_option(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--quick", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
