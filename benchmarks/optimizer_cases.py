"""The optimizer's step alone, on the tensors of an adapter of so many layers."""

import functools

import keras
import numpy as np

import keras_loraplus as klp
from benchmarks.arms import RATE, SEED

RATIO = 16.0
ROLES = ("lora_kernel_a", "lora_kernel_b")


def optimizer_step():
    """The contract's case: 192 tensors, 96 of 1024 x 8 and 96 of 8 x 1024, two rates."""
    tensors = Tensors(192, 2)
    arms = {"ours": tensors.ours, "stock": tensors.stock}
    if keras.backend.backend() == "torch":
        arms["torch_fused"] = functools.partial(tensors.torch, fused=True)
    return arms


def optimizer_table(tensors):
    """Every optimizer on so many tensors, in 1, 2 and 48 groups (or as many as there are)."""
    arms = {"stock/1": Tensors(tensors, 1).stock}
    for multipliers in (1, 2, 48):
        some = Tensors(tensors, multipliers)
        arms[f"ours/{multipliers}"] = some.ours
        arms[f"MultiOptimizer/{multipliers}"] = some.multi
        if keras.backend.backend() == "torch":
            for kind in ("plain", "foreach", "fused"):
                choice = {"foreach": False} if kind == "plain" else {kind: True}
                arms[f"torch {kind}/{multipliers}"] = functools.partial(some.torch, **choice)
    return arms


class Tensors:
    """Shapes, gradients and one multiplier for each tensor of an adapter.

    Args:
        count: Number of tensors; every second one is a B.
        multipliers: Number of different multipliers, or more than `count` for one a tensor.
    """

    def __init__(self, count, multipliers):
        self.shapes = [(1024, 8), (8, 1024)] * (count // 2)
        self.scopes = max(1, min(multipliers, count) // 2)
        self.ratio = RATIO if multipliers > 1 else 1.0
        self.factors = {f"group_{scope}/.*": 1 + scope / 100 for scope in range(self.scopes)}

    def group(self, position):
        return position // 2 % self.scopes

    def multiplier(self, position):
        factor = 1 + self.group(position) / 100
        return factor * (self.ratio if position % 2 else 1.0)

    def gradients(self):
        rng = np.random.default_rng(SEED)
        return [rng.normal(size=shape).astype("float32") for shape in self.shapes]

    def variables(self):
        made = []
        for position, shape in enumerate(self.shapes):
            with keras.name_scope(f"group_{self.group(position)}"):
                made.append(keras.Variable(keras.ops.ones(shape), name=ROLES[position % 2]))
        return made

    def ours(self):
        factors = self.factors if self.scopes > 1 else None
        return self.step(klp.LoRAPlusAdamW(RATE, lr_ratio=self.ratio, lr_multipliers=factors))

    def stock(self):
        return self.step(keras.optimizers.AdamW(RATE))

    def multi(self):
        rates = {}
        for position in range(len(self.shapes)):
            path = f"group_{self.group(position)}/{ROLES[position % 2]}"
            rates[path if self.ratio > 1 else ".*"] = RATE * self.multiplier(position)
        parts = {path: keras.optimizers.AdamW(rate) for path, rate in rates.items()}
        default = keras.optimizers.AdamW(RATE)
        if self.ratio == 1.0:
            default, parts = parts[".*"], {}
        mapping = keras.optimizers.OptimizerMap(default)
        for path, optimizer in parts.items():
            mapping[path] = optimizer
        return self.step(keras.optimizers.MultiOptimizer(mapping))

    def step(self, optimizer):
        """Returns a function that applies the gradients once and waits for it."""
        variables = self.variables()
        optimizer.build(variables)
        gradients = [keras.ops.convert_to_tensor(gradient) for gradient in self.gradients()]
        backend = keras.backend.backend()
        if backend == "torch":
            return _waiting(lambda: optimizer.apply(gradients, variables))
        if backend == "tensorflow":
            import tensorflow as tf

            function = tf.function(lambda: optimizer.apply(gradients, variables), jit_compile=True)

            def step():
                function()
                return variables[-1].numpy()

            return step
        import jax

        function = jax.jit(optimizer.stateless_apply)
        state = [[v.value for v in optimizer.variables], [v.value for v in variables]]

        def step():
            trained, slots = function(state[0], gradients, state[1])
            state[:] = [slots, trained]
            return jax.block_until_ready(trained)

        return step

    def torch(self, **choice):
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        groups = {}
        for position, gradient in enumerate(self.gradients()):
            parameter = torch.nn.Parameter(torch.ones(gradient.shape, device=device))
            parameter.grad = torch.from_numpy(gradient).to(device)
            groups.setdefault(self.multiplier(position), []).append(parameter)
        parts = [{"params": p, "lr": RATE * multiplier} for multiplier, p in groups.items()]
        return _waiting(torch.optim.AdamW(parts, weight_decay=0.004, **choice).step)


def _waiting(step):
    import torch

    if not torch.cuda.is_available():
        return step

    def waiting():
        step()
        torch.cuda.synchronize()

    return waiting
