"""What is measured: each case gives arms, functions that do one step and wait for it.

Keras is imported here with the backend that the worker's environment names.
"""

import functools

import keras
import numpy as np

import keras_loraplus as klp

SEED = 0


def bert_wide():
    """A training step on BERT, hidden 1024, 4 layers, all-linear rank 8, 8 x 32 tokens."""
    rng = np.random.default_rng(SEED)
    tokens = rng.integers(1, 1000, size=(8, 32))
    labels = rng.integers(0, 8, size=8)
    arms = {
        "ours": lambda: _bert_step(_bert_ours, tokens, labels),
        "native": lambda: _bert_step(_bert_native, tokens, labels),
        "limit": lambda: _bert_step(_bert_limit, tokens, labels),
    }
    if keras.backend.backend() == "torch":
        arms["peft"] = lambda: _bert_peft(tokens, labels)
    return arms


_BERT = {
    "num_layers": 4,
    "num_heads": 16,
    "hidden_dim": 1024,
    "intermediate_dim": 4096,
    "max_sequence_length": 32,
    "vocabulary_size": 1000,
}
_LINEAR = [
    "query",
    "key",
    "value",
    "attention_output",
    "feedforward_intermediate_dense",
    "feedforward_output_dense",
    "pooled_dense",
]


def _bert_step(prepare, tokens, labels):
    import keras_hub

    keras.utils.set_random_seed(SEED)
    backbone = keras_hub.models.BertBackbone(**_BERT, dropout=0.0)
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=8, preprocessor=None, dropout=0.0
    )
    optimizer = prepare(backbone)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss)
    features = {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones_like(tokens),
    }
    # The task's own train_on_batch would run its preprocessing pipeline.
    return lambda: keras.Model.train_on_batch(model, features, labels)


def _bert_ours(backbone):
    klp.enable_lora_plus(backbone, rank=8, targets="all-linear")
    return klp.LoRAPlusAdamW(1e-4)


def _bert_native(backbone):
    backbone.enable_lora(8, target_layer_names=_LINEAR)
    return keras.optimizers.AdamW(1e-4)


def _bert_limit(backbone):
    """No adapter: only the first normalisation's beta trains, so all of it is run backward."""
    for variable in backbone.weights:
        variable.trainable = False
    backbone.get_layer("embeddings_layer_norm").beta.trainable = True
    return keras.optimizers.AdamW(1e-4)


def _bert_peft(tokens, labels):
    import peft
    import torch
    import transformers
    from peft.optimizers import create_loraplus_optimizer

    torch.manual_seed(SEED)
    config = transformers.BertConfig(
        vocab_size=_BERT["vocabulary_size"],
        hidden_size=_BERT["hidden_dim"],
        num_hidden_layers=_BERT["num_layers"],
        num_attention_heads=_BERT["num_heads"],
        intermediate_size=_BERT["intermediate_dim"],
        max_position_embeddings=_BERT["max_sequence_length"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=8,
    )
    model = transformers.BertForSequenceClassification(config)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=8, lora_alpha=8, target_modules="all-linear", modules_to_save=["classifier"]
        ),
    )
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0, fused=True
    )
    ids, mask = torch.from_numpy(tokens), torch.ones(tokens.shape, dtype=torch.long)
    target = torch.from_numpy(labels)

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=target).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def dense_stack():
    """A training step on six Dense layers 2048 wide, batch 32, rank 8."""
    rng = np.random.default_rng(SEED)
    x, y = (rng.normal(size=(32, 2048)).astype("float32") for _ in range(2))

    def ours(model):
        klp.enable_lora_plus(model, rank=8, targets=".*dense.*")
        return klp.LoRAPlusAdamW(1e-4)

    def native(model):
        for layer in model.layers:
            layer.enable_lora(8)
            layer.bias.trainable = False
        return keras.optimizers.AdamW(1e-4)

    def limit(model):
        """No adapter: only the first bias trains, so all of it is run backward."""
        for variable in model.weights:
            variable.trainable = variable is model.layers[0].bias
        return keras.optimizers.AdamW(1e-4)

    def step(prepare):
        keras.utils.set_random_seed(SEED)
        layers = [keras.layers.Dense(2048, activation="relu") for _ in range(6)]
        model = keras.Sequential([keras.Input((2048,)), *layers])
        model.compile(prepare(model), "mse")
        return lambda: model.train_on_batch(x, y)

    return {arm.__name__: functools.partial(step, arm) for arm in (ours, native, limit)}


def optimizer_step():
    """The optimizer alone: 192 tensors of an adapter, 96 of 1024 x 8 and 96 of 8 x 1024."""
    rng = np.random.default_rng(SEED)
    shapes = [(1024, 8), (8, 1024)] * 96
    gradients = [rng.normal(size=shape).astype("float32") for shape in shapes]
    arms = {
        "ours": lambda: _apply(klp.LoRAPlusAdamW(1e-4), shapes, gradients),
        "stock": lambda: _apply(keras.optimizers.AdamW(1e-4), shapes, gradients),
    }
    if keras.backend.backend() == "torch":
        arms["torch_fused"] = lambda: _torch_fused(shapes, gradients)
    return arms


def _variables(shapes):
    names = ("lora_kernel_a", "lora_kernel_b")
    return [
        keras.Variable(keras.ops.ones(shape), name=names[position % 2])
        for position, shape in enumerate(shapes)
    ]


def _apply(optimizer, shapes, gradients):
    variables = _variables(shapes)
    optimizer.build(variables)
    gradients = [keras.ops.convert_to_tensor(gradient) for gradient in gradients]
    backend = keras.backend.backend()
    if backend == "torch":
        return lambda: optimizer.apply(gradients, variables)
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


def _torch_fused(shapes, gradients):
    import torch

    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.from_numpy(gradient)
    groups = [
        {"params": parameters[::2], "lr": 1e-4},
        {"params": parameters[1::2], "lr": 16e-4},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.004, fused=True).step


CASES = {
    "bert_wide": bert_wide,
    "dense_stack": dense_stack,
    "optimizer_step": optimizer_step,
}
