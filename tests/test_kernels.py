"""The kernels and the number of threads that were asked for are those that the tests run with."""

import os

import pytest
import torch

pytestmark = pytest.mark.numerics


def test_the_processor_capability_asked_for_runs():
    """torch only warns of a name that it does not know, and runs its best kernels."""
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    if asked is None:
        pytest.skip("ATEN_CPU_CAPABILITY is not set: the processor's best kernels run")
    assert torch.backends.cpu.get_cpu_capability().lower() == asked


def test_the_number_of_threads_asked_for_runs():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
