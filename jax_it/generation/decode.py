"""Decoding with a key-value cache, in few compiled shapes, each prompt in a slot of its own."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import sharding
from jax_it.data.batches import bucket
from jax_it.errors import UserError
from jax_it.generation import widths
from jax_it.generation.beam import Beams
from jax_it.generation.sampling import BROKEN, GREEDY, OneByOne, Sampling, check
from jax_it.generation.slots import Arrivals, Search, Slots, advance, empty, fill, keep, widen
from jax_it.models import Model, Params

NARROWEST = 128  # positions of prompts in the cache
LONGEST = 1 << 30
LOOK = 16  # steps after which texts are looked at by `stop`
ARRIVING = 8  # an eighth of the slots is filled at a time, at most, and fewer with prompts of more than 128 tokens
READ = 2048  # tokens, if there are so many, that are read together: fewer cost more each
SHRINKING = 4  # a quarter of the slots is left at the end, when there are no more prompts


class Text(NamedTuple):
    """What was generated for a prompt."""

    prompt: int  # its index
    sample: int  # which of its texts; of beams, 0 is the best
    tokens: list[int]  # without the end mark
    log_probs: list[float] | None  # of each token, and of the end mark if one ended the text
    finished: bool  # ended by an end mark or a stop string; False: by its limit


class Generator:
    """Generates for one model and one way of choosing tokens; it keeps what was compiled.

    Prompts are token ids: an encoder-decoder's source with its end mark, or the text a causal model continues. They
    come in sorted by length, shortest first, some at a time, whenever as many slots of the batch are done; so short
    texts wait for no long ones, and prompts of like length are padded together. A text ends at one of the model's end
    tokens or of the `ends` given beside them, at its limit, or as soon as `stop(tokens)` says so, which is not asked of
    beams. With `log_probs` they come with the texts. Raises ValueError where no text would ever end, and UserError
    where the model's logits are not finite, or as `sampling.check` does.
    """

    def __init__(
        self,
        model: Model,
        mesh: jax.sharding.Mesh,
        max_new_tokens: int,
        batch_size: int,
        sampling: Sampling = GREEDY,
        ends: Collection[int] = (),
        stop: Callable[[Sequence[int]], bool] | None = None,
        log_probs: bool = False,
    ):
        check(sampling, max_new_tokens, model.config.vocabulary)
        self._mesh, self._length = mesh, max_new_tokens
        self._ends = tuple(dict.fromkeys([*model.config.end_tokens, *ends]))
        if not self._ends:
            raise ValueError("no end token: texts would never end")
        beams = sampling.num_beams > 1
        if beams and sampling.num_samples > sampling.num_beams:
            raise ValueError(f"{sampling.num_samples} texts of a prompt, from {sampling.num_beams} beams")
        search: Search = (Beams if beams else OneByOne)(sampling, self._ends, max_new_tokens, log_probs)
        self._search, self._stop, self._log_probs = search, None if beams else stop, log_probs
        self._each = 1 if beams else sampling.num_samples  # slots of a prompt
        self._slots = sharding.shared_out(max(batch_size, self._each), mesh)
        self._prompts = sharding.shared_out(max(1, self._slots // ARRIVING // self._each), mesh)  # at most, at a time
        self._slots = max(self._slots, sharding.shared_out(self._prompts * self._each, mesh))
        self.shapes: set[tuple[str, int, int]] = set()  # that were compiled: what, slots, width

        self._empty = jax.jit(partial(empty, model, search), static_argnums=(0, 1))
        self._fill = jax.jit(partial(fill, model, search), donate_argnums=1)
        self._advance = jax.jit(
            partial(_advance, model, search), donate_argnums=1, out_shardings=(None, sharding.replicated(mesh))
        )
        self._ready = jax.jit(model.prepare_for_decoding)
        self._widen = jax.jit(widen, static_argnums=1)
        self._keep = jax.jit(partial(keep, search))

    def __call__(
        self, params: Params, prompts: Sequence[Sequence[int]], limits: Sequence[int] | None = None
    ) -> Iterator[Text]:
        """The texts of all prompts as they end; at most `limits[i]` tokens of prompt i's, or `max_new_tokens`.

        A text does not depend on the other prompts, nor on when it began. Raises ValueError for a limit below 1.
        """
        if limits is not None and min(limits, default=1) < 1:
            raise ValueError("a text has at least one token, its end mark")
        waiting = self._groups(prompts)
        places: list[tuple[int, int] | None] = [None] * self._slots  # slot -> (prompt, sample)
        slots: Any = None
        ready: Any = None
        width = 0
        while waiting or any(places):
            free = [slot for slot, place in enumerate(places) if place is None]
            under_way = len(places) - len(free)
            if coming := self._coming(waiting, len(free), together=not under_way):
                room = max(NARROWEST, bucket(coming[-1][1], LONGEST))  # widened once for all of them
                if slots is None:
                    with jax.set_mesh(self._mesh):
                        ready = self._ready(params)
                    slots, width = self._run("empty", len(places), room, self._empty, len(places), room, params), room
                elif room > width:
                    slots, width = self._run("widen", len(places), room, self._widen, slots, room - width), room
                for group, needed in coming:
                    texts = [(i, sample) for i in group for sample in range(self._each)]
                    taken, free = free[: len(texts)], free[len(texts) :]
                    for slot, place in zip(taken, texts, strict=True):
                        places[slot] = place
                    arrivals = self._arrivals([prompts[i] for i in group], texts, taken, needed, limits)
                    slots = self._run("fill", len(places), needed, self._fill, params, slots, arrivals)
                continue
            fewer = sharding.shared_out(len(places) // SHRINKING, self._mesh)
            shrinks = not waiting and fewer < len(places) == self._slots and self._slots >= 16
            if shrinks and under_way <= fewer:
                kept = ([slot for slot, place in enumerate(places) if place] + free)[:fewer]
                places = [places[slot] for slot in kept]
                slots = self._run("keep", len(places), width, self._keep, slots, np.array(kept, np.int32))
                continue
            until_done = len(waiting[0][0]) * self._each if waiting else len(places) - (fewer if shrinks else 0)
            steps = LOOK if self._stop else self._length
            idle = np.array([place is None for place in places])
            arguments = (ready, slots, idle, np.int32(until_done), np.int32(steps))
            slots, report = self._run("advance", len(places), width, self._advance, *arguments)
            for slot, text in self._read(places, report):
                places[slot] = None
                yield from text

    def _groups(self, prompts: Sequence[Sequence[int]]) -> deque[tuple[list[int], int]]:
        """The prompts that come in together, by their indices, and the width they are padded to; shortest first.

        All groups are full but the first, in which what is missing costs least.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        compiled = {width for what, _, width in self.shapes if what == "fill"}
        chosen = widths.choose([len(prompts[i]) for i in order], 1, compiled)
        groups: deque[tuple[list[int], int]] = deque()
        while order:
            width = chosen[len(order) - 1]
            start = max(0, len(order) - self._together(width))
            groups.appendleft((order[start:], width))
            del order[start:]
        return groups

    def _together(self, width: int) -> int:
        """How many prompts of this width come in at a time: of about as many tokens, whatever it is."""
        tokens = max(READ, self._prompts * NARROWEST)
        return sharding.shared_out(max(1, min(self._prompts, tokens // width)), self._mesh)

    def _coming(self, waiting: deque[tuple[list[int], int]], free: int, together: bool) -> list[tuple[list[int], int]]:
        """The groups that come in before the next step, no longer waiting. Where all begin `together`, the slots are
        filled, if need be by half a group.
        """
        coming = []
        while waiting:
            group, width = waiting[0]
            places = free // self._each
            number = min(len(group), places) if together else len(group)
            if not 0 < number <= places:
                break
            waiting.popleft()
            if group[number:]:
                waiting.appendleft((group[number:], width))
            coming.append((group[:number], width))
            free -= number * self._each
        return coming

    def _run(self, what: str, number: int, width: int, function: Callable, *arguments: Any) -> Any:
        self.shapes.add((what, number, width))
        with jax.set_mesh(self._mesh):
            return function(*arguments)

    def _arrivals(
        self,
        prompts: list[Sequence[int]],
        texts: list[tuple[int, int]],
        taken: list[int],
        width: int,
        limits: Sequence[int] | None,
    ) -> Arrivals:
        """Padded to as many prompts and slots as always come in at this width."""
        together = self._together(width)
        spare = [0] * (together * self._each - len(texts))
        most = [self._length if limits is None else min(limits[i], self._length) for i, _ in texts]
        tokens_PS, segments_PS = sharding.place(widths.pad(prompts, together, width), self._mesh)
        return Arrivals(
            tokens_PS,
            segments_PS,
            slots_R=np.array(taken + [self._slots for _ in spare], np.int32),
            prompts_R=np.array([row // self._each for row in range(len(texts))] + spare, np.int32),
            rows_R=np.array([i * self._each + sample for i, sample in texts] + spare, np.int32),
            limits_R=np.array(most + spare, np.int32),
        )

    def _read(self, places: Sequence[tuple[int, int] | None], report: Any) -> Iterator[tuple[int, list[Text]]]:
        """(slot, its texts) of the slots that are done."""
        done_B, number_B, tokens_BNT, log_probs_BNT = (np.asarray(array) for array in report)
        for slot, place in enumerate(places):
            if place is None:
                continue
            if not (done_B[slot] or self._stop):
                continue
            texts: list[Text] = []
            number, over = int(number_B[slot]), bool(done_B[slot])
            for tokens_T, log_probs_T in zip(tokens_BNT[slot], log_probs_BNT[slot], strict=True):
                tokens = list(takewhile(lambda token: token not in self._ends, tokens_T[:number].tolist()))
                if BROKEN in tokens:
                    raise UserError(
                        f"the model's logits for prompt {place[0] + 1} are not finite, so there is no text: its "
                        "weights are broken, or too large for the dtype that it is computed in"
                    )
                scored = min(len(tokens) + 1, number)  # with an end mark
                finished = len(tokens) < number
                if self._stop and self._stop(tokens):
                    # Cut where it was over, however late that was seen.
                    over = finished = True
                    scored = next(n for n in range(len(tokens) + 1) if self._stop(tokens[:n]))
                    tokens = tokens[:scored]
                log_probs = log_probs_T[:scored].tolist() if self._log_probs else None
                texts.append(Text(place[0], place[1] + len(texts), tokens, log_probs, finished))
            if over:
                yield slot, texts


def _advance(model: Model, search: Search, *arguments: Any) -> tuple[Slots, tuple[jax.Array, ...]]:
    """The slots, and copies of what the host looks at: the slots themselves are donated."""
    slots = advance(model, search, *arguments)
    return slots, jax.tree.map(jnp.copy, (slots.done_B, slots.number_B, *search.read(slots.texts)))
