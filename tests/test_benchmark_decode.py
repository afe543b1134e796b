"""The script that times one layer's attention for one token beside a plain read."""

import importlib
import json
from pathlib import Path

import pytest

from kvlatent.evaluation.speed import decode_attention
from kvlatent.evaluation.speed.decode_attention import measure_decode_attention


@pytest.fixture
def script(monkeypatch):
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(decode_attention, "_COLD_BYTES", 1)
    return importlib.import_module("layer_decode")


def test_the_script_writes_ratios_and_how_it_ran(script, tmp_path, capsys):
    words = ["--widths", "16/16", "8/12", "--batches", "2", "--contexts", "40", "--heads", "4"]
    words += ["--key-value-heads", "2", "--repeats", "3", "--ways", "products", "sdpa"]
    script.main(["--out", str(tmp_path / "d.json"), *words])
    found = json.loads((tmp_path / "d.json").read_text())
    assert len(found["rows"]) == 2 * 2 * 2 and len(found["writes"]) == 2 * 2
    first, _, narrow, _ = found["rows"][:4]
    assert first["cache_bytes"] == 2 * 2 * 40 * (16 + 16) * 2 and narrow["byte_ratio"] == 20 / 32
    assert first["time_ratio"] == 1 and narrow["time_ratio"] > 0 and narrow["of_read"] > 0
    record = found["record"]
    assert record["seed"] == 0 and record["versions"]["torch"] and str(tmp_path) not in record["command"]
    assert "--widths 16/16 8/12" in record["command"]
    assert "time/bytes" in capsys.readouterr().out


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="unknown way 'fast'; choose from kernel, products, sdpa"):
        measure_decode_attention(1, 8, [(8, 8)], ways=["fast"])
