"""One protocol of progress: what callers hand in, what jobs report, how steps count."""

from __future__ import annotations

import re

import pytest

from kvlatent.jobs.progress import Progress


def heard(fields=("step", "done", "total", "note")) -> tuple[Progress, list]:
    told: list = []
    return Progress.of(lambda *values: told.append(values), fields), told


def test_a_function_is_called_with_the_fields_that_it_takes():
    progress, told = heard()
    progress.report("load")
    progress.report("stage I", 2, 8, "loss 1.5", stage=1, loss=1.5)
    progress("save", 0, 0, "last")  # a progress is a function as well
    assert told == [("load", 0, 0, ""), ("stage I", 2, 8, "loss 1.5"), ("save", 0, 0, "last")]
    progress, told = heard(("stage", "done", "loss"))
    progress.report("stage I", 2, 8, "loss 1.5", stage=1, loss=1.5)
    assert told == [(1, 2, 1.5)]


def test_nobody_and_a_progress_are_taken_as_they_are():
    Progress.of(None).step("measure", 3).advance()
    progress, told = heard()
    assert Progress.of(progress, ("done",)) is progress
    assert not told


def test_what_a_caller_raises_reaches_the_job():
    def stop(*told):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Progress.of(stop).report("load")


def test_parts_of_the_work_name_their_steps_after_their_place():
    progress, told = heard(("step", "loss"))
    progress.within("2/3 cell").within("stage I").report("layer 0", loss=0.5)
    assert told == [("2/3 cell: stage I: layer 0", 0.5)]


def test_a_step_counts_from_0_to_its_total():
    progress, told = heard()
    step = progress.step("refine", 4)
    step.advance()
    step.to(3)
    step.advance(2)  # never more than there is
    assert [done for _, done, *_ in told] == [0, 1, 3, 4]
    assert {(name, total, note) for name, _, total, note in told} == {("refine", 4, "")}
    step = progress.step("order")  # of as many as the first report says
    step.to(5, 9)
    assert told[-2:] == [("order", 0, 0, ""), ("order", 5, 9, "")]


def test_a_step_of_tokens_says_its_speed():
    progress, told = heard()
    progress.step("calibrate", 2, tokens=512).advance()
    assert told[0] == ("calibrate", 0, 2, "")
    assert re.fullmatch(r"[\d,]+ tokens/s", told[1][3])
