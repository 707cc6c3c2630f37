"""The suite's parts on tiny models, its arithmetic and its pages; `make bench` runs the others."""

import argparse
import importlib.metadata
import io
import json

import keras
import numpy as np
import pytest

import benchmarks.__main__ as suite
import benchmarks.child as benchmarks_child
from benchmarks import dense_cases, parts, readme, report, resident, rounds, worker
from benchmarks.cases import CASES
from benchmarks.einsum_cases import EQUATIONS, einsum
from benchmarks.models import TINY
from benchmarks.names import BACKENDS, MEMORY_CASES
from benchmarks.optimizer_cases import Tensors
from benchmarks.rounds import Times
from keras_loraplus import _compat
from keras_loraplus.layers.einsum_split import split_einsum

OPTIONS = {"blocks": 2, "dtype": None, "cases": None, "arms": ()}


@pytest.mark.parametrize("name", ["tiny_bert_qv", "tiny_resnet"])
def test_ours_and_native_train_the_same_kind_of_variables(name):
    """Native LoRA with the same trained matrices has no bias of an adapted layer among them."""
    arms = TINY[name]().arms()
    trained = {}
    for arm in ("ours", "native_same", "limit"):
        step = arms[arm]()
        losses = [float(np.ravel(step())[0]) for _ in range(3)]
        assert np.isfinite(losses).all() and losses[-1] < losses[0]
        trained[arm] = step.model.trainable_variables
    names = {arm: {v.name for v in variables} for arm, variables in trained.items()}
    # A task's head trains beside the one small variable.
    assert not any("lora" in name for name in names["limit"])
    adapters = {"lora_kernel_a", "lora_kernel_b", "lora_embeddings_a", "lora_embeddings_b"}
    assert names["ours"] & adapters == names["native_same"] & adapters
    assert len(trained["ours"]) == len(trained["native_same"])


@pytest.mark.parametrize("name", ["tiny_bert_qv", "tiny_resnet"])
def test_as_many_steps_as_wished_are_timed_inside_of_fit(name):
    step = TINY[name]().arms()["ours"]()
    before = float(np.ravel(step())[0])
    for number in (1, 4):
        taken = step.seconds(number)
        assert len(taken) == number and min(taken) > 0
    assert int(step.model.optimizer.iterations) == 6
    assert float(np.ravel(step())[0]) < before


@pytest.mark.parametrize("kind", EQUATIONS)
def test_projections_to_heads_and_back_train(kind):
    sizes = {"width": 8, "heads": 2, "batch": 2, "tokens": 5, "pairs": 1}
    for arm, make in einsum(kind, sizes).items():
        step = make()
        losses = [float(np.ravel(step())[0]) for _ in range(3)]
        assert losses[-1] < losses[0]
        names = {variable.name for variable in step.model.trainable_variables}
        factors = {"lora_kernel_a", "lora_kernel_b"}
        assert names == ({"bias"} if arm == "limit" else factors)
    is_matmul = [split_einsum(equation).is_matmul for equation in EQUATIONS[kind]]
    assert is_matmul == [kind == "flat"] * 2


def test_a_case_is_measured_in_turn_in_sets_of_processes_of_its_own(backend, monkeypatch):
    started = []

    class Counted(rounds.Worker):
        def __init__(self, *arguments):
            started.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(rounds, "Worker", Counted)
    times = rounds.measure("tiny_resnet", [backend], 2, arms=("ours", "limit"), sets=2)
    assert len(started) == 2
    assert set(times.seconds) == {(backend, "ours"), (backend, "limit")}
    assert all(len(values) == 2 and min(values) > 0 for values in times.seconds.values())


def test_memory_and_first_steps_are_measured_in_a_fresh_process(backend):
    found = parts.child(backend, None, "memory", "tiny_resnet", "ours")
    assert found["total"] > 0
    assert found["method"] == ("buffers" if backend == "jax" else "resident")
    with pytest.raises(SystemExit, match="no_such_arm"):
        parts.child(backend, None, "memory", "tiny_resnet", "no_such_arm")


def test_the_optimizer_has_as_many_multipliers_as_it_says():
    some = Tensors(96, 48)
    assert len({some.multiplier(position) for position in range(96)}) == 48
    assert len({Tensors(96, 2).multiplier(position) for position in range(96)}) == 2
    assert {Tensors(96, 1).multiplier(position) for position in range(96)} == {1.0}
    step = Tensors(8, 4).ours()
    step()
    assert set(parts.EXPECTED_GROWTH) == {"width", "tokens", "rank", "layers"}


