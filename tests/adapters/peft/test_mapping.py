"""The map between A, B and a Hugging Face matrix, against the flattened product."""

import numpy as np
import pytest
from tolerances import FLOAT32, assert_close

from keras_loraplus.adapters.peft.mapping import from_peft, fused, layout_of, to_peft

RNG = np.random.default_rng(0)
# Contracted and free axes of a kernel, and what turns a Linear's (out, in) into it.
HOOKS = {
    "dense": ((0,), (1,), (5, 4), lambda w: w.T),
    "conv1d": ((0,), (1,), (4, 5), lambda w: w),
    "heads": ((0,), (1, 2), (6, 4), lambda w: w.T.reshape(4, 3, 2)),
    "heads first": ((1,), (0, 2), (6, 4), lambda w: w.reshape(3, 2, 4).transpose(0, 2, 1)),
    "attention output": ((0, 1), (2,), (4, 6), lambda w: w.T.reshape(3, 2, 4)),
    "part": ((0,), (1,), (4, 9), lambda w: w[:, 3:6]),
    "rotary": ((0,), (1, 2), (6, 4), lambda w: w.T.reshape(4, 2, 3).transpose(0, 2, 1)),
}


@pytest.mark.parametrize("name", HOOKS)
def test_products_agree(name):
    contracted, free, shape, hook = HOOKS[name]
    index = hook(np.arange(np.prod(shape)).reshape(shape))
    layout = layout_of(index, contracted, free, shape)
    rank = 2
    a = RNG.normal(size=(*(index.shape[i] for i in contracted), rank))
    b = RNG.normal(size=(rank, *(index.shape[i] for i in free)))
    lora_a, lora_b = to_peft(layout, a, b)
    product = lora_b @ lora_a
    there = hook(product.T if layout.transposed else product)
    here = np.tensordot(a, b, axes=1).transpose(np.argsort([*contracted, *free]))
    assert_close(there, here, FLOAT32)
    back = from_peft(layout, lora_a, lora_b, a.shape, b.shape)
    assert (back[0] == a).all() and (back[1] == b).all()


def test_mixed_rows_are_refused():
    index = RNG.permutation(20).reshape(4, 5)
    with pytest.raises(ValueError, match="mix inputs and outputs"):
        layout_of(index, (0,), (1,), (5, 4))


def test_joined_adapters_are_the_sum():
    parts = [(RNG.normal(size=(r, 4)), RNG.normal(size=(5, r)), s) for r, s in ((2, 0.5), (3, 2.0))]
    a, b, scale = fused(parts)
    assert_close(scale * b @ a, sum(s * y @ x for x, y, s in parts), FLOAT32)
