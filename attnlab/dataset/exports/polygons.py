"""Trace regions as polygons that others' readers fill to the same pixels."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

__all__ = ["trace_parts", "trace_polygons"]

_RIGHT, _DOWN, _LEFT, _UP = range(4)  # directions, in the order of right turns


def trace_parts(regions: np.ndarray, low: float = 0.0, high: float = 1.0) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Trace connected parts of regions along the edges of pixels: region, corner (x, y) of the part's box, polygon.

    Parts are in the order of their first pixels; polygons, float (corner, xy), begin at the corners of the boxes. Holes
    are cut open: a bridge of no width, in the middle of a row of pixels, joins each to what lies left of it.

    Parameters
    ----------
    regions : (row, column) array of int
        What to trace: of each pixel the number of its region, 1, 2, ..., or 0; pixels also connect by their corners.
    low, high : float in 0..1
        Where a left or upper edge lies in its pixel, and a right or lower one: 0 and 1 for readers that fill what lies
        between the edges; both of them inside, at a distance, for readers that fill every pixel that an edge lies in.
    """
    return _Outlines(regions).cut_open(low, high) if regions.any() else []


def trace_polygons(regions: np.ndarray, low: float = 0.0, high: float = 1.0) -> list[list[np.ndarray]]:
    """Trace regions: of each, in the order of their numbers, a polygon, float (corner, xy), per connected part.

    Parameters
    ----------
    regions, low, high
        As in `trace_parts`.
    """
    parts = [[] for _ in range(regions.max(initial=0))]
    for region, corner, polygon in trace_parts(regions, low, high):
        parts[region - 1].append((corner, polygon))
    found = []
    for one in parts:
        corners = [corner for corner, _ in one]
        box = corners[0] if len(corners) == 1 else np.min(corners, axis=0)
        # first within the region, then within the image: sums of floats depend on their order
        found.append([polygon + (corner - box) + box for corner, polygon in one])
    return found


