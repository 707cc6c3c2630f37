"""What is measured: each case gives arms, functions that build something and return its step.

Keras is imported here with the backend that the worker's environment names.
"""

import functools

from benchmarks import monitoring
from benchmarks.checkpointing import checkpointing
from benchmarks.dense_cases import VARIED, dense_stack, growth
from benchmarks.einsum_cases import EQUATIONS, einsum
from benchmarks.models import MODELS, TINY
from benchmarks.names import EINSUM_CASES, GROWTH, TENSORS
from benchmarks.optimizer_cases import optimizer_step, optimizer_table


def _arms_of(make):
    return make().arms()


CASES = {
    **{name: functools.partial(_arms_of, make) for name, make in {**MODELS, **TINY}.items()},
    "dense_stack": dense_stack,
    **{f"einsum_{kind}": functools.partial(einsum, kind) for kind in EQUATIONS},
    "optimizer_step": optimizer_step,
    **{f"optimizer_{count}": functools.partial(optimizer_table, count) for count in TENSORS},
    **{f"growth_{what}": functools.partial(growth, what) for what in VARIED},
    "checkpointing": checkpointing,
    "monitor": monitoring.arms,
}
assert tuple(VARIED) == GROWTH
assert set(EINSUM_CASES) <= set(CASES)
