"""The commands that the processes send to Redis, and whether the server has them and lets the user send them.

Each is put into a transaction that is then discarded: the server says at once what it would refuse, and runs
nothing. That needs no rights of an administrator, unlike ACL DRYRUN.
"""

from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from app.doctor.examination import Patient, Unreadable, Verdict
from app.errors import Unreachable
from app.keys import Keys
from app.redis_connection import LOST

Command = tuple[str | int, ...]


def needed(keys: Keys) -> list[Command]:
    """Every command that `app/lua`, the adapters and the reader use, on a key or channel of ours."""
    key, stream, group = f"{keys.namespace}:{{0}}:doctor", keys.triggers, keys.group
    nothing = "0" * 40
    return [
        ("DEL", key),
        ("EVALSHA", nothing, 1, key),
        ("EXISTS", key),
        ("GET", key),
        ("HDEL", key, "x"),
        ("HEXISTS", key, "x"),
        ("HGET", key, "x"),
        ("HGETALL", key),
        ("HINCRBY", key, "x", 0),
        ("HKEYS", key),
        ("HLEN", key),
        ("HMGET", key, "x"),
        ("HSCAN", key, 0),
        ("HSET", key, "x", "x"),
        ("HSETNX", key, "x", "x"),
        ("HVALS", key),
        ("INCRBY", key, 0),
        ("LPOP", key),
        ("MGET", key),
        ("PING",),
        ("PUBLISH", f"{keys.namespace}:reply:doctor", ""),
        ("RPUSH", key, "x"),
        ("SADD", key, "x"),
        ("SCAN", 0, "COUNT", 1),
        ("SCRIPT", "LOAD", "return 0"),
        ("SET", key, "x"),
        ("SMEMBERS", key),
        ("SREM", key, "x"),
        ("SUBSCRIBE", keys.wake),
        ("TIME",),
        ("WAIT", 0, 1),
        ("XACK", stream, group, "0-1"),
        ("XADD", stream, "NOMKSTREAM", "*", "x", "x"),
        ("XCLAIM", stream, group, "doctor", 0, "0-1"),
        ("XDEL", stream, "0-1"),
        ("XGROUP", "CREATE", stream, group, "0"),
        ("XGROUP", "DELCONSUMER", stream, group, "doctor"),
        ("XINFO", "CONSUMERS", stream, group),
        ("XLEN", stream),
        ("XPENDING", stream, group),
        ("XRANGE", stream, "-", "+", "COUNT", 1),
        ("XREADGROUP", "GROUP", group, "doctor", "COUNT", 1, "STREAMS", stream, ">"),
        ("XREVRANGE", stream, "+", "-", "COUNT", 1),
        ("ZADD", key, 0, "x"),
        ("ZCARD", key),
        ("ZCOUNT", key, 0, 0),
        ("ZINCRBY", key, 0, "x"),
        ("ZRANGE", key, 0, 0),
        ("ZRANGEBYSCORE", key, 0, 0),
        ("ZREM", key, "x"),
        ("ZREMRANGEBYSCORE", key, 0, 0),
        ("ZREVRANGE", key, 0, 0),
        ("ZSCORE", key, "x"),
    ]


async def commands(patient: Patient) -> Verdict:
    """The check `redis.commands`."""
    asked = needed(patient.keys)
    refusals = await _rehearse(patient, asked)
    lacking = {
        _name(command): refusal
        for command, refusal in zip(asked, refusals, strict=True)
        if isinstance(refusal, NoPermissionError) or "unknown command" in str(refusal)
    }
    if not lacking:
        return Verdict("ok", f"all {len(asked)} are there and allowed")
    first, *_ = lacking.values()
    return Verdict("failure", f"{', '.join(lacking)} cannot be used: {first}")


async def writable(patient: Patient) -> Verdict:
    """The check `redis.writable`."""
    (refusal,) = await _rehearse(patient, [("SET", f"{patient.keys.namespace}:{{0}}:doctor", "x")])
    if refusal is None or isinstance(refusal, NoPermissionError):
        return Verdict("ok", "writes are taken")
    return Verdict("failure", f"writes are refused: {refusal}")


async def _rehearse(patient: Patient, asked: Sequence[Command]) -> list[ResponseError | None]:
    """What the server would refuse of some commands.

    On one connection, which nothing renews in between: outside the transaction the commands would be run.

    Raises:
        Unreachable: it did not answer.
        Unreadable: it lets the user make no transactions.
    """
    pool = patient.redis.connection_pool
    connection: Any = None
    try:
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        await connection.send_command("MULTI", check_health=False)
        await connection.read_response()
        packed = connection.pack_commands([*asked, ("DISCARD",)])
        await connection.send_packed_command(packed, check_health=False)
        answers = [await _answer(connection) for _ in (*asked, "DISCARD")]
    except LOST as error:
        raise Unreachable(f"Redis: {error}") from error
    except ResponseError as error:
        raise Unreadable(f"MULTI: {error}") from error
    finally:
        if connection is not None:
            await connection.disconnect()  # whatever happened, no transaction is left open on it
            await pool.release(connection)
    return answers[:-1]


async def _answer(connection: Any) -> ResponseError | None:
    try:
        await connection.read_response()
    except ResponseError as error:
        return error
    return None


def _name(command: Command) -> str:
    is_container = command[0] in ("SCRIPT", "XGROUP", "XINFO")
    return " ".join(map(str, command[: 2 if is_container else 1]))
