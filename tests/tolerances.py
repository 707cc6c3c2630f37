"""Every tolerance of the suite, each with its reason. Add one when none fits; loosen none in place.

All are relative to the largest absolute entry of the expected array (`close` below), since entries
near zero are differences of larger numbers and carry those numbers' rounding.
"""

import numpy as np

# The same operations in the same order: no rounding to allow for.
EXACT = 0.0

# One float32 rounding step is 6e-8; a few of them in a row, as an elementwise formula has.
FLOAT32 = 1e-6

# Compiled against eager float32 (rule 1): fusion reorders the sums of a contraction.
COMPILED_FLOAT32 = 1e-6

# float32 against a float64 oracle through a whole layer: sums of some hundred products.
FLOAT32_LAYER = 5e-6

# float32 against float32 through a whole network, whose layers amplify the last bits.
FLOAT32_MODEL = 2e-5

# A whole network in KerasHub against the same in transformers: another order of every sum, and in
# Qwen3 another place of the epsilon in the norms of queries and keys.
HUB_AGAINST_TRANSFORMERS = 1e-4

# 20 optimizer steps where a fused kernel takes another order than Keras (rule 3).
FUSED_20_STEPS = 2e-6

# A float32 optimizer against float64 longhand: 1 - 0.999^t in float32 is off by up to 1e-5 of
# itself in the first steps, and so is the step, which is a small part of the weight.
LONGHAND_ADAM = 5e-6

# 50 training steps of two libraries from one start: A and B.
TRAJECTORY_50_STEPS = 1e-5

# A loss on several devices against one: sums over devices in another order.
ONE_DEVICE_LOSS = 1e-5

# One unit in the last place is 2**-8 for bfloat16 and 2**-11 for float16; two roundings.
BFLOAT16 = 2**-7
FLOAT16 = 2**-10

# An int8 kernel has 127 levels a channel; two quantizations of one value may differ by one level.
INT8 = 2e-2


def relative_error(actual, expected):
    """Largest difference of two arrays over the largest absolute entry of `expected`."""
    actual = np.asarray(actual, dtype="float64")
    expected = np.asarray(expected, dtype="float64")
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.isfinite(actual).all(), "not finite"
    scale = np.max(np.abs(expected), initial=0.0)
    return float(np.max(np.abs(actual - expected), initial=0.0) / (scale or 1.0))


def assert_close(actual, expected, tolerance):
    """Fails unless all entries agree within `tolerance`, relative to the largest one."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g}, allowed {tolerance:.3g}"
