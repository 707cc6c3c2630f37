"""The progress bar of a sweep."""

from typing import Any

from keras_loraplus.tuning.result import NAMES, SweepResult


class Progress:
    """A bar that counts finished cells, those of other processes too, and shows the best.

    Args:
        total: Number of cells and seeds.
        monitor: Name of the metric.
        shown: Whether to show anything.
    """

    def __init__(self, total: int, monitor: str, shown: bool) -> None:
        # Optuna itself needs tqdm; its own bar counts the trials of one `optimize` call only.
        from tqdm import tqdm

        self._bar: Any = tqdm(total=total, unit="trial", disable=not shown)
        self._monitor = monitor
        self._done = 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *details: Any) -> None:
        self._bar.close()

    def grow(self, count: int) -> None:
        """Adds to the total."""
        self._bar.total += count
        self._done = self._bar.n

    def update(
        self, done: int | None = None, result: SweepResult | None = None, also: int = 0
    ) -> None:
        """Shows a number of finished cells, `also` on top of those before `grow`."""
        self._bar.n = self._done + also if done is None else done
        if result is not None:
            self._bar.set_postfix_str(describe_best(result, self._monitor), refresh=False)
        self._bar.refresh()


def describe_best(result: SweepResult, monitor: str) -> str:
    """Returns the best cell of each arm in a few words."""
    parts = []
    for arm in result.arms:
        best = result.selected(arm)
        if best is not None:
            rates = f"A {best['eta_a']:.2g}"
            if arm == "loraplus":
                rates += f", B {best['eta_b']:.2g}"
            elif arm == "lora":
                rates = f"{best['eta_a']:.2g}"
            parts.append(f"{NAMES[arm]} {best['mean']:.4f} ({rates})")
    return f"best {monitor}: " + ("; ".join(parts) or "none yet")
