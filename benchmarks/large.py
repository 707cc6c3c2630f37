"""Enabling and merging on a backbone of a billion parameters, in bfloat16, random weights."""

import math
import time

import keras

import keras_loraplus as klp
from benchmarks import resident
from benchmarks.arms import RANK
from benchmarks.models import LLAMA_LINEAR, TINY_LLAMA

BILLION = {
    "vocabulary_size": 32000,
    "num_layers": 22,
    "num_query_heads": 32,
    "num_key_value_heads": 4,
    "hidden_dim": 2048,
    "intermediate_dim": 5632,
    "tie_word_embeddings": True,
}


def enable_and_merge(size="full"):
    """Returns seconds and extra bytes of `enable_lora_plus` and `merge_lora_plus`.

    Extra bytes are the peak of the resident set over what was resident before. A small
    model was enabled and merged, so that starting the backend is not
    counted.
    """
    import keras_hub

    small = keras_hub.models.LlamaBackbone(**TINY_LLAMA, dtype="bfloat16")
    klp.enable_lora_plus(small, rank=RANK, targets=list(LLAMA_LINEAR))
    klp.merge_lora_plus(small)
    shape = TINY_LLAMA if size == "tiny" else BILLION
    backbone = keras_hub.models.LlamaBackbone(**shape, dtype="bfloat16")
    weights = list(backbone.weights)
    base = sum(_bytes(variable) for variable in weights)
    parameters = sum(math.prod(variable.shape) for variable in weights)
    largest = max(math.prod(variable.shape) for variable in weights)
    enabling = _observed(
        lambda: klp.enable_lora_plus(backbone, rank=RANK, targets=list(LLAMA_LINEAR))
    )
    adapters = sum(_bytes(variable) for variable in backbone.trainable_variables)
    for variable in backbone.trainable_variables:
        variable.assign(keras.random.normal(variable.shape, stddev=1e-3))
    merging = _observed(lambda: klp.merge_lora_plus(backbone))
    return {
        "parameters": parameters,
        "base_bytes": base,
        "adapter_bytes": adapters,
        "largest_weight_as_float32_bytes": 4 * largest,
        "enable": enabling,
        "merge": merging,
    }


def _observed(action):
    before = resident.settled()
    resident.reset_peak()
    start, started = time.perf_counter(), time.process_time()
    action()
    seconds, worked = time.perf_counter() - start, time.process_time() - started
    return {
        "seconds": seconds,
        "processor_seconds": worked,
        "extra_bytes": resident.peak() - before,
    }


def _bytes(variable):
    bits = {"bfloat16": 16, "float16": 16, "float32": 32, "int32": 32}[variable.dtype]
    return math.prod(variable.shape) * bits // 8
