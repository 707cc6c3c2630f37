"""The only module that touches `keras.src` or a backend module.

Every use says why the public API does not do, and the Keras version it was checked on.
"""

import contextlib
import functools
import importlib.util
import inspect
import re
import sys
import types
import weakref

import keras
import numpy as np
from keras.src import backend as keras_backend  # private: checked on 3.15.1
from keras.src.backend.common import global_state, masking

# --- layers: state tracking, call caches, tracing ------------------------------------------------


def flatten_layers(model):
    """Returns the layer and every layer below it, each once.

    `Layer._flatten_layers` (3.15.1): the public `Model.layers` stops at the first level, and misses
    what composite layers hold as attributes.
    """
    return model._flatten_layers()


def own_variables(layer):
    """Returns the variables that the layer holds itself, in the order weight files use.

    `Layer._trainable_variables` and `_non_trainable_variables` (3.15.1): the public lists include
    those of sublayers.
    """
    return [*layer._trainable_variables, *layer._non_trainable_variables]


@contextlib.contextmanager
def unlocked(layer):
    """Lets a built layer gain or lose state.

    `Layer._tracker` (3.15.1) is locked by `build`; Keras's own `enable_lora` unlocks it likewise.
    """
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if was_locked:
            layer._tracker.lock()


def path_scope(layer):
    """Gives variables that a built layer gains the layer's own path, whatever scope is open.

    `Layer.add_weight` (3.15.1) takes the path of the open scopes where the layer has no parent.
    """
    parent = (layer.path or layer.name).rpartition("/")[0]
    return keras.name_scope(layer.name, caller=layer, override_parent=parent)


class TrackedState:
    """The trainable flags of one layer and of its own variables, with their order.

    An object of its own, because Keras walks tuples and lists among a layer's attributes when it
    saves. Variables that the layer loses, as a float kernel when it is quantized, are not kept
    alive and no longer counted.
    """

    def __init__(self, flag, trainable, frozen):
        self.flag = flag
        self._trainable, self._frozen = (
            tuple((weakref.ref(variable), variable.trainable) for variable in variables)
            for variables in (trainable, frozen)
        )

    @property
    def trainable(self):
        """Pairs (variable, flag) of what trained."""
        return _alive(self._trainable)

    @property
    def frozen(self):
        """Pairs (variable, flag) of what did not."""
        return _alive(self._frozen)


def _alive(pairs):
    found = ((reference(), flag) for reference, flag in pairs)
    return tuple((variable, flag) for variable, flag in found if variable is not None)


def tracked_state(layer):
    """Returns what `restore_tracked_state` needs to undo freezing on this layer.

    `Layer._trainable_variables` and `_non_trainable_variables` (3.15.1): see `own_variables`.
    """
    return TrackedState(
        layer._trainable, layer._trainable_variables, layer._non_trainable_variables
    )


def restore_tracked_state(layer, state):
    """Puts the layer's own flag, its two variable lists and their flags back.

    What the layer has lost stays lost; what it has gained, as the scales of a quantized kernel, is
    as it is, at the end of the frozen ones.
    """
    own = own_variables(layer)
    trainable, frozen = (
        [(variable, flag) for variable, flag in members if any(variable is v for v in own)]
        for members in (state.trainable, state.frozen)
    )
    known = {id(variable) for variable, _ in (*trainable, *frozen)}
    frozen += [(variable, variable.trainable) for variable in own if id(variable) not in known]
    layer._trainable = state.flag
    for store, members in (("trainable_variables", trainable), ("non_trainable_variables", frozen)):
        variables = [variable for variable, _ in members]
        layer._tracker.config[store][1][:] = variables
        layer._tracker.stored_ids[store] = {id(variable) for variable in variables}
        for variable, was_trainable in members:
            variable.trainable = was_trainable


def freeze_variables(layer, variables):
    """Freezes own variables of a layer so that `layer.trainable = True` leaves them frozen.

    The setter of `Layer.trainable` (3.15.1) thaws everything in the tracker's trainable list, so
    the variables move to the front of the other one. The concatenation of both lists is the order
    in which default weight files store values; a variable whose move would change it is frozen in
    place.
    """
    chosen = {id(variable) for variable in variables}
    trainable = layer._trainable_variables
    moved: list = []
    for variable in reversed(list(trainable)):
        if id(variable) not in chosen:
            break
        moved.insert(0, variable)
    if _order_is_by_name(layer):
        moved = [variable for variable in trainable if id(variable) in chosen]
    for variable in variables:
        variable.trainable = False
    for variable in moved:
        layer._tracker.untrack(variable)
    layer._non_trainable_variables[:0] = moved
    layer._tracker.stored_ids["non_trainable_variables"] |= {id(variable) for variable in moved}


def _order_is_by_name(layer):
    """Whether the layer stores its weights by name, not in tracking order."""
    return type(layer).save_own_variables is not keras.layers.Layer.save_own_variables


def own_trainable_flag(layer, value):
    """Sets the flag of this layer alone.

    `Layer._trainable` (3.15.1): the public setter also changes every variable and layer below.
    """
    layer._trainable = value


def drop_attribute(layer, name):
    """Removes a tracked variable or seed generator from a layer and returns it.

    Goes past `Layer.__delattr__` (3.15.1), which runs a full garbage collection per variable.
    """
    value = getattr(layer, name)
    with unlocked(layer):
        layer._tracker.untrack(value)
    if isinstance(value, keras.Variable):
        layer._post_untrack_variable(value)
        # An optimizer that was built on it can tell that it is gone.
        value.trainable = False
    super(keras.layers.Layer, layer).__delattr__(name)
    return value


def thaw_variables(layer, variables):
    """Makes own variables of a layer trainable again, before those that already are."""
    for variable in variables:
        layer._tracker.untrack(variable)
        variable.trainable = True
    layer._trainable_variables[:0] = variables
    layer._tracker.stored_ids["trainable_variables"] |= {id(variable) for variable in variables}


def refresh_class_bindings(layer):
    """Rebinds what a Keras layer caches of its class in `__new__` and `__init__`.

    `Layer.__new__` (3.15.1) wraps `build` and `quantize` of the class of that moment into instance
    attributes, and `Layer.__init__` caches the signature of `call`. After `layer.__class__` has
    changed both would still be those of the former class. 3.16.0.dev2026102704 wraps `build` alone.
    """
    for name, wrapped in (("build", _wrapped_build), ("quantize", _wrapped_quantize)):
        if layer.__dict__.pop(name, None) is not None:
            layer.__dict__[name] = wrapped(layer, getattr(layer, name))
    layer._call_signature = inspect.signature(layer.call)
    names = [parameter.name for parameter in layer._call_signature.parameters.values()]
    layer.call_signature_parameters = names
    layer._call_has_training_arg = "training" in names
    layer._call_has_mask_arg = "mask" in names
    layer._call_has_context_arg = {name: name in names for name in layer._call_context_args}


