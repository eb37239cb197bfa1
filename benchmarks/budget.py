"""A limit on the time of a run: repetitions are dropped to keep it, cases never are."""

import time
from collections.abc import Callable, Hashable, Mapping


class TimeBudget:
    """Shares what is left of `seconds` among the items still to do, by their expected cost.

    costs: of each item, in any unit. loads: seconds to set aside for each engine still to be started, by name.
    No limit if `seconds` is None. `clock` returns seconds.
    """

    def __init__(
        self,
        seconds: float | None,
        costs: Mapping[Hashable, float],
        loads: Mapping[str, float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds
        self._costs, self._loads = dict(costs), dict(loads)

    def loaded(self, engine: str) -> None:
        """The engine has been started: its share of the loading time is spent or free."""
        self._loads.pop(engine, None)

    def item(self, key: Hashable) -> "ItemAllowance":
        """Begin `key`: its share of the time left. Each item is begun once."""
        cost = self._costs.pop(key)
        if self._end is None:
            return ItemAllowance(None, self._clock)
        left = max(self._end - self._clock() - sum(self._loads.values()), 0.0)
        share = cost / (cost + sum(self._costs.values())) if cost > 0 else 1.0
        return ItemAllowance(self._clock() + left * share, self._clock)


class ItemAllowance:
    """Until when one item may go on; None is without end."""

    def __init__(self, end: float | None, clock: Callable[[], float]) -> None:
        self._end, self._clock = end, clock

    def affords(self, seconds: float) -> bool:
        """Whether something that takes `seconds` ends in time."""
        return self._end is None or self._clock() + seconds <= self._end
