"""`audit`: whether everything that a namespace has on a server is as it has to be, at one instant.

found = await audit(broker.url, "mtj")
assert found.violations == []                  # every job is in one place, and nothing lies about without one
assert found.states["mail"][job_id] == "dead"  # where each is that has not ended

It looks at Redis. What has to be so, `backends/redis/keys.py` says.
"""

from mindtrace.jobs.backends.redis.audit import Audit, State, audit

__all__ = ["Audit", "State", "audit"]
