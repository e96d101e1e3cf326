"""docs/asyncapi.json: current, valid by AsyncAPI's own schema, and true of the code that reads and writes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema_rs
import msgspec
import pytest

from app.asyncapi import text
from app.batch import Entry, Item
from app.decode import decode_trigger, read_operation
from app.errors import CODES
from app.operations import TABLE
from app.settings import Settings
from app.validate import build_run
from schemas.operations import OperationRequest
from schemas.replies import Reply
from tests.processes import ROOT

FILE = ROOT / "docs/asyncapi.json"
DOCUMENT: dict[str, Any] = json.loads(FILE.read_text())
MESSAGES: dict[str, dict[str, Any]] = DOCUMENT["components"]["messages"]
LONGEST = 1_000_000


def validator(name: str) -> jsonschema_rs.Validator:
    """By the schema of one message's payload, as the document has it."""
    schema = {**MESSAGES[name]["payload"], "components": DOCUMENT["components"]}
    return jsonschema_rs.validator_for(schema, validate_formats=True)


def examples(channel: str) -> list[Any]:
    """The messages of a channel, each with its examples."""
    return [
        pytest.param(name, example, id=f"{name} {example['name']}")
        for name in DOCUMENT["channels"][channel]["messages"]
        for example in MESSAGES[name]["examples"]
    ]


def test_it_is_what_the_schemas_say() -> None:
    assert FILE.read_bytes() == text(), "run: make docs"


def test_make_docs_writes_it(tmp_path: Path) -> None:
    (recipe,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "app.asyncapi" in line]
    *command, target = recipe.removeprefix("\t@$(BIN)/python ").split()
    assert ROOT / target == FILE
    subprocess.run([sys.executable, *command, tmp_path / "written"], cwd=ROOT, check=True)
    assert (tmp_path / "written").read_bytes() == FILE.read_bytes()


def test_it_is_valid_by_the_schema_of_asyncapi() -> None:
    schema = json.loads((ROOT / "tests/asyncapi/3.0.0.json").read_text())
    official = jsonschema_rs.validator_for(schema)
    assert [error.message for error in official.iter_errors(DOCUMENT)] == []
    assert not official.is_valid({**DOCUMENT, "channel": {}}), "it refuses nothing"


def test_every_reference_leads_somewhere() -> None:
    for reference in _references(DOCUMENT):
        found: Any = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from ([value["$ref"]] if "$ref" in value else [])
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _references(part)


def test_every_operation_is_there_with_its_reply() -> None:
    tags = {str(kind.__struct_config__.tag).replace(".", "_") for kind in get_args(OperationRequest)}
    assert DOCUMENT["operations"].keys() == {"trigger", "setAside", *tags}
    assert DOCUMENT["channels"]["operations"]["messages"].keys() == {kind.__name__ for kind in TABLE}


def test_every_code_is_there() -> None:
    stated = DOCUMENT["components"]["schemas"]["ErrorDetail"]["x-codes"]
    assert {one["code"] for one in stated} == CODES.keys()


@pytest.mark.parametrize(("name", "example"), [*examples("triggers"), *examples("operations")])
def test_an_example_of_a_request_is_what_a_worker_takes(name: str, example: dict[str, Any]) -> None:
    validator(name).validate(example["payload"])
    headers = jsonschema_rs.validator_for(MESSAGES[name]["headers"])
    headers.validate(example["headers"])
    assert Settings.model_construct().reply_channel_pattern.fullmatch(example["headers"]["reply_to"])
    body = json.dumps(example["payload"]).encode()
    if name == "TriggerRequest":
        build_run(Entry("1-1", {}), decode_trigger(body, LONGEST), Settings.model_construct())
    else:
        item = Item(Entry("1-1", {}))
        read_operation(item, body, LONGEST)
        assert type(item.operation).__name__ == name


@pytest.mark.parametrize(("name", "example"), examples("replies"))
def test_an_example_of_a_reply_is_what_a_client_reads(name: str, example: dict[str, Any]) -> None:
    validator(name).validate(example["payload"])
    reply = msgspec.json.decode(json.dumps(example["payload"]), type=Reply)
    assert type(reply).__name__ == name
