"""From documents to token ids, by the checkpoint's own tokenizer, chat template and image processor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from step128_checkpoint.calibration.building.documents import Document
from step128_checkpoint.errors import CheckpointError, ConfigurationError, InputNotFoundError
from step128_checkpoint.files import read_json_object

TokenIds = NDArray[np.int32]

_MAX_TEXT_CHARACTERS = 1 << 21  # of one document: more than any context takes, little enough to tokenize at once


class RenderingError(ConfigurationError):
    """The chat template refuses a conversation. One of many is left out; the first of a part ends the build."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document. ``key`` is the same for documents that the model could not tell apart."""

    ids: TokenIds
    key: bytes


class Encoder:
    """Turns documents into token ids as a server would: template, then tokenizer, then expanded placeholders."""

    def __init__(self, folder: Path) -> None:
        """Open the tokenizer of a checkpoint folder (tokenizer.json and what is beside it; no weights).

        Raises:
            InputNotFoundError: the folder has no tokenizer.json.
            CheckpointError: the tokenizer cannot be read.
        """
        self._folder = folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputNotFoundError(
                f"{folder}: no tokenizer.json. Give the folder of the checkpoint (weights or not)."
            )
        try:
            # By its class: AutoTokenizer would look into config.json, and for code of the checkpoint's own.
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises plain Exception
            raise CheckpointError(f"{path}: not a tokenizer that can be read: {error}") from error
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.vocabulary = len(self._tokenizer)
        begin = self._tokenizer.bos_token_id
        first = self._tokenizer("").input_ids[:1]
        self._prefix = first if first == [begin] else []
        self._processor: Any = None  # transformers' Step3p7Processor

    @property
    def begin(self) -> TokenIds:
        """What a text sample starts with: the begin token, if this tokenizer puts one before a text."""
        return np.asarray(self._prefix, dtype=np.int32)

    def decode(self, ids: TokenIds) -> str:
        """Text of token ids, special tokens included."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def encode(self, document: Document) -> Encoded:
        """Token ids of a document.

        Raises:
            RenderingError: the template refuses it.
            ConfigurationError: there is no template, or it leaves out tools or pictures.
        """
        text = self._rendered(document) if document.messages else document.text[:_MAX_TEXT_CHARACTERS]
        key = hashlib.sha256(text.encode())
        for image in document.images:
            key.update(repr(image.size).encode() + image.tobytes())
        if document.images:
            text = self._with_placeholders(text, document)
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return Encoded(np.asarray(ids, dtype=np.int32), key.digest())

    def _rendered(self, document: Document) -> str:
        if not self._tokenizer.chat_template:
            raise ConfigurationError(
                f"{self._folder}: no chat template, so conversations cannot be rendered. Use a mixture of text, code "
                "and long parts only, or add chat_template.jinja."
            )
        try:
            text = str(
                self._tokenizer.apply_chat_template(
                    list(document.messages),
                    tools=list(document.tools) or None,
                    tokenize=False,
                    **document.variables,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RenderingError(
                f"{self._folder}: the chat template cannot render {document.name}: {error}. Leave this part out of the "
                "mixture, or use a checkpoint whose template can."
            ) from error
        calls = [call for message in document.messages for call in message.get("tool_calls", ())]
        names = [entry["function"]["name"] for entry in (*document.tools, *calls)]
        if lost := [name for name in names if name not in text]:
            raise ConfigurationError(
                f"{self._folder}: the chat template leaves out tools: {lost[0]} of {document.name} is not in what it "
                "renders. Leave parts of kind tools out of the mixture, or use a checkpoint whose template has them."
            )
        return text

    def _with_placeholders(self, text: str, document: Document) -> str:
        processor = self._image_processor()
        token = processor.image_token
        pieces = text.split(token)
        if len(pieces) != len(document.images) + 1:
            raise ConfigurationError(
                f"{self._folder}: the chat template writes {len(pieces) - 1} times {token} for the "
                f"{len(document.images)} pictures of {document.name}. Leave parts with pictures out (--no-images)."
            )
        inputs: dict[str, Any] = dict(processor.image_processor(images=list(document.images), return_tensors="np"))
        expanded = [processor.replace_image_token(inputs, i) for i in range(len(document.images))]
        return pieces[0] + "".join(image + piece for image, piece in zip(expanded, pieces[1:], strict=True))

    def _image_processor(self) -> Any:
        if self._processor is None:
            path = self._folder / "config.json"
            if not path.is_file():
                raise ConfigurationError(
                    f"{self._folder}: no config.json, which says how the model sees pictures. Leave them out "
                    "(--no-images), or give a checkpoint's folder."
                )
            config = read_json_object(path)
            if "vision_config" not in config:
                raise ConfigurationError(f"{path}: the model has no vision. Leave pictures out (--no-images).")
            # Only here: text needs neither Pillow nor torchvision.
            from transformers.models.step3p7.processing_step3p7 import Step3p7Processor

            from step128_checkpoint.calibration.vision import image_processor

            self._processor = Step3p7Processor(image_processor(config), self._tokenizer)
            number = config.get("image_token_id")
            token = self._tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None
            if token != self._processor.image_token:
                raise ConfigurationError(
                    f"{path}: image_token_id {number!r} is {token!r} in the tokenizer, "
                    f"{self._processor.image_token!r} is needed"
                )
        return self._processor
