"""Writes what the README says of the measurements from the committed files, never by hand.

python -m benchmarks.readme
"""

import json
import pathlib

from benchmarks import contract
from benchmarks.names import ARMS, CHECKPOINTING
from benchmarks.report import MEGABYTE, floor, operation_sums, table

README = pathlib.Path(__file__).parents[1] / "README.md"
RESULTS = pathlib.Path(__file__).with_name("results")
BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->"
CONTRACT = "ratios"
MEMORY_CASES = ("minilm_qv", "bert_wide")
TITLES = {
    "full": "full fine-tuning",
    "native": "native",
    "native_same": "native, same trained matrices",
    "ours": "ours",
    "limit": "limit",
    "peft": "PEFT",
}
RECOMPUTED = {
    "none": "nothing",
    "activations": "activations",
    "blocks": "whole layers",
    "blocks_unfiltered": "whole layers, tracebacks unfiltered",
}


def read(folder=RESULTS):
    """Returns {name of a file: its content} for every result in the folder."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def into_readme(text, results):
    """Returns the README with its part on measurements made from the results."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + section(results) + END + rest.partition(END)[2]


def section(results):
    """Returns what is shown of the ratios and of each part, and links to the rest."""
    ratios = results[CONTRACT]
    said = [
        f"Measured {ratios['date']} on {ratios['machine']}; medians of {ratios['blocks']} "
        f"interleaved blocks (`make bench`).\n\n{contract.as_markdown(ratios)}"
    ]
    if "profile" in results:
        said.append(_profile(results["profile"]))
    if "memory" in results:
        said.append(_memory(results["memory"]))
    if "checkpointing" in results:
        said.append(_checkpointing(results["checkpointing"]))
    if "huge_pages" in results:
        said.append(_huge_pages(results["huge_pages"]))
    if "large" in results:
        said.append(_large(results["large"]))
    others = [f"[{name}](benchmarks/results/{name}.md)" for name in results if name != CONTRACT]
    if others:
        said.append(f"Every row: {', '.join(others)}.\n")
    return "\n".join(said)


def _profile(result):
    sums = operation_sums(result)
    said = [
        f"{case}: " + ", ".join(f"{TITLES[arm]} {ms:.0f} ms" for arm, ms in of_case.items())
        for case, of_case in sums.items()
    ]
    floors = [
        f"No step of any backend takes less than its products; {floor(result, case)}\n"
        for case in sums
    ]
    return (
        f"torch's operations in a step, without Python's time between them, measured "
        f"{result['date']}: {'; '.join(said)} ([one by one](benchmarks/results/profile.md)).\n\n"
        + "\n".join(floors)
    )


def _memory(result):
    extra = {
        (row["case"], row["backend"], row["arm"]): f"{row['extra'] / MEGABYTE:.0f}"
        for row in result["memory"]
    }
    measured = dict.fromkeys((case, backend) for case, backend, _ in extra)
    rows = [
        [case, backend, *(extra.get((case, backend, arm), "") for arm in ARMS)]
        for case, backend in measured
        if case in MEMORY_CASES
    ]
    lines = table(["case", "backend", *(TITLES[arm] for arm in ARMS)], rows)
    return (
        "What a step needs beyond the built model, in MB (JAX: XLA's buffers; the others: peak "
        f"of the resident set), measured {result['date']}:\n\n" + "\n".join(lines) + "\n"
    )


def _checkpointing(result):
    costs = {
        (row["backend"], row["arm"]): f"{row['milliseconds']:.0f} ms, "
        f"{row['extra'] / MEGABYTE:.0f} MB"
        for row in result["checkpointing"]
    }
    rows = [
        [backend, *(costs.get((backend, mode), "") for mode in CHECKPOINTING)]
        for backend in dict.fromkeys(backend for backend, _ in costs)
    ]
    lines = table(["backend", *(RECOMPUTED[mode] for mode in CHECKPOINTING)], rows)
    return (
        "`keras.RematScope` around the adapted layers of a transformer: a step's time, and its "
        f"memory as above, by what is recomputed, measured {result['date']}:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _huge_pages(result):
    ratios = {}
    for row in result["huge_pages"]:
        ratios.setdefault(row["backend"], []).append(f"{row['ratio']:.2f} ({row['case']})")
    said = "; ".join(f"{backend} {', '.join(found)}" for backend, found in ratios.items())
    return (
        "JAX allocates a step's buffers anew each time. On Linux, with glibc 2.35 or newer and "
        "transparent huge pages on `madvise`, start Python with "
        "`GLIBC_TUNABLES=glibc.malloc.hugetlb=1` for larger pages. Our step takes this part of its "
        f"time then, measured {result['date']}: {said}.\n"
    )


def _large(result):
    def costs(kind):
        return ", ".join(
            f"{row[kind]['seconds']:.1f} s and {row[kind]['extra_bytes'] / MEGABYTE:.0f} MB on "
            f"{row['backend']}"
            for row in result["large"]
        )

    row = result["large"][0]
    return (
        f"At {row['parameters'] / 1e9:.2f} billion parameters in bfloat16 "
        f"({row['base_bytes'] / MEGABYTE:,.0f} MB; A and B are "
        f"{row['adapter_bytes'] / MEGABYTE:.0f} MB) `enable_lora_plus` takes {costs('enable')}; "
        f"`merge_lora_plus` {costs('merge')}.\n"
    )


def update(folder=RESULTS):
    """Writes the README anew from the files of a folder."""
    README.write_text(into_readme(README.read_text(), read(folder)))


if __name__ == "__main__":
    update()
