"""Reads from config.json how the projections of a quantized checkpoint are stored."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.engine.errors import ConfigError

FP8 = "fp8"
"""e4m3, with a scale for each output channel or one for the matrix."""
FP8_BLOCKS = "fp8-blocks"
"""e4m3, with a scale for each block of the matrix."""
PACKED = "pack-quantized"
"""Integers of compressed-tensors, packed along the input."""
GPTQ, AWQ = "gptq", "awq"

_SERVED = (
    "FP8 (compressed-tensors, fp8), and 4 or 8-bit integers (compressed-tensors pack-quantized, "
    "gptq, awq)"
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """One storage for all projections of a checkpoint.

    Attributes:
        layout: FP8, FP8_BLOCKS, PACKED, GPTQ or AWQ.
        bits: of an integer; 0 for fp8.
        block: rows and columns of a block that has a scale; (0, 0) unless FP8_BLOCKS.
        zero_offset: added to the stored zero points of GPTQ.
    """

    layout: str
    bits: int = 0
    block: tuple[int, int] = (0, 0)
    zero_offset: int = 0

    @property
    def is_fp8(self) -> bool:
        """Whether products are in fp8. Integers are dequantized instead."""
        return self.layout in (FP8, FP8_BLOCKS)


def quantization_of(model_path: Path) -> Quantization | None:
    """Returns the quantization of a Hugging Face directory. None: 16 or 32 bits, or GGUF, whose
    blocks say themselves what they are.

    Raises:
        ConfigError: it is not served.
    """
    path = model_path / "config.json"
    if not path.is_file():
        return None
    return read_quantization(json.loads(path.read_bytes()), model_path)


def read_quantization(config: dict[str, Any], model_path: Path) -> Quantization | None:
    """Returns what `quantization_config` of config.json says; None: there is none.

    Raises:
        ConfigError: the method is not served; the text names those that are.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    method = str(found.get("quant_method", "unknown"))
    readers = {
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "gptq": _gptq,
        "awq": _awq,
    }
    try:
        if method not in readers:
            raise ValueError("the method is not known")
        return readers[method](found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(
            f"{model_path}: weights quantized by {method!r} are not supported ({reason}); served "
            f"are {_SERVED}; use one of these, the unquantized checkpoint (with --quantization "
            "fp8 to save memory) or a GGUF file"
        ) from None


def _compressed_tensors(found: dict[str, Any]) -> Quantization:
    schemes = [group["weights"] for group in found["config_groups"].values()]
    if not schemes or any(scheme != schemes[0] for scheme in schemes):
        raise ValueError("its groups of layers are quantized differently")
    weights = schemes[0]
    bits, kind = int(weights["num_bits"]), weights["type"]
    strategy = str(weights["strategy"])
    if (kind, bits) == ("float", 8):
        if strategy == "block":
            return Quantization(FP8_BLOCKS, block=_pair(weights["block_structure"]))
        if strategy in ("channel", "tensor"):
            return Quantization(FP8)
    if kind == "int" and found.get("format") == PACKED and strategy in ("group", "channel"):
        return Quantization(PACKED, bits=_served_bits(bits))
    raise ValueError(f"{bits}-bit {kind}, by {strategy}, format {found.get('format')!r}")


def _fp8(found: dict[str, Any]) -> Quantization:
    block = found.get("weight_block_size")
    return Quantization(FP8_BLOCKS, block=_pair(block)) if block else Quantization(FP8)


def _gptq(found: dict[str, Any]) -> Quantization:
    stored_less_one = found.get("checkpoint_format", "gptq") == "gptq"
    bits = _served_bits(int(found["bits"]))
    return Quantization(GPTQ, bits=bits, zero_offset=1 if stored_less_one else 0)


def _awq(found: dict[str, Any]) -> Quantization:
    version = str(found.get("version", "gemm")).lower()
    bits = int(found.get("bits", found.get("w_bit", 4)))
    if version != "gemm" or bits != 4:
        raise ValueError(f"version {version!r} of {bits} bits")
    return Quantization(AWQ, bits=bits)


def _served_bits(bits: int) -> int:
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits")
    return bits


def _pair(block: Any) -> tuple[int, int]:
    rows, columns = (int(size) for size in block)
    return rows, columns
