"""The performance section of README and its figure match the committed results."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bench import peers, report

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_committed_results():
    assert report.out_of_date(report.build(ROOT / "bench/results"), ROOT) == []


def test_report_of_a_gpu_run(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"ms": {"p50": 2.0}, "of_copy": 0.9, "vs_fused": 1.5}
    rows = dict.fromkeys((report.OURS, report.CLIPPED, report.USUAL, peers.FUSED), row)
    result = {"workload": "one_huge", "tensors": 1, "elements": 2**30, "groups": 1, "rows": rows}
    machine = {"device": "Some GPU", "driver": "1", "commit": "abc", "date": "2026-01-01"}
    results = tmp_path / "bench/results"
    results.mkdir(parents=True)
    record = {"command": "python -m bench.gpu", "machine": machine, "step": [result]}
    (results / "gpu_some_gpu.json").write_text(json.dumps(record))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    built = report.build(results)
    assert report.out_of_date(built, tmp_path) == ["README.md", "docs/performance.svg"]
    report.main(["--root", str(tmp_path)])
    assert report.out_of_date(report.build(results), tmp_path) == []
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "Some GPU" in text
    ElementTree.parse(tmp_path / "docs/performance.svg")
    compiled = {report.OURS: {**row, "of_copy": 0.7}, "torch.compile of foreach": row}
    record["compile"] = [{**result, "rows": compiled}, {**result, "groups": 2, "rows": compiled}]
    (results / "gpu_some_gpu.json").write_text(json.dumps(record))
    (panel,) = report.build(results).panels
    assert panel.series["torch.compile of foreach"] == [0.9]
    assert panel.series[report.OURS] == [0.9]
    result["rows"] = {**rows, report.OURS: {**row, "of_copy": 0.8}}
    (results / "gpu_some_gpu.json").write_text(json.dumps(record))
    assert report.out_of_date(report.build(results), tmp_path) == ["README.md", "docs/performance.svg"]
