"""`python -m keras_loraplus inspect PATH` shows what an adapter file holds."""

import argparse
import sys


def main(arguments=None):
    """Runs the command line.

    Args:
        arguments: List of arguments; None for those of the process.

    Returns:
        The exit code: 0, or 2 with one line on standard error.
    """
    parser = argparse.ArgumentParser(prog="python -m keras_loraplus", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="show what an adapter file holds")
    command.add_argument("path", help="a file of keras_loraplus.save_adapter")
    options = parser.parse_args(arguments)
    from keras_loraplus.adapters import inspect_adapter

    try:
        print(inspect_adapter(options.path))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
