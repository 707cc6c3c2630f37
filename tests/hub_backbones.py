"""Every backbone class of KerasHub in a tiny configuration, and what is asked of each of them.

`run_checks(case)` returns a finding for every check, so that a test can name all that failed and
the table in `docs/compatibility.md` can be written.
"""

import dataclasses
import os
import re
import tempfile

import keras
import keras_hub
import numpy as np
from hub_cases import dense_prediction, multimodal, pipelines, text, vision
from keras import ops
from lora_cases import snapshot
from tolerances import FLOAT32_MODEL, assert_close, relative_error

import keras_loraplus as klp
from keras_loraplus.layers import is_adapted

_MODULES = (text, vision, dense_prediction, multimodal, pipelines)
CASES = {case.name: case for module in _MODULES for case in module.CASES}
# By far the slowest stands first, so that no worker is left alone with it at the end.
CASES = {"BASNetBackbone": CASES.pop("BASNetBackbone"), **CASES}

CHECKS = ("enables", "unchanged", "every path", "trains", "saves and loads", "merges")

# One of each kind, for the backends on which not every class is run: an encoder, a decoder,
# experts, both, convolutions with batch normalisation, patches, two towers, sound.
SAMPLE = (
    "BertBackbone",
    "GemmaBackbone",
    "MixtralBackbone",
    "T5Backbone",
    "EfficientNetBackbone",
    "ViTBackbone",
    "CLIPBackbone",
    "WhisperBackbone",
)

ROUNDING = (
    "63 convolutions in a row amplify rounding: a change of the kernels in their last bit alone "
    "moves the outputs by 3e-5 of the largest (on PyTorch), merging by 4e-5"
)
DEAD = (
    "the ReLUs of one residual block pass nothing on with these random weights: without adapters "
    "too, kernels of this block half as large again change nothing (TensorFlow) or 3e-4 of the "
    "largest output (PyTorch)"
)
# (class, backend or None for all) -> check -> why it does not pass; "all" where none can be run.
KNOWN = {
    ("SAM3PromptableConceptBackbone", "torch"): {
        "all": "on torch KerasHub 0.32 calls `torchvision.ops.roi_align`, and torchvision is not "
        "among the pinned packages"
    },
    ("StableDiffusion3Backbone", "tensorflow"): {
        "all": "on TensorFlow KerasHub 0.32's `FlowMatchEulerDiscreteScheduler` branches on a "
        "value that is unknown in a compiled function, without adapters too"
    },
    ("BASNetBackbone", "jax"): {"merges": ROUNDING},
    ("BASNetBackbone", "tensorflow"): {"every path": DEAD, "trains": DEAD, "merges": ROUNDING},
    ("BASNetBackbone", "torch"): {"every path": DEAD, "merges": ROUNDING},
}

# Enough of a change for every path: the smallest effects are those of attention scores.
MOVES = 1e-6


def concrete_classes():
    """Returns the names of each backbone class that KerasHub exports and that can be made."""
    abstract = (keras_hub.models.Backbone, keras_hub.models.FeaturePyramidBackbone)
    found = {}
    for name, exported in vars(keras_hub.models).items():
        if name.endswith("Backbone") and exported not in abstract:
            found.setdefault(exported, []).append(name)
    return found


