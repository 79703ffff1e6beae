"""Who gets room in the attention cache, who waits for it, and who has to give it back.

Nothing is set aside for the whole of a session's ``max_length``. The rules:

- *Promises.* A session that begins is promised a part of its ``max_length``: the part that sessions here have come to
  use, a quarter at first. It is admitted when its promise fits beside those of the others, or what these hold where
  that is more. So promises never exceed the cache.
- *Waiting.* Sessions that do not fit wait in line: first those of the peer that has least, then in order of arrival.
  Nobody overtakes the head of the line. At its deadline a session is refused, and told how long the line will take at
  the pace at which room has become free.
- *Growing.* Tokens are counted as steps bring them. A step within its session's promise gets room at once. Beyond it a
  session *borrows* what is free; if nothing is, its step waits in order of the session's arrival, and is refused at its
  deadline, which changes nothing: the session keeps what it has.
- *Giving back.* Where room that was promised is lent, the youngest borrowers lose their cache, as many as it takes. A
  session that has waited to borrow for ``PATIENCE_S`` gets the room of younger ones that wait for the same. So there is
  no deadlock: promises can always be kept, and the oldest that waits always comes to its end. Who loses the cache
  still has its inputs at the client and computes them again.

Amounts are tokens of cache, rounded up to pages by the caller. Values only; times are arguments.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

FIRST_PROMISE: Final = 0.25
"""Part of ``max_length`` that is promised before anything is known of this server's sessions."""
MIN_PROMISE: Final = 0.125
PATIENCE_S: Final = 2.0
"""How long a borrower waits before younger ones have to give way."""
MIN_RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 60.0
_LEARNING_RATES: Final = {False: 1 / 16, True: 1 / 4}
"""Of the promised part, downwards and upwards: promising too little costs computing again, too much only waiting."""
_PACE_TIME_S: Final = 30.0
"""Over about how long the pace at which room becomes free is averaged."""