def _wrapped_build(layer, build):
    def build_wrapper(*args, **kwargs):
        with layer._open_name_scope():
            build(*args, **kwargs)
        layer._build_shapes_dict = inspect.signature(build).bind(*args, **kwargs).arguments
        layer.built = True
        layer._post_build()
        layer._lock_state()

    return build_wrapper


def _wrapped_quantize(layer, quantize):
    from keras.src.quantizers.quantization_config import validate_and_resolve_config

    def quantize_wrapper(mode=None, config=None, **kwargs):
        config = validate_and_resolve_config(mode, config)
        layer._check_quantize_args(config.mode, layer.compute_dtype)
        with unlocked(layer):
            quantize(mode=config.mode, config=config, **kwargs)

    return quantize_wrapper


def run_in_inference_mode(layer):
    """Makes a frozen layer's calls ignore `training`, whatever its trainable flag becomes.

    `BatchNormalization.call` (3.15.1) asks for the flag, and `model.trainable = True` sets that of
    every layer. A bound method in the instance's dictionary is what `Layer.__call__` finds first,
    and `deepcopy` binds it to the copy.
    """
    layer.__dict__["call"] = types.MethodType(_call_in_inference_mode, layer)


def run_in_any_mode(layer):
    """Undoes `run_in_inference_mode`."""
    if getattr(layer.__dict__.get("call"), "__func__", None) is _call_in_inference_mode:
        del layer.__dict__["call"]


def _call_in_inference_mode(self, inputs, training=None, **kwargs):
    return type(self).call(self, inputs, training=False, **kwargs)


def refresh_torch_parameters(layers):
    """Makes torch's view of the layers (`parameters()`, `state_dict()`, `to()`) current.

    `TorchLayer._torch_params` (3.15.1) is filled when a layer is built and then follows what the
    layer itself gains or loses, not what layers below it do.
    """
    for layer in layers:
        if "_torch_params" in layer.__dict__.get("_modules", {}):
            layer._track_variables()


def training_in_call_context():
    """Returns the `training` value of the outermost running call, or None.

    A user's `call(self, x)` that delegates to `super().call(x)` passes no `training` on; Keras
    keeps the value in the call context (3.15.1, `Layer.__call__`), which has no public reader.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    return None if context is None else context.get_value("training")


def set_mask(tensor, mask):
    """Attaches a Keras mask to a tensor; the public API only reads masks (3.15.1)."""
    masking.set_keras_mask(tensor, mask)


def with_fast_gradient(a):
    """Returns the matrix A, arranged so that its gradient is computed quickly on the CPU.

    As autodiff leaves it, the gradient of A (n, r) is `x^T g`, which runs several times slower than
    its mirror `g^T x`. XLA (jax 0.10.2) turns one into the other through any transpose: a barrier
    between the product and the transpose keeps the mirror. No value changes, and it can be
    differentiated in both modes, which a custom gradient could not. The other backends get A as it
    is; on torch `thin_product` has an arrangement of its own.
    """
    if keras.backend.backend() == "jax":
        import jax

        transposed = jax.lax.optimization_barrier(keras.ops.transpose(a))
        return keras.ops.transpose(transposed)
    return a


def thin_product(inputs, a):
    """Returns inputs (tokens, n) times A (n, r), arranged so that all its gradients are fast.

    On torch (2.13.0, CPU) the gradient of a product with few columns takes half as long again as
    that of its mirror with few rows, `(A^T x^T)^T`. torch forms gradients in the memory order of
    the operands, so that from the mirror on those of A and of the inner value are mirrors as well:
    a `Dense` layer's step is 1 to 6 % shorter. Without gradients the mirror only costs a copy of A.
    """
    if keras.backend.backend() == "torch":
        import torch

        if not torch.is_grad_enabled():
            return keras.ops.matmul(inputs, a)
        mirrored = keras.ops.transpose(a).contiguous()
        return keras.ops.transpose(keras.ops.matmul(mirrored, keras.ops.transpose(inputs)))
    return keras.ops.matmul(inputs, with_fast_gradient(a))


def adapted_product(equation, inputs, kernel, bias, a, b, scale):
    """Returns `inputs W + s (inputs A) B + bias` in one node of torch's graph, or None without one.

    As torch (2.13.0) records it, the inputs get two gradients, which are then added into memory of
    their own, `addmm` copies the outputs that it adds to, and the bias is added into a third
    memory. Here all of it happens in place, and what is small, the scaled B and the casts, is no
    node of its own: the adapters of a BERT 1024 wide added 12 % to the frozen model's step on the
    CPU when they were recorded.

    None is returned, and the caller records the products, wherever this node has no rule or nothing
    to win: other backends, without gradients, forward mode, `torch.func`, `torch.compile`, tracing,
    autocast, other dtypes and tensor classes, and kernels whose contracted axes do not come first.

    Args:
        equation: An einsum equation that is a product of matrices, or None for that of matrices.
        inputs: Tensor (..., n).
        kernel: The frozen matrix, of n times m entries in this order; it gets no gradient.
        bias: What is added last, in a shape that broadcasts, or None.
        a: A (n, r) or with the axes of n.
        b: B (r, m) or with the axes of m.
        scale: s, a tensor of A's dtype, which gets no gradient.
    """
    if keras_backend.backend() != "torch":
        return None
    import torch
    from torch.autograd import forward_ad

    inputs, kernel, bias, a, b, scale = (
        value.value if isinstance(value, keras.Variable) else value
        for value in (inputs, kernel, bias, a, b, scale)
    )
    computed = (inputs, kernel) if bias is None else (inputs, kernel, bias)
    plain = (torch.Tensor, torch.nn.Parameter)
    if not all(type(tensor) in plain for tensor in (*computed, a, b, scale)):
        return None
    if not all(tensor.dtype == inputs.dtype for tensor in computed):
        return None
    if not (a.dtype == b.dtype == scale.dtype and inputs.is_floating_point()):
        return None
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(inputs.device.type):
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    return _torch_adapted_product().apply(equation, inputs, kernel, bias, a, b, scale)


@functools.cache
def _torch_adapted_product():
    import torch

    class AdaptedProduct(torch.autograd.Function):
        """Gradients with r columns are formed as their mirrors, as in `thin_product`."""

        @staticmethod
        def forward(ctx, equation, inputs, kernel, bias, a, b, scale):
            inner = _inner(inputs, a)  # first, while the inputs are in the cache
            if equation is None:
                outputs = torch.matmul(inputs, kernel)
            else:
                outputs = torch.einsum(equation, inputs, kernel)
            up = _scaled_matrix(b, scale, inputs.dtype)
            rows = outputs.reshape(-1, up.shape[1]).addmm_(inner, up)
            if outputs._is_view() or not outputs.is_contiguous():
                # A user's own operation in place on the outputs is none of this node's.
                outputs = torch.ops.aten._unsafe_view(rows, list(outputs.shape))
            if bias is not None:
                outputs.add_(bias)
            _, wants_inputs, _, wants_bias, wants_a, wants_b, _ = ctx.needs_input_grad
            ctx.input_shape, ctx.bias_shape = inputs.shape, bias.shape if wants_bias else None
            # What is not needed must not be kept alive.
            ctx.save_for_backward(
                inputs if wants_a or wants_b else None,
                kernel if wants_inputs else None,
                a,
                b,
                scale,
                up if wants_inputs or wants_a else None,
                inner if wants_b else None,
            )
            return outputs

        @staticmethod
        def backward(ctx, upstream):
            inputs, kernel, a, b, scale, up, inner = ctx.saved_tensors
            _, wants_inputs, _, wants_bias, wants_a, wants_b, _ = ctx.needs_input_grad
            of_inputs = of_bias = of_a = of_b = None
            if torch.is_grad_enabled():  # gradients of gradients depend on how these were formed
                up = _scaled_matrix(b, scale, upstream.dtype)
                inner = _inner(inputs, a) if wants_b else None
            if wants_bias:
                of_bias = upstream.sum_to_size(ctx.bias_shape)
            upstream = upstream.reshape(-1, b.numel() // b.shape[0])
            if wants_b:
                of_b = torch.mm(inner.t(), upstream).to(b.dtype).mul_(scale).reshape(b.shape)
            if wants_inputs or wants_a:
                back = torch.mm(up, upstream.t())  # (r, tokens)
            if wants_a:
                of_a = _gradient_of_a(back, inputs, a)
            if wants_inputs:
                down = a.reshape(-1, a.shape[-1]).to(upstream.dtype)
                of_inputs = torch.mm(upstream, kernel.reshape(down.shape[0], -1).t())
                of_inputs = of_inputs.addmm_(back.t(), down.t()).reshape(ctx.input_shape)
            return None, of_inputs, None, of_bias, of_a, of_b, None

    return AdaptedProduct


def _scaled_matrix(b, scale, dtype):
    """Returns s B as a matrix (r, m), scaled before the cast."""
    return (b.reshape(b.shape[0], -1) * scale).to(dtype)


def _inner(inputs, a):
    """Returns `x A` of the inputs' rows (tokens, r)."""
    down = a.reshape(-1, a.shape[-1]).to(inputs.dtype)
    return inputs.reshape(-1, down.shape[0]) @ down


