"""Trades adapters with Hugging Face PEFT, for models that KerasHub can convert."""

from keras_loraplus.adapters.peft.reading import import_peft
from keras_loraplus.adapters.peft.writing import export_peft

__all__ = ["export_peft", "import_peft"]
