"""Traces which rows of a block's projections reach which columns, and joins those that belong together to units.

Columns of a consumer that depend on a common row belong to one unit, with all rows that reach them. Rows that reach all
columns are shared by the units, and stay. A consumer whose inputs depend on the block's input directly reads the
residual stream and has no units.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plprune.architecture.modules import is_projection
from plprune.architecture.probing import OUTPUT, BlockProbes, Hits


@dataclass
class Reach:
    """How the rows of one producer reach the columns of one consumer."""

    wide: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # rows, and the columns that each of them reaches
    single: list[Tensor] = field(default_factory=list)  # [columns]: the row that each depends on, or -1


INSIDE = 3  # rows of a segment that are looked at by themselves
FEW = 8  # segments that are all looked at
Source = tuple[str, int | None]  # path of a projection, or name of another parameter and its axis


class Tracer:
    """Traces rows to columns within one block.

    Args:
        probes: Of the block.
        known: What was traced within parts of other blocks, by what these parts are; more is added to it.
    """

    def __init__(self, probes: BlockProbes, known: dict[Hashable, dict[str, Reach]]) -> None:
        self.probes, self.known = probes, known
        ones = torch.ones(1, 1, dtype=torch.bool)
        by_input = probes.reached(None, ones, draws=2)
        self.columns = {c: hits.shape[1] for c, hits in by_input.items()}
        self.residual = {c for c, hits in by_input.items() if hits.any()} | {OUTPUT}
        probes.open_children(self.residual)

    def sources(self) -> Iterator[tuple[Source, int]]:
        """All producers that may hold rows of units, with their numbers of rows."""
        block = self.probes.block
        for name, parameter in block.named_parameters():
            owner = block.get_submodule(name.rpartition(".")[0])
            if not is_projection(owner) and not parameter.is_meta and not name.endswith(".bias"):
                yield from (((name, axis), n) for axis, n in enumerate(parameter.shape) if n > 1)
        yield from (((path, None), rows) for path, rows in self.probes.rows.items())

    def hits(self, source: Source, masks: Tensor, draws: int = 1) -> Hits:
        name, axis = source
        if axis is None:
            return self.probes.reached(name, masks, draws)
        return self.probes.reached_by_parameter(name, axis, masks, draws)

    def reach(self, source: Source, n: int) -> dict[str, Reach]:
        """How a producer's rows reach each consumer's columns; the same in parts that are alike."""
        if (part := self.probes.part(source[0])) is None:
            return self._traced(source, n)
        key = part, source, frozenset(self.residual)
        if key not in self.known:
            self.known[key] = self._traced(source, n)
        return self.known[key]

    def _traced(self, source: Source, n: int) -> dict[str, Reach]:
        some = torch.arange(INSIDE) * (n - 1) // (INSIDE - 1)
        masks = torch.ones(1 + INSIDE, n, dtype=torch.bool)
        masks[1:] = torch.arange(n) == some[:, None]
        touched = {c: h for c, h in self.hits(source, masks).items() if h.any() and c not in self.residual}
        if not touched or (source[1] is not None and all((h == h[:1]).all() for h in touched.values())):
            return {}  # it reaches nothing, or is a parameter that all units share
        if all(h[1:].sum(1).max() <= 1 for h in touched.values()):
            whole, halves = torch.arange(n), list(torch.arange(n).tensor_split(2))
            for parts in ([whole], *([halves, [whole[::2], whole[1::2]]] if n % 2 == 0 else [])):
                if (reach := self._elementwise(source, n, parts)) is not None:
                    return reach
        return self._segments(source, n)

    def _elementwise(self, source: Source, n: int, parts: list[Tensor]) -> dict[str, Reach] | None:
        """The reach if each column depends on at most one row of each part."""
        found: dict[str, Reach] = {}
        for rows in parts:
            if not _add_singles(self._decoded(source, n, rows), found):
                return None
        return found

    def _decoded(self, source: Source, n: int, rows: Tensor, draws: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
        """For each consumer the columns that depend on some of the rows, and the row if it is a single one, else -1.

        Rows are disturbed by the bits of their numbers: a column of a single row changes with a bit or its complement.
        """
        code = bit_code(len(rows)).T
        masks, bits = torch.zeros(2 * len(code), n, dtype=torch.bool), torch.arange(len(code))
        masks[:, rows] = torch.cat([code, ~code])
        decoded = {}
        for c, hits in self.hits(source, masks, draws).items():
            ones, zeros = hits.chunk(2)
            row = (ones.long() << bits[:, None]).sum(0)
            valid = (ones ^ zeros).all(0) & (row < len(rows))
            decoded[c] = hits.any(0), torch.where(valid, rows[row.clamp(max=len(rows) - 1)], -1)
        return decoded

    def _segments(self, source: Source, n: int) -> dict[str, Reach]:
        """The reach of rows that act in segments, as those of heads do, and of single rows between them."""
        found: dict[str, Reach] = {}
        pending, loose = [(0, n)], []
        while pending:
            split, some = [], pending[:: (len(pending) - 1) // 2] if len(pending) > FEW else []
            tried = zip(self._within(source, n, some), some, strict=True)
            if some and not any(_acts_alike(mine, b - a) for mine, (a, b) in tried):
                pending = [part for each in pending for part in _divided(*each)]
                continue  # three that lie far apart are to be divided, so all are
            for mine, (a, b) in zip(self._within(source, n, pending), pending, strict=True):
                if _single(mine, b - a):
                    loose.append(torch.arange(a, b))
                elif _acts_alike(mine, b - a):
                    for c, h in mine.items():
                        found.setdefault(c, Reach()).wide.append((torch.arange(a, b), h[0]))
                else:
                    split += _divided(a, b)
            pending = split
        if loose:
            self._loose(source, n, torch.cat(loose), found)
        return found

    def _within(self, source: Source, n: int, segments: Sequence[tuple[int, int]]) -> Iterator[Hits]:
        """For each segment the columns that depend on all of its rows, and on some of them, [1 + INSIDE, columns]."""
        masks = torch.zeros(len(segments), 1 + INSIDE, n, dtype=torch.bool)
        for mask, (a, b) in zip(masks, segments, strict=True):
            mask[0, a:b] = True
            mask[torch.arange(INSIDE) + 1, a + (b - a - 1) * torch.arange(INSIDE) // (INSIDE - 1)] = True
        hits = {c: h.unflatten(0, (-1, 1 + INSIDE)) for c, h in self.hits(source, masks.flatten(0, 1)).items()}
        for i in range(len(segments)):
            yield {c: h[i] for c, h in hits.items() if h[i, 0].any()}

    def _loose(self, source: Source, n: int, rows: Tensor, found: dict[str, Reach]) -> None:
        """Adds the reach of single rows: elementwise for those that reach fewest columns."""
        while len(rows):
            if _add_singles(self._decoded(source, n, rows, draws=2), found):
                return
            masks = torch.zeros(len(rows), n, dtype=torch.bool)
            masks[torch.arange(len(rows)), rows] = True
            hits = self.hits(source, masks, draws=2)
            count = torch.stack([h.sum(1) for h in hits.values()]).sum(0)
            most = count == count.max()
            for c, h in hits.items():
                for i in (most & h.any(1)).nonzero().flatten().tolist():
                    found.setdefault(c, Reach()).wide.append((rows[i, None], h[i]))
            rows = rows[~most]


def bit_code(n: int) -> Tensor:  # [n, bits] bool
    """The numbers below n in binary: any two differ in some bit."""
    bits = torch.arange(max(1, (n - 1).bit_length()))
    return (torch.arange(n)[:, None] >> bits & 1).bool()


def _add_singles(decoded: dict[str, tuple[Tensor, Tensor]], found: dict[str, Reach]) -> bool:
    """Adds what was decoded, if each column that is reached depends on a single row; says whether it does."""
    if any((reached & (row < 0)).any() for reached, row in decoded.values()):
        return False
    for c, (reached, row) in decoded.items():
        if reached.any():
            found.setdefault(c, Reach()).single.append(torch.where(reached, row, -1))
    return True


def _single(hits: Hits, rows: int) -> bool:
    """Whether the rows of a segment probably act one by one."""
    return rows == 1 or (rows >= INSIDE and all(_disjoint(h, rows) for h in hits.values()))


def _acts_alike(hits: Hits, rows: int) -> bool:
    """Whether a segment is not to be divided: its rows act one by one, or reach the same columns."""
    return _single(hits, rows) or all((h == h[:1]).all() for h in hits.values())


def _divided(a: int, b: int) -> list[tuple[int, int]]:
    step = (b - a) // _largest_factor(b - a)
    return [(s, s + step) for s in range(a, b, step)]


def _disjoint(hits: Tensor, rows: int) -> bool:  # [1 + INSIDE, columns]: of all rows, and of some of them
    """Whether rows probably reach as many columns each, and none the same."""
    count = hits.sum(1)
    return bool((count[1:] == count[1]).all() and count[0] == rows * count[1] and hits[1:].sum(0).max() <= 1)


def _largest_factor(n: int) -> int:
    """The largest prime factor."""
    factor, f = 1, 2
    while f * f <= n:
        while n % f == 0:
            factor, n = max(factor, f), n // f
        f += 1
    return max(factor, n) if n > 1 else factor


def units_of(columns: int, reaches: Sequence[Reach]) -> Tensor:  # [columns]
    """The unit of each column, numbered in order; -1 for columns that depend on nothing."""
    wide = [cols for reach in reaches for _, cols in reach.wide]
    single = [row for reach in reaches for row in reach.single]
    reached = torch.stack([*wide, *[row >= 0 for row in single]]).any(0)
    narrow = [cols for cols in wide if not torch.equal(cols, reached)]
    links = torch.stack(narrow or wide).unique(dim=0) if wide else torch.zeros(0, columns, dtype=torch.bool)
    label = torch.arange(columns)
    while True:
        old = label.clone()
        for cols in links:
            label[cols] = label[cols].min()
        for row in single:
            there = row >= 0
            least = torch.full((int(row.max()) + 1,), columns)
            least = least.scatter_reduce(0, row[there], label[there], "amin")
            label[there] = least[row[there]]
        if torch.equal(old, label):
            break
    label[~reached] = columns
    numbers = label.unique(return_inverse=True)[1]
    return torch.where(reached, numbers, -1)


@dataclass
class Found:
    """The units of one consumer."""

    consumer: str
    columns: Tensor  # [units, columns per unit]
    wide: dict[Source, Tensor]  # [units, rows per unit]
    single: list[tuple[Source, Tensor, Tensor]]  # [units, rows per unit], and [columns] the row of each
    inner: bool = False  # whether other consumers read what it computes of them

    @property
    def elementwise(self) -> bool:
        return not self.wide and self.columns.shape[1] == 1


@dataclass
class Inseparable:
    """Columns of a consumer that no units can be made of."""

    consumer: str
    elementwise: bool
    why: str


def found_in(tracer: Tracer) -> tuple[list[Found], list[Inseparable]]:
    """The units of all consumers of a block that leave nothing else behind; and what is not made of such units."""
    reach = {source: tracer.reach(source, n) for source, n in tracer.sources()}
    everywhere: list[Found] = []
    others: list[Inseparable] = []
    for c, columns in tracer.columns.items():
        mine = {source: by[c] for source, by in reach.items() if c in by}
        if c not in tracer.residual and any(axis is None for _, axis in mine):
            found = _units(c, columns, mine)
            if isinstance(found, Found) and (why := _reaching_others(found, reach)):
                found = Inseparable(c, found.elementwise, why)
            if isinstance(found, Found):
                found.inner = bool(reach.get((c, None)))
                everywhere.append(found)
            else:
                others.append(found)
    return everywhere, others


def _units(consumer: str, columns: int, reaches: dict[Source, Reach]) -> Found | Inseparable:
    unit = units_of(columns, [reach for (_, axis), reach in reaches.items() if axis is None])
    if (unit < 0).any():
        return Inseparable(consumer, False, "some columns depend on no other projection")
    count = int(unit.max()) + 1
    index = _ragged(unit, torch.arange(columns), count)
    if index is None:
        return Inseparable(consumer, False, f"its {count} units have unequal numbers of columns")
    found = Found(consumer, index, {}, [])
    for source, reach in reaches.items():
        uneven = Inseparable(
            consumer, count == columns, f"its {count} units have unequal numbers of rows of {source[0]}"
        )
        rows, owners = [], []
        for r, cols in reach.wide:
            own = unit[cols].unique()
            if len(own) == 1 or count == 1:
                rows.append(r)
                owners.append(own[:1].expand(len(r)))
        if rows:
            index = _ragged(torch.cat(owners), torch.cat(rows), count)
            if index is None:
                return uneven
            found.wide[source] = index
        for row in reach.single:
            there = row >= 0
            pairs = torch.stack([unit[there], row[there]], 1).unique(dim=0)
            if len(pairs) > len(pairs[:, 1].unique()):
                continue  # a row that several units share, as the weight of a norm over each head
            index = _ragged(pairs[:, 0], pairs[:, 1], count)
            if index is None:
                return uneven
            found.single.append((source, index, row))
    return found


def _ragged(owner: Tensor, item: Tensor, count: int) -> Tensor | None:  # [n], [n] -> [count, n / count]
    """The items of each owner, ascending; None if some have more than others."""
    sizes = owner.bincount(minlength=count)
    if (sizes != sizes[0]).any():
        return None
    order = (owner * (int(item.max()) + 1) + item).argsort()
    return item[order].view(count, -1)


def _reaching_others(found: Found, reach: dict[Source, dict[str, Reach]]) -> str:
    """Whether rows of the units reach another consumer too, in words."""
    mine = [(s, i) for s, i in found.wide.items()] + [(s, i) for s, i, _ in found.single]
    for source, index in mine:
        for c, other in reach[source].items():
            if c == found.consumer:
                continue
            rows = [r for r, _ in other.wide] + [row[row >= 0] for row in other.single]
            if torch.isin(index, torch.cat(rows)).any():
                return f"{c} reads rows of {source[0]} too"
    return ""
