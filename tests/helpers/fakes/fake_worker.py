"""A worker without a model: executes plans strictly and samples from a hash of the history.

The "KV" of a token is a hash of the adapter's content and all tokens up to it, kept in the page
row where a real worker would write K and V. Each step first reads all rows that attention would
read, so a page that is stale, shared by mistake or overwritten is found at once. The sampled id is
a function of the same hash, so `oracle()` predicts every output whatever the batch.
"""

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

from msgspec.structs import replace

from loraplex.scheduler.worker_protocol import (
    NOT_FINITE,
    AdapterEvicted,
    AdapterInspected,
    AdapterLoaded,
    DropAdapter,
    InspectAdapter,
    LoadAdapter,
    NewRequest,
    PromptLogprobs,
    SamplingSpec,
    StepPlan,
    StepResult,
    UnloadAdapter,
)

from helpers.fakes.fake_model import Weights, extend, fake_logprobs, next_token


@dataclass
class FakeAdapter:
    """The files at a path: a content and its size in pages, or the reason it cannot be read."""

    content: str = ""
    num_pages: int = 1
    error: str = ""
    is_transient: bool = False  # the error
    invocation: tuple[int, ...] = ()
    kind: str = "lora"


@dataclass
class _Slot:
    token_ids: list[int]  # known to the worker: sent, then sampled
    num_sent: int
    num_prompt_tokens: int
    page_ids: list[int]
    contents: dict[int, str]  # by adapter slot
    weights: Weights
    sampling: SamplingSpec
    stop_ids: frozenset[int]
    num_fed: int = -1  # set by the first row
    states: list[int] = field(default_factory=list)  # hash after each known token


