"""Which tokens does an answer add to its prompt?

Prompt, separator and answer are tokenized together and compared with the prompt's own tokens: what an answer's first
token is depends on what stands before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

from jaxtyping import Int
from torch import Tensor

from hooked_llava.errors import InputError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.templates import default_template, format_chat
from hooked_llava.prompt.token_text import begins_with_bos
from hooked_llava.readout.vocabulary import decode_text, token_id, token_names

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.token_map import TokenMap

_TAIL = 16  # of a prompt that is known by its ids alone, so many tokens are tried as context


@dataclass(frozen=True)
class Answer:
    """An answer as the tokens that count for it: variants in another case or with another leading space add to it.

    Attributes:
        text (str): The word as given.
        ids (tuple[int, ...]): First tokens of all its variants.
        whole (bool): Whether these are all there is to it; False for the first tokens of longer words.
    """

    text: str
    ids: tuple[int, ...]
    whole: bool = True

    @classmethod
    def of(
        cls,
        model: HookedLLaVA,
        answer: str | SupportsIndex | Answer,
        *,
        inputs: Inputs | None = None,
        variants: bool = False,
        first_token: bool = False,
    ) -> Answer:
        """The answer's token after a prompt; with `variants` also lower case, capitalised, each with and without a space.

        `inputs` is the prompt that is answered (of a batch, the first); by default one as `model.prepare` makes it. With
        `first_token` a word of several tokens stands for its first (variants whose first token it shares with another
        word count as well). Raises `InputError` if the word is not a single token otherwise, and for words that the
        tokenizer does not know.

        >>> from hooked_llava import HookedLLaVA
        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> len(Answer.of(model, "Red", variants=True).ids)
        2
        """
        if isinstance(answer, Answer):
            return answer
        if not isinstance(answer, str):
            return cls(str(token_id(model, answer)), (token_id(model, answer),))
        prompt = None if inputs is None else inputs.token_maps[0]
        context = _Context.of(model, prompt)
        ids = _checked(model, context, answer)
        if len(ids) > 1 and not first_token:
            raise InputError(_several(model, answer, ids))
        found = [ids] + (_variants(model, context, answer, first_token=first_token) if variants else [])
        return cls(answer, tuple(dict.fromkeys(row[0] for row in found)), all(len(row) == 1 for row in found))


@dataclass(frozen=True)
class AnswerTokens:
    """An answer after a prompt, token by token.

    Attributes:
        text (str): In words.
        variants (tuple[tuple[int, ...], ...]): For each of its tokens the ids that count: one, or those of an
            `Answer`'s variants.
        whole (bool): Whether these tokens are the whole answer.
        from_text (bool): Whether it was given as text.
    """

    text: str
    variants: tuple[tuple[int, ...], ...]
    whole: bool
    from_text: bool

    @property
    def ids(self) -> tuple[int, ...]:
        """One id for each token."""
        return tuple(ids[0] for ids in self.variants)


AnswerLike: TypeAlias = str | SupportsIndex | Answer | AnswerTokens | Iterable[SupportsIndex]
"""Text (of several tokens: under teacher forcing), a token id, an `Answer` with its variants, or token ids."""
Target: TypeAlias = AnswerLike | Iterable[AnswerLike] | None
"""An answer for all prompts, or a list with one for each; None for the answer that the inputs have appended, else the model's
own next token."""


def answer_tokens(model: HookedLLaVA, inputs: InputsLike, answer: Target, what: str = "answer") -> list[AnswerTokens]:
    """The tokens that an answer adds to each of the prompts.

    Text follows the prompt after what the template puts there, unless it brings a leading space of its own; where no template
    is known, after a space, unless the prompt ends in white space or in a special token. `answer` is text, a token id, an
    `Answer`, or a list with one for each prompt, which may also be lists of token ids. Raises `InputError` for an answer that
    has no tokens, or words that the tokenizer does not know, and for one that would change the prompt's own last tokens;
    `what` is the argument's name.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> [found] = answer_tokens(model, model.prepare("Who made the star?"), "Red star")
    >>> model.to_str_tokens(found.ids)
    ['Red', 'star']
    """
    prompts = model.as_inputs(inputs)
    each = per_prompt(answer, len(prompts), what)
    return prompts.each(lambda token_map, one: one_answer(model, token_map, one, what), prompts.token_maps, each)


def one_answer(model: HookedLLaVA, prompt: TokenMap | None, answer: AnswerLike, what: str = "answer") -> AnswerTokens:
    """The tokens that an answer adds to one prompt; as `answer_tokens`. Without a prompt: to one that `prepare` makes."""
    if isinstance(answer, AnswerTokens):
        return answer
    if isinstance(answer, Answer):
        text = decode_text(model, answer.ids[:1]) if answer.text == str(answer.ids[0]) else answer.text
        return AnswerTokens(text, (answer.ids,), answer.whole, from_text=False)
    if isinstance(answer, str):
        ids = _checked(model, _Context.of(model, prompt), answer, what)
    else:
        several: list[Any] = [answer] if is_index(answer) or not isinstance(answer, Iterable) else list(answer)
        ids = [token_id(model, i) for i in several]
        if not ids:
            raise InputError(f"The {what} {answer!r} has no tokens; give at least one.")
    text = answer if isinstance(answer, str) else decode_text(model, ids)
    return AnswerTokens(text, tuple((i,) for i in ids), whole=True, from_text=isinstance(answer, str))


def single_token(model: HookedLLaVA, prompt: TokenMap | None, answer: str | SupportsIndex | Answer) -> int:
    """The one token that an answer adds to a prompt, for analyses that follow a single token.

    Raises `InputError` with the answer's tokens if they are several.
    """
    return only_token(model, one_answer(model, prompt, answer))


def only_token(model: HookedLLaVA, answer: AnswerTokens) -> int:
    """The answer's token; raises `InputError` if it has several."""
    if len(answer.ids) != 1:
        raise InputError(_several(model, answer.text, answer.ids))
    return answer.ids[0]