def test_what_an_adapter_adds_is_over_layers_with_its_frozen_product(monkeypatch):
    sizes = {"width": 8, "tokens": 4, "layers": 2, "rank": 1}
    products, losses = [], {}
    plain = _compat.matmul_of_frozen
    monkeypatch.setattr(
        _compat, "matmul_of_frozen", lambda *given: products.append(given) or plain(*given)
    )
    for layer in (keras.layers.Dense, dense_cases.FrozenDense):
        step = dense_cases.dense_training(dense_cases.limit, layer=layer, **sizes)
        assert not products
        losses[layer] = [float(np.ravel(step())[0]) for _ in range(3)]
    assert products and len(set(losses[keras.layers.Dense])) == 3
    np.testing.assert_allclose(*losses.values(), rtol=1e-6)
    arms = dense_cases.growth("layers")
    assert {arm.partition("/")[0]: made.keywords["layer"] for arm, made in arms.items()} == {
        "ours": keras.layers.Dense,
        "limit": dense_cases.FrozenDense,
    }


def test_the_fitted_exponent_is_that_of_the_larger_sizes():
    # A constant hides the growth at small sizes.
    added = {n: 1e-4 + 1e-6 * n**1.5 for n in (32, 128, 512, 2048, 4096)}
    assert parts.fitted_exponent(added) == pytest.approx(1.5, abs=0.05)
    assert parts.fitted_exponent({1: -1e-5, 2: 1e-5}) is None


def test_a_step_that_counts_follows_one_of_the_same_arm(monkeypatch):
    """The first step of a turn, which takes 100 seconds here, is in no answer."""
    turns = []

    def timed(step, number):
        turns.append((step, number))
        return [0.1] if number == 1 else [100.0, 1.0, 3.0]

    monkeypatch.setattr(worker, "_timed", timed)
    monkeypatch.setattr(worker, "SETTLE", 0.0)
    monkeypatch.setitem(worker.CASES, "letters", lambda: {name: lambda n=name: n for name in "abc"})
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n1\n"))
    answers = io.StringIO()
    monkeypatch.setattr("sys.stdout", answers)
    worker.main("letters")
    _, first, second = map(json.loads, answers.getvalue().splitlines())
    assert first == second == {"a": 2.0, "b": 2.0, "c": 2.0}
    of_blocks = [(step, number) for step, number in turns if number > 1]
    assert [name for name, _ in of_blocks] == [*"abc", *"cba", *"abc"]
    assert {number for _, number in of_blocks} == {3}


def test_a_ratio_of_what_was_not_measured_is_none():
    times = Times({("jax", "ours"): [2.0, 4.0, 2.0], ("jax", "limit"): [1.0, 2.0, 1.0]})
    assert times.ratio(("jax", "ours"), ("jax", "limit")) == {"ratio": 2.0, "spread": 0.0}
    assert times.ratio(("jax", "ours"), ("torch", "peft")) is None


def test_48_multipliers_are_held_against_2(monkeypatch):
    seconds = {
        ("jax", f"ours/{number}"): [time] * 3 for number, time in ((1, 1.0), (2, 1.0), (48, 2.5))
    }
    monkeypatch.setattr(parts, "measure", lambda *_, **__: Times(seconds))
    found = parts.run_optimizer(argparse.Namespace(**OPTIONS, backends=["jax"]))
    assert {row["met"] for row in found["many"]} == {False}
    page = report.as_markdown("optimizer", {**header(), **found})
    assert "| 24 | jax | 2.50 | 2.0 (not met) |" in page


def test_seconds_and_bytes_of_a_billion_parameters_are_of_two_processes(monkeypatch):
    asked = []

    def child(backend, dtype, kind):
        asked.append(kind)
        cost = {"seconds": len(asked), "extra_bytes": 100 * len(asked)}
        return {"enable": dict(cost), "merge": dict(cost)}

    monkeypatch.setattr(parts, "child", child)
    (row,) = parts.run_large(argparse.Namespace(**OPTIONS, backends=["jax"]))["large"]
    assert asked == ["large", "large_resident"] and row["met"]
    assert row["enable"] == row["merge"] == {"seconds": 1, "extra_bytes": 200}
    followed = []
    monkeypatch.setattr(resident, "follow_what_lives", lambda: followed.append(True))
    monkeypatch.setattr("sys.stdout", io.StringIO())
    for kind, times in (("large", 0), ("large_resident", 1)):
        monkeypatch.setitem(benchmarks_child.KINDS, kind, dict)
        benchmarks_child.main(kind)
        assert len(followed) == times


