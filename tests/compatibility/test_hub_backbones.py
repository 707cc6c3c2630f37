"""Every backbone class that KerasHub exports, in a tiny configuration: `make test-compatibility`.

On JAX all of them; elsewhere a sample, unless `COMPATIBILITY=all` is set.
"""

import os

import pytest
from hub_backbones import CASES, KNOWN, SAMPLE, concrete_classes, run_checks, set_factors

import keras_loraplus as klp

pytestmark = [
    pytest.mark.compatibility,
    # KerasHub's own layers are warned of much with no adapter in sight: a `build` that makes
    # nothing, masks that are dropped, an index that torch will read otherwise some day.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def chosen():
    everything = os.environ.get("KERAS_BACKEND") == "jax" or os.environ.get("COMPATIBILITY")
    return list(CASES) if everything else list(SAMPLE)


def test_there_is_a_case_for_every_class():
    exported = concrete_classes().values()
    without = [names for names in exported if not set(names) & set(CASES)]
    assert not without, f"classes that KerasHub exports and that no case makes: {without}"
    assert len(exported) == len(CASES)


@pytest.mark.parametrize("name", chosen())
def test_backbone(name, backend):
    """Fails where a check fails that is known to pass, and where one passes that is known not to.

    What is known is in `KNOWN`, with the reason, which the table gives.
    """
    known = KNOWN.get((name, backend), KNOWN.get((name, None), {}))
    if "all" in known:
        pytest.skip(known["all"])
    for targets, result in run_checks(CASES[name]).items():
        failures = result.failures
        unexpected = {check: found for check, found in failures.items() if check not in known}
        assert not unexpected, f"targets={targets!r}: {unexpected}"
        mended = set(known) - set(failures)
        assert not mended, f"targets={targets!r}: known to fail, and pass: {mended}"


def test_the_checks_can_fail(monkeypatch):
    """A merge of another delta, an optimizer that stands still, a report without its list."""
    merge, optimizer = klp.merge_lora_plus, klp.LoRAPlusAdamW

    def wrong_merge(model):
        set_factors(model, seed=12)
        return merge(model)

    def still(learning_rate, **kwargs):
        return optimizer(0.0, **kwargs)

    monkeypatch.setattr(klp, "merge_lora_plus", wrong_merge)
    monkeypatch.setattr(klp, "LoRAPlusAdamW", still)
    failures = run_checks(CASES["BertBackbone"])["all-linear"].failures
    assert set(failures) == {"trains", "merges"}
    assert "not moved by two steps" in failures["trains"]
    assert "relative error" in failures["merges"]
    monkeypatch.setattr("keras_loraplus.planning.why_not_adaptable", lambda layer: None)
    failures = run_checks(CASES["RWKV7Backbone"])["all-linear"].failures
    assert "hold matrices and are not reported" in failures["enables"]
