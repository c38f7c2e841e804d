"""Every key of a queue on Redis, and what lies in it.

All keys of a queue begin with its prefix, `<namespace>:{<queue>}:`. The braces are a hash tag: in a Cluster all of them
lie in one slot, and a script touches one queue. Scripts get the prefix as their one key and put the part behind it.

| part              | type | what lies in it                                                    | how long             |
|-------------------|------|--------------------------------------------------------------------|----------------------|
| `spec`            | hash | `kind`, `levels`, `most` as declared; `place`, the last one given  | until deleted        |
| `ready`           | zset | place in 16 digits + id; score: -priority (1)                      | while ready          |
| `scheduled`       | zset | the same members; score: when it is due, ms since the epoch        | while scheduled      |
| `leased`          | zset | receipts; score: when the lease ends, ms. `ZREM` is the fence      | while leased         |
| `jobs`            | hash | id -> body                                                         | until done or purged |
| `states`          | hash | id -> the eight numbers beside the body (2)                        | as `jobs`, see (2)   |
| `errors`          | hash | id -> lines of JSON: the newest failure in full, then ten in short | as `jobs`            |
| `dead`            | zset | ids; score: in which order they died                               | while dead           |
| `deaths`          | hash | id -> `<ms since the epoch> <reason>`                              | while dead           |
| `known:<minute>`  | set  | ids that ended in that minute by the server's clock; two count     | 180 s                |
| `call:<receiver>` | text | the receiver's last call and its answer                            | 300 s after it       |
| `bell`            | list | at most one token, which wakes one receiver; it carries no job     | until taken, or 60 s |
| `watch`           | text | the one idle receiver that sets a timer for the next due job       | 1.5 s                |

(1) Members of one score are in the order of their text, so equal priorities are FIFO; a stack takes from the other end.
(2) Attempts, crashes, releases, number, replays, priority, place, crash limit (-1: the receiver's). They come with the
first receive; before it only for a job with a crash limit, or scheduled with a priority.

Beside the queues, in a slot of its own: `<namespace>:queues`, the set of their names.

A receipt is `<16 hex digits from the caller>:<number>:<id>`.

A waiting job is its member in `ready` and its field in `jobs` and nothing else: about 570 bytes of server memory with
a body of 260. A running one has two small fields more; an id that ended costs about 100 bytes for two to three minutes.
"""

from functools import cached_property

from mindtrace.jobs.job import is_queue_name

DEFAULT_NAMESPACE = "mtj"


class QueueKeys:
    """The keys of one queue that are named outside of scripts.

    Args:
        namespace: what tells applications on one server apart.
        queue: the queue's name.
    """

    def __init__(self, namespace: str, queue: str) -> None:
        self.queue: str = queue
        # What is no name was never declared: its keys are those of a queue that cannot be, and reach no other's.
        self.prefix: str = f"{namespace}:{{{queue if is_queue_name(queue) else '!'}}}:"

    @cached_property
    def spec(self) -> str:
        """How it was declared."""
        return f"{self.prefix}spec"

    @cached_property
    def bell(self) -> str:
        """What an idle receiver waits at."""
        return f"{self.prefix}bell"


def registry(namespace: str) -> str:
    """The set of the names of all queues."""
    return f"{namespace}:queues"
