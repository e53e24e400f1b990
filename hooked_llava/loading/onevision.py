"""OneVision's processor without its videos: transformers' own needs torchvision, its image processor and tokenizer do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, ProcessorMixin
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

IMAGE_TOKEN = "<image>"
_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_CHAT_FILES = ("chat_template.jinja", "chat_template.json")


class OnevisionProcessor(ProcessorMixin):
    """Image processor and tokenizer of a LLaVA-OneVision checkpoint, with its chat template.

    How many image tokens an image takes is counted where a prompt is prepared, by the image's layout.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        files: dict[str, str] | None = None,
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.image_token = getattr(tokenizer, "image_token", None) or IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.files = files or {}
        """Text of the checkpoint's files by name, which are saved as they were."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.image_processor).__name__}, {type(self.tokenizer).__name__})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Not there: prompts are made by `prepare`."""
        raise TypeError(
            "OneVision's processor of transformers needs torchvision; without it prompts are made by model.prepare(question, "
            "images=...)."
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> OnevisionProcessor:
        """The processor of a checkpoint folder; raises `OSError` or `ValueError` for files that do not load."""
        folder = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        files = {name: (folder / name).read_text() for name in (*_FILES, *_CHAT_FILES) if (folder / name).is_file()}
        image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(folder, local_files_only=True)
        fields, _ = cls.get_processor_dict(str(folder), local_files_only=True)
        return cls(image_processor, tokenizer, fields.get("chat_template") or tokenizer.chat_template, files)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the tokenizer, and the checkpoint's files as they were, from which transformers makes its own processor."""
        self.tokenizer.save_pretrained(folder)
        if not self.files:
            self.image_processor.save_pretrained(folder)
        for name, text in self.files.items():
            (Path(folder) / name).write_text(text)
