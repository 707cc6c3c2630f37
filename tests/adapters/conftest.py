"""One saved adapter for every test of this folder."""

import pytest
from adapter_cases import perturb, small_model

import keras_loraplus as klp


@pytest.fixture
def saved(tmp_path):
    model = small_model()
    klp.enable_lora_plus(model, rank=2, alpha=5, trainable=".*bias")
    perturb(model)
    path = str(tmp_path / "adapter.safetensors")
    klp.save_adapter(model, path)
    return model, path
