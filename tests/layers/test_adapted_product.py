"""torch: frozen product and adapter in one node of the graph, against the products as recorded."""

import keras
import numpy as np
import pytest
from tolerances import FLOAT32_LAYER, assert_close

import keras_loraplus as klp
from keras_loraplus import _compat

if keras.backend.backend() != "torch":
    pytest.skip("a node of torch's graph; the other backends have none", allow_module_level=True)

import torch  # noqa: E402

# Equation (None for `Dense`), kernel, inputs: rows, heads out of a width, heads back into a width.
CASES = {
    "dense": (None, (7, 11), (3, 5, 7)),
    "to-heads": ("abc,cde->abde", (7, 3, 5), (2, 3, 7)),
    "from-heads": ("abcd,cde->abe", (3, 5, 7), (2, 4, 3, 5)),
}


def operands(name, dtype=torch.float64):
    equation, kernel, inputs = CASES[name]
    n = inputs[-1] if name != "from-heads" else inputs[-1] * inputs[-2]
    rng = np.random.default_rng(0)
    shapes = (inputs, kernel, (n, 2), (2, int(np.prod(kernel)) // n))
    made = [torch.tensor(rng.normal(size=shape), dtype=dtype) for shape in shapes]
    for number in (0, 2, 3):
        made[number].requires_grad_()
    return equation, made


def as_recorded(equation, x, w, a, b):
    outputs = torch.matmul(x, w) if equation is None else torch.einsum(equation, x, w)
    inner = x.reshape(-1, a.shape[0]) @ a
    return outputs + (inner @ b).reshape(outputs.shape)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_products(name):
    equation, (x, w, a, b) = operands(name)
    outputs = _compat.adapted_product(equation, x, w, a, b)
    expected = as_recorded(equation, x, w, a, b)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    actual = torch.autograd.grad(outputs, (x, a, b), upstream)
    wanted = torch.autograd.grad(expected, (x, a, b), upstream)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert one.abs().max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_gradients(name):
    equation, (x, w, a, b) = operands(name)

    def product(x, a, b):
        return _compat.adapted_product(equation, x, w, a, b)

    assert torch.autograd.gradcheck(product, (x, a, b))
    assert torch.autograd.gradgradcheck(product, (x, a, b))


@pytest.mark.parametrize("wanted", [(0,), (2,), (3,), (0, 3), (2, 3)])
def test_a_gradient_that_nobody_wants_is_not_formed(wanted):
    equation, tensors = operands("dense")
    for number, tensor in enumerate(tensors):
        tensor.requires_grad_(number in wanted)
    found = torch.autograd.grad(
        _compat.adapted_product(equation, *tensors).sum(), [tensors[number] for number in wanted]
    )
    expected = torch.autograd.grad(
        as_recorded(equation, *tensors).sum(), [tensors[number] for number in wanted]
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_kernel_is_kept_only_for_a_gradient_of_the_inputs():
    equation, (x, w, a, b) = operands("dense")
    for wants_inputs in (True, False):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tuple(tensor.shape)) or tensor, lambda t: t
        ):
            _compat.adapted_product(equation, x.requires_grad_(wants_inputs), w, a, b)
        assert (tuple(w.shape) in kept) is wants_inputs


def test_a_user_changes_the_outputs_in_place():
    equation, (x, w, a, b) = operands("to-heads")
    outputs = _compat.adapted_product(equation, x, w, a, b)
    outputs.mul_(3.0).sum().backward()
    (expected,) = torch.autograd.grad(3 * as_recorded(equation, x, w, a, b).sum(), a)
    torch.testing.assert_close(a.grad, expected, rtol=1e-12, atol=1e-12)


def _trainable_kernel(equation, x, w, a, b):
    return _compat.adapted_product(equation, x, w.clone().requires_grad_(), a, b)


def _without_gradients(equation, x, w, a, b):
    with torch.no_grad():
        return _compat.adapted_product(equation, x, w, a, b)


def _autocast(equation, x, w, a, b):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return _compat.adapted_product(equation, x, w, a, b)


def _other_dtype(equation, x, w, a, b):
    return _compat.adapted_product(equation, x.float(), w, a, b)


def _forward_mode(equation, x, w, a, b):
    with torch.autograd.forward_ad.dual_level():
        return _compat.adapted_product(equation, x, w, a, b)


def _function_transform(equation, x, w, a, b):
    found = []

    def loss(a):
        found.append(_compat.adapted_product(equation, x, w, a, b))
        return a.sum()

    torch.func.grad(loss)(a)
    return found[0]


@pytest.mark.parametrize(
    "call",
    [
        _trainable_kernel,
        _without_gradients,
        _autocast,
        _other_dtype,
        _forward_mode,
        _function_transform,
    ],
)
def test_what_it_has_no_rule_for_is_left_to_the_caller(call):
    equation, tensors = operands("dense")
    assert call(equation, *tensors) is None
    # The control: of the same operands, outside of all that, it is the node and its value.
    outputs = _compat.adapted_product(equation, *tensors)
    assert outputs.grad_fn.name() == "AdaptedProductBackward"
    torch.testing.assert_close(outputs, as_recorded(equation, *tensors), rtol=1e-12, atol=1e-12)


def test_layers_compute_the_same_with_and_without_it(monkeypatch):
    """Bit for bit, so that a model's outputs are the same in training and in inference."""
    layers = [
        (klp.layers.LoRAPlusDense(11, rank=2), (3, 5, 7)),
        (klp.layers.LoRAPlusEinsumDense("abc,cde->abde", (None, 3, 5), rank=2), (2, 3, 7)),
        (klp.layers.LoRAPlusEinsumDense("abcd,cde->abe", (None, 7), rank=2), (2, 4, 3, 5)),
        # The contracted axis is the kernel's last.
        (klp.layers.LoRAPlusEinsumDense("abc,dec->abde", (None, 3, 5), rank=2), (2, 3, 7)),
    ]
    nodes = []
    for layer, shape in layers:
        x = keras.ops.convert_to_tensor(np.random.default_rng(1).normal(size=shape), "float32")
        layer.build(shape)
        layer.lora_kernel_a.assign(np.random.default_rng(2).normal(size=layer.lora_kernel_a.shape))
        outputs = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), outputs)
        nodes.append("AdaptedProduct" in _names(outputs.grad_fn))
        with monkeypatch.context() as patch:
            patch.setattr(_compat, "adapted_product", lambda *_: None)
            recorded = layer(x)
        assert_close(outputs.detach().numpy(), recorded.detach().numpy(), FLOAT32_LAYER)
        assert "AdaptedProduct" not in _names(recorded.grad_fn)
    assert nodes == [True, True, True, False]


def _names(node):
    """The names of all nodes that a gradient passes."""
    found, left = [], [node]
    while left:
        node = left.pop()
        if node is not None:
            found.append(node.name())
            left += [other for other, _ in node.next_functions]
    return " ".join(found)