def first_tokens(model: HookedLLaVA, prompt: TokenMap, answers: Sequence[str]) -> list[int | None]:
    """The first token that each of several answers adds to a prompt; None for one that is empty or begins with unknown words.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> first_tokens(model, model.prepare("Who made the star?").token_map, ["", "zebra"])
    [None, None]
    """
    context = _Context.of(model, prompt)
    found = [_added(model, context, answer)[:1] if answer else [] for answer in answers]
    return [ids[0] if ids and ids[0] != model.tokenizer.unk_token_id else None for ids in found]


def per_prompt(given: Target, n_prompts: int, what: str = "target") -> list[Any]:
    """One answer for each prompt: the same for all, or a list's own; raises `InputError` for a list of another length.

    >>> per_prompt("Red", 2), per_prompt([7, 8], 2)
    (['Red', 'Red'], [7, 8])
    """
    if given is None or is_index(given) or isinstance(given, (str, Answer)):
        return [given] * n_prompts
    if not isinstance(given, Iterable):
        raise InputError(
            f"{what}={given!r}; expected a word, a token id or an Answer, or a list with one for each prompt."
        )
    each = list(given)
    if len(each) != n_prompts:
        raise InputError(
            f"{what}= names {len(each)} answers for {n_prompts} prompts; give one for each prompt, or one for all."
        )
    return each


def is_index(given: object) -> bool:
    """Whether it is a whole number of any library.

    >>> import torch
    >>> is_index(torch.tensor(7)), is_index("7")
    (True, False)
    """
    return hasattr(given, "__index__") and not getattr(given, "ndim", 0)


def without_end(model: HookedLLaVA, ids: Sequence[int]) -> list[int]:
    """Generated token ids up to the first that ends an answer.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> without_end(model, [7, model.tokenizer.eos_token_id, 0])
    [7]
    """
    return list(takewhile(lambda token: token not in model.config.eos_token_ids, ids))


def appendable(model: HookedLLaVA, ids: Sequence[int]) -> list[int]:
    """Generated token ids up to the first that ends an answer or stands for an image, which no prompt takes as text.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> appendable(model, [7, model.config.image_token_id, 8])
    [7]
    """
    return list(takewhile(lambda token: token != model.config.image_token_id, without_end(model, ids)))


def check_appendable(model: HookedLLaVA, ids: Int[Tensor, "prompt n"]) -> None:
    """Raise `InputError` for a token that stands for an image."""
    image = model.config.image_token_id
    if found := (ids == image).nonzero().tolist():
        row, place = found[0]
        raise InputError(
            f"The answer of prompt {row} has token {image} at place {place}, which stands for an image; expected tokens of "
            "text. Give an answer without it, or the tokens before it."
        )


def separator(model: HookedLLaVA, prompt: str, answer: str, of_template: str | None = None) -> str:
    """What stands between a prompt's text and its answer: nothing if the answer begins with white space, else the template's.

    Where no template says it: a space, unless the prompt ends in white space or in a special token, as chats do.
    """
    if answer[:1].isspace():
        return ""
    if of_template is not None:
        return of_template
    special = [token.content for token in model.tokenizer.added_tokens_decoder.values() if token.special]
    return "" if not prompt or prompt[-1].isspace() or prompt.endswith(tuple(special)) else " "


def continued(model: HookedLLaVA, prompt: TokenMap, text: str, answer: str) -> str:
    """The text of a prompt with its answer."""
    return text + separator(model, text, answer, prompt.words.answer_separator if prompt.words else None) + answer


