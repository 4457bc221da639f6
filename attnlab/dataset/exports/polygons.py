"""Trace masks as polygons that others' readers fill to the same pixels."""

import numpy as np
from scipy.ndimage import find_objects
from skimage.measure import label

__all__ = ["trace_polygons"]

_RIGHT, _DOWN, _UP = 0, 1, 3  # directions, in the order of right turns; 2 is left


def trace_polygons(mask: np.ndarray, low: float = 0.0, high: float = 1.0) -> list[np.ndarray]:
    """Trace a mask along the edges of its pixels: a polygon, float (corner, xy), of each connected part of it.

    Holes are cut open: a bridge of no width, in the middle of a row of pixels, joins each to what lies left of it.

    Parameters
    ----------
    mask : (row, column) array of bool
        What to trace; pixels also connect by their corners.
    low, high : float in 0..1
        Where a left or upper edge lies in its pixel, and a right or lower one: 0 and 1 for readers that fill what lies
        between the edges; both of them inside, at a distance, for readers that fill every pixel that an edge lies in.
    """
    parts = label(mask, connectivity=2)
    return [
        np.add(_Outline(parts[place] == number, low, high).cut_open(), (place[1].start, place[0].start))
        for number, place in enumerate(find_objects(parts), 1)
    ]


class _Outline:
    """The edges of a connected part, each one pixel long and directed so that the part is at its right hand.

    An edge is a direction and the corner where it begins, a number: row * stride + column.
    """

    def __init__(self, part: np.ndarray, low: float, high: float):
        wide = np.pad(part, 1)
        (nw, ne), (sw, se) = ((rows[:, :-1], rows[:, 1:]) for rows in (wide[:-1], wide[1:]))  # pixels around a corner
        self.part, self.stride = part, nw.shape[1]
        self.edges = [begins.tobytes() for begins in (se & ~ne, sw & ~se, nw & ~sw, ne & ~nw)]  # [direction][corner]
        self.steps = (1, self.stride, -1, -self.stride)
        self.inset = (
            (0, low),
            (high - 1, 0),
            (0, high - 1),
            (low, 0),
        )  # (x, y) of a direction's edges, from the corners
        self.low, self.high = low, high
        self.upward, self.downward = {}, set()  # edges seen: {corner: (ring, its points before this edge)}, corners

    def cut_open(self) -> list[tuple[float, float]]:
        """Return the corners (x, y) of the outer ring, and of every hole at its bridge."""
        rings = [self._ring(0, self.edges[_RIGHT].index(1), _RIGHT)]
        corners = np.flatnonzero(np.frombuffer(self.edges[_DOWN], bool))
        starts = [None]
        for corner in corners[np.argsort(corners % self.stride, kind="stable")].tolist():
            if corner not in self.downward:  # the upper left corner of a hole, as the outer ring is seen
                starts.append(corner)
                rings.append(self._ring(len(rings), corner, _DOWN))
        bridged = [[] for _ in rings]
        for number in range(len(rings) - 1, 0, -1):  # from right to left: bridges lead to the left
            ring, before, row, points = self._bridge(starts[number], _joined(rings[number], bridged[number]))
            bridged[ring].append((before, -row, points))
        return _joined(rings[0], bridged[0])

    def _ring(self, number, corner, way):
        """Walk along edges until the first one; return the corners passed, and note the edges that go up and down."""
        points, first = [], (corner, way)
        while True:
            if way == _UP:
                self.upward[corner] = number, len(points)
            elif way == _DOWN:
                self.downward.add(corner)
            corner += self.steps[way]
            # left first, to all of a part that holds together by a corner
            turn = -1 if self.edges[way - 1][corner] else 0 if self.edges[way][corner] else 1
            if turn:
                points += self._corner(corner, way, turn)
            way = (way + turn) % 4
            if (corner, way) == first:
                return points

    def _corner(self, corner, way, turn):
        """List the points of a turn: two where pixels touch by a corner, so that each has its own."""
        touch = turn < 0 and self.edges[way - 3][corner]  # as way + 1, a turn to the right
        ways = [(way, way + 1), (way + turn - 1, way + turn)] if touch else [(way, way + turn)]
        y, x = divmod(corner, self.stride)
        insets = [(self.inset[a % 4], self.inset[b % 4]) for a, b in ways]
        return [(x + a[0] + b[0], y + a[1] + b[1]) for a, b in insets]

    def _bridge(self, corner, points):
        """Join a hole to the ring at its left: (that ring, its points before the bridge, row, points to insert)."""
        row, right = divmod(corner, self.stride)
        gaps = np.flatnonzero(~self.part[row, :right])
        left = int(gaps[-1]) + 1 if gaps.size else 0
        y = row + (self.low + self.high) / 2
        there, here = (left + self.low, y), (right - 1 + self.high, y)
        return *self.upward[(row + 1) * self.stride + left], row, [there, here, *points, here, there]


def _joined(points, bridges):
    """Insert the points of bridges into a ring: each (points before it, place among those of one edge, points)."""
    found, last = [], 0
    for before, _, more in sorted(bridges):
        found += [*points[last:before], *more]
        last = before
    return found + points[last:]
