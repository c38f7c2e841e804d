"""Which error is which answer, and what an integration says where its framework is missing."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from fastapi.requests import HTTPConnection

from mindtrace.jobs import (
    AuthenticationFailed,
    BackendFull,
    BackendUnavailable,
    Closed,
    ConfigError,
    InputInvalid,
    Job,
    JobsError,
    NotSupported,
    PayloadTooLarge,
    PublishIncomplete,
    QueueFull,
    QueueNotFound,
)
from mindtrace.jobs.integrations.fastapi import FastAPI, get_jobs
from mindtrace.jobs.integrations.service import answer_to, job_id_of

LATER = {"Retry-After": "5"}


@pytest.mark.parametrize(
    ("error", "status", "word", "headers"),
    [
        (InputInvalid("orders", [{"type": "missing", "loc": ("item",), "msg": "?"}]), 422, "input_invalid", {}),
        (PayloadTooLarge("input", 30, 20), 413, "payload_too_large", {}),
        (QueueFull("secret-queue", 2), 503, "queue_full", LATER),
        (BackendFull("secret-host is full"), 503, "backend_full", LATER),
        (BackendUnavailable("no secret-host"), 503, "backend_unavailable", LATER),
        (AuthenticationFailed("secret-host refuses"), 503, "backend_unavailable", {}),
        (PublishIncomplete(["a"], {1: QueueFull("secret-queue", 2)}), 503, "publish_incomplete", LATER),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, JobsError) else "",
)
def test_an_error_that_a_client_can_act_on_is_an_answer_without_the_services_own_names(
    error: JobsError, status: int, word: str, headers: Mapping[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    answer = answer_to(error)
    assert answer is not None
    assert (answer.status, answer.body["error"], answer.headers) == (status, word, headers)
    assert "secret" not in json.dumps(answer.body)
    assert [record.getMessage() for record in caplog.records] == ([f"answered 503: {error}"] if status == 503 else [])


@pytest.mark.parametrize("error", [ConfigError("x"), QueueNotFound("x"), NotSupported("x", "y", "z"), Closed("x")])
def test_any_other_error_is_the_services_own_mistake(error: JobsError) -> None:
    assert answer_to(error) is None


def test_of_an_incomplete_batch_the_client_is_told_which_jobs_are_there_and_which_may_be() -> None:
    unknown = BackendUnavailable("gone", maybe_published=True, job_ids=["c"])
    answer = answer_to(PublishIncomplete(["a"], {1: QueueFull("orders", 1), 2: unknown}))
    assert answer is not None
    assert answer.body["job_ids"] == ["a"]
    assert answer.body["failures"] == {
        "1": {"outcome": "not_done", "retryable": True},
        "2": {"outcome": "unknown", "retryable": True},
    }


@pytest.mark.parametrize("key", ["a", "0-._:Z", "k" * 128, "k" * 129, "", "-a", "a b", "ä", "a\n", 'a"', '"'])
def test_a_key_is_taken_if_and_only_if_it_can_be_the_id_of_a_job(key: str) -> None:
    assert job_id_of(None) is None
    assert accepts(lambda: job_id_of(key)) is accepts(lambda: Job(id=key, name="x", schema_name="x", input_data={}))


def accepts(call: Any) -> bool:
    try:
        call()
    except ValueError:
        return False
    return True


def test_an_application_without_the_lifespan_is_told_of_it() -> None:
    with pytest.raises(ConfigError, match=r"FastAPI\(lifespan=jobs_lifespan"):
        get_jobs(HTTPConnection({"type": "http", "app": FastAPI(), "headers": []}))


@pytest.mark.parametrize("framework", ["fastapi", "aiohttp"])
def test_without_the_framework_the_import_error_has_the_command_that_installs_it(framework: str) -> None:
    code = f"import sys; sys.modules['{framework}'] = None; import mindtrace.jobs.integrations.{framework}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("ImportError: ")
    assert ended.stderr.splitlines()[-1].endswith(f'is not installed: pip install "mindtrace-jobs[{framework}]"')
