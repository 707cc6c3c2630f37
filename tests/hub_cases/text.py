"""Backbones of text alone."""

from hub_cases.common import (
    LENGTH,
    VOCABULARY,
    case,
    encoder_decoder,
    ids,
    ones,
    text,
    text_with_segments,
)

_ENCODER = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "dropout": 0.0,
}
_POSITIONS = {**_ENCODER, "max_sequence_length": LENGTH}
_DECODER = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 1,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}


def _without(arguments, *names, **more):
    return {**{key: v for key, v in arguments.items() if key not in names}, **more}


_ELECTRA = _without(_POSITIONS, "vocabulary_size", vocab_size=VOCABULARY, embedding_dim=6)
_EDREC = {
    "vocab_size": VOCABULARY,
    "num_layers_enc": 1,
    "num_layers_dec": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}
_EXPERTS = {**_DECODER, "num_experts": 3, "top_k": 2}
_QWEN_EXPERTS = {**_EXPERTS, "moe_intermediate_dim": 6}
_LINEAR_ATTENTION = {
    "num_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
_GEMMA = {**_DECODER, "head_dim": 4}
_SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {
        "hidden_dim": 8,
        "intermediate_dim": 12,
        "num_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "layer_types": ["full_attention"],
    }.items()
}
_T5_GEMMA = {"vocabulary_size": VOCABULARY, "cross_attention_hidden_size": 8, **_SIDES}
_GEMMA_3N = {
    "text_vocab_size": VOCABULARY,
    "text_hidden_size": 8,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": [12],
    "hidden_activation": "gelu_approximate",
    "layer_types": ["full_attention"],
    "sliding_window": 4,
    "rope_theta": 10000.0,
    "max_position_embeddings": LENGTH,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 4,
    "altup_num_inputs": 2,
    "laurel_rank": 2,
}
_SMOLLM = {
    "vocabulary_size": VOCABULARY,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "num_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True],
    "layer_types": ["attention"],
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": LENGTH,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}
_RWKV = {
    "vocabulary_size": VOCABULARY,
    "hidden_size": 8,
    "head_size": 4,
    "num_layers": 2,
    "intermediate_dim": 12,
    "gate_lora": 4,
    "mv_lora": 4,
    "aaa_lora": 4,
    "decay_lora": 4,
}


def _segments_only():
    return {name: value for name, value in text_with_segments().items() if name != "padding_mask"}


def _rwkv_text():
    """RWKV reads its tokens in chunks of 16."""
    return {"token_ids": ids(16), "padding_mask": ones(16)}


CASES = [
    case("AlbertBackbone", {**_POSITIONS, "embedding_dim": 6}, text_with_segments),
    case("BartBackbone", _POSITIONS, encoder_decoder),
    case("BertBackbone", _POSITIONS, text_with_segments),
    case("BloomBackbone", _ENCODER, text),
    case("DebertaV3Backbone", {**_POSITIONS, "bucket_size": 4}, text),
    case("DistilBertBackbone", _POSITIONS, text),
    case("EdRecBackbone", _EDREC, encoder_decoder),
    case("ElectraBackbone", _ELECTRA, text_with_segments),
    case("ESM2Backbone", _ENCODER, lambda: {"token_ids": ids()}),
    case("FNetBackbone", _without(_POSITIONS, "num_heads"), _segments_only),
    case(
        "FalconBackbone",
        _without(_ENCODER, "num_heads", "dropout", num_attention_heads=2),
        text,
    ),
    case("GPT2Backbone", _POSITIONS, text),
    case("GPTNeoXBackbone", {**_POSITIONS, "rotary_percentage": 1.0}, text),
    case("Gemma3nBackbone", _GEMMA_3N, text),
    case("GemmaBackbone", _GEMMA, text),
    case("GptOssBackbone", {**_EXPERTS, "sliding_window": 4}, text),
    case("Llama3Backbone", _DECODER, text),
    case("LlamaBackbone", _DECODER, text),
    case("MistralBackbone", _DECODER, text),
    case("MixtralBackbone", _EXPERTS, text),
    case("OPTBackbone", _POSITIONS, text),
    case("Phi3Backbone", _DECODER, text),
    case("QwenBackbone", _DECODER, text),
    case("Qwen3Backbone", {**_DECODER, "head_dim": 4}, text),
    case("Qwen3MoeBackbone", {**_QWEN_EXPERTS, "head_dim": 4}, text),
    case("Qwen3_5Backbone", {**_DECODER, **_LINEAR_ATTENTION}, text),
    case(
        "Qwen3_5MoeBackbone",
        _without(
            {**_QWEN_EXPERTS, **_LINEAR_ATTENTION},
            "intermediate_dim",
            shared_expert_intermediate_size=6,
        ),
        text,
    ),
    case("QwenMoeBackbone", {**_QWEN_EXPERTS, "shared_expert_intermediate_dim": 6}, text),
    case("RWKV7Backbone", _RWKV, _rwkv_text),
    case("RobertaBackbone", _POSITIONS, text),
    case("RoformerV2Backbone", {**_ENCODER, "head_size": 4}, _segments_only),
    case("SmolLM3Backbone", _SMOLLM, text),
    case("T5Backbone", _ENCODER, encoder_decoder),
    case("T5Gemma2Backbone", _T5_GEMMA, encoder_decoder),
    case("T5GemmaBackbone", _T5_GEMMA, encoder_decoder),
    case("XLMRobertaBackbone", _POSITIONS, text),
    case("XLNetBackbone", _ENCODER, text_with_segments),
]
