"""How often a server is shown a login that it has refused: so seldom that no account is locked for it.

A session that is lost connects again within seconds, for ever. With a password that the server does not take any more
that would be a login that fails every few seconds, and whoever keeps the accounts (a Windows domain, a server of its
own) commonly locks one after 5 tries within 10 to 15 minutes: then nobody gets in, the operator's own client neither.

So the pauses after a refusal grow: 2 s, 30 s, then 5 minutes each, and in no 15 minutes there are more than 4 tries.
The first two are for mistakes that mend themselves: a PLC that has just started may refuse everybody until it has
loaded its users. After the fourth refusal the two rules together make one pause of nearly ten minutes, the later ones
are of five again. Pauses are prolonged at random, so that the clients of a plant do not come all at once.

What a person does ends a pause at once: another password, key or user certificate in the place where the configuration
says that it is, and a reload (`Session.retry_now`). Another secret begins with the short pauses again, but its tries
count beside those before it: accounts are locked by the number of tries, whatever was tried.

Each server of a redundant set counts for itself. Not held back are anonymous sessions, which have no account, and
refusals of anything else than the login: those of certificates, policies, for lack of room, and of the network.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable

PAUSES_S = (2.0, 30.0, 300.0)  # after the first refusal of a secret, the second, and each further one
MOST_TRIES, WINDOW_S = 4, 900.0
LONGER = 1.2  # pauses are of up to so many times their length


class Refusals:
    """The refused logins at one endpoint.

    Secrets are told apart by marks, which say nothing about them (`Login.mark`).

    Parameters
    ----------
    rng : how much longer a pause is
    clock : monotonic, s

    Attributes
    ----------
    what : why the last login was refused; empty where none was since the last one that was taken
    in_a_row : refusals of the present secret
    """

    def __init__(self, rng: random.Random, clock: Callable[[], float] = time.monotonic) -> None:
        self.what = ""
        self.in_a_row = 0
        self._rng, self._clock = rng, clock
        self._mark = b""
        self._next = 0.0
        self._tries: deque[float] = deque(maxlen=MOST_TRIES)

    def refused(self, mark: bytes, what: str) -> None:
        """Take note that the server has refused this secret, for this reason."""
        if mark != self._mark:
            self._mark, self.in_a_row = mark, 0
        self.what = what
        self.in_a_row += 1
        now = self._clock()
        self._tries.append(now)
        pause_s = PAUSES_S[min(self.in_a_row, len(PAUSES_S)) - 1] * self._rng.uniform(1.0, LONGER)
        self._next = now + pause_s
        if len(self._tries) == MOST_TRIES:
            self._next = max(self._next, self._tries[0] + WINDOW_S)

    def taken(self) -> None:
        """Take note that the server has let us in."""
        self.what, self.in_a_row, self._mark = "", 0, b""
        self._tries.clear()

    def forgive(self) -> None:
        """Let the next try be made at once; how many there were is not forgotten."""
        self._next = 0.0

    @property
    def news(self) -> bool:
        """Whether one more refusal is worth telling: the pauses still change."""
        return self.in_a_row <= MOST_TRIES

    def left_s(self, mark: bytes) -> float:
        """Return for how long this secret is not to be shown to the server, 0 where it may be."""
        return max(0.0, self._next - self._clock()) if self.what and mark == self._mark else 0.0
