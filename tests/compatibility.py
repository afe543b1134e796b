"""What engine tests measured and what they saw refused, kept for the page that says what runs where.

    python -m pytest tests/test_export_gguf.py --compatibility benchmarks/results/compatibility

writes a JSON file a test module, unless one of its tests failed; `python benchmarks/compatibility_page.py` turns the files into
docs/compatibility.md. Tests record through the fixture `compatibility`, with or without the option, so that a record that
cannot be made fails its test. A test marked `refused_by(ENGINE)` has the sentences of its `pytest.raises` recorded.
"""

import json
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvlatent.jobs.record import environment
from kvlatent.model.classes import latent_config_of

ROW, REFUSAL = "compatibility row", "compatibility refusal"


def one_or_all(values):
    """What all have, else the list."""
    return values[0] if len(set(values)) == 1 else list(values)


def table_scope(config):
    """Who shares a rotary table: "model", "layer" or "head"."""
    tables = config.tables
    return "head" if any(len(heads) > 1 for heads in tables) else "layer" if len(tables) > 1 else "model"


class Recorder:
    """What a test says of an engine; paths below `folder` are left out."""

    def __init__(self, record, folder):
        self._record, self._folder = record, str(folder)

    def computed(self, latent, model, *, engine, command, difference, said_bytes, formula_bytes, **more):
        """An engine computed what our class does.

        Args:
            latent: our model; model: what it is called.
            engine: with its version.
            command: that writes or runs it; DIR and OUT stand for directories.
            difference: the largest, of `compared`: "logits", by default, or "log-probabilities".
            said_bytes: of the cache a token, as the engine says; formula_bytes: as ours says.
            more: "kv_dtype", "weights" (both f32 by default), "compared".
        """
        config, layers = latent_config_of(latent.config), latent.config.num_hidden_layers
        keys, values = zip(*(config.widths_at(layer) for layer in range(layers)), strict=True)
        row = {
            "engine": engine,
            "model": model,
            "head_dim": config.original_head_dim,
            "d_qk": one_or_all(keys),
            "d_vo": one_or_all(values),
            "table": table_scope(config),
            "weights": "f32",
            "kv_dtype": "f32",
            "compared": "logits",
            **more,
            "command": command,
            "difference": float(difference),
            "said_bytes": float(said_bytes),
            "formula_bytes": float(formula_bytes),
        }
        assert set(more) <= {"weights", "kv_dtype", "compared"} and self._folder not in json.dumps(row)
        self._record(ROW, row)

    def refused(self, engine, sentence):
        """An engine, or what stands before it, took something not."""
        assert "\n" not in sentence
        self._record(REFUSAL, {"engine": engine, "sentence": self._without_paths(sentence)})

    def _without_paths(self, sentence):
        words = sentence.split(self._folder)
        return words[0] + "".join(
            "DIR" + word[len(word.split(" ")[0].rstrip(",;:)/")) :] for word in words[1:]
        )


@contextmanager
def sentences_recorded(recorder, engine):
    """Within it, the `ValueError` that a `pytest.raises` catches is a refusal by this engine."""
    raises = pytest.raises

    @contextmanager
    def recording(*expected, **more):
        with raises(*expected, **more) as caught:
            yield caught
        if caught.type is ValueError:
            recorder.refused(engine, str(caught.value))

    pytest.raises = recording
    try:
        yield
    finally:
        pytest.raises = raises


class Records:
    """Writes what passed, a file a module, when all tests have ended."""

    def __init__(self, folder):
        self.folder, self.failed = Path(folder), set()
        self.found = defaultdict(lambda: {ROW: [], REFUSAL: []})
        self.lines = []

    def pytest_runtest_logreport(self, report):
        module, _, test = report.nodeid.partition("::")
        if report.failed:
            self.failed.add(module)
        if report.when == "call" and report.passed:
            for kind, entry in report.user_properties:
                if kind in (ROW, REFUSAL):
                    self.found[module][kind].append({"test": test, **entry})

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):  # the process that started it has the reports
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for module, found in sorted(self.found.items()):
            if module in self.failed:
                self.lines.append(f"{module} has failures, so its record stays as it was")
                continue
            content = {"module": module, "record": environment("cpu"), "rows": found[ROW]}
            content |= {"refused": found[REFUSAL]}
            path = self.folder / f"{Path(module).stem}.json"
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            self.lines.append(f"{len(found[ROW])} rows and {len(found[REFUSAL])} refusals in {path}")

    def pytest_terminal_summary(self, terminalreporter):
        for line in self.lines:
            terminalreporter.write_line(f"compatibility: {line}")
