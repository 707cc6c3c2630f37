"""What a sweep trains, records, selects and reads the test data for."""

import gc
import json
import sqlite3

import keras
import numpy as np
import optuna
import pytest
import tiny_models

import keras_loraplus as klp

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build(cell):
    model = tiny_models.functional()
    if cell.arm != "full":
        klp.enable_lora_plus(model, rank=2)
    return model


def data(count=24, seed=0):
    x = tiny_models.features(count, seed)
    return x, (x[:, 0] > 0).astype("int32") + (x[:, 1] > 0)


def score(cell):
    """A made-up metric whose best is at A 1e-3, B 1e-2."""
    return 1.0 - abs(np.log10(cell.eta_a) + 3) / 10 - abs(np.log10(cell.eta_b or 1) + 2) / 10


class Training:
    """A `train` that keeps the cells it was given; `act` may interfere."""

    def __init__(self, act=None):
        self.cells = []
        self.act = act

    def __call__(self, model, cell, report):
        self.cells.append(cell)
        if self.act is not None:
            self.act(cell, report)
        return {"score": score(cell), "loss": 1.0}


def sweep(train=None, **options):
    return klp.tuning.sweep(
        lambda cell: None,
        train or Training(),
        **{
            "eta_a": [1e-4, 1e-3],
            "eta_b": [1e-3, 1e-2],
            "monitor": "score",
            "mode": "max",
            "progress": False,
            **options,
        },
    )


def test_both_arms_are_trained_with_keras_and_selected_by_validation():
    result = klp.tuning.sweep(
        build,
        data(),
        data(12, seed=5),
        eta_a=[1e-3, 1e-1],
        lr_ratio=[8.0],
        head_rate=1e-2,
        full={"eta_a": [1e-3]},
        seeds=[0, 1],
        loss=LOSS,
        metrics=["accuracy"],
        epochs=2,
        batch_size=8,
        evaluate_every=2,
        schedule="linear",
        optimizer_options={"weight_decay": 0.0},
        head="head/.*",
        test=data(12, seed=6),
        progress=False,
        monitor="loss",
    )
    assert result.budget == {"loraplus": 2, "lora": 2, "full": 1}
    assert {r["status"] for r in result.records} == {"complete"}, result.records
    assert [(r["arm"], r["eta_a"], r["seed"]) for r in result.records][:4] == [
        ("loraplus", 1e-3, 0),
        ("loraplus", 1e-1, 0),
        ("loraplus", 1e-3, 1),
        ("loraplus", 1e-1, 1),
    ]
    for record in result.records:
        # Three steps an epoch, a look after each second one and at the end of the epoch.
        assert record["curve"]["steps"] == [2, 3, 5, 6]
        assert record["curve"]["values"][-1] == record["value"] == record["metrics"]["loss"]
        assert record["head_rate"] == 1e-2 and record["seconds"] > 0
    values = {(r["arm"], r["eta_a"], r["seed"]): r["value"] for r in result.records}
    assert len(set(values.values())) == len(values)  # neither rates nor seeds are ignored
    best = min((1e-3, 1e-1), key=lambda a: np.mean([values["loraplus", a, s] for s in (0, 1)]))
    assert result.selected("loraplus")["eta_a"] == best
    tested = [(r["arm"], r["eta_a"], r["seed"]) for r in result.test]
    chosen = {arm: result.selected(arm)["eta_a"] for arm in ("loraplus", "lora", "full")}
    assert tested == [(arm, chosen[arm], seed) for arm in chosen for seed in (0, 1)]
    for record in result.test:
        # Trained again from the same seed: the validation data say the same as before.
        key = (record["arm"], record["eta_a"], record["seed"])
        assert record["value"] == pytest.approx(values[key], rel=1e-4)
        assert record["test_metrics"]["loss"] != record["value"]


def test_sample_weights_are_weights():
    (x, y), (vx, vy) = data(), data(8, seed=5)
    options = {"eta_a": 1e-3, "lr_ratio": 8.0, "lora": False, "head_ratio": 1.0, "loss": LOSS}
    options |= {"monitor": "loss", "progress": False, "metrics": ["accuracy"]}

    def loss(weights, validation_weights):
        parts = (x, y, weights), (vx, vy, validation_weights)
        (record,) = klp.tuning.sweep(build, *parts, **options).records
        assert record["status"] == "complete", record["error"]
        return record["metrics"]

    ones, zeros = np.ones(8, "float32"), np.zeros(24, "float32")
    plain, weighted = loss(zeros + 1, ones), loss(zeros + 2, 3 * ones)
    assert weighted["train_loss"] == pytest.approx(2 * plain["train_loss"], rel=1e-3)
    assert weighted["loss"] == pytest.approx(3 * plain["loss"], rel=1e-2)


