"""Replies out, requests off their stream, and dead letters set aside."""

from collections.abc import Sequence
from datetime import UTC, datetime

from redis.exceptions import ResponseError

from app.batch import Item
from app.keys import Keys
from app.ports import Letter
from app.redis_client import Call, Scripts

Argument = str | bytes | int


class RedisDesk:
    """Implements `ports.Desk` for one request stream, and `ports.Graveyard`."""

    def __init__(self, scripts: Scripts, keys: Keys, stream: str) -> None:
        self._scripts = scripts
        self._keys = keys
        self._stream = stream

    async def respond(self, replies: Sequence[tuple[Item, bytes | None]]) -> None:
        """See `ports.Desk.respond`."""
        if not replies:
            return
        arguments: list[Argument] = [self._keys.group, len(replies)]
        arguments += (item.entry.id for item, _ in replies)
        for item, reply in replies:
            if reply is not None and item.reply_to is not None:
                arguments += (item.reply_to, reply)
        await self._scripts.demand([Call("respond", [self._stream], arguments)])

    async def set_aside(self, items: Sequence[Item]) -> Sequence[Item]:
        """See `ports.Desk.set_aside`."""
        calls = []
        for item in items:
            assert item.dead_letter is not None
            original = [part for pair in item.entry.fields.items() for part in pair]
            head = self._head(self._stream, item.entry.id, *item.dead_letter, item.entry.deliveries)
            calls.append(Call("XADD", None, [*head, *original]))
        answers = await self._scripts.run(calls)
        return [
            item for item, answer in zip(items, answers, strict=True) if isinstance(answer, ResponseError)
        ]

    async def bury(self, letters: Sequence[Letter]) -> None:
        """See `ports.Graveyard.bury`. Also where Redis has no memory left: what is buried makes room."""
        calls = []
        for letter in letters:
            source = self._keys.environment(letter.environment_id).entries
            _, *head = self._head(source, letter.entry_id, letter.reason, letter.detail, 1)
            original: list[Argument] = ["snapshot", letter.snapshot]
            if letter.overlay is not None:
                original += ("overlay", letter.overlay)
            calls.append(Call("bury", [self._keys.dead_letters], [*head, *original]))
        await self._scripts.demand(calls)

    def _head(self, source: str, entry_id: str, reason: str, detail: str, deliveries: int) -> list[Argument]:
        """The command for a dead letter, up to the original's own fields. DESIGN section 3.4."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        fields = (
            "source",
            source,
            "id",
            entry_id,
            "reason",
            reason,
            "detail",
            detail,
            "deliveries",
            deliveries,
        )
        return [self._keys.dead_letters, "*", *fields, "at", now]