def _gradient_of_a(back, inputs, a):
    """Returns the gradient of A from that of `x A`, mirrored (r, tokens).

    The mirror `g^T x` is several times faster than `x^T g`, but has to be copied into A's order in
    memory, which takes as long for any number of tokens. On torch 2.13.0 (CPU) the copy pays from
    16 tokens for each unit of the rank on.
    """
    rows = inputs.reshape(-1, a.numel() // a.shape[-1])
    if rows.shape[0] < 16 * back.shape[0]:
        gradient = rows.t() @ back.t()
    else:
        gradient = (back @ rows).t()
    return gradient.to(a.dtype).reshape(a.shape)


@contextlib.contextmanager
def laid_out_as(kernel, axes):
    """Lays out what a layer adds inside the block over devices as its kernel is.

    Under `keras.distribution.ModelParallel` a variable's layout is looked up by its path. A rule
    for kernels, `.*query.*kernel.*` say, also matches `query/lora_kernel_a`, which has other axes.
    So a rule counts for a factor only if it does not match the kernel itself; otherwise the factor
    takes the layout of the kernel's axes, and its rank is on every device.

    The layout counts, not the scope: a model that was distributed can be adapted outside of
    `distribution.scope()`, where no rules are known.

    `Layer.add_weight` takes no layout, `Variable._layout` and `ModelParallel._layout_map` are not
    public, and the current distribution is asked for by attribute (3.15.1).

    Args:
        kernel: The frozen variable.
        axes: For every axis of the new variable the kernel's axis, None for none of them.
    """
    outer = keras.distribution.distribution()
    layout = getattr(kernel, "_layout", None)
    if not isinstance(layout, keras.distribution.TensorLayout):
        yield
        return
    global_state.set_global_attribute("distribution", _LaidOutAs(outer, kernel, axes))
    try:
        yield
    finally:
        global_state.set_global_attribute("distribution", outer)


class _LaidOutAs:
    """Answers what a new variable asks of the current distribution."""

    def __init__(self, outer, kernel, axes):
        self.outer, self.kernel, self.axes = outer, kernel, axes

    def get_variable_layout(self, variable):
        rules = getattr(self.outer, "_layout_map", {})
        own = [
            rule
            for rule in rules
            if _matches(rule, variable.path) and not _matches(rule, self.kernel.path)
        ]
        if len(own) == 1:
            return rules[own[0]]
        if own:
            return rules[variable.path]  # the exact one, or Keras's error that lists them
        layout = self.kernel._layout
        axes = [None if axis is None else layout.axes[axis] for axis in self.axes]
        return keras.distribution.TensorLayout(axes, layout.device_mesh)


def _matches(rule, path):
    return rule == path or re.fullmatch(rule, path) is not None


def add_product(outputs, inner, b):
    """Returns outputs (..., m) plus the product of inner (tokens, r) and B (r, m).

    On torch (2.13.0) in one kernel, where dtypes are equal; the product alone takes longer, since
    it is written and read again.
    """
    if keras.backend.backend() == "torch" and outputs.dtype == inner.dtype == b.dtype:
        import torch

        return torch.addmm(outputs.reshape(-1, b.shape[-1]), inner, b).reshape(outputs.shape)
    product = keras.ops.matmul(inner, b)
    return keras.ops.add(outputs, keras.ops.reshape(product, keras.ops.shape(outputs)))


def build_shapes(layer):
    """Returns the shapes that the layer was built with, by argument name, or None.

    `Layer._build_shapes_dict` (3.15.1); the public `get_build_config` loses the names.
    """
    return layer._build_shapes_dict


def trace(function, *args, **kwargs):
    """Runs a function on symbolic tensors without computing anything (3.15.1)."""
    return keras_backend.compute_output_spec(function, *args, **kwargs)


def clear_compiled_state(model):
    """Makes `fit` and `evaluate` ask for `compile` again, and `predict` trace again.

    `Trainer.compiled` and the traced functions (3.15.1): Keras has no public way to take a
    `compile` back. An optimizer that was built goes too: it knows variables that train no more, and
    a file of the model would hold its state. One that was not built holds nothing of the model;
    KerasHub makes it with every task, and expects it in the task's files. Before it is built an
    optimizer has its iteration count and rate; `built` is False again where variables are gone.
    """
    if not getattr(model, "compiled", False):
        model.predict_function = None
        return
    model.compiled = False
    if model.optimizer is not None and len(model.optimizer.variables) > 2:
        model.optimizer = None
    model.train_function = None
    model.test_function = None
    model.predict_function = None


def node_inputs(tensor):
    """Returns the operation that made a symbolic tensor and the symbolic tensors it read.

    `KerasTensor._keras_history` and `Operation._inbound_nodes` (3.15.1): the public graph of a
    functional model names layers, not which of them make the outputs.
    """
    operation, node_index, _ = tensor._keras_history
    return operation, operation._inbound_nodes[node_index].input_tensors


@contextlib.contextmanager
def graph_left_untouched(model):
    """Removes the graph nodes that a symbolic call inside the block adds to the model's layers."""
    layers = flatten_layers(model)
    counts = [(layer, len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in layers]
    try:
        yield
    finally:
        for layer, inbound, outbound in counts:
            del layer._inbound_nodes[inbound:]
            del layer._outbound_nodes[outbound:]


def loaded(name):
    """Returns a module if the user has imported it, without importing it."""
    return sys.modules.get(name)


# --- optimizers: classes, decay, float32 steps, torch's fused kernel -----------------------------

LOW_PRECISION = ("bfloat16", "float16")


def active_optimizer_class(stock):
    """Returns the class that the active backend really uses for a Keras optimizer class.

    On torch `keras.optimizers.AdamW(...)` gives an instance of a subclass with `_foreach` kernels,
    picked by exact class in `__new__` (3.15.1); a subclass of the public class would miss it.
    Asking `__new__` creates no variable, and so no device.
    """
    return type(stock.__new__(stock))


def defined_outside_keras(cls, method):
    """Whether a class that is not part of Keras defines the method."""
    return any(
        method in vars(base) and base.__module__.split(".")[0] != "keras" for base in cls.__mro__
    )


def is_low_precision(variable):
    """Whether a variable (Keras's or the backend's) has fewer bits than float32."""
    return keras.backend.standardize_dtype(variable.dtype) in LOW_PRECISION


class Float32Copy(keras.Variable):
    """A float32 stand-in for a low-precision variable during one optimizer step.

    An optimizer that is handed the copy does its mathematics, scalars included, in float32, since
    Keras casts everything to the dtype of the variable. Only what optimizers use works.
    `Variable.__init__` is bypassed on purpose: it would create a backend variable (3.15.1).
    """

    def __init__(self, original):
        self.original = original
        self._value = keras.ops.cast(original, "float32")
        self._shape = original.shape
        self._ndim = len(original.shape)
        self._name = original.name
        self._path = getattr(original, "path", original.name)
        self._overwrite_with_gradient = False

    @property
    def value(self):
        return self._value

    @property
    def dtype(self):
        return "float32"

    def assign(self, value):
        self._value = dense(keras.ops.cast(value, "float32"))
        return self._value

    def assign_add(self, value):
        return self.assign(self._value + dense(keras.ops.cast(value, "float32")))

    def assign_sub(self, value):
        return self.assign(self._value - dense(keras.ops.cast(value, "float32")))

    def write_back(self):
        """Rounds the result into the original variable."""
        value = keras.ops.cast(self._value, self.original.dtype)
        self.original.assign(value)


def dense(value):
    """Returns TensorFlow's `IndexedSlices` as a tensor and anything else as it is.

    `keras.ops.convert_to_tensor` keeps `IndexedSlices` (3.15.1, tensorflow 2.21).
    """
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None and isinstance(value, tensorflow.IndexedSlices):
        return tensorflow.convert_to_tensor(value)
    return value


def decay(optimizer, variables, decays, multipliers):
    """Shrinks each variable by 1 - learning_rate * multiplier * decay.

    `_apply_weight_decay` (3.15.1) knows one rate only, and each backend has its own: TensorFlow
    goes through the distribution strategy, torch through a `_foreach` kernel. In float32 the
    operations and their order are Keras's on TensorFlow and JAX; low precision is decayed in
    float32.

    Args:
        optimizer: The optimizer; its `learning_rate` is read here, under TensorFlow inside the
            strategy's update.
        variables: Model variables.
        decays: Weight decay factors, one a variable; None or 0 for no decay.
        multipliers: Learning-rate multipliers, one a variable.
    """
    rows = [row for row in zip(variables, decays, multipliers, strict=True) if row[1]]
    backend = keras.backend.backend()
    if backend == "torch":
        _torch_decay(optimizer, rows)
    elif backend == "tensorflow":
        _tensorflow_decay(optimizer, rows)
    else:
        for variable, weight_decay, multiplier in rows:
            if optimizer._use_weight_decay(variable):
                step = _decay_step(optimizer, variable, weight_decay, multiplier)
                variable.assign(variable - step)


def scaled_rate(learning_rate, multiplier):
    """Returns the rate times the multiplier in float32; untouched, and so exact, for 1."""
    if multiplier == 1.0:
        return learning_rate
    return keras.ops.cast(learning_rate, "float32") * multiplier


def _decay_step(optimizer, variable, weight_decay, multiplier):
    dtype = "float32" if is_low_precision(variable) else variable.dtype
    rate = keras.ops.cast(scaled_rate(optimizer.learning_rate, multiplier), dtype)
    return keras.ops.cast(variable, dtype) * keras.ops.cast(weight_decay, dtype) * rate


def _tensorflow_decay(optimizer, rows):
    import tensorflow as tf

    def update(variable, weight_decay, multiplier):
        # Keras asks for the exclusion here, with the backend's variable, whose name is a path.
        if optimizer._use_weight_decay(variable):
            step = _decay_step(optimizer, variable, weight_decay, multiplier)
            if is_low_precision(variable):
                variable.assign(tf.cast(tf.cast(variable, step.dtype) - step, variable.dtype))
            else:
                variable.assign_sub(step)

    def update_all(distribution, rows):
        for variable, *factors in rows:
            distribution.extended.update(variable, update, args=factors, group=False)

    rows = [(v.value if isinstance(v, keras.Variable) else v, *factors) for v, *factors in rows]
    tf.__internal__.distribute.interim.maybe_merge_call(
        update_all, optimizer._distribution_strategy, rows
    )


def torch_values(variables):
    """Returns the tensors of variables.

    The property `Variable.value` looks up three scopes each time (3.15.1), which for some hundred
    small variables takes longer than their step; outside of scopes `_value` is what it returns.
    """
    get = global_state.get_global_attribute
    if get("stateless_scope") is get("autocast_scope") is get("torch_device") is None:
        return [variable._value for variable in variables]
    return [variable.value for variable in variables]


def torch_scaled_rates(learning_rate, multipliers):
    """Returns `scaled_rate` of each multiplier, by one kernel for all of them."""
    rate = keras.ops.cast(learning_rate, "float32")
    scaled = (rate * _torch_factors(multipliers, rate.device)).unbind()
    pairs = zip(multipliers, scaled, strict=True)
    return [learning_rate if multiplier == 1.0 else value for multiplier, value in pairs]


def _torch_factors(numbers, device):
    """Returns a float32 vector of numbers that are the same in every step.

    A vector takes a kernel where a list of scalars takes one each, on a CPU. It is made once: to
    copy numbers to a GPU waits for it.
    """
    import torch

    numbers = tuple(map(float, numbers))
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float32, device=device)
    return _kept_torch_factors(numbers, device)


@functools.lru_cache(maxsize=64)
def _kept_torch_factors(numbers, device):
    import torch

    return torch.tensor(numbers, dtype=torch.float32, device=device)


def torch_groups(variables, keys):
    """Groups variable positions by key, dtype and device, as torch's list kernels want them."""
    groups: dict = {}
    values = torch_values(variables)
    for position, (value, key) in enumerate(zip(values, keys, strict=True)):
        groups.setdefault((key, value.dtype, value.device), []).append(position)
    return groups


def _torch_decay(optimizer, rows):
    import torch

    rows = [row for row in rows if optimizer._use_weight_decay(row[0])]
    if not rows:
        return
    variables, *factors = zip(*rows, strict=True)
    all_values = torch_values(variables)
    groups = torch_groups(variables, zip(*factors, strict=True))
    with torch.no_grad():
        rate = keras.ops.cast(optimizer.learning_rate, "float32")
        # 1 - decay * (rate * multiplier)
        of_groups = zip(*(factors for factors, _, _ in groups), strict=True)
        decays, multipliers = (_torch_factors(numbers, rate.device) for numbers in of_groups)
        keeps = (1.0 - decays * (rate * multipliers)).unbind()
        each = []
        for (_, dtype, device), positions, keep in zip(groups, groups.values(), keeps, strict=True):
            values = [all_values[i] for i in positions]
            if dtype != torch_step_dtype(dtype):
                wide = [value.float() for value in values]
                torch._foreach_mul_(wide, keep)
                torch._foreach_copy_(values, wide)
            elif device.type == "cpu":
                each += [(value, keep) for value in values]
            else:
                torch._foreach_mul_(values, keep)
        # On the CPU a list kernel is a loop, so that one call serves all groups; on a GPU it is one
        # launch, as long as all of its list is multiplied by one number.
        if each:
            torch._foreach_mul_(*map(list, zip(*each, strict=True)))


def torch_write_back(copies):
    """Rounds the results of a low-precision group into the variables, in one kernel."""
    import torch

    originals = torch_values([copy.original for copy in copies])
    torch._foreach_copy_(originals, [copy.value for copy in copies])


def torch_step_dtype(dtype):
    """Returns torch's dtype that variables of this one are updated in."""
    import torch

    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def torch_matching_gradients(gradients, dtype):
    """Returns gradients in the dtype of their step, which `_foreach` kernels expect."""
    return [gradient if gradient.dtype == dtype else gradient.to(dtype) for gradient in gradients]


def torch_fused_adam(optimizer, gradients, variables, learning_rate, slots, shared):
    """Does one Adam step for float32 variables of one device in torch's fused kernel.

    The kernel adds epsilon after the bias correction, Keras before it. With step counts so large
    that the kernel's own corrections are 1, and the corrections in the rate, it computes what
    Keras does: `rate * sqrt(1 - beta_2^t) / (1 - beta_1^t) * m / (sqrt(v) + epsilon)`. Its own
    weight decay would use that corrected rate, so it is off. Checked on torch 2.13.0.

    Args:
        optimizer: The Adam optimizer, for its betas, epsilon and iteration count.
        gradients: Gradients, one a variable.
        variables: Model variables.
        learning_rate: Their common rate, one of those in `shared`.
        slots: Pairs (momentum, velocity), one a variable.
        shared: Dictionary for what the groups of one step have in common; before the first it has
            `"rates"`, the list of their rates.

    Returns:
        False, and nothing done, where the kernel does not apply: another dtype, a device without
        it, a variable whose memory is not contiguous, a beta of 1, which never saturates, or
        `torch.compile`, which has no rule for this kernel with a tensor rate and fuses by itself.
    """
    import torch

    count = len(variables)
    tensors = torch_values([*variables, *(m for m, _ in slots), *(v for _, v in slots)])
    values = tensors[:count]
    device = values[0].device
    if values[0].dtype != torch.float32 or device.type not in ("cpu", "cuda"):
        return False
    if not all(value.is_contiguous() for value in values):
        return False
    if max(optimizer.beta_1, optimizer.beta_2) >= 1 or torch.compiler.is_compiling():
        return False
    if device not in shared:
        # float32 counts: any beta up to 1 - 1e-6 to this power is 0.
        saturated = torch.full((), 1e9, dtype=torch.float32, device=device)
        shared[device] = _torch_corrected_rates(optimizer, shared["rates"], device), saturated
    corrected, saturated = shared[device]
    torch._fused_adam_(
        values,
        # The kernel reads memory in order, whatever the strides say.
        [gradient.contiguous() for gradient in gradients],
        tensors[count : 2 * count],
        tensors[2 * count :],
        [],
        [saturated] * len(values),
        lr=corrected[id(learning_rate)],
        beta1=optimizer.beta_1,
        beta2=optimizer.beta_2,
        weight_decay=0.0,
        eps=optimizer.epsilon,
        amsgrad=False,
        maximize=False,
    )
    return True


def _torch_corrected_rates(optimizer, rates, device):
    """Returns, by the id of a rate, the rate times Adam's bias corrections of this step."""
    import torch

    step = keras.ops.cast(optimizer.iterations + 1, "float32")
    correction = torch.sqrt(1 - optimizer.beta_2**step) / (1 - optimizer.beta_1**step)
    # A rate whose multiplier is 1 is what Keras gave: a variable, a tensor, a number.
    tensors = [r if torch.is_tensor(r) else keras.ops.cast(r, "float32") for r in rates]
    corrected = (torch.stack(tensors).float() * correction).to(device).unbind()
    return {id(rate): value for rate, value in zip(rates, corrected, strict=True)}


def learning_rate_variable(optimizer):
    """Returns the variable that holds an optimizer's rate, None where a schedule gives it.

    `Optimizer._learning_rate` (3.15.1): the public property reads a value.
    """
    return getattr(innermost_optimizer(optimizer), "_learning_rate", None)


def optimized_variables(optimizer):
    """Returns the model variables that an optimizer was built on.

    `Optimizer._trainable_variables` (3.15.1): the public `variables` are the optimizer's own.
    """
    return list(innermost_optimizer(optimizer)._trainable_variables)


def innermost_optimizer(optimizer):
    """Returns the optimizer inside of any number of `LossScaleOptimizer`s."""
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def is_functional(layer):
    """Whether the layer is a functional model, whose `layers` are in the graph's order.

    `keras.src.models.Functional` (3.15.1): Keras has no public name for the class.
    """
    from keras.src.models import Functional

    return isinstance(layer, Functional)


def attributes(layer):
    """Yields a layer's attributes by name, sorted, without those of Keras's own bookkeeping.

    torch's `Module` keeps submodules in a dictionary of its own, the other backends among the
    attributes, and TensorFlow adds dictionaries of what it tracks; a path made from these names has
    to be the same on all three (3.15.1).
    """
    values = {**vars(layer), **vars(layer).get("_modules", {})}
    for name in sorted(values):
        if name not in _BOOKKEEPING and not name.startswith(("__", "_self_unconditional_")):
            yield name, values[name]


_BOOKKEEPING = frozenset(
    {
        "_compiled_trainable_state",
        "_functional",
        "_inbound_nodes",
        "_layers",
        "_metrics",
        "_modules",
        "_nodes",
        "_operations",
        "_operations_by_depth",
        "_operations_by_name",
        "_outbound_nodes",
        "_torch_params",
    }
)


# --- KerasHub: what its weight files are about ---------------------------------------------------


def hub_backbone(model):
    """Returns the backbone of a KerasHub backbone or task, or None for any other model.

    Whoever holds such a model has imported keras_hub (0.32.0), so that it need not be imported.
    """
    hub = loaded("keras_hub")
    if hub is None:
        return None
    if isinstance(model, hub.models.Task):
        return model.backbone
    return model if isinstance(model, hub.models.Backbone) else None


# --- resuming: state outside of graphs, seed generators, epochs, processes -----------------------


def outside_of_graphs():
    """Runs a block at once even while TensorFlow traces a function (tensorflow 2.21).

    An optimizer is built, and so gets a state that was loaded before, inside of the trace of a
    custom training step; an assignment in the trace would be repeated every step.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def state_variables(layer):
    """Returns the layer's own variables that no optimizer trains.

    `Layer._non_trainable_variables` (3.15.1): the public list includes those of sublayers, and
    frozen weights.
    """
    return list(layer._non_trainable_variables)


def seed_generators(layer):
    """Returns the layer's own seed generators, in order of creation.

    `Layer._seed_generators` (3.15.1): the public `Layer.variables` has their states among those of
    all sublayers, without saying whose they are.
    """
    return list(layer._seed_generators)


def random_states():
    """Returns random states that are no Keras variables, as arrays by name.

    torch's own dropout, which Keras uses where no seed was given (3.15.1), draws from torch's
    global generators (torch 2.13). The other backends have none.
    """
    if keras.backend.backend() != "torch":
        return {}
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return {name: state.numpy() for name, state in states.items()}


def restore_random_states(states):
    """Puts back what `random_states` returned; states of devices that are not here are left out."""
    if keras.backend.backend() != "torch":
        return
    import torch

    for name, state in states.items():
        state = torch.from_numpy(state.copy())
        if name == "cpu":
            torch.set_rng_state(state)
        elif int(name.partition(":")[2]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)


def begin_at_epoch(model, epoch):
    """Makes the `fit` that is beginning start at this epoch; None for what it was told.

    `Trainer._initial_epoch` (3.15.1), which `fit` reads after `on_train_begin` and never resets;
    Keras's own `BackupAndRestore` sets it likewise.
    """
    model._initial_epoch = epoch


def is_first_process(model):
    """Whether this process is the one that writes files, where several train one model.

    Keras has no public word for it on all backends (3.15.1; jax 0.10.2, tensorflow 2.21, torch
    2.13).
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.process_index() == 0
    if backend == "torch":
        import torch

        distributed = torch.distributed
        started = distributed.is_available() and distributed.is_initialized()
        return not started or distributed.get_rank() == 0
    return bool(model.distribute_strategy.extended.should_checkpoint)


# --- KerasHub: its converters of Hugging Face checkpoints -----------------------------------------


def hub_converter(config):
    """Returns KerasHub's converter module for a Hugging Face `config.json`.

    `TransformersPresetLoader` (keras_hub 0.32.0) picks it by model type; KerasHub has no public
    name for its converters.

    Raises:
        ValueError: If KerasHub has none.
    """
    from keras_hub.src.utils.transformers.preset_loader import TransformersPresetLoader

    try:
        return TransformersPresetLoader("", config).converter
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"KerasHub has no converter for model type {config.get('model_type')!r}, so that its "
            "weights have no known Hugging Face names."
        ) from error


