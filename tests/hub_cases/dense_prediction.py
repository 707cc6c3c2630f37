"""Backbones that predict something at every place of an image, around an image encoder."""

import keras_hub

from hub_cases.common import case, image
from hub_cases.vision import HGNET, MIT, dino_2


def _resnet(stages=3, channels=(4, 4, 4)):
    """An image encoder for others, halved from stage to stage; ResNets begin with 64 channels."""
    return keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, *channels[: stages - 1]],
        stackwise_num_blocks=[1] * stages,
        stackwise_num_strides=[1] + [2] * (stages - 1),
        block_type="basic_block",
    )


def _depth_anything():
    encoder = keras_hub.models.DINOV2Backbone(
        **dino_2(num_layers=2, image_shape=(16, 16, 3), apply_layernorm=True)
    )
    return {
        "image_encoder": encoder,
        "reassemble_factors": [2, 1],
        "neck_hidden_dims": [4, 6],
        "fusion_hidden_dim": 4,
        "head_hidden_dim": 4,
        "head_in_index": -1,
        "feature_keys": ["stage1", "stage2"],
    }


def _basnet():
    # BASNet puts a convolution of its own before the encoder's blocks, which expect 64 channels.
    return {
        "image_encoder": _resnet(4),
        "num_classes": 1,
        "projection_filters": 64,
        "image_shape": (32, 32, 3),
    }


def _deeplab():
    return {
        "image_encoder": _resnet(),
        "spatial_pyramid_pooling_key": "P4",
        "low_level_feature_key": "P2",
        "projection_filters": 4,
        "dilation_rates": [2],
        "upsampling_size": 4,
        "image_shape": (32, 32, 3),
    }


def _d_fine():
    return {
        "backbone": keras_hub.models.HGNetV2Backbone(
            **HGNET, image_shape=(None, None, 3), out_features=["stage1", "stage2"]
        ),
        "decoder_in_channels": [8, 8],
        "encoder_hidden_dim": 8,
        "num_denoising": 2,
        "num_labels": 3,
        "hidden_dim": 8,
        "learn_initial_query": False,
        "num_queries": 3,
        "anchor_image_size": (32, 32),
        "feat_strides": [4, 8],
        "num_feature_levels": 2,
        "encoder_in_channels": [6, 8],
        "encode_proj_layers": [1],
        "num_attention_heads": 2,
        "encoder_ffn_dim": 8,
        "num_encoder_layers": 1,
        "hidden_expansion": 0.5,
        "depth_multiplier": 0.5,
        "eval_idx": -1,
        "num_decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 8,
        "decoder_n_points": [2, 2],
        "lqe_hidden_dim": 8,
        "num_lqe_layers": 2,
        "out_features": ["stage1", "stage2"],
        "image_shape": (32, 32, 3),
        "seed": 0,
    }


def _retinanet():
    return {"image_encoder": _resnet(4), "min_level": 3, "max_level": 6, "use_p5": True}


def _segformer():
    return {"image_encoder": keras_hub.models.MiTBackbone(**MIT), "projection_filters": 4}


CASES = [
    case("BASNetBackbone", _basnet, image(32)),
    case("DFineBackbone", _d_fine, image(32)),
    case("DeepLabV3Backbone", _deeplab, image(32)),
    case("DepthAnythingBackbone", _depth_anything, image(16)),
    case("RetinaNetBackbone", _retinanet, image(64)),
    case("SegFormerBackbone", _segformer, image(16)),
]
