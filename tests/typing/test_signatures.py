"""The blocking face has the names, parameters and words of the async one, for `help()` as for a type checker."""

import inspect
from typing import Any

import pytest

from mindtrace.jobs import AsyncDeadLetters, AsyncOrchestrator, DeadLetters, Orchestrator

FACES = {AsyncOrchestrator: Orchestrator, AsyncDeadLetters: DeadLetters}
NOT_BLOCKING = {"open", "aclose"}  # a client opens itself, and is closed at exit


def _methods() -> list[Any]:
    return [
        pytest.param(ours, face, id=f"{face.__name__}.{name}")
        for twin, face in FACES.items()
        for name, ours in inspect.getmembers(twin, inspect.iscoroutinefunction)
        if not name.startswith("_") and name not in NOT_BLOCKING
    ]


@pytest.mark.parametrize(("ours", "face"), _methods())
def test_each_coroutine_has_a_blocking_twin_with_the_same_signature_and_docstring(ours: Any, face: type) -> None:
    blocking = getattr(face, ours.__name__)
    assert not inspect.iscoroutinefunction(blocking)
    assert inspect.signature(blocking) == inspect.signature(ours)
    assert inspect.getdoc(blocking) == inspect.getdoc(ours)


@pytest.mark.parametrize("method", [AsyncOrchestrator.publish, Orchestrator.publish])
def test_publish_declares_each_of_its_options(method: Any) -> None:
    parameters = list(inspect.signature(method).parameters.values())
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == ["self", "queue_name", "job"]
    options = ["delay", "at", "priority", "timeout", "retry", "headers", "job_id"]
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == options
    assert not [p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


@pytest.mark.parametrize(
    "method", [method for twin in FACES for _, method in inspect.getmembers(twin, inspect.isfunction)]
)
def test_no_public_method_takes_just_any_option(method: Any) -> None:
    kinds = {parameter.kind for parameter in inspect.signature(method).parameters.values()}
    assert method.__name__ == "__aexit__" or inspect.Parameter.VAR_KEYWORD not in kinds
