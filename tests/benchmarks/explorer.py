"""Time that the explorer takes to redraw after a change of a control: medians in milliseconds.

For the first pair of the run store: ``python tests/benchmarks/explorer.py [DATASET]``.
"""

import statistics
import sys
import time

from kdx.explorer.app import Explorer


def median_ms(widget, values):
    times = []
    for value in values:
        start = time.perf_counter()
        widget.value = value
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main(dataset=None, repeats=5, limit=2000):
    """Print the median time of every control and of a new image; return them."""
    app = Explorer(dataset, limit)
    stages, sizes = app.stage.options, app.reference.options
    for size in sizes:
        app.reference.value = size  # the maps of this image are kept from now on
    knobs = {
        "stage": (app.stage, [stages[i % len(stages)] for i in range(4 * repeats)]),
        "overlay": (app.opacity, [0.1 + 0.05 * i for i in range(2 * repeats)]),
        "kept": (app.keep, [0.1 + 0.05 * i for i in range(2 * repeats)]),
        "reference": (app.reference, [sizes[i % len(sizes)] for i in range(4 * repeats)]),
    }
    found = {name: median_ms(*knob) for name, knob in knobs.items()}
    times = []
    for image in app.chosen[1 : 2 * repeats]:
        start = time.perf_counter()
        app._look_at(image)
        times.append(time.perf_counter() - start)
    found["new image"] = 1000 * statistics.median(times)
    for name, value in found.items():
        print(f"{name:10} {value:6.0f} ms")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
