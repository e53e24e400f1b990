"""Greedy and sampled decoding with a key-value cache, with hooks in the prefill, the decoding, or both."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hooked_llava.architecture.hooks import NamesFilter
from hooked_llava.checks import one_of, whole_number
from hooked_llava.errors import HookNameError, InputError, a_type
from hooked_llava.machine.devices import to_device
from hooked_llava.model.cache import LLaVACache
from hooked_llava.model.cache_hooks import caching_hook, shared_spans
from hooked_llava.model.components.hook_point import HookPoint, has_functions
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.hooked_module import HookedModule
from hooked_llava.model.language import LanguageTower
from hooked_llava.model.prompt_hooks import HookEntry, Phase, PromptHook, as_hook, with_answer_span
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; greedy unless `do_sample`.

    Attributes:
        do_sample (bool): Draw from the distribution instead of taking the most probable token.
        temperature (float): Divides the logits before the softmax.
        top_k (int | None): Draw only among the k most probable tokens.
        top_p (float | None): Draw only among the most probable tokens that together reach this probability.
        generator (torch.Generator | None): Source of randomness, on the model's device.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(
                f"temperature={self.temperature}; expected a positive number (do_sample=False for greedy decoding)."
            )
        if self.top_k is not None:
            whole_number(self.top_k, "top_k", least=1, expected="at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}; expected a probability above 0 and up to 1, or None.")

    def pick(self, logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
        """The next token of each row."""
        if not self.do_sample:
            return logits.argmax(-1)
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            warpers.append(TopPLogitsWarper(self.top_p))
        no_tokens = cast("torch.LongTensor", logits.new_empty(0, dtype=torch.long))  # these warpers do not read them
        scores = warpers(no_tokens, cast("torch.FloatTensor", logits.float()))
        p = scores.softmax(-1)
        # As torch.multinomial draws one token, without its check of p, for which the CPU would wait.
        return (p / torch.empty_like(p).exponential_(1, generator=self.generator)).argmax(-1)


@runtime_checkable
class Steers(Protocol):
    """What steers a model while it generates; `hooked_llava.steering.Steering` is one."""

    @property
    def model(self) -> HookedModule:
        """The model that it was made for."""
        ...

    @property
    def interventions(self) -> Sequence[Any]:
        """Entries of `fwd_hooks` that say by themselves in which phases they act."""
        ...

    def attached(self) -> AbstractContextManager[Any]:
        """What else must be attached to the model."""
        ...


@torch.no_grad()
def generate(
    model: HookedModule,
    inputs: InputsLike,
    max_new_tokens: int = 20,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    stop_strings: str | Sequence[str] = (),
    stop_at_eos: bool = True,
    fwd_hooks: Sequence[Any] = (),
    hook_phase: Phase = "both",
    steering: Steers | Sequence[Steers] = (),
    return_cache: bool = False,
    names_filter: NamesFilter = None,
    return_type: Literal["text", "tokens"] = "text",
) -> Any:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Args:
        model: the model.
        inputs: anything `model.as_inputs` takes; rows padded on the right are moved to the left first.
        max_new_tokens: number of steps at most.
        do_sample: draw tokens instead of taking the most probable.
        temperature: divides the logits before the softmax.
        top_k: draw only among the k most probable tokens.
        top_p: draw only among the most probable tokens that together reach this probability.
        seed: makes sampling repeatable.
        generator: source of randomness on the model's device, instead of a seed.
        stop_strings: end a row once its text contains one of these (which stays in the text, as in transformers).
        stop_at_eos: end a row at the end-of-answer token, which is not part of the text.
        fwd_hooks: functions and `Intervention`s attached while generating, as for `run_with_hooks`. The positions that an
            intervention names are the prompt's (padded on the left); on new tokens it acts where it names none, or the span
            "answer" (all that is generated), and `last` as an end of an edge is where every new token is predicted.
        hook_phase: attach them over the prompt ("prefill"), over new tokens one at a time ("decode"), or "both".
        steering: what `hooked_llava.steering.steer` made, or several; each says its phases itself.
        return_cache: also return the activations of prompt and generated tokens, but the last one, which is never run.
        names_filter: which activations, as for `run_with_cache`.
        return_type: new text, or new token ids [batch new_tokens], rows that ended earlier filled with padding.

    Returns the text (a list for a batch) or tokens; with `return_cache` a pair of that and a `LLaVACache`. Raises `InputError`
    for input that does not fit the model, and `HookNameError` for hooks that are not there or never fire.
    """
    prompt = with_answer_span(model.as_inputs(inputs).padded_left())
    _check_request(model, prompt, max_new_tokens, return_type)
    if seed is not None:
        generator = torch.Generator(prompt.input_ids.device).manual_seed(seed)
    sampling = Sampling(do_sample, temperature, top_k, top_p, generator)
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    if return_type == "text" or stops:
        _ = model.tokenizer  # a model without one says so now, not after decoding
    stop = _Stop(model, prompt, stop_at_eos, stops)
    with _hooks_by_phase(model, prompt, fwd_hooks, hook_phase, steering) as hooks:
        record = _Record(model, names_filter, prompt) if return_cache else None
        tokens = _decode(model, prompt, max_new_tokens, sampling, stop, hooks, record)
    answer = tokens if return_type == "tokens" else _texts(model, tokens, stop.eos)
    return (answer, record.cache()) if record is not None else answer


