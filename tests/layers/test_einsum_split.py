"""The split of einsum equations, against the dense formula in float64."""

import numpy as np
import pytest

from keras_loraplus.layers.einsum_split import kernel_axes, split_einsum

SIZES = {letter: 2 + position % 4 for position, letter in enumerate("abcdefhijkmnqstuvwxy")}

# equation: (A's letters, B's letters), written by hand with R for the rank. Every equation of an
# EinsumDense layer in keras_hub 0.32.0 and keras 3.15.1, and of their mixtures of experts.
EQUATIONS = {
    "abc,adc->abd": ("acR", "aRd"),
    "abc,cd->abd": ("cR", "Rd"),
    "abc,cde->abde": ("cR", "Rde"),
    "abc,cdef->abdef": ("cR", "Rdef"),
    "abcd,cde->abe": ("cdR", "Re"),
    "abcd,de->abce": ("dR", "Re"),
    "bhuwd,hdf->bhuwf": ("hdR", "hRf"),
    "bkm,mnh->bknh": ("mR", "Rnh"),
    "bkm,mvh->bkvh": ("mR", "Rvh"),
    "bqm,mnh->bqnh": ("mR", "Rnh"),
    "bqm,muh->bquh": ("mR", "Ruh"),
    "bquh,uhm->bqm": ("uhR", "Rm"),
    "bsd,dkh->bskh": ("dR", "Rkh"),
    "bsd,kdh->bskh": ("dR", "Rkh"),
    "bsd,qdh->bsqh": ("dR", "Rqh"),
    "bsm,mnh->bsnh": ("mR", "Rnh"),
    "btd,df->btf": ("dR", "Rf"),
    "btd,dnh->btnh": ("dR", "Rnh"),
    "btd,ndh->btnh": ("dR", "Rnh"),
    "btf,fd->btd": ("fR", "Rd"),
    "btm,mnh->btnh": ("mR", "Rnh"),
    "btnh,nhd->btd": ("nhR", "Rd"),
    "ibnd,hnd->ibh": ("ndR", "Rh"),
    "eti,eih->eth": ("eiR", "eRh"),
    "etm,emh->eth": ("emR", "eRh"),
    "th,ehi->eti": ("hR", "Rei"),
    "th,ehm->etm": ("hR", "Rem"),
    "...x,xy->...y": ("xR", "Ry"),
    "xa...,ab->xb...": ("aR", "Rb"),
    "a...b,bc->a...c": ("bR", "Rc"),
    "ab...,bcd->adc...": ("bR", "Rcd"),
}


def sizes_of(letters, rank=3):
    return tuple({**SIZES, "R": rank}[letter] for letter in letters)


def operand(axes, rng):
    """Returns a random array for the axes; an ellipsis stands for two axes of sizes 2 and 3."""
    shape = ()
    for part in axes.replace("...", "."):
        shape += (2, 3) if part == "." else (SIZES[part],)
    return rng.normal(size=shape)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_two_thin_products_equal_the_dense_formula(equation):
    rng = np.random.default_rng(0)
    inputs, kernel = equation.split("->")[0].split(",")
    split = split_einsum(equation)
    a_letters, b_letters = EQUATIONS[equation]
    a_shape, b_shape = split.shapes(kernel, sizes_of(kernel), 3)
    assert a_shape == sizes_of(a_letters)
    assert b_shape == sizes_of(b_letters)
    a, b = rng.normal(size=a_shape), rng.normal(size=b_shape)
    delta = np.einsum(f"{a_letters},{b_letters}->{kernel}", a, b)
    np.testing.assert_allclose(np.einsum(split.delta, a, b), delta, rtol=1e-12)
    x = operand(inputs, rng)
    expected = np.einsum(equation, x, delta)
    actual = np.einsum(split.up, np.einsum(split.down, x, a), b)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)
    assert np.max(np.abs(expected)) > 1.0


# Those whose axes have to be moved, or that have experts, are not products of two matrices.
NO_MATRICES = {
    "abc,adc->abd",
    "bhuwd,hdf->bhuwf",
    "eti,eih->eth",
    "etm,emh->eth",
    "th,ehi->eti",
    "th,ehm->etm",
    "xa...,ab->xb...",
    "ab...,bcd->adc...",
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_products_of_matrices_equal_the_equations(equation):
    rng = np.random.default_rng(1)
    inputs, kernel = equation.split("->")[0].split(",")
    split = split_einsum(equation)
    assert split.is_matmul == (equation not in NO_MATRICES)
    if not split.is_matmul:
        return
    a_shape, b_shape = split.shapes(kernel, sizes_of(kernel), 3)
    a, b, x = rng.normal(size=a_shape), rng.normal(size=b_shape), operand(inputs, rng)
    expected = np.einsum(split.up, np.einsum(split.down, x, a), b)
    product = x.reshape(-1, a.size // 3) @ a.reshape(-1, 3) @ b.reshape(3, -1)
    np.testing.assert_allclose(product.reshape(expected.shape), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_fans_are_products_of_contracted_and_free_axes(equation):
    kernel = kernel_axes(equation)
    split = split_einsum(equation)
    inputs, outputs = equation.split(",")[0], equation.split("->")[1]
    fan_in = np.prod([SIZES[x] for x in kernel if x in inputs and x not in outputs])
    fan_out = np.prod([SIZES[x] for x in kernel if x in outputs and x not in inputs])
    assert split.fan_in(kernel, sizes_of(kernel)) == fan_in
    assert split.fan_out(kernel, sizes_of(kernel)) == fan_out


def test_spaces_do_not_matter():
    assert split_einsum("bqm, muh -> bquh").down == split_einsum("bqm,muh->bquh").down


def test_every_letter_in_use_still_leaves_one_for_the_rank():
    split = split_einsum("abcdefghijklm,mnop->abcdefghijklnop")
    assert split.rank_axis not in "abcdefghijklmnop"


@pytest.mark.parametrize(
    "equation, reason",
    [
        ("abc,c->abc", "contracts no kernel axis"),
        ("...d,d->...d", "contracts no kernel axis"),
        ("abc,c->ab", "no free kernel axis"),
        ("b,cd->bcd", "contracts no kernel axis"),
        ("bij,j->bij", "contracts no kernel axis"),
        ("abc,cc->abc", "repeats an axis"),
        ("abc,cxd->abd", "neither in the input nor in the output"),
        ("abc->abd", "must have the form"),
        ("abc,cd", "must have the form"),
        ("a,b,c->abc", "must have the form"),
        (None, "must have the form"),
    ],
)
def test_refused_equations_say_why(equation, reason):
    with pytest.raises(ValueError, match=reason) as error:
        split_einsum(equation)
    assert repr(equation) in str(error.value)
