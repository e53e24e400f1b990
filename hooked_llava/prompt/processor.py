"""What is asked of a Hugging Face processor and of its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer of transformers: any `PreTrainedTokenizerBase`, with its special tokens."""

    def __call__(self, text: Any, **options: Any) -> Mapping[str, Any]:
        """Token ids and masks of one text or several, and their characters where the tokenizer is a fast one."""
        ...

    def decode(self, token_ids: Any, **options: Any) -> str:
        """The text of a row of token ids."""
        ...


@runtime_checkable
class Processor(Protocol):
    """Tokenizer and image processor of a checkpoint, as `LlavaProcessor` and its kin hold them.

    Where it has them, its `image_token`, `image_token_id`, `chat_template` and `patch_size` count as well.
    """

    tokenizer: Any
    """A `Tokenizer`."""
    image_processor: Any
    """What makes `pixel_values` of images."""
