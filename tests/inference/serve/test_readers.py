"""Reading requests: what waits is counted, and a long request delays no short one."""

from __future__ import annotations

import asyncio
import threading

import pytest

pytest.importorskip("fastapi")

from pst_ds.inference.serve.protocol import ProtocolError
from pst_ds.inference.serve.readers import LONG_BYTES, Readers

SHORT, LONG = b"s", b"l" * LONG_BYTES


def test_a_short_request_is_read_while_a_long_one_is():
    gate, order = threading.Event(), []

    def read(body, is_long):
        if is_long:
            assert gate.wait(60)
        order.append(is_long)
        return is_long

    async def run():
        readers = Readers(8)
        long = asyncio.create_task(readers.read(LONG, read, 0))
        assert await readers.read(SHORT, read, 0) is False
        assert readers.waiting == 1
        gate.set()
        assert await long is True
        assert readers.waiting == 0
        readers.close()

    asyncio.run(run())
    assert order == [False, True]


def test_what_waits_to_be_read_counts_and_long_requests_leave_room_for_short_ones():
    gate = threading.Event()

    async def run():
        readers = Readers(8)
        held = [asyncio.create_task(readers.read(LONG, lambda body, is_long: gate.wait(60), 0)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(ProtocolError, match="too many requests") as caught:
            await readers.read(LONG, lambda body, is_long: None, 0)
        assert caught.value.status == 429
        held += [asyncio.create_task(readers.read(SHORT, lambda body, is_long: gate.wait(60), 0)) for _ in range(4)]
        await asyncio.sleep(0)
        assert readers.waiting == 6
        with pytest.raises(ProtocolError, match="too many requests"):
            await readers.read(SHORT, lambda body, is_long: None, 2)  # two more wait for the model
        gate.set()
        assert all(await asyncio.gather(*held))
        assert readers.waiting == 0
        readers.close()

    asyncio.run(run())


def test_a_request_that_fails_waits_no_longer():
    def fail(body, is_long):
        raise ProtocolError(400, "wrong")

    async def run():
        readers = Readers(1)
        for body in (SHORT, LONG, SHORT, LONG):
            with pytest.raises(ProtocolError, match="wrong"):
                await readers.read(body, fail, 0)
        readers.close()

    asyncio.run(run())
