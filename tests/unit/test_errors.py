"""What every error promises: where it stands in the tree, whether the call may be repeated, and what became of it."""

import pytest

import mindtrace.jobs
from mindtrace.jobs import (
    AuthenticationFailed,
    BackendFull,
    BackendUnavailable,
    Closed,
    ConfigError,
    Discard,
    ForkedProcess,
    InputInvalid,
    JobNotFound,
    JobsError,
    JobSignal,
    LeaseLost,
    NotSupported,
    PayloadTooLarge,
    PublishIncomplete,
    QueueFull,
    QueueInUse,
    QueueMismatch,
    QueueNotFound,
    Reject,
    RetryLater,
    RunCrashed,
    RunFailed,
    RunTimeout,
    Snooze,
    UnsafeBackend,
    WouldDeadlock,
)
from mindtrace.jobs.errors import Refused, RunAborted, UnknownSchema, described

A_FIELD_ERROR = {"type": "int_parsing", "loc": ("orders", 3, "amount"), "msg": "Input should be a valid integer"}

ERRORS: list[tuple[JobsError, bool, str]] = [  # an error, whether the same call may succeed later, what became of it
    (ConfigError("priority=3.5"), False, "not_done"),
    (InputInvalid("orders", [A_FIELD_ERROR]), False, "not_done"),
    (PayloadTooLarge("input", 3, 2), False, "not_done"),
    (NotSupported("stack", "rabbitmq", "Local or Redis"), False, "not_done"),
    (QueueNotFound("orders"), False, "not_done"),
    (QueueMismatch("orders", {"kind": ("fifo", "stack")}), False, "not_done"),
    (QueueInUse("orders", {"leased": 2, "dead": 1}), False, "not_done"),
    (UnsafeBackend("maxmemory-policy allkeys-lru"), False, "not_done"),
    (QueueFull("orders", 10), True, "not_done"),
    (BackendFull("used memory > maxmemory"), True, "not_done"),
    (BackendUnavailable("no broker"), True, "not_done"),
    (BackendUnavailable("no answer", maybe_published=True, job_ids=["a"]), True, "unknown"),
    (AuthenticationFailed("WRONGPASS"), False, "not_done"),
    (AuthenticationFailed("NOPERM", maybe_published=True, job_ids=["a"]), False, "unknown"),
    (PublishIncomplete(["a"], {1: QueueFull("orders", 10)}), True, "unknown"),
    (LeaseLost("an-id"), False, "not_done"),
    (JobNotFound("an-id"), False, "not_done"),
    (Closed("not open"), False, "not_done"),
    (WouldDeadlock("on the loop that would serve it"), False, "not_done"),
    (ForkedProcess("opened in the parent"), False, "not_done"),
    (RunTimeout(5.0), False, "not_done"),
    (RunAborted("cancelled itself"), False, "not_done"),
    (RunCrashed("ended by SIGKILL"), False, "not_done"),
    (RunFailed("KeyError", "no", "", "", []), False, "not_done"),
    (Refused("malformed", "not JSON"), False, "not_done"),
    (UnknownSchema("orders", 1.0, 2.0), False, "not_done"),
]
SIGNALS: list[JobSignal] = [RetryLater(), Snooze(1.0), Discard(), Reject("no")]


def name_of(value: object) -> str | None:
    return type(value).__name__ if isinstance(value, Exception) else None


def exported(kind: type[Exception]) -> set[str]:
    found = {name: getattr(mindtrace.jobs, name) for name in mindtrace.jobs.__all__}
    return {name for name, value in found.items() if isinstance(value, type) and issubclass(value, kind)}


# --- one tree


def test_every_exported_error_is_looked_at_here() -> None:
    assert exported(JobsError) <= {type(error).__name__ for error, _, _ in ERRORS} | {"JobsError"}
    assert exported(JobSignal) == {type(signal).__name__ for signal in SIGNALS} | {"JobSignal"}


@pytest.mark.parametrize(("error", "retryable", "outcome"), ERRORS, ids=name_of)
def test_an_error_says_whether_to_call_again_and_what_became_of_the_call(
    error: JobsError, retryable: bool, outcome: str
) -> None:
    assert (error.retryable, error.outcome) == (retryable, outcome)
    assert isinstance(error, JobsError)
    assert str(error)


