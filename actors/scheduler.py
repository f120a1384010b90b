"""Decides which requests take part in the next step and with how many tokens; owns pages and the prefix tree.

No tensors here: `plan_step` says what the runner shall compute, `commit` takes note of what it computed. Running
sequences come first (one token of each that decodes, the next chunk of each prompt), then waiting ones are admitted
in their order while tokens, places and pages last. When pages run out, those go from the prefix tree that no waiting
sequence will read, then those that are read last (`next_use`); then the sequence admitted last gives its pages back and
is computed again later; its finished pages stay in the prefix tree, so mostly little is lost.

Sequences of a better priority wait before others, and take pages, places and the tokens of a step from them; among
others they are admitted in the order of their coming.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from actors.next_use import FutureUses
from actors.pages import PagePool
from actors.prefix_tree import Match, Node, PrefixTree
from actors.requests import MAX_PRIORITY
from actors.sequence import Sequence

WORTH_WAITING_TOKENS = 16
"""A prompt is held back a step when somebody is about to compute at least this many of its next tokens."""

MAX_HELD_BACK = 256
"""Waiting prompts looked at per step beyond the first that is held back."""


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy the first `num_tokens` slots of page `source` to page `target` before the step."""

    source: int
    target: int
    num_tokens: int


@dataclass(slots=True)
class StepPlan:
    """Sequences in step order, each with its number of known tokens to compute and the draft tokens to verify."""

    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)

    @property
    def wanting(self) -> list[Sequence]:
        """The sequences that get a token in this step: all of what they know is computed then."""
        return [
            sequence
            for sequence, num_tokens in zip(self.sequences, self.num_tokens)
            if sequence.num_computed + num_tokens == len(sequence.token_ids)
        ]


