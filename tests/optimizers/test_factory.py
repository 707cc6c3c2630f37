"""`loraplus` of other Keras optimizers: which, and that each steps as its stock class does."""

import keras
import pytest
from optimizer_cases import RATIOS, make_variables, start_values, to_numpy, train
from tolerances import EXACT, FUSED_20_STEPS, assert_close, relative_error

from keras_loraplus.optimizers import LoRAPlusAdamW, factory, loraplus

LISTED = sorted(factory.LINEAR)
FUSED = ("Adam", "AdamW")


def arguments_of(name):
    extra = {
        "SGD": {"momentum": 0.9, "nesterov": True},
        "RMSprop": {"momentum": 0.5, "centered": True},
        "Muon": {"adam_weight_decay": 0.02, "adam_lr_ratio": 0.5},
    }
    return {"weight_decay": 0.05, **extra.get(name, {})}


def tolerance(name, backend):
    # Matrix products of torch (Muon) are not reproducible to the last bit between calls.
    approximate = backend == "torch" and name in (*FUSED, "Muon")
    return FUSED_20_STEPS if approximate else EXACT


def test_the_list_is_the_documented_one():
    assert LISTED == [
        "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Lamb", "Lion", "Muon", "Nadam",
        "RMSprop", "SGD",
    ]  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_ratio_one_is_the_stock_optimizer(name, backend):
    stock = getattr(keras.optimizers, name)
    expected = train(stock(1e-2, **arguments_of(name)), make_variables())
    actual = train(loraplus(stock)(1e-2, lr_ratio=1.0, **arguments_of(name)), make_variables())
    for start, value, right in zip(start_values().values(), actual, expected, strict=True):
        assert_close(value, right, tolerance(name, backend))
        assert relative_error(right, start) > 1e-4


@pytest.mark.parametrize("name", LISTED)
def test_ratio_four_is_two_stock_optimizers(name, backend):
    stock = getattr(keras.optimizers, name)
    slow, fast = (stock(rate, **arguments_of(name)) for rate in (0.0625, 0.25))
    both = keras.optimizers.MultiOptimizer(lambda v: fast if RATIOS[v.path] > 1 else slow)
    expected = train(both, make_variables())
    optimizer = loraplus(stock)(0.0625, lr_ratio=4.0, **arguments_of(name))
    actual = train(optimizer, make_variables())
    for value, right in zip(actual, expected, strict=True):
        assert_close(value, right, tolerance(name, backend))
    one_rate = train(stock(0.0625, **arguments_of(name)), make_variables())
    moved = [relative_error(a, b) for a, b in zip(actual, one_rate, strict=True)]
    assert all(m > 1e-3 for m, ratio in zip(moved, RATIOS.values(), strict=True) if ratio > 1)


@pytest.mark.parametrize("name", LISTED)
def test_config_round_trip_and_names(name):
    stock = getattr(keras.optimizers, name)
    cls = loraplus(stock)
    assert cls.__name__ == f"LoRAPlus{name}"
    assert loraplus(stock) is cls and loraplus(cls) is cls
    assert isinstance(cls(1e-2), stock)
    assert loraplus(type(stock(1e-2))) is cls
    optimizer = cls(
        1e-2, lr_ratio=3.0, lr_multipliers={"head/.*": 2.0}, embedding_lr_multiplier=0.5
    )
    config = optimizer.get_config()
    assert cls.from_config(config).get_config() == config
    stock_config = stock(1e-2).get_config()
    assert set(config) - set(stock_config) == {
        "lr_ratio", "lr_multipliers", "embedding_lr_multiplier",
    }  # fmt: skip


def test_adamw_is_loraplus_adamw():
    assert loraplus(keras.optimizers.AdamW) is LoRAPlusAdamW
    assert issubclass(LoRAPlusAdamW, keras.optimizers.AdamW)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ScheduleFreeAdamW", "averages its iterates"),
        ("Ftrl", "non-linearly"),
        ("Adafactor", "relative_step"),
        ("MultiOptimizer", "no learning rate of its own"),
        ("LossScaleOptimizer", "wrap the LoRA\\+ optimizer inside it"),
    ],
)
@pytest.mark.parametrize("assume_linear", [False, True])
def test_refused_by_name_with_the_reason(name, reason, assume_linear):
    stock = getattr(keras.optimizers, name)
    with pytest.raises(ValueError, match=reason) as error:
        loraplus(stock, assume_linear=assume_linear)
    assert name in str(error.value)


def test_every_optimizer_of_keras_is_listed_or_refused():
    public = {
        name
        for name, value in vars(keras.optimizers).items()
        if isinstance(value, type) and issubclass(value, keras.optimizers.Optimizer)
    }
    assert public - {"Optimizer"} == {*factory.LINEAR, *factory.REFUSED}


@pytest.mark.parametrize("bad", ["adamw", None, 3, keras.layers.Dense])
def test_not_an_optimizer_class(bad):
    with pytest.raises(ValueError, match="Expected an optimizer class"):
        loraplus(bad)


def test_an_instance_is_refused():
    with pytest.raises(ValueError, match="Expected an optimizer class"):
        loraplus(keras.optimizers.SGD())


class Plain(keras.optimizers.Optimizer):
    """A user's optimizer: plain gradient descent."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, gradient * keras.ops.cast(learning_rate, variable.dtype))


class WholeStep(Plain):
    """Steps all variables in a method of its own and never calls `update_step`."""

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            variable.assign(variable - gradient * keras.ops.cast(learning_rate, variable.dtype))


class OwnDecay(Plain):
    def _apply_weight_decay(self, variables):
        pass


@pytest.mark.parametrize("cls", [Plain, WholeStep])
def test_a_class_of_the_users_own(cls):
    with pytest.raises(ValueError, match="assume_linear=True"):
        loraplus(cls)
    made = loraplus(cls, assume_linear=True)
    assert loraplus(cls) is made
    sgd = loraplus(keras.optimizers.SGD)(0.125, lr_ratio=4.0, weight_decay=0.1)
    expected = train(sgd, make_variables(), steps=3)
    variables = make_variables()
    optimizer = made(0.125, lr_ratio=4.0, weight_decay=0.1)
    for value, right in zip(train(optimizer, variables, steps=3), expected, strict=True):
        assert_close(value, right, FUSED_20_STEPS)
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(restored) is made and restored.lr_ratio == 4.0


def test_a_class_with_its_own_decay_is_refused():
    with pytest.raises(ValueError, match="_apply_weight_decay"):
        loraplus(OwnDecay, assume_linear=True)


def test_a_subclass_of_a_listed_optimizer_is_not_taken_for_granted():
    class Mine(keras.optimizers.Adam):
        pass

    with pytest.raises(ValueError, match="Mine is not an optimizer that LoRA\\+ has been tested"):
        loraplus(Mine)
    made = loraplus(Mine, assume_linear=True)
    variables = make_variables()
    optimizer = made(1e-2, lr_ratio=2.0)
    expected = train(loraplus(keras.optimizers.Adam)(1e-2, lr_ratio=2.0), make_variables(), steps=5)
    for value, right in zip(train(optimizer, variables, steps=5), expected, strict=True):
        assert_close(value, right, FUSED_20_STEPS)
    assert len(to_numpy(variables)) == len(variables)
