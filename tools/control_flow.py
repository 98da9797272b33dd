"""The path that a program takes through its machine code: basic blocks, loops, and the cheapest
way from entry to exit through the loops that do the work.

Compilers move rare code behind its loop, so the text between a loop's first and last instruction
is not what one iteration executes. Loops here are natural loops of the control-flow graph, and the
instructions of the cheapest path are counted.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Cost = dict[int, float]  # how often a block is executed
Ways = dict[tuple[int, int], Cost]  # by the block where they end, and what they have passed


@dataclass(frozen=True)
class Through:
    """What a path must pass: a loop, or blocks where ``trips`` is empty, that holds instructions
    whose names begin with these (regular expressions), at least so many of each; 0: none.

    Of the loops that do, inside ``len(trips) - 1`` others, the cheapest runs ``trips[0]`` times,
    the loop around it ``trips[1]`` times and so on. A loop within it is rare, and skipped. A
    ``share`` of a loop's iterations passes the blocks."""

    holds: Mapping[str, int]
    trips: tuple[float, ...] = ()
    share: float = 1.0

    def passes(self, counted: Mapping[str, int]) -> bool:
        return all(
            number(counted, pattern) >= least if least else number(counted, pattern) == 0
            for pattern, least in self.holds.items()
        )


def number(counted: Mapping[str, int], pattern: str) -> int:
    """How many instructions have a name that begins with ``pattern`` (a regular expression)."""
    return sum(times for name, times in counted.items() if re.match(pattern, name))


@dataclass(frozen=True, eq=False)
class Loop:
    head: int
    blocks: frozenset[int]


class Graph:
    """The control-flow graph of one kernel, from the output of ``nvdisasm -c``."""

    def __init__(self, text: str) -> None:
        self.instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(self.instructions)
            elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                self.instructions.append(code[1])
        targets: dict[int, int] = {}
        leaders = {0, *labels.values()}
        for place, code in enumerate(self.instructions):
            # Calls of functions return, and count as one instruction.
            if jump := re.search(r"\b(?:BRA|CALL)\b.*`\((\.L_x_\d+)\)", code):
                targets[place] = labels[jump[1]]
                leaders.add(place + 1)
            elif re.search(r"\b(EXIT|RET)\b", code):
                leaders.add(place + 1)
        starts = sorted(place for place in leaders if place < len(self.instructions))
        self.spans = list(zip(starts, [*starts[1:], len(self.instructions)], strict=True))
        at = {start: block for block, start in enumerate(starts)}
        self.successors: list[tuple[int, ...]] = []
        self.ends: set[int] = set()  # blocks where the program may end
        for block, (_, end) in enumerate(self.spans):
            last = self.instructions[end - 1]
            found = [at[targets[end - 1]]] if end - 1 in targets else []
            always = end - 1 in targets or re.search(r"\b(EXIT|RET)\b", last)
            conditional = re.search(r"\bU?P\d|\.(DIV|CONV)\b", last.split("`")[0])
            if (not always or conditional) and end in at:
                found.append(at[end])
            self.successors.append(tuple(dict.fromkeys(found)))
            if not found or re.search(r"\bEXIT\b", last):
                self.ends.add(block)

    def names(self, cost: Mapping[int, float]) -> Counter[str]:
        """Instructions by their full names."""
        total: Counter[str] = Counter()
        for block, times in cost.items():
            for code in self.instructions[slice(*self.spans[block])]:
                total[re.sub(r"^@!?U?P\w+\s+", "", code).split()[0]] += times
        return total

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """Natural loops; those with one head are one. Loops that wait for a barrier are left out:
        they are passed once."""
        dominators = self._dominators()
        latches: dict[int, set[int]] = {}
        for block, following in enumerate(self.successors):
            for head in following:
                if head in dominators.get(block, ()):
                    latches.setdefault(head, set()).add(block)
        before: dict[int, list[int]] = {}
        for block, following in enumerate(self.successors):
            for after in following:
                before.setdefault(after, []).append(block)
        found = []
        for head, ends in latches.items():
            inside, todo = {head}, list(ends)
            while todo:
                if (block := todo.pop()) not in inside:
                    inside.add(block)
                    todo += [x for x in before.get(block, ()) if x in dominators]
            names = self.names(dict.fromkeys(inside, 1))
            if len(inside) > 3 or not number(names, "SYNCS.*TRYWAIT|NANOSLEEP"):
                found.append(Loop(head, frozenset(inside)))
        return sorted(found, key=lambda loop: (len(loop.blocks), loop.head))

    def _dominators(self) -> dict[int, frozenset[int]]:
        """Of every block that can be reached: the blocks on all paths to it."""
        order, seen, stack = [], {0}, [(0, iter(self.successors[0]))]
        while stack:
            block, rest = stack[-1]
            if (after := next((x for x in rest if x not in seen), None)) is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(after)
                stack.append((after, iter(self.successors[after])))
        order.reverse()
        before: dict[int, list[int]] = {}
        for block in order:
            for after in self.successors[block]:
                before.setdefault(after, []).append(block)
        everything = frozenset(order)
        found = dict.fromkeys(order, everything) | {0: frozenset([0])}
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                common = frozenset.intersection(*(found[x] for x in before[block])) | {block}
                changed |= common != found[block]
                found[block] = common
        return found

    @functools.cached_property
    def innermost(self) -> list[Loop]:
        heads = {loop.head for loop in self.loops}
        return [loop for loop in self.loops if not heads & (loop.blocks - {loop.head})]

    def iteration(self, loop: Loop) -> Counter[str]:
        """What one iteration executes, on its cheapest path."""
        return self.names(_Paths(self, ()).iteration(loop))

    def loop(self, through: Through) -> Counter[str]:
        """One iteration of the loop that ``through`` selects."""
        return self.iteration(_Paths(self, ()).choose(through))

    def executed(self, through: tuple[Through, ...]) -> Counter[str]:
        """The instructions of one thread on the cheapest path from entry to exit that passes all
        of ``through``."""
        return self.names(_Paths(self, through).program())


