"""Keras's split at the last axis, rewritten: the same product, at the least rank that is free."""

import numpy as np
import pytest
from tolerances import FLOAT32, assert_close

from keras_loraplus.adapters.last_axis import standard_factors
from keras_loraplus.layers.einsum_split import split_einsum

# (equation, kernel shape, rank of the pair, rank of the result)
CASES = [
    ("abc,cde->abde", (30, 4, 3), 2, 8),  # query of BERT: heads times rank
    ("bqm,muh->bquh", (30, 4, 5), 3, 12),
    ("btd,ndh->btnh", (4, 30, 5), 2, 8),  # Gemma: heads first
    ("abcd,cde->abe", (4, 3, 30), 2, 2),  # output projections: nothing to pay
    ("btnh,nhd->btd", (4, 3, 30), 3, 3),
    ("btf,fd->btd", (7, 9), 4, 4),
    ("abc,dec->abde", (4, 5, 30), 2, 2),  # the last axis contracted
    ("abcd,ecd->abe", (30, 4, 6), 2, 8),
    ("eti,eih->eth", (3, 8, 7), 2, 2),  # experts, each with its own A and the same B
    ("eti,ehi->eth", (3, 7, 8), 2, 2),
    ("eti,eijh->etjh", (3, 30, 2, 5), 2, 4),
    ("teb,bce->tce", (6, 5, 3), 2, 5),  # the last axis shared
    ("teb,bce->tce", (5, 6, 3), 2, 5),
    ("abc,cde->abde", (6, 4, 3), 2, 6),  # 8 blocks are more than 6 inputs need
    ("abc,cde->abde", (90, 4, 3), 5, 12),  # 20 are more than 12 outputs need
]


@pytest.mark.parametrize("equation, shape, rank, expected", CASES)
def test_the_product_is_the_same(equation, shape, rank, expected):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(*shape[:-1], rank)).astype("float32")
    b = rng.normal(size=(rank, shape[-1])).astype("float32")
    new_a, new_b = standard_factors(equation, a, b)
    assert new_a.dtype == new_b.dtype == "float32"
    split = split_einsum(equation)
    kernel = equation.split(",")[1].split("->")[0]
    assert (new_a.shape, new_b.shape) == split.shapes(kernel, shape, expected)
    product = np.einsum(split.delta, new_a.astype("float64"), new_b.astype("float64"))
    assert_close(product, a.astype("float64") @ b.astype("float64"), FLOAT32)


def test_factors_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match=r"Received: shapes \(6, 2\) and \(2, 4\)"):
        standard_factors("abc,cde->abde", np.ones((6, 2)), np.ones((2, 4)))
    with pytest.raises(ValueError, match="share the rank"):
        standard_factors("abc,cde->abde", np.ones((6, 2, 3)), np.ones((2, 4)))