def test_the_arms_of_a_seed_see_the_same_batches():
    seen = {}

    class Model(keras.Sequential):
        def fit(self, x, y, **options):
            seen.setdefault(self.key, []).append(np.asarray(y))
            return super().fit(x, y, **options)

    def build_spy(cell):
        model = Model(
            [keras.Input((tiny_models.FEATURES,)), keras.layers.Dense(4), keras.layers.Dense(3)]
        )
        model.key = (cell.arm, cell.eta_a, cell.seed)
        klp.enable_lora_plus(model, rank=2)
        return model

    options = {"head_ratio": 1.0, "loss": LOSS, "monitor": "loss", "progress": False}
    klp.tuning.sweep(build_spy, data(), data(8), eta_a=1e-3, lr_ratio=8.0, seeds=[0, 1], **options)
    by_seed = {seed: [y for key, y in seen.items() if key[2] == seed] for seed in (0, 1)}
    for batches in by_seed.values():
        assert len(batches) == 2
        np.testing.assert_array_equal(batches[0], batches[1])
    assert not np.array_equal(by_seed[0][0], by_seed[1][0])


def test_failed_and_diverged_cells_are_recorded_and_the_sweep_goes_on(tmp_path):
    def act(cell, report):
        if cell.arm == "loraplus" and cell.eta_a == 1e-3:
            if cell.eta_b == 1e-3:
                raise OSError("the disk is full")
            report(3, 0.5)
            report(6, float("nan"))

    result = sweep(Training(act))
    found = {(r["eta_a"], r["eta_b"]): r for r in result.records if r["arm"] == "loraplus"}
    assert found[1e-3, 1e-3]["status"] == "failed"
    assert found[1e-3, 1e-3]["error"] == "OSError: the disk is full"
    assert found[1e-3, 1e-2]["status"] == "diverged"
    assert found[1e-3, 1e-2]["curve"] == {"steps": [3], "values": [0.5]}
    # The best cell of the two that are left, and not what would have been best.
    assert result.selected("loraplus")["eta_a"] == 1e-4
    assert "1 of 8 trials diverged." in str(result) and "1 of 8 trials failed." in str(result)
    result.save(tmp_path / "r.json")
    assert "NaN" not in (tmp_path / "r.json").read_text()


