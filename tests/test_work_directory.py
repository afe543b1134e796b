"""Work directories, of runs, stages and studies: continued, refused by name, and known as ours while they go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvlatent.jobs.atomic import atomic_directory, write_atomically
from kvlatent.jobs.work_directory import WorkDirectory, partial_of
from kvlatent.training.resume import StageDirectory
from kvlatent_lab.study.folder import StudyFolder
from on_disk import snapshot

PLAN = {"data": "abc", "recipe": {"seed": 0, "lora": {"rank": 4}}}


def study(path, plan):
    return StudyFolder(path, "widths", plan)


KINDS = {"run": WorkDirectory, "stage": StageDirectory, "study": study}
kinds = pytest.mark.parametrize("kind", KINDS)
# As kvlatent 0.1.0 wrote them before all three were one class.
WRITTEN = {
    "run": ("plan.json", json.dumps(PLAN, indent=2)),
    "stage": ("stage.json", json.dumps(PLAN, indent=2)),
    "study": (
        "study.json",
        json.dumps({"kind": "study-folder", "study": "widths", "decides": PLAN}, indent=2) + "\n",
    ),
}


def begin(kind: str, path: Path, plan=PLAN) -> bool:
    directory = KINDS[kind](path, plan)
    return directory.join() if isinstance(directory, StudyFolder) else directory.open()


@kinds
def test_it_is_made_once_and_continued_after_that(tmp_path, kind):
    assert begin(kind, tmp_path / "a" / "b")
    assert not begin(kind, tmp_path / "a" / "b")
    directory = KINDS[kind](tmp_path / "a" / "b", PLAN)
    assert directory.done("cell") is None
    assert directory.finish("cell", {"loss": 2.5}) == directory.done("cell") == {"loss": 2.5}
    directory.step_file("cell").write_text('{"loss"')
    with pytest.raises(ValueError, match=r"cell\.json is damaged, not JSON .*delete it to repeat that step"):
        directory.done("cell")


@kinds
def test_files_of_the_release_before_are_continued_or_refused(tmp_path, kind):
    name, text = WRITTEN[kind]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text(text)
    assert not begin(kind, tmp_path / "a")
    assert (tmp_path / "a" / name).read_text() == text
    other = {"data": "abc", "recipe": {"seed": 1, "lora": {"rank": 8}}}
    sentence = r"another recipe\.lora\.rank \(4, now 8\), recipe\.seed \(0, now 1\); call it with the same"
    with pytest.raises(ValueError, match=sentence) as caught:
        begin(kind, tmp_path / "a", other)
    assert "\n" not in str(caught.value)


@kinds
def test_what_a_call_writes_the_release_before_reads(tmp_path, kind):
    begin(kind, tmp_path / "a")
    name, text = WRITTEN[kind]
    assert json.loads((tmp_path / "a" / name).read_text()) == json.loads(text)


@kinds
@pytest.mark.parametrize("damage", ["{bad", "[1]", "\udcff", "[" * 100_000])
def test_a_damaged_plan_is_named(tmp_path, kind, damage):
    name, _ = WRITTEN[kind]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(
        ValueError, match=rf"{name} is damaged, so a\w* .* cannot be continued; \w+ "
    ) as caught:
        begin(kind, tmp_path / "a")
    assert "\n" not in str(caught.value)


@kinds
def test_what_is_not_ours_is_left_alone(tmp_path, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cat.jpg").write_text("mine")
    with pytest.raises(FileExistsError, match=r"no (unfinished run|stage|study) \(cat\.jpg\); \w+ "):
        begin(kind, tmp_path / "a")
    (tmp_path / "b").write_text("mine")
    with pytest.raises(FileExistsError, match="b is a file"):
        begin(kind, tmp_path / "b")
    assert snapshot(tmp_path) == {"a/cat.jpg": b"mine", "b": b"mine"}


@kinds
def test_a_plan_whose_writing_was_cut_short_is_no_stranger(tmp_path, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f".{WRITTEN[kind][0]}.tmp-1").write_text('{"da')
    assert begin(kind, tmp_path / "a")


def test_overwriting_starts_anew_where_the_plan_is_another(tmp_path):
    directory = WorkDirectory(partial_of(tmp_path / "out"), PLAN)
    directory.open()
    directory.finish("original", {})
    assert not directory.open(overwrite=True)
    assert directory.done("original") == {}
    other = WorkDirectory(directory.path, {"data": "other"})
    assert other.open(overwrite=True)
    assert snapshot(tmp_path).keys() == {"out.partial/plan.json"}
    other.plan_file.write_text("{bad")
    assert other.open(overwrite=True)
    (other.path / "plan.json").rename(other.path / "precious.txt")
    assert other.open(overwrite=True)
    assert snapshot(tmp_path).keys() == {"out.partial/plan.json"}


def test_a_removal_that_is_killed_leaves_a_directory_known_as_ours(tmp_path, monkeypatch):
    directory = WorkDirectory(tmp_path / "a", PLAN)
    directory.open()
    for step in ("original", "converted", "latent"):
        directory.finish(step, {})
    removed = []
    unlink = Path.unlink

    def kill(path, **options):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill)
        with pytest.raises(KeyboardInterrupt):
            directory.remove()
    assert directory.is_ours() and len(list(directory.path.iterdir())) == 3
    directory.remove()
    assert not directory.path.exists()


def test_a_step_is_claimed_once(tmp_path):
    one, other = (WorkDirectory(tmp_path / "a", PLAN) for _ in range(2))
    one.open()
    with one.claim("cell") as first, other.claim("cell") as second, other.claim("next") as third:
        assert (first, second, third) == (True, False, True)
    with other.claim("cell") as second:
        assert second


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_an_output_is_said_by_the_umask(tmp_path, mask, mode):
    """safetensors leaves its files to their owner alone, and a server in a container is another user."""

    def write(path):
        save_file({"weight": torch.zeros(2)}, path)

    before = os.umask(mask)
    try:
        with atomic_directory(tmp_path / "out") as folder:
            write(folder / "model.safetensors")
            (folder / "sub").mkdir()
            write(folder / "sub" / "other.safetensors")
        write_atomically(tmp_path / "statistics.safetensors", write)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {mode}
