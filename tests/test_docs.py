"""What the documentation says and what the code does, held together: a test fails when either side moves."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import msgspec.inspect as inspection
import pytest
import yaml
from msgspec import Struct

import app.keys
from app import errors, metrics
from app.doctor import CHECKS, ESSENTIAL, REFUSED
from app.errors import RequestError
from app.rows import COLUMNS, FROM_SNAPSHOT, JSON_FROM_SNAPSHOT, Materialised
from app.settings import Settings
from schemas import diagnosis, status
from schemas.operations import OperationRequest
from schemas.replies import MOLLIFIED
from schemas.requests import TriggerRequest
from schemas.snapshot import Snapshot
from tests.described import DescribedMetric, all_metrics

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
MODULES = sorted(path for folder in ("app", "workers", "schemas") for path in (ROOT / folder).rglob("*.py"))
SQL = sorted((ROOT / "app/sql").rglob("*.sql"))
LUA = sorted((ROOT / "app/lua").glob("*.lua"))
MIGRATIONS = "".join(path.read_text() for path in sorted((ROOT / "app/sql/migrations").glob("*.sql")))

LEVELS = {"event": "info", "trouble": "warning", "failed": "error"}
"""The methods that log an event whose name is their first argument. Those of a `Log` have the level first."""


def _structs(module: ModuleType) -> list[type[Struct]]:
    return [
        one for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__
    ]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def table(page: str, *header: str) -> dict[str, tuple[str, ...]]:
    """The rows of all tables of a page that have this header, by their first cell without its backticks."""
    rows: dict[str, tuple[str, ...]] = {}
    inside = False
    for line in (DOCS / page).read_text().splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split("|")) if line.startswith("|") else ()
        if cells[: len(header)] == header:
            inside = True
        elif not cells:
            inside = False
        elif inside and not set(line) <= set("|-"):
            assert cells[0] not in rows, f"{page} has {cells[0]} twice"
            rows[cells[0].strip("`")] = cells[1:]
    assert rows, f"{page} has no table with the header {header}"
    return rows


def section(page: str, title: str) -> str:
    """The text below a heading of a page, up to the next one."""
    return (DOCS / page).read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_setting_is_documented_with_its_default_and_meaning() -> None:
    documented = table("settings.md", "variable", "default", "meaning")
    assert documented == {
        Settings.variable(field): (_default(info.default), info.description)
        for field, info in Settings.model_fields.items()
    }


def _default(value: Any) -> str:
    return "" if value == "" else f"`{int(value) if isinstance(value, bool) else value}`"


def test_settings_that_nothing_reads_are_listed_as_such() -> None:
    read = {
        node.attr
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and (path.name != "settings.py" or ast.unparse(node.value) == "self")
    }
    unread = {Settings.variable(field) for field in Settings.model_fields if field not in read}
    listed = re.findall(r"^- `(\w+)`$", section("settings.md", "Not used yet"), re.MULTILINE)
    assert set(listed) == unread


def test_every_error_code_is_documented_with_its_status() -> None:
    documented = {
        code: (status, retryable)
        for code, (status, retryable, _) in table("wire.md", "code", "status", "retryable").items()
    }
    assert documented == {
        error.code: (str(error.status), "yes" if error.retryable else "no") for error in _codes().values()
    }


def test_errors_that_nothing_raises_are_marked_as_such() -> None:
    used = {
        node.id
        for path in MODULES
        if name(path) != "app/errors.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name)
    }
    documented = table("wire.md", "code", "status", "retryable")
    marked = {code for code, (*_, when) in documented.items() if when.startswith("*not sent yet:*")}
    assert marked == {error.code for class_name, error in _codes().items() if class_name not in used}


def _codes() -> Mapping[str, type[RequestError]]:
    """The classes that have a wire code of their own, by name."""
    return {
        class_name: value
        for class_name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, RequestError) and "code" in vars(value)
    }


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawn = {
        (class_name, code, status, retryable)
        for class_name, status, code, retryable in re.findall(
            r"── (\w+) +(\d{3}) (\w+)(?:, .*| +(retryable))?$", errors.__doc__ or "", re.MULTILINE
        )
        if "code" in vars(getattr(errors, class_name))
    }
    assert drawn == {
        (class_name, error.code, str(error.status), "retryable" if error.retryable else "")
        for class_name, error in _codes().items()
    }


@pytest.mark.parametrize(
    ("request_type", "header"),
    [(TriggerRequest, "field"), (OperationRequest, "field of an operation")],
    ids=["triggers", "operations"],
)
def test_every_limit_of_a_request_is_documented(request_type: Any, header: str) -> None:
    limits: dict[str, dict[str, None]] = {}
    for field, limit in _limits(inspection.type_info(request_type), ""):
        limits.setdefault(field, {})[limit] = None
    documented = {field: limit for field, (limit,) in table("wire.md", header, "limit").items()}
    assert documented == {field: " or ".join(of_field) for field, of_field in limits.items()}


def _limits(kind: inspection.Type, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(kind, inspection.Metadata):
        yield from _limits(kind.type, path)
    elif isinstance(kind, inspection.StructType):
        for field in kind.fields:
            yield from _limits(field.type, f"{path}.{field.encode_name}" if path else field.encode_name)
    elif isinstance(kind, inspection.UnionType):
        for one in kind.types:
            yield from _limits(one, path)
    elif isinstance(kind, inspection.ListType):
        if kind.max_length is not None:
            yield path, f"{kind.min_length or 0:,} to {kind.max_length:,} elements"
        yield from _limits(kind.item_type, f"{path}[]")
    elif isinstance(kind, inspection.StrType):
        assert kind.max_length is not None, f"{path} may be of any length"
        yield path, f"{kind.min_length or 0:,} to {kind.max_length:,} characters"
    elif isinstance(kind, inspection.IntType) and kind.ge is not None:
        yield path, f"{kind.ge:,} to {kind.le:,}"


def test_every_field_of_a_request_is_in_the_example() -> None:
    example = section("wire.md", "A trigger request")
    assert [
        field for field in _fields(inspection.type_info(TriggerRequest)) if f'"{field}":' not in example
    ] == []


def _fields(kind: inspection.Type) -> Iterator[str]:
    if isinstance(kind, inspection.StructType):
        for field in kind.fields:
            yield field.encode_name
            yield from _fields(field.type)
    elif isinstance(kind, inspection.UnionType):
        for one in kind.types:
            yield from _fields(one)


def test_every_dead_letter_reason_is_documented() -> None:
    (literal,) = re.findall(r"reason: Literal\[(.*?)\]", (ROOT / "app/batch.py").read_text())
    reasons = set(ast.literal_eval(f"({literal},)"))
    (bury,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "app/drain.py").read_text()))
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "_bury"
    )
    reasons |= {
        node.value
        for node in ast.walk(bury)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(table("wire.md", "reason", "what happened")) == reasons


def test_every_key_is_documented_with_its_type() -> None:
    spelled = re.findall(
        r"^    (ns\S+) +(stream|string|channel|sorted|hash) ", app.keys.__doc__ or "", re.MULTILINE
    )
    documented = {
        key: kind.removesuffix(" set") for key, (kind, *_) in table("design.md", "key", "type").items()
    }
    assert documented == dict(spelled)


def test_every_metric_is_documented() -> None:
    documented = table("metrics.md", "metric", "kind", "unit", "labels", "meaning")
    assert documented == {
        metric.name: (
            metric.kind,
            _unit(metric),
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.text,
        )
        for metric in all_metrics()
    }


def _unit(metric: DescribedMetric) -> str:
    if "_seconds" in metric.name:
        return "seconds"
    return "0 or 1" if metric.text.startswith("1 while") else "count"


@pytest.mark.parametrize(
    ("label", "values"),
    {
        "`stream`": metrics.STREAMS,
        "`delivery`": metrics.DELIVERIES,
        "`reason` of a dead letter": metrics.DEAD_LETTERS,
        "`why` taken over": metrics.RECOVERED,
        "`why` put back": metrics.PUT_BACK,
        "`result` of an entry": metrics.DRAINED,
        "`what` was not delivered": metrics.TELEMETRY,
    }.items(),
)
def test_label_values_that_are_known_beforehand_are_documented(label: str, values: Sequence[str]) -> None:
    (text,) = table("metrics.md", "label", "values")[label.strip("`")]
    assert tuple(re.findall(r"`([a-z_]+)`(?=[:,;.]|$)", text)) == values


def test_the_reasons_that_metrics_know_are_all_there_are() -> None:
    assert set(metrics.DEAD_LETTERS) == set(table("wire.md", "reason", "what happened"))
    assert {*get_args(Materialised.__annotations__["result"]), "system_failure", "dead"} == {*metrics.DRAINED}


def test_every_log_event_is_documented() -> None:
    said = {
        (node.args[0].value, LEVELS[node.func.attr])
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LEVELS
        and node.args
        and isinstance(node.args[0], ast.Constant)
    } | {
        (node.args[1].value, node.args[0].value)
        for node in ast.walk(ast.parse((ROOT / "app/telemetry.py").read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("say", "say_seldom")
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[1], ast.Constant)
    }
    documented = table("metrics.md", "event", "level", "when")
    assert {(event, level) for event, (level, _) in documented.items()} == said


def test_every_alert_has_its_section_in_the_runbook() -> None:
    """And every section is an alert's, with what it means, what to look at and what to do."""
    alerts = yaml.safe_load((ROOT / "ops/prometheus/alerts.yml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    runbook = DOCS / "runbook.md"
    sections = re.findall(r"^## (Mollifier\w+)$", runbook.read_text(), re.MULTILINE)
    assert sections == [rule["alert"] for rule in rules]
    for rule in rules:
        path, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (ROOT / path, anchor in _anchors(runbook)) == (runbook, True)
        assert anchor == rule["alert"].lower()
        parts = re.findall(r"^\*\*(.+?)\.\*\*", section("runbook.md", rule["alert"]), re.MULTILINE)
        assert parts == ["What it means", "What to look at", "What to do"]


def test_every_check_is_documented_with_its_remedy() -> None:
    documented = table("operations.md", "check", "what it looks at", "remedy")
    assert documented == {check.name: (check.asks, check.remedy) for check in CHECKS}


def test_what_is_looked_at_when_a_process_starts_is_documented() -> None:
    text = section("operations.md", "What is wrong").partition("**When a process starts**")[2]
    essential = [check.name for checks in ESSENTIAL.values() for check in checks]
    assert re.findall(r"`((?:redis|postgres)\.\w+)`", text) == [*essential, *(one.name for one in REFUSED)]


@pytest.mark.parametrize("struct", [*_structs(diagnosis), *_structs(status)], ids=lambda one: one.__name__)
def test_every_field_of_the_json_of_commands_is_documented(struct: type[Struct]) -> None:
    """What scripts rely on: a field that is gone, or of another type, fails here by name."""
    kind = inspection.type_info(struct)
    assert isinstance(kind, inspection.StructType)
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for field in kind.fields:
        assert isinstance(field.type, inspection.Metadata)
        meaning = (field.type.extra_json_schema or {})["description"]
        rows.append(f"| `{field.encode_name}` | {_in_words(field.type.type)} | {meaning} |")
    page = (DOCS / "operations.md").read_text()
    assert f"`{struct.__name__}`:\n\n" + "\n".join(rows) + "\n" in page


def _in_words(kind: inspection.Type) -> str:
    if isinstance(kind, inspection.UnionType):
        return " or ".join(map(_in_words, kind.types))
    if isinstance(kind, inspection.ListType):
        return f"array of {_in_words(kind.item_type)}"
    if isinstance(kind, inspection.StructType):
        return str(kind.cls.__name__)
    words = {inspection.IntType: "integer", inspection.FloatType: "number", inspection.NoneType: "null"}
    return words.get(type(kind), "boolean" if isinstance(kind, inspection.BoolType) else "string")


def test_the_procfile_starts_every_worker() -> None:
    lines = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
    workers = {
        path.stem for path in (ROOT / "workers").glob("*.py") if '__name__ == "__main__"' in path.read_text()
    }
    assert lines == {worker: f"python -m workers.{worker}" for worker in workers}
    readme = (ROOT / "README.md").read_text()
    assert [worker for worker in workers if f"| `{worker}` |" not in readme] == []


def test_a_snapshot_holds_the_columns_that_a_row_takes_from_it() -> None:
    assert {*Snapshot.__struct_fields__} == {
        *FROM_SNAPSHOT,
        *JSON_FROM_SNAPSHOT,
        "schema_version",
        "debounce_mode",
    }


@pytest.mark.parametrize(("statement", "more"), [("insert_runs", ()), ("debounce_runs", ("debounced_at",))])
def test_a_row_its_type_and_its_inserts_have_the_same_columns(statement: str, more: tuple[str, ...]) -> None:
    text = (ROOT / f"app/sql/{statement}.sql").read_text()
    (inserted,) = re.findall(r"INSERT INTO mollifier\.runs(?: AS run)? \((.*?)\)", text, re.DOTALL)
    assert tuple(column.strip() for column in inserted.split(",")) == COLUMNS + more
    assert tuple(_new_run()) == COLUMNS


def test_the_type_of_a_new_row_has_the_types_of_the_table() -> None:
    of_table, of_type = _runs(), _new_run()
    assert of_type == {column: of_table[column] for column in of_type}


def test_every_column_is_documented_with_its_type() -> None:
    documented = {column: kind for column, (kind, _) in table("design.md", "column", "type").items()}
    assert documented == _runs()


def test_every_table_is_documented() -> None:
    created = set(re.findall(r"CREATE TABLE (mollifier\.\w+)", MIGRATIONS))
    assert {*table("design.md", "table", "holds"), "mollifier.runs"} == {*created, "mollifier.migrations"}


def _columns(statement: str) -> dict[str, str]:
    (body,) = re.findall(re.escape(statement) + r" \((.*?)\n\);", MIGRATIONS, re.DOTALL)
    return dict(re.findall(r"^    (\w+) ([a-z]+(?:\[\])?)", body, re.MULTILINE))


def _runs() -> dict[str, str]:
    """The columns of `mollifier.runs`, with what later migrations added."""
    (table,) = re.findall(r"CREATE TABLE mollifier\.runs \(.*?\n\);(.*)", MIGRATIONS, re.DOTALL)
    altered = "".join(re.findall(r"ALTER TABLE mollifier\.runs\b(.*?);", table, re.DOTALL))
    added = re.findall(r"ADD COLUMN (\w+) ([a-z]+(?:\[\])?)", altered)
    return {**_columns("CREATE TABLE mollifier.runs"), **dict(added)}


def _new_run() -> dict[str, str]:
    """The columns of the type of a new row, with what later migrations added."""
    added = re.findall(r"ALTER TYPE mollifier\.new_run ADD ATTRIBUTE (\w+) ([a-z]+(?:\[\])?)", MIGRATIONS)
    return {**_columns("CREATE TYPE mollifier.new_run AS"), **dict(added)}


def test_the_layout_names_every_module() -> None:
    layout = section("design.md", "Layout")
    files: set[str] = set()
    folder = ""
    for entry in re.findall(r"^( {0,2}[\w./*]+) ", layout, re.MULTILINE):
        if entry.startswith("  "):
            files.add(folder + entry.strip())
        else:
            folder = entry
    modules = {
        name(path)
        for path in MODULES
        if path.name != "__init__.py" and not {"cli", "embedded"} & set(path.parts)
    }
    assert {file for file in files if file.endswith(".py")} == modules


@pytest.mark.parametrize("path", SQL, ids=name)
def test_a_statement_opens_with_its_purpose(path: Path) -> None:
    assert re.match(r"-- [A-Z].{10,}", path.read_text())


@pytest.mark.parametrize("path", LUA, ids=name)
def test_a_script_opens_with_its_contract(path: Path) -> None:
    opening = path.read_text().partition("\n\n")[0].removeprefix("#!lua flags=allow-oom\n")
    assert all(line.startswith("--") for line in opening.splitlines()), "the contract comes first"
    starts = [
        line[3:9].strip() for line in opening.splitlines() if re.match(r"-- (KEYS |ARGV |return )", line)
    ]
    assert starts == ["KEYS", "ARGV", "return"]
    assert re.match(r"-- [A-Z][a-z].{10,}", opening), "a sentence says what it is for"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", text)
    assert [link for link in links if "://" not in link and not _leads_somewhere(page, link)] == []


def test_the_notice_leads_somewhere() -> None:
    assert _leads_somewhere(ROOT / "README.md", MOLLIFIED.docs)


def _leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in _anchors(target))


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:app|workers|schemas|tests|docs|ops)/[\w./-]+\.\w+)`", page.read_text())
    assert [file for file in named if not (ROOT / file).exists()] == []


def test_every_page_and_decision_is_in_its_index() -> None:
    index = (DOCS / "README.md").read_text()
    assert [
        page.name for page in DOCS.glob("*.md") if page.name != "README.md" and page.name not in index
    ] == []
    decisions = sorted(path.name for path in (DOCS / "decisions").glob("0*.md"))
    listed = re.findall(r"\]\((0\S+)\)", (DOCS / "decisions/README.md").read_text())
    assert listed == decisions


@pytest.mark.parametrize("path", sorted((DOCS / "decisions").glob("0*.md")), ids=name)
def test_a_decision_has_its_number_its_date_and_its_parts(path: Path) -> None:
    title, date, *_ = [line for line in path.read_text().splitlines() if line]
    assert title.startswith(f"# {path.name[:4]} ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    parts = re.findall(r"^## (.*)$", path.read_text(), re.MULTILINE)
    assert parts == ["Context", "Decision", "What it costs", "What would change it"]


def test_every_guarantee_has_its_heading_and_no_other_number_is_cited() -> None:
    headings = re.findall(r"^## G(\d+) ", (DOCS / "guarantees.md").read_text(), re.MULTILINE)
    cited = {number for path in MODULES for number in re.findall(r"\bG(\d{1,2})\b", path.read_text())}
    assert cited <= {*headings}


def test_every_guarantee_that_is_kept_names_a_test_that_cites_it() -> None:
    parts = re.split(r"^## G(\d+) ", (DOCS / "guarantees.md").read_text(), flags=re.MULTILINE)[1:]
    unheld = []
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        files = [ROOT / file for file in re.findall(r"`(tests/\w+\.py)`", text)]
        cites = re.compile(rf"(?:Test|test_|\b)[Gg]{number}(?!\d)")
        is_held = any(file.exists() and cites.search(file.read_text()) for file in files)
        if is_held == ("**Not kept yet" in text):
            unheld.append(f"G{number}")
    assert unheld == []
