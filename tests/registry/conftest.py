"""Every test begins and ends with the library's own adapters registered."""

import pytest

from keras_loraplus.layers import adapter_types


@pytest.fixture(autouse=True)
def table():
    before = dict(adapter_types._TABLE)
    yield adapter_types._TABLE
    adapter_types._TABLE.clear()
    adapter_types._TABLE.update(before)