def test_huge_pages_are_asked_for_in_every_second_process(monkeypatch):
    asked = []

    def measured(case, names, *_, **__):
        plain, huge = names
        asked.extend(map(rounds.environment, names))
        return Times({(plain, "ours"): [2.0] * 3, (huge, "ours"): [1.5] * 3})

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(parts, "measure", measured)
    options = argparse.Namespace(**{**OPTIONS, "cases": ["vit"]}, backends=["jax"])
    found = parts.run_huge_pages(options)
    assert [each["KERAS_BACKEND"] for each in asked] == ["jax", "jax"]
    tunables = [each.get("GLIBC_TUNABLES") for each in asked]
    assert tunables == [None, "glibc.malloc.hugetlb=1"]
    page = report.as_markdown("huge_pages", {**header(), **found})
    assert "| vit | jax | 2000.0 | 1500.0 | 0.75 | 0 % |" in page
    section = readme.section(
        {"ratios": {**header(), "ratios": []}, "huge_pages": {**header(), **found}}
    )
    assert "measured 2026-01-01: jax 0.75 (vit)." in section


def header():
    return {"date": "2026-01-01", "machine": "m", "versions": {"keras": "3"}, "blocks": 9}


def test_a_page_says_memory_over_the_frozen_model():
    rows = [
        {"case": "c", "backend": "jax", "arm": arm, "total": 0, "extra": extra, "method": "buffers"}
        for arm, extra in (("ours", 3_000_000), ("limit", 2_000_000))
    ]
    page = report.as_markdown("memory", {**header(), "memory": rows})
    assert "| c | jax | ours | 3 | 1.50 | buffers |" in page


def test_a_part_says_what_it_took():
    spent, found = suite.timed(lambda options: {"rows": options}, 3)
    assert found == {"rows": 3} and set(spent) == {"elapsed_seconds", "processor_seconds"}
    said = {**header(), "elapsed_seconds": 71.3}
    assert "; 9 interleaved blocks; it took 71 s; keras 3." in report.measured(said)
    assert "blocks" not in report.measured({**header(), "blocks": None})


def test_the_suites_name_parts_and_cases_that_exist():
    assert set(suite.QUICK) | set(suite.BLOCKS) <= set(parts.PARTS)
    assert set(MEMORY_CASES) <= set(CASES)
    assert set(report.TABLES) == set(report.TITLES) == set(parts.PARTS) - {"contract"}
    assert {f"growth_{what}" for what in parts.EXPECTED_GROWTH} <= set(CASES)


def test_what_cannot_be_measured_is_told(monkeypatch, capsys):
    monkeypatch.setattr(suite.subprocess, "run", _no_gpu)
    with pytest.raises(SystemExit, match="--suite gpu needs a GPU"):
        suite.main(["--suite", "gpu"])
    for arguments in (["--cases", "vit"], ["--blocks", "1"]):
        with pytest.raises(SystemExit):
            suite.parse(arguments)
    assert "--blocks must be at least 2" in capsys.readouterr().err


def _no_gpu(*args, **kwargs):
    raise FileNotFoundError


def test_a_part_that_is_not_all_does_not_replace_what_is_committed(monkeypatch, tmp_path, backend):
    made = tmp_path / "made"
    monkeypatch.setattr(suite.tempfile, "mkdtemp", lambda prefix: str(made))
    monkeypatch.setattr(parts, "MEMORY_CASES", ("tiny_resnet",))
    monkeypatch.setitem(
        suite.PARTS, "memory", lambda options: {"memory": [], "cases": options.cases}
    )
    suite.main(["--parts", "memory", "--cases", "tiny_resnet", "--backends", backend])
    assert json.loads((made / "memory.json").read_text())["cases"] == ["tiny_resnet"]
    assert keras.backend.backend() in BACKENDS


def test_what_is_not_installed_has_no_version(monkeypatch):
    def only_keras(name):
        if name != "keras":
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9"

    monkeypatch.setattr(importlib.metadata, "version", only_keras)
    assert suite.versions() == {"keras": "9.9"}
