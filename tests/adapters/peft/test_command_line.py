"""`python -m keras_loraplus convert`, both ways, and its errors."""

import pytest
from hugging_face_cases import CASES, inputs, keras_output, load_keras
from lora_cases import randomize_factors
from tolerances import FLOAT32, assert_close

import keras_loraplus as klp
from keras_loraplus.__main__ import main

CASE = CASES["bert"]


def test_there_and_back(bert, tmp_path, capsys):
    backbone = load_keras(bert)
    klp.enable_lora_plus(backbone, rank=2, alpha=3)
    randomize_factors(backbone)
    ours, folder, back = (str(tmp_path / name) for name in ("a.safetensors", "b", "c.safetensors"))
    klp.save_adapter(backbone, ours)
    assert main(["convert", ours, folder, "--checkpoint", str(bert)]) == 0
    assert main(["convert", folder, back, "--checkpoint", str(bert)]) == 0
    assert f"Written: {back}" in capsys.readouterr().out
    again = klp.load_adapter(load_keras(bert), back)
    expected = keras_output(CASE, backbone, inputs(CASE))
    assert_close(keras_output(CASE, again, inputs(CASE)), expected, 10 * FLOAT32)


@pytest.mark.parametrize("source", ["missing", "empty"])
def test_bad_input_is_one_line_and_exit_code_2(bert, tmp_path, capsys, source):
    (tmp_path / "empty").mkdir()
    target = tmp_path / "out.safetensors"
    arguments = ["convert", str(tmp_path / source), str(target), "--checkpoint"]
    assert main([*arguments, str(bert)]) == 2
    assert main([*arguments, str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 2 and error.count("\n") == 2
    assert not target.exists()
