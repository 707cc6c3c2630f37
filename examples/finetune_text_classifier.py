"""Fine-tunes a pretrained text encoder with LoRA+ on TensorFlow, JAX or PyTorch.

    python finetune_text_classifier.py
    python finetune_text_classifier.py --backend jax --compare
    python finetune_text_classifier.py --quantize int4 --dtype mixed_bfloat16
    python finetune_text_classifier.py --data mine.csv --text-column body --label-column topic
    python finetune_text_classifier.py --adapter outputs/text_classifier/adapter.safetensors

Without options: MiniLM-L6 on the Reuters R8 topics, both downloaded once from the package index.
The default rates of each method are those that rates.json beside this file selected: a sweep on a
part of the training texts, which klp.tuning.load reads. sweep_text.toml asks for another like it.
"""

import argparse
import json
import pathlib
import textwrap

from text_classification import data, report
from text_classification.console import (
    InputError,
    Parser,
    choose_backend,
    integer,
    one_line,
    positive,
    quiet_stderr,
    run,
)
from text_classification.downloads import MINILM, fetch

RATES = pathlib.Path(__file__).with_name("rates.json")
VALIDATION = 0.1
DTYPES = ("float32", "mixed_bfloat16", "mixed_float16", "bfloat16")


def parse(arguments):
    parser = Parser(
        description=textwrap.dedent(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--method", choices=("loraplus", "lora", "full"), default="loraplus")
    add("--compare", action="store_true", help="train tuned plain LoRA too (LoRA+ for lora)")
    add("--backend", help="tensorflow, jax or torch; default: KERAS_BACKEND, or Keras's own choice")
    add("--preset", help="a KerasHub preset, a kaggle:// or hf:// handle, or a folder")
    add("--data", help="a .csv or .tsv file with a header line, in place of Reuters R8")
    add("--test-data", help="the same for the test; default: a fifth of --data is held out")
    add("--text-column", default="text")
    add("--label-column", default="label")
    add("--dtype", choices=DTYPES, default="float32", help="a Keras dtype policy; default: float32")
    add("--quantize", choices=("int8", "int4"), help="keep the frozen weights so (QLoRA+)")
    add("--rank", type=integer(1), help="default: 8; with --adapter: the file's")
    add("--learning-rate", type=positive, help="of A, at the start; it falls linearly to zero")
    add("--lr-ratio", type=positive, help="rate of B over the rate of A (loraplus)")
    add("--head-multiplier", type=positive, help="rate of the new head over the learning rate")
    add("--epochs", type=integer(0), help="default: 2; with --adapter: 0")
    add("--batch-size", type=integer(1), default=32)
    add("--sequence-length", type=integer(8), default=64, help="longer texts are cut")
    add("--limit", type=integer(1), help="use only so many texts to train and to test on")
    add("--seed", type=integer(0), default=0)
    add("--adapter", help="start from a saved adapter; only evaluates it unless --epochs is given")
    add("--export-peft", metavar="DIR", help="write the adapter as a Hugging Face PEFT folder too")
    add("--output", help="folder for what is written; default: one under outputs/")
    add("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    if options.method != "loraplus" and options.lr_ratio is not None:
        raise InputError(f"--lr-ratio is for --method loraplus; {options.method} has one rate")
    if options.adapter is not None:
        if options.method == "full" or options.compare:
            raise InputError("--adapter goes with one method, loraplus or lora")
        if options.rank is not None:
            raise InputError("--rank goes without --adapter, whose file holds the rank")
        if not pathlib.Path(options.adapter).is_file():
            raise InputError(f"--adapter {options.adapter}: no such file")
    if options.quantize is not None and options.method == "full":
        raise InputError("--quantize goes with --method loraplus or lora")
    if options.quantize == "int8" and options.dtype == "mixed_float16":
        raise InputError("--quantize int8 goes with another --dtype: Keras has no int8 for float16")
    if options.export_peft is not None and options.method == "full":
        raise InputError("--export-peft goes with --method loraplus or lora")
    if options.test_data is not None and options.data is None:
        raise InputError("--test-data goes with --data")
    if options.epochs is None:
        options.epochs = 0 if options.adapter else 2
    options.rank = options.rank or 8
    if options.output is None:
        options.output = "outputs/from_adapter" if options.adapter else "outputs/text_classifier"
    return options


def methods_of(options):
    if not options.compare:
        return [options.method]
    return [options.method, "loraplus" if options.method == "lora" else "lora"]


def load_data(options):
    if options.data is None:
        dataset = data.load_reuters()
    else:
        columns = (options.text_column, options.label_column)
        dataset = data.load_files(options.data, options.test_data, *columns, options.seed)
    rows, held_out = data.split(dataset.train.labels, VALIDATION, options.seed)
    train, validation = dataset.train.take(rows), dataset.train.take(held_out)
    if not len(validation):
        train = validation = dataset.train
    test = dataset.test
    if options.limit is not None:
        train = train.take(range(min(options.limit, len(train))))
        validation = validation.take(range(min(options.limit, len(validation))))
        test = test.take(range(min(options.limit, len(test))))
    return dataset, train, validation, test


def find_preset(name):
    """Returns a folder or a preset name; wrong folders are told before anything slow happens."""
    if name is None:
        return str(fetch(MINILM))
    path = pathlib.Path(name)
    if path.exists():
        if not (path / "config.json").is_file():
            raise InputError(f"--preset {name}: expected a folder with a config.json")
    elif path.is_absolute() or name.startswith("."):
        raise InputError(f"--preset {name}: no such folder")
    return name


def make_output_folder(name):
    try:
        folder = pathlib.Path(name)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {name}: cannot be created: {one_line(error)}") from error
    return folder


def rates_for(method, options):
    """Returns the rates chosen for a method; options replace those of the method asked for."""
    # Read without the library, which would load Keras.
    cell = json.loads(RATES.read_text(encoding="utf-8"))["selected"][method]
    rates = {"learning_rate": cell["eta_a"], "lr_ratio": cell["lr_ratio"]}
    # The file rounds no rate, but a quotient of two may end in ...999.
    rates["head_multiplier"] = round(cell["head_rate"] / cell["eta_a"], 9)
    if method == options.method:
        for name in ("learning_rate", "lr_ratio", "head_multiplier"):
            if getattr(options, name) is not None:
                rates[name] = getattr(options, name)
    return rates


def main(arguments=None):
    options = parse(arguments)
    choose_backend(options.backend)
    preset = find_preset(options.preset)
    if options.export_peft is not None:
        check_exportable(preset)
    dataset, *parts = load_data(options)
    output = make_output_folder(options.output)
    with quiet_stderr():
        import keras

        from text_classification import training

        inputs = [training.tokenize(preset, part.texts, options.sequence_length) for part in parts]
    print(dataset)
    print(f"Keras {keras.__version__} on {keras.backend.backend()}, preset {preset}\n")
    train, validation, test = ((x, part.labels) for x, part in zip(inputs, parts, strict=True))

    results = []
    for method in methods_of(options):
        results.append(
            finetune(method, options, preset, dataset.classes, train, validation, test, output)
        )
    print(f"\n{report.results_table(results)}")
    setup = {**vars(options), "preset": preset, "backend": keras.backend.backend()}
    content = {"setup": setup, "classes": dataset.classes, "results": results}
    report.write_json(content, output / "results.json")
    if options.epochs:
        report.plot_curves(results, output / "curves.png", f"{dataset.name}, rank {options.rank}")
    print(f"\nWritten to {output}: {', '.join(sorted(p.name for p in output.iterdir()))}")


def finetune(method, options, preset, classes, train, validation, test, output):
    """Trains one method from the same start as every other; returns its results."""
    import keras
    import numpy as np

    import keras_loraplus as klp
    from text_classification import training

    keras.utils.set_random_seed(options.seed)
    model = training.build_classifier(preset, len(classes), options.dtype)
    print(f"== {report.NAMES[method]} ==")
    if options.quantize is not None:
        training.quantize(model, options.quantize)
    if options.adapter is not None:
        try:
            klp.load_adapter(model, options.adapter)
        except (ValueError, OSError) as error:
            raise InputError(f"--adapter {options.adapter}: {one_line(error)}") from error
    elif method != "full":
        print(klp.enable_lora_plus(model, rank=options.rank, init=method), "\n")
    rates = rates_for(method, options)
    steps = training.steps_in(len(train[1]), options.batch_size, options.epochs)
    training.compile_classifier(
        model, training.make_optimizer(model, training.Rates(**rates), steps)
    )
    trainable = training.count(model.trainable_variables)
    if method == "full":
        print(f"trainable parameters: {trainable:,} (all)")
    else:
        print(klp.assignments(model))
    if options.epochs:
        curves = training.train(
            model,
            *train,
            validation=validation,
            batch_size=options.batch_size,
            epochs=options.epochs,
            verbose=0 if options.quiet else 1,
        )
    else:
        curves = {"seconds": 0.0, "loss": [], "accuracy": []}
    loss, accuracy = training.evaluate(model, *test, options.batch_size)
    print(f"test accuracy {accuracy:.2%}, loss {loss:.4f}, {curves['seconds']:.0f} s of training")

    result = {
        "method": method,
        "rates": rates,
        "trainable_parameters": trainable,
        "total_parameters": training.count(model.weights),
        "test_accuracy": accuracy,
        "test_loss": loss,
        "curves": curves,
    }
    suffix = "" if method == options.method else f"-{method}"
    if method == "full":
        training.save_plain(
            model, preset, len(classes), output / f"model{suffix}.keras", options.dtype
        )
        return result
    klp.save_adapter(model, output / f"adapter{suffix}.safetensors")
    if options.export_peft is not None and method == options.method:
        export(model, options.export_peft, preset)
    sample = {name: value[:64] for name, value in test[0].items()}
    before = model.predict(sample, verbose=0)
    # From here on a plain Keras model: it loads where keras_loraplus is not installed. Quantized
    # layers that were adapted become float, so that no rounding takes back what they learned.
    klp.merge_lora_plus(model, dequantize=options.quantize is not None)
    after = model.predict(sample, verbose=0)
    training.save_plain(
        model,
        preset,
        len(classes),
        output / f"merged{suffix}.keras",
        options.dtype,
        options.quantize,
    )
    difference = float(np.max(np.abs(after - before)) / np.max(np.abs(before)))
    result["merged_relative_difference"] = difference
    print(f"merged: outputs differ by {difference:.1e} of the largest logit")
    return result


def check_exportable(preset):
    """Tells before the training what would fail after it."""
    folder = pathlib.Path(preset)
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise InputError("--export-peft needs a --preset that is a Hugging Face checkpoint folder")


def export(model, folder, preset):
    """Writes the adapter and the head for Hugging Face's BertForSequenceClassification."""
    import keras_loraplus as klp

    try:
        klp.export_peft(
            model,
            folder,
            str(preset),
            prefix="bert.",
            modules_to_save={"classifier": "logits"},
            task_type="SEQ_CLS",
        )
    except (ValueError, OSError) as error:
        raise InputError(f"--export-peft {folder}: {one_line(error)}") from error
    print(f"PEFT folder for BertForSequenceClassification: {folder}")


if __name__ == "__main__":
    run(main)
