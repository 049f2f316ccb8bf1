"""The losses of a run of any length, in a bounded number of points."""

from __future__ import annotations


class LossCurve:
    """Keeps the whole course of a loss: of each stretch of steps the lowest and the highest, and both ends.

    When there are too many stretches, two neighbours become one. Of the 4000 points of a million steps as many lie in
    the first half as in the second, and no spike is lost.

    Args:
        most: Stretches at most, an even number ≥ 2.
    """

    def __init__(self, most: int = 2000) -> None:
        self._most = most
        self._width = 1
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        # Number of the stretch -> its lowest and its highest point.
        self._stretches: dict[int, tuple[tuple[int, float], tuple[int, float]]] = {}

    def add(self, step: int, loss: float) -> None:
        """Take in a finite loss."""
        point = (step, loss)
        self._first = self._first or point
        self._last = point
        self._put(self._stretches, step // self._width, point, point)
        while len(self._stretches) > self._most:
            self._width *= 2
            wider: dict[int, tuple[tuple[int, float], tuple[int, float]]] = {}
            for number, (low, high) in self._stretches.items():
                self._put(wider, number // 2, low, high)
            self._stretches = wider

    @property
    def points(self) -> list[tuple[int, float]]:
        """``(step, loss)``, oldest first."""
        found = {point for pair in self._stretches.values() for point in pair}
        return sorted(found | {point for point in (self._first, self._last) if point is not None})

    @staticmethod
    def _put(
        stretches: dict[int, tuple[tuple[int, float], tuple[int, float]]],
        number: int,
        low: tuple[int, float],
        high: tuple[int, float],
    ) -> None:
        known = stretches.get(number)
        if known is not None:
            low = min(known[0], low, key=lambda point: point[1])
            high = max(known[1], high, key=lambda point: point[1])
        stretches[number] = (low, high)
