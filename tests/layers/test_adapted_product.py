"""torch: frozen product and adapter in one node of the graph, against the products as recorded."""

import keras
import numpy as np
import pytest
from tolerances import FLOAT32_LAYER, assert_close

import keras_loraplus as klp
from keras_loraplus import _compat
from keras_loraplus._compat import torch_nodes

if keras.backend.backend() != "torch":
    pytest.skip("a node of torch's graph; the other backends have none", allow_module_level=True)

import torch  # noqa: E402

# Equation (None for `Dense`), kernel, bias, inputs: rows, few and many, between which the gradient
# of A is formed in another way; heads out of a width, heads back into a width.
CASES = {
    "dense": (None, (7, 11), (11,), (3, 5, 7)),
    "many rows": (None, (7, 11), (11,), (50, 7)),
    "one row": (None, (7, 11), (11,), (1, 7)),
    "no bias": (None, (7, 11), None, (3, 5, 7)),
    "to-heads": ("abc,cde->abde", (7, 3, 5), (3, 5), (2, 3, 7)),
    "bias of an axis": ("abc,cde->abde", (7, 3, 5), (3, 1), (2, 20, 7)),
    "from-heads": ("abcd,cde->abe", (3, 5, 7), (7,), (2, 4, 3, 5)),
    # torch's einsum puts the contracted axes in alphabetical order, which is another sum.
    "letters from-heads": ("bquh,uhm->bqm", (3, 5, 7), (7,), (2, 4, 3, 5)),
    # Logits of a tied embedding: the kernel, A and B are those of the table, transposed.
    "tied": (None, (7, 11), None, (3, 5, 7)),
    "many tied": (None, (7, 11), None, (50, 7)),
}
# From some hundred entries on torch multiplies by other code.
WIDE = {
    "wide": (None, (130, 257), (257,), (2, 67, 130)),
    "wide to-heads": ("abc,cde->abde", (130, 4, 67), (4, 67), (2, 67, 130)),
    "wide from-heads": ("abcd,cde->abe", (4, 67, 130), (130,), (2, 67, 4, 67)),
    "one token": ("abc,cd->abd", (130, 257), (257,), (1, 1, 130)),
    "wide tied": (None, (130, 257), None, (2, 67, 130)),
}
EQUATION, X, W, BIAS, A, B, SCALE = range(7)


def operands(name, dtype=torch.float64, factors=None):
    """Returns the node's arguments; inputs, bias, A and B want gradients."""
    equation, kernel, bias, inputs = {**CASES, **WIDE}[name]
    axes = 2 if name.endswith("from-heads") else 1
    rng = np.random.default_rng(0)

    def made(shape, dtype=dtype):
        if name.endswith("tied") and shape is not inputs and shape is not bias:
            return torch.tensor(rng.normal(size=shape[::-1]), dtype=dtype).t()
        return torch.tensor(rng.normal(size=shape), dtype=dtype)

    x, w = made(inputs).requires_grad_(), made(kernel)
    bias = None if bias is None else made(bias).requires_grad_()
    factors = factors or dtype
    a = made((*kernel[:axes], 2), factors).requires_grad_()
    b = made((2, *kernel[axes:]), factors).requires_grad_()
    return [equation, x, w, bias, a, b, torch.tensor(1.5, dtype=factors)]


def as_recorded(equation, x, w, bias, a, b, scale):
    outputs = torch.matmul(x, w) if equation is None else torch.einsum(equation, x, w)
    a, b = a.reshape(-1, 2).to(x.dtype), (b.reshape(2, -1) * scale).to(x.dtype)
    outputs = outputs + ((x.reshape(-1, a.shape[0]) @ a) @ b).reshape(outputs.shape)
    return outputs if bias is None else outputs + bias


def wanting(arguments):
    return [value for value in arguments[1:] if value is not None and value.requires_grad]


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_products(name):
    arguments = operands(name)
    outputs = _compat.adapted_product(*arguments)
    expected = as_recorded(*arguments)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    actual = torch.autograd.grad(outputs, wanting(arguments), upstream)
    wanted = torch.autograd.grad(expected, wanting(arguments), upstream)
    assert len(actual) == (3 if arguments[BIAS] is None else 4)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert one.abs().max() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_gradients(name):
    arguments = operands(name)

    def product(*wanted):
        left = list(wanted)
        called = [
            left.pop(0) if torch.is_tensor(value) and value.requires_grad else value
            for value in arguments
        ]
        return _compat.adapted_product(*called)

    assert torch.autograd.gradcheck(product, wanting(arguments))
    if not name.startswith("many"):  # as for few, and 50 rows take a while
        assert torch.autograd.gradgradcheck(product, wanting(arguments))