def test_a_refused_login_is_caught_where_an_absent_broker_is_and_is_no_reason_to_try_again() -> None:
    assert BackendUnavailable("no broker").retryable
    with pytest.raises(BackendUnavailable) as refused:
        raise AuthenticationFailed("WRONGPASS")
    assert not refused.value.retryable


def test_an_error_is_not_retryable_unless_it_says_so() -> None:
    class Own(JobsError):
        pass

    assert (Own().retryable, Own().outcome) == (False, "not_done")


STANDARD: tuple[type[Exception], ...] = (ValueError, TimeoutError, RuntimeError)


@pytest.mark.parametrize(("error", "retryable", "outcome"), ERRORS, ids=name_of)
def test_an_error_is_what_a_program_without_our_names_would_catch(
    error: JobsError, retryable: bool, outcome: str
) -> None:
    expected = {
        ConfigError: {ValueError},
        RunTimeout: {TimeoutError},
        Closed: {RuntimeError},
        WouldDeadlock: {RuntimeError},
        ForkedProcess: {RuntimeError},
    }.get(type(error), set[type[Exception]]())
    assert {kind for kind in STANDARD if isinstance(error, kind)} == expected


@pytest.mark.parametrize("signal", SIGNALS, ids=name_of)
def test_a_signal_passes_an_except_for_our_errors(signal: JobSignal) -> None:
    assert isinstance(signal, JobSignal)
    assert isinstance(signal, Exception)
    assert not isinstance(signal, JobsError)


# --- the facts


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (InputInvalid("orders", [A_FIELD_ERROR]), {"schema": "orders", "errors": [A_FIELD_ERROR]}),
        (PayloadTooLarge("headers", 9000, 8192), {"what": "headers", "size": 9000, "limit": 8192}),
        (
            NotSupported("stack", "rabbitmq", "Local or Redis"),
            {"feature": "stack", "backend": "rabbitmq", "needs": "Local or Redis"},
        ),
        (QueueNotFound("orders"), {"queue": "orders"}),
        (
            QueueMismatch("orders", {"max_length": (None, 5)}),
            {"queue": "orders", "differences": {"max_length": (None, 5)}},
        ),
        (QueueInUse("orders", {"leased": 2, "dead": 1}), {"queue": "orders", "counts": {"leased": 2, "dead": 1}}),
        (QueueFull("orders", 10), {"queue": "orders", "limit": 10}),
        (BackendUnavailable("no broker"), {"maybe_published": False, "job_ids": ()}),
        (
            BackendUnavailable("no answer", maybe_published=True, job_ids=["a", "b"]),
            {"maybe_published": True, "job_ids": ("a", "b")},
        ),
        (AuthenticationFailed("WRONGPASS"), {"maybe_published": False, "job_ids": ()}),
        (LeaseLost("an-id"), {"job_id": "an-id"}),
        (JobNotFound("an-id"), {"job_id": "an-id"}),
        (RunTimeout(1.5), {"timeout": 1.5}),
        (
            RunFailed("KeyError", "no", "frames", "run, a.py:1", ["builtins:KeyError"]),
            {"type": "KeyError", "message": "no", "traceback": "frames", "place": "run, a.py:1"},
        ),
        (Refused("too_large", "9 bytes"), {"reason": "too_large"}),
        (UnknownSchema("orders", 1.5, 60.0), {"schema_name": "orders", "waited": 1.5, "patience": 60.0}),
        (RetryLater(), {"delay": None, "reason": ""}),
        (RetryLater(2.5, "busy"), {"delay": 2.5, "reason": "busy"}),
        (Snooze(2.5), {"delay": 2.5, "reason": ""}),
        (Snooze(2.5, "not yet"), {"delay": 2.5, "reason": "not yet"}),
        (Discard(), {"reason": ""}),
        (Discard("old"), {"reason": "old"}),
        (Reject("no such customer"), {"reason": "no such customer"}),
    ],
    ids=name_of,
)
def test_the_facts_are_attributes(error: Exception, facts: dict[str, object]) -> None:
    assert {name: getattr(error, name) for name in facts} == facts
    assert str(error)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputInvalid("orders", [A_FIELD_ERROR]), ["'orders'", "orders.3.amount", "Input should be a valid integer"]),
        (PayloadTooLarge("headers", 9000, 8192), ["headers", "9000", "8192"]),
        (NotSupported("stack", "rabbitmq", "Local or Redis"), ["stack", "rabbitmq", "needs Local or Redis"]),
        (QueueNotFound("orders"), ["'orders'", "declare", "register"]),
        (
            QueueMismatch("orders", {"kind": ("fifo", "stack"), "max_length": (None, 5)}),
            ["'orders'", "kind is 'fifo', not 'stack'", "max_length is None, not 5"],
        ),
        (QueueInUse("orders", {"leased": 2, "dead": 1}), ["'orders'", "2 leased", "1 dead", "force=True"]),
        (QueueFull("orders", 10), ["'orders'", "10"]),
        (LeaseLost("an-id"), ["'an-id'", "lost"]),
        (JobNotFound("an-id"), ["'an-id'"]),
        (RunTimeout(1.5), ["1.5 s"]),
        (UnknownSchema("orders", 90.4, 60.0), ["the schema 'orders'", "90 s"]),
        (UnknownSchema("", 90.4, 60.0), ["its wire format", "90 s"]),
        (RetryLater(2.5, "busy"), ["busy"]),
        (Snooze(2.5), ["2.5 s"]),
        (Reject("no such customer"), ["no such customer"]),
    ],
    ids=name_of,
)
def test_the_text_names_what_and_what_to_do(error: Exception, words: list[str]) -> None:
    assert [word for word in words if word not in str(error)] == []


