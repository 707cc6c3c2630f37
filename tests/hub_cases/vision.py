"""Backbones of images and video alone."""

from hub_cases.common import case, image, images, reals


def _named(name, size, width=None):
    return lambda: {name: images(size, width)}


_RESNET = {
    "input_conv_filters": [4],
    "input_conv_kernel_sizes": [3],
    "stackwise_num_filters": [64, 6],
    "stackwise_num_blocks": [1, 1],
    "stackwise_num_strides": [1, 2],
    "block_type": "bottleneck_block",
    "image_shape": (16, 16, 3),
}
_VIT = {
    "image_shape": (8, 8, 3),
    "patch_size": 4,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
}
_CSPNET = {
    "stem_filters": 4,
    "stem_kernel_size": 3,
    "stem_strides": 1,
    "stem_padding": "same",
    "stackwise_depth": [1, 1],
    "stackwise_strides": 2,
    "stackwise_num_filters": [4, 6],
    "block_type": "dark_block",
    "stage_type": "csp",
    "down_growth": True,
    "bottle_ratio": (0.5, 1.0),
    "block_ratio": (1.0, 0.5),
    "expand_ratio": (2.0, 1.0),
    "image_shape": (16, 16, 3),
}
_EFFICIENTNET = {
    "stackwise_kernel_sizes": [3, 3],
    "stackwise_num_repeats": [1, 1],
    "stackwise_input_filters": [8, 8],
    "stackwise_output_filters": [8, 8],
    "stackwise_expansion_ratios": [2, 2],
    "stackwise_squeeze_and_excite_ratios": [0.0, 0.25],
    "stackwise_strides": [1, 2],
    "stackwise_block_types": ["fused", "unfused"],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "dropout": 0.0,
    "input_shape": (16, 16, 3),
    "num_features": 8,
}
HGNET = {
    "embedding_size": 4,
    "stem_channels": [3, 4, 4],
    "hidden_act": "relu",
    "depths": [1, 1],
    "hidden_sizes": [6, 8],
    "stackwise_stage_filters": [[4, 4, 6, 1, 1, 3], [6, 4, 8, 1, 1, 3]],
    "apply_downsample": [False, True],
    "use_lightweight_conv_block": [False, True],
    "use_learnable_affine_block": True,
}
_MOBILENET = {
    "stackwise_expansion": [[8], [12]],
    "stackwise_num_blocks": [1, 1],
    "stackwise_num_filters": [[8], [8]],
    "stackwise_kernel_size": [[3], [3]],
    "stackwise_num_strides": [[1], [2]],
    "stackwise_se_ratio": [[None], [0.5]],
    "stackwise_activation": [["relu"], ["hard_swish"]],
    "stackwise_padding": [[1], [1]],
    "output_num_filters": 8,
    "depthwise_filters": 8,
    "depthwise_stride": 1,
    "depthwise_residual": False,
    "squeeze_and_excite": 0.5,
    "last_layer_filter": 8,
    "input_num_filters": 8,
    "image_shape": (16, 16, 3),
}
# An edge residual, an inverted bottleneck and multi-query attention, one of each.
_MOBILENET_5 = {
    "stackwise_block_types": [["er"], ["uir", "mqa"]],
    "stackwise_num_blocks": [1, 2],
    "stackwise_num_filters": [[8], [8, 8]],
    "stackwise_strides": [[2], [1, 1]],
    "stackwise_act_layers": [["relu"], ["relu", "relu"]],
    "stackwise_exp_ratios": [[2.0], [2.0, 2.0]],
    "stackwise_se_ratios": [[0.0], [0.0, 0.0]],
    "stackwise_dw_kernel_sizes": [[0], [3, 3]],
    "stackwise_dw_start_kernel_sizes": [[0], [0, 0]],
    "stackwise_dw_end_kernel_sizes": [[0], [0, 0]],
    "stackwise_exp_kernel_sizes": [[3], [0, 0]],
    "stackwise_pw_kernel_sizes": [[1], [0, 0]],
    "stackwise_num_heads": [[0], [0, 2]],
    "stackwise_key_dims": [[0], [0, 4]],
    "stackwise_value_dims": [[0], [0, 4]],
    "stackwise_kv_strides": [[0], [0, 1]],
    "stackwise_use_cpe": [[False], [False, False]],
    "image_shape": (16, 16, 3),
    "stem_size": 8,
    "use_msfa": False,
}
MIT = {
    "layerwise_depths": [1, 1],
    "image_shape": (16, 16, 3),
    "hidden_dims": [4, 8],
    "num_layers": 2,
    "layerwise_num_heads": [1, 2],
    "layerwise_sr_ratios": [2, 1],
    "max_drop_path_rate": 0.0,
    "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2],
}
_VIDEO = {
    "num_frames": 2,
    "image_shape": (8, 8, 3),
    "patch_size": 4,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_heads": 2,
    "num_spatial_layers": 1,
    "num_temporal_layers": 1,
    "num_auxiliary_layers": 1,
}


