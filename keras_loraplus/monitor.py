"""A callback that shows how far A and B move, and what each move does to the layers' outputs."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_loraplus import _compat
from keras_loraplus.layers.embedding import LoRAPlusEmbedding, LoRAPlusReversibleEmbedding
from keras_loraplus.layers.matrix_adapter import MatrixAdapter
from keras_loraplus.layers.thin import output_factors, product_norm, update_factors
from keras_loraplus.optimizers.assignments import assignments
from keras_loraplus.registry import adapted_layers

RATES = ("lr_a", "lr_b")
NORMS = ("norm_a", "norm_b", "update")
DELTAS = ("delta1", "delta2", "delta3")


class LoRAPlusMonitor(keras.callbacks.Callback):
    """Logs both learning rates, and whether A or B is idle.

    For every adapted layer, every `every` steps:

        norm_a, norm_b    ||A||, ||B||, Frobenius norms
        update            s ||A B|| / ||W||

    and, given a `probe` batch, what one optimizer step A -> A + dA, B -> B + dB changes in the
    layer's output on it, in three parts that add up to the whole change:

        delta1            s (x dA) B     what A's step does: small if A is idle
        delta2            s (x A) dB     what B's step does: small if B is idle
        delta3            s (x dA) dB    what both do together

    each as the root mean square over the entries of the output, so that layers of different width
    compare. x is what the adapter receives on the probe batch (after the step, without dropout,
    padding included), A and B are from before the step. A rate that is right for both keeps delta1
    and delta2 of one size; with one rate for both, delta2 falls behind as the width grows (see the
    source). In the first step one of them is zero, since A or B begins at zero.

    The entries of `logs`:

        lora/lr_a, lora/lr_b                    rates of A and B, the medians over the layers
        lora/norm_a ... lora/delta3             medians over the layers
        lora/<layer>/norm_a ... delta3          each layer's, where an epoch ends

    The medians are in the logs of every batch from the first measurement on, and in those of the
    epoch, which also has the rates at its end. Callbacks that read them (`TensorBoard`,
    `CSVLogger`) have to stand behind this one in the list; the progress bar always does.
    `records` keeps all measurements.

    No product of the kernel's size and no output of the adapter is formed: norms of products come
    from r x r matrices. A measurement costs one forward pass of the probe batch, outside of
    compiled functions, and copies of A and B; in between nothing is read, so that JAX is not made
    to synchronise. A forward pass of a probe of a batch's size is a part of a training step's work,
    and the default measures every 100th step. The first is measured too, whatever `every` is.

    Args:
        probe: A batch of model inputs, as `model(...)` takes them (not what a KerasHub preprocessor
            takes); `None` leaves the three deltas out. Some 8 to 32 examples will do.
        every: Number of optimizer steps from one measurement to the next.
        per_layer: Whether the logs of an epoch hold the entries of each layer. Of a deep model
            these are many, and a progress bar prints them all; `records` has them in any case.

    Attributes:
        records: List of dicts with `step` (steps done), `steps` (how many the deltas are over: 1,
            or as many as gradients are accumulated or one execution covers), `lr_a`, `lr_b` and
            `layers`, a dict from the layer's path to its values by name. A layer that the probe did
            not reach has no deltas.
        left_out: Dict from the path of a layer to the reason why it has no deltas.

    Raises:
        ValueError: If an argument is out of range; where `fit` begins, if the model has no
            adapters.

    Example:
        >>> dense = keras.layers.Dense
        >>> model = keras.Sequential([keras.Input((4,)), dense(8, name="hidden"), dense(2)])
        >>> report = klp.enable_lora_plus(model, rank=2)
        >>> model.compile(klp.LoRAPlusAdamW(1e-3, lr_ratio=16.0), loss="mse")
        >>> x, y = np.ones((8, 4)), np.ones((8, 2))
        >>> monitor = klp.callbacks.LoRAPlusMonitor(probe=x, every=1)
        >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor])
        >>> [f"{history.history[f'lora/{name}'][-1]:.0e}" for name in ("lr_a", "lr_b")]
        ['1e-03', '2e-02']
        >>> sorted(monitor.records[0]["layers"]["hidden"])
        ['delta1', 'delta2', 'delta3', 'lr_a', 'lr_b', 'norm_a', 'norm_b', 'update']
        >>> monitor.records[0]["layers"]["hidden"]["delta2"]  # A was zero
        0.0

    Source: Hayou et al., arXiv 2402.12354, section 3: the terms of the change of a LoRA layer's
    output, there for one input.
    """

    def __init__(self, probe: Any = None, every: int = 100, per_layer: bool = True) -> None:
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be a positive number of steps. Received: {every!r}")
        self.probe = probe
        self.every = every
        self.per_layer = per_layer
        self.records: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self._forget()

    def _forget(self):
        self._pairs: list[_Pair] = []
        self._before: list | None = None
        self._medians: dict[str, float] = {}
        self._window = 1
        self._done = self._started_at = self._next = self._batches_done = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Finds the adapters and takes the norms of their kernels."""
        self._forget()
        self.records, self.left_out = [], {}
        model = self.model
        self._pairs = _pairs_of(model)
        self._window = _compat.gradient_accumulation_steps(model.optimizer)
        if self.probe is not None:
            self.left_out = {p.path: p.why_no_deltas for p in self._pairs if p.why_no_deltas}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Notes that batches are counted from zero again."""
        self._batches_done = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Copies A and B, if the coming step is to be measured."""
        if self._before is None and self._done >= self._next:
            # Asking for the model makes JAX put the state of training back into its variables.
            _ = self.model
            self._before = [pair.values() for pair in self._pairs]
            self._started_at = self._done

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Measures, if a step is to be measured, and adds the medians to the logs."""
        # One call covers several batches where `compile` was given `steps_per_execution`.
        self._done += batch + 1 - self._batches_done
        self._batches_done = batch + 1
        if self._before is not None and self._done - self._started_at >= self._window:
            self._measure(self._before)
            self._before = None
            while self._next <= self._started_at:
                self._next += self.every
        if logs is not None:
            logs.update(self._medians)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the medians, the rates of now and the values of each layer to the logs."""
        if logs is None or not self.records:
            return
        logs.update(self._medians)
        logs.update(_medians(_rates(self.model, self._pairs), RATES))
        if self.per_layer:
            for path, values in self.records[-1]["layers"].items():
                named = {f"lora/{path}/{name}": values.get(name) for name in (*NORMS, *DELTAS)}
                logs.update({key: value for key, value in named.items() if value is not None})

    def _measure(self, all_before):
        model = self.model
        seen = {} if self.probe is None else _inputs_on(model, self._pairs, self.probe)
        rows = _rates(model, self._pairs)
        for pair, before in zip(self._pairs, all_before, strict=True):
            row, after = rows[pair.path], pair.values()
            row.update(pair.norms(*after))
            if pair.path in seen:
                row.update(pair.deltas(seen[pair.path], before, after))
        self._medians = _medians(rows, (*RATES, *NORMS, *DELTAS))
        self.records.append(
            {
                "step": self._done,
                "steps": self._done - self._started_at,
                "lr_a": self._medians["lora/lr_a"],
                "lr_b": self._medians["lora/lr_b"],
                "layers": rows,
            }
        )


