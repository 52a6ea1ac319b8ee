"""What can be read about a model without loading it. I/O; a hostile config.json is an error."""

import json
from pathlib import Path

from launcher.errors import SpecError
from launcher.layout import ModelFacts
from launcher.spec import is_folder

CONFIG_MAX_BYTES = 16 * 1024 * 1024


def read_model_facts(model: str) -> ModelFacts:
    """Facts from the folder's config.json; all unknown for a hub id or a folder not seen here.

    Raises SpecError when config.json is there and cannot be what it should be.
    """
    folder = Path(model)
    config_file = folder / "config.json"
    if not is_folder(model) or not config_file.is_file():
        return ModelFacts()
    try:
        if config_file.stat().st_size > CONFIG_MAX_BYTES:
            raise SpecError(f"is larger than {CONFIG_MAX_BYTES} bytes", where=str(config_file))
        config = json.loads(config_file.read_bytes())
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=str(config_file)) from error
    except (ValueError, RecursionError) as error:
        raise SpecError("is not JSON", where=str(config_file)) from error
    if not isinstance(config, dict):
        raise SpecError("is not a model configuration", where=str(config_file))
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else config
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and architectures and str(architectures[0])
    return ModelFacts(
        architecture=named or None,
        layers=_count(inner, "num_hidden_layers"),
        attention_heads=_count(inner, "num_attention_heads"),
        weights_bytes=weights or None,
    )


def _count(config: dict[str, object], key: str) -> int | None:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
