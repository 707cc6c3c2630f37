"""The example on a model of the user's own."""

import re

import keras

import custom_keras_model as example


def test_adapters_teach_the_new_sensor(tmp_path, capsys):
    example.main(["--output", str(tmp_path)])
    printed = capsys.readouterr().out
    before, after, loaded, merged = (
        float(re.search(rf"{text}: ([\d.]+)%", printed)[1])
        for text in (
            "new sensor, before",
            "new sensor, after",
            "on a fresh copy",
            "merged and reloaded",
        )
    )
    assert after > before + 20
    assert after > 90
    assert loaded == merged == after
    assert "left trainable and unadapted: wave_shapes/logits" in printed
    model = keras.models.load_model(tmp_path / "merged.keras")
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    assert not any("lora" in weight.path for weight in model.weights)