class FakeWorker:
    """Keeps the state of a worker, and asserts everything that a real worker relies on."""

    def __init__(
        self,
        *,
        num_pages: int,
        block_tokens: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_adapter_slots: int,
        vocab_size: int = 50,
        files: dict[str, FakeAdapter] | None = None,
        max_host: int = 0,
    ) -> None:
        """`max_host` adapters fit the host store; with 0 every load reads its files.

        Set `broken[content]` to make logits not finite for this position of its requests and all
        later ones; the content of the base model is empty.
        """
        self.num_pages = num_pages
        self.block_tokens = block_tokens
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_adapter_slots = max_adapter_slots
        self.vocab_size = vocab_size
        self.files = files if files is not None else {}
        self.num_steps = 0
        self.num_loads = 0
        self.broken: dict[str, int] = {}
        self._slots: dict[int, _Slot] = {}
        self.adapters: dict[int, tuple[str, list[int]]] = {}  # slot -> content, pages
        self.max_host = max_host
        self.host: OrderedDict[str, int] = OrderedDict()  # content -> pages
        self._evicted: list[AdapterEvicted] = []
        self._last_use: dict[tuple[str, int], int] = {}  # of a page or adapter slot: its last step
        self._rows: list[list[object]] = [[None] * block_tokens for _ in range(num_pages)]

    # Adapters

    def inspect(self, command: InspectAdapter) -> AdapterInspected:
        file = self.files.get(command.path, FakeAdapter(error="no such directory"))
        if file.error:
            answer = AdapterInspected(command.name, command.path, error=file.error)
            return replace(answer, is_transient=file.is_transient)
        self._keep_on_host(file.content, file.num_pages)
        return AdapterInspected(
            command.name,
            command.path,
            content_hash=file.content,
            num_pages=file.num_pages,
            num_bytes=file.num_pages * 1000,
            max_rank=8,
            modules=["q_proj"],
            kind=file.kind,
            invocation_tokens=array("i", file.invocation),
        )

    def load(self, command: LoadAdapter) -> AdapterLoaded:
        """Writes the pages even if the file is broken, as a load that fails halfway would."""
        slot, page_ids = command.adapter_slot, list(command.page_ids)
        assert 0 <= slot < self.max_adapter_slots
        assert slot not in self.adapters, f"adapter slot {slot} is taken"
        self._check_pages(page_ids)
        used = [("slot", slot), *(("page", page_id) for page_id in page_ids)]
        last_use = max(self._last_use.get(key, -1) for key in used)
        assert last_use <= command.after_step, "steps in flight use its pages"
        for index, page_id in enumerate(page_ids):
            self._rows[page_id] = [("adapter", command.content_hash, index)] * self.block_tokens
        self.num_loads += 1
        if command.content_hash in self.host:
            assert self.host[command.content_hash] == len(page_ids)
            self.host.move_to_end(command.content_hash)
            self.adapters[slot] = (command.content_hash, page_ids)
            return AdapterLoaded(slot, command.content_hash, load_us=1, from_host=True)
        file = self.files.get(command.path, FakeAdapter(error="no such directory"))
        if file.error or file.content != command.content_hash:
            answer = AdapterLoaded(slot, command.content_hash, error=file.error or "it changed")
            return replace(answer, is_transient=file.is_transient)
        self.adapters[slot] = (command.content_hash, page_ids)
        self._keep_on_host(file.content, file.num_pages)
        return AdapterLoaded(slot, command.content_hash, load_us=1)

    def drop(self, command: DropAdapter) -> None:
        contents = {content for content, _ in self.adapters.values()}
        assert command.content_hash not in contents, "dropped an adapter that is in pages"
        if self.host.pop(command.content_hash, None):
            self._evicted.append(AdapterEvicted(command.content_hash))

    def take_evicted(self) -> list[AdapterEvicted]:
        evicted, self._evicted = self._evicted, []
        return evicted

    def _keep_on_host(self, content: str, num_pages: int) -> None:
        if self.max_host:
            self.host[content] = num_pages
            self.host.move_to_end(content)
            if len(self.host) > self.max_host:
                self._evicted.append(AdapterEvicted(self.host.popitem(last=False)[0]))

    def unload(self, command: UnloadAdapter) -> None:
        assert command.adapter_slot in self.adapters, "unloaded an adapter that is not there"
        del self.adapters[command.adapter_slot]

    def _check_pages(self, page_ids: list[int]) -> None:
        assert len(set(page_ids)) == len(page_ids), "a page is twice in one table"
        assert all(0 < page_id < self.num_pages for page_id in page_ids), "no such page"
        weights = {page_id for _, pages in self.adapters.values() for page_id in pages}
        assert not weights.intersection(page_ids), "a page of a resident adapter was given away"

    # Steps

    def step(self, plan: StepPlan) -> StepResult:
        assert plan.step_id == self.num_steps, "a step was lost or came twice"
        self.num_steps += 1
        self._apply_deltas(plan)
        self._check_shape(plan)
        result = StepResult(step_id=plan.step_id, token_ids=array("i"), step_us=1)
        new_slots = {new.slot for new in plan.new_requests}
        decoding = True
        rows = zip(plan.slots, plan.positions, plan.num_tokens, plan.samples, strict=True)
        drafts = list(plan.draft_ids)
        for slot_id, position, num_tokens, samples in rows:
            slot = self._slots[slot_id]
            if samples > 1:
                decoding = False
                own, drafts = drafts[: samples - 1], drafts[samples - 1 :]
                assert num_tokens == samples, "a row that verifies feeds one token and its drafts"
                self._verify(slot, position, own, result)
                continue
            is_decode = slot_id not in new_slots and num_tokens == 1
            decoding = decoding and is_decode
            assert decoding or position < slot.num_sent, "a decode row follows a prefill row"
            self._feed(slot, position, num_tokens)
            assert samples == (position + num_tokens == len(slot.token_ids)), "wrong samples flag"
            self._judge_prompt(slot_id, slot, position, num_tokens, result)
            if samples:
                self._sample(slot, result)
        assert not drafts, "drafts without a row"
        if not any(result.logprobs):
            result.logprobs.clear()
        return result

    def _verify(self, slot: _Slot, position: int, drafts: list[int], result: StepResult) -> None:
        """Sample after the last known token and after each draft. What drafts wrote stays in the
        pages; a draft that was wrong is replaced by what was sampled, as in a real worker."""
        assert position + 1 == len(slot.token_ids), "drafts do not follow the last known token"
        known = slot.token_ids[:], slot.states[:]
        for token_id in drafts:
            self._push(slot, token_id)
        self._feed(slot, position, 1 + len(drafts))
        fed = slot.token_ids, slot.states
        sampled: list[int] = []
        for count in range(1 + len(drafts)):
            end = position + 1 + count
            slot.token_ids, slot.states = fed[0][:end], fed[1][:end]
            self._sample(slot, result)
            sampled.append(result.token_ids[-1])
        slot.token_ids, slot.states = known
        for token_id, draft in zip(sampled, [*drafts, None], strict=True):
            self._push(slot, max(token_id, 0))
            if token_id != draft:
                break
        slot.num_fed = len(slot.token_ids) - 1

    def _apply_deltas(self, plan: StepPlan) -> None:
        for slot_id in plan.freed_slots:
            del self._slots[slot_id]
        for new in plan.new_requests:
            self._slots_add(new)
        for slot_id, page_id in zip(plan.page_slots, plan.page_ids, strict=True):
            self._slots[slot_id].page_ids.append(page_id)
        for slot in self._slots.values():
            self._check_pages(slot.page_ids)

    def _slots_add(self, new: NewRequest) -> None:
        assert 0 <= new.slot < self.max_num_seqs
        assert new.slot not in self._slots, f"slot {new.slot} is taken"
        assert 0 < new.num_prompt_tokens <= len(new.token_ids)
        assert all(b.adapter_slot in self.adapters for b in new.bindings), "not resident"
        contents = {b.adapter_slot: self.adapters[b.adapter_slot][0] for b in new.bindings}
        weights = [
            (
                b.first_position,
                contents[b.adapter_slot] + (f" * {b.weight}" if b.weight != 1 else ""),
            )
            for b in new.bindings
        ]
        slot = _Slot(
            token_ids=[],
            num_sent=len(new.token_ids),
            num_prompt_tokens=new.num_prompt_tokens,
            page_ids=list(new.page_ids),
            contents=contents,
            weights=sorted(weights),
            sampling=new.sampling,
            stop_ids=frozenset(new.sampling.stop_token_ids),
        )
        for token_id in new.token_ids:
            self._push(slot, token_id)
        self._slots[new.slot] = slot

    def _push(self, slot: _Slot, token_id: int) -> None:
        previous, position = slot.states[-1] if slot.states else 0, len(slot.token_ids)
        slot.token_ids.append(token_id)
        slot.states.append(extend(previous, token_id, position, slot.weights))

    def _check_shape(self, plan: StepPlan) -> None:
        assert 0 < len(plan.slots) == len(plan.positions) == len(plan.num_tokens)
        assert len(set(plan.slots)) == len(plan.slots), "two rows for one slot"
        assert min(plan.num_tokens) > 0
        assert sum(plan.num_tokens) <= self.max_num_batched_tokens
        assert {new.slot for new in plan.new_requests} <= set(plan.slots), "a start without a row"

    def _feed(self, slot: _Slot, position: int, num_tokens: int) -> None:
        end = position + num_tokens
        assert slot.num_fed in (-1, position), "positions are not contiguous"
        assert end <= len(slot.token_ids), "a token is fed before it is known"
        assert end <= len(slot.page_ids) * self.block_tokens, "no page for a token"
        self._last_use.update((("page", page_id), self.num_steps - 1) for page_id in slot.page_ids)
        for adapter_slot, content in slot.contents.items():
            self._check_weights(adapter_slot, content)
        for past in range(position):
            page, row = divmod(past, self.block_tokens)
            kv = self._rows[slot.page_ids[page]][row]
            assert kv == slot.states[past], f"position {past} reads the KV of another history"
        for now in range(position, end):
            page, row = divmod(now, self.block_tokens)
            page_id = slot.page_ids[page]
            holders = sum(page_id in other.page_ids for other in self._slots.values())
            assert holders == 1, f"page {page_id} is written while others hold it"
            self._rows[page_id][row] = slot.states[now]
        slot.num_fed = end

    def _check_weights(self, adapter_slot: int, expected_content: str) -> None:
        content, page_ids = self.adapters[adapter_slot]
        self._last_use["slot", adapter_slot] = self.num_steps - 1
        self._last_use.update((("page", page_id), self.num_steps - 1) for page_id in page_ids)
        assert content == expected_content, "the adapter slot holds another adapter now"
        for index, page_id in enumerate(page_ids):
            expected = [("adapter", content, index)] * self.block_tokens
            assert self._rows[page_id] == expected, "an adapter's page was overwritten"

    def _sample(self, slot: _Slot, result: StepResult) -> None:
        num_generated = len(slot.token_ids) - slot.num_prompt_tokens
        banned = slot.stop_ids if num_generated < slot.sampling.min_tokens else frozenset()
        token_id = next_token(slot.states[-1], self.vocab_size, banned)
        if self._is_broken(slot, len(slot.token_ids)):
            token_id = NOT_FINITE
        self._push(slot, max(token_id, 0))
        result.token_ids.append(token_id)
        asked = slot.sampling.num_logprobs >= 0
        result.logprobs.append(fake_logprobs(token_id, slot.states[-1]) if asked else None)

    def _judge_prompt(
        self, slot_id: int, slot: _Slot, position: int, num_tokens: int, result: StepResult
    ) -> None:
        last = min(position + num_tokens, slot.num_prompt_tokens - 1)
        if slot.sampling.num_prompt_logprobs < 0 or last <= position:
            return
        entries = [
            fake_logprobs(
                slot.token_ids[judged], slot.states[judged], self._is_broken(slot, judged)
            )
            for judged in range(position + 1, last + 1)
        ]
        result.prompt_logprobs.append(PromptLogprobs(slot_id, position + 1, entries))

    def _is_broken(self, slot: _Slot, position: int) -> bool:
        contents = list(slot.contents.values()) or [""]
        return any(position >= self.broken.get(c, position + 1) for c in contents)
