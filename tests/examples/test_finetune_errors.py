"""Wrong input to the demo: one clear line on stderr, exit code 2, no traceback."""

import pytest

SCRIPT = "finetune_text_classifier.py"


def check(finished, *words):
    assert finished.returncode == 2, finished.stderr
    lines = finished.stderr.strip().splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith(f"{SCRIPT}: error: ")
    for word in words:
        assert str(word) in lines[0], lines[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--backend", "mxnet"], ["mxnet", "tensorflow, jax, torch"]),
        (["--data", "no/such.csv"], ["no/such.csv", "no such file"]),
        (["--data", "texts.xlsx"], ["texts.xlsx", ".csv, .tsv"]),
        (["--test-data", "x.csv"], ["--data"]),
        (["--preset", "./no/such/folder"], ["--preset ./no/such/folder", "no such folder"]),
        (["--adapter", "no.safetensors"], ["--adapter no.safetensors", "no such file"]),
        (["--method", "qlora"], ["qlora", "loraplus"]),
        (["--method", "lora", "--lr-ratio", "4"], ["--lr-ratio", "one rate"]),
        (["--quantize", "int2"], ["int2", "int8", "int4"]),
        (["--quantize", "int8", "--method", "full"], ["--quantize", "loraplus or lora"]),
        (["--quantize", "int8", "--dtype", "mixed_float16"], ["--dtype", "float16"]),
        (["--rank", "0"], ["--rank", "'0'"]),
        (["--rank", "eight"], ["--rank", "'eight'"]),
        (["--learning-rate", "nan"], ["--learning-rate", "'nan'"]),
        (["--epochs", "-1"], ["--epochs", "'-1'"]),
        (["--no-such-option"], ["--no-such-option"]),
    ],
)
def test_wrong_arguments(run_example, arguments, words):
    check(run_example(SCRIPT, *arguments), *words)


def test_wrong_backend_in_the_environment(run_example):
    check(run_example(SCRIPT, KERAS_BACKEND="theano"), "theano", "jax")


def test_wrong_column_names_the_columns(run_example, table, tmp_path):
    finished = run_example(SCRIPT, "--data", table, "--preset", folder_with_config(tmp_path))
    check(finished, "no column 'text'", "'id', 'body', 'topic'", "--text-column")


@pytest.mark.parametrize(
    "content, word",
    [
        ("text,label\n", "no rows"),
        ("text,label\nhello,a\nworld,\n", "row 2"),
        ("text,label\nhello,a\nworld,a\n", "two different labels"),
        ("text,label\nhello,a\nworld,b\n", "too few"),
        (b"text,label\n\xff\xfe,a\n", "cannot be read"),
    ],
)
def test_wrong_tables(run_example, tmp_path, content, word):
    path = tmp_path / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    finished = run_example(SCRIPT, "--data", path, "--preset", folder_with_config(tmp_path))
    check(finished, path, word)


def test_unknown_preset_name(run_example, table):
    columns = ["--text-column", "body", "--label-column", "topic"]
    finished = run_example(SCRIPT, "--data", table, *columns, "--preset", "bert_of_nowhere")
    check(finished, "bert_of_nowhere", "preset")


def folder_with_config(tmp_path):
    """A preset that passes the first look; reading the table comes before loading it."""
    folder = tmp_path / "preset"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder
