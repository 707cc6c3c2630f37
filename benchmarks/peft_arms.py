"""The same models in PyTorch under PEFT, trained with its LoRA+ optimizer."""

import keras
import numpy as np

from benchmarks.arms import RANK, RATE, SEED

RATIO = 16.0


def bert(shape, batch, length, all_linear):
    import transformers

    from benchmarks.models import CLASSES, class_labels, token_batch

    _seed()
    config = transformers.BertConfig(
        vocab_size=shape["vocabulary_size"],
        hidden_size=shape["hidden_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        intermediate_size=shape["intermediate_dim"],
        max_position_embeddings=shape["max_sequence_length"],
        # KerasHub's own; torch takes longer for it than for the exact one, transformers' default.
        hidden_act="gelu_pytorch_tanh",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    model = transformers.BertForSequenceClassification(config)
    tokens = token_batch(shape["vocabulary_size"], batch, length)
    inputs = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "labels": class_labels(batch),
    }
    targets = "all-linear" if all_linear else ["query", "value"]
    return _step(model, targets, inputs, ["classifier"])


def llama(shape, batch, length):
    """PEFT ties the adapter of the output projection to that of the embeddings, as ours is."""
    import transformers

    from benchmarks.models import token_batch

    _seed()
    config = transformers.LlamaConfig(
        vocab_size=shape["vocabulary_size"],
        hidden_size=shape["hidden_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_query_heads"],
        num_key_value_heads=shape["num_key_value_heads"],
        intermediate_size=shape["intermediate_dim"],
        tie_word_embeddings=shape["tie_word_embeddings"],
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = token_batch(shape["vocabulary_size"], batch, length + 1)
    # transformers shifts the labels itself; of length + 1 tokens length are predicted.
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": tokens}
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return _step(model, [*projections, "embed_tokens"], inputs, None, ensure_weight_tying=True)


def vit(shape, batch):
    import transformers

    from benchmarks.models import CLASSES, class_labels, image_batch

    _seed()
    config = transformers.ViTConfig(
        hidden_size=shape["hidden_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        intermediate_size=shape["mlp_dim"],
        image_size=shape["image_shape"][0],
        patch_size=shape["patch_size"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    model = transformers.ViTForImageClassification(config)
    images = image_batch(shape["image_shape"], batch).transpose(0, 3, 1, 2).copy()
    inputs = {"pixel_values": images, "labels": class_labels(batch)}
    return _step(model, "all-linear", inputs, ["classifier"])


def resnet(shape, batch):
    import torch

    from benchmarks.models import CLASSES, class_labels, image_batch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            channels = shape["channels"]
            self.convs = torch.nn.ModuleList(
                torch.nn.Conv2d(channels, channels, 3, padding=1)
                for _ in range(2 * shape["blocks"])
            )
            self.head = torch.nn.Linear(channels, CLASSES)

        def forward(self, images, labels):
            x = images
            for first, second in zip(self.convs[::2], self.convs[1::2], strict=True):
                x = torch.relu(x + second(torch.relu(first(x))))
            logits = self.head(x.mean((2, 3)))
            return torch.nn.functional.cross_entropy(logits, labels)

    _seed()
    size = (shape["size"], shape["size"], shape["channels"])
    images = image_batch(size, batch).transpose(0, 3, 1, 2).copy()
    inputs = {"images": images, "labels": class_labels(batch)}
    return _step(Net(), r"convs\.\d+", inputs, ["head"])


def _seed():
    import torch

    torch.manual_seed(SEED)


def _step(model, targets, inputs, heads, **settings):
    import peft
    import torch
    from peft.optimizers import create_loraplus_optimizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if keras.config.dtype_policy().name == "bfloat16":
        model = model.to(torch.bfloat16)
    model = peft.get_peft_model(
        model.to(device),
        peft.LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            target_modules=targets,
            modules_to_save=heads,
            **settings,
        ),
    )
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, fused=True
    )
    batch = {}
    for name, value in inputs.items():
        tensor = torch.from_numpy(value).to(device)
        floating = tensor.is_floating_point()
        batch[name] = tensor.to(next(model.parameters()).dtype) if floating else tensor

    def step():
        optimizer.zero_grad()
        output = model(**batch)
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step