class Outcome(Enum):
    """What became of somebody who waited, or held something."""

    ADMITTED = auto()
    GROWN = auto()
    REFUSED = auto()
    """Its deadline has passed."""
    EVICTED = auto()
    """Its cache is taken away; the session is over here."""


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """What one session has, is promised, and wants."""

    peer_id: Hashable
    number: int
    """In order of arrival."""
    most: int
    """What it can come to need."""
    num_fixed: int
    """What of that it needs however short it is."""
    promised: int
    held: int = 0
    peak: int = 0
    wanted: int | None = None
    """What it waits to hold."""
    since_s: float = 0.0
    """When it began to wait."""
    deadline_s: float = 0.0
    """Until when it waits."""
    is_admitted: bool = False
    is_busy: bool = False
    """A step is under way, so that nothing can be taken away."""
    is_over: bool = False

    @property
    def committed(self) -> int:
        """What it has or may have at any time."""
        return max(self.held, self.promised)

    @property
    def is_borrower(self) -> bool:
        """Whether it holds more than it was promised."""
        return self.held > self.promised


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A decision about one session."""

    account: Account
    outcome: Outcome
    num_tokens: int = 0
    """What was wanted and is refused."""
    retry_after_s: float | None = None


class Admission:
    """The accounts of one cache of ``total`` tokens.

    After every change the caller asks for :meth:`decide`, and again at :meth:`next_time_s`.
    """

    def __init__(
        self,
        total: int,
        *,
        max_sessions: int,
        default_retry_s: float,
        weight: Callable[[Hashable], float] = lambda peer_id: 1.0,
    ) -> None:
        """``default_retry_s``: what is told while nothing is known. ``weight`` of a peer, positive: its share."""
        self.total = total
        self.promise_share = FIRST_PROMISE
        self.num_evicted = 0
        """Sessions that have lost their cache."""
        self._max_sessions = max_sessions
        self._default_retry_s = default_retry_s
        self._weight = weight
        self._line: list[Account] = []
        self._admitted: dict[int, Account] = {}
        self._pace = _Pace()
        self._num_arrived = 0

    @property
    def held(self) -> int:
        """What all sessions hold."""
        return sum(account.held for account in self._admitted.values())

    @property
    def committed(self) -> int:
        """What all sessions hold or are promised; may exceed the total where promised room is lent."""
        return sum(account.committed for account in self._admitted.values())

    @property
    def num_admitted(self) -> int:
        return len(self._admitted)

    @property
    def num_waiting(self) -> int:
        """Sessions that wait to begin."""
        return len(self._line)

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits for anything."""
        return bool(self._line) or any(account.wanted is not None for account in self._admitted.values())

    # --- what happens -------------------------------------------------------------------------------------------------

    def enter(self, peer_id: Hashable, most: int, *, now_s: float, deadline_s: float, num_fixed: int = 0) -> Account:
        """A session wants to begin.

        ``most``, what it can come to need, is at most the total; ``num_fixed`` of that it needs however short it is.
        """
        account = Account(
            peer_id=peer_id,
            number=self._num_arrived,
            most=most,
            num_fixed=num_fixed,
            promised=num_fixed + max(1, math.ceil((most - num_fixed) * self.promise_share)),
            since_s=now_s,
            deadline_s=deadline_s,
        )
        self._num_arrived += 1
        self._line.append(account)
        return account

    def grow(self, account: Account, wanted: int, *, now_s: float, deadline_s: float) -> bool:
        """An admitted session wants to hold so much in all, for a step; True if it does already."""
        if wanted <= account.held:
            account.is_busy = True
            return True
        account.wanted, account.since_s, account.deadline_s = wanted, now_s, deadline_s
        return False

    def settle(self, account: Account, held: int) -> None:
        """The step is over and the session holds so much, at most what it was given."""
        account.is_busy = False
        account.held = min(account.held, held)

    def stop_waiting(self, account: Account) -> None:
        """What the session waited for is not wanted any more."""
        account.wanted = None
        account.is_busy = False

    def leave(self, account: Account, *, now_s: float) -> None:
        """The session is over; idempotent."""
        if account.is_over:
            return
        account.is_over = True
        if account.is_admitted:
            self._pace.add(account.committed, now_s)
            del self._admitted[account.number]
            if account.peak > account.num_fixed:
                self._learn((account.peak - account.num_fixed) / (account.most - account.num_fixed))
        else:
            self._line.remove(account)

    # --- what is decided ----------------------------------------------------------------------------------------------

    def decide(self, now_s: float) -> list[Verdict]:
        """What becomes of those who wait, and who has to give back."""
        verdicts: list[Verdict] = []
        self._admit(now_s, verdicts)
        self._grow_all(now_s, verdicts)
        for account in [each for each in self._line if each.deadline_s <= now_s]:
            verdicts.append(self._refuse(account, now_s))
            self.leave(account, now_s=now_s)
        for account in self._admitted.values():
            if account.wanted is not None and account.deadline_s <= now_s:
                verdicts.append(self._refuse(account, now_s))
                account.wanted = None
        return verdicts

    def next_time_s(self, now_s: float) -> float | None:
        """When to decide again if nothing happens before; None: never. To be asked behind :meth:`decide`."""
        times = [account.deadline_s for account in self._line]
        for account in self._admitted.values():
            if account.wanted is not None:
                times += (account.deadline_s, account.since_s + PATIENCE_S)
        return min((time_s for time_s in times if time_s > now_s), default=None)

    def retry_after_s(self, shortage: int, now_s: float) -> float:
        """How long it takes until so much has become free, at the pace of the last while."""
        pace = self._pace.per_s(now_s)
        seconds = max(0, shortage) / pace if pace > 0 else self._default_retry_s
        return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)

    def _admit(self, now_s: float, verdicts: list[Verdict]) -> None:
        had: Counter[Hashable] = Counter()
        for account in self._admitted.values():
            had[account.peer_id] += account.committed
        free = self.total - sum(had.values())
        while self._line and len(self._admitted) < self._max_sessions:
            head = self._head(had)
            if head.promised > free and self._admitted:
                return
            self._line.remove(head)
            self._admitted[head.number] = head
            head.is_admitted = True
            had[head.peer_id] += head.promised
            free -= head.promised
            verdicts.append(Verdict(account=head, outcome=Outcome.ADMITTED))

    def _head(self, had: Counter[Hashable]) -> Account:
        return min(self._line, key=lambda each: (had[each.peer_id] / self._weight(each.peer_id), each.number))

    def _grow_all(self, now_s: float, verdicts: list[Verdict]) -> None:
        free = self.total - self.held
        asking = [account for account in self._admitted.values() if account.wanted is not None]
        # What was promised comes before loans, and then who came first.
        asking.sort(key=lambda account: (_is_loan(account), account.number))
        is_blocked = False
        for account in asking:
            if account.wanted is None or account.is_over:  # evicted a moment ago
                continue
            shortage = account.wanted - account.held - free
            if shortage > 0 and not is_blocked:
                victims = self._find_victims(account, shortage, now_s)
                free += sum(victim.held for victim in victims)
                verdicts += [self._evict(victim, now_s) for victim in victims]
                shortage = account.wanted - account.held - free
            if shortage > 0:
                is_blocked = True  # Nobody overtakes.
            elif not is_blocked:
                free -= account.wanted - account.held
                account.held = account.wanted
                account.peak = max(account.peak, account.wanted)
                account.wanted = None
                account.is_busy = True
                verdicts.append(Verdict(account=account, outcome=Outcome.GROWN))

    def _find_victims(self, account: Account, shortage: int, now_s: float) -> list[Account]:
        """Who has to give its cache up for a session that waits; nobody, if that would not be enough yet."""
        others = [each for each in self._admitted.values() if each is not account and not each.is_busy]
        candidates: list[Account] = []
        if not _is_loan(account):
            candidates = [each for each in others if each.is_borrower]
        elif now_s >= account.since_s + PATIENCE_S:
            candidates = [each for each in others if _is_loan(each) and each.number > account.number]
        victims: list[Account] = []
        for victim in sorted(candidates, key=lambda each: -each.number):
            victims.append(victim)
            shortage -= victim.held
            if shortage <= 0:
                return victims
        return []

    def _evict(self, account: Account, now_s: float) -> Verdict:
        self.num_evicted += 1
        self.leave(account, now_s=now_s)
        return Verdict(account=account, outcome=Outcome.EVICTED, retry_after_s=MIN_RETRY_S)

    def _refuse(self, account: Account, now_s: float) -> Verdict:
        if not account.is_admitted:
            num_tokens = account.promised
            ahead = sum(each.promised for each in self._line if each.number <= account.number)
            shortage = ahead - max(0, self.total - self.committed)
        else:
            num_tokens = (account.wanted or 0) - account.held
            shortage = num_tokens - (self.total - self.held)
        return Verdict(
            account=account,
            outcome=Outcome.REFUSED,
            num_tokens=num_tokens,
            retry_after_s=self.retry_after_s(shortage, now_s),
        )

    def _learn(self, share: float) -> None:
        share = self.promise_share + _LEARNING_RATES[share > self.promise_share] * (share - self.promise_share)
        self.promise_share = min(max(share, MIN_PROMISE), 1.0)


def _is_loan(account: Account) -> bool:
    """Whether what it waits for is more than it was promised."""
    return account.wanted is not None and account.wanted > account.promised


class _Pace:
    """How fast room becomes free, lately."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._started_s: float | None = None
        self._last_s = 0.0

    def add(self, amount: int, now_s: float) -> None:
        if self._started_s is None:
            self._started_s = now_s
        self._amount = self._amount * math.exp((self._last_s - now_s) / _PACE_TIME_S) + amount
        self._last_s = now_s

    def per_s(self, now_s: float) -> float:
        """Exponentially weighted mean, over the time since the first amount where that is shorter."""
        if self._started_s is None:
            return 0.0
        seen = max(1.0, now_s - self._started_s)
        amount = self._amount * math.exp((self._last_s - now_s) / _PACE_TIME_S)
        return amount / (_PACE_TIME_S * -math.expm1(-seen / _PACE_TIME_S))
