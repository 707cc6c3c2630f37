"""Shows what adapter files hold, and converts them to PEFT folders and back.

python -m keras_loraplus inspect adapter.safetensors
python -m keras_loraplus convert adapter.safetensors peft_folder --checkpoint hf_folder
python -m keras_loraplus convert peft_folder adapter.safetensors --checkpoint hf_folder
"""

import argparse
import os
import sys


def main(arguments=None):
    """Runs the command line.

    Args:
        arguments: List of arguments; None for those of the process.

    Returns:
        The exit code: 0, or 2 with one line on standard error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m keras_loraplus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("inspect", help="show what an adapter file holds")
    command.add_argument("path", help="a file of keras_loraplus.save_adapter")
    command = commands.add_parser("convert", help="between an adapter file and a PEFT folder")
    command.add_argument("source", help="an adapter file of a KerasHub backbone, or a PEFT folder")
    command.add_argument("target", help="what to write: a PEFT folder, or an adapter file")
    command.add_argument(
        "--checkpoint", required=True, help="Hugging Face checkpoint folder of the base model"
    )
    command.add_argument("--base", help="base_model_name_or_path to write; default: --checkpoint")
    command.add_argument("--prefix", help="prefix of module names, as of export_peft")
    options = parser.parse_args(arguments)
    try:
        if options.command == "inspect":
            from keras_loraplus.adapters import inspect_adapter

            print(inspect_adapter(options.path))
        else:
            convert(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def convert(options):
    """Converts by loading the adapter into its base model, so that all of it is checked.

    Raises:
        ValueError: If the source is damaged, does not fit the checkpoint, or cannot be said in the
            other format.
        FileNotFoundError: If the source or the checkpoint does not exist.
    """
    from keras_loraplus import _compat
    from keras_loraplus.adapters import load_adapter, save_adapter
    from keras_loraplus.adapters.peft import export_peft, import_peft
    from keras_loraplus.adapters.peft.checkpoint import read_checkpoint

    if not os.path.exists(options.source):
        raise FileNotFoundError(f"There is no '{options.source}'.")
    # Before the slow part: KerasHub takes the name of a missing folder for that of a preset.
    read_checkpoint(options.checkpoint)
    backbone = _compat.hub_backbone_from(options.checkpoint)
    if os.path.isdir(options.source):
        import_peft(backbone, options.source, checkpoint=options.checkpoint)
        save_adapter(backbone, options.target)
    else:
        load_adapter(backbone, options.source)
        base = options.base or options.checkpoint
        export_peft(
            backbone, options.target, base, checkpoint=options.checkpoint, prefix=options.prefix
        )
    print(f"Written: {options.target}")


if __name__ == "__main__":
    sys.exit(main())