@pytest.fixture
def onednn(monkeypatch):
    """Calls of oneDNN's product, which any size is worth here."""
    calls, linear = [], torch_nodes._onednn_linear()

    def counted(*arguments):
        calls.append(arguments)
        return linear(*arguments)

    monkeypatch.setattr(torch_nodes, "ONEDNN_FROM", 0)
    monkeypatch.setattr(torch_nodes, "_onednn_linear", lambda: counted)
    return calls


UPSTREAM = {
    "contiguous": lambda like: torch.randn(like.shape),
    "swapped": lambda like: torch.randn(*like.shape[:-2], *like.shape[:-3:-1]).mT,
    "expanded": lambda like: torch.tensor(1.5).expand(like.shape),
}


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("name", {**CASES, **WIDE})
def test_onednn_forms_the_gradient_of_the_inputs(name, upstream, onednn):
    arguments = operands(name, torch.float32)
    outputs = _compat.adapted_product(*arguments)
    weights = UPSTREAM[upstream](outputs)
    actual = torch.autograd.grad(outputs, wanting(arguments), weights)
    exact = operands(name)
    expected = as_recorded(*exact)
    wanted = torch.autograd.grad(expected, wanting(exact), weights.double())
    assert len(onednn) == 1
    for one, other in zip(actual, wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < 1e-5 * other.abs().max()


@pytest.mark.parametrize("name", {**CASES, **WIDE})
def test_onednn_forms_it_where_the_adapter_is_recorded_apart(name, onednn):
    """As with dropout: the frozen product alone, against what torch records."""
    equation, x, w = operands(name, torch.float32)[:3]
    outputs = _compat.matmul_of_frozen(x, w, equation)
    expected = torch.matmul(x, w) if equation is None else torch.einsum(equation, x, w)
    assert torch.equal(outputs, expected)
    upstream = torch.randn_like(outputs)
    (actual,) = torch.autograd.grad(outputs, x, upstream)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    assert len(onednn) == 1 and actual.shape == x.shape
    assert (actual - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_the_frozen_product_alone_has_gradients_of_gradients(name, onednn):
    equation, x, w = operands(name, torch.float32)[:3]
    outputs = _compat.matmul_of_frozen(x, w, equation)
    assert "FrozenProduct" in str(outputs.grad_fn.next_functions)
    weights = torch.randn_like(outputs).requires_grad_()
    (first,) = torch.autograd.grad(outputs, x, weights, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weights)
    expected = torch.ones_like(x)
    expected = (
        torch.matmul(expected, w) if equation is None else torch.einsum(equation, expected, w)
    )
    assert not onednn
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-5)


def test_dropout_keeps_the_fast_gradient(onednn):
    layer = klp.layers.LoRAPlusDense(257, rank=2, dropout=0.5)
    layer.build((None, 130))
    inputs = torch.randn(67, 130, requires_grad=True)
    layer(inputs, training=True).sum().backward()
    assert len(onednn) == 1
    layer(inputs, training=False).sum().backward()
    assert len(onednn) == 2
    with torch.no_grad():
        layer(inputs, training=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(inputs, training=True).sum().backward()
    assert len(onednn) == 2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_have_the_fast_gradient(tied, dropout, onednn):
    options = {"rank": 2, "tie_weights": tied, "dropout": dropout}
    layer = klp.layers.LoRAPlusReversibleEmbedding(257, 130, **options)
    layer.build()
    inputs = torch.randn(2, 67, 130, requires_grad=True)
    outputs = layer(inputs, reverse=True, training=True)
    assert ("AdaptedProduct" in str(outputs.grad_fn)) == (not dropout)
    outputs.sum().backward()
    assert len(onednn) == 1


def test_onednn_is_left_out_where_it_has_no_rule(onednn, monkeypatch):
    """The first is the control."""

    def calls(dtype=torch.float32, **settings):
        onednn.clear()
        arguments = operands("wide", dtype)
        outputs = _compat.adapted_product(*arguments)
        torch.autograd.grad(outputs.sum(), wanting(arguments), **settings)
        return len(onednn)

    assert calls() == 1
    assert calls(create_graph=True) == calls(torch.float64) == calls(torch.bfloat16) == 0
    with monkeypatch.context() as switched:
        switched.setattr(torch.backends.mkldnn, "enabled", False)
        assert calls() == 0
    monkeypatch.setattr(torch_nodes, "ONEDNN_FROM", 2 * 67 * 130 * 257)
    assert calls() == 1
    monkeypatch.setattr(torch_nodes, "ONEDNN_FROM", 2 * 67 * 130 * 257 + 1)
    assert calls() == 0
    monkeypatch.setattr(torch_nodes, "ONEDNN_FROM", 0)
    monkeypatch.setattr(torch_nodes, "_onednn_linear", lambda: None)
    assert calls() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_factors_of_float32_beside_a_layer_of_low_precision(name, dtype):
    """As under `mixed_bfloat16`; the gradients of A and B are float32."""
    arguments = operands(name, dtype, torch.float32)
    outputs = _compat.adapted_product(*arguments)
    assert outputs.dtype == dtype
    upstream = torch.randn_like(outputs)
    actual = torch.autograd.grad(outputs, wanting(arguments), upstream)
    exact = [value.double() if torch.is_tensor(value) else value for value in arguments]
    expected = as_recorded(*exact)
    wanted = torch.autograd.grad(expected, wanting(arguments), upstream.double())
    for one, other, of in zip(actual, wanted, wanting(arguments), strict=True):
        assert one.dtype == of.dtype
        # One rounding of each operand and of the result, relative to what is summed.
        assert (one.double() - other).abs().max() < 4 * torch.finfo(dtype).eps * other.abs().max()
    assert (outputs - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_the_scaled_matrix_is_rounded_once():
    arguments = operands("one row", torch.bfloat16, torch.float32)
    arguments[BIAS] = None
    with torch.no_grad():
        arguments[W].zero_()
        arguments[X].fill_(1.0)
        arguments[A].copy_(torch.eye(7, 2))
        # In bfloat16 B is 1 and s B is 3; s times the float32 B rounds to 3.015625.
        arguments[B].fill_(1.0 + 2.0**-8)
        arguments[SCALE].fill_(3.0)
    expected = ((1.0 + 2.0**-8) * torch.tensor(3.0)).bfloat16()
    assert torch.equal(_compat.adapted_product(*arguments), (2 * expected).expand(1, 11))


def _in_another_order(x):
    """Returns the same values; in memory the first two axes are swapped, as attention's are."""
    return x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()


@pytest.mark.parametrize("arranged", [lambda x: x, _in_another_order], ids=["as is", "swapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*CASES, *WIDE])
def test_a_zero_b_changes_no_bit(name, dtype, arranged):
    """With gradients and without, the outputs are those of the layer while it trained."""
    arguments = operands(name, dtype, torch.float32)
    arguments[X] = arranged(arguments[X])
    with torch.no_grad():
        arguments[B].zero_()
    equation, x, w, bias = arguments[:A]
    # torch 2.13 multiplies swapped inputs otherwise by a matrix that does not train.
    trained = w.clone().requires_grad_()
    frozen = torch.matmul(x, trained) if equation is None else torch.einsum(equation, x, trained)
    frozen = frozen if bias is None else frozen + bias
    assert torch.equal(_compat.adapted_product(*arguments), frozen)
    with torch.inference_mode():
        assert torch.equal(_compat.adapted_product(*arguments), frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arranged", [lambda x: x, _in_another_order], ids=["as is", "swapped"])
@pytest.mark.parametrize("name", {**CASES, **WIDE})
def test_no_bit_of_a_frozen_product_apart_changes(name, arranged, dtype, request):
    """Of a layer with dropout, of the sizes that oneDNN gives a gradient and of others."""
    equation, x, w = operands(name, dtype)[:3]
    x = arranged(x)
    trained = w.clone().requires_grad_()
    expected = torch.matmul(x, trained) if equation is None else torch.einsum(equation, x, trained)
    assert torch.equal(_compat.matmul_of_frozen(x, w, equation), expected)
    calls = request.getfixturevalue("onednn")
    outputs = _compat.matmul_of_frozen(x, w, equation)
    assert torch.equal(outputs, expected) and outputs.shape == expected.shape
    assert ("FrozenProduct" in str(outputs.grad_fn.next_functions)) == (dtype == torch.float32)
    with torch.inference_mode():
        assert torch.equal(_compat.matmul_of_frozen(x, w, equation), expected)
    assert not calls


@pytest.mark.parametrize("wanted", [(X,), (A,), (B,), (BIAS,), (X, B), (A, B), (A, BIAS)])
def test_a_gradient_that_nobody_wants_is_not_formed(wanted):
    arguments = operands("dense")
    for number in (X, BIAS, A, B):
        arguments[number].requires_grad_(number in wanted)
    tensors = [arguments[number] for number in wanted]
    found = torch.autograd.grad(_compat.adapted_product(*arguments).sum(), tensors)
    expected = torch.autograd.grad(as_recorded(*arguments).sum(), tensors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [(X,), (A,), (B,), (A, B), (X, A, B)])
def test_only_what_a_gradient_needs_is_kept(wanted):
    arguments = operands("dense")
    for number in (X, BIAS, A, B):
        arguments[number].requires_grad_(number in wanted)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        _compat.adapted_product(*arguments)
    assert ((7, 11) in kept) is (X in wanted)
    assert ((3, 5, 7) in kept) is (A in wanted or B in wanted)
    assert ((2, 15) in kept) is (B in wanted)  # the mirror of x A


def test_a_kernel_that_trained_once_gets_no_gradient():
    arguments = operands("dense")
    arguments[W].requires_grad_()
    outputs = _compat.adapted_product(*arguments)
    assert torch.autograd.grad(outputs.sum(), arguments[W], allow_unused=True) == (None,)


def test_a_user_changes_the_outputs_in_place():
    for name in CASES:
        arguments = operands(name)
        outputs = _compat.adapted_product(*arguments)
        outputs.mul_(3.0).sum().backward()
        (expected,) = torch.autograd.grad(3 * as_recorded(*arguments).sum(), arguments[A])
        torch.testing.assert_close(arguments[A].grad, expected, rtol=1e-12, atol=1e-12)


def test_the_operands_stay_what_they_are():
    for name in CASES:
        arguments = operands(name)
        before = [value.clone() for value in arguments[1:] if value is not None]
        _compat.adapted_product(*arguments).sum().backward()
        after = [value for value in arguments[1:] if value is not None]
        assert all(map(torch.equal, after, before))


def _autocast(arguments):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return _compat.adapted_product(*arguments)


def _other_dtype(number):
    def call(arguments):
        arguments[number] = arguments[number].float()
        return _compat.adapted_product(*arguments)

    return call


def _forward_mode(arguments):
    with torch.autograd.forward_ad.dual_level():
        return _compat.adapted_product(*arguments)


def _function_transform(arguments):
    found = []

    def loss(a):
        arguments[A] = a
        found.append(_compat.adapted_product(*arguments))
        return a.sum()

    torch.func.grad(loss)(arguments[A])
    return found[0]


@pytest.mark.parametrize(
    "call",
    [
        _autocast,
        *(_other_dtype(number) for number in (X, W, BIAS, A, B, SCALE)),
        _forward_mode,
        _function_transform,
    ],
)
def test_what_it_has_no_rule_for_is_left_to_the_caller(call):
    assert call(operands("dense")) is None
    # The control: of the same operands, outside of all that, it is the node and its value.
    arguments = operands("dense")
    outputs = _compat.adapted_product(*arguments)
    assert outputs.grad_fn.name() == "AdaptedProductBackward"
    torch.testing.assert_close(outputs, as_recorded(*arguments), rtol=1e-12, atol=1e-12)


def test_layers_compute_the_same_with_and_without_it(monkeypatch):
    """Bit for bit, so that a model's outputs are the same in training and in inference."""
    layers = [
        (klp.layers.LoRAPlusDense(11, rank=2), (3, 5, 7)),
        (klp.layers.LoRAPlusDense(128, rank=2, activation="gelu"), (64, 256)),
        (
            klp.layers.LoRAPlusEinsumDense("abc,cde->abde", (None, 3, 5), bias_axes="de", rank=2),
            (2, 3, 7),
        ),
        (klp.layers.LoRAPlusEinsumDense("abcd,cde->abe", (None, 7), rank=2), (2, 4, 3, 5)),
        # The contracted axis is the kernel's last.
        (klp.layers.LoRAPlusEinsumDense("abc,dec->abde", (None, 3, 5), rank=2), (2, 3, 7)),
    ]
    nodes = []
    for layer, shape in layers:
        x = keras.ops.convert_to_tensor(np.random.default_rng(1).normal(size=shape), "float32")
        layer.build(shape)
        for number, variable in enumerate(layer.weights):
            if variable.name in ("bias", "lora_kernel_a"):
                variable.assign(np.random.default_rng(number).normal(size=variable.shape))
        outputs = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), outputs)
        nodes.append("AdaptedProduct" in _names(outputs.grad_fn))
        with monkeypatch.context() as patch:
            patch.setattr(_compat, "adapted_product", lambda *_: None)
            recorded = layer(x)
        assert_close(outputs.detach().numpy(), recorded.detach().numpy(), FLOAT32_LAYER)
        assert "AdaptedProduct" not in _names(recorded.grad_fn)
    assert nodes == [True, True, True, True, False]


def _names(node):
    """The names of all nodes that a gradient passes."""
    found, left = [], [node]
    while left:
        node = left.pop()
        if node is not None:
            found.append(node.name())
            left += [other for other, _ in node.next_functions]
    return " ".join(found)