def _decode(
    model: HookedModule,
    prompt: Inputs,
    max_new_tokens: int,
    sampling: Sampling,
    stop: _Stop,
    hooks: dict[str, list[HookEntry]],
    record: _Record | None,
) -> Int[Tensor, "batch new_tokens"]:
    """The loop: one run over the prompt, then one position at a time."""
    capacity = prompt.shape[1] + max_new_tokens
    kv_cache = KVCache(model.language.cfg, batch=len(prompt), capacity=capacity, dtype=model.cfg.dtype)
    # A mask only where something is padded: without one attention runs in its fused form.
    padding = prompt.padding_mask
    mask = None if padding is None else F.pad(padding, (0, max_new_tokens), value=True)
    new_tokens = prompt.input_ids.new_full((len(prompt), max_new_tokens), stop.filler)
    newest, position_ids = None, prompt.position_ids
    for phase, steps in (("prefill", range(1)), ("decode", range(1, max_new_tokens))):
        with model.hooks(hooks[phase]):
            for step in steps:
                with model.placing(prompt, step), nullcontext() if record is None else record.listen(phase):
                    logits = _next_logits(model, prompt, newest, mask, position_ids, kv_cache)
                new_tokens[:, step] = torch.where(stop.ended, stop.filler, sampling.pick(logits))
                if stop.after(new_tokens[:, : step + 1]):
                    return new_tokens[:, : step + 1]
                newest = new_tokens[:, step : step + 1]
                position_ids = None if position_ids is None else position_ids[:, -1:] + 1
    return new_tokens


def _next_logits(
    model: HookedModule,
    prompt: Inputs,
    newest: Int[Tensor, "batch 1"] | None,
    mask: Bool[Tensor, "batch capacity"] | None,
    position_ids: Int[Tensor, "batch pos"] | None,
    kv_cache: KVCache,
) -> Float[Tensor, "batch d_vocab"]:
    """Run the prompt, or the newest token of each row, and read what comes next."""
    language = model.language
    resid = model.embed(prompt) if newest is None else language.embed_tokens(newest)  # (batch, pos, d_model)
    n = resid.shape[1]
    seen = None if mask is None else mask[:, : kv_cache.length + n]
    context = model.context(resid, seen, position_ids, kv_cache)
    # The last block gives keys and values of the whole prompt, and its output only where it is read.
    last = [n - 1] if newest is None and not _is_heard_at_the_end(language) else None
    resid = language(resid, context, queries=last)
    kv_cache.advance(n)
    return language.to_logits(resid)[:, -1]


