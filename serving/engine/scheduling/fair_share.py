"""Whose turn it is: denoise steps shared out between tenants by weight. Plain Python.

Each tenant has an account of the work that it was given, divided by its weight; the tenant with the
lowest account is next. One that was idle starts at the account of those who worked meanwhile, so
that nobody saves up turns. Known as start-time fair queueing (Goyal, Vin, Cheng 1996).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Account:
    weight: float
    used: float
    requests: int = 0


class FairShare:
    """The accounts of the tenants that have requests."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._now = 0.0
        """Account of the tenant that was served last: where newcomers start."""

    def enter(self, tenant: str, weight: float) -> None:
        """Counts a request of a tenant; the weight of its newest request holds."""
        if not weight > 0:
            raise ValueError(f"weight must be above 0, got {weight}")
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(weight, self._now)
        elif account.requests == 0:
            account.used = max(account.used, self._now)
        account.weight = weight
        account.requests += 1

    def leave(self, tenant: str) -> None:
        """Takes back one `enter`."""
        account = self._accounts[tenant]
        account.requests -= 1
        # Whoever is ahead of the others stays known, or leaving would be a way to be served more.
        for name in [
            n for n, a in self._accounts.items() if not a.requests and a.used <= self._now
        ]:
            del self._accounts[name]

    def charge(self, tenant: str, work: float) -> None:
        """Writes work down that a tenant was given."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.used += work / account.weight
            self._now = max(self._now, min(a.used for a in self._accounts.values() if a.requests))

    def used(self, tenant: str) -> float:
        """The account of a tenant; the lowest is next."""
        return self._accounts[tenant].used
