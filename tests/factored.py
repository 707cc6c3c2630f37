"""Finds values of a kernel's size that a training step forms, by backend.

`formed(function, trained, size)` runs (or traces) the gradient of a scalar function with respect to
`trained` and returns a description of every intermediate value with `size` entries that depends on
`trained`, and of every gradient of that size. The sizes under test are products of primes that
nothing else in the model has.
"""

import keras
import numpy as np


def formed(function, trained, size):
    return {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[keras.backend.backend()](
        function, trained, size
    )


def _jax(function, trained, size):
    import jax

    def loss(values):
        with keras.StatelessScope(state_mapping=list(zip(trained, values, strict=True))):
            return function()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))([v.value for v in trained])
    return _in_jaxpr(jaxpr.jaxpr, set(jaxpr.jaxpr.invars), size)


def _in_jaxpr(jaxpr, tainted, size):
    """Follows which values depend on the inputs; inner jaxprs are entered."""
    found = []
    for equation in jaxpr.eqns:
        if not any(_is_in(v, tainted) for v in equation.invars):
            continue
        for inner in _inner_jaxprs(equation):
            # Inner inputs line up with the last ones of the equation, as in pjit and custom_jvp.
            outer = equation.invars[len(equation.invars) - len(inner.invars) :]
            pairs = zip(inner.invars, outer, strict=True)
            seeds = {i for i, o in pairs if _is_in(o, tainted)}
            found += _in_jaxpr(inner, seeds, size)
        for out in equation.outvars:
            tainted.add(out)
            if int(np.prod(out.aval.shape)) == size:
                found.append(f"{equation.primitive} {out.aval.shape}")
    return found


def _is_in(variable, tainted):
    # Literals are not hashable, and never depend on anything.
    return not hasattr(variable, "val") and variable in tainted


def _inner_jaxprs(equation):
    for value in equation.params.values():
        for part in value if isinstance(value, (list, tuple)) else [value]:
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner


def _tensorflow(function, trained, size):
    import tensorflow as tf

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = function()
        return tape.gradient(loss, [v.value for v in trained])

    graph = step.get_concrete_function().graph
    handles = {id(v.value.handle) for v in trained}
    captured = [inside for outside, inside in graph.captures if id(outside) in handles]
    assert captured, "no trained variable is read"
    tainted = {t.name for t in captured}
    found = []
    for operation in graph.get_operations():
        depends = [t.name in tainted for t in operation.inputs]
        if operation.type != "IdentityN":  # which only ties tensors together, one to one
            depends = [any(depends)] * len(operation.outputs)
        for out, reads in zip(operation.outputs, depends, strict=True):
            if reads:
                tainted.add(out.name)
            if reads and out.shape.rank is not None and out.shape.num_elements() == size:
                found.append(f"{operation.type} {tuple(out.shape)}")
    return found


def _torch(function, trained, size):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    # What is made of frozen tensors alone (a cast, a transposed copy) has nothing of A and B. The
    # tensors are kept, so that no other takes their address.
    kept = [t for t in _torch_leaves() if not t.requires_grad]
    frozen = {t.untyped_storage().data_ptr() for t in kept}
    found = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            read = [t for t in keras.tree.flatten(args) if isinstance(t, torch.Tensor)]
            from_frozen = bool(read) and all(t.untyped_storage().data_ptr() in frozen for t in read)
            # A number of the code's own, such as the mask of a nibble.
            constant = not read or "lift_fresh" in str(func)
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if not isinstance(tensor, torch.Tensor):
                    continue
                kept.append(tensor)
                if from_frozen or (constant and tensor.numel() == 1):
                    frozen.add(tensor.untyped_storage().data_ptr())
                elif tensor.numel() == size:
                    found.append(f"{func} {tuple(tensor.shape)}")
            return out

    with Recorder():
        function().backward()
    for variable in trained:
        variable.value.grad = None
    return found


def _torch_leaves():
    import gc

    import torch

    return [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