def _dino(**more):
    return {
        "patch_size": 4,
        "num_layers": 1,
        "hidden_dim": 8,
        "num_heads": 2,
        "intermediate_dim": 12,
        "image_shape": (8, 8, 3),
        **more,
    }


def dino_2(**more):
    return {"position_embedding_shape": (8, 8, 3), **_dino(**more)}


CASES = [
    case("CSPNetBackbone", _CSPNET, image(16)),
    case("DINOV2Backbone", dino_2(use_swiglu_ffn=True), _named("images", 8)),
    case("DINOV3Backbone", _dino(use_gated_mlp=True), _named("pixel_values", 8)),
    case("DeiTBackbone", {**_VIT, "intermediate_dim": 12}, image(8)),
    case(
        "DenseNetBackbone",
        {"stackwise_num_repeats": [1, 2], "growth_rate": 2, "image_shape": (16, 16, 3)},
        image(16),
    ),
    case("EfficientNetBackbone", _EFFICIENTNET, image(16)),
    case("HGNetV2Backbone", {**HGNET, "image_shape": (16, 16, 3)}, image(16)),
    case("MiTBackbone", MIT, image(16)),
    case("MobileNetBackbone", _MOBILENET, image(16)),
    case("MobileNetV5Backbone", _MOBILENET_5, image(16)),
    case("ResNetBackbone", _RESNET, image(16)),
    case(
        "SwinTransformerBackbone",
        {
            "image_shape": (8, 8, 3),
            "patch_size": 2,
            "embed_dim": 4,
            "depths": (2, 1),
            "num_heads": (1, 2),
            "window_size": 2,
            "drop_path": 0.0,
        },
        image(8),
    ),
    case(
        "VGGBackbone",
        {
            "stackwise_num_repeats": [1, 2],
            "stackwise_num_filters": [4, 6],
            "image_shape": (8, 8, 3),
        },
        image(8),
    ),
    case("ViTBackbone", {**_VIT, "patch_size": (4, 4), "mlp_dim": 12}, image(8)),
    case(
        "ViTDetBackbone",
        {
            "image_shape": (8, 8, 3),
            "patch_size": 2,
            "hidden_size": 8,
            "num_layers": 2,
            "global_attention_layer_indices": [1],
            "intermediate_dim": 12,
            "num_heads": 2,
            "num_output_channels": 4,
            "window_size": 2,
        },
        image(8),
    ),
    case("VideoPrismBackbone", _VIDEO, lambda: reals(2, 8, 8, 3)),
    case(
        "XceptionBackbone",
        {
            "stackwise_conv_filters": [[4, 6], [8, 8], [8, 8]],
            "stackwise_pooling": [False, True, False],
            "image_shape": (16, 16, 3),
        },
        image(16),
    ),
]