@dataclass(frozen=True)
class _Context:
    """What an answer is tokenized after: the prompt, or the end of it.

    Attributes:
        ids (list[int]): Its tokens, an image's placeholder counted once.
        whole (bool): Whether it is the prompt as it was tokenized, with the special tokens that are added then.
        of_template (str | None): What the prompt's template puts before an answer, if it is known.
    """

    text: str
    ids: list[int]
    whole: bool
    of_template: str | None = None

    @classmethod
    def of(cls, model: HookedLLaVA, prompt: TokenMap | None) -> _Context:
        """That of a prompt; raises `InputError` if only its ids are known and they spell nothing that gives them again."""
        if prompt is None:
            _ = model.tokenizer  # a model without one says so
            assert model.processor is not None
            template = default_template(model.processor)
            made = template.format("?") if template else format_chat(model.processor, "?")
            return cls(made.text, _encode(model, made.text, special=True), True, made.answer_separator)
        ids = _own_ids(prompt)
        text = None if prompt.words is None else prompt.words.prompt
        if text is not None and _encode(model, text, special=True) == ids:
            assert prompt.words is not None
            return cls(text, ids, True, prompt.words.answer_separator)
        for n in (len(ids), *range(min(len(ids), _TAIL), 0, -1)):
            text = model.tokenizer.decode(ids[-n:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if text and _encode(model, text, special=False) == ids[-n:]:
                return cls(text, ids[-n:], whole=False)
        raise InputError(
            f"The prompt is known by its token ids alone, and the text of the last of them, {text!r}, gives other ids; so how "
            "an answer goes on is not known. Make the prompt with prepare, or give the answer as token ids."
        )

    def separated(self, model: HookedLLaVA, answer: str) -> str:
        """The answer with what stands before it."""
        return separator(model, self.text, answer, self.of_template) + answer

    def added(self, model: HookedLLaVA, text: str) -> list[int] | None:
        """The tokens that some text adds; None if the context's own would change."""
        ids = _encode(model, self.text + text, special=self.whole)
        return ids[len(self.ids) :] if ids[: len(self.ids)] == self.ids else None


def _checked(model: HookedLLaVA, context: _Context, answer: str, what: str = "answer") -> list[int]:
    """The tokens that an answer adds; raises `InputError` as `answer_tokens`."""
    ids = _added(model, context, answer, what) if answer else []
    if not ids:
        raise InputError(f"The {what} {answer!r} has no tokens; give at least one.")
    unknown = model.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        raise InputError(
            f"The tokenizer does not know {answer!r}: it becomes {token_names(model, ids)}. Give words of the model's "
            "vocabulary (mind capitals), or token ids."
        )
    return ids


def _added(model: HookedLLaVA, context: _Context, answer: str, what: str = "answer") -> list[int]:
    """The tokens that an answer adds, known or not; raises `InputError` if the prompt's own would change."""
    text = context.separated(model, answer)
    ids = context.added(model, text)
    if ids is None:
        own = token_names(model, context.ids[-3:])
        changed = token_names(model, _encode(model, context.text + text, special=context.whole))
        raise InputError(
            f"The {what} {answer!r} would change the prompt's own last tokens {own} (the prompt ends in "
            f"{context.text[-8:]!r}, and both together end in {changed[-len(own) - 1 :]}). End the prompt in another place, "
            f"for example without a space at its end, or give the {what} as token ids."
        )
    return ids


def _variants(model: HookedLLaVA, context: _Context, answer: str, *, first_token: bool) -> list[list[int]]:
    """Tokens of the answer in lower case and capitalised, each with and without a leading space.

    Where the separator is a space, a word glued to the prompt counts only as a single token: its pieces may be letters.
    """
    found = []
    for word in (answer, answer.lower(), answer.capitalize()):
        own, bare = context.separated(model, word), word.lstrip()
        for variant, in_pieces in ((own, first_token), (" " + bare, first_token), (bare, first_token and bare == own)):
            ids = context.added(model, variant) or []
            if (len(ids) == 1 or (in_pieces and ids)) and _begins(model, word, ids[0]):
                found.append(ids)
    return found


def _own_ids(prompt: TokenMap) -> list[int]:
    """Token ids of a prompt, without an appended answer and with one placeholder for each image."""
    inside = {p for image in prompt.image_ranges for p in image[1:]}
    return [prompt.token_ids[p] for p in prompt.own if p not in inside]


def _encode(model: HookedLLaVA, text: str, *, special: bool) -> list[int]:
    special = special and not begins_with_bos(model.tokenizer, text)
    options: dict[str, Any] = {"add_special_tokens": special, "truncation": False, "padding": False}
    return list(model.tokenizer(text, **options)["input_ids"])


def _begins(model: HookedLLaVA, word: str, token: int) -> bool:
    """Whether a token is the beginning of a word: not a bare space, the unknown token, or half a character."""
    piece = model.tokenizer.decode([token]).strip()
    return bool(piece) and token != model.tokenizer.unk_token_id and word.strip().startswith(piece)


def _several(model: HookedLLaVA, answer: str, ids: Sequence[int]) -> str:
    return (
        f"{answer!r} is not a single token: after this prompt it becomes {token_names(model, ids)}. Give a word that is one "
        "token, or the id of the token that is meant."
    )