class _Pair:
    """One frozen matrix of an adapted layer and the two factors beside it."""

    def __init__(self, path, layer, names, reverse_table):
        self.path, self.layer, self.names = path, layer, names
        self.a, self.b = getattr(layer, names.a), getattr(layer, names.b)
        # A table of its own that turns outputs into logits, in an untied `ReversibleEmbedding`.
        self.is_reverse_table = reverse_table
        self.kernel_norm = _kernel_norm(layer, names)
        self.why_no_deltas = _why_no_inputs(layer)

    def values(self):
        """Returns copies of A and B in float64: JAX gives the memory of the originals away."""
        return _as_float64(self.a), _as_float64(self.b)

    def norms(self, a, b):
        update = self.layer.adapter.scale * product_norm(*update_factors(self.names, a, b))
        return {
            "norm_a": float(np.linalg.norm(a)),
            "norm_b": float(np.linalg.norm(b)),
            "update": update / self.kernel_norm if self.kernel_norm else float("nan"),
        }

    def deltas(self, calls, before, after):
        """Returns the three terms over all calls of the layer in one forward pass."""
        (a, b), step_a, step_b = before, after[0] - before[0], after[1] - before[1]
        sums, size = np.zeros(len(DELTAS)), 0
        for inputs, reverse in calls:
            for i, factors in enumerate([(step_a, b), (a, step_b), (step_a, step_b)]):
                left, right = output_factors(self.layer, inputs, *factors, reverse=reverse)
                sums[i] += product_norm(left, right) ** 2
            size += left.shape[0] * left.shape[1] * right.shape[2]
        values = self.layer.adapter.scale * np.sqrt(sums / max(size, 1))
        return dict(zip(DELTAS, map(float, values), strict=True))


