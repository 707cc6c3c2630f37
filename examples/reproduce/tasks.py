"""Reads a task: R8 from its package, others from folders that the user names."""

from text_classification import data
from text_classification.console import InputError


def load(name, folder, **limits):
    """Returns a `keras_loraplus.tuning.text.Task`. Choose the backend before.

    Args:
        name: `"r8"`, which comes from a package, or any other name.
        folder: A folder as of `keras_loraplus.tuning.text.read_task`. Not used for `"r8"`.
        limits: `train_texts`, `validation_texts` and `test_texts`: how many at most, 0 for all.
    """
    from keras_loraplus.tuning import text

    try:
        if name != "r8":
            return text.read_task(folder, name, **limits)
        texts = data.load_reuters()
        parts = {"train": texts.train, "test": texts.test}
        parts = {key: text.Part(part.texts, None, part.labels) for key, part in parts.items()}
        return text.make_task(name, texts.classes, parts, **limits)
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from error