class _Stop:
    """Which rows have ended."""

    def __init__(self, model: HookedModule, prompt: Inputs, stop_at_eos: bool, stop_strings: list[str]) -> None:
        self.model = model
        eos, pad = _eos_token_ids(model), model.config.pad_token_id
        self.eos = eos if stop_at_eos else ()
        self._ends = to_device(self.eos, prompt.device)
        self.stop_strings = stop_strings
        self.filler = pad if pad is not None else (*eos, 0)[0]
        self.ended: Bool[Tensor, " batch"] = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)

    def after(self, new_tokens: Int[Tensor, "batch new_tokens"]) -> bool:
        """Take note of the newest tokens; True once every row has ended."""
        ended = torch.isin(new_tokens[:, -1], self._ends)
        if self.stop_strings:
            texts = self.model.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            hits = [any(stop in text for stop in self.stop_strings) for text in texts]
            ended = ended | to_device(hits, ended.device)
        self.ended = self.ended | ended
        return bool(self.ended.all())


class _Record:
    """Activations of prompt and generated tokens, joined along the positions."""

    def __init__(self, model: HookedModule, names_filter: NamesFilter, prompt: Inputs) -> None:
        self.model = model
        self.prompt = prompt
        self.names = model.hooks_table.resolve(names_filter, with_image=prompt.pixel_values is not None)
        self.steps: list[dict[str, Tensor]] = []

    @contextmanager
    def listen(self, phase: str) -> Iterator[None]:
        store: dict[str, Tensor] = {}
        self.steps.append(store)
        table = self.model.hooks_table
        firing = [name for name in self.names if phase == "prefill" or not table[name].on_image_side]
        hooks = [(firing, caching_hook(store, self.model))] if firing else []
        with self.model.hooks(hooks):
            yield

    def cache(self) -> LLaVACache:
        joined = {name: self._join(name) for name in self.names}
        spans, n_prompt = shared_spans(self.prompt), self.prompt.shape[1]
        if "text" in spans:  # what was generated is text
            spans["text"] = torch.cat([spans["text"], torch.arange(n_prompt, n_prompt + len(self.steps) - 1)])
        return LLaVACache(joined, self.model, spans=spans)

    def _join(self, name: str) -> Tensor:
        parts = [store[name] for store in self.steps if name in store]
        hook = self.model.hooks_table[name]
        if "key" in hook.axes and len(parts) > 1:  # later queries see more keys: earlier rows are filled up
            n_keys = parts[-1].shape[-1]
            empty = float("-inf") if hook.site == "attn.hook_attn_scores" else 0.0
            parts = [F.pad(part, (0, n_keys - part.shape[-1]), value=empty) for part in parts]
        axis = hook.position_axis
        return parts[0] if len(parts) == 1 or axis is None else torch.cat(parts, dim=axis)


@contextmanager
def _hooks_by_phase(
    model: HookedModule, prompt: Inputs, fwd_hooks: Sequence[Any], hook_phase: str, steering: Steers | Sequence[Steers]
) -> Iterator[dict[str, list[HookEntry]]]:
    """What is attached in each phase, what steers last; inside the block its autoencoders are in the model."""
    several = list(steering) if isinstance(steering, Sequence) else [steering]
    for one in several:
        if not isinstance(one, Steers):
            raise InputError(f"steering= holds {a_type(one)}; expected what `steer` returns.")
        if one.model is not model:
            raise InputError("steering= was made for another model; make it by `steer` with this one.")
    with ExitStack() as stack:
        for one in several:
            stack.enter_context(one.attached())
        hooks = _by_phase(model, prompt, fwd_hooks, hook_phase)
        steers = _by_phase(model, prompt, [change for one in several for change in one.interventions], "both")
        yield {phase: [*hooks[phase], *steers[phase]] for phase in hooks}