class Scheduler:
    """All sequences that are waiting or running."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ):
        self.pool = PagePool(num_pages)
        self._future = FutureUses(page_size)
        self.tree = PrefixTree(
            self.pool, page_size, enable_prefix_caching, self._future if enable_prefix_caching else None
        )
        self.waiting: deque[Sequence] = deque()  # by turn, which is by priority and then by coming
        self.running: list[Sequence] = []  # in the order of their admission
        self._has_priorities = False
        self.peak_pages = 0
        self._page_size = page_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._copied_from: list[Node] = []
        self._retired: set[Sequence] = set()

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; it must fit into the pool when alone."""
        assert sequence.max_len <= self.pool.num_pages * self._page_size
        self._has_priorities |= sequence.request.priority != 0
        self._wait(sequence)

    def expect_more(self) -> None:
        """What was added last goes on later: the pages of the last sequence are kept for what comes then, before pages
        that nobody is known to read and after those that somebody waits for."""
        forgotten = self._future.expect_more()
        if forgotten is not None:
            self.tree.reader_gone(forgotten)

    def plan_step(self) -> StepPlan:
        """Choose what to compute next. Empty only if nothing is waiting or running."""
        plan = StepPlan()
        order = sorted(self.running, key=_place_in_step)
        num_first = len(order)
        if self.waiting and order and _place_in_step(order[-1]) > self.waiting[0].request.priority:
            # Prompts that are begun get what is left behind those that are to come before them.
            num_first = bisect_right(order, self.waiting[0].request.priority, key=_place_in_step)
        budget = self._go_on(order[:num_first], plan, self._max_num_batched_tokens)
        if not _drop_preempted(plan):
            budget = self._admit(plan, budget, may_hold_back=num_first == len(order))
        self._go_on(order[num_first:], plan, budget)
        self.peak_pages = max(self.peak_pages, self.pool.num_pages - self.tree.num_available)
        return plan

    def plan_ahead(self) -> StepPlan | None:
        """`plan_step` before the tokens of the step that was committed last are known, its sequences ending in
        UNKNOWN_TOKEN; those that are then at their longest are left out. None where it would preempt somebody: a
        sequence that has perhaps ended needs no pages of others."""
        size = self._page_size
        num_missing = sum(
            max(0, -(-len(sequence.token_ids) // size) - len(sequence.nodes))
            for sequence in self.running
            if len(sequence.token_ids) < sequence.max_len
        )
        if num_missing > self.tree.num_available:
            return None
        if self.waiting and self._gives_way_to(self.waiting[0]) is not None:
            return None
        return self.plan_step()

    def num_draftable(self, plan: StepPlan) -> int:
        """How many draft tokens the step has room for."""
        return self._max_num_batched_tokens - sum(plan.num_tokens)

    def room_for_draft(self, sequence: Sequence, num_wanted: int) -> int:
        """How many draft tokens a sequence may have, with pages for them; takes free pages and preempts nobody."""
        num_wanted = min(num_wanted, sequence.max_len - len(sequence.token_ids) - 1)
        num_missing = -(-(len(sequence.token_ids) + num_wanted) // self._page_size) - len(sequence.nodes)
        if 0 < num_missing <= self.tree.num_available - len(self.running):
            self._append_pages(sequence, num_missing)
        return max(0, min(num_wanted, len(sequence.nodes) * self._page_size - len(sequence.token_ids)))

    def commit(self, plan: StepPlan) -> None:
        """Note that the known tokens of the plan were computed."""
        self.tree.release(self._copied_from)
        self._copied_from = []
        size = self._page_size
        for sequence, num_tokens in zip(plan.sequences, plan.num_tokens):
            if sequence.finish_reason is not None:
                continue  # it has ended since: nobody needs what was computed behind its end
            before, sequence.num_computed = sequence.num_computed, sequence.num_computed + num_tokens
            if before < sequence.num_prompt:
                for i in range(before // size, -(-sequence.num_computed // size)):
                    node = sequence.nodes[i]
                    node.num_computed = min(sequence.num_computed - i * size, len(node.tokens))

    def retire(self, sequence: Sequence) -> None:
        """Take a running sequence that has ended out of all later steps. Its pages stay its own until it is finished or
        discarded, as a step that is being computed writes to them."""
        self.running.remove(sequence)
        self._retired.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whether it is running, waiting or retired, and give its pages to the prefix tree."""
        if sequence in self._retired:
            self._retired.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
            self._stop_waiting(sequence)
        self._give_back(sequence)

    def discard(self, sequence: Sequence) -> list[int]:
        """Take out a running sequence whose own pages hold rubbish, so that nobody finds them in the prefix tree;
        returns the pages that become free by this, to be cleared before anybody writes a part of one."""
        nodes = sequence.nodes
        sequence.num_computed = sequence.num_shared * self._page_size
        self.finish(sequence)
        # A copy that was planned of one has been made when it is cleared, as its step was launched.
        num_copies = Counter(self._copied_from)
        return [node.page for node in nodes if not node.in_tree and node.num_refs == num_copies[node]]

    def _ensure_pages(self, sequence: Sequence) -> bool:
        """Make room for all known tokens of a sequence, preempting those of a worse priority, then later ones; False if
        it was preempted itself."""
        num_missing = -(-len(sequence.token_ids) // self._page_size) - len(sequence.nodes)
        if num_missing <= 0:
            return True
        while self.tree.num_available < num_missing:
            victim = self._last_in_line()
            self._preempt(victim)
            if victim is sequence:
                return False
        self._append_pages(sequence, num_missing)
        return True

    def _append_pages(self, sequence: Sequence, count: int) -> None:
        sequence.nodes += self.tree.new_nodes(sequence.nodes[-1], [], count)
        sequence.pages = [node.page for node in sequence.nodes]

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_preemptions += 1
        self._wait(sequence, at_front=True)

    def _last_in_line(self) -> Sequence:
        """The running sequence that gives way first: of the worst priority, the one admitted last."""
        if not self._has_priorities:
            return self.running[-1]
        return max(reversed(self.running), key=lambda sequence: sequence.request.priority)

    def _gives_way_to(self, sequence: Sequence) -> Sequence | None:
        """The running sequence that is preempted for one that waits; None if none has a worse priority."""
        if not self._has_priorities or not self.running:
            return None
        last = self._last_in_line()
        return last if last.request.priority > sequence.request.priority else None

    def _wait(self, sequence: Sequence, at_front: bool = False) -> None:
        """Queue a sequence behind all others of its priority, or before them."""
        self._future.join(sequence, at_front)
        if not self.waiting or self.waiting[-1].turn < sequence.turn:
            self.waiting.append(sequence)
        elif sequence.turn < self.waiting[0].turn:
            self.waiting.appendleft(sequence)
        else:
            insort(self.waiting, sequence, key=lambda other: other.turn)

    def _stop_waiting(self, sequence: Sequence) -> None:
        self.tree.reader_gone(self._future.leave(sequence))

    def _give_back(self, sequence: Sequence) -> None:
        self.tree.settle(sequence.nodes, sequence.num_shared, sequence.token_ids, sequence.num_computed)
        self.tree.release(sequence.nodes)
        sequence.nodes, sequence.pages = [], []
        sequence.num_shared = sequence.num_computed = 0

    def _go_on(self, sequences: SequenceOf[Sequence], plan: StepPlan, budget: int) -> int:
        """Plan running sequences with at most `budget` tokens; returns how many are left."""
        for sequence in sequences:
            # Preempted for another; or at its end, but for a token that nobody has read yet.
            if not sequence.nodes or len(sequence.token_ids) >= sequence.max_len:
                continue
            num_tokens = min(len(sequence.token_ids) - sequence.num_computed, budget)
            if num_tokens == 0 or not self._ensure_pages(sequence):
                continue
            plan.sequences.append(sequence)
            plan.num_tokens.append(num_tokens)
            budget -= num_tokens
        return budget

    def _admit(self, plan: StepPlan, budget: int, may_hold_back: bool) -> int:
        """Take waiting sequences into the step with at most `budget` tokens; returns how many are left."""
        held_back: list[Sequence] = []
        whole_budget = budget
        victim: Sequence | None = None
        while self.waiting and budget > 0 and len(held_back) < MAX_HELD_BACK:
            sequence = self.waiting[0]
            is_full = len(self.running) >= self._max_num_seqs
            if sequence is victim or (is_full and self._gives_way_to(sequence) is None):
                break
            match = self.tree.match(sequence.token_ids, len(sequence.token_ids) - 1)
            num_left = len(sequence.token_ids) - len(match.nodes) * self._page_size - match.num_partial
            if budget < num_left <= whole_budget:
                break  # whole in the next step: a cut prompt costs a second pass over its first part
            # Whoever computes them may have to wait for this one.
            if match.num_pending >= WORTH_WAITING_TOKENS and may_hold_back:
                held_back.append(self.waiting.popleft())
                continue
            if is_full or not self._place(sequence, match, plan):
                worse = self._gives_way_to(sequence)
                if worse is None:
                    break
                self._preempt(worse)
                victim = worse
                continue  # to match again, for the tree is another now
            self.waiting.popleft()
            self._stop_waiting(sequence)
            self.running.append(sequence)
            num_tokens = min(len(sequence.token_ids) - sequence.num_computed, budget)
            plan.sequences.append(sequence)
            plan.num_tokens.append(num_tokens)
            budget -= num_tokens
        self.waiting.extendleft(reversed(held_back))
        if victim is not None:
            _drop_preempted(plan)
        return budget

    def _place(self, sequence: Sequence, match: Match, plan: StepPlan) -> bool:
        """Give a waiting sequence its shared and own pages; False if there are too few."""
        size = self._page_size
        held = match.nodes if match.partial is None else [*match.nodes, match.partial]
        self.tree.acquire(held)
        num_own = -(-len(sequence.token_ids) // size) - len(match.nodes)
        # Some pages beyond for what runs already, so that an admission does not cause a preemption at once.
        reserve = min(len(self.running), self.pool.num_pages // 16)
        if self.tree.num_available < num_own + reserve:
            self.tree.release(held)
            if self.running or match.partial is None:
                return False
            # Alone it must fit; only the page to copy from can be in the way.
            return self._place(sequence, Match(match.nodes, None, 0, 0), plan)
        prompt_rest: SequenceOf[int] = sequence.token_ids[len(match.nodes) * size : sequence.num_prompt]
        parent = match.nodes[-1] if match.nodes else None
        own = self.tree.new_nodes(parent, prompt_rest, num_own)
        sequence.nodes = match.nodes + own
        sequence.pages = [node.page for node in sequence.nodes]
        sequence.num_shared = len(match.nodes)
        sequence.num_computed = len(match.nodes) * size + match.num_partial
        if sequence.num_generated == 0:
            sequence.num_cached = sequence.num_computed
            sequence.num_evicted = self.tree.lost.num_lost(sequence, sequence.num_computed)
        if match.partial is not None:
            plan.copies.append(PageCopy(match.partial.page, own[0].page, match.num_partial))
            own[0].num_computed = min(match.num_partial, len(own[0].tokens))
            self._copied_from.append(match.partial)
        return True


def _place_in_step(sequence: Sequence) -> int:
    """Lower comes first. Those that decode before all prompts, which must not take the tokens of a step from them."""
    return -MAX_PRIORITY - 1 if sequence.is_decoding else sequence.request.priority


def _drop_preempted(plan: StepPlan) -> bool:
    """Take sequences out of a plan that were preempted after they came into it; whether there were any."""
    preempted = [i for i, sequence in enumerate(plan.sequences) if not sequence.nodes]
    for i in reversed(preempted):
        del plan.sequences[i], plan.num_tokens[i]
    return bool(preempted)
