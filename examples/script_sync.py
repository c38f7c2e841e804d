# python examples/script_sync.py
"""The blocking API in a script: publish, look, consume, and read a job off the queue by hand. No `async` anywhere.

Backend: MINDTRACE_JOBS_URL, or this process.
"""

from pydantic import BaseModel

from mindtrace.jobs import Consumer, InputInvalid, JobSchema, Orchestrator, job_from_schema


class Photo(BaseModel):
    path: str
    width: int = 800


class Thumbnail(BaseModel):
    path: str


class Shrink(Consumer):
    def run(self, job_dict: dict) -> dict:
        photo = job_dict["input_data"]
        print(f"shrinks    {photo['path']} to {photo['width']} pixels")
        return {"path": f"small-{photo['path']}"}


def main() -> None:
    orchestrator = Orchestrator.from_url()
    thumbnails = JobSchema("thumbnails", Photo, Thumbnail)
    orchestrator.register(thumbnails)

    # A job is made first and published then, or published at once, as a model or as a dict.
    job = job_from_schema(thumbnails, Photo(path="cat.jpg"))
    print("published ", orchestrator.publish("thumbnails", job))
    orchestrator.publish("thumbnails", Photo(path="dog.jpg", width=200))
    orchestrator.publish("thumbnails", {"path": "cow.jpg"})
    try:
        orchestrator.publish("thumbnails", {"path": "owl.jpg", "width": "wide"})
    except InputInvalid as error:
        print("refused    the fields", [".".join(map(str, field["loc"])) for field in error.errors])

    consumer = Shrink("thumbnails")
    consumer.connect(orchestrator)
    print("waiting   ", orchestrator.count_queue_messages("thumbnails"))
    print("handled   ", consumer.consume(num_messages=2))

    # The at-most-once read: the job is off the queue, and ours alone.
    left = orchestrator.receive_message("thumbnails")
    print("by hand   ", left["input_data"]["path"] if left else None)
    print("then      ", orchestrator.receive_message("thumbnails"))


if __name__ == "__main__":
    main()
