"""A limit on the time of a run: repetitions are dropped to keep it, of the longest cases first; cases never are."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

# Around the runs of an item, whatever its size: a cache, captured graphs.
ITEM_SECONDS = 0.5


@dataclass(frozen=True)
class Item:
    """One case to measure. engine: by name. setup: cost of getting ready, once: of a repetition, in any one unit."""

    engine: str
    setup: float
    once: float


class TimeBudget:
    """Says whether another repetition fits into `seconds`, beside what the items still to come need.

    items: all that will be measured, by any key. rates: seconds a unit of cost that each engine is expected to take;
    what was measured corrects them. loads: seconds to set aside for each engine still to be started. No limit if
    `seconds` is None. `clock` returns seconds.
    """

    def __init__(
        self,
        seconds: float | None,
        items: Mapping[Hashable, Item],
        rates: Mapping[str, float],
        loads: Mapping[str, float],
        repeats: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._repeats = clock, repeats
        self._end = None if seconds is None else clock() + seconds
        self._to_come, self._expected, self._loads = dict(items), dict(rates), dict(loads)
        self._spent: dict[str, tuple[float, float]] = {}  # by engine: seconds measured, and the cost of what took them

    def loaded(self, engine: str) -> None:
        """The engine has been started: the time set aside for that is spent or free."""
        self._loads.pop(engine, None)

    def begin(self, key: Hashable) -> "Allowance":
        """`key` is measured now. Each item is begun once."""
        return Allowance(self, self._to_come.pop(key))

    def affords(self, item: Item, number: int, took: float) -> bool:
        """Whether repetition `number` of `item` may run, when the one before took that many seconds.

        Cheaper items still to come keep the time for all of their repetitions, equal ones for as many as this one,
        dearer ones for one.
        """
        seconds, cost = self._spent.get(item.engine, (0.0, 0.0))
        self._spent[item.engine] = seconds + took, cost + item.once
        if self._end is None:
            return True
        reserved = sum(self._loads.values())
        for other in self._to_come.values():
            times = self._repeats if other.once < item.once else number if other.once == item.once else 1
            reserved += (other.setup + times * other.once) * self._rate(other.engine) + ITEM_SECONDS
        return self._clock() + took + reserved <= self._end

    def _rate(self, engine: str) -> float:
        """Seconds a unit of cost on this engine: as measured, or as expected, times how wrong that was for others."""
        if engine in self._spent:
            seconds, cost = self._spent[engine]
            return seconds / cost
        known = [seconds / cost / self._expected[name] for name, (seconds, cost) in self._spent.items()]
        return self._expected[engine] * (sum(known) / len(known) if known else 1.0)


class Allowance:
    """The budget as one item sees it."""

    def __init__(self, budget: TimeBudget, item: Item) -> None:
        self._budget, self._item, self._done = budget, item, 0

    def another(self, took: float) -> bool:
        """Whether there is time for one more repetition, after one that took `took` seconds."""
        self._done += 1
        return self._budget.affords(self._item, self._done + 1, took)
