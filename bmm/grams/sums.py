"""The sum of one expert's shards: in row order, in float64, one input group in memory at a time.

A running sum, of the first shards without a gap, is an artefact of the same form as a shard. It is named by the
shards that are in it, and takes their place while others are still computed: it is durable before they go. Whatever
the blocks, the same numbers are added in the same order, so the bytes are those of one sum over all shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from safetensors.torch import save_file
from torch import Tensor

from bmm.away import away, store_at_hand
from bmm.checkpoint.mapped import mapped
from bmm.errors import ArtefactDamagedError, BMMError
from bmm.grams import blocks
from bmm.grams.collect import GramSum
from bmm.grams.shards import FILE_BYTES, SHARD, ShardRequest, compute_shard
from bmm.progress import tell
from bmm.store import Artefact, Draft, Reference, Store, artefact_key

SUM = "gram-sum"
"""The kind of running sums."""
SUM_VERSION = 1
# Of thousands of small files: what takes time is the disk's answer, or a bucket's.
_REMOVERS = 8


class SumLostError(BMMError):
    """A running sum is damaged or gone: the shards that were in it have to be computed again."""


class RunningSum:
    """The sum of one expert's shards, as far as it has been made.

    One thread may `add` while another one `note`s and asks for `block`s; all else wants both to be idle.

    Args:
        store: where shards and sums are.
        expert: its name, for people.
        shards: all of them, in row order.
    """

    def __init__(self, store: Store, expert: str, shards: Sequence[ShardRequest]) -> None:
        self.shards = tuple(shards)
        self.keys = [shard.key() for shard in self.shards]
        self.begun = [0] * len(self.shards)
        """How often each shard was begun by this run; 0 for those that were there."""
        self.lost = False
        """Whether the sum was found damaged since `resume`: nothing is added to it then."""
        self._store = store
        self._expert = expert
        self._data = Reference.from_json(self.shards[0].data)
        self._groups = sorted(values["input_group"] for values in self.shards[0].maps)
        self._names = sum_keys(self.keys)
        self._found: dict[int, Reference] = {}
        self._sum: Reference | None = None
        self._summed = 0
        self._given = 0
        self._whole = 0

    def resume(self) -> None:
        """See what earlier runs have left: the longest sum, and shards after it.

        Raises:
            StoreAwayError: the store is away.
        """
        with store_at_hand(self._store, self._data):
            listed, there = set(self._store.keys(SUM)), set(self._store.keys(SHARD))
            self.lost, self._sum, self._summed, self._found = False, None, 0, {}
            for count in [count for count, key in enumerate(self._names, 1) if key in listed][::-1]:
                if self._sum is None:
                    self._sum = self._look_for(count)
                    self._summed = 0 if self._sum is None else count
                    if self._sum is None:
                        self._tell_lost(count)
                if self._summed != count:
                    self._store.discard(SUM, self._names[count - 1])
            self._given = self._whole = self._summed
            # A run was killed after the sum had been written, and before they went.
            self._remove([key for key in self.keys[: self._summed] if key in there])
            for index in range(self._summed, len(self.keys)):
                key = self.keys[index]
                if key in there and (found := self._store.find(SHARD, key)) is not None:
                    self.note(index, found)

    def missing(self) -> list[int]:
        """Return which shards are neither there nor in the sum."""
        return [index for index in range(self._summed, len(self.shards)) if index not in self._found]

    def note(self, index: int, reference: Reference, attempts: int = 0) -> None:
        """Note that a shard is there, and how often it was begun until it was."""
        self.begun[index] += attempts
        self._found[index] = reference

    def block(self) -> range | None:
        """Return the next block of shards to `add`, once, as soon as all of them are there; never the last one."""
        while self._whole in self._found:
            self._whole += 1
        stop = self._given + blocks.BLOCK
        if self._whole < stop or stop >= len(self.shards):
            return None
        block, self._given = range(self._given, stop), stop
        return block

    def add(self, block: range, carry_on: Callable[[], None] = lambda: None) -> None:
        """Add a block of shards to the sum, which takes their place, unless the blocks before it are not in it.

        What was done already is not done again.

        Args:
            block: from `block`, in that order.
            carry_on: called now and then; may raise.

        Raises:
            OutputError: the disk refuses.
            StoreAwayError: the store is away.
        """
        if self.lost or self._summed < block.start:
            # What was before it could not be added.
            return
        with store_at_hand(self._store, self._data):
            if self._summed < block.stop:

                def make(draft: Draft) -> None:
                    parts = [*self._read(), *(self._shard(index) for index in block)]
                    write(draft, reduce(parts, self._groups, carry_on))

                describe = {"expert": self.shards[0].expert_digest, "shards": block.stop}
                try:
                    self._sum, _ = self._store.obtain(SUM, self._names[block.stop - 1], make, describe=describe)
                except SumLostError:
                    return
                self._summed = block.stop
            if block.start:
                self._store.discard(SUM, self._names[block.start - 1])
            self._remove([self.keys[index] for index in block])
            for index in block:
                self._found.pop(index, None)

    def total(self) -> Iterator[tuple[str, GramSum]]:
        """Yield every input group's sum over all shards; a shard that is damaged is made again.

        Raises:
            SumLostError: the shards that are missing since have to be computed again, after `resume`.
        """
        rest = range(self._summed, len(self.shards))
        yield from reduce([*self._read(), *(self._shard(index) for index in rest)], self._groups)

    def clear(self) -> None:
        """Remove all shards and sums of this expert that there are.

        Raises:
            StoreAwayError: the store is away.
        """
        with store_at_hand(self._store, self._data):
            listed, there = set(self._store.keys(SUM)), set(self._store.keys(SHARD))
            self._remove([key for key in self.keys if key in there])
            for key in self._names:
                if key in listed:
                    self._store.discard(SUM, key)

    def _read(self) -> list[Artefact]:
        """Return the sum so far, in a list that is empty before there is one."""
        if self._sum is None:
            return []
        if self.lost:
            raise SumLostError(f"the sum of the first {self._summed} Gram shards of {self._expert} is damaged")
        try:
            return [self._store.read(self._sum)]
        except ArtefactDamagedError as error:
            if self._look_for(self._summed) == self._sum:
                return [self._store.read(self._sum)]
            self.lost = True
            self._store.discard(SUM, self._sum.key)
            self._tell_lost(self._summed)
            raise SumLostError(str(error)) from error

    def _look_for(self, count: int) -> Reference | None:
        """Return the sum of so many shards, None if it is damaged or gone, which is not to be said lightly."""
        key = self._names[count - 1]
        found = self._store.find(SUM, key)
        if found is None:
            if self._store.is_away():
                raise away(self._store)
            # The store may have come back just now.
            found = self._store.find(SUM, key)
        return found

    def _tell_lost(self, count: int) -> None:
        tell(f"The sum of the first {count} Gram shards of {self._expert} is damaged; they are computed again.")

    def _shard(self, index: int) -> Artefact:
        """Return a shard; one damaged since it was computed is made again rather than believed."""
        reference = self._found.get(index)
        if reference is not None:
            try:
                return self._store.read(reference)
            except ArtefactDamagedError:
                pass
        answer = compute_shard(dict(vars(self.shards[index])))
        self.begun[index] += answer.attempts
        return self._store.read(answer.reference)

    def _remove(self, keys: Sequence[str]) -> None:
        if keys:
            with ThreadPoolExecutor(_REMOVERS) as removers:
                list(removers.map(lambda key: self._store.discard(SHARD, key), keys))


def sum_keys(shards: Iterable[str]) -> list[str]:
    """Return the key of the sum of the first shard, of the first two, and so on; the cut into blocks is not in it.

    Args:
        shards: the keys of all shards, in row order.
    """
    keys, before = [], ""
    for shard in shards:
        before = artefact_key(SUM, SUM_VERSION, {"before": before, "shard": shard}, {})
        keys.append(before)
    return keys


def reduce(
    parts: Sequence[Artefact], groups: Sequence[str], carry_on: Callable[[], None] = lambda: None
) -> Iterator[tuple[str, GramSum]]:
    """Yield every input group's sum over shards, in the order given, in float64, one group at a time.

    Args:
        parts: shards, of which the first may be the sum of those before.
        groups: names of the input groups.
        carry_on: called before each matrix that is added; may raise.
    """
    files = [mapped(sorted(part.path.glob("sums-*.safetensors"))) for part in parts]
    rows = [part.read_json("rows.json") for part in parts]
    for name in groups:
        total = GramSum(files[0][name].tensor(name).clone(), rows[0][name])
        for file, counted in zip(files[1:], rows[1:], strict=True):
            carry_on()
            total.add(GramSum(file[name].tensor(name), counted[name]))
        yield name, total


def write(draft: Draft, sums: Iterable[tuple[str, GramSum]]) -> None:
    """Write sums as a shard's are, a few at a time in memory."""
    rows: dict[str, int] = {}
    waiting: dict[str, Tensor] = {}
    size = places = 0

    def save() -> None:
        nonlocal waiting, size, places
        save_file(waiting, draft.path / f"sums-{places:05}.safetensors")
        waiting, size, places = {}, 0, places + 1

    for name, part in sums:
        if waiting and size + part.total.nbytes > FILE_BYTES:
            save()
        rows[name], waiting[name] = part.rows, part.total
        size += part.total.nbytes
    if waiting:
        save()
    draft.write_json("rows.json", rows)
