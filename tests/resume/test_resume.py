"""P11: ten steps straight equal five, a new process, and five more, bit for bit."""

import keras
import numpy as np
import pytest
import resume_runs
from optimizer_cases import run_python


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs everything: straight, first halves here, second halves in one new process."""
    folder = tmp_path_factory.mktemp("resume")
    straight = {name: resume_runs.straight(name) for name in resume_runs.MODELS}
    halfway = {name: resume_runs.first_half(name, folder) for name in resume_runs.MODELS}
    run_python(f"import resume_runs; resume_runs.resume_all({str(folder)!r})")
    return straight, halfway, folder


def resumed(folder, name, way):
    with np.load(folder / f"{name}-{way}.npz") as file:
        return dict(file)


def is_seed(key):
    return key.startswith("seed ")


@pytest.mark.parametrize("name, way", resume_runs.EXACT)
def test_resuming_is_bit_for_bit(runs, name, way):
    straight, halfway, folder = runs
    found = resumed(folder, name, way)
    assert set(found) == set(straight[name])
    for key, right in straight[name].items():
        if not is_seed(key) or way == "AdapterCheckpoint":
            np.testing.assert_array_equal(found[key], right, err_msg=key)
    moved = [key for key, right in straight[name].items() if np.any(right != halfway[name][key])]
    # Negative control: A, B, the head and every moment have changed in the second half.
    assert sum("lora_kernel" in key for key in moved) >= 4
    assert sum("optimizer" in key for key in moved) >= 2 * 6 + 1
    if "dropout" in name and keras.backend.backend() != "torch":  # torch has states of its own
        assert any(is_seed(key) for key in moved)
    if name == "plain-dropout":
        assert any("moving_mean" in key for key in moved)


@pytest.mark.parametrize("name, way", resume_runs.CONTROLS)
def test_what_is_lost_shows(runs, name, way):
    """Without moments, or with other dropout masks, the comparison above would fail."""
    straight, _, folder = runs
    found = resumed(folder, name, way)
    trained = [key for key in straight[name] if "lora_kernel" in key]
    assert all(np.any(found[key] != straight[name][key]) for key in trained)
