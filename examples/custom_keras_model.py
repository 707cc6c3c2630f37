"""Adapts a Keras model of your own with LoRA+; needs no KerasHub and no download.

    python custom_keras_model.py
    KERAS_BACKEND=jax python custom_keras_model.py

A small convolutional network learns to tell four wave shapes apart. Then the sensor changes: its
readings are compressed, inverted, shifted and noisier. Adapters teach the network the new sensor
from a few readings; the file with them is all that has to be kept beside the network.
"""

import pathlib

import numpy as np

from text_classification.console import Parser, choose_backend, quiet_stderr, run

SHAPES = ("sine", "square", "sawtooth", "triangle")
LENGTH = 96


def readings(rng, count):
    """Returns waves of random frequency, phase and height, with the index of each one's shape."""
    labels = rng.integers(0, len(SHAPES), size=count)
    time = np.arange(LENGTH) / LENGTH
    cycles = rng.uniform(2, 6, size=(count, 1)) * time + rng.uniform(size=(count, 1))
    phase = cycles % 1.0
    shapes = np.stack(
        [
            np.sin(2 * np.pi * phase),
            np.where(phase < 0.5, 1.0, -1.0),
            2 * phase - 1,
            1 - 4 * np.abs(phase - 0.5),
        ]
    )
    waves = shapes[labels, np.arange(count)] * rng.uniform(0.5, 1.5, size=(count, 1))
    waves += 0.05 * rng.normal(size=waves.shape)
    return waves[..., None].astype("float32"), labels.astype("int32")


def new_sensor(rng, waves):
    """Returns what the new sensor reads of the same waves."""
    compressed = np.sign(waves) * np.abs(waves) ** 0.6
    noise = 0.1 * rng.normal(size=waves.shape)
    return (1.0 - compressed[:, ::-1] + noise).astype("float32")


def build_model(keras):
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((LENGTH, 1)),
            layers.Conv1D(32, 7, strides=2, activation="relu", name="edges"),
            layers.Conv1D(64, 5, strides=2, activation="relu", name="motifs"),
            layers.GlobalAveragePooling1D(name="pool"),
            layers.Dense(64, activation="relu", name="features"),
            layers.Dense(len(SHAPES), name="logits"),
        ],
        name="wave_shapes",
    )


def main(arguments=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", help="tensorflow, jax or torch")
    parser.add_argument("--output", default="outputs/custom_keras_model", help="folder to write to")
    options = parser.parse_args(arguments)
    choose_backend(options.backend)
    with quiet_stderr():
        import keras

        import keras_loraplus as klp
    output = pathlib.Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def accuracy(model, x, y):
        return float(np.mean(np.argmax(model.predict(x, verbose=0), axis=-1) == y))

    # The model as its user has it: trained, and good at what it was trained for.
    model = build_model(keras)
    x, y = readings(rng, 4096)
    model.compile(keras.optimizers.AdamW(3e-3), loss=loss, metrics=["accuracy"])
    model.fit(x, y, batch_size=64, epochs=8, verbose=0)
    model.save(output / "base.keras")
    waves, test_labels = readings(rng, 1024)
    print(f"old sensor: {accuracy(model, waves, test_labels):.1%}")

    waves_read = new_sensor(rng, waves)
    print(f"new sensor, before: {accuracy(model, waves_read, test_labels):.1%}\n")

    # Adapters in every layer but the one that produces the outputs, which stays trainable.
    print(klp.enable_lora_plus(model, rank=4), "\n")
    few, labels = readings(rng, 1024)
    few = new_sensor(rng, few)
    model.compile(klp.LoRAPlusAdamW(2e-3, lr_ratio=16.0), loss=loss, metrics=["accuracy"])
    print(klp.assignments(model), "\n")
    model.fit(few, labels, batch_size=32, epochs=30, verbose=0)
    adapted = accuracy(model, waves_read, test_labels)
    print(f"new sensor, after: {adapted:.1%}")

    # The adapter goes into a small file, which says itself which layers it adapts.
    adapter = output / "new_sensor.safetensors"
    klp.save_adapter(model, adapter)
    sizes = [path.stat().st_size / 1024 for path in (adapter, output / "base.keras")]
    print("adapter file: {:.0f} KiB, base model: {:.0f} KiB".format(*sizes))
    copy = keras.models.load_model(output / "base.keras")
    klp.load_adapter(copy, adapter)
    print(f"adapter on a fresh copy: {accuracy(copy, waves_read, test_labels):.1%}")

    # Merged, it is a plain Keras model that loads where keras_loraplus is not installed.
    klp.merge_lora_plus(copy)
    copy.save(output / "merged.keras")
    merged = keras.models.load_model(output / "merged.keras")
    print(f"merged and reloaded: {accuracy(merged, waves_read, test_labels):.1%}")


if __name__ == "__main__":
    run(main)
