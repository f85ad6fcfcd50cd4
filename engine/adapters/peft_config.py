"""Reads PEFT's adapter_config.json and refuses options that would change the forward pass."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.engine.adapters.open_file import NotRegularFileError, open_regular_file
from loraplex.engine.adapters.peft_patterns import Pattern, PatternCompiler, PatternError
from loraplex.engine.adapters.reader_error import is_transient
from loraplex.engine.adapters.vocabulary.options import (
    VocabularyOptionError,
    read_saved_modules,
    read_token_indices,
)

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_INVOCATION_TOKENS = 1024
ALL_LINEAR = "all-linear"
MIN_SCALE, MAX_SCALE = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127  # normal float32 numbers

# Fields that do not change the forward pass, and fields that PeftConfig holds.
_HARMLESS = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type", "velora_config",
))  # fmt: skip
_READ = frozenset((
    "alora_invocation_tokens", "alpha_pattern", "bias", "exclude_modules", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "r", "rank_pattern",
    "ensure_weight_tying", "modules_to_save", "target_modules", "trainable_token_indices",
    "use_dora", "use_rslora",
))  # fmt: skip
_REASONS = {
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "LoRA on bare parameters is not supported",
    "use_qalora": "QALoRA is not supported",
    "arrow_config": "Arrow routing is not supported",
    "kasa_config": "KaSA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
}
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")


class PeftConfigError(ValueError):
    """The configuration is not supported; the text is the reason, without the adapter's name."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields that determine the kind, the rank, the scale and the modules of an adapter."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[Pattern, int], ...]
    alpha_pattern: tuple[tuple[Pattern, float], ...]
    target_modules: tuple[str, ...] | Pattern | str  # the string is ALL_LINEAR
    exclude_modules: tuple[str, ...] | Pattern
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[Pattern, ...]
    base_model: str  # informational
    use_dora: bool = False  # a magnitude for each output feature
    lora_bias: bool = False  # lora_B has a bias
    replaces_bias: bool = False  # bias="lora_only": biases of adapted modules are trained, too
    invocation_tokens: tuple[int, ...] = ()  # of an activated LoRA, which applies from there on
    token_indices: tuple[tuple[str, tuple[int, ...]], ...] = ()  # see read_token_indices
    saved_modules: tuple[str, ...] = ()  # whose whole weights are in the file
    ties_weights: bool = False  # what is trained of a tied embedding is the head's, too
    unknown: tuple[str, ...] = ()  # options that are set and not known; PEFT ignores them too

    def rank_of(self, module: str) -> int:
        return next((r for pattern, r in self.rank_pattern if pattern.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the factor of B A x. Raises PeftConfigError if it is 0 or inf in float32."""
        alpha = next((a for pattern, a in self.alpha_pattern if pattern.match(module)), self.alpha)
        rank = self.rank_of(module)
        scale = alpha / math.sqrt(rank) if self.use_rslora else alpha / rank
        if not MIN_SCALE <= abs(scale) <= MAX_SCALE:
            raise PeftConfigError(
                f"lora_alpha gives {module} the scale {scale:g}, which float32 cannot hold"
            )
        return scale

    def targets(self, module: str) -> bool:
        """Returns True if PEFT would adapt the linear layer of this full name."""
        if self._excludes(module):
            return False
        if self.target_modules == ALL_LINEAR:
            return True
        if not isinstance(self.target_modules, str | tuple):
            return self.target_modules.fullmatch(module) is not None
        if module in self.target_modules:
            return True
        return any(
            module.endswith(f".{target}") for target in self.target_modules
        ) and self._in_layers(module)

    def _excludes(self, module: str) -> bool:
        if not isinstance(self.exclude_modules, tuple):
            return self.exclude_modules.fullmatch(module) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.exclude_modules)

    def _in_layers(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        for pattern in self.layers_pattern:
            match = pattern.match(module)
            if match is not None:
                return int(match["index"]) in self.layers_to_transform
        return False


def read_peft_config(folder: Path, root: str = "") -> PeftConfig:
    """Read and check the configuration of the adapter in `folder`.

    Args:
        root: see open_regular_file.

    Raises:
        PeftConfigError: the file is missing, unreadable or malformed, or asks for something that
            is not supported.
    """
    path = folder / CONFIG_FILE
    try:
        with open_regular_file(path, root) as descriptor:
            content = _read_bounded(descriptor)
        values = json.loads(content)
    except FileNotFoundError:
        raise PeftConfigError(f"there is no {CONFIG_FILE} in {folder}") from None
    except OSError as error:
        if is_transient(error):
            raise
        raise PeftConfigError(f"{CONFIG_FILE} cannot be read: {error}") from None
    except NotRegularFileError as error:
        raise PeftConfigError(str(error)) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, PeftConfigError):
            raise
        raise PeftConfigError(f"{CONFIG_FILE} is no valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise PeftConfigError(f"{CONFIG_FILE} must hold a JSON object")
    return parse_peft_config(values)


def _read_bounded(descriptor: int) -> bytes:
    """Returns the content of a file that may grow meanwhile."""
    with open(descriptor, "rb", closefd=False) as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise PeftConfigError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
    return content


def parse_peft_config(values: dict[str, Any]) -> PeftConfig:
    """Check the fields of a configuration. Raises PeftConfigError, which names the field."""
    _refuse_unsupported(values)
    patterns = PatternCompiler()
    try:
        return PeftConfig(
            rank=_rank("r", values.get("r", 8)),
            alpha=_alpha("lora_alpha", values.get("lora_alpha", 8)),
            use_rslora=bool(values.get("use_rslora")),
            rank_pattern=_pattern_map(values, "rank_pattern", _rank, patterns),
            alpha_pattern=_pattern_map(values, "alpha_pattern", _alpha, patterns),
            target_modules=_target_modules(values.get("target_modules"), patterns),
            exclude_modules=_exclude_modules(values.get("exclude_modules"), patterns),
            layers_to_transform=_layers(values.get("layers_to_transform")),
            layers_pattern=_layers_pattern(values.get("layers_pattern"), patterns),
            base_model=str(values.get("base_model_name_or_path") or ""),
            use_dora=bool(values.get("use_dora")),
            lora_bias=bool(values.get("lora_bias")),
            replaces_bias=values.get("bias") == "lora_only",
            invocation_tokens=_invocation_tokens(values.get("alora_invocation_tokens")),
            token_indices=read_token_indices(values.get("trainable_token_indices")),
            saved_modules=read_saved_modules(values.get("modules_to_save")),
            ties_weights=bool(values.get("ensure_weight_tying")),
            unknown=_unknown(values),
        )
    except (PatternError, VocabularyOptionError) as error:
        raise PeftConfigError(str(error)) from None


def _refuse_unsupported(values: dict[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise PeftConfigError(f"peft_type is {kind!r}; only LORA is supported")
    if values.get("bias", "none") not in ("none", None, "lora_only"):
        raise PeftConfigError(
            f"bias={values['bias']!r}: biases of modules without LoRA are not supported; train "
            "with bias='lora_only'"
        )
    if values.get("use_dora") and values.get("lora_bias"):
        raise PeftConfigError("use_dora beside lora_bias is not supported; train with one of them")
    if values.get("alora_invocation_tokens"):
        _refuse_beside_invocation(values)
    init = values.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or init in _PLAIN_INITS):
        raise PeftConfigError(
            f"init_lora_weights={init!r} changes the base weights; convert the adapter to plain "
            "LoRA when saving it (PEFT: path_initial_model_for_weight_conversion)"
        )
    for name, value in values.items():
        if value and name in _REASONS:
            raise PeftConfigError(f"{name}={str(value)[:80]}: {_REASONS[name]}")


def _refuse_beside_invocation(values: dict[str, Any]) -> None:
    if values.get("use_dora"):
        raise PeftConfigError(
            "use_dora beside alora_invocation_tokens is not supported, by PEFT neither; train with "
            "one of them"
        )
    if values.get("bias") == "lora_only":
        raise PeftConfigError(
            "bias='lora_only' beside alora_invocation_tokens is not supported: such biases change "
            "the tokens before the invocation too; train with lora_bias"
        )


def _unknown(values: dict[str, Any]) -> tuple[str, ...]:
    known = _HARMLESS | _READ | _REASONS.keys()
    return tuple(name[:80] for name, value in values.items() if value and name not in known)


def _rank(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise PeftConfigError(f"{name} must be a positive integer of 31 bits, got {value!r:.40}")
    return value


def _alpha(name: str, value: object) -> float:
    try:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        alpha = float(value) if is_number else 0.0  # type: ignore[arg-type]
    except OverflowError:
        alpha = math.inf
    if not math.isfinite(alpha) or alpha == 0:
        raise PeftConfigError(f"{name} must be a finite number other than 0, got {value!r:.40}")
    return alpha


def _pattern_map(
    values: dict[str, Any], name: str, read: Callable[[str, object], Any], patterns: PatternCompiler
) -> tuple[tuple[Pattern, Any], ...]:
    """Compile the keys, which PEFT matches against the end of a module's name."""
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise PeftConfigError(f"{name} must be a map, got {found!r:.40}")
    return tuple(
        (patterns.compile(name, key, r"(.*\.)?({})$"), read(f"{name}[{key!r}]", value))
        for key, value in found.items()
    )


def _target_modules(value: object, patterns: PatternCompiler) -> tuple[str, ...] | Pattern | str:
    """Returns a list of names, a regular expression, or ALL_LINEAR."""
    if isinstance(value, str) and value.lower() == ALL_LINEAR:
        return ALL_LINEAR
    found = _module_names("target_modules", value, patterns)
    if found == ():
        raise PeftConfigError("target_modules must be names or a pattern; it is empty")
    return found


def _exclude_modules(value: object, patterns: PatternCompiler) -> tuple[str, ...] | Pattern:
    return () if value in (None, "") else _module_names("exclude_modules", value, patterns)


def _module_names(name: str, value: object, patterns: PatternCompiler) -> tuple[str, ...] | Pattern:
    """Returns a list of names or a regular expression."""
    if isinstance(value, str) and value:
        return patterns.compile(name, value)
    if isinstance(value, list) and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise PeftConfigError(
        f"{name} must be a list of module names or a regular expression, got {value!r:.80}"
    )


def _invocation_tokens(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    tokens = value if isinstance(value, list) else []
    are_ids = all(type(token) is int and 0 <= token < 1 << 31 for token in tokens)
    if not (1 <= len(tokens) <= MAX_INVOCATION_TOKENS and are_ids):
        raise PeftConfigError(
            f"alora_invocation_tokens must be 1 to {MAX_INVOCATION_TOKENS} token ids, "
            f"got {value!r:.80}"
        )
    return tuple(tokens)


def _layers(value: object) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise PeftConfigError(f"layers_to_transform must be layer numbers, got {value!r:.80}")
    return frozenset(layers)


def _layers_pattern(value: object, patterns: PatternCompiler) -> tuple[Pattern, ...]:
    if not value:
        return (patterns.compile("layers_pattern", r".*?\.[^.]*\.(?P<index>\d+)\."),)
    names = value if isinstance(value, list) else [value]
    template = r"(?:^|.*?\.){}\.(?P<index>\d+)\."
    return tuple(patterns.compile("layers_pattern", name, template) for name in names)