def test_facts_are_a_copy_of_what_was_passed_in() -> None:
    ids, failures, counts, differences = ["a"], {1: QueueFull("q", 1)}, {"dead": 1}, {"kind": ("a", "b")}
    incomplete, in_use = PublishIncomplete(ids, failures), QueueInUse("q", counts)
    mismatch = QueueMismatch("q", differences)
    for passed in (ids, failures, counts, differences):
        passed.clear()
    assert (incomplete.ids, list(incomplete.failures)) == (["a"], [1])
    assert (in_use.counts, mismatch.differences) == ({"dead": 1}, {"kind": ("a", "b")})


# --- a batch


UNKNOWN = BackendUnavailable("no answer", maybe_published=True, job_ids=["b"])
REFUSED = QueueFull("orders", 10)


@pytest.mark.parametrize(
    ("ids", "failures", "outcome"),
    [
        ([], {0: REFUSED, 1: REFUSED}, "not_done"),
        ([], {0: REFUSED, 1: UNKNOWN}, "unknown"),
        ([], {0: UNKNOWN}, "unknown"),
        (["a"], {1: REFUSED}, "unknown"),
        (["a"], {1: UNKNOWN}, "unknown"),
    ],
)
def test_a_batch_of_which_something_may_be_stored_is_no_batch_that_was_not(
    ids: list[str], failures: dict[int, JobsError], outcome: str
) -> None:
    assert PublishIncomplete(ids, failures).outcome == outcome


def test_an_incomplete_batch_lists_what_is_stored_and_each_failure_with_its_own_outcome() -> None:
    error = PublishIncomplete(["a", "d"], {2: UNKNOWN, 1: REFUSED})
    assert error.ids == ["a", "d"]
    assert {index: failure.outcome for index, failure in error.failures.items()} == {1: "not_done", 2: "unknown"}
    assert str(error).startswith("2 of 4 jobs")
    assert "index 1: the queue 'orders' is full" in str(error)


# --- field errors in one line


def test_field_errors_are_named_by_their_path_and_the_whole_input_as_such() -> None:
    whole = {"type": "model_type", "loc": (), "msg": "Input should be an object"}
    assert described([A_FIELD_ERROR, whole]) == (
        "orders.3.amount: Input should be a valid integer; input: Input should be an object"
    )


@pytest.mark.parametrize(("count", "shown", "rest"), [(5, 5, ""), (6, 5, "; and 1 more"), (500, 5, "; and 495 more")])
def test_five_field_errors_are_shown_and_the_rest_counted(count: int, shown: int, rest: str) -> None:
    errors = [{**A_FIELD_ERROR, "loc": (index,)} for index in range(count)]
    text = str(InputInvalid("orders", errors))
    assert text.count("Input should be") == shown
    assert text.endswith(f"4: Input should be a valid integer{rest}")
    assert len(InputInvalid("orders", errors).errors) == count