def hub_backbone_from(preset):
    """Loads a backbone from a KerasHub preset or a Hugging Face checkpoint folder.

    Raises:
        ImportError: If keras_hub is not installed.
    """
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            "Building a backbone needs KerasHub: pip install 'keras-loraplus[hub]'."
        ) from error
    return keras_hub.models.Backbone.from_preset(preset)


def hub_task_around(backbone, name, classes):
    """Builds a KerasHub task around a backbone, with a new head and no preprocessing (0.32.0).

    Args:
        backbone: A KerasHub backbone.
        name: Name of a task class, of the backbone's own or of a general one (`TextClassifier`).
        classes: Number of classes, for a task that has classes.

    Raises:
        ValueError: If there is no such task for the backbone.
    """
    import keras_hub

    tasks: dict = {
        key: value
        for key, value in vars(keras_hub.models).items()
        if isinstance(value, type)
        and issubclass(value, keras_hub.models.Task)
        and getattr(value, "backbone_cls", None) is type(backbone)
    }
    general = getattr(keras_hub.models, name, None)
    # Some classes are exported under two names.
    fitting = {
        value
        for value in tasks.values()
        if isinstance(general, type) and issubclass(value, general)
    }
    if len(fitting) != 1:
        raise ValueError(
            f"--task: expected a KerasHub task for a {type(backbone).__name__}, one of "
            f"{sorted(tasks)}. Received: {name!r}."
        )
    task = fitting.pop()
    has_classes = "num_classes" in inspect.signature(task.__init__).parameters
    arguments = {"num_classes": classes} if has_classes else {}
    return task(backbone=backbone, preprocessor=None, **arguments)


