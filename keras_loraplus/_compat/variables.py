"""A layer's own variables: which it has, which train, in which order they stand."""

import contextlib
import weakref

import keras


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
