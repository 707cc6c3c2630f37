"""Builds the wheel, installs it in an empty environment outside the checkout, and uses it there."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import venv

ROOT = pathlib.Path(__file__).parents[1]

USE_IT = """
import pathlib, sys
import numpy as np
import keras, keras_loraplus as klp

package = pathlib.Path(klp.__file__).resolve()
assert pathlib.Path(sys.prefix).resolve() in package.parents, package
assert (package.parent / "py.typed").exists()
for absent in ("tensorflow", "torch", "keras_hub", "peft", "matplotlib"):
    assert absent not in sys.modules, absent

def build():
    keras.utils.set_random_seed(0)
    return keras.Sequential([
        keras.layers.Input((16,)),
        keras.layers.Dense(32, activation="relu", name="hidden"),
        keras.layers.Dense(4, name="logits"),
    ])

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 16)).astype("float32")
y = rng.integers(0, 4, size=64)

model = build()
start = np.asarray(model(x))
print(klp.enable_lora_plus(model, rank=4))
assert np.array_equal(np.asarray(model(x)), start)
model.compile(
    klp.LoRAPlusAdamW(1e-2, lr_ratio=16.0),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
model.fit(x, y, batch_size=32, epochs=2, verbose=0)
trained = np.asarray(model(x))
assert not np.allclose(trained, start)

klp.save_adapter(model, "adapter.safetensors")
twin = build()
klp.enable_lora_plus(twin, rank=4)
klp.load_adapter(twin, "adapter.safetensors")
assert np.array_equal(np.asarray(twin(x)), trained)
print("The wheel works from", package.parent)
"""


def run(command, **options):
    finished = subprocess.run(
        [str(part) for part in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    if finished.returncode:
        print(finished.stdout)
        sys.exit(f"failed ({finished.returncode}): {' '.join(map(str, command[:4]))} ...")
    return finished.stdout


def copy_sources(target):
    """Building in the checkout would also pack what an earlier build left in its build folder."""
    shutil.copytree(
        ROOT / "keras_loraplus",
        target / "keras_loraplus",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def main():
    start = time.perf_counter()
    # PYTHONPATH would let the checkout answer in the wheel's place.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment["KERAS_BACKEND"] = "jax"
    with tempfile.TemporaryDirectory(prefix="keras-loraplus-wheel-") as temporary:
        folder = pathlib.Path(temporary)
        source = copy_sources(folder / "source")
        build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", source]
        run([sys.executable, *build], env=environment)
        (wheel,) = (folder / "dist").glob("*.whl")
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
        install = ["-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
        run([python, *install, f"{wheel}[jax]"], cwd=folder, env=environment)
        print(run([python, "-c", USE_IT], cwd=folder, env=environment).strip().splitlines()[-1])
        print(f"{wheel.name}: built, installed and used in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