class _Outlines:
    """The outlines of regions: rings of runs, which are edges of a region in a line, with it at their right hand.

    A run begins and ends at a corner (x, y) of pixels, where an outline turns. Runs that go to the right are the first,
    from row to row; then come those that go down, from column to column; those to the left; and those up.
    """

    def __init__(self, regions: np.ndarray):
        self.regions, (self.corners, leaving, arriving) = regions, _find_turns(regions)
        order = np.array([np.arange(len(self.corners)), np.argsort(self.corners[:, 0], kind="stable")] * 2)
        ways, changes = np.array([[_RIGHT], [_DOWN], [_LEFT], [_UP]]), leaving != arriving
        self.way, begin = np.nonzero((changes & (leaving > 0))[ways, order])
        way, end = np.nonzero((changes & (arriving > 0))[ways, order])  # as many, and in the same order
        self.begin, self.end = order[self.way, begin], order[way, end]
        self.owner = leaving[self.way, self.begin]
        left, right = (way - 1, self.end), ((way + 1) % 4, self.end)
        number = np.empty(leaving.shape, int)
        number[self.way, self.begin] = np.arange(len(way))
        # left first, to all of a part that holds together by a corner
        is_left = leaving[left] == self.owner
        self.follow = np.where(is_left, number[left], number[right])
        self.touch = is_left & (leaving[right] == self.owner)
        rings = [*self._walk()]
        self.order, lengths = np.concatenate(rings), [len(ring) for ring in rings]
        self.firsts = np.cumsum([0, *lengths[:-1]])  # place in `order` where each ring begins
        self.ring_of, self.before = np.empty((2, len(way)), int)  # of each run its ring, and the points before it
        self.ring_of[self.order] = np.repeat(np.arange(len(rings)), lengths)
        points = 1 + self.touch[self.order]
        self.before[self.order] = np.cumsum(points) - points

    def _walk(self) -> Iterator[list[int]]:
        """Yield rings from left to right, each from its highest run on that goes right, of a hole the first down."""
        follow, seen = self.follow.tolist(), bytearray(len(self.way))
        upright = np.flatnonzero(self.way % 2)
        for start in upright[np.argsort(self.corners[self.begin[upright], 0], kind="stable")].tolist():
            ring, run = [], start
            while not seen[run]:
                seen[run] = True
                ring.append(run)
                run = follow[run]
            if ring:
                first = ring.index(min(ring)) if self.way[start] == _UP else 0
                yield ring[first:] + ring[:first]

    def cut_open(self, low: float, high: float) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """List connected parts, with every hole at its bridge."""
        starts = self.order[self.firsts]
        bridges = self._bridges(starts)
        left = np.minimum.reduceat(self.corners[self.begin[self.order], 0], self.firsts)
        boxes = np.array([left, self.corners[self.begin[starts], 1]]).T
        for number, (run, *_) in bridges.items():
            boxes[number] = boxes[self.ring_of[run]]
        points, cuts = self._points(boxes, low, high), [*self.before[starts].tolist(), None]
        rings = [points[a:b] for a, b in pairwise(cuts)]
        bridged = [[] for _ in rings]
        for number in range(len(rings) - 1, -1, -1):  # bridges lead to the left
            rings[number] = _joined(rings[number], bridged[number])
            if number in bridges:
                run, row, left, right = bridges[number]
                (x, y), to = boxes[number], self.ring_of[run]
                y = row - y + (low + high) / 2
                ends = [(left - x + low, y), (right - x - 1 + high, y)]
                place = self.before[run] - self.before[starts[to]]
                bridged[to].append((place, -row, [ends, rings[number], ends[::-1]]))
        outer = sorted({*range(len(rings))} - {*bridges}, key=starts.__getitem__)  # by the first pixels of parts
        return [(int(self.owner[starts[n]]), boxes[n], rings[n]) for n in outer]

    def _bridges(self, starts):
        """Join holes to what lies left of them: {ring: (run there, row of pixels between, its first and its end)}."""
        found, holes = {}, np.flatnonzero(self.way[starts] == _DOWN).tolist()
        if not holes:
            return found
        rows, first = len(self.regions) + 1, np.searchsorted(self.way, _UP)
        tops = self.corners[self.end[first:]] @ (rows, 1)
        for ring in holes:
            right, row = self.corners[self.begin[starts[ring]]].tolist()
            gaps = np.flatnonzero(self.regions[row, :right] != self.owner[starts[ring]])
            left = int(gaps[-1]) + 1 if gaps.size else 0
            found[ring] = first + np.searchsorted(tops, left * rows + row, "right") - 1, row, left, right
        return found

    def _points(self, boxes, low, high):
        """List the points (x, y) at the ends of runs, ring by ring: two where pixels touch by a corner."""
        inset = np.array([(0, low), (high - 1, 0), (0, high - 1), (low, 0)])  # of a direction's edges, from the corners
        way, touch = self.way[self.order], self.touch[self.order]
        local = self.corners[self.end[self.order]] - boxes[self.ring_of[self.order]]
        if not touch.any():
            return local + inset[way] + inset[self.way[self.follow[self.order]]]
        after = np.where(touch, (way + 1) % 4, self.way[self.follow[self.order]])
        points = np.repeat(local + inset[way] + inset[after], 1 + touch, axis=0)
        points[self.before[self.order[touch]] + 1] = (local + inset[way - 2] + inset[way - 1])[touch]
        return points


def _find_turns(regions):
    """Return corners (x, y) of pixels where outlines turn, and the regions of edges that leave and that arrive there.

    Those are 0 where there is no edge, and have the shape (direction, corner).
    """
    wide = np.zeros(np.add(regions.shape, 2), regions.dtype)
    wide[1:-1, 1:-1] = regions
    row, flat = wide.shape[1], wide.ravel()  # numpy is fastest without rows, and these end and begin with 0
    upright, level = flat[1:] != flat[:-1], flat[row:] != flat[:-row]
    turns = np.flatnonzero((upright[row:] | upright[:-row]) & (level[1:] | level[:-1]))
    around = flat[turns + np.array([0, 1, row + 1, row, 0, 1, row + 1])[:, None]]  # clockwise, from the upper left on
    leaving, arriving = around[2:6], around[3:7]  # at the right hand; at the left are those before
    return (
        np.array([turns % row, turns // row]).T,
        np.where(leaving != around[1:5], leaving, 0),
        np.where(arriving != around[:4], arriving, 0),
    )


def _joined(points, bridges):
    """Insert the points of bridges into a ring: each (points before it, place among those of one edge, points)."""
    found, last = [], 0
    for before, _, more in sorted(bridges):
        found += [points[last:before], *more]
        last = before
    return np.concatenate([*found, points[last:]]) if found else points