def hub_ties_logits(model):
    """Whether a KerasHub task computes logits with its backbone's token embedding (0.32.0)."""
    hub = loaded("keras_hub")
    return hub is not None and isinstance(model, (hub.models.CausalLM, hub.models.MaskedLM))


def transformers_renames(model_type):
    """Returns pairs (pattern, replacement) from checkpoint names to names of modules.

    transformers 5 (5.24.0) renames the weights of some models, ViT's for example, as it reads them,
    and PEFT goes by the new names. Its tables have no public name. Without transformers, or with
    one that has no tables, names are taken as they are in the checkpoint.
    """
    if importlib.util.find_spec("transformers") is None:
        return []
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
    except ImportError:
        return []
    names = [model_type, MODEL_MAPPING_NAMES.get(model_type)]
    tables = [get_checkpoint_conversion_mapping(name) or [] for name in names if name]
    return [
        (source, target)
        for table in tables
        for entry in table
        if type(entry).__name__ == "WeightRenaming"
        for source, target in zip(entry.source_patterns, entry.target_patterns, strict=True)
    ]


# --- distribution: replicas of tf.distribute, layouts of keras.distribution ----------------------


def replica_count():
    """Returns over how many replicas of a `tf.distribute` strategy the running step is spread.

    1 on JAX and torch, outside of `strategy.run`, and where the strategy has one (tensorflow 2.21).
    """
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def refuse_conditions_in_replicas(**settings):
    """Raises where Keras's optimizer would put a sum over replicas into one branch of a condition.

    tensorflow 2.21 cannot trace that, and says so without naming the setting that asks for it
    (3.15.1).

    Args:
        settings: The optimizer's settings that are conditions, by name.

    Raises:
        ValueError: If one of them is set and the step runs on several replicas.
    """
    asked = [f"{name}={value}" for name, value in settings.items() if value]
    if asked and replica_count() > 1:
        raise ValueError(
            f"{' and '.join(asked)} cannot be used under a `tf.distribute` strategy with several "
            "replicas: TensorFlow cannot sum gradients over replicas inside of a condition. Leave "
            "it out and pass a larger batch to `fit`, or train on one device. Nothing has been "
            "changed."
        )


