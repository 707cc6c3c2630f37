"""What a command-line program owes its user: one clear line and a quiet start."""

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile

BACKENDS = ("tensorflow", "jax", "torch")


class InputError(Exception):
    """Something the user gave is wrong; the message says what and how to put it right."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage text."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


def one_line(error):
    """Returns an exception's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def run(main, arguments=None):
    """Runs a program; wrong input ends it with one line on stderr and exit code 2."""
    try:
        main(arguments)
    except InputError as error:
        program = os.path.basename(sys.argv[0])
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def choose_backend(name):
    """Selects Keras's backend. To be called before the first import of keras.

    Args:
        name: `"tensorflow"`, `"jax"`, `"torch"`, or None for `KERAS_BACKEND` or Keras's default.
    """
    name = name or os.environ.get("KERAS_BACKEND")
    if name is not None:
        if name not in BACKENDS:
            raise InputError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"backend {name!r} is not installed: `pip install keras-loraplus[{name}]`"
            )
        os.environ["KERAS_BACKEND"] = name
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def quiet_stderr():
    """Hides what native libraries print while they load; shows it if something fails.

    TensorFlow writes some of its start-up lines before it reads `TF_CPP_MIN_LOG_LEVEL`.
    """
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        except InputError:
            raise
        except BaseException:
            captured.seek(0)
            os.write(original, captured.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)


def integer(minimum):
    """Returns an argparse type for whole numbers from `minimum` on."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {minimum}, got {text!r}")
        return value

    return parse


def positive(text):
    """An argparse type for positive, finite numbers."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value
