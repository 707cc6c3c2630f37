"""Names that the side that measures and the side that is measured share, without Keras."""

BACKENDS = ("tensorflow", "jax", "torch")
CONTRACT_CASES = ("bert_wide", "dense_stack", "optimizer_step")
MODEL_CASES = ("minilm_qv", "minilm_all", "llama", "vit", "resnet")
EINSUM_CASES = ("einsum_flat", "einsum_moved")
MEMORY_CASES = ("bert_wide", *MODEL_CASES)
ARMS = ("full", "native", "native_same", "ours", "limit", "peft")
# What `keras.RematScope` recomputes: nothing, activations, whole layers, and these once more
# without Keras's filter for tracebacks, which on torch keeps what is recomputed.
CHECKPOINTING = ("none", "activations", "blocks", "blocks_unfiltered")
TENSORS = (24, 192, 1500)
GROWTH = ("width", "tokens", "rank", "layers")
# The cases of the part on huge pages, and what stands behind the name of a backend with them.
HUGE_PAGES_CASES = ("bert_wide", "minilm_all")
HUGE_PAGES = "+huge_pages"
# Set in a worker's environment: Keras's dtype policy.
DTYPE = "KERAS_LORAPLUS_BENCHMARK_DTYPE"
# Steps of an arm's turn that are counted, at least; one that is not comes before them.
STEPS_AT_LEAST = 2
