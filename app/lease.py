"""What only one process of the fleet does at a time: it holds the lease while its heartbeat is there."""

from app.keys import Keys
from app.redis_client import Call, Scripts

_NOBODY = ""


class Lease:
    """One lease as one process sees it. It needs no renewal of its own; the heartbeat has one."""

    def __init__(self, scripts: Scripts, keys: Keys, key: str, consumer: str) -> None:
        self._scripts = scripts
        self._keys = keys
        self._key = key
        self._consumer = consumer

    async def hold(self) -> bool:
        """Take the lease if nobody that lives has it, or keep it; whether it is ours.

        Raises:
            Unreachable: it is not known whose it is.
        """
        holder = await self._pass_on(_NOBODY, self._consumer)
        if holder != self._consumer and not await self._is_alive(holder):
            holder = await self._pass_on(holder, self._consumer)
        return holder == self._consumer

    async def let_go(self) -> None:
        """Leave the lease to the others, if it is ours.

        Raises:
            Unreachable: it may still be ours, until the heartbeat is gone.
        """
        await self._pass_on(self._consumer, _NOBODY)

    async def _pass_on(self, expected: str, successor: str) -> str:
        (holder,) = await self._scripts.demand([Call("hold", [self._key], [expected, successor])])
        return str(holder.decode())

    async def _is_alive(self, consumer: str) -> bool:
        (exists,) = await self._scripts.demand([Call("EXISTS", None, [self._keys.heartbeat(consumer)])])
        return bool(exists)
