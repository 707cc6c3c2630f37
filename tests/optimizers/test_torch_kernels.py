"""torch: list kernels whatever the number of variables, and gradients in any form."""

import keras
import numpy as np
import pytest
from optimizer_cases import PATHS, gradients, make_variable, make_variables, start_values, to_numpy
from tolerances import FUSED_20_STEPS, assert_close

from keras_loraplus.optimizers import LoRAPlusAdamW, factory, loraplus

if keras.backend.backend() != "torch":
    pytest.skip("torch kernels; the other backends have none", allow_module_level=True)

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

# Keras has no list kernel for these two (3.15.1), nor has the stock class.
LISTED = sorted(set(factory.LINEAR) - {"Lamb", "Muon"})


class Calls(TorchDispatchMode):
    """Counts the tensor operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def many(count):
    rng = np.random.default_rng(0)
    return [
        make_variable(f"l{i}/lora_kernel_{'ab'[i % 2]}", rng.normal(size=(3, 2)))
        for i in range(count)
    ]


def calls_of_a_step(optimizer, count):
    variables = many(count)
    ones = [torch.ones(3, 2) for _ in variables]
    with torch.no_grad():
        optimizer.apply(ones, variables)
        with Calls() as calls:
            optimizer.apply(ones, variables)
    return calls.names


@pytest.mark.parametrize("name", LISTED)
def test_the_step_is_no_loop_over_variables(name):
    cls = loraplus(getattr(keras.optimizers, name))
    few, lots = (calls_of_a_step(cls(1e-3, weight_decay=0.1), n) for n in (6, 192))
    # Lion's sign is taken one by one in the stock class as well.
    extra = 192 - 6 if name == "Lion" else 0
    assert len(lots) - len(few) == extra


def test_a_further_rate_costs_the_fused_step_little():
    """Its step; the rates, their correction and the decay are one call each for all groups."""
    calls = {}
    for rates in (2, 48):
        factors = {f"l{i}/.*": 1 + i / 100 for i in range(rates)}
        optimizer = LoRAPlusAdamW(1e-3, lr_ratio=1.0, weight_decay=0.1, lr_multipliers=factors)
        calls[rates] = calls_of_a_step(optimizer, rates)
    assert sum("_fused_adam_" in name for name in calls[48]) == 48
    assert len(calls[48]) - len(calls[2]) == 48 - 2


def test_adamw_is_one_fused_kernel_a_rate():
    names = calls_of_a_step(LoRAPlusAdamW(1e-3), 192)
    assert sum("_fused_adam_" in name for name in names) == 2


def test_no_value_is_read_back_from_the_device():
    names = calls_of_a_step(LoRAPlusAdamW(1e-3, weight_decay=0.1), 12)
    assert not [name for name in names if "_local_scalar_dense" in name]


def test_rates_and_decays_are_sent_to_the_device_once():
    """A tensor of Python's numbers is a copy that a GPU waits for; Keras makes two in each step."""
    ones = [torch.ones(3, 2) for _ in range(12)]

    def made_by(optimizer):
        variables = many(12)
        optimizer.build(variables)
        for _ in range(3):
            with torch.no_grad(), Calls() as calls:
                optimizer.apply(ones, variables)
            yield sum("lift_fresh" in name for name in calls.names)

    # Numbers of no other test, for what is made is kept.
    first, *later = made_by(LoRAPlusAdamW(1e-3, lr_ratio=1.375, weight_decay=0.1375))
    _, *stock = made_by(keras.optimizers.AdamW(1e-3, weight_decay=0.1375))
    assert first == later[0] + 2
    assert max(later) <= min(stock)


def step(optimizer, variables, tensors, count=3):
    with torch.no_grad():
        for _ in range(count):
            optimizer.apply(tensors, variables)
    return to_numpy(variables)


