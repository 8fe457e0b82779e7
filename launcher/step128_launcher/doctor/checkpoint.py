"""What the checkpoint lacks that a server only shows as bad answers, slow decoding or a failed start."""

import json
import re

from step128_launcher.doctor.context import Context
from step128_launcher.doctor.finding import Finding, failed, passed, skipped, warned
from step128_launcher.sizes import format_bytes

_NO_MODEL = "no checkpoint was given"


def check_checkpoint(context: Context) -> Finding:
    """What the launcher read; a checkpoint that cannot be read is reported where it is read."""
    if context.footprint is None:
        return skipped("checkpoint", _NO_MODEL)
    found = context.footprint
    quantized = f"{found.quantization.method} ({found.quantization.policy})" if found.quantization else "not quantized"
    return passed("checkpoint", f"{found.tensors} tensors, {format_bytes(found.stored_bytes)}, {quantized}")


def check_kv_scales(context: Context) -> Finding:
    """An FP8 KV cache without calibrated scales loses quality at depth."""
    name = "kv-scales"
    if context.footprint is None:
        return skipped(name, _NO_MODEL)
    scales, missing = context.footprint.kv_scales, context.footprint.unscaled_layers
    remedy = "step128-checkpoint calibrate-kv, or serve with --kv-cache-dtype auto (twice the memory)."
    if scales is None:
        return warned(name, "the checkpoint has no KV-cache scales: an FP8 cache would use 1.0 for every layer", remedy)
    if missing:
        layers = ", ".join(map(str, missing))
        return warned(name, f"no scales for the MTP layers {layers}: drafts may be accepted less often", remedy)
    if all(scale.k == 1.0 and scale.v == 1.0 for scale in scales.values()):
        return warned(name, f"all {len(scales)} scales are 1.0, so nothing was calibrated", remedy)
    return passed(name, f"{len(scales)} layers calibrated")


def check_mtp(context: Context) -> Finding:
    """Converters often drop the MTP layers; speculation then is impossible."""
    name = "mtp"
    if context.footprint is None:
        return skipped(name, _NO_MODEL)
    found, announced = context.footprint.mtp_layers, context.footprint.config.num_mtp_layers
    if found and found >= announced:
        return passed(name, f"{found} MTP layers, as config.json announces")
    lost = f"at most {found} draft tokens a step" if found else "no speculative decoding"
    return warned(
        name,
        f"config.json announces {announced} MTP layers, the shards hold {found or 'none'}: {lost}",
        "Use a checkpoint with the MTP layers (3 behind the trunk), or accept the lower speed.",
    )


def check_chat_template(context: Context) -> Finding:
    """Without a template there are no chat requests; one that knows no tools loses their results."""
    name = "chat-template"
    if context.model is None:
        return skipped(name, _NO_MODEL)
    template = _template(context)
    if template is None:
        return failed(
            name,
            f"no chat_template.jinja and no chat_template in {context.model / 'tokenizer_config.json'}",
            "Copy chat_template.jinja of the original model into the folder: /v1/chat/completions needs it.",
        )
    lacks = []
    if not re.search(r"role'?\]?\s*==\s*['\"]tool['\"]|\btool_response\b", template):
        lacks.append("tool results (role 'tool')")
    if not re.search(r"is (not )?(string|iterable|sequence)", template):
        lacks.append("content given as a list of parts (images)")
    if lacks:
        remedy = (
            "Use the original model's template; ask the server for a tool call and its answer before relying on it."
        )
        return warned(name, "the template shows no handling of " + " and of ".join(lacks), remedy)
    return passed(name, "handles tool results and content in parts")


def _template(context: Context) -> str | None:
    if context.model is None:
        return None
    for file in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        try:
            text = (context.model / file).read_text(encoding="utf-8", errors="replace")
            document = text if file.endswith(".jinja") else json.loads(text)
        except (OSError, ValueError, RecursionError):
            continue  # the next file may have it; that none has it is what is reported
        template = document if isinstance(document, str) else _field(document)
        if template:
            return template
    return None


def _field(document: object) -> str | None:
    value = document.get("chat_template") if isinstance(document, dict) else None
    if isinstance(value, list):  # several named templates
        value = " ".join(str(one.get("template", "")) for one in value if isinstance(one, dict))
    return value if isinstance(value, str) and value.strip() else None