class Flat(keras.Model):
    """A model around a backbone: all its real outputs side by side, one row a sample."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def call(self, inputs, training=None):
        # Without it, the `training=True` of a `Resizing` reaches the layers behind it.
        outputs = keras.tree.flatten(self.backbone(inputs, training=training))
        real = [x for x in outputs if "float" in keras.backend.standardize_dtype(x.dtype)]
        rows = ops.shape(keras.tree.flatten(inputs)[0])[0]
        batched = [x for x in real if x.shape[0] != 1]
        return ops.concatenate([ops.reshape(x, (rows, -1)) for x in batched], axis=-1)

    def predicted(self, inputs):
        """Returns the outputs.

        While a layer is unbuilt, Keras on JAX runs the whole model eagerly before each
        `predict_on_batch`, which takes up to 40 times as long. Most are built by a symbolic call;
        what is unbuilt after that, as some of KerasHub's layers, has nothing to build.
        """
        if keras.backend.backend() == "jax" and not self.built:
            called = inputs
            # KerasHub's StableDiffusion3 fails a symbolic call on JAX.
            if not isinstance(self.backbone, keras_hub.models.StableDiffusion3Backbone):
                called = keras.tree.map_structure(_symbolic, inputs)
            self(called)
            for layer in self._flatten_layers():
                layer.built = True
        return self.predict_on_batch(inputs)


def _symbolic(array):
    return keras.KerasTensor(array.shape, array.dtype)


def make(case):
    """Returns a backbone of a case, in which no trainable weight is zero or at a special value."""
    keras.utils.set_random_seed(1)
    backbone = case.make()
    rng = np.random.default_rng(3)
    for variable in backbone.trainable_variables:
        # With the initial values, what keeps signals as large from layer to layer.
        scale = min(0.2, 1.0 / np.sqrt(np.prod(variable.shape[:-1])))
        noise = rng.normal(scale=scale, size=variable.shape).astype("float32")
        variable.assign(ops.convert_to_numpy(variable) + noise)
    return backbone


def adapted_layers(model):
    return [layer for layer in model._flatten_layers() if is_adapted(layer)]


def places(model):
    """Returns where the adapted layers stand among all, free of automatic names."""
    return tuple(at for at, layer in enumerate(model._flatten_layers()) if is_adapted(layer))


def factors(model):
    return [v for layer in adapted_layers(model) for v in layer.adapter_variables().values()]


def set_factors(model, seed=11):
    """Makes every A and B non-zero, at sizes at which s A B changes x W by about half."""
    rng = np.random.default_rng(seed)
    for layer in adapted_layers(model):
        for name, variable in layer.adapter_variables().items():
            fan_in = np.prod(variable.shape[:-1]) if name.endswith("_a") else 4
            value = rng.normal(scale=fan_in**-0.5, size=variable.shape)
            variable.assign(value.astype("float32"))


def check_variables(model, report):
    """No variable twice, none missing: what trains is A and B of every reported path."""
    for variables in (model.weights, model.trainable_variables):
        ids = [id(variable) for variable in variables]
        assert len(ids) == len(set(ids)), "a variable is listed twice"
    expected = factors(model)
    assert len(expected) >= 2 * len(report.adapted) > 0
    found = {id(variable) for variable in model.trainable_variables}
    assert found == {id(variable) for variable in expected}, "what trains is not what was adapted"
    paths = [layer.path for layer in report.adapted]
    assert len(adapted_layers(model)) == len(paths), "a layer is reported twice or not at all"
    unlisted = handwritten(model) - {path for path, _ in report.skipped} - set(paths)
    assert not unlisted, f"hold matrices and are not reported: {unlisted}"


def handwritten(model):
    """Returns the paths of layers that are of no adaptable type and hold a kernel themselves."""
    known = (keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding)
    convolutions = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
    tables = re.compile("bias|embed|pos|token|gamma|beta|moving")
    return {
        layer.path
        for layer in model._flatten_layers()
        if not isinstance(layer, known + convolutions)
        and any(
            sum(size > 1 for size in variable.shape) >= 2 and not tables.search(variable.name)
            for variable in layer._trainable_variables + layer._non_trainable_variables
        )
    }


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run found: a finding a check, the places of adapted layers, and the report's list.

    A finding is None for a check that passed, and what went wrong elsewhere.
    """

    findings: dict
    adapted: tuple
    skipped: tuple

    @property
    def failures(self):
        return {name: finding for name, finding in self.findings.items() if finding}


