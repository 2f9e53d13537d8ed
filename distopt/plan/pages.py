"""Pages: which states lie together where they do not fit on the device, where each page lies, and what moves in a step.

From shapes and integers alone, as all of the plan. A page has a run of tiles of one or several states, codes and scales,
and moves as one piece; pages of one optimizer share a few slots on the device, through which they pass in the order of
the plan. Elementwise rules have all states of some elements in a page; rules that work on matrices read and write their
states at different times, so there each state has pages of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from distopt.plan.buckets import GroupPlan
from distopt.plan.held import state_bytes
from distopt.plan.hosting import STEPPED, is_stepped_there, seconds_per_element
from distopt.plan.tiles import CHUNK, GPU_CHUNK, Offload, Tiles, join_tiles, local_tiles, whole_tiles
from distopt.plan.trace import trace
from distopt.rule import Shape, require

SLOTS = 4
"""Pages that are on the device at once: two being fetched, one being stepped, one being written back."""
PAGE_BYTES, GPU_PAGE_BYTES = 4 << 20, 32 << 20
"""Bytes of a page, as far as a run of elements that is decoded at once lets it be so small. Long enough that a transfer
runs at full speed, short enough that the slots are few bytes."""
SECTOR, LINE = 4096, 64
"""What lengths of pages, and where states begin in them, are multiples of: direct I/O wants the one, a cache line is the
other."""
MASTER = "master"
HOSTED = {"cpu": None, "cpu_step": True, "cpu_pages": False}
"""Values of `offload` for host memory, and whether elementwise rules step there."""
UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
Key = tuple[int, int | None, str]
"""Whose pages: a parameter number, a matrix (None: they lie as the parameter does), a state ("": all of a unit's)."""


@dataclass(eq=False)
class Page:
    """A run of tiles of some states.

    Attributes:
        tiles, elements: of the states' own.
        places: by state, where its codes and its scales begin.
        content, nbytes: bytes of codes and scales, and of all of it.
        reads, writes: how often it is, in an ordinary step.
        tier: "device", "cpu", "cpu_step" (in host memory, and stepped there) or "disk:<path>"; `offset`: where it lies there.
    """

    tiles: slice
    elements: slice
    places: dict[str, tuple[int, int]]
    content: int
    nbytes: int
    reads: int = 1
    writes: int = 1
    tier: str = "device"
    offset: int = 0


def parse_offload(value: Any) -> Offload | None:
    """Read `offload`: None, a tier, or shares by tier, what they leave staying on the device. "cpu" alone may be stepped on
    the host where that is faster, "cpu_step" is, "cpu_pages" and shares are not.

    Raises:
        ValueError: no such tier, no path, or shares that are none.
    """
    if value is None:
        return None
    if isinstance(value, str) and value in HOSTED:
        return Offload((("cpu", 1.0),), HOSTED[value])
    shares = dict(value) if isinstance(value, Mapping) else {value: 1.0}
    for tier, share in shares.items():
        if not isinstance(tier, str) or not (tier == "cpu" or re.fullmatch("disk:.+", tier)):
            near = get_close_matches(str(tier), (*HOSTED, "disk:/path"), n=1)
            raise ValueError(
                f"offload: 'cpu', 'disk:/path' or shares of these, 'cpu_step' or 'cpu_pages', got {tier!r}"
                f"{f'; did you mean {near[0]!r}?' if near else ''}"
            )
        require(
            isinstance(share, int | float) and 0 < share <= 1,
            f"offload: the share of {tier!r} must lie in (0, 1], got {share!r}",
        )
    require(bool(shares), "offload: no tier; pass None to keep states on the device")
    require(math.fsum(shares.values()) <= 1 + 1e-9, f"offload: shares add up to more than 1: {shares}")
    return Offload(tuple(shares.items()))


def parse_bytes(value: Any) -> int:
    """'8GiB' → 8589934592; a number is bytes.

    Raises:
        ValueError: neither.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(value))
    if match is None or match[2] not in UNITS:
        raise ValueError(f"device_budget: bytes, or a number and one of KiB, MiB, GiB, TiB; got {value!r}")
    return int(float(match[1]) * UNITS[match[2]])


def plan_pages(plans: Sequence[GroupPlan], device_budget: Any = None) -> None:
    """Cut the states of groups with `offload` into pages, and say where each lies.

    Args:
        plans: of all groups of an optimizer, on one rank.
        device_budget: bytes that states, slots included, may take on the device; None: what `offload` says.

    Raises:
        ValueError: the budget cannot hold what has to be on the device; says how much that is.
    """
    paged = [plan for plan in plans if plan.storage.offload is not None]
    require(
        device_budget is None or bool(paged),
        f"device_budget={device_budget!r} bounds the states that stay on the device where others are offloaded; pass "
        "offload='cpu' or 'disk:/path' as well",
    )
    for plan in paged:
        assert plan.storage.offload is not None
        shares = plan.storage.offload.shares
        require(
            device_budget is None or math.fsum(share for _, share in shares) > 1 - 1e-9,
            f"device_budget decides how much stays on the device, and so do the shares of offload={dict(shares)}, which leave "
            "some of it there; give one of them",
        )
        plan.hosted.clear()
        plan.pages = dict(_all_pages(plan, free=device_budget is None))
    room = None if device_budget is None else _room(plans, parse_bytes(device_budget), device_budget)
    offsets: dict[str, int] = {}
    for plan in paged:
        assert plan.storage.offload is not None
        pages = [page for found in plan.pages.values() for page in found]
        _place([page for page in pages if page.tier != STEPPED], plan.storage.offload, room)
        if room is not None:
            room -= sum(page.nbytes for page in pages if page.tier == "device")
        for page in pages:
            page.offset = offsets.get(page.tier, SECTOR)  # where a file has its head
            offsets[page.tier] = page.offset + page.nbytes


def slot_bytes(plans: Sequence[GroupPlan]) -> int:
    """Bytes of one slot; 0 where nothing moves."""
    return max((page.nbytes for plan in plans for page in _moving(plan)), default=0)


def paging(plan: GroupPlan) -> dict[str, Any]:
    """Bytes of pages by tier, and what of them moves in an ordinary step."""
    tiers: dict[str, int] = {}
    for pages in plan.pages.values():
        for page in pages:
            tiers[page.tier] = tiers.get(page.tier, 0) + page.nbytes
    return {
        "paged_bytes": tiers,
        "offload_seconds": offload_seconds(plan),
        "page_bytes_read_per_step": sum(page.reads * page.nbytes for page in _moving(plan)),
        "page_bytes_written_per_step": sum(page.writes * page.nbytes for page in _moving(plan)),
    }


def offload_seconds(plan: GroupPlan) -> dict[str, Any]:
    """By the cost model, seconds per step of this rank for what elementwise rules keep in host memory: with its pages moved,
    and stepped on the host. `elements` says of how many that is, `stepped` how many of them are stepped there."""
    found = {"elements": 0, "stepped": 0, "pages": 0.0, STEPPED: 0.0}
    offload = plan.storage.offload
    if not plan.pages or not plan.elementwise or offload is None or "cpu" not in dict(offload.shares):
        return found
    for key, codecs, _, _ in _stores(plan):
        here = sum(p.elements.stop - p.elements.start for p in plan.pages[key] if p.tier in ("cpu", STEPPED))
        pages, step = seconds_per_element(codecs.values(), plan.specs[key[0]].itemsize, plan.machine)
        found["elements"] += here
        found["stepped"] += here if any(page.tier == STEPPED for page in plan.pages[key]) else 0
        found["pages"] += here * pages
        found[STEPPED] += here * step
    return found


def device_bytes(plans: Sequence[GroupPlan]) -> int:
    """Bytes that states take on the device of this rank, slots included."""
    kept = sum(state_bytes(plan)[0] for plan in plans)
    away = (page for plan in plans for pages in plan.pages.values() for page in pages if page.tier != "device")
    return kept - sum(page.content for page in away) + SLOTS * slot_bytes(plans)


def _moving(plan: GroupPlan) -> Iterator[Page]:
    return (page for pages in plan.pages.values() for page in pages if page.tier not in ("device", STEPPED))


def _room(plans: Sequence[GroupPlan], budget: int, given: Any) -> int:
    """Bytes of pages that fit on the device beside slots and what is not paged."""
    everything = [page for plan in plans for found in plan.pages.values() for page in found]
    kept = sum(state_bytes(plan)[0] for plan in plans) - sum(page.content for page in everything)
    pages = [page for page in everything if page.tier != STEPPED]
    if kept + sum(page.nbytes for page in pages) <= budget:  # all of it: no slots
        return budget - kept
    slots = SLOTS * max((page.nbytes for page in pages), default=0)
    least = kept + min(slots, sum(page.nbytes for page in pages))
    require(
        kept + slots <= budget,
        f"device_budget={given!r} cannot hold what has to be on the device: {SLOTS} slots of {slots // SLOTS} bytes for pages on "
        f"their way and {kept} bytes of states that are not paged. Pass at least {least} (all states: "
        f"{kept + sum(page.nbytes for page in pages)}), or a state_codec of fewer bits",
    )
    return budget - kept - slots


def _place(pages: list[Page], offload: Offload, room: int | None) -> None:
    """Give every page its tier, such that pages of each tier are spread evenly over a step: while those of one are on their
    way, those of another are stepped."""
    total = sum(page.nbytes for page in pages)
    outside = 1.0 if room is None else 1 - min(1.0, room / max(total, 1))
    shares = {tier: share * outside for tier, share in offload.shares}
    shares["device"] = 1 - sum(shares.values())
    placed = dict.fromkeys(shares, 0)
    done = 0
    for page in pages:
        done += page.nbytes
        open_ = [tier for tier in shares if tier != "device" or room is None or placed[tier] + page.nbytes <= room]
        page.tier = max(open_, key=lambda tier: shares[tier] * done - placed[tier])
        placed[page.tier] += page.nbytes


def _all_pages(plan: GroupPlan, *, free: bool) -> Iterator[tuple[Key, list[Page]]]:
    """With `free` the cost model may have units stepped on the host."""
    assert plan.storage.offload is not None
    asked = plan.storage.offload.hosted
    asked = False if not plan.elementwise or (asked is None and not free) else asked
    for key, codecs, tiles, written in _stores(plan):
        hosted = is_stepped_there(codecs, plan.specs[key[0]].itemsize, plan.machine, asked, plan.gpu)
        pages = _cut(codecs, tiles, plan.gpu and not hosted)
        if hosted:
            plan.hosted.add(key[0])
        scaled = any(codec.scaled for codec in codecs.values())
        for page in pages:
            cut = np.searchsorted(tiles.cuts, (page.tiles.start, page.tiles.stop))
            # Elementwise rules compute what has cut tiles twice, first for the scales that ranks agree on.
            page.reads = 2 if plan.elementwise and scaled and cut[0] < cut[1] else 1
            page.writes = int(written)
            page.tier = STEPPED if hosted else page.tier
        yield key, pages


def _stores(plan: GroupPlan) -> Iterator[tuple[Key, dict[str, Any], Tiles, bool]]:
    """What is paged: whose it is, its codecs by state, its tiles, and whether an ordinary step writes it. In the order in
    which a step comes by."""
    storage = plan.storage
    homes = [(spec.layout, spec.index) for spec in plan.specs]
    dtypes = [spec.dtype for spec in plan.specs]
    if plan.elementwise:
        states = {name: state for name, state in plan.rule.states(Shape(1, 1, 1)).items() if state.kind == "like"}
        for members in storage.pack([layout for layout, _ in homes], dtypes, states):
            tiles = join_tiles([local_tiles(*homes[i]) for i in members], [0] * len(members))
            shape = homes[members[0]][0].shape
            codecs = {name: storage.codec(name, state, shape) or storage.exact for name, state in states.items()}
            if storage.mastered(dtypes[members[0]].itemsize):
                codecs[MASTER] = storage.master
            yield (members[0], None, ""), codecs, tiles, True
        return
    seen: set[int] = set()
    for bucket in plan.buckets:
        matrices = [(number, entry.shape) for number, entry in enumerate(bucket.entries)]
        if bucket.exchanged:
            here = [number for owned in bucket.owned for number in owned.entries]
        else:
            here = [piece.entry for stack in bucket.stacks for piece in stack.pieces]
        for param in dict.fromkeys(bucket.entries[number].param for number, _ in matrices):
            if param not in seen:
                seen.add(param)
                yield from _lying(plan, param)
        for number in here:
            entry = bucket.entries[number]
            states = plan.rule.states(entry.shape)
            owned = {name: s for name, s in states.items() if s.kind == "owner" and storage.codec(name, s, ())}
            assigned = _assigned(plan, entry.shape) if owned else frozenset()
            for name, state in owned.items():
                codec = storage.codec(name, state, ())
                yield (
                    (entry.param, entry.matrix, name),
                    {name: codec},
                    whole_tiles(*storage.extent(state)),
                    name in assigned,
                )
    for param in range(len(plan.specs)):  # of which nothing is computed here
        if param not in seen:
            yield from _lying(plan, param)


def _lying(plan: GroupPlan, param: int) -> Iterator[tuple[Key, dict[str, Any], Tiles, bool]]:
    """Of one parameter, what lies as it does."""
    spec, storage, shapes = plan.specs[param], plan.storage, plan.logical(param).shapes
    tiles = local_tiles(spec.layout, spec.index)
    for name, state in plan.rule.states(shapes[0]).items() if shapes else ():
        codec = storage.codec(name, state, spec.layout.shape) if state.kind == "like" else None
        if codec:
            yield (param, None, name), {name: codec}, tiles, True
    if storage.mastered(spec.itemsize):
        yield (param, None, MASTER), {MASTER: storage.master}, tiles, True


def _assigned(plan: GroupPlan, shape: Shape) -> frozenset[str]:
    """The states that the rule gives new values in the commonest kind of step."""
    step, _ = max(plan.rule.phases().values(), key=lambda phase: phase[1])
    return trace(plan.rule, shape, step, plan.gpu).assigned


def _cut(codecs: Mapping[str, Any], tiles: Tiles, gpu: bool) -> list[Page]:
    """Pages of these stores, each a whole number of the spans that are decoded at once."""
    limit = GPU_PAGE_BYTES if gpu else PAGE_BYTES
    runs: list[list[tuple[int, int, int, int]]] = []
    size = 0
    for span in tiles.spans(GPU_CHUNK if gpu else CHUNK):
        first, last, start, stop = span
        more = sum(c.code_bytes(stop - start) + (4 * (last - first) if c.scaled else 0) for c in codecs.values())
        if not runs or size + more > limit - SECTOR:
            runs.append([])
            size = 0
        runs[-1].append(span)
        size += more
    return [_page(codecs, run) for run in runs]


def _page(codecs: Mapping[str, Any], run: list[tuple[int, int, int, int]]) -> Page:
    tiles, elements = slice(run[0][0], run[-1][1]), slice(run[0][2], run[-1][3])
    places: dict[str, tuple[int, int]] = {}
    content = end = 0
    for name, codec in codecs.items():
        codes = sum(codec.code_bytes(stop - start) for _, _, start, stop in run)
        scales = 4 * (tiles.stop - tiles.start) if codec.scaled else 0
        places[name] = end, _up(end + codes, LINE)
        content += codes + scales
        end = _up(places[name][1] + scales, LINE)
    return Page(tiles, elements, places, content, _up(max(end, 1), SECTOR))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
