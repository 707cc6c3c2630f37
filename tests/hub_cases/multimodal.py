"""Backbones of sound, and of text with images or sound."""

import keras_hub
import numpy as np
from keras_hub.src.models.blip2.blip2_custom_opt import BLIP2CustomOPT
from keras_hub.src.models.blip2.blip2_qformer import BLIP2QFormer
from keras_hub.src.models.blip2.blip2_vision_encoder import BLIP2VisionEncoder
from keras_hub.src.models.gemma3.gemma3_vision_encoder import Gemma3VisionEncoder
from keras_hub.src.models.gemma4.gemma4_vision_encoder import Gemma4VisionEncoder

from hub_cases.common import BATCH, LENGTH, VOCABULARY, case, ids, images, ones, reals, text

_SMALL = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 12}


def _blip2():
    return {
        "vision_encoder": BLIP2VisionEncoder(
            image_size=8,
            patch_size=4,
            use_patch_bias=True,
            use_class_token=True,
            use_mha_bias=True,
            use_mlp_bias=True,
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
            initializer_range=0.02,
            **_SMALL,
        ),
        "qformer": BLIP2QFormer(
            num_query_tokens=2,
            vision_dim=8,
            cross_attention_frequency=1,
            dropout=0.0,
            layer_norm_epsilon=1e-6,
            **_SMALL,
        ),
        "language_model": BLIP2CustomOPT(
            vocabulary_size=VOCABULARY,
            num_query_tokens=2,
            qformer_hidden_dim=8,
            max_sequence_length=10,
            dropout=0.0,
            language_projection=None,
            **_SMALL,
        ),
    }


def _image_and_text():
    return {**text(), "images": images(8)}


def _towers(family, **text_arguments):
    """The two encoders of a family of contrastive models."""
    vision = getattr(keras_hub.models, f"{family}VisionEncoder")
    words = getattr(keras_hub.models, f"{family}TextEncoder")
    return {
        "vision_encoder": vision(
            patch_size=4, image_shape=(8, 8, 3), name="vision_encoder", **_SMALL
        ),
        "text_encoder": words(
            vocabulary_size=VOCABULARY,
            embedding_dim=8,
            max_sequence_length=LENGTH,
            name="text_encoder",
            **_SMALL,
            **text_arguments,
        ),
    }


def _image_and_tokens():
    return {"images": images(8), "token_ids": ids()}


def _image_and_ended_tokens():
    """The text's embedding is that of the end token, 2."""
    tokens = 2 + ids(vocabulary=VOCABULARY - 2)
    tokens[:, -1] = 2
    return {"images": images(8), "token_ids": tokens}


_GEMMA = {
    "vocabulary_size": VOCABULARY,
    "image_size": 8,
    "num_layers": 1,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "head_dim": 4,
}
_GEMMA_VISION = {**_SMALL, "image_size": 8, "patch_size": 2, "pool_size": 2, "output_dim": 8}
# Four tokens of an image among twelve of text.
_IMAGE_AT = np.array([[2, 3, 4, 5], [6, 7, 8, 9]], "int32")


def _image_mask():
    mask = np.zeros((BATCH, 12), "int32")
    np.put_along_axis(mask, _IMAGE_AT, 1, axis=1)
    return {
        "token_ids": ids(12),
        "padding_mask": ones(12),
        "vision_indices": _IMAGE_AT,
        "vision_mask": mask,
    }


def _gemma4_inputs():
    patches = np.stack(np.meshgrid(range(4), range(4), indexing="ij"), axis=-1).reshape(16, 2)
    return {
        **_image_mask(),
        "pixel_values": reals(1, 16, 12),
        "pixel_position_ids": np.tile(patches.astype("int32"), (BATCH, 1, 1, 1)),
        "position_ids": np.tile(np.arange(12, dtype="int32"), (BATCH, 1)),
    }


_PALI_GEMMA = {
    **_GEMMA,
    "vit_patch_size": 4,
    "vit_num_layers": 1,
    "vit_num_heads": 2,
    "vit_hidden_dim": 8,
    "vit_intermediate_dim": 12,
}
_MOONSHINE = {
    "vocabulary_size": VOCABULARY,
    "filter_dim": 8,
    "encoder_num_layers": 1,
    "decoder_num_layers": 1,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "encoder_num_heads": 2,
    "decoder_num_heads": 2,
    "feedforward_expansion_factor": 2,
    "partial_rotary_factor": 1.0,
}


def _moonshine_inputs():
    return {
        "encoder_input_values": reals(2000, 1),
        "encoder_padding_mask": ones(2000, "bool"),
        "decoder_token_ids": ids(),
        "decoder_padding_mask": ones(dtype="bool"),
    }


def _parseq():
    encoder = keras_hub.models.ViTBackbone(
        image_shape=(8, 16, 3),
        patch_size=(4, 8),
        mlp_dim=12,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        use_class_token=False,
        name="image_encoder",
    )
    return {
        "image_encoder": encoder,
        "vocabulary_size": VOCABULARY,
        "max_label_length": LENGTH,
        "decoder_hidden_dim": 8,
        "num_decoder_layers": 1,
        "num_decoder_heads": 2,
        "decoder_mlp_dim": 12,
        "dropout_rate": 0.0,
        "attention_dropout": 0.0,
    }


def _whisper_inputs():
    return {
        "encoder_features": reals(LENGTH, 8),
        "decoder_token_ids": ids(),
        "decoder_padding_mask": ones(),
    }


CASES = [
    case("BLIP2Backbone", _blip2, _image_and_text),
    case("CLIPBackbone", lambda: {**_towers("CLIP"), "projection_dim": 6}, _image_and_tokens),
    case(
        "Gemma3Backbone",
        lambda: {**_GEMMA, "vision_encoder": Gemma3VisionEncoder(**_GEMMA_VISION)},
        lambda: {**_image_mask(), "images": reals(1, 8, 8, 3)},
    ),
    case(
        "Gemma4Backbone",
        lambda: {
            **_GEMMA,
            "vision_encoder": Gemma4VisionEncoder(
                head_dim=4, num_key_value_heads=2, **_GEMMA_VISION
            ),
        },
        _gemma4_inputs,
    ),
    case(
        "MetaCLIP2Backbone",
        lambda: {**_towers("MetaCLIP2"), "projection_dim": 6},
        _image_and_ended_tokens,
    ),
    case("MoonshineBackbone", _MOONSHINE, _moonshine_inputs),
    case(
        "PARSeqBackbone",
        _parseq,
        lambda: {**text(), "images": images(8, 16)},
    ),
    case(
        "PaliGemmaBackbone",
        _PALI_GEMMA,
        lambda: {**_image_and_text(), "response_mask": 1 - ones()},
    ),
    case("SigLIPBackbone", lambda: _towers("SigLIP"), _image_and_tokens),
    case(
        "WhisperBackbone",
        {
            **_SMALL,
            "vocabulary_size": VOCABULARY,
            "num_mels": 8,
            "max_encoder_sequence_length": LENGTH,
            "max_decoder_sequence_length": LENGTH,
        },
        _whisper_inputs,
    ),
]
