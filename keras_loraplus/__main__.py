r"""Shows what adapter files hold, converts them to PEFT folders and back, and tries learning rates.

python -m keras_loraplus inspect adapter.safetensors
python -m keras_loraplus convert adapter.safetensors peft_folder --checkpoint hf_folder
python -m keras_loraplus convert peft_folder adapter.safetensors --checkpoint hf_folder

The adapter of a task, with its head, needs the task's class and the head's name on both sides:

python -m keras_loraplus convert adapter.safetensors peft_folder --checkpoint hf_folder \
    --task TextClassifier --head classifier=logits --prefix bert. --task-type SEQ_CLS

The learning rates of a text classifier, tried as a file says (examples/sweep_text.toml is one):

python -m keras_loraplus sweep --config FILE
"""

import argparse
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
    command.add_argument("source", help="an adapter file of a KerasHub model, or a PEFT folder")
    command.add_argument("target", help="what to write: a PEFT folder, or an adapter file")
    command.add_argument(
        "--checkpoint", required=True, help="Hugging Face checkpoint folder of the base model"
    )
    command.add_argument("--base", help="base_model_name_or_path to write; default: --checkpoint")
    command.add_argument("--prefix", help="prefix of module names, as of export_peft")
    command.add_argument(
        "--task", help="KerasHub task that the adapter file is of, for example TextClassifier"
    )
    command.add_argument(
        "--head",
        action="append",
        metavar="MODULE=LAYER",
        help="a layer of the task's head and its Hugging Face module, for example "
        "classifier=logits; can be repeated",
    )
    command.add_argument("--task-type", help="PEFT's task type to write, for example SEQ_CLS")
    command = commands.add_parser("sweep", help="try learning rates for a text classifier")
    command.add_argument("--config", required=True, help="TOML file, as examples/sweep_text.toml")
    command.add_argument(
        "--retry-failed", action="store_true", help="try cells again that failed in an earlier run"
    )
    options = parser.parse_args(arguments)
    try:
        if options.command == "inspect":
            from keras_loraplus.adapters import inspect_adapter

            print(inspect_adapter(options.path))
        elif options.command == "sweep":
            from keras_loraplus.tuning.command import run

            run(options.config, retry_failed=options.retry_failed)
        else:
            from keras_loraplus.adapters.conversion import convert

            convert(
                options.source,
                options.target,
                options.checkpoint,
                base=options.base,
                prefix=options.prefix,
                task=options.task,
                heads=options.head or (),
                task_type=options.task_type,
            )
            print(f"Written: {options.target}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
