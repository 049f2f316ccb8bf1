"""What stays in memory of readings, and what is read of it."""

import dataclasses
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from eos_monitor import CFLEstimate, StabilityReading, measure_stability
from eos_monitor.dashboard.layer_history import LayerHistory
from eos_monitor.monitor.engine import Engine
from eos_monitor.readings.settings import Probe, Solver


def kept(count: int, add: Callable[[int], Any]) -> float:
    """Bytes that stay for each call, once Python's own lists of free objects are full."""
    tracemalloc.start()
    for i in range(60):
        add(i)
    before = tracemalloc.get_traced_memory()[0]
    for i in range(60, 60 + count):
        add(i)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return (after - before) / count


def a_reading() -> StabilityReading:
    net = nn.Linear(3, 1)
    batch = (torch.randn(16, 3), torch.randn(16, 1))
    return measure_stability(net, lambda m, b: (m(b[0]) - b[1]).square().mean(), [batch], SGD(net.parameters(), lr=0.1))


def renewed(reading: Any, i: int) -> Any:
    """The same with numbers of its own in every field, as each measurement has them."""
    fields = dataclasses.asdict(reading)
    fresh = {
        key: value * (1 + 1e-9 * i) if isinstance(value, float) else tuple(x * (1 + 1e-9 * i) for x in value)
        for key, value in fields.items()
        if isinstance(value, float) or (isinstance(value, tuple) and value and isinstance(value[0], float))
    }
    return dataclasses.replace(reading, **fresh)


def engine() -> Engine:
    net = nn.Linear(3, 1)
    found = Engine(Probe(), Solver(), every_n_steps=1)
    found.follow([SGD(net.parameters(), lr=0.1)])
    return found


def test_a_reading_is_kept_once() -> None:
    running = engine()
    reading = a_reading()

    def add(i: int) -> None:
        running.add_reading(dataclasses.replace(renewed(reading, i), step=i), 0.0)

    # The numbers of a reading take 24 bytes each, its dictionary of fields some 400: 1,100. With a row beside it 2,000.
    assert kept(500, add) < 1300


def test_rows_are_what_they_were_when_they_were_dictionaries() -> None:
    running = engine()
    readings = [dataclasses.replace(renewed(a_reading(), i), step=i) for i in range(5)]
    for reading in readings:
        running.add_reading(reading, 0.0)
    for row, reading in zip(running.rows, readings, strict=True):
        assert {key: row[key] for key in dataclasses.asdict(reading)} == dataclasses.asdict(reading)
        assert row["run"] == running.run_id
        assert isinstance(row["verdict"], str)
    assert running.rows[-1] == list(running.rows)[4]
    assert running.rows[2:] == list(running.rows)[2:]
    assert running.readings == readings


def layers(i: int, count: int = 50) -> list[dict[str, Any]]:
    """Fields of estimates as a monitor has them, the closest to its limit first: another one each time."""
    found = []
    for j in range(count):
        estimate = dataclasses.replace(
            CFLEstimate.unknown(f"net.{j}", "no activation" if j % 7 == 0 else ""),
            curvature=math.nan if j % 7 == 0 else 1.0 + i + j,
            cfl_number=None if j % 7 == 0 else (i * 31 + j * 17) % 101 / 100,
            method="none" if j % 7 == 0 else "exact" if i % 5 == 0 and j < 3 else "cheap",
        )
        found.append(dataclasses.asdict(estimate) | {"position": j})
    return sorted(found, key=lambda layer: -(layer["cfl_number"] or 0.0))


def test_a_layer_is_kept_as_two_numbers() -> None:
    history = LayerHistory()
    assert kept(100, lambda i: history.add(i, layers(i))) < 50 * 40  # twice eight bytes, and what is once a reading


def test_layers_are_read_as_they_were() -> None:
    history = LayerHistory()
    for i in range(7):
        history.add(i, layers(i))
    for i, row in enumerate(history):
        assert row["step"] == i
        original = {layer["layer"]: layer for layer in layers(i)}
        assert len(row["layers"]) == len(original)
        for layer in row["layers"]:
            for key, value in layer.items():
                expected = original[layer["layer"]][key]
                assert value == expected or (math.isnan(value) and math.isnan(expected))
    assert history[-1]["step"] == 6
    assert [row["step"] for row in history[2:4]] == [2, 3]
