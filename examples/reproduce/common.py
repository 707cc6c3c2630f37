"""What the reproductions share: records of how a result came about."""

import math
import os
import pathlib
import platform
import sys
from importlib import metadata

# Before numpy is imported. The numpy studies run a process a core; threads in each would get into
# one another's way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

RESULTS = pathlib.Path(__file__).with_name("results")
# The examples beside this folder.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))


def versions(*packages):
    """Returns the versions of python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(seconds):
    """Returns what a run time is worth: the seconds, the cores, and how busy they were."""
    # Another process on the cores makes a run longer than it has to be. Own time and that of
    # workers that have ended:
    used = os.times()
    return {
        "seconds": round(seconds, 1),
        "processor_seconds": round(sum(used[:4]), 1),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def read_kept(path, setting):
    """Returns the finished sweep that a file holds, or None without the file.

    Args:
        path: A `pathlib.Path`.
        setting: What the sweep was given to write into its result as its `setting`.

    Raises:
        InputError: If it is of another setting.
    """
    from keras_loraplus.tuning import result
    from text_classification.console import InputError

    if not path.exists():
        return None
    kept = result.load(path)
    if kept.setup["about"]["setting"] != setting:
        raise InputError(
            f"{path} is of another setting than the configuration: name another --output, or "
            "delete it to run that sweep again"
        )
    return kept


def plain(value):
    """Returns a number for JSON, which knows no infinities; None for what is not finite."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def pyplot():
    """Returns matplotlib's pyplot without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
