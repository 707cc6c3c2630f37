"""Variables, gradients and longhand oracles shared by the optimizer tests."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np

SHAPES = {
    "block/query/lora_kernel_a": (6, 2),
    "block/query/lora_kernel_b": (2, 5),
    "tokens/lora_embeddings_a": (7, 2),
    "tokens/lora_embeddings_b": (2, 4),
    "head/kernel": (4, 3),
    "head/bias": (3,),
}
PATHS = list(SHAPES)
RATIOS = {path: 16.0 if path.endswith("_b") else 1.0 for path in PATHS}


def make_variable(path, value, dtype="float32"):
    """A trainable variable with this very path."""
    *scopes, name = path.split("/")
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(keras.name_scope(scope))
        variable = keras.Variable(np.asarray(value), name=name, dtype=dtype)
    assert variable.path == path
    return variable


def start_values(seed=0):
    """Non-zero start values, one array a path."""
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype("float32") for path, shape in SHAPES.items()}


def make_variables(dtypes=(), values=None):
    """All variables of SHAPES; `dtypes` maps paths to dtypes other than float32."""
    values = values or start_values()
    return [
        make_variable(path, value, dict(dtypes).get(path, "float32"))
        for path, value in values.items()
    ]


def gradients(step, scale=1.0):
    """One gradient array a path, different at every step."""
    rng = np.random.default_rng(1000 + step)
    return [(scale * rng.normal(size=shape)).astype("float32") for shape in SHAPES.values()]


def apply(optimizer, variables, arrays):
    """One step with these gradients."""
    tensors = [
        keras.ops.convert_to_tensor(array, dtype=variable.dtype)
        for array, variable in zip(arrays, variables, strict=True)
    ]
    optimizer.apply(tensors, variables)


def train(optimizer, variables, steps=20, scale=1.0):
    """Some steps with the gradients above; returns the variables' values."""
    for step in range(steps):
        apply(optimizer, variables, gradients(step, scale))
    return to_numpy(variables)


def to_numpy(variables):
    return [keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")) for v in variables]


def longhand_adamw(
    values, gradient_steps, rates, weight_decay, beta_1=0.9, beta_2=0.999, epsilon=1e-7
):
    """AdamW written out in float64, one learning rate an array."""
    weights = [np.asarray(value, dtype="float64") for value in values]
    first = [np.zeros_like(w) for w in weights]
    second = [np.zeros_like(w) for w in weights]
    for t, arrays in enumerate(gradient_steps, start=1):
        for i, (gradient, rate) in enumerate(zip(arrays, rates, strict=True)):
            gradient = np.asarray(gradient, dtype="float64")
            weights[i] = weights[i] - rate * weight_decay * weights[i]
            first[i] = beta_1 * first[i] + (1 - beta_1) * gradient
            second[i] = beta_2 * second[i] + (1 - beta_2) * gradient**2
            corrected = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
            weights[i] = weights[i] - corrected * first[i] / (np.sqrt(second[i]) + epsilon)
    return weights


@keras.saving.register_keras_serializable(package="keras_loraplus_tests")
class AdaptedDense(keras.layers.Layer):
    """x W + x A B with a frozen W: an adapted layer as far as an optimizer can tell."""

    def __init__(self, units, rank=2, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.rank = rank

    def build(self, input_shape):
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.units), name="kernel", trainable=False
        )
        self.lora_kernel_a = self.add_weight(
            shape=(input_shape[-1], self.rank), name="lora_kernel_a"
        )
        self.lora_kernel_b = self.add_weight(shape=(self.rank, self.units), name="lora_kernel_b")

    def call(self, x):
        low_rank = keras.ops.matmul(keras.ops.matmul(x, self.lora_kernel_a), self.lora_kernel_b)
        return keras.ops.matmul(x, self.kernel) + low_rank

    def get_config(self):
        return {**super().get_config(), "units": self.units, "rank": self.rank}


def make_model(seed=7):
    """An adapted layer and a new head, with the same weights for the same seed."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [keras.Input((6,)), AdaptedDense(5, name="adapted"), keras.layers.Dense(2, name="head")]
    )
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(size=w.shape).astype("float32") for w in model.get_weights()])
    return model


def make_data(count=12, seed=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 6)).astype("float32"), rng.normal(size=(count, 2)).astype(
        "float32"
    )


def fit(model, epochs=1, batch_size=4, **kwargs):
    x, y = make_data()
    return model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, **kwargs)


def trainable_values(model):
    """Values by layer and variable name, which a reload keeps; it does not keep whole paths."""
    variables = model.trainable_variables
    names = [".".join(variable.path.split("/")[-2:]) for variable in variables]
    return dict(zip(names, to_numpy(variables), strict=True))


def run_python(code, **environment):
    """Runs code in a fresh process on the same backend; returns what it prints."""
    import keras_loraplus.optimizers

    root = Path(keras_loraplus.optimizers.__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(__file__).parent)])
    environment = {
        **os.environ,
        "KERAS_BACKEND": keras.backend.backend(),
        "PYTHONPATH": path,
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
