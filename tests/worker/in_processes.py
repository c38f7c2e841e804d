"""Consumers that run in processes, which have to import them: the tests put this folder on the path."""

import asyncio
import contextvars
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_serializer

from mindtrace.jobs import (
    AsyncConsumer,
    Consumer,
    Discard,
    Reject,
    RetryLater,
    RetryPolicy,
    Snooze,
    current_job,
)

AT_ONCE = RetryPolicy(base=0)
own = contextvars.ContextVar("own", default="")


class OutOfStock(LookupError):
    """An error of the application's."""


class Sold(OutOfStock):
    pass


class Full(MemoryError):
    """Says whether what the run held is still there."""

    def __init__(self, held: "weakref.ref[set[int]]") -> None:
        self.held = held

    def __str__(self) -> str:
        return "let go" if self.held() is None else "held"


def tell(board: str, *, wait: bool = False, **facts: Any) -> None:
    """Tell the test; and wait until it has heard enough."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(board)
        line.sendall(json.dumps({"pid": os.getpid(), **facts}).encode() + b"\n")
        if wait:
            line.recv(1)


def job_facts() -> dict[str, Any]:
    job = asdict(current_job())
    return {**job, "deadline": job["deadline"] - time.monotonic()}


def turns_without_end(deep: int) -> None:
    if deep:
        turns_without_end(deep - 1)
    while True:
        pass


def act(data: dict[str, Any]) -> Any:
    """What the input asks for."""
    match data["act"]:
        case "tell":
            before = own.get()
            own.set("set by a run")
            tell(data["board"], job=job_facts(), before=before, n=data.get("n"))
        case "wait":
            tell(data["board"], wait=True)
        case "turn":
            tell(data["board"])
            turns_without_end(data.get("deep", 0))
        case "hang":
            tell(data["board"])
            re.match(r"(a+)+$", "a" * 64 + "b")
        case "start":
            with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]) as started:
                tell(data["board"], started=started.pid)
                time.sleep(100)
        case "print":
            print("printed by a run")  # noqa: T201
            logging.getLogger("shop").info("said by %s", "a run", extra={"basket": 7})
            logging.getLogger("shop.quiet").info("not said")
        case "abort":
            tell(data["board"])
            os.abort()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            os._exit(3)
        case "garbage":
            for fd in os.listdir("/proc/self/fd"):
                if int(fd) > 2 and os.path.realpath(f"/proc/self/fd/{fd}").rpartition("/")[2].startswith("socket:"):
                    os.write(int(fd), b"\xff" * 64)
            time.sleep(100)
        case "exit":
            sys.exit("enough")
        case "grow":
            kept: list[bytes] = []
            while True:
                kept.append(os.urandom(1024) * 1024)
                time.sleep(0.005)
        case "fill":
            pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
            most = pages * resource.getpagesize() + (64 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            chain: Any = None
            for size in (1 << 20, 1 << 16, 1 << 12, 1 << 10, *range(512, 0, -16)):  # until nothing of any size is left
                with suppress(MemoryError):
                    while True:
                        chain = (chain, bytes(size))
            while True:
                chain = (chain, None)
        case "overfill":
            held = {1}
            raise Full(weakref.ref(held))
        case "raise":
            raise {"Sold": Sold, "OutOfStock": OutOfStock, "KeyError": KeyError}[data["kind"]]("no more of it")
        case "snooze":
            if current_job().number == 1:
                raise Snooze(0.01)
        case "retry":
            if current_job().attempt == 1:
                raise RetryLater(0.01, "busy")
        case "discard":
            raise Discard("old")
        case "reject":
            raise Reject("no such customer")
        case "coroutine":
            return asyncio.sleep(0)
        case "return":
            return data["value"]
        case "set":
            return {1, 2}, object()
    return None


class Acts(Consumer):
    executor = "process"
    retry = AT_ONCE

    def run(self, job_dict: dict[str, Any]) -> Any:
        return act(job_dict["input_data"])


class Once(Acts):
    retry = RetryPolicy(base=0, max_attempts=1)


class OneEach(Acts):
    max_jobs = 2


class Small(Acts):
    max_memory = 200
    retry = RetryPolicy(base=0, crash_limit=2)


class TooSmall(Acts):
    max_memory = 1


class Stocked(Acts):
    retry = RetryPolicy(base=0, max_attempts=2, retry_on=(OutOfStock,), no_retry_on=(Sold,))


class Demanding(Acts):
    def __init__(self, job_type_name: str) -> None:
        super().__init__(job_type_name)
        if os.environ.get("DATABASE_OF", str(os.getpid())) != str(os.getpid()):
            raise ConnectionError("no database")


class Waiting(Acts):
    """Made later, it waits for the test."""

    def __init__(self, job_type_name: str) -> None:
        super().__init__(job_type_name)
        if "BOARD" in os.environ:
            tell(os.environ["BOARD"], wait=True)


class NeedsMore(Acts):
    def __init__(self, job_type_name: str, *, database: str) -> None:
        super().__init__(job_type_name)


class Order(BaseModel):
    article: str = Field(alias="what")
    count: int = 1


class Parcel(BaseModel):
    grams: int = Field(validation_alias="weight")
    order: Order | None = None


class Pack(Consumer[Order, Parcel]):
    executor = "process"
    retry = AT_ONCE

    def handle(self, data: Order) -> Any:
        assert isinstance(data, Order)
        match data.article:
            case "set":
                return {1, 2}, object()
            case "huge":
                return {"weight": "heavy" * 4_000_000}
            case "wrong":
                return {"weight": "heavy"}
            case "dict":
                return {"weight": 3}
            case _:
                return Parcel.model_validate({"weight": data.count, "order": data})


class Note(BaseModel):
    text: str

    @field_serializer("text")
    def quote(self, text: str) -> str:
        raise ValueError(f"not to be written: {text}")


class Take(Consumer[Order, Parcel]):
    executor = "process"

    def handle(self, data: Order) -> Any:
        return Note(text=data.article)


class InThread(Consumer):
    def run(self, job_dict: dict[str, Any]) -> Any:
        return act(job_dict["input_data"])


class OnLoop(AsyncConsumer):
    async def run(self, job_dict: dict[str, Any]) -> Any:
        data = job_dict["input_data"]
        job = job_facts()
        await asyncio.to_thread(tell, data["board"], job=job, before="", n=None)
