"""One tiny BERT in Hugging Face's format for all tests that are not about architectures."""

import pytest
from hugging_face_cases import CASES, save_random


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_bert")
    save_random(CASES["bert"], folder)
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny_gpt2")
    save_random(CASES["gpt2"], folder)
    return folder
