"""The engine: continuous batching over one model on one device. A step is planned, launched and read.

Use `generate` for a list of prompts, or `add`, `step` and `abort` for a stream of requests. Single-threaded: whoever
holds it calls it from one thread (`actors.worker` does). Knows no Ray, no files of rows, no network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch

from actors.config import EngineConfig
from actors.cost_model import split_exactly
from actors.decoder import Decoder, load_decoder
from actors.drafters.draft_model import DraftModel, check_draft_model
from actors.drafters.drafting import make_speculator
from actors.drafters.grammar import Grammars
from actors.kv_memory import choose_num_pages
from actors.lookahead import LaunchedStep, may_look_ahead
from actors.requests import (
    Completion,
    DrafterStats,
    Output,
    Request,
    RowError,
    SamplingParams,
    TokenLogprob,
    Usage,
    derive_seed,
)
from actors.runner import Runner
from actors.sampled_tokens import SampledToken, SampledTokens
from actors.scheduler import Scheduler, StepPlan
from actors.sequence import Sequence
from actors.speculation import Speculation
from actors.step_graphs import capture_cuda_graph, expected_graph_bytes
from actors.step_measurement import Limits, load_or_measure_step_times
from actors.stopping import finish_reason_of, text_of
from actors.weights.checkpoint import load_tokenizer, open_checkpoint
from kernels.cpu_linear import dtype_name, fastest_cpu_dtype

logger = logging.getLogger(__name__)

MAX_NUM_BATCHED_TOKENS = 4096
"""Tokens in one step unless told otherwise; fewer where more bring nothing by the measured step times."""


@dataclass(slots=True)
class EngineStats:
    """What an engine has done since it was made. Times are whole nanoseconds, so that sums are exact.

    busy_ns is the time of all calls that read a step, and what rows were charged and `lost_ns` sum to it. Tokens that
    were computed behind an unforeseen end are in nobody's count.
    """

    num_steps: int = 0
    num_steps_ahead: int = 0  # launched before the tokens of the step before them were read
    busy_ns: int = 0
    prefill_ns: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # of finished rows' prompts, as `requests.Usage` has them
    num_evicted_tokens: int = 0
    lost_ns: int = 0
    num_verify_steps: int = 0  # request-steps with at least one draft token
    saved_by_speculation_s: float = 0.0  # an estimate, from the step-time model


@dataclass(slots=True)
class _Row:
    """A request in work: its sequences, and those of them that are done."""

    request: Request
    sequences: list[Sequence]
    done: list[Sequence] = field(default_factory=list)


class Engine:
    """Loads the model at once; ValueError (also CheckpointError) when the configuration or the checkpoint is bad."""

    def __init__(self, config: EngineConfig):
        started = time.perf_counter()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.device = resolve_device(config.device)
        checkpoint = open_checkpoint(config.model)
        self.dtype = resolve_dtype(config.dtype, checkpoint.dtype, self.device)
        if self.device.type == "cpu" and config.dtype == "float32" and config.linear_compute == "auto":
            # Asked for float32, a user does not get the bfloat16 activations of the int4 product.
            config = config.model_copy(update={"linear_compute": "dense"})
        self.tokenizer = load_tokenizer(config.tokenizer or config.model)
        self.decoder: Decoder = load_decoder(checkpoint, config, self.device, self.dtype)
        self.eos_token_ids = self.decoder.eos_token_ids
        self.notes = list(self.decoder.notes)
        self._draft_model = self._load_draft_model()
        graph_bytes = 0
        if self.device.type == "cuda" and not config.enforce_eager:
            graph_bytes = expected_graph_bytes(
                checkpoint.architecture, self.decoder.max_model_len, self.dtype, config.page_size, config.max_num_seqs
            )
        draft_bytes = 0 if self._draft_model is None else self._draft_model.kv_bytes_per_token
        num_pages = choose_num_pages(config, self.decoder, draft_bytes, graph_bytes)
        self.max_model_len = min(self.decoder.max_model_len, num_pages * config.page_size)
        if self.max_model_len < self.decoder.max_model_len:
            self._note(
                f"KV memory of {num_pages} pages of {config.page_size} holds rows of at most "
                f"{self.max_model_len} tokens, fewer than the model's {self.decoder.max_model_len}; "
                "raise engine.kv_cache_bytes for longer ones"
            )
        self._runner = Runner(self.decoder, num_pages, config.page_size, config.enable_prefix_groups)
        if graph_bytes:
            graphs = self._runner.capture_graphs(config.max_num_seqs, capture_cuda_graph())
            self.notes.append(graphs.describe())
            if graphs.took_bytes > graph_bytes:
                self._note(
                    f"CUDA graphs took {graphs.took_bytes} bytes, and KV memory was sized to leave {graph_bytes}: the "
                    "rest is missing for other steps; lower engine.gpu_memory_utilization if memory runs out"
                )
        most_tokens = config.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS
        started_measuring = time.perf_counter()
        self.step_times = load_or_measure_step_times(
            self._runner,
            self.decoder,
            checkpoint.architecture,
            config,
            Limits(num_pages, config.page_size, config.max_num_seqs, most_tokens, self.max_model_len),
        )
        self.measuring_s = time.perf_counter() - started_measuring  # next to nothing where they were kept
        self.notes.append(self.step_times.describe())
        self.scheduler = Scheduler(
            num_pages,
            config.page_size,
            config.max_num_seqs,
            config.max_num_batched_tokens or self.step_times.best_num_batched_tokens(most_tokens),
            config.enable_prefix_caching,
        )
        self.speculation = self._new_speculation(num_pages)
        self.stats = EngineStats()
        self._grammars = Grammars(self.tokenizer, self.decoder.vocab_size, self.eos_token_ids)
        self._rows: dict[str, _Row] = {}
        self._looks_ahead = config.async_scheduling
        if self._looks_ahead is None:
            self._looks_ahead = self.device.type == "cuda"
        self._launched: LaunchedStep | None = None
        self._ready: list[Completion] = []
        self.load_s = time.perf_counter() - started

    def add(self, request: Request) -> None:
        """Queue a request. One that can never be answered comes back from the next `step` with its error."""
        if request.request_id in self._rows:
            raise ValueError(f"a request with the id {request.request_id!r} is already in the engine; ids must differ")
        error = self._refusal(request)
        if error is not None:
            usage = Usage(prompt_tokens=len(request.prompt_token_ids))
            self._ready.append(Completion(request.request_id, usage=usage, error=error))
            return
        sequences = [self._new_sequence(request, index) for index in range(request.sampling.n)]
        self._rows[request.request_id] = _Row(request, sequences)
        for sequence in sequences:
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a request and give its pages back; unknown ids are ignored, for it may have just finished.

        A step on its way that computes it is waited for, and what else it finishes comes from the next `step`."""
        row = self._rows.get(request_id)
        if row is None:
            return
        launched = self._launched
        if launched is not None and any(sequence in row.sequences for sequence in launched.plan.sequences):
            self._launched = None
            self._ready += self._read(launched, time.perf_counter_ns())
        self._ready = [completion for completion in self._ready if completion.request_id != request_id]
        self._rows.pop(request_id, None)
        for sequence in row.sequences:
            self.stats.lost_ns += sequence.device_ns
            if sequence not in row.done:
                self.scheduler.finish(sequence)

    def expect_more(self) -> None:
        """The requests added since the last call are one part of an order that goes on: what comes next will begin
        like the last of them, so its pages are kept if they can be."""
        self.scheduler.expect_more()

    def sequences_of(self, request_id: str) -> SequenceOf[Sequence]:
        """A live request's sequences, for reading what they have so far; none when it is not in the engine any more."""
        row = self._rows.get(request_id)
        return () if row is None else row.sequences

    def has_unfinished(self) -> bool:
        """Whether `step` has anything left to do or to return."""
        return bool(self._rows or self._ready)

    def step(self) -> list[Completion]:
        """Read one step; returns the requests that it finished.

        Where the engine looks ahead (`async_scheduling`, and `lookahead.may_look_ahead`), the next step is launched
        before this one is read. A step's time, which its rows are charged, is that of the call that reads it: with a
        step on its way before and after, from one reading to the next, less what the caller does between calls.
        """
        ready, self._ready = self._ready, []
        if not self._rows:
            return ready
        started = time.perf_counter_ns()
        step = self._launched or self._launch(self.scheduler.plan_step())
        self._launched = self._launch_ahead(step) if self._looks_ahead else None
        return ready + self._read(step, started)

    def drafter_stats(self) -> tuple[DrafterStats, ...]:
        """What each drafter has done since the engine was made."""
        return () if self.speculation is None else self.speculation.drafter_stats()

    def corpus_index(self) -> bytes | None:
        """The index over what was answered, for `load_corpus_index` of another engine; None without one."""
        index = None if self.speculation is None else self.speculation.corpus_index
        return None if index is None else index.to_bytes()

    def load_corpus_index(self, data: bytes) -> bool:
        """Add what another engine's index holds to this one's; False if there is none here, or `data` is no index."""
        index = None if self.speculation is None else self.speculation.corpus_index
        return index is not None and index.merge_bytes(data)

    def generate(
        self, prompts: SequenceOf[str | SequenceOf[int]], sampling: SamplingParams | None = None
    ) -> list[Completion]:
        """Answer all prompts (texts, or token ids), in their order. Row i is sampled with derive_seed(seed, i)."""
        sampling = sampling or SamplingParams()
        order = {}
        for i, prompt in enumerate(prompts):
            token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            order[f"generate-{i}"] = i
            self.add(Request(f"generate-{i}", token_ids, sampling, derive_seed(sampling.seed, i)))
        completions: list[Completion | None] = [None] * len(prompts)
        while self.has_unfinished():
            for completion in self.step():
                completions[order[completion.request_id]] = completion
        return [completion for completion in completions if completion is not None]

    def _refusal(self, request: Request) -> RowError | None:
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            return RowError("empty_prompt", "the prompt has no tokens; give it some text")
        if num_prompt >= self.max_model_len:
            return RowError(
                "prompt_too_long",
                f"the prompt has {num_prompt} tokens and at most {self.max_model_len - 1} fit beside one of an answer; "
                "shorten it or raise engine.max_model_len",
            )
        wrong = next((t for t in request.prompt_token_ids if not 0 <= t < self.decoder.vocab_size), None)
        if wrong is not None:
            return RowError(
                "invalid_text",
                f"token id {wrong} is outside of the model's vocabulary of {self.decoder.vocab_size}; "
                "is the tokenizer the model's own?",
            )
        if request.sampling.structured_outputs is not None:
            try:
                self._grammars.new_matcher(request.sampling.structured_outputs)
            except ValueError as error:
                return RowError("invalid_sampling", f"structured_outputs: {error}")
        return None

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        constraint = request.sampling.structured_outputs
        matcher = None if constraint is None else self._grammars.new_matcher(constraint)
        return Sequence(request, index, self.max_model_len, matcher=matcher)

    def _launch(self, plan: StepPlan, before: SampledTokens | None = None) -> LaunchedStep:
        """Put a plan on its way; before: the tokens that it goes on from where they are unknown here."""
        if self.speculation is not None:
            self.speculation.draft(plan, self.scheduler, self._runner)
        sampled, weights = self._runner.launch(plan, self.step_times, before)
        if self._draft_model is not None:
            for copy in plan.copies:
                self._draft_model.copy_slots(copy.source, copy.target, copy.num_tokens)
        return LaunchedStep(plan, sampled, weights)

    def _launch_ahead(self, step: LaunchedStep) -> LaunchedStep | None:
        """Launch the step after one that is on its way, supposing that every sequence goes on; None if that cannot be
        supposed, or nothing would be left to do."""
        if not may_look_ahead(step.plan, self.speculation):
            return None
        wanting = [sequence for sequence in step.plan.wanting if sequence.finish_reason is None]
        self._commit(step)
        step.suppose_tokens(wanting)
        plan = self.scheduler.plan_ahead()
        if plan is None or not plan.sequences:
            return None
        self.stats.num_steps_ahead += 1
        return self._launch(plan, step.sampled)

    def _commit(self, step: LaunchedStep) -> None:
        if not step.is_committed:
            self.scheduler.commit(step.plan)
            step.is_committed = True

    def _read(self, step: LaunchedStep, started_ns: int) -> list[Completion]:
        """Wait for a step and take its tokens; returns the requests that are finished by it.

        started_ns: since when the step has to be paid for, by time.perf_counter_ns."""
        self._commit(step)
        step.forget_supposed()
        plan, tokens = step.plan, step.sampled.read()
        # Those that ended in the step before, which was read when this one was on its way already.
        late = {sequence for sequence in plan.sequences if sequence.finish_reason is not None}
        for sequence, sampled in tokens.items():
            if sequence in late:
                self._throw_away(sequence, sampled)
            else:
                self._take(sequence, plan.drafts.get(sequence, []), sampled)
        # A step that another was launched after had no drafts: there is nothing to learn.
        if self.speculation is not None and self._launched is None:
            self.speculation.learn(plan, (time.perf_counter_ns() - started_ns) / 1e9)
            self.stats.num_verify_steps = self.speculation.num_verify_steps
            self.stats.saved_by_speculation_s = self.speculation.saved_s
        done = []
        going_on = set() if self._launched is None else set(self._launched.plan.sequences)
        for sequence in tokens:
            if sequence.finish_reason is None:
                continue
            if sequence not in late:
                # Text before the clock is read: decoding it is part of what the step cost.
                sequence.text = text_of(sequence, self.eos_token_ids, self.tokenizer)
            if sequence in going_on:
                self.scheduler.retire(sequence)
            elif (row := self._close(sequence)) is not None:
                done.append(row)
        self._charge(plan, step.weights, late, time.perf_counter_ns() - started_ns)
        return [self._complete(row) for row in done]

    def _take(self, sequence: Sequence, draft: list[int], sampled: list[SampledToken]) -> None:
        """Append what was sampled: the first token, and those after draft tokens as long as the draft was right."""
        for i, token in enumerate(sampled):
            self._append(sequence, token)
            if sequence.finish_reason is not None or i == len(draft) or draft[i] != token.token_id:
                break
            # The draft token was this one, so its keys and values are in the pages already.
            sequence.num_computed += 1
        if sequence.finish_reason is None and not all(math.isfinite(t.logprob) for t in sampled[i + 1 :]):
            self._runner.clear_rejected(sequence)

    def _append(self, sequence: Sequence, sampled: SampledToken) -> None:
        """Append one token to a sequence and judge whether it ends there."""
        sequence.append(sampled.token_id, sampled.logprob)
        if not math.isfinite(sampled.logprob) or (sequence.matcher is not None and sequence.matcher.error):
            sequence.finish_reason = "error"
            return
        if sequence.logprobs is not None:
            top = sampled.top[: sequence.request.sampling.logprobs]
            sequence.logprobs.append(
                TokenLogprob(
                    sampled.token_id,
                    self.tokenizer.decode([sampled.token_id]),
                    sampled.logprob,
                    tuple((token, self.tokenizer.decode([token]), logprob) for token, logprob in top),
                )
            )
        sequence.finish_reason = finish_reason_of(sequence, self.eos_token_ids, self.tokenizer)

    def _throw_away(self, sequence: Sequence, sampled: list[SampledToken]) -> None:
        """Drop what was sampled after the end of a sequence, and what it may have left in its pages."""
        is_rubbish = not all(math.isfinite(token.logprob) for token in sampled)
        if is_rubbish and sequence.finish_reason != "error":  # that one's pages are cleared as a whole
            self._runner.clear_rejected(sequence)

    def _close(self, sequence: Sequence) -> _Row | None:
        """Give a finished sequence's pages back; returns its row if that was the last."""
        if sequence.finish_reason == "error":
            self._clear(self.scheduler.discard(sequence))
        else:
            self.scheduler.finish(sequence)
            if self.speculation is not None:
                self.speculation.finish(sequence)
        row = self._rows[sequence.request.request_id]
        row.done.append(sequence)
        return row if len(row.done) == len(row.sequences) else None

    def _complete(self, row: _Row) -> Completion:
        del self._rows[row.request.request_id]
        first = row.sequences[0]
        usage = Usage(
            prompt_tokens=first.num_prompt,
            cached_tokens=first.num_cached,
            completion_tokens=sum(s.num_generated for s in row.sequences),
            drafted_tokens=sum(s.num_drafted for s in row.sequences),
            accepted_tokens=sum(s.num_accepted for s in row.sequences),
            device_seconds=sum(s.device_ns for s in row.sequences) / 1e9,
            time_to_first_token_s=min(s.first_token_at - s.added_at for s in row.sequences if s.first_token_at),
            inter_token_s=first.mean_inter_token_s,
            num_preemptions=sum(s.num_preemptions for s in row.sequences),
            evicted_tokens=first.num_evicted,
        )
        self.stats.num_preemptions += usage.num_preemptions
        self.stats.num_cached_tokens += usage.cached_tokens
        self.stats.num_evicted_tokens += usage.evicted_tokens
        for sequence in row.sequences:
            if sequence.matcher is not None and sequence.matcher.error and math.isfinite(sequence.sum_logprob):
                error = RowError("invalid_sampling", sequence.matcher.error)
                return Completion(row.request.request_id, usage=usage, error=error)
        if any(sequence.finish_reason == "error" for sequence in row.sequences):
            message = (
                f"the model's logits are not finite in {dtype_name(self.dtype)}; if that happens to many rows, "
                "set engine.dtype to bfloat16 or float32"
            )
            return Completion(row.request.request_id, usage=usage, error=RowError("not_finite", message))
        return Completion(row.request.request_id, [_output_of(s) for s in row.sequences], usage)

    def _charge(self, plan: StepPlan, weights: list[float], late: set[Sequence], step_ns: int) -> None:
        """Put the time of a step on the sequences that were in it; the tokens of `late` ones do not count."""
        stats = self.stats
        stats.num_steps += 1
        stats.busy_ns += step_ns
        if not plan.sequences:
            stats.lost_ns += step_ns
            return
        for sequence, num_tokens, part in zip(plan.sequences, plan.num_tokens, split_exactly(step_ns, weights)):
            sequence.device_ns += part
            if num_tokens > 1:
                stats.prefill_ns += part
                stats.num_prefill_tokens += num_tokens
            elif sequence not in late:
                stats.num_decode_tokens += 1

    def _load_draft_model(self) -> DraftModel | None:
        if self.config.speculative_config.model is None:
            return None
        check_draft_model(self.config.model, self.config.speculative_config.model, self.config.tokenizer)
        draft_model = DraftModel(self.config, self.device, self.dtype)
        self.notes += draft_model.notes
        return draft_model

    def _new_speculation(self, num_pages: int) -> Speculation | None:
        config = self.config.speculative_config
        if config.method == "none":
            return None
        if self._draft_model is not None:
            self._draft_model.allocate(num_pages)
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        identity = hashlib.blake2b(vocabulary, digest_size=16).hexdigest()
        speculator = make_speculator(config, identity=identity, draft_model=self._draft_model)
        return Speculation(config, speculator, self.step_times, self.decoder.vocab_size, self._note)

    def _clear(self, pages: list[int]) -> None:
        self._runner.clear_pages(pages)
        if self._draft_model is not None:
            self._draft_model.clear(pages)

    def _note(self, text: str) -> None:
        logger.warning(text)
        self.notes.append(text)


def resolve_device(name: str) -> torch.device:
    """The device that a configuration means; ValueError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"engine.device is {name!r}, but torch sees no CUDA device; use cpu or auto")
    return torch.device(name)


def resolve_dtype(name: str, checkpoint_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations: as named, else the checkpoint's on a GPU and the faster one on a CPU."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cpu":
        return fastest_cpu_dtype()
    return torch.bfloat16 if checkpoint_dtype == torch.float32 else checkpoint_dtype


def _output_of(sequence: Sequence) -> Output:
    assert sequence.finish_reason is not None
    return Output(
        index=sequence.index,
        text=sequence.text,
        token_ids=sequence.output_token_ids,
        finish_reason=sequence.finish_reason,
        mean_logprob=sequence.sum_logprob / sequence.num_generated,
        logprobs=sequence.logprobs,
    )
