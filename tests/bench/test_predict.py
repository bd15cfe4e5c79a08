"""The predicted times agree with the measured ones, and the chunks are as short as the model asks for."""

import json

import pytest

from bench import harness, predict

MEASURED = json.loads((harness.ROOT / "bench/results/gpu_nvidia_h200.json").read_text())
REPORTS = json.loads(harness.CODE.read_text())["reports"]
SIZES = [round(3e7 * 10 ** (i / 200)) for i in range(201)]  # 30M to 300M parameters


def test_predictions_are_within_three_percent_of_an_h200():
    predicted = predict.predictions(MEASURED["reports"])
    measured = predict.measured(MEASURED)
    assert len(predicted.keys() & measured.keys()) == 20
    for case in predicted.keys() & measured.keys():
        assert predicted[case]["H200"]["ms"] == pytest.approx(measured[case]["ms"], rel=0.03), case


def test_the_committed_predictions_are_those_of_the_committed_code():
    committed = json.loads((harness.ROOT / "bench/results/predictions.json").read_text())["predictions"]
    now = predict.predictions(REPORTS)
    assert committed.keys() == now.keys()
    for case, by_device in now.items():
        for device, figures in by_device.items():
            assert committed[case][device] == pytest.approx(figures, rel=1e-3)


@pytest.mark.parametrize(("device", "least"), [("H100", 30e6), ("H200", 30e6), ("B200", 75e6)])
def test_the_last_programs_cost_less_than_three_percent(device, least):
    """Of a float32 step on 132 and 148 multiprocessors.

    A B200 takes a step of 30M parameters in 130 us, and a lone program needs 4 us for its first block, so it is
    held to more parameters.
    """
    found = predict.DEVICES[device]
    code = predict.codes(REPORTS)[found.target, "fp32"]
    shares = {n: predict.tail(n, found, code) / predict.seconds(n, found, code) for n in SIZES if n >= least}
    assert max(shares.values()) < 0.03, max(shares, key=shares.get)


def test_a_step_takes_no_less_than_its_bytes_and_more_with_more_instructions():
    device = predict.DEVICES["H200"]
    code = predict.codes(REPORTS)[device.target, "bf16, stochastic"]
    slower = predict.Code(**{**vars(code), "instructions": 3 * code.instructions})
    assert predict.of_copy(10**9, device, code) < predict.MEMORY_SHARE
    assert predict.seconds(10**9, device, slower) > 1.5 * predict.seconds(10**9, device, code)