def test_a_network_that_explodes_is_diverged():
    class Exploding(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return keras.ops.sum(y_pred, axis=-1) * float("inf")

    options = {"loss": Exploding(), "monitor": "loss", "progress": False, "head_ratio": 1.0}
    result = klp.tuning.sweep(
        build, data(), data(8), eta_a=1e-3, lr_ratio=8.0, lora=False, **options
    )
    (record,) = result.records
    assert record["status"] == "diverged" and record["value"] is None
    assert result.selected("loraplus") is None
    assert "-" in str(result)


def test_when_all_fail_the_first_error_is_raised():
    def act(cell, report):
        raise KeyError("typo")

    with pytest.raises(RuntimeError, match="All 8 trials failed. The first: KeyError: 'typo'"):
        sweep(Training(act))


def test_interrupted_and_continued(tmp_path):
    storage = tmp_path / "sweep.db"

    def interrupt(cell, report):
        if len(first.cells) == 3:
            raise KeyboardInterrupt

    first, second, third = Training(interrupt), Training(), Training()
    with pytest.raises(KeyboardInterrupt):
        sweep(first, storage=storage)
    result = sweep(second, storage=storage)
    assert len(second.cells) == 8 - 2
    assert set(first.cells[:2]).isdisjoint(second.cells) and first.cells[2] in second.cells
    # A larger grid trains what is new only.
    larger = sweep(third, storage=storage, eta_a=[1e-4, 1e-3, 1e-2], lora=False)
    assert {cell.eta_a for cell in third.cells} == {1e-2} and len(third.cells) == 2
    assert len(larger.records) == 6
    assert [r for r in larger.records if r["eta_a"] < 1e-2] == result.records[:4]


def test_a_sweep_leaves_no_connection_open(tmp_path):
    """Python 3.13 warns of each one that is left to the garbage collector."""

    def fail(cell, report):
        raise KeyboardInterrupt

    sweep(Training(), storage=tmp_path / "sweep.db")
    with pytest.raises(KeyboardInterrupt):
        sweep(Training(fail), storage=tmp_path / "other.db")
    left = [found for found in gc.get_objects() if issubclass(type(found), sqlite3.Connection)]
    for connection in left:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_failures_are_tried_again_only_when_told(tmp_path):
    def fail(cell, report):
        if cell.eta_b == 1e-2 and cell.arm == "loraplus":
            raise OSError("no memory")

    options = {"storage": tmp_path / "sweep.db"}
    assert sum(r["status"] == "failed" for r in sweep(Training(fail), **options).records) == 2
    idle, again = Training(), Training()
    sweep(idle, **options)
    assert idle.cells == []
    result = sweep(again, **options, retry_failed=True)
    assert {(cell.arm, cell.eta_b) for cell in again.cells} == {("loraplus", 1e-2)}
    assert len(again.cells) == 2
    assert {r["status"] for r in result.records} == {"complete"}


def test_the_test_data_are_read_once(tmp_path):
    read = []

    def test(model):
        read.append(model)
        return {"score": 0.25}

    options = {"storage": tmp_path / "sweep.db", "test": test, "seeds": [0, 1]}
    result = sweep(**options)
    assert len(read) == 2 * 2  # arms, seeds
    assert [r["eta_b"] for r in result.test][:2] == [1e-2, 1e-2]
    assert "0.2500" in str(result)
    sweep(**options)
    larger = sweep(**options, eta_b=[1e-3, 1e-2, 1e-1], eta_a=[1e-3])
    assert len(read) == 4 and larger.tested("loraplus")


def test_other_settings_need_another_name(tmp_path):
    options = {"storage": tmp_path / "sweep.db", "lora": False}
    sweep(**options, about={"task": "a"})
    idle = Training()
    with pytest.raises(ValueError, match="trained in another way: {'about': {'task': 'a'}}"):
        sweep(idle, **options, about={"task": "b"})
    assert idle.cells == []
    sweep(**options, about={"task": "b"}, name="b")


def test_any_sampler_and_a_pruner():
    distribution = optuna.distributions.FloatDistribution

    def act(cell, report):
        report(1, score(cell))
        report(2, score(cell))

    training = Training(act)
    result = sweep(
        training,
        eta_a=distribution(1e-5, 1e-1, log=True),
        eta_b=None,
        lr_ratio=[1.0, 4.0, 16.0],
        sampler=optuna.samplers.TPESampler(seed=0),
        n_trials=8,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
        seeds=[0, 1],
    )
    assert result.budget == {"loraplus": 8, "lora": 8}
    statuses = [r["status"] for r in result.records]
    assert set(statuses) == {"complete", "pruned"}
    assert {cell.seed for cell in training.cells} == {0, 1}
    best = result.selected("loraplus")
    complete = [r for r in result.records if r["arm"] == "loraplus" and r["status"] == "complete"]
    assert best["mean"] == max(r["value"] for r in complete)
    ratios = {round(r["lr_ratio"], 6) for r in result.records if r["arm"] == "loraplus"}
    assert ratios <= {1.0, 4.0, 16.0} and len(ratios) > 1


def test_saved_loaded_and_as_a_table(tmp_path):
    result = sweep(seeds=[0, 1], about={"task": "made up"})
    path = tmp_path / "result.json"
    result.save(path)
    assert klp.tuning.load(path) == result
    content = json.loads(path.read_text())
    assert content["selected"]["loraplus"]["eta_b"] == 1e-2
    assert content["on_edge"]["loraplus"] == ["eta_a", "eta_b"]
    assert content["setup"]["about"] == {"task": "made up"}
    assert content["versions"]["backend"] == keras.backend.backend()
    table = result.to_pandas()
    assert len(table) == 16
    assert table.groupby("arm")["score"].max()["loraplus"] == result.selected("loraplus")["mean"]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold a sweep"):
        klp.tuning.load(tmp_path / "other.json")


def test_a_cell_with_a_seed_that_failed_is_not_selected():
    def act(cell, report):
        if cell.seed == 1 and cell.eta_b == 1e-2:
            raise OSError("no memory")

    result = sweep(Training(act), seeds=[0, 1], lora=False)
    assert {c["eta_b"] for c in result.cells("loraplus")} == {1e-3}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"seeds": []}, "`seeds`"),
        ({"seeds": [0, 0]}, "`seeds`"),
        ({"epochs": 0}, "`epochs`"),
        ({"n_workers": True}, "`n_workers`"),
        ({"mode": None}, "Whether more of 'score'"),
        ({"mode": "best"}, "`mode`"),
        ({"n_trials": 3}, "go together"),
        ({"schedule": "cosine"}, "`schedule`"),
        ({"train": (np.ones(3), np.ones(3))}, "`validation` and `loss`"),
        ({"build": None}, "`build`"),
        ({"evaluate_every": 2}, "needs training data"),
    ],
)
def test_refusals(given, message):
    arguments = {"build": build, "train": Training(), **given}
    with pytest.raises(ValueError, match=message):
        klp.tuning.sweep(
            **{"eta_a": 1e-3, "lr_ratio": 8.0, "monitor": "score", "mode": "max", **arguments}
        )


def test_without_the_monitored_metric_the_error_names_those_there_are():
    with pytest.raises(RuntimeError, match=r"They hold: \['loss', 'score'\]"):
        sweep(monitor="accuracy")


def test_the_progress_bar_shows_the_best_so_far(capsys):
    sweep(progress=True)
    shown = capsys.readouterr().err
    assert "8/8" in shown
    assert "best score: LoRA+ 1.0000 (A 0.001, B 0.01); LoRA 0." in shown