class Run:
    """The checks of one backbone with one set of targets.

    One model is enabled, perturbed, saved and merged; its twin is trained, then loads the adapter.
    The order of the checks is that of `CHECKS`, in which each compiled function serves the most.
    """

    def __init__(self, case, targets, before):
        self.case, self.targets, self.before = case, targets, before
        self.inputs = case.inputs()
        self.adapted, self.skipped = (), ()

    def enable(self):
        model = Flat(make(self.case))
        return model, klp.enable_lora_plus(model.backbone, rank=2, targets=self.targets)

    def enables(self):
        self.model, report = self.enable()
        self.twin, _ = self.enable()
        self.adapted, self.skipped = places(self.model.backbone), report.skipped
        check_variables(self.model.backbone, report)

    def unchanged(self):
        assert np.isfinite(self.before).all(), "the outputs of the backbone are not finite"
        assert_close(self.model.predicted(self.inputs), self.before, FLOAT32_MODEL)

    def every_path(self):
        set_factors(self.model)
        self.outputs = self.model.predicted(self.inputs)
        assert relative_error(self.outputs, self.before) > 1e-3
        lost = []
        for layer in adapted_layers(self.model):
            value = ops.convert_to_numpy(layer.lora_scaling)
            layer.lora_scaling.assign(0.0 * value)
            if relative_error(self.model.predicted(self.inputs), self.outputs) < MOVES:
                lost.append(layer.path)
            layer.lora_scaling.assign(value)
        assert not lost, f"A and B do not reach the output: {lost}"

    def trains(self):
        model = self.twin
        goal = np.random.default_rng(5).normal(size=self.before.shape).astype("float32")
        still = [v for v in model.weights if not v.trainable and "seed" not in v.path]
        frozen, moving = snapshot(still), snapshot(factors(model))
        # KerasHub's StableDiffusion3 must not have `fit` as its first call: without adapters too it
        # then gives non-finite outputs on torch, and on JAX it fails these checks.
        model.predicted(self.inputs)
        # A rate at which the first step leaves ReLUs and sigmoids alive for the second.
        model.compile(klp.LoRAPlusAdamW(1e-4, weight_decay=0.0), loss=sum_of_squares)
        model.fit(self.inputs, goal, epochs=2, verbose=0)
        changed = paths_of(still, frozen, equal=False)
        assert not changed, f"frozen, and changed by training: {changed}"
        stuck = paths_of(factors(model), moving, equal=True)
        assert not stuck, f"not moved by two steps: {stuck}"
        broken = [v.path for v in factors(model) if not np.isfinite(ops.convert_to_numpy(v)).all()]
        assert not broken, f"not finite after two steps: {broken}"

    def saves_and_loads(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "adapter.safetensors")
            klp.save_adapter(self.model.backbone, path)
            klp.load_adapter(self.twin.backbone, path)
        for mine, theirs in zip(factors(self.model), factors(self.twin), strict=True):
            np.testing.assert_array_equal(*snapshot([mine, theirs]))
        assert_close(self.twin.predicted(self.inputs), self.outputs, FLOAT32_MODEL)

    def merges(self):
        klp.merge_lora_plus(self.model.backbone)
        assert adapted_layers(self.model) == []
        self.model.predict_function = None
        assert_close(self.model.predicted(self.inputs), self.outputs, FLOAT32_MODEL)
        assert not any("lora_" in v.name for v in self.model.weights)


def sum_of_squares(goal, outputs):
    """Not the mean, whose gradients come near Adam's epsilon in the deepest backbones."""
    return ops.sum(ops.square(goal - outputs), axis=-1)


def paths_of(variables, values, equal):
    """Returns the paths of variables that are, or are not, equal to earlier values."""
    return [
        variable.path
        for variable, value in zip(variables, values, strict=True)
        if np.array_equal(ops.convert_to_numpy(variable), value) == equal
    ]


def run_checks(case):
    """Runs all checks, with the default targets and with `"all-linear"`.

    Args:
        case: A `Case`.

    Returns:
        Dict from targets to `Result`. Where both mean the same layers, one run stands for both.
    """
    before = Flat(make(case)).predicted(case.inputs())
    everything = _run(case, "all-linear", before)
    if everything.adapted and everything.adapted == _default_places(case):
        return {None: everything, "all-linear": everything}
    return {None: _run(case, None, before), "all-linear": everything}


def _default_places(case):
    backbone = make(case)
    try:
        klp.enable_lora_plus(backbone, rank=2)
    except ValueError:
        return None
    return places(backbone)


def _run(case, targets, before):
    run, findings = Run(case, targets, before), {}
    for name in CHECKS:
        try:
            getattr(run, name.replace(" ", "_"))()
            findings[name] = None
        except Exception as error:  # whatever it is goes into the table
            findings[name] = f"{type(error).__name__}: {error}"
            if name == "enables":
                findings.update(dict.fromkeys(CHECKS[1:], "not run: enabling failed"))
                break
    return Result(findings, run.adapted, run.skipped)
