"""Backbones of diffusion and of segmentation by prompts: several models in one."""

import keras_hub
import numpy as np
from keras_hub.src.models.sam.sam_mask_decoder import SAMMaskDecoder
from keras_hub.src.models.sam.sam_prompt_encoder import SAMPromptEncoder
from keras_hub.src.models.sam3.sam3_detr_decoder import SAM3DetrDecoder
from keras_hub.src.models.sam3.sam3_detr_encoder import SAM3DetrEncoder
from keras_hub.src.models.sam3.sam3_geometry_encoder import SAM3GeometryEncoder
from keras_hub.src.models.sam3.sam3_mask_decoder import SAM3MaskDecoder
from keras_hub.src.models.sam3.sam3_text_encoder import SAM3TextEncoder
from keras_hub.src.models.sam3.sam3_vision_encoder import SAM3VisionEncoder
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

from hub_cases.common import BATCH, VOCABULARY, case, ids, images, ones, reals

_SMALL = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 12}

_FLUX = {
    "input_channels": 8,
    "hidden_size": 16,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [2, 2, 4],
    "theta": 10000,
    "use_bias": True,
    "guidance_embed": True,
    "image_shape": (4, 8),
    "text_shape": (4, 8),
    "image_ids_shape": (4, 3),
    "text_ids_shape": (4, 3),
    "y_shape": (8,),
}


def _flux_inputs():
    return {
        "image": reals(4, 8),
        "image_ids": reals(4, 3, seed=1),
        "text": reals(4, 8, seed=2),
        "text_ids": reals(4, 3, seed=3),
        "y": reals(8, seed=4),
        "timesteps": np.array([0.2, 0.7], "float32"),
        "guidance": np.array([1.0, 2.0], "float32"),
    }


def _sam():
    return {
        "image_encoder": keras_hub.models.ViTDetBackbone(
            hidden_size=8,
            num_layers=1,
            intermediate_dim=12,
            num_heads=2,
            global_attention_layer_indices=[0],
            patch_size=8,
            num_output_channels=8,
            window_size=2,
            image_shape=(16, 16, 3),
        ),
        "prompt_encoder": SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(2, 2),
            input_image_size=(16, 16),
            mask_in_channels=4,
        ),
        "mask_decoder": SAMMaskDecoder(
            num_layers=1,
            hidden_size=8,
            intermediate_dim=12,
            num_heads=2,
            embedding_dim=8,
            num_multimask_outputs=3,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
    }


def _sam_inputs():
    return {
        "images": images(16),
        "points": 8 + reals(1, 2),
        "labels": np.ones((BATCH, 1), "float32"),
        "boxes": 8 + reals(1, 2, 2),
        "masks": reals(1, 8, 8, 1),
    }


def _sam3():
    decoder = {"image_shape": (28, 28, 3), "patch_size": 14}
    text_arguments = {"vocabulary_size": VOCABULARY, "embedding_dim": 8}
    return {
        "vision_encoder": SAM3VisionEncoder(
            fpn_hidden_dim=8,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(28, 28, 3),
            window_size=2,
            global_attn_indexes=[0],
            **decoder,
            **_SMALL,
        ),
        "text_encoder": SAM3TextEncoder(**text_arguments, **_SMALL),
        "geometry_encoder": SAM3GeometryEncoder(roi_size=3, **_SMALL),
        "detr_encoder": SAM3DetrEncoder(**_SMALL),
        "detr_decoder": SAM3DetrDecoder(num_queries=3, **decoder, **_SMALL),
        "mask_decoder": SAM3MaskDecoder(num_upsampling_stages=3, hidden_dim=8, num_heads=2),
    }


def _sam3_inputs():
    return {
        "pixel_values": images(28),
        "token_ids": ids(32),
        "padding_mask": ones(32, "bool"),
        "boxes": np.full((BATCH, 1, 5), 0.4, "float32"),
        "box_labels": np.ones((BATCH, 1), "int32"),
    }


def _stable_diffusion():
    channels = [32, 32, 32, 32]
    once = [1, 1, 1, 1]

    def words(name):
        return keras_hub.models.CLIPTextEncoder(
            vocabulary_size=VOCABULARY,
            embedding_dim=8,
            intermediate_output_index=-2,
            name=name,
            **{**_SMALL, "num_layers": 2},
        )

    return {
        "mmdit_patch_size": 2,
        "mmdit_hidden_dim": 8,
        "mmdit_num_layers": 2,
        "mmdit_num_heads": 2,
        "mmdit_position_size": 8,
        "mmdit_qk_norm": None,
        "mmdit_dual_attention_indices": None,
        "vae": VAEBackbone(channels, once, channels, once, sampler_method="mode", name="vae"),
        "clip_l": words("clip_l"),
        "clip_g": words("clip_g"),
        "image_shape": (32, 32, 3),
    }


def _stable_diffusion_inputs():
    return {
        "images": images(32),
        "latents": reals(4, 4, 16),
        "clip_l_token_ids": ids(),
        "clip_l_negative_token_ids": ids(seed=1),
        "clip_g_token_ids": ids(seed=2),
        "clip_g_negative_token_ids": ids(seed=3),
        "num_steps": np.full((BATCH,), 2, "int32"),
        "guidance_scale": np.full((BATCH,), 2.0, "float32"),
    }


CASES = [
    case("FluxBackbone", _FLUX, _flux_inputs),
    case("SAM3PromptableConceptBackbone", _sam3, _sam3_inputs),
    case("SAMBackbone", _sam, _sam_inputs),
    case("StableDiffusion3Backbone", _stable_diffusion, _stable_diffusion_inputs),
]
