"""The only place that touches `keras.src` or a backend module.

Every use says why the public API does not do, and the Keras version it was checked on. The rest of
the package asks this module, `_compat.NAME`, and never those behind it.
"""

from keras_loraplus._compat.convolutions import convolution
from keras_loraplus._compat.distribution import (
    check_distribution,
    host_value,
    is_laid_out,
    known_anywhere,
    laid_out_as,
    on_device,
    parts_of,
    refuse_conditions_in_replicas,
    replica_count,
    span_processes,
    wait_for_all_processes,
)
from keras_loraplus._compat.frozen import einsum_of_frozen, logits_of_frozen, matmul_of_frozen
from keras_loraplus._compat.graphs import (
    clear_compiled_state,
    graph_left_untouched,
    node_inputs,
    outside_of_graphs,
    runs_its_graph,
    trace,
    without_gradients,
)
from keras_loraplus._compat.hub import (
    HUB_EXPERTS,
    HUB_NOT_ADAPTABLE,
    hub_backbone,
    hub_backbone_from,
    hub_converter,
    hub_task_around,
    hub_text_classifier,
    hub_text_preprocessor,
    hub_ties_logits,
    loaded,
    transformers_renames,
)
from keras_loraplus._compat.jax_gradients import activated, prefers_matrices
from keras_loraplus._compat.layers import (
    attributes,
    automatic_config,
    build_shapes,
    flatten_layers,
    is_functional,
    methods_replaced,
    refresh_class_bindings,
    refresh_torch_parameters,
    run_in_any_mode,
    run_in_inference_mode,
    set_mask,
    training_in_call_context,
)
from keras_loraplus._compat.optimizers import (
    LOW_PRECISION,
    Float32Copy,
    active_optimizer_class,
    decay,
    defined_outside_keras,
    dense,
    gradient_accumulation_steps,
    innermost_optimizer,
    is_low_precision,
    learning_rate_variable,
    optimized_variables,
    scaled_rate,
)
from keras_loraplus._compat.products import (
    adapted_product,
    add_product,
    thin_product,
)
from keras_loraplus._compat.quantized import is_calibrated, quantized_mode_call, quantized_view
from keras_loraplus._compat.resuming import (
    begin_at_epoch,
    is_first_process,
    random_states,
    restore_random_states,
)
from keras_loraplus._compat.torch_optimizers import (
    torch_fused_adam,
    torch_groups,
    torch_matching_gradients,
    torch_scaled_rates,
    torch_step_dtype,
    torch_values,
    torch_write_back,
)
from keras_loraplus._compat.variables import (
    TrackedState,
    drop_attribute,
    freeze_variables,
    in_order_of,
    order_own_variables,
    own_trainable_flag,
    own_variables,
    own_variables_as,
    path_scope,
    restore_tracked_state,
    seed_generators,
    state_variables,
    thaw_variables,
    tracked_state,
    unlocked,
)