class _Paths:
    """Cheapest paths. What they have passed is a set of bits, one for each of ``through``."""

    def __init__(self, graph: Graph, through: tuple[Through, ...]) -> None:
        self.graph, self.through = graph, through
        self.heads = {loop.head: loop for loop in graph.loops}
        self.bits = [0] * len(graph.spans)
        self.trips: dict[int, float] = {}  # of a loop, by its head
        self.found: dict[int, Ways] = {}
        for number, each in enumerate(through):
            inside: Iterable[int] = range(len(graph.spans))
            if each.trips:
                inside = self.choose(each).blocks
                each = Through({pattern: 1 for pattern, least in each.holds.items() if least})
            blocks = [n for n in inside if each.passes(graph.names({n: 1}))]
            assert blocks, f"no block holds {each.holds}"
            for block in blocks:
                self.bits[block] |= 1 << number

    def choose(self, each: Through) -> Loop:
        """Returns the loop that ``each`` selects; stores how often it and those around it run."""
        graph, found, others = self.graph, [], []
        for loop in graph.loops:
            around = [outer for outer in graph.loops if loop.blocks <= outer.blocks]
            counted = graph.iteration(loop)
            if len(around) == len(each.trips) and each.passes(counted):
                found.append((counted.total(), loop.head, loop, around))
            others.append((len(around), counted))
        assert found, (
            f"no loop, {len(each.trips)} with those around it, holds {each.holds}: {others}"
        )
        _, _, chosen, around = min(found)
        for loop, trips in zip(around, each.trips, strict=True):
            assert self.trips.setdefault(loop.head, trips) == trips, f"{each.holds}: {trips}"
        return chosen

    def program(self) -> Cost:
        everything = (1 << len(self.through)) - 1
        ways = {passed: cost for (_, passed), cost in self._ways(0, None).items()}
        assert everything in ways, f"no path passes all of {self.through}"
        cost = ways[everything]
        for head in cost.keys() & (self.heads.keys() - self.trips.keys()):
            names = self.graph.iteration(self.heads[head])
            raise AssertionError(f"how often does this loop run? {dict(names.most_common(8))}")
        return cost

    def iteration(self, loop: Loop) -> Cost:
        ways = self._region(loop)
        return min((cost for (to, _), cost in ways.items() if to == loop.head), key=self._price)

    def _price(self, cost: Cost) -> float:
        spans = self.graph.spans
        return sum(times * (spans[block][1] - spans[block][0]) for block, times in cost.items())

    def _region(self, loop: Loop) -> Ways:
        if loop.head not in self.found:
            self.found[loop.head] = self._ways(loop.head, loop)
        return self.found[loop.head]

    def _ways(self, start: int, within: Loop | None) -> Ways:
        """The cheapest ways through a loop (the whole program: None) from its head to where it is
        left or begins again, by what they pass. A loop further inside is one step."""
        heap: list[tuple[float, int, int, int, Cost]] = [(0, 0, start, 0, {})]
        done: set[tuple[int, int]] = set()
        found: Ways = {}
        number = 0
        while heap:
            _, _, block, passed, cost = heapq.heappop(heap)
            if (block, passed) in done:
                continue
            done.add((block, passed))
            for (to, bits), step in self._steps(block, within).items():
                now = passed | bits
                total = {**cost, **{n: cost.get(n, 0) + times for n, times in step.items()}}
                price = self._price(total)
                if to == start or to < 0 or (within is not None and to not in within.blocks):
                    if (to, now) not in found or price < self._price(found[to, now]):
                        found[to, now] = total
                else:
                    number += 1
                    heapq.heappush(heap, (price, number, to, now, total))
        return found

    def _steps(self, block: int, within: Loop | None) -> Ways:
        inner = self.heads.get(block)
        if inner is None or inner is within:
            after = self.graph.successors[block] + ((-1,) if block in self.graph.ends else ())
            return {(to, self.bits[block]): {block: 1} for to in after}
        ways = self._region(inner)
        again = {bits: cost for (to, bits), cost in ways.items() if to == block}
        leaving = {way: cost for way, cost in ways.items() if way[0] != block}
        times = self.trips.get(block)
        if times is None:  # how often it runs is unknown: what it holds does not count as passed
            return {(to, 0): cost for (to, _), cost in leaving.items()}
        most = max(again, key=int.bit_count)
        usual = self._iteration(again, most)
        steps: Ways = {}
        for (to, bits), cost in leaving.items():
            # The last iteration ends where the loop is left, at its end or before its work.
            full = times - 1 if bits & most == most else times
            step = {n: full * each for n, each in usual.items()}
            for n, each in cost.items():
                step[n] = step.get(n, 0) + each
            way = to, bits | most
            if way not in steps or self._price(step) < self._price(steps[way]):
                steps[way] = step
        return steps

    def _iteration(self, again: Mapping[int, Cost], passed: int) -> Cost:
        """What an iteration of a loop executes on average, by the ways through it."""
        cost = again[passed]
        for bit, each in enumerate(self.through):
            without = again.get(passed & ~(1 << bit))
            if each.share < 1 and without is not None:
                blocks = cost.keys() | without.keys()
                cost = {
                    n: each.share * cost.get(n, 0) + (1 - each.share) * without.get(n, 0)
                    for n in blocks
                }
        return cost
