"""The LoRA+ optimizer: AdamW with one learning rate for each side of an adapter."""

from typing import TYPE_CHECKING, Any

import keras

from keras_loraplus.optimizers.factory import bases_of, remember

if TYPE_CHECKING:
    from keras_loraplus.optimizers.mixin import LoRAPlusMixin as _Base
else:
    # Only known at run time: torch has an AdamW class of its own.
    _Base = type("_LoRAPlusAdamWBase", bases_of("AdamW"), {})


@keras.saving.register_keras_serializable(package="keras_loraplus")
class LoRAPlusAdamW(_Base):
    """AdamW that trains the B matrices of low-rank adapters faster than the A matrices.

    For the variable with multiplier k, gradient g and the optimizer's learning rate lr:

    ```
    w <- w - k * lr * weight_decay * w
    m <- beta_1 * m + (1 - beta_1) * g
    v <- beta_2 * v + (1 - beta_2) * g^2
    w <- w - k * lr * sqrt(1 - beta_2^t) / (1 - beta_1^t) * m / (sqrt(v) + epsilon)
    ```

    The multiplier is decided once, when the optimizer is built, by the last component of the
    variable's path:

    | variable | multiplier |
    |---|---|
    | `lora_kernel_a` | 1 |
    | `lora_kernel_b` | `lr_ratio` |
    | `lora_embeddings_a` | `embedding_lr_multiplier` |
    | `lora_embeddings_b` | `lr_ratio * embedding_lr_multiplier` |
    | any other | 1 |

    times the factor of the key in `lr_multipliers` that matches the path, if any. The ratio scales
    the step and never the gradient, which Adam would normalise away. There is one `learning_rate`:
    schedules and callbacks act on it and B keeps its ratio. Clipping by `global_clipnorm` is
    over all variables together.

    With `lr_ratio=1` and no `lr_multipliers` it is `keras.optimizers.AdamW`. Moments and steps of
    bfloat16 and float16 variables are computed in float32.

    Args:
        learning_rate: Float, a `keras.optimizers.schedules.LearningRateSchedule`, or a callable:
            the rate of the A matrices. The rate that suits plain LoRA is about right for B, so
            this one is set lower. Defaults to 2e-4 (3.2e-3 for B).
        lr_ratio: Rate of B over the rate of A. The paper recommends 2^3 to 2^5 for A initialised to
            zero, and finds 2^1 to 2^3 best for B initialised to zero. Defaults to 16.
        lr_multipliers: Dictionary of variable path or regular expression -> factor. A key that
            equals a path takes that variable; otherwise keys are matched by `re.fullmatch`. For
            example `{"logits/.*": 8.0}` trains a new head at 8 times `learning_rate`.
        embedding_lr_multiplier: Factor on both sides of adapted embeddings. Defaults to 1.
        weight_decay: Float. Decay per step is `weight_decay` times the variable's own rate, so that
            B decays `lr_ratio` times as fast as A. Defaults to 0.004, as in Keras.
        beta_1: Decay of the first moment. Defaults to 0.9.
        beta_2: Decay of the second moment. Defaults to 0.999.
        epsilon: Added to the square root of the second moment, before bias correction as in
            Keras. Defaults to 1e-7.
        amsgrad: Whether to use the AMSGrad variant. Defaults to False.
        clipnorm: As in `keras.optimizers.AdamW`.
        clipvalue: As in `keras.optimizers.AdamW`.
        global_clipnorm: As in `keras.optimizers.AdamW`.
        use_ema: As in `keras.optimizers.AdamW`.
        ema_momentum: As in `keras.optimizers.AdamW`.
        ema_overwrite_frequency: As in `keras.optimizers.AdamW`.
        loss_scale_factor: As in `keras.optimizers.AdamW`.
        gradient_accumulation_steps: As in `keras.optimizers.AdamW`.
        name: Name of the optimizer.

    Raises:
        ValueError: A factor is not positive and finite, or a key of `lr_multipliers` is not a
            regular expression; in `build`, a key matches no variable or two match one.

    Reference:
        - [LoRA+: Efficient Low Rank Adaptation of Large Models](https://arxiv.org/abs/2402.12354)
        - [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101)

    Example:
    >>> import keras, keras_loraplus as klp
    >>> layer = keras.layers.Dense(8, lora_rank=2, name="layer")
    >>> model = keras.Sequential([keras.Input((16,)), layer])
    >>> model.compile(klp.LoRAPlusAdamW(1e-3, lr_ratio=16.0), loss="mse")
    >>> [(row.role, row.multiplier) for row in klp.assignments(model)]
    [('other', 1.0), ('lora_a', 1.0), ('lora_b', 16.0)]
    """

    def __init__(
        self,
        learning_rate: Any = 2e-4,
        *,
        lr_ratio: float = 16.0,
        lr_multipliers: dict[str, float] | None = None,
        embedding_lr_multiplier: float = 1.0,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate,
            lr_ratio=lr_ratio,
            lr_multipliers=lr_multipliers,
            embedding_lr_multiplier=embedding_lr_multiplier,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            amsgrad=amsgrad,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )


remember(keras.optimizers.AdamW, LoRAPlusAdamW)
