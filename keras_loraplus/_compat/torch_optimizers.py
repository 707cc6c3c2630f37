"""The optimizer's step in torch's list kernels and its fused kernel."""

import functools

import keras
from keras.src.backend.common import global_state  # private: checked on 3.15.1


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


def torch_decay(optimizer, rows):
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
