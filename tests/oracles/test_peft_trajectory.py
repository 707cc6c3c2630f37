"""50 steps of real `peft` with `create_loraplus_optimizer`: same start, same batches.

What differs by convention is set equal: torch adds epsilon after bias correction, so it gets
eps / sqrt(1 - beta_2^t); PEFT takes decay as `loraplus_weight_decay`, decays no bias, and trains
1-D tensors at eta_B and both embedding factors at one absolute rate, which patterns say here.
"""

import keras
import numpy as np
import peft
import pytest
import torch
from keras import ops
from peft.optimizers import create_loraplus_optimizer
from tolerances import TRAJECTORY_50_STEPS, assert_close, relative_error

import keras_loraplus as klp

STEPS, BATCH, LENGTH = 50, 16, 5
VOCABULARY, WIDTH, HIDDEN, CLASSES = 13, 8, 24, 4
RANK, ALPHA = 3, 6
RATE, RATIO, EMBEDDING_RATE, DECAY = 2e-3, 16.0, 5e-3, 0.05
# Exact in float32: Keras forms 1 - beta^t in float32, where 0.999 alone costs 1.3e-5 of it.
BETAS, EPSILON = (1 - 2**-3, 1 - 2**-10), 1e-7


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.first = torch.nn.Linear(WIDTH, HIDDEN)
        self.second = torch.nn.Linear(HIDDEN, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, CLASSES)

    def forward(self, tokens):
        hidden = self.embed(tokens).mean(dim=1)
        hidden = torch.tanh(self.first(hidden))
        return self.head(torch.tanh(self.second(hidden)))


def keras_net():
    tokens = keras.Input((LENGTH,), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH, name="embed")(tokens)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    hidden = keras.layers.Dense(HIDDEN, activation="tanh", name="first")(hidden)
    hidden = keras.layers.Dense(HIDDEN, activation="tanh", name="second")(hidden)
    return keras.Model(tokens, keras.layers.Dense(CLASSES, name="head")(hidden))


def batches():
    rng = np.random.default_rng(7)
    for _ in range(STEPS):
        tokens = rng.integers(0, VOCABULARY, size=(BATCH, LENGTH))
        yield tokens, tokens.sum(axis=1) % CLASSES


def torch_factors(net):
    """Returns {name: (tensor, transposed)}: torch keeps A as (r, n) and B as (m, r)."""
    base = net.base_model.model
    found = {}
    for name in ("first", "second"):
        layer = getattr(base, name)
        found[f"{name}/lora_kernel_a"] = layer.lora_A["default"].weight
        found[f"{name}/lora_kernel_b"] = layer.lora_B["default"].weight
    found["embed/lora_embeddings_a"] = base.embed.lora_embedding_A["default"]
    found["embed/lora_embeddings_b"] = base.embed.lora_embedding_B["default"]
    head = base.head.modules_to_save["default"]
    found["head/kernel"], found["head/bias"] = head.weight, head.bias
    return found


def as_keras(tensor):
    return tensor.detach().numpy().T.copy()


def start_values(net, init):
    """Draws A and B in numpy: PEFT's own zeros would leave one side idle in the first step."""
    rng = np.random.default_rng(11)
    factors = torch_factors(net)
    with torch.no_grad():
        for name, tensor in factors.items():
            if not name.startswith("head"):
                tensor.copy_(torch.from_numpy(rng.normal(size=tuple(tensor.shape)) * 0.3))
            if (init == "loraplus" and name.endswith("_a")) or (
                init == "lora" and name.endswith("kernel_b")
            ):
                tensor.zero_()
    return {name: as_keras(tensor) for name, tensor in factors.items()}


def peft_run(init):
    torch.manual_seed(0)
    net = TorchNet()
    frozen = {"embed/embeddings": net.embed.weight.detach().numpy().copy()}
    for name in ("first", "second"):
        frozen[f"{name}/kernel"] = as_keras(getattr(net, name).weight)
        frozen[f"{name}/bias"] = as_keras(getattr(net, name).bias)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["embed", "first", "second"],
        modules_to_save=["head"],
    )
    net = peft.get_peft_model(net, config)
    start = start_values(net, init)
    optimizer = create_loraplus_optimizer(
        net,
        torch.optim.AdamW,
        lr=RATE,
        loraplus_lr_ratio=RATIO,
        loraplus_lr_embedding=EMBEDDING_RATE,
        loraplus_weight_decay=DECAY,
        betas=BETAS,
    )
    for step, (tokens, labels) in enumerate(batches(), start=1):
        for group in optimizer.param_groups:
            group["eps"] = EPSILON / np.sqrt(1 - BETAS[1] ** step)
        optimizer.zero_grad()
        logits = net(torch.from_numpy(tokens))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        optimizer.step()
    return frozen, start, {name: as_keras(t) for name, t in torch_factors(net).items()}


def keras_run(frozen, start, ratio=RATIO):
    model = keras_net()
    klp.enable_lora_plus(model, rank=RANK, alpha=ALPHA)
    variables = {variable.path: variable for variable in model.weights}
    for path, value in {**frozen, **start}.items():
        variables[path].assign(value)
    optimizer = klp.LoRAPlusAdamW(
        RATE,
        lr_ratio=ratio,
        embedding_lr_multiplier=EMBEDDING_RATE / RATE,
        lr_multipliers={"head/bias": RATIO, "embed/lora_embeddings_b": 1 / ratio},
        weight_decay=DECAY,
        beta_1=BETAS[0],
        beta_2=BETAS[1],
        epsilon=EPSILON,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for tokens, labels in batches():
        model.train_on_batch(tokens, labels)
    for path, value in frozen.items():
        assert_close(variables[path], value, 0.0)
    return {path: ops.convert_to_numpy(variables[path]) for path in start}


@pytest.mark.parametrize("init", ["loraplus", "lora", "both random"])
def test_50_steps_equal_those_of_peft(init):
    frozen, start, expected = peft_run(init)
    ours = keras_run(frozen, start)
    assert set(ours) == set(expected) and len(ours) == 8
    for name, value in expected.items():
        assert np.abs(value - start[name]).max() > 1e-2, f"{name} did not train"
        assert_close(ours[name], value, TRAJECTORY_50_STEPS)


def test_another_ratio_is_seen():
    frozen, start, expected = peft_run("loraplus")
    ours = keras_run(frozen, start, ratio=RATIO / 2)
    assert relative_error(ours["first/lora_kernel_b"], expected["first/lora_kernel_b"]) > 1e-2
