"""What producers sent and were told: one JSON line for each event, written before the next thing happens."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Fate = Literal["unsure", "sent", "refused"]
Reply = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Told:
    """One reply, and when it came (seconds since 1970)."""

    at: float
    reply: Reply


@dataclass(slots=True)
class Attempt:
    """One entry that a producer appended, or tried to. Several of them can be one request's.

    `fate`: `sent` when Redis said so, `refused` when it said no, else `unsure`. `entry` is its id if known.
    """

    name: str
    request: str
    kind: str
    stream: str
    environment: str
    organization: str
    body: Any
    reply_to: str | None
    is_repeated: bool
    sending_at: float
    fate: Fate = "unsure"
    entry: str | None = None
    replies: list[Told] = field(default_factory=list)

    @property
    def producer(self) -> str:
        return self.request.partition("-")[0]

    @property
    def options(self) -> dict[str, Any]:
        """The options of a trigger; none of what is not even an object."""
        options = self.body.get("options") if isinstance(self.body, dict) else None
        return options if isinstance(options, dict) else {}

    def told(self, kind: str) -> list[Told]:
        """The replies of one type: `run`, `error`, `run_details`, ..."""
        return [told for told in self.replies if told.reply.get("type") == kind]

    @property
    def codes(self) -> list[str]:
        """The codes of the errors that it was told."""
        return [told.reply["error"]["code"] for told in self.told("error")]


@dataclass(slots=True)
class Record:
    """Everything that the producers of one storm wrote down. `deaf`: when which of them heard no replies."""

    attempts: dict[str, Attempt] = field(default_factory=dict)
    deaf: list[tuple[str, float, float]] = field(default_factory=list)


class Journal:
    """Writes the record of one producer."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("ab", buffering=0)

    def sending(self, attempt: Attempt) -> None:
        """What is about to be appended."""
        self._write(
            "sending",
            attempt.name,
            request=attempt.request,
            kind=attempt.kind,
            stream=attempt.stream,
            environment=attempt.environment,
            organization=attempt.organization,
            body=attempt.body,
            reply_to=attempt.reply_to,
            is_repeated=attempt.is_repeated,
        )

    def sent(self, attempt: str, entry: str | None) -> None:
        self._write("sent", attempt, entry=entry)

    def refused(self, attempt: str, error: str) -> None:
        """Redis said that it did not append it."""
        self._write("refused", attempt, error=error)

    def unsure(self, attempt: str, error: str) -> None:
        """Redis did not say."""
        self._write("unsure", attempt, error=error)

    def told(self, attempt: str, reply: Reply) -> None:
        self._write("told", attempt, reply=reply)

    def deaf(self, producer: str) -> None:
        """From now on replies may be lost."""
        self._write("deaf", producer)

    def hearing(self, producer: str) -> None:
        self._write("hearing", producer)

    def _write(self, event: str, name: str, **details: object) -> None:
        line = json.dumps({"at": time.time(), "event": event, "name": name, **details})
        self._file.write(line.encode() + b"\n")


def read(folder: Path) -> Record:
    """The record that is in the journals of a folder."""
    record = Record()
    for file in sorted(folder.glob("*.journal")):
        _read_one(file, record)
    return record


def lines_of(folder: Path, request: str) -> Iterator[str]:
    """The journals' lines about one request, in order of time."""
    found = [
        line
        for file in sorted(folder.glob("*.journal"))
        for line in file.read_text().splitlines()
        if f'"name": "{request}.' in line
    ]
    yield from sorted(found, key=lambda line: float(json.loads(line)["at"]))


def _read_one(file: Path, record: Record) -> None:
    deaf_since: float | None = None
    producer, last = file.stem, 0.0
    for line in file.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the last line of a producer that was killed while it wrote
        last, name = event["at"], event["name"]
        match event["event"]:
            case "sending":
                fields = {key: event[key] for key in event.keys() - {"at", "event", "name"}}
                record.attempts[name] = Attempt(name=name, sending_at=last, **fields)
            case "sent":
                record.attempts[name].fate, record.attempts[name].entry = "sent", event["entry"]
            case "refused":
                record.attempts[name].fate = "refused"
            case "told":
                record.attempts[name].replies.append(Told(last, event["reply"]))
            case "deaf":
                deaf_since = last if deaf_since is None else deaf_since
            case "hearing" if deaf_since is not None:
                record.deaf.append((producer, deaf_since, last))
                deaf_since = None
    if deaf_since is not None:
        record.deaf.append((producer, deaf_since, last))
