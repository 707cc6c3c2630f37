"""Tiny random Hugging Face models of many architectures, and the same in KerasHub."""

import dataclasses
import os
from typing import Any

import numpy as np

# Nothing here may ask a server: the models are made in place.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY, LENGTH = 40, 6
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
DECODER = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: Prefix of the classes in transformers.
        settings: Arguments of its configuration.
        keras_targets: Layers to adapt in KerasHub.
        peft_targets: The same modules in PEFT.
        saved: Ending of the class that makes the checkpoint.
        loaded: Ending of the class that the adapter is for.
        prefix: What `export_peft` needs where the two differ.
    """

    name: str
    settings: dict
    keras_targets: tuple
    peft_targets: tuple
    saved: str = "Model"
    loaded: str = "Model"
    prefix: str | None = None

    def config(self):
        import transformers

        return getattr(transformers, f"{self.name}Config")(**self.settings)


MHA = ("query", "value", "attention_output")
GQA = (
    "query",
    "key",
    "value",
    "attention_output",
    ".*/(feedforward|ffw)_(gate|gating|intermediate|output|linear).*",
)
ATTENTION = ("query", "value", "attention.output.dense")
DECODER_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

CAUSAL = ("ForCausalLM", "ForCausalLM")

CASES = {
    # KerasHub's BERT has the tanh form of GELU.
    "bert": Case("Bert", {**ENCODER, "hidden_act": "gelu_new"}, MHA, ATTENTION),
    "roberta": Case(
        "Roberta",
        {**ENCODER, "pad_token_id": 1, "layer_norm_eps": 1e-5},
        MHA,
        ATTENTION,
        "ForMaskedLM",
        prefix="",
    ),
    "distilbert": Case(
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 24,
            "max_position_embeddings": 20,
        },
        MHA,
        ("q_lin", "v_lin", "out_lin"),
        "ForMaskedLM",
        prefix="",
    ),
    "gpt2": Case(
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20},
        ("query", "key", "value", "attention_output"),
        ("c_attn", "attn.c_proj"),
    ),
    "llama": Case("Llama", DECODER, GQA, DECODER_MODULES, *CAUSAL),
    "mistral": Case("Mistral", DECODER, GQA, DECODER_MODULES, *CAUSAL),
    "gemma": Case("Gemma", {**DECODER, "head_dim": 8}, GQA, DECODER_MODULES, *CAUSAL),
    "qwen2": Case("Qwen2", DECODER, GQA, DECODER_MODULES, *CAUSAL),
    "qwen3": Case("Qwen3", {**DECODER, "head_dim": 8}, GQA, DECODER_MODULES, *CAUSAL),
    "vit": Case(
        "ViT",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 24,
            "image_size": 8,
            "patch_size": 4,
        },
        (*MHA, "patch_embedding"),  # a convolution
        ("q_proj", "v_proj", "o_proj", "projection"),
        "ForImageClassification",
        prefix="",
    ),
}


def save_random(case, folder, seed=0):
    """Makes a random model of a case, with weights far from zero, and saves it."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, f"{case.name}{case.saved}")(case.config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * 0.2
            value = noise if parameter.ndim > 1 else parameter + 0.5 * noise
            # KerasHub rounds Mistral's weights to float16.
            parameter.copy_(value.half().float())
        for name, parameter in model.named_parameters():
            # Zero in real RoBERTa checkpoints, and not in KerasHub's model.
            if case.name == "Roberta" and "token_type_embeddings" in name:
                parameter.zero_()
    model.tie_weights()
    model.save_pretrained(folder)


def load_transformers(case, folder):
    import transformers

    return getattr(transformers, f"{case.name}{case.loaded}").from_pretrained(folder).eval()


def load_keras(folder):
    import keras_hub

    # ViT's image converter and the tokenizers are not needed.
    return keras_hub.models.Backbone.from_preset(str(folder))


def inputs(case):
    rng = np.random.default_rng(5)
    if case.name == "ViT":
        return rng.normal(size=(3, 8, 8, 3)).astype("float32")
    ids = rng.integers(4, VOCABULARY, size=(3, LENGTH)).astype("int32")
    return ids


def transformers_output(case, model, values):
    """Returns the logits of a causal language model, the last hidden state of any other."""
    import torch

    with torch.no_grad():
        if case.name == "ViT":
            outputs = model(torch.tensor(values.transpose(0, 3, 1, 2)))
        else:
            ids = torch.tensor(values.astype("int64"))
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return outputs[0].numpy()


def keras_output(case, backbone, values):
    """Returns what `transformers_output` does."""
    import keras

    if values.ndim == 4:
        outputs = backbone(values)
    else:
        wanted = {
            "token_ids": values,
            "padding_mask": np.ones_like(values),
            "segment_ids": np.zeros_like(values),
        }
        names = [tensor.name for tensor in backbone.inputs]
        outputs = backbone({name: wanted[name] for name in names})
    if isinstance(outputs, dict):
        outputs = outputs["sequence_output"]
    if case.loaded == "ForCausalLM":
        outputs = backbone.token_embedding(outputs, reverse=True)
    return keras.ops.convert_to_numpy(outputs)


def random_peft(model, case, seed=2, **settings: Any):
    """Wraps a transformers model with PEFT, A and B random."""
    import peft
    import torch

    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=list(case.peft_targets),
        fan_in_fan_out=case.name == "GPT2",
        **settings,
    )
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return wrapped
