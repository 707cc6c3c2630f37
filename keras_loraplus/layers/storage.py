"""What a LoRA+ layer puts into Keras weight files, and takes from them."""

from typing import TYPE_CHECKING, Any

from keras import ops

from keras_loraplus import _compat

if TYPE_CHECKING:
    # The mixin stands in front of a Keras layer and uses its attributes.
    from keras.layers import Layer as _Mixed
else:
    _Mixed = object


class StoredLayer(_Mixed):
    """The part of `LowRankLayer` that saves and loads.

    The frozen layer keeps its usual keys, so that files of the model before it was adapted fit.
    """

    adapter: Any
    adapter_variables: Any
    _plain_names: tuple

    def _plain_variables(self):
        """Returns the layer's variables without the adapter's, in the order from before it."""
        adapter = {id(variable) for variable in self.adapter_variables().values()}
        adapter.add(id(self.lora_scaling))
        own = [v for v in _compat.own_variables(self) if id(v) not in adapter]
        return _compat.in_order_of(own, self._plain_names)

    def save_own_variables(self, store):
        """Stores the frozen layer under its usual keys, and A, B and s under their names."""
        adapters = self.__dict__.get("_lora_plus_adapters")
        if adapters is not None:
            adapters.warn_of_saving(self)
        if not self.built:
            super().save_own_variables(store)
            return
        with _compat.own_variables_as(self, self._plain_variables()):
            super().save_own_variables(store)
        for name, variable in self.adapter_variables().items():
            store[name] = variable
        store["lora_scaling"] = ops.convert_to_numpy(self.adapter.scale)

    def load_own_variables(self, store):
        """Loads the frozen layer, and A and B where the file has them.

        A file of the model before it was adapted holds no factors: it restores the frozen weights
        and leaves A and B as they are.

        Raises:
            ValueError: If some but not all of the factors are there, a shape differs, or the file
                was written at another alpha / rank.
        """
        factors = self.adapter_variables()
        found = [name for name in (*factors, "lora_scaling") if name in store.keys()]
        if found:
            self._check_factors_in(store, factors, found)
        plain = {key: store[key] for key in store.keys() if key not in found}
        with _compat.own_variables_as(self, self._plain_variables()):
            super().load_own_variables(plain)
        for name, variable in factors.items():
            if found:
                variable.assign(store[name])

    def _check_factors_in(self, store, factors, found):
        missing = sorted({*factors, "lora_scaling"} - set(found))
        if missing:
            raise ValueError(
                f"The file holds only a part of the adapter of layer '{self.name}'. "
                f"Missing: {missing}. Found: {found}."
            )
        for name, variable in factors.items():
            if tuple(store[name].shape) != tuple(variable.shape):
                raise ValueError(
                    f"'{name}' of layer '{self.name}' has shape {tuple(variable.shape)} but the "
                    f"file holds {tuple(store[name].shape)}. Enable the adapter with the rank "
                    "that the file was saved with."
                )
        scale = float(ops.convert_to_numpy(store["lora_scaling"][()]))
        if abs(scale - self.adapter.scale) > 1e-6 * abs(self.adapter.scale):
            raise ValueError(
                f"The adapter of layer '{self.name}' was saved with alpha / rank scaling {scale:g} "
                f"but this layer has {self.adapter.scale:g}. Enable it with the alpha and scaling "
                "that the file was saved with."
            )

    def _check_load_own_variables(self, store):
        # Keras compares the number of entries with all variables of the layer; here the entries
        # are those of the frozen layer alone.
        expected = [v.name for v in self._plain_variables()]
        if len(store.keys()) != len(expected):
            raise ValueError(
                f"Layer '{self.name}' expected {len(expected)} frozen variables ({expected}) but "
                f"the file holds {len(store.keys())} for it. Was it saved from another model?"
            )
