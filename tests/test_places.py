"""Places are shared so that whoever is slow cannot keep them from the others."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest

from broker.places import Places


@dataclass(eq=False)
class Holder:
    """Somebody who holds places."""

    places: int = 0


async def take_all(places: Places, holder: Holder) -> asyncio.Task[None]:
    """Take every place that is to be had, and wait for one more; return the task that waits."""

    async def take() -> None:
        while True:
            await places.take(holder)

    task = asyncio.create_task(take())
    await asyncio.sleep(0)
    return task


async def cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_takes_all_that_he_can_leaves_half_of_it() -> None:
    places = Places(256)
    taken = []
    for _ in range(9):
        holder = Holder()
        await cancel(await take_all(places, holder))
        taken.append(holder.places)
    assert taken == [128, 64, 32, 16, 8, 4, 2, 1, 1]


@pytest.mark.parametrize("greedy", [1, 2, 7, 50])
async def test_who_takes_all_and_is_slow_soon_has_no_more_than_he_leaves_for_the_next(greedy: int) -> None:
    places = Places(256)
    holders = [Holder() for _ in range(greedy)]
    waiting = [await take_all(places, holder) for holder in holders]
    chance = random.Random(greedy)
    for _ in range(20_000):
        # Each place is held for about as long as any other, so who has more gives one back more often.
        (holder,) = chance.choices(holders, [each.places for each in holders])
        places.release(holder)
        await asyncio.sleep(0)
    each = 256 / (greedy + 1)
    assert all(abs(holder.places - each) <= 2 for holder in holders)
    newcomer = Holder()
    assert places.room(newcomer) >= each // 2
    await asyncio.wait_for(places.take(newcomer), 1)
    await cancel(*waiting)


async def test_as_much_room_as_is_said_can_be_taken_without_waiting_and_no_more() -> None:
    for total in range(1, 40):
        for held in range(total):
            places, one, other = Places(total), Holder(), Holder()
            for _ in range(held):
                places._grant(other)
            room = places.room(one)
            for _ in range(room):
                await asyncio.wait_for(places.take(one), 1)
            assert places.room(one) == 0
            assert one.places == room
            assert one.places >= places._free


async def test_a_place_that_comes_free_goes_to_who_has_waited_longest() -> None:
    places = Places(1)
    first = Holder()
    await places.take(first)
    served: list[int] = []

    async def wait(number: int) -> None:
        holder = Holder()
        await places.take(holder)
        served.append(number)
        places.release(holder)

    waiting = [asyncio.create_task(wait(number)) for number in range(5)]
    await asyncio.sleep(0)
    places.release(first)
    await asyncio.wait_for(asyncio.gather(*waiting), 1)
    assert served == [0, 1, 2, 3, 4]
    assert places.taken == 0


async def test_who_ceases_to_wait_takes_no_place_with_him_whenever_that_is() -> None:
    places = Places(1)
    for is_granted in (False, True):
        holder, gone, last = Holder(), Holder(), Holder()
        await places.take(holder)
        leaving = asyncio.create_task(places.take(gone))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(places.take(last))
        await asyncio.sleep(0)
        if is_granted:
            places.release(holder)
            leaving.cancel()
        else:
            leaving.cancel()
            places.release(holder)
        await asyncio.wait_for(asyncio.wait({leaving}), 1)
        await asyncio.wait_for(waiting, 1)
        assert (gone.places, last.places, places.taken) == (0, 1, 1)
        places.release(last)


async def test_no_place_is_lost_or_made_whatever_happens() -> None:
    places = Places(16)
    holders = [Holder() for _ in range(40)]
    chance = random.Random(7)

    async def work(holder: Holder) -> None:
        for _ in range(30):
            task = asyncio.create_task(places.take(holder))
            await asyncio.wait({task}, timeout=chance.choice((0, 0.001, None)))
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            if not task.cancelled():
                await asyncio.sleep(chance.choice((0, 0, 0.001)))
                places.release(holder)

    await asyncio.wait_for(asyncio.gather(*map(work, holders)), 30)
    assert places.taken == 0
    assert all(holder.places == 0 for holder in holders)
    assert not places._waiting