@pytest.mark.parametrize("name", sorted(factory.LINEAR))
def test_transposed_gradients(name):
    cls = loraplus(getattr(keras.optimizers, name))
    tensors = [torch.tensor(array) for array in gradients(0)]
    transposed = [tensor.t().contiguous().t() for tensor in tensors]
    assert not transposed[0].is_contiguous()
    torch.testing.assert_close(transposed[0], tensors[0])
    expected = step(cls(1e-2), make_variables(), tensors)
    actual = step(cls(1e-2), make_variables(), transposed)
    for value, right in zip(actual, expected, strict=True):
        assert_close(value, right, FUSED_20_STEPS)


def test_transposed_variables():
    tensors = [torch.tensor(array) for array in gradients(0)]
    expected = step(LoRAPlusAdamW(1e-2), make_variables(), tensors)
    variables = make_variables()
    for variable, value in zip(variables, start_values().values(), strict=True):
        memory = torch.tensor(value).t().contiguous().t()
        variable._value = torch.nn.Parameter(memory)
    assert not variables[0].value.is_contiguous()
    for value, right in zip(step(LoRAPlusAdamW(1e-2), variables, tensors), expected, strict=True):
        assert_close(value, right, FUSED_20_STEPS)


@pytest.mark.parametrize("name", sorted(factory.LINEAR))
def test_every_variable_excluded_from_decay(name):
    cls = loraplus(getattr(keras.optimizers, name))
    tensors = [torch.tensor(array) for array in gradients(0)]
    variables = make_variables()
    optimizer = cls(1e-2, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=variables)
    arguments = {"weight_decay": 0.0}
    if name == "Muon":
        arguments["adam_weight_decay"] = 0.0
    expected = step(cls(1e-2, **arguments), make_variables(), tensors)
    for value, right in zip(step(optimizer, variables, tensors), expected, strict=True):
        np.testing.assert_array_equal(value, right)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Lion", "Nadam", "RMSprop"])
def test_mixed_dtypes_of_variables_and_gradients(name):
    cls = loraplus(getattr(keras.optimizers, name))
    tensors = [torch.tensor(array) for array in gradients(0)]
    expected = step(cls(1e-2), make_variables(), tensors)
    variables = make_variables({PATHS[0]: "float64", PATHS[5]: "float64"})
    mixed = [tensor.double() if i % 2 else tensor for i, tensor in enumerate(tensors)]
    for value, right in zip(step(cls(1e-2), variables, mixed), expected, strict=True):
        assert_close(value, right, FUSED_20_STEPS)


def test_a_beta_of_one_takes_the_plain_step():
    tensors = [torch.tensor(array) for array in gradients(0)]
    stock = step(keras.optimizers.AdamW(1e-2, beta_2=1.0), make_variables(), tensors)
    ours = step(LoRAPlusAdamW(1e-2, lr_ratio=1.0, beta_2=1.0), make_variables(), tensors)
    for value, right in zip(ours, stock, strict=True):
        np.testing.assert_allclose(value, right)


def test_without_amsgrad_state_the_fused_and_the_plain_step_agree(monkeypatch):
    from keras_loraplus import _compat

    tensors = [torch.tensor(array) for array in gradients(0)]
    fused = step(LoRAPlusAdamW(1e-2), make_variables(), tensors, count=20)
    monkeypatch.setattr(_compat, "torch_fused_adam", lambda *args: False)
    plain = step(LoRAPlusAdamW(1e-2), make_variables(), tensors, count=20)
    for value, right in zip(fused, plain, strict=True):
        assert_close(value, right, FUSED_20_STEPS)


def test_under_torch_compile_it_takes_the_plain_step():
    tensors = [torch.tensor(array) for array in gradients(0)]
    expected = step(LoRAPlusAdamW(1e-2), make_variables(), tensors)
    variables = make_variables()
    optimizer = LoRAPlusAdamW(1e-2)
    optimizer.build(variables)
    compiled = torch.compile(lambda: optimizer.apply(tensors, variables), backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            compiled()
    for value, right in zip(to_numpy(variables), expected, strict=True):
        assert_close(value, right, FUSED_20_STEPS)