def _by_phase(
    model: HookedModule, prompt: Inputs, fwd_hooks: Sequence[Any], hook_phase: str
) -> dict[str, list[HookEntry]]:
    """What is attached in each phase: over single new tokens the image side is not run."""
    one_of(hook_phase, get_args(Phase), "hook_phase")
    phases: dict[str, list[HookEntry]] = {"prefill": [], "decode": []}
    entries = [as_hook(entry, model) for entry in fwd_hooks]
    for names, fn in entries:
        in_prompt = model.hooks_table.resolve(names, with_image=prompt.pixel_values is not None)
        over_tokens = [name for name in in_prompt if not model.hooks_table[name].on_image_side]
        if hook_phase == "decode" and not over_tokens:
            raise HookNameError(
                f"Hook {in_prompt[0]!r} does not fire over new tokens, when the image has been seen; use hook_phase='prefill' "
                "or 'both'."
            )
        if hook_phase != "decode":
            phases["prefill"].append((in_prompt, fn))
        if hook_phase != "prefill" and over_tokens:
            phases["decode"].append((over_tokens, fn))
    prompt_hooks = [fn for _, fn in entries if isinstance(fn, PromptHook)]
    _check_placed(prompt_hooks, prompt, hook_phase)
    PromptHook.prepare_all(prompt_hooks)
    return phases


def _check_placed(hooks: Sequence[PromptHook], prompt: Inputs, hook_phase: str) -> None:
    """Refuse interventions that do not fit the prompt, or do nothing in the phase that was asked for."""
    for hook in hooks:
        hook.place(prompt)
        phases = {hook_phase, hook.phases} - {"both"}
        if len(phases) > 1:
            raise InputError(f"{hook!r} acts in other passes than hook_phase={hook_phase!r}: nothing would change.")
        if phases == {"decode"} and not hook.acts_on_new_tokens(prompt):
            raise InputError(
                f"{hook!r} names positions of the prompt, which are not run again over new tokens: with hook_phase='decode' "
                "nothing would change. Leave positions= out, name the span 'answer', or use hook_phase='prefill' or 'both'."
            )
        if hook_phase != "prefill":
            hook.place(prompt, 1)


def _is_heard_at_the_end(language: LanguageTower) -> bool:
    """Whether anybody hooks the last block or what follows it, so that all positions go through."""
    modules = (*language.blocks[-1].modules(), *language.ln_final.modules(), language.unembed, language.hook_logits)
    return any(module.hooked if isinstance(module, HookPoint) else has_functions(module) for module in modules)


def _eos_token_ids(model: HookedModule) -> tuple[int, ...]:
    """Tokens that end an answer: the generation config's, as in transformers, else the model config's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    if own is None:
        return model.config.eos_token_ids
    return (own,) if isinstance(own, int) else tuple(own)


def _check_request(model: HookedModule, prompt: Inputs, max_new_tokens: int, return_type: str) -> None:
    one_of(return_type, ("text", "tokens"), "return_type")
    whole_number(max_new_tokens, "max_new_tokens", least=1)
    n_ctx = model.config.language.n_ctx
    if prompt.shape[1] + max_new_tokens > n_ctx:
        raise InputError(
            f"The prompt has {prompt.shape[1]} positions and max_new_tokens is {max_new_tokens}, but the model was made for "
            f"{n_ctx} positions in all. Shorten the prompt or ask for fewer tokens."
        )


def _texts(model: HookedModule, tokens: Int[Tensor, "batch new_tokens"], eos: tuple[int, ...]) -> str | list[str]:
    """Each row up to its end token as text; not in a list if there is one row."""
    rows = [list(itertools.takewhile(lambda token: token not in eos, row)) for row in tokens.tolist()]
    kept = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = [model.tokenizer.decode(row, **kept).strip() for row in rows]
    return texts[0] if len(texts) == 1 else texts