def _pairs_of(model):
    layers = adapted_layers(model)
    prefix = f"{model.name}/"
    names = [(layer.path or layer.name).removeprefix(prefix) for layer in layers.values()]
    # A path of names reads best, where no two layers share one.
    unique = len(set(names)) == len(names)
    pairs = []
    for name, (path, layer) in zip(names, layers.items(), strict=True):
        for position, factors in enumerate(layer._factors()):
            table = position > 0 and isinstance(layer, LoRAPlusEmbedding)
            suffix = "/reverse" if table else ""
            if isinstance(layer, MatrixAdapter):
                suffix = f"/{factors.kernel.strip('_')}"
            pairs.append(_Pair((name if unique else path) + suffix, layer, factors, table))
    return pairs


def _why_no_inputs(layer):
    """Returns why the adapter's inputs cannot be read, or None."""
    if isinstance(layer, MatrixAdapter):
        return f"what the matrices of {type(layer).__name__} multiply is known inside of it alone"
    known = (LoRAPlusEmbedding.call, LoRAPlusReversibleEmbedding.call)
    if isinstance(layer, LoRAPlusEmbedding) and type(layer).call not in known:
        return f"{type(layer).__name__} has a `call` of its own, which may change the tokens"
    return None


def _inputs_on(model, pairs, probe):
    """Returns what every adapter receives in one forward pass, by path of its pair.

    Returns:
        Dict from path to a list of (inputs, whether logits were computed), one a call.
    """
    seen: dict = {}
    replacements = []
    for pair in pairs:
        if pair.why_no_deltas is None:
            replacements += _recorders(pair, seen.setdefault(pair.path, []))
    with _compat.methods_replaced(replacements), _compat.without_gradients():
        model(probe, training=False)
    return {path: calls for path, calls in seen.items() if calls}


def _recorders(pair, calls):
    layer = pair.layer
    if not isinstance(layer, LoRAPlusEmbedding):
        # What drops the adapter's input receives it, also where a user's own call changed it.
        return [(layer, "_dropped", _recorder(layer._dropped, calls, reverse=False))]
    found = []
    if not pair.is_reverse_table:
        found.append((layer, "call", _forward_recorder(layer.call, calls)))
    tied = getattr(layer, "tie_weights", False)
    if pair.is_reverse_table or tied:
        found.append((layer, "_reverse", _recorder(layer._reverse, calls, reverse=True)))
    return found


def _recorder(method, calls, reverse):
    def record(inputs, *args, **kwargs):
        calls.append((_as_numpy(inputs), reverse))
        return method(inputs, *args, **kwargs)

    return record


def _forward_recorder(method, calls):
    def record(inputs, reverse=False, **kwargs):
        if reverse:
            return method(inputs, reverse=True, **kwargs)
        calls.append((np.asarray(ops.convert_to_numpy(inputs)), False))
        return method(inputs, **kwargs)

    return record


def _rates(model, pairs):
    """Returns the rates of A and B now, by path of the pair."""
    try:
        rows = assignments(model)
        by_variable = {
            id(variable): row.learning_rate
            for variable, row in zip(model.trainable_variables, rows, strict=True)
        }
    except ValueError:
        # An optimizer with one rate for everything.
        by_variable = {}
    common = None
    rates = {}
    for pair in pairs:
        if not by_variable and common is None:
            common = float(ops.convert_to_numpy(model.optimizer.learning_rate))
        rates[pair.path] = {
            "lr_a": by_variable.get(id(pair.a), common),
            "lr_b": by_variable.get(id(pair.b), common),
        }
    return rates


def _medians(rows, names):
    medians = {}
    for name in names:
        values = [row[name] for row in rows.values() if row.get(name) is not None]
        if values:
            medians[f"lora/{name}"] = float(np.median(values))
    return medians


def _kernel_norm(layer, names):
    if layer.quantization_mode is None:
        kernel = ops.cast(getattr(layer, names.kernel), "float32")
    else:
        # Stored as integers; merging gives W + s A B as floats.
        a, b = (ops.convert_to_tensor(getattr(layer, name)) for name in (names.a, names.b))
        product = names.product(a, b)
        kernel = layer.merged_values()[names.kernel] - layer.adapter.scale * product
    return float(ops.convert_to_numpy(ops.norm(ops.reshape(kernel, (-1,)))))


def _as_numpy(tensor):
    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")), "float64")


def _as_float64(variable):
    return np.array(ops.convert_to_numpy(ops.cast(variable, "float32")), "float64", copy=True)
