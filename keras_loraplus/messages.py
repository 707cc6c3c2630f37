"""Says what a user may want to know and need not act on; what needs acting on is a warning."""

import logging

import keras


def note(message):
    """Prints a line where Keras prints its own, and logs it elsewhere.

    `keras.config.disable_interactive_logging()` turns the lines into records of the logger
    `keras_loraplus`, level INFO.

    Args:
        message: The text.
    """
    if keras.config.is_interactive_logging_enabled():
        print(message)
    else:
        logging.getLogger("keras_loraplus").info(message)
