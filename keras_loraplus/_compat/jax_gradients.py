"""JAX: a matrix whose gradient is formed as its mirror."""

import functools


def with_mirrored_gradient(matrix):
    """Returns the matrix itself, whose gradient passes a barrier as its transpose.

    XLA (jax 0.10.2) folds any transpose into the product before it, and so forms `(g^T x)^T` as
    `x^T g`, whichever of the two is the faster one; the barrier between the product and the
    transpose keeps the mirror. So arranged it can be differentiated in both modes and mapped,
    unlike a custom gradient, and values are not touched.
    """
    return _identity()(matrix)


@functools.cache
def _identity():
    import jax

    @jax.custom_jvp
    def identity(x):
        return x

    @identity.defjvp
    def tangent(primals, tangents):
        (x,), (t,) = primals, tangents
        return x, jax.lax.optimization_barrier(t.T).T

    return identity