def check_distribution(layer):
    """Raises where what is added to a layer would be on other devices than what is there.

    Checked on 3.15.1: `fit` would end in an empty AssertionError (tensorflow 2.21), or in an error
    of incompatible devices that leaves the weights as None (jax 0.10.2). `Variable._layout` and
    `_value`, and `_distribute_strategy` of TensorFlow's variables, have no public readers.

    Args:
        layer: A layer or model that is to gain weights.

    Raises:
        ValueError: Naming a variable and the scope to open.
    """
    if keras.backend.backend() == "tensorflow":
        _check_strategy(layer)
    outer = keras.distribution.distribution()
    if keras.backend.backend() != "jax" or outer is None:
        return
    for variable in layer.weights:
        if variable._layout is None and outer.get_variable_layout(variable) is not None:
            raise ValueError(
                f"'{variable.path}' of '{layer.name}' was made before the current "
                f"{type(outer).__name__} was set, so that the model is not distributed and Keras "
                "could not train it. Make the model inside of `with distribution.scope():`, or "
                "after `keras.distribution.set_distribution(distribution)`, then enable adapters "
                "or load them (`keras_loraplus.load_adapter`). Nothing has been changed."
            )


def _check_strategy(layer):
    import tensorflow as tf

    here = tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
    for variable in layer.weights:
        made_under = getattr(variable._value, "_distribute_strategy", None)
        if made_under is here:
            continue
        advice = (
            "Leave the `with strategy.scope():` block before you enable adapters, or make the "
            "model inside of it"
            if made_under is None
            else "Enable adapters inside of the `with strategy.scope():` block that made the model"
        )
        raise ValueError(
            f"'{variable.path}' of '{layer.name}' was made under {_strategy_name(made_under)}, and "
            f"the current strategy is {_strategy_name(here)}; adapters have to be made under the "
            f"strategy of the weights that they stand beside. {advice}. Nothing has been changed."
        )


def _strategy_name(strategy):
    return "no tf.distribute strategy" if strategy is None else f"a {type(strategy).__name__}"


def parts_of(tensor):
    """Returns the parts of a tensor that this process holds, as pairs (offset, part).

    `keras.ops.slice` of an array that is sharded (jax 0.10.2) first gathers all of it on every
    device, since the place of the slice is an argument of the compiled function.

    Args:
        tensor: A tensor of the backend.

    Returns:
        A list; the tensor itself where one device has all of it.
    """
    if keras.backend.backend() != "jax" or tensor.is_fully_replicated:
        return [((0,) * len(tensor.shape), tensor)]
    parts = {}
    for shard in tensor.addressable_shards:
        parts[tuple(cut.start or 0 for cut in shard.index)] = shard.data
    return list(parts.items())


def span_processes(tensors):
    """Whether this process lacks a part of one of the tensors (jax 0.10.2)."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    if jax.process_count() == 1:
        return False
    return any(
        sum(part.size for _, part in parts_of(tensor)) < tensor.size
        for tensor in map(keras.ops.convert_to_tensor, tensors)
    )


def host_value(tensor):
    """Returns a tensor as a numpy array, also where other processes hold parts of it.

    Then every process has to come here. `multihost_utils` is public though experimental (jax
    0.10.2).
    """
    if not span_processes([tensor]):
        return keras.ops.convert_to_numpy(tensor)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(keras.ops.convert_to_tensor(tensor), tiled=True)


def known_anywhere(tensor, values):
    """Returns values read of a tensor, those that are NaN here from another process.

    Args:
        tensor: The tensor; if it spans processes, every process has to come here.
        values: A float numpy array.
    """
    if not span_processes([tensor]):
        return values
    from jax.experimental import multihost_utils

    # NaN where every process has it so.
    return np.fmax.reduce(multihost_utils.process_allgather(values))


def wait_for_all_processes():
    """Returns once every process that trains this model has come here; alone, at once.

    TensorFlow's multi-worker strategies have no public barrier (tensorflow 2.21); nothing is waited
    for there. `multihost_utils` is public though experimental (jax 0.10.2).
    """
    if keras.backend.backend() == "jax":
        import jax

        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("keras_loraplus")
    elif keras.backend.backend() == "torch":
        import torch

        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()


# --- compatibility with every KerasHub backbone: what a graph calls -------------------------------


def runs_its_graph(layer):
    """Whether a functional model calls what its graph holds, and nothing else.

    A subclass of `keras.src.models.Functional` (3.15.1) may override `call` and use more layers.
    """
    from keras.src.models import Functional

    return isinstance(layer, Functional) and type(layer).call is Functional.call


# --- LoRAPlusMonitor: what adapters receive in a forward pass -------------------------------------


def without_gradients():
    """Runs a block without recording gradients.

    Keras (3.15.1) has no public word for it; torch 2.13 would keep every activation otherwise. The
    other backends record only where they are asked to.
    """
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


@contextlib.contextmanager
def methods_replaced(replacements):
    """Replaces methods of single layers within the block.

    An entry in the instance's dictionary is what `self.method` finds first; it goes past
    `Layer.__setattr__` and the trackers of TensorFlow and torch (3.15.1), and leaves nothing
    behind.

    Args:
        replacements: Tuples (layer, name of the method, function that takes its place).
    """
    before = [(layer, name, layer.__dict__.get(name)) for layer, name, _ in replacements]
    try:
        for layer, name, function in replacements:
            layer.__dict__[name] = function
        yield
    finally:
        for layer, name, value in before:
            if value is None:
                layer.__dict__.pop(name, None)
            else:
                layer.__dict__[name] = value


def gradient_accumulation_steps(optimizer):
    """Returns after how many steps an optimizer changes the variables.

    The attribute of that name (3.15.1) is None for 1 and is not in the documentation.
    """
    return innermost_optimizer(optimizer).gradient_accumulation_steps or 1


# --- sweeps of text classifiers -------------------------------------------------------------------


def hub_text_preprocessor(preset, sequence_length):
    """Loads what turns texts into the inputs of a text classifier (keras-hub 0.32.0).

    Raises:
        ImportError: If keras_hub is not installed.
        ValueError: If the preset cannot be loaded.
    """
    return _from_preset("TextClassifierPreprocessor", preset, sequence_length=sequence_length)


def hub_text_classifier(preset, classes, dtype):
    """Loads a text classifier with pretrained weights, a new head and no preprocessing (0.32.0).

    Raises:
        ImportError: If keras_hub is not installed.
        ValueError: If the preset cannot be loaded.
    """
    options = {"num_classes": classes, "preprocessor": None, "dtype": dtype}
    return _from_preset("TextClassifier", preset, **options)


def _from_preset(name, preset, **options):
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            "Text classifiers need KerasHub: pip install 'keras-loraplus[hub]'."
        ) from error
    try:
        return getattr(keras_hub.models, name).from_preset(preset, **options)
    except Exception as error:  # of many kinds, from JSON's to HTTP's
        raise ValueError(
            f"Expected a KerasHub preset, or a folder, of a model that {name} can be made of. "
            f"Received: {preset!r}, and KerasHub says: {str(error)[:300]}"
        ) from error


# --- registered adapters -------------------------------------------------------------------------

# KerasHub (0.32.0) exports the backbones of these, not the classes; the names stand for classes
# that need not be imported.
HUB_EXPERTS = {
    "MixtralMoeExperts": "keras_hub.src.models.mixtral.mixtral_decoder.MixtralMoeExperts",
    "QwenMoeExperts": "keras_hub.src.models.qwen_moe.qwen_moe_decoder.QwenMoeExperts",
    "Qwen3MoeExperts": "keras_hub.src.models.qwen3_moe.qwen3_moe_decoder.Qwen3MoeExperts",
    "Qwen3_5MoeExperts": "keras_hub.src.models.qwen3_5_moe.qwen3_5_moe_decoder.Qwen3_5MoeExperts",
    "GptOssExperts": "keras_hub.src.models.gpt_oss.gpt_oss_decoder.GptOssExperts",
}

# Layers of KerasHub (0.32.0) whose own weights no two thin matrices can stand beside.
HUB_NOT_ADAPTABLE = {
    "keras_hub.src.models.rwkv7.rwkv7_layer.RWKV7TimeMix": (
        "the matrices that it holds itself are pairs of thin ones already"
    ),
    "keras_hub.src.models.qwen3_5.qwen3_5_gated_delta_net.Qwen3_5GatedDeltaNet": (
        "what it holds itself is one short filter for each channel"
    ),
}


@contextlib.contextmanager
def own_variables_as(layer, variables):
    """Lets a layer hold just these variables, in this order, while it saves or loads.

    `Layer.save_own_variables` (3.15.1) numbers the variables of the two lists that the layer holds,
    and `Layer.load_own_variables` counts them.
    """
    stores = (layer._trainable_variables, layer._non_trainable_variables)
    before = [list(store) for store in stores]
    stores[0][:], stores[1][:] = variables, []
    try:
        yield
    finally:
        for store, members in zip(stores, before, strict=True):
            store[:] = members


def in_order_of(variables, names):
    """Returns variables in the order of their names, others behind them."""
    return sorted(variables, key=lambda v: names.index(v.name) if v.name in names else len(names))


def order_own_variables(layer, names):
    """Puts what trains of a layer, and what does not, in the order of names.

    `Layer._trainable_variables` and `_non_trainable_variables` (3.15.1): see `own_variables_as`.
    """
    for store in (layer._trainable_variables, layer._non_trainable_variables):
        store[:] = in_order_of(store, names)


def automatic_config(layer, layer_class):
    """Returns the arguments that Keras noted of a layer whose class has no `get_config`, or {}.

    `Operation._auto_config` (3.15.1) is read by `Operation.get_config` where that is the layer's
    own, which it no longer is once the layer's class is one that adds to the config.

    Raises:
        NotImplementedError: If Keras could not note them.
    """
    if not hasattr(layer_class.get_config, "_is_default"):
        return {}
    noted = layer._auto_config
    if noted is None:
        raise NotImplementedError(
            f"Layer '{layer.name}' cannot be saved: {layer_class.__name__} has no `get_config`, "
            "and its arguments are not plain values. Write one that returns its arguments."
        )
    return dict(noted.config)


def einsum_of_frozen(equation, inputs, kernel):
    """Returns an einsum whose second operand is a constant.

    TensorFlow (2.21) differentiates an einsum by both operands whatever is asked for; a compiled
    function drops what nobody reads, an eager one would form a gradient of the kernel's size.
    """
    ops = keras.ops
    operands, outputs = equation.replace(" ", "").split("->")
    first, second = operands.split(",")
    plain = keras_backend.backend() != "tensorflow" or isinstance(inputs, keras.KerasTensor)
    if plain or not set(first) <= set(second + outputs):
        return ops.einsum(equation, inputs, kernel)
    import tensorflow as tf

    inputs = ops.convert_to_tensor(inputs)

    @tf.custom_gradient
    def product(x):
        def gradient(upstream):
            back = ops.einsum(f"{outputs},{second}->{first}", upstream, kernel)
            return ops.cast(back, x.dtype)

        return ops.einsum(equation, x, kernel), gradient

    return product(inputs)


# --- initial values, and merging in blocks --------------------------------------------------------


def on_device(value):
    """Returns a numpy array as the backend's, where `keras.ops` would compile a program for it.

    JAX (0.10.2) compiles one for each shape in `jnp.asarray`, to which
    `keras.ops.convert_to_tensor` leads (Keras 3.15.1), and none in `device_put`.
    """
    if keras_backend.backend() != "jax":
        return value
    import jax

    return jax.device_put(value)


def is_laid_out(variable):
    """Whether `keras.distribution` lays the variable out over devices.

    `Variable._layout` is not public (3.15.1). A slice of such a variable would gather its parts.
    """
    return getattr(variable, "_layout", None) is not None


# --- quantized layers: Keras 3.15, and the strategies of 3.16's nightly builds --------------------


def quantized_mode_call(layer_class, mode):
    """Returns the unbound function that computes a Keras layer in a quantized mode.

    3.15.1 has a method for each mode; 3.16.0.dev2026102704 asks a strategy, by the layer's own
    mode. Neither is public.
    """
    method = getattr(layer_class, f"_{mode}_call", None)
    return _strategy(mode).call if method is None else method


def _strategy(mode):
    """Returns Keras's strategy of a quantized mode, or None in a Keras that has none."""
    try:
        from keras.src.quantizers import strategy_registry
    except ImportError:
        return None
    return strategy_registry.get_strategy(mode)


def quantized_view(layer, name):
    """Returns Keras's view of a quantized matrix, or None where Keras has no such views.

    3.16.0.dev2026102704 (`keras.src.quantizers.quantized_weight`): the view has the `shape` of the
    matrix, and `dequantize(dtype)`. In 3.15.1 a mode's layout is to be known.

    Args:
        layer: A quantized layer.
        name: Attribute of the matrix in the layer that is not quantized.
    """
    strategy = _strategy(layer.quantization_mode)
    if strategy is None:
        return None
    if name == "reverse_embeddings":
        return strategy.quantized_weights(layer)[1]
    return strategy.quantized_weight(layer)


def is_calibrated(layer):
    """Whether a layer of mode GPTQ or AWQ stores its matrix in that mode already.

    3.15.1 has a flag for each mode, 3.16.0.dev2026102704 one for what is still to come.
    """
    if hasattr(layer, "calibration_pending"):
        return not layer.calibration_pending
    return bool(getattr(layer, f"is_{layer.quantization_mode}_calibrated", False))
